"""What happens to objects whose disk fails at the wrong moment: short stories, which chance alone tells too seldom."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from typing import TYPE_CHECKING

from kvpool.channels.base import ChannelError
from kvpool.core.errors import KvpoolError
from kvpool.core.ids import Fidelity
from kvpool.v1 import block_source_pb2 as pb
from tests.simulation import operating, reading
from tests.simulation.content import IDS, ITEMS, Item, key_array
from tests.simulation.link import Link
from tests.simulation.writing import key_list, put_versions

if TYPE_CHECKING:
    from tests.simulation.client import Client
    from tests.simulation.node import Node


async def disturb(client: Client) -> None:
    """One of the stories, on a node with an SSD."""
    rng = client.world.rng
    nodes = [node for node in client.world.nodes if node.ssd_segments and node.alive]
    if not nodes or not client.world.faults:
        return
    node = rng.choice(nodes)
    first = rng.randrange(len(ITEMS[2]))
    items = list(ITEMS[2][first : first + rng.randint(1, 3)])
    await rng.choice(_STORIES)(client, node, items)


async def _change_unreadable(client: Client, node: Node, items: list[Item]) -> None:
    """A read fails once; then the object is put again, or removed and put again; then the host goes."""
    link = client.link(node)
    await _put(link, items)
    await _copied_down(node, items)
    _evict(node, items)
    node.disk_failed = True
    node.files.faults["read"] = [errno.EIO] * client.world.rng.choice((2, 4, 8))
    for _ in range(3):
        # Not all readers ask for what is below.
        await reading.read_quietly(link, items)
    node.files.faults.pop("read", None)
    await _change(client, link, items)
    _lose_memory(node)


async def _change_without_disk(client: Client, node: Node, items: list[Item]) -> None:
    """The disk can't be opened for the life of one process, which is asked to change what lies there."""
    chaos = client.world.chaos
    await _put(client.link(node), items)
    await _copied_down(node, items)
    if not client.world.faults:
        return
    node.kill("to start without its disk")
    node.disk_failed = True
    node.files.faults["open"] = [errno.EIO]
    chaos.restart(node)
    node.files.faults.pop("open", None)
    link = client.link(node)
    _evict(node, items)
    await _change(client, link, items)
    _lose_memory(node)


async def _change_half_written(client: Client, node: Node, items: list[Item]) -> None:
    """A copy on its way down fails and can't be taken back; then the object is removed; then the host goes."""
    node.disk_failed = True
    kinds = ("sync", "truncate")
    for kind in kinds:
        node.files.faults[kind] = [errno.EIO] * 8
    link = client.link(node)
    await _put(link, items)
    await asyncio.sleep(client.world.rng.random())
    for kind in kinds:
        node.files.faults.pop(kind, None)
    await _change(client, link, items)
    _lose_memory(node)


_STORIES = (_change_unreadable, _change_without_disk, _change_half_written)


async def _put(link: Link, items: list[Item]) -> None:
    await put_versions(link, items, [link.client.world.next_version() for _ in items], Fidelity.EXACT)


async def _copied_down(node: Node, items: list[Item]) -> None:
    """Waits for it, a while."""
    for _ in range(8):
        await asyncio.sleep(node.world.rng.random() * 0.4)
        if not node.alive or node.store is None or node.store.contains(key_array(items)).all():
            return


async def _change(client: Client, link: Link, items: list[Item]) -> None:
    """Removes, mostly, and puts something else; each may be refused."""
    kind = client.world.rng.choice(("keys", "prefix", "all", "nothing", "nothing"))
    request = pb.RemoveRequest(namespace_id=IDS[items[0].spec])
    removed = items
    if kind == "prefix":
        request.name_prefix = items[0].name.split("/")[0]
        removed = [item for item in ITEMS[2] if item.name.startswith(request.name_prefix)]
    elif kind == "all":
        request.all = True
        removed = list(ITEMS[2])
    else:
        request.keys.CopyFrom(key_list(items))
    if kind != "nothing":
        with contextlib.suppress(KvpoolError, ChannelError):
            await operating.remove_items(link, removed, request)
    if client.world.rng.random() < 0.7:
        with contextlib.suppress(KvpoolError, ChannelError):
            await _put(link, items)


def _evict(node: Node, items: list[Item]) -> None:
    node.now_or_never(lambda now: node.core.evict_keys(IDS[items[0].spec], key_array(items), now))


def _lose_memory(node: Node) -> None:
    """The host goes, mostly, and comes back at once."""
    world = node.world
    if not world.faults:
        return
    chance = world.rng.random()
    if chance < 0.7:
        node.reboot()
    elif chance < 0.9:
        node.kill("after all that")
    world.later(0.2, lambda: world.chaos.restart(node))
