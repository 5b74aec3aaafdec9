"""The same world, driven by hypothesis: fewer histories, but what fails shrinks to few steps."""

import asyncio

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from kvpool.channels.base import ChannelError
from kvpool.core.errors import KvpoolError
from tests.simulation.chaos import Chaos
from tests.simulation.client import ACTIONS, Client
from tests.simulation.world import Plan, World, in_place

seeds = st.integers(0, 1 << 16)


class PoolMachine(RuleBasedStateMachine):
    """Each rule begins one action, or does one thing wrong, and lets some time pass; actions overlap."""

    @initialize(seed=seeds)
    def start(self, seed: int) -> None:
        self.world = World(seed, Plan(steps=0, check_every=5))
        self.place = in_place(self.world)
        self.place.__enter__()
        self.chaos = Chaos(self.world)

        async def begin() -> None:
            self.world.begin()
            for _ in range(3):
                self.world.new_client(acts=False)

        self.world.loop.run_until_complete(begin())

    @rule(seed=seeds, client=st.integers(0, 2), action=st.integers(0, len(ACTIONS) - 1), ms=st.integers(0, 600))
    def act(self, seed: int, client: int, action: int, ms: int) -> None:
        living = [one for one in self.world.clients if not one.life.dead]
        if living:
            self.world.rng.seed(seed)
            self.pass_time(ms, living[client % len(living)], ACTIONS[action][0])

    @rule(seed=seeds, node=st.integers(0, 2), ms=st.integers(0, 600))
    def go_wrong(self, seed: int, node: int, ms: int) -> None:
        self.world.rng.seed(seed)
        self.chaos.strike(self.world.nodes[node % len(self.world.nodes)])
        self.pass_time(ms)

    @rule(ms=st.integers(100, 3000))
    def wait(self, ms: int) -> None:
        self.pass_time(ms)

    def pass_time(self, ms: int, client: Client | None = None, action: object = None) -> None:
        async def quietly() -> None:
            try:
                await action(client)  # type: ignore[operator]
            except (KvpoolError, ChannelError):
                return

        async def some_time() -> None:
            if client is not None:
                client.tasks.append(self.world.spawn(quietly(), client.life.context))
            await asyncio.sleep(ms / 1000)

        self.world.loop.run_until_complete(some_time())
        self.world.check()

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        try:
            if self.world.failure is None:
                self.world.loop.run_until_complete(self.world.end(self.chaos))
        finally:
            self.place.__exit__(None, None, None)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, derandomize=True,
    suppress_health_check=list(HealthCheck), print_blob=True,
)  # fmt: skip
