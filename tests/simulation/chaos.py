"""What goes wrong, and when."""

from __future__ import annotations

import asyncio
import errno
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.simulation.client import Client
    from tests.simulation.node import Node
    from tests.simulation.world import World


class Chaos:
    """Draws faults until the world has none."""

    def __init__(self, world: World) -> None:
        self._world, self._rng = world, world.rng
        world.chaos = self
        #: How seldom something goes wrong; some worlds are quiet.
        self._rest_s = self._rng.choice((0.5, 1.0, 3.0))
        self._faults = (
            (self.kill_node, 4), (self.kill_node_within_a_call, 6), (self.reboot, 2), (self.kill_client, 4),
            (self.partition, 5), (self.harm_memory, 3), (self.harm_disk, 2), (self.cut_power_while_writing, 3),
            (self.refuse_writes, 4), (self.refuse_reads, 3),
        )  # fmt: skip

    async def run(self) -> None:
        while self._world.faults and self._world.steps_left > 0:
            await asyncio.sleep(self._rng.random() * self._rest_s)
            if not self._world.faults:
                return
            self.strike(self._rng.choice(self._world.nodes))

    def strike(self, node: Node) -> None:
        """One fault; what is down comes up again some time later."""
        weights = [weight for _, weight in self._faults]
        self._rng.choices(self._faults, weights)[0][0](node)
        for other in self._world.nodes:
            if not other.alive:
                self._world.later(1.0, lambda other=other: self.restart(other))  # type: ignore[misc]

    def restart(self, node: Node) -> None:
        if node.alive:
            return
        try:
            node.start()
            self._world.note(f"{node.name} starts, with {node.core.adopted} blocks of its predecessor")
        except BaseException as error:
            self._world.fail(error)

    # ------------------------------------------------------------ processes

    def kill_node(self, node: Node) -> None:
        node.kill("at once")

    def kill_node_within_a_call(self, node: Node) -> None:
        if node.alive:
            node.driver.lines_left = self._rng.choice((self._rng.randint(1, 60), self._rng.randint(1, 400)))

    def reboot(self, node: Node) -> None:
        """With the host go all clients on it."""
        node.reboot()
        for client in list(self._world.clients):
            if client.home is node:
                self._kill(client)

    def kill_client(self, node: Node) -> None:
        living = [client for client in self._world.clients if not client.life.dead]
        if living:
            self._kill(self._rng.choice(living))

    def _kill(self, client: Client) -> None:
        if client.life.dead:
            return
        client.kill()
        for link in client.links.values():
            self._world.later(1.0, lambda link=link: link.node.end_session(link.session, "died"))  # type: ignore[misc]
        if self._world.steps_left > 0:
            self._world.new_client()

    # ------------------------------------------------------------ the network

    def partition(self, node: Node) -> None:
        """A client and a node do not hear each other; both may find that the session has ended, or neither."""
        world = self._world
        client = self._rng.choice(world.clients)
        pair = (client.name, node.name)
        world.cut[pair] = world.cut.get(pair, 0) + 1
        world.note(f"{client.name} and {node.name} are cut off from each other")

        def heal() -> None:
            if world.cut.get(pair):
                world.cut[pair] -= 1

        world.later(3.0, heal)
        link = client.links.get(node.name)
        if link is not None:
            if self._rng.random() < 0.7:
                world.later(2.0, lambda: link.node.end_session(link.session, "pings are missing"))
            if self._rng.random() < 0.5:
                world.later(2.0, link.lose)

    # ------------------------------------------------------------ bits

    def harm_memory(self, node: Node) -> None:
        memory = node.memory
        if memory is not None:
            at = self._rng.randrange(len(memory.data))
            if node.alive and len(readable := node.readable()):
                entry = self._rng.choice(readable.tolist())
                at = int(node.core.arrays.offsets[entry]) + self._rng.randrange(int(node.core.arrays.sizes[entry]))
            memory.data[at] ^= 1 << self._rng.randrange(8)
            memory.harmed[at] = None
            node.harmed = True
            self._world.note(f"byte {at} of {node.name}'s memory is harmed")

    def harm_disk(self, node: Node) -> None:
        inodes = list(node.files.inodes.values())
        if inodes:
            inode = self._rng.choice(inodes)
            at = self._rng.randrange(4096, max(4097, len(inode.current)))
            for data in (inode.current, inode.durable):
                if at < len(data):
                    data[at] ^= 1 << self._rng.randrange(8)
            node.harmed = True
            self._world.note(f"a byte of {node.name}'s disk is harmed")

    def cut_power_while_writing(self, node: Node) -> None:
        if node.alive and node.ssd_segments:
            node.files.steps = self._rng.randint(1, 8)

    def refuse_writes(self, node: Node) -> None:
        """The disk fails for a while, or for some calls; the node lives on."""
        if not node.ssd_segments:
            return
        kinds = self._rng.choice(_WRITING)
        files, times = node.files, self._rng.choice((1, 2, 1000))
        self._world.note(f"{node.name}'s disk refuses {', '.join(kinds)} {times} times")
        node.disk_failed = True
        for kind in kinds:
            files.faults[kind] = [errno.EIO] * times

        def heal() -> None:
            for kind in kinds:
                files.faults.pop(kind, None)
                node.files.faults.pop(kind, None)

        self._world.later(3.0, heal)

    def refuse_reads(self, node: Node) -> None:
        if node.ssd_segments:
            node.disk_failed = True
            kind, times = self._rng.choice((("read", 1), ("read", 1), ("read", 4), ("open", 1), ("open", 2)))
            node.files.faults[kind] = [errno.EIO] * times
            self._world.note(f"{node.name}'s disk refuses {kind} {times} times")


#: Calls of a disk that fail together.
_WRITING = (("write",), ("sync",), ("write", "sync", "truncate"), ("create",), ("remove",), ("sync_names",))
