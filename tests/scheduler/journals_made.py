"""Journals of simulated clusters for tests: the production core under virtual time, with a journal in front of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from scheduler.core.commands import Command
from scheduler.core.events import Event
from scheduler.service.journal import Journal
from scheduler.simulator.columns import TraceRequest
from scheduler.simulator.driver import Simulation
from scheduler.simulator.metrics import Result
from scheduler.simulator.settings import SimulationConfig

BLOCK_TOKENS = 512


class Recorded:
    """A core that journals what enters it."""

    def __init__(self, core: Any, journal: Journal) -> None:
        self._core, self._journal = core, journal

    def handle(self, event: Event, now_us: int) -> list[Command]:
        self._journal.event(event, now_us)
        commands = self._core.handle(event, now_us)
        self._journal.commands(commands)
        return commands

    def tick(self, now_us: int) -> list[Command]:
        from scheduler.core.events import TimePassed

        return self.handle(TimePassed(), now_us)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)


def requests(count: int, seconds: float, seed: int) -> list[TraceRequest]:
    """Sessions whose prompts grow, a few documents that many ask about, some long answers."""
    random = Random(seed)
    out = []
    arrivals = sorted(random.random() * seconds for _ in range(count))
    for number, arrival_s in enumerate(arrivals):
        stem = random.randrange(count // 4 + 1)
        prompt = 1 + int(random.random() ** 2 * 40_000)
        ids = tuple(stem * 100_000 + i for i in range(-(-prompt // BLOCK_TOKENS)))
        out.append(
            TraceRequest(
                round(arrival_s * 1e6), prompt, 1 + random.randrange(200), ids, BLOCK_TOKENS, session=f"s{stem}",
                tenant=f"t{number % 3}",
            )
        )  # fmt: skip
    return out


def record(folder: Path, trace: list[TraceRequest], config: SimulationConfig) -> tuple[Path, Result]:
    """Simulates with a journal of one file; returns that, and what became of the requests."""
    simulation = Simulation(trace, config)
    journal = Journal(folder, 1 << 30)
    journal.begin(simulation.core)
    simulation.control.core = Recorded(simulation.core, journal)  # type: ignore[assignment]
    result = simulation.run()
    simulation.settle(5_000_000)
    journal.close()
    return Path(journal.path), result


def saturated(seed: int, policy: str = "kvpool", **over: Any) -> SimulationConfig:
    """Four nodes, two roles, more work than they can do: requests wait, and some are refused."""
    config = SimulationConfig(nodes=4, split=(2, 1), policy=policy, seed=seed, max_tokens=256, ttft_slo_us=8_000_000)
    return replace(config, **over)
