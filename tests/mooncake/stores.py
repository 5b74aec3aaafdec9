"""Stores that take the same calls: kvpool's on a node, and Mooncake's own, where installed, in its own process.

Addresses in arguments are `At(offset)`, into memory that each store has for itself and has registered.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.mooncake.memory import addresses, memory_at
from engines.mooncake.store import MooncakeDistributedStore
from engines.mooncake.tensors import bytes_of

MEMORY_BYTES = 1 << 17
#: Where a Mooncake is that is not on the import path: the folder that holds its package.
FOLDER = os.environ.get("MOONCAKE_FOLDER", "")


@dataclass(frozen=True)
class At:
    """An address: so far into the store's memory."""

    offset: int


def located(value: Any, base: int) -> Any:
    """Arguments with addresses in the place of offsets."""
    if isinstance(value, At):
        return base + value.offset
    return [located(one, base) for one in value] if isinstance(value, list) else value


def offsets(value: Any) -> Any:
    return located(value, 0)


class Ours:
    """kvpool's store."""

    def __init__(self, address: str) -> None:
        self.store = MooncakeDistributedStore()
        assert self.store.setup("here", "P2PHANDSHAKE", 0, 1 << 20, "tcp", "", address) == 0
        self._base = self.store.alloc_from_mem_pool(MEMORY_BYTES)
        assert self.store.register_buffer(self._base, MEMORY_BYTES) == 0
        self.memory = memory_at(self._base, MEMORY_BYTES)
        assert addresses([self._base])[0] == self._base

    def call(self, name: str, *arguments: Any) -> Any:
        answer = getattr(self.store, name)(*[located(argument, self._base) for argument in arguments])
        return [value and bytes(value) for value in answer] if name == "batch_get_buffer" else answer

    def fill(self, data: bytes) -> None:
        self.memory[: len(data)] = memoryview(data)

    def bytes_at(self, offset: int, size: int) -> bytes:
        return self.memory[offset : offset + size].tobytes()

    def close(self) -> None:
        self.store.close()


_CHILD = """
import ctypes, pickle, sys
from mooncake.store import MooncakeDistributedStore
master, size = sys.argv[1], int(sys.argv[2])
out = sys.stdout.buffer
store = MooncakeDistributedStore()
assert store.setup("127.0.0.1", "P2PHANDSHAKE", 64 << 20, 16 << 20, "tcp", "", master) == 0
memory = (ctypes.c_char * size)()
base = ctypes.addressof(memory)
assert store.register_buffer(base, size) == 0
while True:
    name, arguments = pickle.load(sys.stdin.buffer)
    def located(value):
        if isinstance(value, tuple):
            return base + value[0]
        if isinstance(value, dict):
            import torch
            flat = torch.frombuffer(bytearray(value["bytes"]), dtype=torch.uint8)
            return flat.view(getattr(torch, value["dtype"])).reshape(value["shape"])
        return [located(one) for one in value] if isinstance(value, list) else value
    if name == "fill":
        ctypes.memmove(base, arguments[0], len(arguments[0]))
        answer = None
    elif name == "bytes_at":
        answer = ctypes.string_at(base + arguments[0], arguments[1])
    else:
        answer = getattr(store, name)(*[located(one) for one in arguments])
        if name == "batch_get_buffer":
            answer = [value if value is None else bytes(memoryview(value)) for value in answer]
    pickle.dump(answer, out)
    out.flush()
"""


class Theirs:
    """Mooncake's own store, in a process of its own: it may end by a wrong argument."""

    def __init__(self, folder: str, master: str, log: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": folder, "MC_TCP_BIND_ADDRESS": "127.0.0.1"}
        with log.open("ab") as err:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _CHILD, master, str(MEMORY_BYTES)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err, env=environment,
            )  # fmt: skip

    def call(self, name: str, *arguments: Any) -> Any:
        return self._ask(name, [plain(argument) for argument in arguments])

    def fill(self, data: bytes) -> None:
        self._ask("fill", [data])

    def bytes_at(self, offset: int, size: int) -> bytes:
        return bytes(self._ask("bytes_at", [offset, size]))

    def close(self) -> None:
        self._process.kill()
        self._process.wait(20)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def _ask(self, name: str, arguments: list[Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        pickle.dump((name, arguments), self._process.stdin)
        self._process.stdin.flush()
        return pickle.load(self._process.stdout)


def plain(value: Any) -> Any:
    """Offsets as tuples and tensors as dicts, so that the other process needs no class of ours."""
    if isinstance(value, At):
        return (value.offset,)
    if hasattr(value, "data_ptr"):  # a tensor: not all of them can be pickled
        dtype = str(value.dtype).removeprefix("torch.")
        return {"dtype": dtype, "shape": tuple(value.shape), "bytes": bytes_of(value).tobytes()}
    return [plain(one) for one in value] if isinstance(value, list) else value


def mooncake_folder() -> str:
    """The folder of a real Mooncake, or nothing."""
    if FOLDER:
        return FOLDER
    spec = importlib.util.find_spec("mooncake")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return next((str(Path(place).parent) for place in places if any(Path(place).glob("store*.so"))), "")


@contextmanager
def running_mooncake(folder: str, logs: Path) -> Iterator[Theirs]:
    """Mooncake's master and one client that is its memory too."""
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        port, metrics = one.getsockname()[1], two.getsockname()[1]
    command = [
        f"{folder}/mooncake/mooncake_master", f"--rpc_port={port}", "--rpc_address=127.0.0.1",
        "--metrics_host=127.0.0.1", f"--metrics_port={metrics}",
    ]  # fmt: skip
    with (logs / "master.log").open("ab") as out:
        master = subprocess.Popen(command, stdout=out, stderr=out)
    theirs = None
    try:
        deadline_s = time.monotonic() + 30
        while not listens(port):
            assert master.poll() is None and time.monotonic() < deadline_s, (logs / "master.log").read_text()
        theirs = Theirs(folder, f"127.0.0.1:{port}", logs / "mooncake.log")
        yield theirs
    finally:
        if theirs is not None:
            theirs.close()
        master.kill()
        master.wait(20)


def listens(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), 0.2):
            return True
    except OSError:
        return False
