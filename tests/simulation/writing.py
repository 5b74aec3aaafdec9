"""How clients write: reserve, copy piece by piece, commit by sections or at once; or stall, give up, come too late."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import numpy as np

from kvpool.core.arrays import Descriptors
from kvpool.core.hashing import section_digest
from kvpool.core.ids import Fidelity
from kvpool.service import wire
from kvpool.v1 import block_source_pb2 as pb
from kvpool.v1 import common_pb2
from tests.simulation import reading
from tests.simulation.content import IDS, Bytes, Item, key_array, sections_of
from tests.simulation.link import Link
from tests.simulation.node import Connection

if TYPE_CHECKING:
    from tests.simulation.client import Client

TENANTS = ("", "", "red", "blue")


async def put(client: Client) -> None:
    """Puts new versions of some items to a node."""
    rng = client.world.rng
    items = client.choose_items()
    lossy = not items[0].is_object and rng.random() < 0.1
    versions = [client.world.next_version() if item.is_object else 0 for item in items]
    fidelity = Fidelity.INT8 if lossy else Fidelity.EXACT
    link = client.link(client.choose())
    if lossy:
        link.node.replaced.update(dict.fromkeys(item.number for item in items))
    await put_versions(link, items, versions, fidelity)


async def copy(client: Client) -> None:
    """Reads from one node and puts the same to another."""
    world = client.world
    if len(world.nodes) < 2:
        return
    source, target = world.rng.sample(world.nodes, 2)
    items = client.choose_items()
    held = await reading.read_leased(client.link(source), items, Fidelity.EXACT)
    found = [item for item in items if item.number in held]
    if found:
        versions = [_version_of(item, held[item.number], world.version) for item in found]
        await put_versions(client.link(target), found, versions, Fidelity.EXACT)


def _version_of(item: Item, content: Bytes, newest: int) -> int:
    versions = range(newest + 1) if item.is_object else range(1)
    return next(v for v in versions if np.array_equal(item.content(v, Fidelity.EXACT), content))


def key_list(items: list[Item], parent: bytes = b"") -> common_pb2.KeyList:
    return common_pb2.KeyList(keys=key_array(items).tobytes(), parent=parent)


async def put_versions(link: Link, items: list[Item], versions: list[int], fidelity: Fidelity) -> None:
    """Raises: KvpoolError."""
    world, spec = link.client.world, items[0].spec
    rng = world.rng
    named = items[0].is_object
    explicit = named or fidelity is not Fidelity.EXACT
    sizes = [item.size_bytes(version, fidelity) for item, version in zip(items, versions, strict=True)]
    request = pb.ReserveRequest(
        session_id=link.session.id, namespace_id=IDS[spec], keys=key_list(items),
        ttl_ms=rng.choice((150, 600, 2500)), tenant=rng.choice(TENANTS), names=[i.name for i in items] if named else [],
        sizes=sizes if explicit else [], fidelity=int(fidelity),
    )  # fmt: skip
    if rng.random() < 0.1:
        request.hold.CopyFrom(common_pb2.HandoffHold(request_id=f"r{rng.randrange(4)}", ttl_ms=rng.randint(100, 2000)))
    reply = await link.call("Reserve", request)
    mine = [i for i, status in enumerate(reply.status) if status == pb.ReserveReply.RESERVED]
    if not mine:
        return
    slots = wire.descriptors_from_proto(reply.slots, key_array(items), sections_of(spec))
    writer = _Writer(link, reply.reservation_id, slots, items, versions, fidelity)
    await writer.write(mine)


class _Writer:
    """Writes what a reservation gave."""

    def __init__(
        self, link: Link, reservation: int, slots: Descriptors, items: list[Item], versions: list[int],
        fidelity: Fidelity,
    ) -> None:  # fmt: skip
        self._link, self._reservation, self._slots, self._items = link, reservation, slots, items
        self._versions, self._fidelity = versions, fidelity
        self._world = link.client.world
        self._sections = sections_of(items[0].spec)

    async def write(self, rows: list[int]) -> None:
        link = self._link
        local = link.lock is not None
        if link.lost:
            return
        grants = {row: self._grant(row) for row in rows} if local else {}
        try:
            await self._write_rows(rows, grants, local=local)
        finally:
            # Whatever happened, this writer has stopped.
            for grant in grants.values():
                link.stopped(grant)

    async def _write_rows(self, rows: list[int], grants: dict[int, int], *, local: bool) -> None:
        rng = self._world.rng
        by_section = rng.random() < 0.2
        for group in [[row] for row in rows] if by_section else [rows]:
            written = [row for row in group if await (self._write_memory(row) if local else self._send(row))]
            if rng.random() < 0.06 or len(written) < len(group):
                await self._abort(grants)
                return
            if rng.random() < 0.05:
                await asyncio.sleep(rng.random() * 3)
            await self._commit(written, grants, one_by_one=by_section)

    def _content(self, row: int) -> Bytes:
        return self._items[row].content(self._versions[row], self._fidelity)

    def _grant(self, row: int) -> int:
        size = len(self._content(row)) + len(self._items[row].name)
        return self._link.granted(int(self._slots.offsets[row]), size)

    # ------------------------------------------------------------ moving bytes

    async def _write_memory(self, row: int) -> bool:
        """Into the shared memory, piece by piece. False: the session was lost before it began."""
        link = self._link
        await self._world.pause(0.2)
        if not link.enter():
            return False
        await self._pieces(row)
        link.leave()
        return True

    async def _send(self, row: int) -> bool:
        """Over a connection, which a thread of the node serves. False: it did not come through."""
        link, rng = self._link, self._world.rng
        # It may come when nobody waits for it any more.
        await self._world.pause(3.0 if rng.random() < 0.1 else 0.05)
        if link.lost or link.node.life is not link.life or self._world.is_cut(link.client.name, link.node.name):
            return False
        return bool(await link.life.call(self._receive(row)))

    async def _receive(self, row: int) -> bool:
        node, one = self._link.node, self._slots.take(np.array([row]))
        connection = Connection(self._link.session.id)
        node.data_server.connections.append(connection)
        granted = None
        try:
            admitted = node.grants.begin_write(
                connection.session, self._reservation, one.offsets, one.sizes, one.generations, connection
            )
            if not admitted.all():
                return False
            auditor, memory = self._world.auditor, self._link.memory
            begin, size = int(one.offsets[0]), int(one.sizes[0]) + len(self._items[row].name)
            granted = auditor.granted(memory.number, begin, begin + size, f"{self._link.client.name} remotely")
            self._link.life.grants[granted] = memory.number
            return await self._pieces(row, connection)
        finally:
            if granted is not None:
                self._world.auditor.stopped(self._link.memory.number, granted)
                self._link.life.grants.pop(granted, None)
            node.grants.end_write(self._reservation, connection)
            node.data_server.connections.remove(connection)

    async def _pieces(self, row: int, connection: Connection | None = None) -> bool:
        content, memory = self._content(row), self._link.memory
        begin = int(self._slots.offsets[row])
        rng = self._world.rng
        pieces = rng.choice((1, 1, 2, 3))
        step = -(-len(content) // pieces)
        for at in range(0, len(content), step):
            if connection is not None and connection.interrupted:
                return False
            part = content[at : at + step]
            memory.data[begin + at : begin + at + len(part)] = part
            memory.heal(begin + at, begin + at + len(part))
            if rng.random() < 0.03:
                await asyncio.sleep(rng.random() * 4)
            elif pieces > 1:
                await self._world.pause()
        return True

    # ------------------------------------------------------------ ending

    async def _commit(self, rows: list[int], grants: dict[int, int], *, one_by_one: bool) -> None:
        link, auditor, count = self._link, self._world.auditor, self._sections
        name = link.node.name
        puts = [auditor.put_begins(name, self._items[row], self._versions[row], self._fidelity) for row in rows]
        # The writer has stopped before it says so: what is complete may be gone, and its slot another's, at once.
        for row in rows:
            if row in grants:
                link.stopped(grants[row])
        done = False
        try:
            sections = list(range(count))
            for some in [[s] for s in sections] if one_by_one else [sections]:
                await link.call("Commit", self._commit_request(rows, some))
            done = True
        finally:
            for made in puts:
                if done:
                    auditor.put_acknowledged(name, made)
                else:
                    auditor.put_failed(made)
        self._world.note(f"{link.client.name} has put {[(p.item.number, p.version) for p in puts]} to {name}")
        self._world.count("puts", len(puts))

    def _commit_request(self, rows: list[int], sections: list[int]) -> pb.CommitRequest:
        indices, numbers, digests = [], [], []
        for row in rows:
            content = self._content(row)
            step = len(content) // self._sections
            for section in sections:
                indices.append(row)
                numbers.append(section)
                part = np.ascontiguousarray(content[section * step : (section + 1) * step])
                digests.append(section_digest(part, self._items[row].key, section))
        return pb.CommitRequest(
            session_id=self._link.session.id, reservation_id=self._reservation, indices=indices, sections=numbers,
            digests=digests,
        )  # fmt: skip

    async def _abort(self, grants: dict[int, int]) -> None:
        """The word that nothing is written any more, so it comes after the last write."""
        for grant in grants.values():
            self._link.stopped(grant)
        await self._link.call(
            "Abort", pb.AbortRequest(session_id=self._link.session.id, reservation_id=self._reservation)
        )
