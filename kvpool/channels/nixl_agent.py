"""NVIDIA's NIXL library behind the few calls that the nixl channel needs; the only module that knows its names.

Memory here is the host's. An agent has no progress thread (NIXL's would burn a core): whoever uses it drives it. Calls
on one agent are made by one thread at a time.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import secrets
import threading
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpool.channels.base import ChannelError
from kvpool.core.errors import Unsupported

#: The first one chooses by CUDA version between the others; for host memory any of them does.
_PACKAGES = ("nixl", "nixl_cu12", "nixl_cu13")
_INFINIBAND = Path("/sys/class/infiniband")

_load_lock = threading.Lock()
_api: Any = None


class State(Enum):
    """Of a transfer."""

    RUNNING = "PROC"
    DONE = "DONE"
    FAILED = "ERR"


def available() -> bool:
    """Whether NIXL is installed; does not load it."""
    return any(importlib.util.find_spec(name) is not None for name in _PACKAGES)


def load() -> Any:
    """NIXL's Python module. Raises: Unsupported where it is not installed or does not load."""
    global _api
    with _load_lock:
        if _api is None:
            _api = _import()
        return _api


def _import() -> Any:
    if not _INFINIBAND.exists():
        # Of no use without such devices; and beside the system's own copies of their libraries, the ones in NIXL's
        # wheel end the process with a segmentation fault when it exits.
        os.environ.setdefault("UCX_MODULES", "^ib")
    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
    failures: list[str] = []
    for name in _PACKAGES:
        try:
            return importlib.import_module(f"{name}._api")
        except (ImportError, OSError) as error:
            failures.append(f"{name}: {error}")
    raise Unsupported(f"nixl: NIXL does not load: {'; '.join(failures)}", hint="pip install 'kvpool[nixl]'")


class Agent:
    """An agent with the UCX backend, over memory that is registered with it.

    It ends with its process: UCX has been seen to abort when it takes leave of a peer that is gone.
    """

    def __init__(self, purpose: str) -> None:
        """Raises: Unsupported, ChannelError."""
        api = load()
        name = f"kvpool-{purpose}-{os.getpid()}-{secrets.token_hex(8)}"
        with _translated("starting UCX"):
            self._agent = api.nixl_agent(name, api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
        self._registered: list[tuple[Any, NDArray[np.uint8]]] = []  # kept alive as long as the agent
        self._transfers: dict[int, Any] = {}

    def register(self, memory: NDArray[np.uint8]) -> None:
        """Lets transfers begin or end in this memory. Raises: ChannelError."""
        with _translated("registering memory"):
            entry = self._agent.register_memory([(memory.ctypes.data, memory.nbytes, 0, "")], "DRAM")
        self._registered.append((entry, memory))

    def metadata(self) -> bytes:
        """What another agent needs to reach what is registered here. Raises: ChannelError."""
        with _translated("packing metadata"):
            return bytes(self._agent.get_agent_metadata())

    def connect(self, metadata: bytes) -> str:
        """Makes another agent known; returns its name. Raises: ChannelError."""
        with _translated("reading the source's metadata"):
            name = self._agent.add_remote_agent(metadata)
        return name.decode() if isinstance(name, bytes) else str(name)

    def begin_read(
        self, transfer: int, peer: str, local: NDArray[np.uint64], remote: NDArray[np.uint64], message: bytes
    ) -> None:
        """Begins to read remote pieces into local ones; `peer` gets `message` at the end.

        Args:
            transfer: the caller's number for it; none of that number may be under way.
            local, remote: uint64 (pieces, 2), addresses and bytes; sizes are equal row by row.
        Raises: ChannelError.
        """
        assert transfer not in self._transfers
        with _translated("beginning a read"):
            lists = [self._agent.get_xfer_descs(_with_device(pieces), mem_type="DRAM") for pieces in (local, remote)]
            self._transfers[transfer] = self._agent.initialize_xfer("READ", *lists, peer, message)
            # Its answer is asked for again by `state`.
            self._agent.transfer(self._transfers[transfer])

    def state(self, transfer: int) -> State:
        """How a transfer stands; drives this agent. One that is done is forgotten. Raises: ChannelError."""
        with _translated("a read"):
            state = State(self._agent.check_xfer_state(self._transfers[transfer]))
            if state is State.DONE:
                self._transfers.pop(transfer).release()
        return state

    def notify(self, peer: str, message: bytes) -> None:
        """Raises: ChannelError."""
        with _translated("a notification"):
            self._agent.send_notif(peer, message)

    def progress(self) -> bool:
        """Does what other agents wait for; whether one of them has sent a message. Raises: ChannelError."""
        with _translated("progress"):
            return bool(self._agent.get_new_notifs())


def _with_device(pieces: NDArray[np.uint64]) -> NDArray[np.uint64]:
    described = np.zeros((len(pieces), 3), dtype=np.uint64)
    described[:, :2] = pieces
    return described


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    """NIXL's errors, which have no common class below Exception, as ChannelError."""
    try:
        yield
    except Exception as error:
        if not type(error).__name__.startswith("nixl"):
            raise
        raise ChannelError(
            f"nixl: {what}: {error}", hint="is the source still there, and its network reachable from here?"
        ) from error
