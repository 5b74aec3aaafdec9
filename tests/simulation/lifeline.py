"""The line from a source to the directory: the real log of events, the real directory, a bad network between."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from kvpool.core.changes import BlockChange
from kvpool.core.directory import SourceRecord
from kvpool.core.ids import Tier
from kvpool.service.event_log import EventLog

if TYPE_CHECKING:
    from tests.simulation.node import Node
    from tests.simulation.world import World


class LifeLine:
    """Does what `service.announcer.Announcer` does, step by step in its order; batches may be lost or come twice."""

    def __init__(self, world: World, node: Node, source_id: str, tier: Tier, snapshot: Callable[[], Any]) -> None:
        self._world, self._snapshot = world, snapshot
        self._record = SourceRecord(source_id, node.epoch, tier)
        self._log = EventLog(keys_max=64)
        self._seq, self._snapshot_wanted = 0, True
        asyncio.get_running_loop().create_task(self._speak())

    def publish(self, changes: Sequence[BlockChange]) -> int:
        return self._log.append(changes)

    def lose(self) -> None:
        self._log.lose()

    @property
    def last_number(self) -> int:
        return self._log.last_number

    async def _speak(self) -> None:
        world = self._world
        self._attach()
        while True:
            await asyncio.sleep(0.05 + world.rng.random() * 0.8)
            changes = None if self._snapshot_wanted else self._log.take(16)
            if changes is None:
                self._snapshot_wanted = False
                await self._send_snapshot()
            elif changes:
                self._seq += 1
                self._send(self._seq, changes)
            else:
                # A heartbeat: an empty batch shows gaps too, as the next real one would.
                self._seq += 1
                self._send(self._seq, [])

    def _attach(self) -> None:
        self._world.directory.attach(self._record, self._world.loop.now_us())
        self._seq, self._snapshot_wanted = 0, True

    def _send(self, seq: int, changes: Sequence[BlockChange]) -> None:
        chance = self._world.rng.random() if self._world.faults else 1.0
        times = 0 if chance < 0.05 else 2 if chance < 0.1 else 1
        for _ in range(times):
            self._hear(
                self._world.directory.apply(
                    self._record.source_id, self._record.epoch, seq, changes, self._world.loop.now_us()
                )
            )

    async def _send_snapshot(self) -> None:
        held, number = self._snapshot(), self._log.last_number
        if self._world.rng.random() < 0.5:
            await asyncio.sleep(self._world.rng.random() * 0.2)
        self._log.snapshot_taken(number)
        parts = [(keys, fidelity) for keys, fidelity in held if len(keys)] or [(b"", 1)]
        for part, (keys, fidelity) in enumerate(parts):
            if self._world.faults and self._world.rng.random() < 0.05:
                # The stream broke: it begins anew.
                self._attach()
                return
            self._hear(
                self._world.directory.apply_snapshot_part(
                    self._record.source_id, self._record.epoch, self._seq, part, part == len(parts) - 1, keys,
                    int(fidelity), self._world.loop.now_us(),
                )
            )  # fmt: skip

    def _hear(self, applied: Any) -> None:
        self._snapshot_wanted |= applied.want_snapshot
