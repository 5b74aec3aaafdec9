"""How clients read: from the shared index without a call, else under a lease; what they believe goes to the auditor."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import numpy as np

from kvpool.channels import sections, shared_index
from kvpool.channels.base import ChannelError, addresses
from kvpool.core.arrays import Descriptors
from kvpool.core.errors import KvpoolError
from kvpool.core.ids import Fidelity
from kvpool.core.kernels import probing
from kvpool.service import wire
from kvpool.v1 import block_source_pb2 as pb
from tests.simulation.auditor import Violation
from tests.simulation.content import IDS, Bytes, Item, key_array, sections_of
from tests.simulation.link import Link

if TYPE_CHECKING:
    from tests.simulation.client import Client


async def get(client: Client) -> None:
    """Reads some items from a node, the way that fits."""
    link, items = client.link(client.choose()), client.choose_items()
    lossy = not items[0].is_object and client.world.rng.random() < 0.2
    await read(link, items, Fidelity.INT8 if lossy else Fidelity.EXACT)


async def get_twice(client: Client) -> None:
    """Reads the same twice at a time."""
    world, link, items = client.world, client.link(client.choose()), client.choose_items()
    other = world.spawn(read_quietly(link, items), client.life.context)
    await read(link, items, Fidelity.EXACT)
    await other


async def read_quietly(link: Link, items: list[Item]) -> None:
    """Beside something else, which is what matters."""
    with contextlib.suppress(KvpoolError, ChannelError):
        await read(link, items, Fidelity.EXACT)


async def read(link: Link, items: list[Item], fidelity_min: Fidelity) -> dict[int, Bytes]:
    """What was read, by item number. Raises: KvpoolError."""
    held: dict[int, Bytes] = {}
    if link.shared is not None and not items[0].is_object and fidelity_min is Fidelity.EXACT:
        held = await _read_shared(link, items)
        items = [item for item in items if item.number not in held]
    if items:
        held.update(await read_leased(link, items, fidelity_min))
    return held


# ---------------------------------------------------------------- without a call


async def _read_shared(link: Link, items: list[Item]) -> dict[int, Bytes]:
    world, shared = link.client.world, link.shared
    assert shared is not None
    begun = world.auditor.now()
    found = shared.find(link.numbers[items[0].spec], key_array(items))
    await world.pause()
    rows = np.flatnonzero(found.hit)
    if not len(rows):
        return {}
    hits = found.take(rows)
    buffers = [np.empty(size, dtype=np.uint8) for size in hits.sizes.tolist()]
    if world.rng.random() < 0.5:
        # By the clock of the host, which has no say here.
        good = shared.read(hits, buffers, deadline_s=3600.0)
    else:
        good = await _read_torn(link, hits, buffers)
    world.count("shared", int(good.sum()))
    held = {items[row].number: buffer for row, buffer, fine in zip(rows, buffers, good, strict=True) if fine}
    for item in items:
        if item.number in held:
            world.auditor.read(
                link.node.name, item, held[item.number], begun, Fidelity.EXACT, how=f"{link.client.name}'s shared read"
            )
    return held


async def _read_torn(link: Link, hits: shared_index.Found, buffers: list[Bytes]) -> np.ndarray:
    """As `SharedIndex.read`, but with others at work between its loads: copies, hashes what it copied, looks again."""
    world = link.client.world
    copies = []
    for offset, size in zip(hits.offsets.tolist(), hits.sizes.tolist(), strict=True):
        source = link.memory.data[offset : offset + size]
        half = world.rng.randrange(size + 1)
        first = source[:half].copy()
        # A reader may be stopped here for as long as the host likes.
        await world.pause(2.0 if world.rng.random() < 0.2 else 0.05)
        copies.append(np.concatenate([first, source[half:]]))
        await world.pause()
    good = shared_index.copy_cut_blocks_out(
        addresses(copies, np.arange(len(copies))), addresses(buffers, np.arange(len(buffers))), hits.sizes,
        hits.key_words, hits.digests, hits.section_counts, end_s=float("inf"),
    )  # fmt: skip
    memory = link.memory
    arrays = link.shared._view()  # type: ignore[union-attr]
    probing.confirm(hits.entries, hits.generations, arrays.generations, memory.touches, good)
    return good


# ---------------------------------------------------------------- under a lease


async def read_slowly(link: Link, items: list[Item]) -> None:
    """Takes a lease, and its time."""
    with contextlib.suppress(KvpoolError, ChannelError):
        await read_leased(link, items, Fidelity.EXACT, slowly=True)


async def read_leased(
    link: Link, items: list[Item], fidelity_min: Fidelity, *, slowly: bool = False
) -> dict[int, Bytes]:
    """Raises: KvpoolError."""
    world, spec = link.client.world, items[0].spec
    rng = world.rng
    begun, begin_us = world.auditor.now(), world.loop.now_us()
    ttl_ms = 2500 if slowly else rng.choice((100, 500, 2500))
    named = items[0].is_object
    reply = await link.call(
        "Lease",
        pb.LeaseRequest(
            session_id=link.session.id, namespace_id=IDS[spec], keys=_key_list(items), ttl_ms=ttl_ms,
            names=[item.name for item in items] if named else [], promote_ms=rng.choice((0, 300, 2000)),
            fidelity_min=int(fidelity_min), handoff_request_id=f"r{rng.randrange(4)}" if rng.random() < 0.2 else "",
        ),
    )  # fmt: skip
    if not reply.lease_id:
        return {}
    blocks = wire.descriptors_from_proto(reply.blocks, key_array(items), sections_of(spec))
    leased = np.flatnonzero(np.fromiter(reply.found, dtype=bool, count=len(items)))
    held: dict[int, Bytes] = {}
    corrupt: list[Item] = []
    if slowly:
        await asyncio.sleep(1.0)
    for row in leased.tolist():
        item, one = items[row], blocks.take(np.array([row]))
        content = await _copy_out(link, reply.lease_id, one)
        if content is None:
            break
        in_time = world.loop.now_us() - begin_us < ttl_ms * 1000
        fine = sections.check_block(content, item.key, one.digests[0])
        if fine:
            world.auditor.read(
                link.node.name, item, content, begun, Fidelity(reply.fidelity[row]), how=f"{link.client.name}'s read"
            )
            if reply.fidelity[row] > fidelity_min:
                raise Violation(f"a lossy copy of {item} for a reader who wants it exact")
            held[item.number] = content
        elif in_time:
            corrupt.append(item)
            offset, size = int(one.offsets[0]), int(one.sizes[0])
            if link.is_live and not link.memory.is_harmed(offset, offset + size) and not link.wire_harmed:
                raise Violation(f"{item} of {link.node.name} changed under the lease of {link.client.name}")
    link.wire_harmed = False
    world.count("leased", len(held))
    if rng.random() < 0.1:
        await world.pause(2.0)
    if rng.random() < 0.9 or corrupt:
        release = pb.ReleaseRequest(session_id=link.session.id, lease_ids=[reply.lease_id])
        if corrupt:
            release.namespace_id = IDS[spec]
            release.corrupt.CopyFrom(_key_list(corrupt))
        with contextlib.suppress(KvpoolError):  # as clients do: a release that is lost is made up for by its expiry
            await link.call("Release", release)
    return held


def _key_list(items: list[Item]) -> object:
    from tests.simulation.writing import key_list

    return key_list(items)


async def _copy_out(link: Link, lease: int, one: Descriptors) -> Bytes | None:
    """The bytes of one leased block; None: they did not come."""
    world = link.client.world
    if link.local:
        return await _piecewise(link, one)
    if link.lost or link.node.life is not link.life or world.is_cut(link.client.name, link.node.name):
        return None
    content: Bytes | None = await link.life.call(_send(link, lease, one))
    if content is not None and world.faults and world.rng.random() < 0.02:
        content[world.rng.randrange(len(content))] ^= 0x10
        link.wire_harmed = True
    return content


async def _send(link: Link, lease: int, one: Descriptors) -> Bytes | None:
    """In the node: a thread of its data server."""
    grants = link.node.grants
    if not grants.readable(link.session.id, lease, one.offsets, one.sizes, one.generations).all():
        return None
    return await _piecewise(link, one)


async def _piecewise(link: Link, one: Descriptors) -> Bytes:
    world, begin, size = link.client.world, int(one.offsets[0]), int(one.sizes[0])
    half = world.rng.randrange(size + 1)
    source = link.memory.data[begin : begin + size]
    first = source[:half].copy()
    await world.pause()
    return np.concatenate([first, source[half:]])
