"""One session of a client with a node, as the client sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvpool.channels.shared_index import SharedIndex
from kvpool.core.errors import Unavailable, UnknownSession
from tests.simulation.memory import Memory, WriterLock

if TYPE_CHECKING:
    from tests.simulation.client import Client
    from tests.simulation.node import Node


class Link:
    """`local`: the client has mapped the memory, and writes it itself. `lost`: it knows that the session ended."""

    def __init__(self, client: Client, node: Node) -> None:
        """Raises: Unavailable, Overloaded."""
        world = client.world
        if not node.alive or world.is_cut(client.name, node.name):
            raise Unavailable(f"{node.name} can't be reached")
        assert node.life is not None and node.memory is not None
        self.client, self.node, self.life = client, node, node.life
        self.memory: Memory = node.memory
        self.local = client.home is node
        self.lock: WriterLock | None = world.locks.new() if self.local else None
        path = self.lock.path if self.lock is not None else ""
        self.session = node.life.context.run(node.sessions.open, client.name, "host", path)
        if self.session.proof is None:
            self.lock = None
        self.numbers = list(node.numbers)
        self.shared = SharedIndex(self.memory) if self.local else None  # type: ignore[arg-type]
        self.lost = self.wire_harmed = False
        self._grants: dict[int, None] = {}

    async def call(self, method: str, request: Any) -> Any:
        """One call of the node's servicer. Raises: Unavailable, KvpoolError."""
        world, node = self.client.world, self.node
        await world.pause()
        if self.lost or node.life is not self.life or world.is_cut(self.client.name, node.name):
            raise Unavailable("the session is lost")
        try:
            reply = await self.life.call(node.serve(method, request))
        except UnknownSession:
            self.lose()
            raise
        await world.pause()
        if world.is_cut(self.client.name, node.name):
            raise Unavailable("the answer was lost")
        return reply

    # ------------------------------------------------------------ writing memory

    def granted(self, begin: int, size: int) -> int:
        """From now on this client may write a slot, until `stopped`, or until it knows that the session is lost."""
        grant = self.client.world.auditor.granted(self.memory.number, begin, begin + size, self.client.name)
        self._grants[grant] = None
        return grant

    def stopped(self, grant: int) -> None:
        if grant in self._grants:
            del self._grants[grant]
            self.client.world.auditor.stopped(self.memory.number, grant)

    def enter(self) -> bool:
        return not self.lost and self.lock is not None and self.lock.enter()

    def leave(self) -> None:
        assert self.lock is not None
        self.lock.leave()
        if self.lost and not self.lock.users:
            self._stop_all()

    def lose(self) -> None:
        """The client has noticed that the session ended: it begins no more writes."""
        if not self.lost:
            # The stream ends with it, which the node hears of sooner or later.
            self.client.world.later(1.5, lambda: self.node.end_session(self.session, "its stream ended"))
        self.lost = True
        if self.lock is not None:
            self.lock.retired = True
        if self.lock is None or not self.lock.users:
            self._stop_all()

    def die(self) -> None:
        """The client's process is gone."""
        self.lost = True
        if self.lock is not None:
            self.lock.dead = True
        self._stop_all()

    def _stop_all(self) -> None:
        for grant in list(self._grants):
            self.stopped(grant)

    @property
    def is_live(self) -> bool:
        """Whether the node still knows the session (which the client can't know)."""
        return self.node.life is self.life and self.node.holds_session(self.session)
