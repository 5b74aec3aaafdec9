"""Several real schedulers in one event loop, and what a test asks of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from scheduler_clients import Client, connected

from scheduler.core.config import SECOND_US, SchedulerConfig
from scheduler.core.events import TimePassed
from scheduler.service.server import SchedulerServer, SchedulerServerConfig
from scheduler.service.shell import monotonic_us

TEST_DEADLINE_S = 110.0
PATIENCE_S = 60.0
#: Beats often; members, which say nothing by themselves here, are not suspected on a busy machine.
CORE = SchedulerConfig(heartbeat_interval_us=SECOND_US // 10, suspect_us=100 * SECOND_US, gone_us=200 * SECOND_US)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, TEST_DEADLINE_S))


async def eventually(holds: Callable[[], object], what: str) -> None:
    """Polls, since what is awaited comes through another process."""
    clock = asyncio.get_running_loop().time
    deadline = clock() + PATIENCE_S
    while not holds():
        assert clock() < deadline, f"not within {PATIENCE_S:.0f} s: {what}"
        await asyncio.sleep(0.01)


def view(server: SchedulerServer) -> dict[str, Any]:
    """What a scheduler knows: instances, and each source with its keys."""
    core = server.shell.core
    return {
        "instances": sorted(core.cluster.instances),
        "sources": {s: core.directory.held(s)[0].tobytes() for s in sorted(core.cluster.sources)},
    }


def check(server: SchedulerServer) -> None:
    server.shell.core.check_invariants()
    assert server.log is not None
    server.log.speaker.check_invariants()
    server.log.listener.check_invariants()
    server.log.outgoing.check_invariants()


class Clock:
    """The machine's time, in microseconds, and whatever a test lets pass at once."""

    def __init__(self) -> None:
        self.ahead_us = 0

    def __call__(self) -> int:
        return monotonic_us() + self.ahead_us


class Several:
    """Schedulers "s0", "s1" ... on one log, each with a client; more can be started, and any stopped."""

    def __init__(self, url: str, core: SchedulerConfig, journal: str) -> None:
        self._url, self._core, self._journal = url, core, journal
        self.servers: list[SchedulerServer] = []
        self.clients: list[Client] = []
        self._clock = Clock()
        self._stacks: list[AsyncExitStack] = []
        self._stopped: set[int] = set()

    async def start(self) -> SchedulerServer:
        name = f"s{len(self.servers)}"
        folder = f"{self._journal}/{name}" if self._journal else ""
        server = SchedulerServer(
            SchedulerServerConfig(
                listen="127.0.0.1:0", scheduler_id=name, redis=self._url, core=self._core, journal_dir=folder
            )
        )
        server.shell._clock_us = self._clock
        await server.startup()
        stack = AsyncExitStack()
        stack.push_async_callback(server.shutdown)
        self.servers.append(server)
        self._stacks.append(stack)
        self.clients.append(await stack.enter_async_context(connected(server.address)))
        return server

    async def stop(self, number: int) -> None:
        self._stopped.add(number)
        await self._stacks[number].aclose()

    def pass_time(self, us: int) -> None:
        """So much time passes, deadline by deadline, for all that run, and nobody says anything meanwhile.

        Silences of members are so a test's own: with seconds of the machine's time, one that stands still for a moment
        would make everybody suspect.
        """
        shells = [server.shell for number, server in enumerate(self.servers) if number not in self._stopped]
        end_us = self._clock() + us
        while True:
            due_us = min(end_us, *(shell.core.next_deadline_us() or end_us for shell in shells))
            self._clock.ahead_us += max(0, due_us - self._clock())
            for shell in shells:
                shell.submit(TimePassed())
            if due_us == end_us:
                return

    def log(self, number: int) -> Any:
        log = self.servers[number].log
        assert log is not None
        return log

    async def all_up(self) -> None:
        running = [s for s in self.servers if s.log is not None]
        await eventually(lambda: all(s.log.stream.up for s in running), "the log is up")  # type: ignore[union-attr]

    async def agree(self, what: str, numbers: list[int] | None = None) -> None:
        """Waits until these schedulers, or all, know the same."""
        chosen = [self.servers[n] for n in (numbers if numbers is not None else range(len(self.servers)))]
        await eventually(lambda: all(view(s) == view(chosen[0]) for s in chosen), what)
        for server in chosen:
            check(server)


@asynccontextmanager
async def schedulers(url: str, count: int, core: SchedulerConfig = CORE, journal: str = "") -> AsyncIterator[Several]:
    several = Several(url, core, journal)
    try:
        for _ in range(count):
            await several.start()
        await several.all_up()
        yield several
    finally:
        for number in range(len(several.servers)):
            await several.stop(number)
