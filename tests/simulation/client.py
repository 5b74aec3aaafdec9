"""A client: a process that puts, reads, holds, removes; it may stall anywhere, die anywhere, and write too late."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from kvpool.channels.base import ChannelError
from kvpool.core.errors import KvpoolError
from tests.simulation import operating, reading, troubling, writing
from tests.simulation.content import ITEMS, Item
from tests.simulation.link import Link
from tests.simulation.loop import Life

if TYPE_CHECKING:
    from tests.simulation.node import Node
    from tests.simulation.world import World

#: What clients do, and how often.
ACTIONS = (
    (writing.put, 34), (reading.get, 34), (reading.get_twice, 3), (writing.copy, 4), (operating.remove, 6),
    (operating.hold, 5), (operating.wait, 3), (operating.evict, 4), (operating.set_quota, 2), (operating.drain, 1),
    (operating.reconnect, 2), (operating.remove_beside_read, 3), (operating.remove_under_lease, 2),
    (troubling.disturb, 5),
)  # fmt: skip
_WEIGHTS = [weight for _, weight in ACTIONS]


class Client:
    """`home`: the node of whose host it is, or None."""

    def __init__(self, world: World, name: str, home: Node | None) -> None:
        self.world, self.name, self.home = world, name, home
        self.life = Life(world.loop, self)
        self.links: dict[str, Link] = {}
        self.all_links: list[Link] = []
        self.tasks: list[asyncio.Task[None]] = []

    def begin(self) -> None:
        for _ in range(self.world.rng.choice((1, 1, 2))):
            self.tasks.append(self.world.spawn(self._act_on(), self.life.context))

    def link(self, node: Node) -> Link:
        """The live session with a node, or a new one. Raises: Unavailable, Overloaded."""
        link = self.links.get(node.name)
        if link is None or link.lost:
            link = self.links[node.name] = Link(self, node)
            self.all_links.append(link)
        return link

    def choose(self) -> Node:
        rng = self.world.rng
        return self.home if self.home is not None and rng.random() < 0.7 else rng.choice(self.world.nodes)

    def choose_items(self, count_max: int = 4) -> list[Item]:
        """Items of one namespace: a run of blocks in prompt order, or some objects."""
        rng = self.world.rng
        items = rng.choice((ITEMS[0], ITEMS[0], ITEMS[1], ITEMS[2], ITEMS[2]))
        first = rng.randrange(len(items))
        return list(items[first : first + rng.randint(1, count_max)])

    def kill(self) -> None:
        if self.life.dead:
            return
        self.world.note(f"{self.name} is killed")
        self.life.kill()
        for link in self.all_links:
            link.die()

    async def _act_on(self) -> None:
        world = self.world
        while world.steps_left > 0:
            await asyncio.sleep(world.rng.random() * 0.3)
            world.steps_left -= 1
            action = world.rng.choices(ACTIONS, _WEIGHTS)[0][0]
            try:
                await action(self)
            except (KvpoolError, ChannelError) as error:
                world.count(type(error).__name__)
                world.note(f"{self.name} {action.__name__}: {type(error).__name__}: {error}")
