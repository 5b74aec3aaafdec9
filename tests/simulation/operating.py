"""What operators and other users of a node do: remove, evict, hold, wait, set quotas, drain."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from kvpool.channels.base import ChannelError
from kvpool.core.errors import KvpoolError
from kvpool.core.ids import Fidelity
from kvpool.core.waits import WaitState
from kvpool.v1 import block_source_pb2 as pb
from tests.simulation import reading
from tests.simulation.auditor import Removal, Violation
from tests.simulation.content import ALL_ITEMS, IDS, ITEMS, Item, key_array
from tests.simulation.link import Link
from tests.simulation.writing import key_list, put_versions

if TYPE_CHECKING:
    from tests.simulation.client import Client


async def remove(client: Client) -> None:
    """Removes keys, a prefix, or a namespace."""
    world, link = client.world, client.link(client.choose())
    items = client.choose_items()
    spec, chance = items[0].spec, world.rng.random()
    request = pb.RemoveRequest(namespace_id=IDS[spec])
    numbers = [item.number for item in items]
    if chance < 0.15:
        request.all = True
        numbers = [item.number for item in ITEMS[spec]]
    elif chance < 0.4 and items[0].is_object:
        request.name_prefix = items[0].name.split("/")[0]
        numbers = [item.number for item in ITEMS[spec] if item.name.startswith(request.name_prefix)]
    else:
        request.keys.CopyFrom(key_list(items))
    await remove_items(link, [item for item in ALL_ITEMS if item.number in numbers], request)


async def remove_items(link: Link, items: list[Item], request: pb.RemoveRequest) -> None:
    """Removes these items, as the request says. Raises: KvpoolError."""
    world, node, numbers = link.client.world, link.node, [item.number for item in items]
    begun = world.auditor.now()
    removal = Removal(numbers)
    node.removals.append(removal)
    await link.call("Remove", request)
    removal.acknowledged_at = world.auditor.now()
    world.auditor.removal_acknowledged(node.name, begun, lambda item: item.number in numbers)
    world.note(f"{link.client.name} has removed {numbers} from {node.name}")
    world.count("removals")


async def remove_beside_read(client: Client) -> None:
    """Somebody removes what somebody else is bringing up from a lower tier."""
    world, link, items = client.world, client.link(client.choose()), client.choose_items()
    node = link.node
    if node.ssd_segments:
        # Long enough for copies of it to be made.
        versions = [world.next_version() if item.is_object else 0 for item in items]
        await put_versions(link, items, versions, Fidelity.EXACT)
        await asyncio.sleep(world.rng.random())
    node.now_or_never(lambda now: node.core.evict_keys(IDS[items[0].spec], key_array(items), now))
    reading_on = world.spawn(reading.read_quietly(link, items), client.life.context)
    await world.pause(0.3)
    await remove_items(link, items, pb.RemoveRequest(namespace_id=IDS[items[0].spec], keys=key_list(items)))
    await reading_on


async def remove_under_lease(client: Client) -> None:
    """Somebody removes what is leased, and puts other things where there is room."""
    world, link, items = client.world, client.link(client.choose()), client.choose_items()
    versions = [world.next_version() if item.is_object else 0 for item in items]
    await put_versions(link, items, versions, Fidelity.EXACT)
    reading_on = world.spawn(reading.read_slowly(link, items), client.life.context)
    await asyncio.sleep(0.3)
    await remove_items(link, items, pb.RemoveRequest(namespace_id=IDS[items[0].spec], keys=key_list(items)))
    with contextlib.suppress(KvpoolError, ChannelError):
        for spec in (0, 1):
            await put_versions(link, list(ITEMS[spec][:5]), [0] * 5, Fidelity.EXACT)
    await reading_on


async def evict(client: Client) -> None:
    world, node, items = client.world, client.choose(), client.choose_items()
    if world.rng.random() < 0.5:
        node.now_or_never(lambda now: node.core.evict_bytes(world.rng.randint(1, 20_000), now))
    else:
        node.now_or_never(lambda now: node.core.evict_keys(IDS[items[0].spec], key_array(items), now))


async def hold(client: Client) -> None:
    """Pins blocks, looks after a while whether they are still there, and lets them go or forgets to."""
    world, link, items = client.world, client.link(client.choose()), client.choose_items()
    owner = world.rng.choice(("", "", "somebody"))
    ttl_ms = world.rng.choice((200, 2500))
    begin_us, begun = world.loop.now_us(), world.auditor.now()
    request = pb.PinRequest(
        session_id=link.session.id, namespace_id=IDS[items[0].spec], keys=key_list(items), ttl_ms=ttl_ms,
        owner=owner,
    )  # fmt: skip
    reply = await link.call("Pin", request)
    if not reply.pin_id:
        return
    await asyncio.sleep(world.rng.random() * 1.5)
    pinned = [item for item, found in zip(items, reply.found, strict=True) if found]
    in_time = world.loop.now_us() - begin_us < ttl_ms * 1000
    if in_time and link.node.life is link.life and (owner or link.is_live):
        _check_held(link, pinned, begun)
    world.count("pins")
    if world.rng.random() < 0.7:
        await link.call(
            "Unpin", pb.UnpinRequest(session_id=0 if owner else link.session.id, pin_id=reply.pin_id, owner=owner)
        )


def _check_held(link: Link, pinned: list[Item], begun: int) -> None:
    node = link.node
    there = node.core.lookup(IDS[pinned[0].spec], key_array(pinned))
    for item, found in zip(pinned, there.tolist(), strict=True):
        removed = any(removal.may_be_after(begun) and item.number in removal.numbers for removal in node.removals)
        if not found and not removed and not link.memory.harmed and item.number not in node.replaced:
            raise Violation(f"{item} of {node.name} is gone, though {link.client.name} has pinned it")


class _Context:
    """Stands for gRPC's."""

    async def send_initial_metadata(self, metadata: object) -> None:
        """Nobody looks."""


async def wait(client: Client) -> None:
    """Awaits keys; the wait ends by its deadline, whatever happens."""
    world, link, items = client.world, client.link(client.choose()), client.choose_items()
    deadline_ms = world.rng.choice((100, 700, 1500))
    request = pb.AwaitRequest(
        session_id=link.session.id, namespace_id=IDS[items[0].spec], keys=key_list(items),
        deadline_ms=deadline_ms, absent_is_abandoned=world.rng.random() < 0.3,
    )  # fmt: skip
    if link.lost or link.node.life is not link.life:
        return
    begin_s = world.loop.time()
    told: dict[int, int] = {}

    async def follow() -> None:
        async for reply in link.node.servicer.Await(request, _Context()):
            final = zip(reply.indices, reply.states, strict=True)
            told.update((index, state) for index, state in final if state != WaitState.SECTION)

    await link.life.call(follow())
    if world.loop.time() - begin_s > deadline_ms / 1000 + 2.0:
        raise Violation(f"{client.name} waited {world.loop.time() - begin_s:.1f} s at {link.node.name}")
    if len(told) < len(items):
        raise Violation(f"a wait of {client.name} ended with {len(told)} answers for {len(items)} keys")


async def set_quota(client: Client) -> None:
    world, node = client.world, client.choose()
    bytes_max = world.rng.choice((0, 5_000, 20_000))
    if world.rng.random() < 0.5:
        node.now_or_never(lambda now: node.core.set_quota(bytes_max, tenant="red"))
    else:
        namespace_id = world.rng.choice(IDS)
        node.now_or_never(lambda now: node.core.set_quota(bytes_max, namespace_id=namespace_id))


async def drain(client: Client) -> None:
    """A node takes nothing new for a while."""
    node = client.choose()
    if node.alive:
        node.core.draining = True
        await asyncio.sleep(client.world.rng.random())
        if node.alive:
            node.core.draining = False


async def reconnect(client: Client) -> None:
    """Ends a session as a client that closes."""
    if not client.links:
        return
    link = client.world.rng.choice(list(client.links.values()))
    link.lose()
    if link.is_live:
        await client.world.pause()
        link.node.end_session(link.session, "closed")
