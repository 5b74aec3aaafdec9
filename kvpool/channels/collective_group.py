"""A torch process group of two, and the messages that go through it: all that the collective channel knows of torch.

The group is made directly, without torch's default group, which belongs to the engine. Gloo is what is tested. NCCL
takes the same path with messages in GPU memory: written from its documentation, never run (one GPU can't hold both
ranks). Messages are this module's own memory, never the caller's or the segment's: a peer that is given up may still
write into what it was promised.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from kvpool.channels.base import ChannelError
from kvpool.channels.collective_wire import MESSAGE_BYTES, STORE, STORE_BYTES_MAX
from kvpool.channels.control import Control
from kvpool.channels.pieces import Chunk
from kvpool.core.errors import BadArgument, Reason, Unsupported

#: Messages on their way at the same time, at most.
CREDITS = 4
#: A message that takes longer has a peer that is gone or stuck: the group is given up, whatever the call's deadline.
MESSAGE_TIMEOUT_S = 5.0
_NAP_MIN_S, _NAP_MAX_S = 0.00002, 0.0005

BACKENDS = ("gloo", "nccl")


def require(backend: str) -> None:
    """Raises: BadArgument for a backend that does not exist; Unsupported for one that this process can't use."""
    if backend not in BACKENDS:
        raise BadArgument(f"no collective backend {backend!r}", hint=f"one of {', '.join(BACKENDS)}")
    if backend == "gloo" and not dist.is_gloo_available():
        raise Unsupported("collective: this build of torch has no Gloo", hint="install another build of torch")
    if backend == "nccl":
        _require_nccl()


def _require_nccl() -> None:
    if not dist.is_nccl_available():
        raise Unsupported(
            f"collective: torch {torch.__version__} has no NCCL",
            hint="install a build of torch with CUDA, or use the gloo backend",
        )
    if not torch.cuda.is_available():
        raise Unsupported(
            "collective: NCCL needs a GPU, and torch sees none",
            hint="check CUDA_VISIBLE_DEVICES and the driver, or use the gloo backend",
        )
    if os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING") not in ("0", "2"):
        raise Unsupported(
            "collective: NCCL would end this process when the other side is lost",
            hint="set TORCH_NCCL_ASYNC_ERROR_HANDLING=2 where kvpool shall use NCCL",
        )


class ControlStore(dist.Store):  # type: ignore[name-defined, misc]
    """The store with whose help two ranks find each other: what one sets, the other gets over their control connection.

    After `settle` it knows only what it has seen by then.
    """

    def __init__(self, control: Control, end_s: float) -> None:
        super().__init__()
        self._control, self._end_s = control, end_s
        self._known: dict[str, bytes] = {}
        self._settled = False

    def set(self, key: str, value: Any) -> None:
        value = value.encode() if isinstance(value, str) else bytes(value)
        self._known[key] = value
        if not self._settled:
            name = key.encode()
            self._control.send(STORE.pack(len(name), len(value)) + name + value, self._end_s)

    def get(self, key: str) -> bytes:
        while key not in self._known:
            if self._settled or not self._receive():
                raise ChannelError(f"collective: the other side never set {key!r}")
        return self._known[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        for key in keys:
            self.get(key)

    def check(self, keys: list[str]) -> bool:
        return all(key in self._known for key in keys)

    def delete_key(self, key: str) -> bool:
        return self._known.pop(key, None) is not None

    def settle(self) -> None:
        """Both groups are made; what follows on the connection is no longer the store's. Raises: ChannelError."""
        self._control.send(STORE.pack(0, 0), self._end_s)
        while self._receive():
            pass
        self._settled = True

    def _receive(self) -> bool:
        """Takes one key in; False if the other side has no more."""
        key_bytes, value_bytes = STORE.unpack(self._control.receive(STORE.size, self._end_s))
        if key_bytes + value_bytes > STORE_BYTES_MAX:
            raise ChannelError("collective: the other side does not speak this protocol")
        name = self._control.receive(key_bytes, self._end_s)
        value = self._control.receive(value_bytes, self._end_s)
        if not name:
            return False
        self._known[name.decode(errors="replace")] = value
        return True


class Group:
    """Two ranks: 0 is the source, 1 the client. Used by one thread; of no more use after an error."""

    def __init__(self, backend: str, rank: int, control: Control, end_s: float) -> None:
        """Made by both sides at the same time. Raises: ChannelError; as `require`."""
        require(backend)
        self._peer, self._tag = 1 - rank, 0
        self._device = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")
        store = ControlStore(control, end_s)
        try:
            self._group = _MAKERS[backend](store, rank, control.local_host)
            self._host = torch.empty((CREDITS, MESSAGE_BYTES), dtype=torch.uint8, pin_memory=backend == "nccl")
            self._messages = self._host if backend == "gloo" else torch.empty_like(self._host, device=self._device)
            if backend == "nccl":
                # Makes the communicator, for which the store is needed.
                self._exchange(rank, end_s)
            store.settle()
        except RuntimeError as error:
            raise ChannelError(f"collective: no {backend} group: {_first_line(error)}") from error
        self._works: list[Any] = [None] * CREDITS

    def send_all(self, chunks: Iterable[Chunk], fill: Callable[[Chunk, int], None], end_s: float) -> None:
        """Sends chunks of up to MESSAGE_BYTES. `fill(chunk, address)` puts one together. Raises: ChannelError."""
        slots: deque[int] = deque()
        for number, chunk in enumerate(chunks):
            slot = number % CREDITS
            if len(slots) == CREDITS:
                self._wait(slots.popleft(), end_s)
            fill(chunk, self._address(slot))
            self._send(slot, chunk.bytes_total)
            slots.append(slot)
        for slot in slots:
            self._wait(slot, end_s)

    def receive_all(self, chunks: Iterable[Chunk], take: Callable[[Chunk, int], None], end_s: float) -> None:
        """Receives chunks, in order; `take(chunk, address)` has each one until it returns. Raises: ChannelError."""
        under_way: deque[tuple[int, Chunk]] = deque()

        def finish() -> None:
            slot, chunk = under_way.popleft()
            self._wait(slot, end_s)
            if self._messages is not self._host:
                self._host[slot, : chunk.bytes_total].copy_(self._messages[slot, : chunk.bytes_total])
            take(chunk, self._address(slot))

        for number, chunk in enumerate(chunks):
            if len(under_way) == CREDITS:
                finish()
            self._receive(number % CREDITS, chunk.bytes_total)
            under_way.append((number % CREDITS, chunk))
        while under_way:
            finish()

    def close(self) -> None:
        """Ends it, also with messages under way. Safe to call again."""
        group, self._group = self._group, None
        if group is None:
            return
        # One that is broken already is what was asked for.
        with contextlib.suppress(RuntimeError):
            group.abort()
        del group
        # Only now, that nobody may write into them any more.
        self._works = []
        self._messages = self._host = torch.empty((0, 0), dtype=torch.uint8)

    # ------------------------------------------------------------ one message

    def _address(self, slot: int) -> int:
        return int(self._host.data_ptr()) + slot * MESSAGE_BYTES

    def _send(self, slot: int, size: int) -> None:
        if self._messages is not self._host:
            self._messages[slot, :size].copy_(self._host[slot, :size])
        self._begin(slot, size, self._group.send)

    def _receive(self, slot: int, size: int) -> None:
        self._begin(slot, size, self._group.recv)

    def _begin(self, slot: int, size: int, operation: Callable[..., Any]) -> None:
        self._tag = (self._tag + 1) & 0xFFFF
        try:
            self._works[slot] = operation([self._messages[slot, :size]], self._peer, self._tag)
        except RuntimeError as error:
            raise ChannelError(f"collective: the group is broken: {_first_line(error)}") from error

    def _wait(self, slot: int, end_s: float) -> None:
        work, self._works[slot] = self._works[slot], None
        left_s = min(end_s - time.monotonic(), MESSAGE_TIMEOUT_S)
        if left_s <= 0:
            raise _too_late()
        try:
            if self._device.type == "cuda":
                _wait_cuda(work, time.monotonic() + left_s)
            else:
                work.wait(timedelta(seconds=left_s))
        except RuntimeError as error:
            # Gloo counts in whole milliseconds, and gives up that much early.
            if time.monotonic() >= end_s - 0.001:
                raise _too_late() from error
            raise ChannelError(f"collective: the group is broken: {_first_line(error)}") from error

    def _exchange(self, rank: int, end_s: float) -> None:
        self._works = [None] * CREDITS
        for sender in (0, 1):
            (self._send if rank == sender else self._receive)(0, 1)
            self._wait(0, end_s)


def _wait_cuda(work: Any, end_s: float) -> None:
    """NCCL's own wait holds up the stream, not the thread. Raises: ChannelError, RuntimeError."""
    nap_s = _NAP_MIN_S
    while not work.is_completed():
        if time.monotonic() > end_s:
            raise _too_late()
        time.sleep(nap_s)
        nap_s = min(2 * nap_s, _NAP_MAX_S)
    if not work.is_success():
        raise ChannelError("collective: a message failed")


def _gloo(store: Any, rank: int, host: str) -> Any:
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timedelta(seconds=MESSAGE_TIMEOUT_S)
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    options._threads = 1
    return dist.ProcessGroupGloo(store, rank, 2, options)


def _nccl(store: Any, rank: int, host: str) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=MESSAGE_TIMEOUT_S)
    return dist.ProcessGroupNCCL(store, rank, 2, options)


_MAKERS: dict[str, Callable[[Any, int, str], Any]] = {"gloo": _gloo, "nccl": _nccl}


def _too_late() -> ChannelError:
    return ChannelError("collective: the deadline passed", reason=Reason.DEADLINE)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
