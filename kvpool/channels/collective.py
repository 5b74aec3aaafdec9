"""The collective channel, client side: blocks as messages of a process group of two, made for this client and source.

For GPUs of one NCCL domain; Gloo does the same between CPUs. Two-sided: the source sends only what a lease covers, and
stores only what a reservation covers. Neither side promises memory of its own to the other (see `collective_group`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvpool.channels import collective_wire as wire
from kvpool.channels.base import Capabilities, ChannelError, Memory, Rows, addresses, check_memory, row_numbers
from kvpool.channels.control import Control
from kvpool.channels.pieces import Digested, cut
from kvpool.core.arrays import Descriptors
from kvpool.core.errors import BadArgument, Reason, Unsupported

if TYPE_CHECKING:
    from kvpool.channels.collective_group import Group

OPEN_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 10.0
RANK = 1

_HOLDS = {wire.Operation.READ: "lease", wire.Operation.WRITE: "reservation"}
_REASONS = {wire.Operation.READ: Reason.UNKNOWN_LEASE, wire.Operation.WRITE: Reason.UNKNOWN_RESERVATION}
_WELCOMES: dict[int, tuple[str, Reason]] = {
    wire.Status.REFUSED: ("it does not know the session", Reason.UNKNOWN_SESSION),
    wire.Status.OVERLOADED: ("it has too many clients at work", Reason.OVERLOADED),
}


def available() -> bool:
    """Whether torch is installed; does not load it."""
    return importlib.util.find_spec("torch") is not None


def load_group() -> Any:
    """The module `collective_group`, which needs torch. Raises: Unsupported without it, or without its groups."""
    try:
        from kvpool.channels import collective_group
    except (ImportError, AttributeError) as error:
        raise Unsupported(f"collective: {error}", hint="pip install 'kvpool[torch]'") from error
    return collective_group


@dataclass(frozen=True, slots=True)
class _Pair:
    """This end of a pair."""

    control: Control
    group: Group

    def close(self) -> None:
        # First the connection: the other end then stops to wait for this one.
        self.control.close()
        self.group.close()


class CollectiveChannel:
    """A pair with one source, made when it is needed; one call at a time, others wait within their deadlines.

    Digests are always checked. After an error the next call makes another pair. The source may end a pair that has not
    been used for long.
    """

    kind = "collective"
    capabilities = Capabilities(same_host=False, through_source=True, threads_useful=1)

    def __init__(self, host: str, port: int, token: bytes, backend: str) -> None:
        """Raises: Unsupported without torch, or what it needs; BadArgument for a backend that does not exist."""
        load_group().require(backend)
        self._address, self._token, self._backend = (host, port), token, backend
        self._turn = threading.Lock()
        self._closed = False
        self._unsettled = False  # a write failed, and what it sent may still be stored
        self._pair: _Pair | None = None
        self._control: Control | None = None  # of the pair, or of one being made

    @classmethod
    def open(cls, parameters: Mapping[str, str]) -> CollectiveChannel:
        """Opens what a source offered. Raises: ChannelError, BadArgument, Unsupported."""
        try:
            host, _, port = parameters["address"].rpartition(":")
            token = bytes.fromhex(parameters["token"])
            channel = cls(host, int(port), token, parameters["backend"])
        except (KeyError, ValueError) as error:
            raise BadArgument(f"a bad collective offer: {error}") from error
        if len(token) != wire.TOKEN_BYTES:
            raise BadArgument(f"a bad collective offer: a token of {len(token)} bytes")
        with channel._my_turn(time.monotonic() + OPEN_TIMEOUT_S):
            pass
        return channel

    def read(
        self,
        lease: int,
        blocks: Descriptors,
        out: Memory,
        rows: Rows | None = None,
        *,
        deadline_s: float,
        verify: bool = True,
    ) -> NDArray[np.bool_]:
        rows = row_numbers(rows, len(blocks), len(out))
        check_memory(out, rows, blocks.sizes, to_write=True)
        end_s = time.monotonic() + deadline_s
        where = addresses(out, rows)
        good = np.zeros(len(rows), dtype=np.bool_)
        with self._my_turn(end_s) as pair:
            for part in _requests(len(rows)):
                received = Digested(_part(blocks, part), where[part])
                self._ask(pair, wire.Operation.READ, lease, _part(blocks, part), end_s)
                chunks = cut(blocks.sizes[part], wire.MESSAGE_BYTES)
                pair.group.receive_all(chunks, received.receive, end_s)
                self._confirm(pair, wire.Operation.READ, part, end_s)
                good[part] = received.good
        return good

    def write(
        self, reservation: int, slots: Descriptors, data: Memory, rows: Rows | None = None, *, deadline_s: float
    ) -> NDArray[np.uint64]:
        rows = row_numbers(rows, len(slots), len(data))
        check_memory(data, rows, slots.sizes)
        end_s = time.monotonic() + deadline_s
        where = addresses(data, rows)
        digests = np.zeros(slots.digests.shape, dtype=np.uint64)
        with self._my_turn(end_s) as pair:
            if self._unsettled:
                self._request(pair, wire.Operation.SETTLE, wire.ANY_RESERVATION, 0, 0, b"", end_s)
            self._unsettled = True
            for part in _requests(len(rows)):
                sent = Digested(_part(slots, part), where[part])
                self._ask(pair, wire.Operation.WRITE, reservation, _part(slots, part), end_s)
                pair.group.send_all(cut(slots.sizes[part], wire.MESSAGE_BYTES), sent.send, end_s)
                self._confirm(pair, wire.Operation.WRITE, part, end_s)
                digests[part] = sent.digests
            self._unsettled = False
        return digests

    def probe(self, *, deadline_s: float) -> None:
        """Sees that the source answers. Raises: ChannelError."""
        end_s = time.monotonic() + deadline_s
        with self._my_turn(end_s) as pair:
            self._request(pair, wire.Operation.PING, 0, 0, 0, b"", end_s)

    def settle(self, reservation: int, slots: Descriptors, *, deadline_s: float) -> None:
        """Returns once nothing that earlier calls sent can reach slots of this reservation. Raises: ChannelError."""
        end_s = time.monotonic() + deadline_s
        with self._my_turn(end_s) as pair:
            self._request(pair, wire.Operation.SETTLE, reservation, 0, 0, b"", end_s)

    def close(self) -> None:
        self._closed = True
        control = self._control
        if control is not None:
            control.interrupt()
        # A call under way fails within the time of a message, and then ends the pair by itself.
        if self._turn.acquire(timeout=CLOSE_TIMEOUT_S):
            self._disconnect()
            self._turn.release()

    # ------------------------------------------------------------ requests

    def _ask(self, pair: _Pair, operation: wire.Operation, hold: int, blocks: Descriptors, end_s: float) -> None:
        """Sends a request. Returns when all of its blocks may follow. Raises: ChannelError."""
        packed = wire.pack_descriptors(blocks.offsets, blocks.sizes, blocks.generations)
        total = int(blocks.sizes.sum(dtype=np.uint64))
        self._request(pair, operation, hold, len(blocks), total, packed, end_s)
        refused = sum(map(bool, pair.control.receive(len(blocks), end_s)))
        if refused:
            message = f"collective: no {_HOLDS[operation]} covers {refused} of {len(blocks)} blocks"
            raise _Refused(message, reason=_REASONS[operation])

    def _request(
        self, pair: _Pair, operation: wire.Operation, hold: int, count: int, total: int, packed: bytes, end_s: float
    ) -> None:
        left_ms = min(max(int((end_s - time.monotonic()) * 1000), 1), wire.REQUEST_MS_MAX)
        pair.control.send(wire.REQUEST.pack(operation, count, hold, total, left_ms) + packed, end_s)
        status = pair.control.receive(1, end_s)[0]
        if status != wire.Status.OK:
            raise ChannelError(f"collective: the source refused the request (status {status})")

    def _confirm(self, pair: _Pair, operation: wire.Operation, part: slice, end_s: float) -> None:
        if any(pair.control.receive(part.stop - part.start, end_s)):
            message = f"collective: the {_HOLDS[operation]} ended while the blocks were under way"
            raise _Refused(message, reason=_REASONS[operation])

    # ------------------------------------------------------------ the pair

    @contextlib.contextmanager
    def _my_turn(self, end_s: float) -> Iterator[_Pair]:
        """The pair, for one call; it does not outlive an error other than a refusal. Raises: ChannelError."""
        if not self._turn.acquire(timeout=max(end_s - time.monotonic(), 0)):
            raise ChannelError("collective: another call took all the time", reason=Reason.DEADLINE)
        try:
            try:
                if end_s <= time.monotonic():
                    raise ChannelError("collective: the deadline passed", reason=Reason.DEADLINE)
                yield self._connected(end_s)
            except _Refused:
                raise
            except BaseException as error:
                self._disconnect()
                if self._closed and isinstance(error, ChannelError):
                    raise ChannelError("collective: the channel is closed") from error
                raise
        finally:
            self._turn.release()

    def _connected(self, end_s: float) -> _Pair:
        if self._pair is not None and self._pair.control.lost():
            # The source ends pairs that have long been idle.
            self._disconnect()
        if self._pair is None:
            self._pair = self._connect(end_s)
        return self._pair

    def _connect(self, end_s: float) -> _Pair:
        try:
            sock = socket.create_connection(self._address, timeout=max(end_s - time.monotonic(), 0.001))
        except OSError as error:
            raise ChannelError(
                f"collective: nothing answers at {self._address[0]}:{self._address[1]}: {error}"
            ) from error
        self._control = control = Control(sock, "collective")
        try:
            if self._closed:
                raise ChannelError("collective: the channel is closed")
            control.send(wire.GREETING.pack(wire.MAGIC, self._token), end_s)
            status = control.receive(1, end_s)[0]
            if status != wire.Status.OK:
                what, reason = _WELCOMES.get(status, (f"an unknown answer {status}", Reason.PROTOCOL_MISMATCH))
                raise ChannelError(f"collective: the source refused the connection: {what}", reason=reason)
            return _Pair(control, load_group().Group(self._backend, RANK, control, end_s))
        except BaseException:
            control.close()
            raise

    def _disconnect(self) -> None:
        pair, self._pair, self._control = self._pair, None, None
        if pair is not None:
            pair.close()


class _Refused(ChannelError):
    """The source does not let this client have it; the pair is as good as before."""


def _requests(count: int) -> Iterator[slice]:
    for first in range(0, count, wire.BLOCKS_MAX):
        yield slice(first, min(first + wire.BLOCKS_MAX, count))


def _part(blocks: Descriptors, part: slice) -> Descriptors:
    return blocks.take(np.arange(part.start, part.stop))
