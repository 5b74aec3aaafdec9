"""Life lines: how members of the cluster speak to the scheduler, in order, through what faults do to it. Pure."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Protocol

from kvpool.core.changes import BlockChange, ChangeKind
from kvpool.core.ids import Fidelity
from scheduler.core.events import (
    BlocksChanged,
    Event,
    SnapshotReceived,
    SourceAttached,
    SourceDetached,
    SourceHeartbeat,
)
from scheduler.simulator.clock import EventQueue

#: Messages of a member that is cut off, kept by its connection; beyond it the connection breaks.
KEPT_MAX = 4096
#: Changes told in one batch at most.
BATCH_KEYS_MAX = 65_536
RECONNECT_US = 1_000_000


class Control(Protocol):
    """The scheduler's side."""

    def open_stream(self, line: LifeLine) -> int:
        """A number that no line had before."""

    def deliver(self, event: Event) -> None: ...


class LifeLine:
    """One member's connection. Messages arrive in order; a new connection is a new stream."""

    def __init__(self, control: Control, queue: EventQueue, delay_us: int) -> None:
        self.control, self.queue = control, queue
        self.stream = 0  # 0 = not connected
        self.late_us = 0  # by a fault
        self._delay_us = delay_us
        self._cut = False
        self._kept: list[Event] = []
        self._last_us = 0

    def connect(self) -> None:
        """Opens a stream and introduces the member; without a way it tries again when there is one."""
        self.stream = 0
        self._kept.clear()
        if not self._cut:
            self.stream = self.control.open_stream(self)
            self.introduce()

    def introduce(self) -> None:
        """What is said first on a new stream."""
        raise NotImplementedError

    def farewell(self) -> Event:
        """What the scheduler's side makes of the end of the connection."""
        raise NotImplementedError

    def send(self, event: Event) -> None:
        if not self.stream:
            return
        if self._cut:
            if len(self._kept) < KEPT_MAX:
                self._kept.append(event)
            else:
                self.stream = 0
                self._kept.clear()
            return
        self._last_us = max(self._last_us, self.queue.now_us + self._delay_us + self.late_us)
        self.queue.at(self._last_us, self.control.deliver, event)

    def hang_up(self) -> None:
        """The process ends: the scheduler's side sees the connection reset, unless there is no way to it."""
        if self.stream and not self._cut:
            self.send(self.farewell())
        self.stream = 0
        self._kept.clear()

    def closed(self, stream: int) -> None:
        """The scheduler has ended a stream."""
        if stream == self.stream:
            self.stream = 0
            self.queue.after(RECONNECT_US, self._reconnect)

    def _reconnect(self) -> None:
        if not self.stream:
            self.connect()

    def cut(self) -> None:
        self._cut = True

    def heal(self) -> None:
        """What the connection kept arrives, if it still is one."""
        self._cut = False
        kept, self._kept = self._kept, []
        if not self.stream:
            self.connect()
            return
        for event in kept:
            self.send(event)


class SourceLine(LifeLine):
    """A source tells the directory what it holds: batches of changes, numbered, and snapshots when asked."""

    def __init__(
        self,
        control: Control,
        queue: EventQueue,
        delay_us: int,
        announce_us: int,
        attached: Callable[[int], SourceAttached],
        held: Callable[[], list[int]],
        count: Callable[[], int],
        key_of: Callable[[int], bytes],
        block_bytes: int,
        random: Random,
    ) -> None:
        """Args: attached: the introduction on a stream; held, count: all blocks of the source, and how many."""
        super().__init__(control, queue, delay_us)
        self.lost_ratio = 0.0  # of batches, by a fault
        self.batches_lost = 0
        self._announce_us = announce_us
        self._attached, self._held, self._count, self._key_of = attached, held, count, key_of
        self._block_bytes, self._random = block_bytes, random
        self._seq = 0
        self._pending: list[tuple[ChangeKind, int]] = []
        self._flush_due = False
        self._sent_us = 0

    def introduce(self) -> None:
        self._seq = 0
        self._pending.clear()
        self.send(self._attached(self.stream))

    def farewell(self) -> Event:
        return SourceDetached(self.stream)

    def changed(self, kind: ChangeKind, blocks: list[int]) -> None:
        self._pending.extend((kind, block) for block in blocks)
        if blocks and not self._flush_due:
            self._flush_due = True
            self.queue.after(self._announce_us, self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        pending, self._pending = self._pending, []
        if not self.stream:
            return
        for begin in range(0, len(pending), BATCH_KEYS_MAX):
            self._seq += 1
            event = BlocksChanged(self.stream, self._seq, self._changes(pending[begin : begin + BATCH_KEYS_MAX]))
            if self.lost_ratio and self._random.random() < self.lost_ratio:
                self.batches_lost += 1
                continue
            self._sent_us = self.queue.now_us
            self.send(event)

    def _changes(self, pending: list[tuple[ChangeKind, int]]) -> tuple[BlockChange, ...]:
        """Neighbours of one kind become one change."""
        runs: list[tuple[ChangeKind, list[bytes]]] = []
        for kind, block in pending:
            if not runs or runs[-1][0] is not kind:
                runs.append((kind, []))
            runs[-1][1].append(self._key_of(block))
        return tuple(BlockChange(kind, b"".join(keys)) for kind, keys in runs)

    def snapshot(self, stream: int) -> None:
        """All that is held, as of now, asked for on a stream."""
        if not self.stream or stream != self.stream:
            return
        self._pending.clear()
        keys = b"".join(self._key_of(block) for block in self._held())
        self.send(SnapshotReceived(self.stream, self._seq, 0, True, keys, Fidelity.EXACT))

    def heartbeat(self, interval_us: int) -> None:
        """A sign of life, unless a batch has just been one."""
        if self.stream and self.queue.now_us - self._sent_us >= interval_us:
            blocks = self._count()
            self.send(SourceHeartbeat(self.stream, blocks * self._block_bytes, blocks))
