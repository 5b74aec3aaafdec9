"""One channel made of all that a source offers: takes the best link that is up, leaves it when it fails, comes back.

Transfers are measured as they happen; idle and broken links are probed by one thread for the whole process. Which link
to take is decided in `kvpool.core.links`.

What the channels beneath may have beyond `Channel`:
 * `Probed`: something light that fails if the link is broken. Without it an idle link is not probed, and one that is
   down is probed by opening it.
 * `Settling`: writes that failed may still be on their way. Without it they must be over when `write` raises.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from kvpool.channels.base import Capabilities, Channel, ChannelError, Memory, Offer, Opener, Rows, row_numbers
from kvpool.channels.links import Links
from kvpool.core.arrays import Descriptors
from kvpool.core.errors import BadArgument, KvpoolError, Reason, Unavailable
from kvpool.core.links import USABLE, Failure, LinkMeter

log = logging.getLogger(__name__)

#: A call moves its blocks in slices of about so many bytes: after a failure only the last slice is moved again.
SLICE_BYTES = 64 << 20
#: A link that moves nothing for so long, and for much longer than it should take, is left while there is another one.
STALL_S_MIN = 1.0
_STALL_FACTOR = 8
#: The source refuses what was asked for, over whichever link.
REFUSALS = (Reason.UNKNOWN_LEASE, Reason.UNKNOWN_RESERVATION, Reason.RESERVATION_EXPIRED, Reason.ALREADY_COMMITTED)

Result = TypeVar("Result")


@runtime_checkable
class Probed(Protocol):
    def probe(self, *, deadline_s: float) -> None:
        """Raises: ChannelError if the link does not answer in time. Moves no blocks."""
        ...


@runtime_checkable
class Settling(Protocol):
    def settle(self, reservation: int, slots: Descriptors, *, deadline_s: float) -> None:
        """Returns once nothing that earlier calls of this channel sent can reach these slots any more.

        Raises: ChannelError if that is not certain.
        """
        ...


@dataclass
class _Opened:
    """A channel of one kind; closed once it is retired and its last user is gone."""

    channel: Channel
    users: int = 0
    retired: bool = False


class FailoverChannel:
    """All channels to one source as one. Opens each when it is first needed."""

    def __init__(self, source: str, offers: Sequence[Offer], openers: Mapping[str, Opener], links: Links) -> None:
        """See `open`, which also opens the first channel."""
        self._source, self._links, self._openers = source, links, openers
        self._offers = {offer.kind: offer for offer in offers if offer.kind in openers}
        self._lock = threading.Lock()
        self._opened: dict[str, _Opened] = {}
        self._opening: dict[str, Future[None]] = {}
        self._closed = False
        self.kind = next(iter(self._offers), "")
        self.write_kind = next(iter(self._writable()), "")
        self.capabilities = Capabilities(same_host=False, through_source=False, threads_useful=1)

    @classmethod
    def open(
        cls,
        source: str,
        offers: Sequence[Offer],
        openers: Mapping[str, Opener],
        links: Links,
        *,
        deadline_s: float = 10.0,
    ) -> FailoverChannel:
        """Opens the best of `offers` that opens; the others wait until they are needed.

        Args:
            source: the source's id: links of several sessions to it are measured together.
            offers: best first. A parameter `writable` other than "1" says that the kind only reads.
            openers: by kind; offers of other kinds are left out.
        Raises: Unavailable if none opens.
        """
        made = cls(source, offers, openers, links)
        with links.now() as (meter, now_us):
            for kind in made._offers:
                meter.opened(source, kind, now_us)
        end_s = time.monotonic() + deadline_s
        failures: dict[str, str] = {}
        for kind in made._offers:
            try:
                made._release(kind, made._acquire(kind, end_s))
                made._use(kind)
                links.watch(made)
                return made
            except (Unavailable, BadArgument) as error:
                made._failed(kind, error, waited_us=0, size_bytes=0)
                failures[kind] = str(error)
        made.close()
        raise Unavailable(
            f"no data channel to {source} opens: {failures or 'none of those asked for is offered'}",
            hint="is its data port reachable from here?"
            if failures
            else "ask for other channels, or start it with them",
        )

    # ------------------------------------------------------------ the channel

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
        good = np.zeros(len(blocks), dtype=np.bool_)
        end_s = time.monotonic() + deadline_s
        for part in _slices(blocks.sizes):
            some, some_rows = _part(blocks, part), rows[part]

            def call(
                channel: Channel, left_s: float, some: Descriptors = some, some_rows: Rows = some_rows
            ) -> NDArray[np.bool_]:
                return channel.read(lease, some, out, some_rows, deadline_s=left_s, verify=verify)

            kind, good[part] = self._transfer(list(self._offers), some, end_s, call, reservation=None)
            self._use(kind)
        return good

    def write(
        self, reservation: int, slots: Descriptors, data: Memory, rows: Rows | None = None, *, deadline_s: float
    ) -> NDArray[np.uint64]:
        rows = row_numbers(rows, len(slots), len(data))
        digests = np.zeros(slots.digests.shape, dtype=np.uint64)
        end_s = time.monotonic() + deadline_s
        for part in _slices(slots.sizes):
            some, some_rows = _part(slots, part), rows[part]

            def call(
                channel: Channel, left_s: float, some: Descriptors = some, some_rows: Rows = some_rows
            ) -> NDArray[np.uint64]:
                return channel.write(reservation, some, data, some_rows, deadline_s=left_s)

            kind, digests[part] = self._transfer(self._writable(), some, end_s, call, reservation=reservation)
            self.write_kind = kind
        return digests

    def close(self) -> None:
        """Ends all channels; calls under way fail."""
        self._links.unwatch(self)
        with self._lock:
            self._closed = True
            opened, self._opened = list(self._opened.values()), {}
        for one in opened:
            one.channel.close()

    # ------------------------------------------------------------ transfers

    def _transfer(
        self,
        kinds: Sequence[str],
        blocks: Descriptors,
        end_s: float,
        call: Callable[[Channel, float], Result],
        *,
        reservation: int | None,
    ) -> tuple[str, Result]:
        """Carries out one slice over the first link on which it works. Raises: ChannelError, BadArgument."""
        size_bytes = int(blocks.sizes.sum(dtype=np.uint64))
        left, failures = list(kinds), dict[str, str]()
        while True:
            if self._closed:
                raise ChannelError("the channel is closed")
            if time.monotonic() >= end_s:
                raise ChannelError(f"{self._source}: the deadline passed{_told(failures)}", reason=Reason.DEADLINE)
            kind = self._pick(left, size_bytes, end_s)
            if kind is None:
                raise ChannelError(
                    f"{self._source}: no link is up{_told(failures)}", hint="`kvctl links` shows why; it is probed"
                )
            left.remove(kind)
            begin_us = time.monotonic_ns() // 1000
            opened: _Opened | None = None
            try:
                opened = self._acquire(kind, end_s)
                return kind, self._measured(
                    kind, opened, size_bytes, self._limit_s(kind, left, size_bytes, end_s), call
                )
            except (Unavailable, BadArgument) as error:
                transfer_began = opened is not None
                if transfer_began and (isinstance(error, BadArgument) or error.reason in REFUSALS):
                    raise
                waited_us = time.monotonic_ns() // 1000 - begin_us
                if not self._closed:
                    self._failed(kind, error, waited_us=waited_us, size_bytes=size_bytes)
                failures[kind] = str(error)
                if opened is not None and reservation is not None and left:
                    self._settle(opened.channel, reservation, blocks, end_s, error)
            finally:
                if opened is not None:
                    self._release(kind, opened)

    def _pick(self, kinds: Sequence[str], size_bytes: int, end_s: float) -> str | None:
        """The best link that is up; where none is, one whose probe is due and passes now."""
        with self._lock:
            users = max((one.users for one in self._opened.values()), default=0)
        with self._links.now() as (meter, now_us):
            kind = meter.choose(self._source, kinds, now_us, size_bytes=size_bytes, concurrency=users + 1)
            due = [k for k in kinds if kind is None and meter.probe_due_us(self._source, k) <= now_us]
        if kind is not None:
            return kind
        return next((k for k in due if self._probe_link(k, end_s - time.monotonic())), None)

    def _limit_s(self, kind: str, others: Sequence[str], size_bytes: int, end_s: float) -> float:
        """How long to try a link: to the end where there is no other one."""
        left_s = end_s - time.monotonic()
        with self._links.now() as (meter, _):
            if not any(meter.state(self._source, other) in USABLE for other in others):
                return left_s
            predicted_us = meter.predict_us(self._source, kind, size_bytes)
        patience_s = left_s / 2 if predicted_us is None else _STALL_FACTOR * predicted_us / 1e6
        return min(left_s, max(STALL_S_MIN, patience_s))

    def _measured(
        self, kind: str, opened: _Opened, size_bytes: int, limit_s: float, call: Callable[[Channel, float], Result]
    ) -> Result:
        users = opened.users
        begin_ns = time.perf_counter_ns()
        result = call(opened.channel, limit_s)
        duration_us = (time.perf_counter_ns() - begin_ns) // 1000
        with self._links.now() as (meter, now_us):
            meter.transferred(self._source, kind, size_bytes, duration_us, max(users, opened.users), now_us)
        return result

    def _settle(self, channel: Channel, reservation: int, slots: Descriptors, end_s: float, why: KvpoolError) -> None:
        """Makes sure that a failed write is over before another channel writes the same slots. Raises: ChannelError."""
        if isinstance(channel, Settling):
            try:
                channel.settle(reservation, slots, deadline_s=end_s - time.monotonic())
            except ChannelError as error:
                raise ChannelError(
                    f"{why}; and it is not certain that the write is over: {error}",
                    hint="give the reservation back: the source then waits for what is under way",
                ) from error

    def _failed(self, kind: str, error: KvpoolError, *, waited_us: int, size_bytes: int) -> None:
        failure = Failure.TIMEOUT if error.reason is Reason.DEADLINE else Failure.ERROR
        with self._links.now() as (meter, now_us):
            before = meter.state(self._source, kind)
            meter.failed(
                self._source, kind, failure, now_us, waited_us=waited_us, size_bytes=size_bytes, error=str(error)
            )
            after = meter.state(self._source, kind)
        if after is not before:
            log.warning("%s: the %s link is %s: %s", self._source, kind, after, error)
        self._retire_if_down(kind)

    # ------------------------------------------------------------ probes

    def next_probe_us(self) -> int:
        """When the next probe of any of the links is due."""
        with self._links.now() as (meter, now_us):
            dues = [meter.probe_due_us(self._source, kind) for kind in self._probed_kinds(meter)]
            return min(dues, default=now_us + self._links.config.idle_us)

    def probe_due(self) -> None:
        """Probes those links whose probes are due. Never raises for what a link does."""
        with self._links.now() as (meter, now_us):
            kinds = [k for k in self._probed_kinds(meter) if meter.probe_due_us(self._source, k) <= now_us]
        for kind in kinds:
            if not self._closed:
                self._probe_link(kind, self._links.config.probe_timeout_us / 1e6)

    def _probed_kinds(self, meter: LinkMeter) -> list[str]:
        """Those that are down, and those that are open, can be probed and are not in use: transfers tell more."""
        with self._lock:
            opened = [k for k, one in self._opened.items() if not one.users and isinstance(one.channel, Probed)]
        return [k for k in self._offers if k in opened or meter.state(self._source, k) not in USABLE]

    def _probe_link(self, kind: str, timeout_s: float) -> bool:
        """Opens the link if it is not open, and probes it; whether that went well."""
        end_s = time.monotonic() + min(timeout_s, self._links.config.probe_timeout_us / 1e6)
        with self._links.now() as (meter, now_us):
            meter.probe_begun(self._source, kind, now_us)
        try:
            opened = self._acquire(kind, end_s)
            try:
                begin_ns = time.perf_counter_ns()
                if isinstance(opened.channel, Probed):
                    opened.channel.probe(deadline_s=end_s - time.monotonic())
                latency_us = (time.perf_counter_ns() - begin_ns) // 1000
            finally:
                self._release(kind, opened)
        except (Unavailable, BadArgument) as error:
            with self._links.now() as (meter, now_us):
                if not self._closed:
                    meter.probe_failed(self._source, kind, now_us, error=str(error))
            self._retire_if_down(kind)
            return False
        with self._links.now() as (meter, now_us):
            before = meter.state(self._source, kind)
            meter.probed(self._source, kind, latency_us, now_us)
            after = meter.state(self._source, kind)
        if after is not before and after in USABLE:
            log.info("%s: the %s link is %s again", self._source, kind, after)
        return True

    # ------------------------------------------------------------ channels

    def _writable(self) -> list[str]:
        return [kind for kind, offer in self._offers.items() if offer.parameters.get("writable", "1") == "1"]

    def _use(self, kind: str) -> None:
        """Says which channel the last bytes came over."""
        with self._lock:
            opened = self._opened.get(kind)
            if opened is not None:
                self.kind, self.capabilities = kind, opened.channel.capabilities

    def _acquire(self, kind: str, end_s: float) -> _Opened:
        """The open channel of a kind, opened now if need be; `_release` follows. Raises: Unavailable, BadArgument."""
        while True:
            with self._lock:
                if self._closed:
                    raise ChannelError("the channel is closed")
                opened = self._opened.get(kind)
                if opened is not None:
                    opened.users += 1
                    return opened
                opening = self._opening.get(kind)
                if opening is None:
                    # In a thread of its own: openers have time limits of their own, callers have deadlines.
                    opening = self._opening[kind] = Future()
                    threading.Thread(target=self._open, args=(kind, opening), name="channel-open", daemon=True).start()
            try:
                opening.result(timeout=max(0.0, end_s - time.monotonic()))
            except TimeoutError as error:
                raise ChannelError(f"{kind}: not open by the deadline", reason=Reason.DEADLINE) from error

    def _release(self, kind: str, opened: _Opened) -> None:
        with self._lock:
            opened.users -= 1
            unused = opened.retired and opened.users == 0
        if unused:
            opened.channel.close()

    def _open(self, kind: str, opening: Future[None]) -> None:
        """The thread that opens. Whatever happens, those who wait hear of it."""
        try:
            channel = self._openers[kind](self._offers[kind].parameters)
        except BaseException as error:
            with self._lock:
                del self._opening[kind]
            opening.set_exception(error)
            return
        with self._lock:
            del self._opening[kind]
            closed = self._closed
            if not closed:
                self._opened[kind] = _Opened(channel)
        if closed:
            channel.close()
        opening.set_result(None)

    def _retire_if_down(self, kind: str) -> None:
        """A channel whose link is down is not used again: the probe that brings the link back opens another."""
        with self._links.now() as (meter, _):
            down = meter.state(self._source, kind) not in USABLE
        unused: _Opened | None = None
        with self._lock:
            opened = self._opened.pop(kind, None) if down else None
            if opened is not None:
                opened.retired = True
                unused = opened if opened.users == 0 else None
        if unused is not None:
            unused.channel.close()
        if down:
            self._links.look_again()


def _slices(sizes: NDArray[np.unsignedinteger]) -> Iterator[slice]:
    """Runs of blocks of about SLICE_BYTES, at least one block each; none for no blocks."""
    ends = np.cumsum(sizes, dtype=np.uint64)
    first = 0
    while first < len(sizes):
        before = int(ends[first - 1]) if first else 0
        stop = max(first + 1, int(np.searchsorted(ends, before + SLICE_BYTES, side="right")))
        yield slice(first, stop)
        first = stop


def _part(blocks: Descriptors, part: slice) -> Descriptors:
    return Descriptors(
        blocks.keys[part], blocks.offsets[part], blocks.sizes[part], blocks.generations[part], blocks.digests[part]
    )


def _told(failures: Mapping[str, str]) -> str:
    return "".join(f"; {kind}: {why}" for kind, why in failures.items())
