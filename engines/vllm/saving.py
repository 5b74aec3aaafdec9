"""When a computed block may be stored, and how long the engine's own copy of it has to stay. Plain, bounded.

A step that was given bad blocks (a load that failed) computes nonsense behind them, in all workers, and so do steps
that were begun before vLLM heard of it. So a step's blocks are stored only when its output has come back without a
failure; and from the plan on until all workers have stored them they are held by one more reference, since vLLM frees
a request's blocks when it ends or is preempted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from engines.vllm.plans import Transfer


@dataclass(slots=True)
class _Saves:
    transfers: list[Transfer]
    block_ids: tuple[int, ...]
    workers_left: int


@dataclass(slots=True)
class SavePipeline:
    """Saves by the number of the step that computes them: computing -> confirmed -> with the workers -> done.

    blocks_max: blocks held at most; see `room`.
    workers: how many report each save.
    hold, free: take and give back a reference to engine blocks.
    """

    blocks_max: int
    workers: int
    hold: Callable[[Iterable[int]], None]
    free: Callable[[Iterable[int]], None]
    computing: dict[int, _Saves] = field(default_factory=dict)
    confirmed: dict[int, _Saves] = field(default_factory=dict)
    storing: dict[int, _Saves] = field(default_factory=dict)
    blocks: int = 0

    @property
    def room(self) -> int:
        """Blocks that may still be taken; what a step computes beyond it has to wait or is not stored."""
        return self.blocks_max - self.blocks

    def computes(self, step: int, transfers: list[Transfer]) -> None:
        """A step that is about to begin computes these blocks, `room` of them at most."""
        block_ids = tuple(block for transfer in transfers for block in transfer.block_ids)
        if not block_ids:
            return
        assert len(block_ids) <= self.room and step not in self.computing
        self.hold(block_ids)
        self.blocks += len(block_ids)
        self.computing[step] = _Saves(transfers, block_ids, self.workers)

    def computed(self, step: int) -> list[Transfer]:
        """A step has ended without a failure.

        Returns: what earlier steps were to compute whose outputs never said so, and which is not stored. Outputs come
        in the order of the steps.
        """
        lost = self._drop(self.computing, [number for number in self.computing if number < step])
        saves = self.computing.pop(step, None)
        if saves is not None:
            self.confirmed[step] = saves
        return lost

    def failed(self) -> list[Transfer]:
        """A load has failed in some step: nothing that was computed since is to be trusted. Returns: what it drops."""
        return self._drop(self.computing, list(self.computing))

    def drop_confirmed(self) -> None:
        """What waits for the workers is not stored."""
        self._drop(self.confirmed, list(self.confirmed))

    def take_confirmed(self) -> dict[int, list[Transfer]]:
        """Saves for the workers to begin with; each worker reports each number once."""
        taken, self.confirmed = self.confirmed, {}
        self.storing.update(taken)
        return {number: saves.transfers for number, saves in taken.items()}

    def stored(self, counts: Mapping[int, int]) -> None:
        """Workers are through with saves: number -> how many of them."""
        for number, count in counts.items():
            saves = self.storing.get(number)
            if saves is None:
                continue
            saves.workers_left -= count
            if saves.workers_left <= 0:
                del self.storing[number]
                self._let_go(saves)

    @property
    def has_work(self) -> bool:
        """Whether the engine has to go on stepping, so that confirmed saves reach the workers."""
        return bool(self.confirmed or self.storing)

    def held(self) -> Iterable[int]:
        """Blocks that will be given back when their stores are through, without anybody computing first."""
        for saves in (*self.confirmed.values(), *self.storing.values()):
            yield from saves.block_ids

    def _drop(self, stage: dict[int, _Saves], numbers: list[int]) -> list[Transfer]:
        dropped: list[Transfer] = []
        for number in numbers:
            saves = stage.pop(number)
            self._let_go(saves)
            dropped += saves.transfers
        return dropped

    def _let_go(self, saves: _Saves) -> None:
        self.blocks -= len(saves.block_ids)
        self.free(saves.block_ids)
