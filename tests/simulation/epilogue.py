"""The end of a history: no more faults; what waits must end, what is held must be free, what is told must be true."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import numpy as np

from kvpool.core.arrays import EntryState
from kvpool.core.errors import KvpoolError
from kvpool.core.ids import Fidelity
from tests.simulation import reading
from tests.simulation.auditor import Violation
from tests.simulation.client import Client
from tests.simulation.content import ITEMS

if TYPE_CHECKING:
    from tests.simulation.chaos import Chaos
    from tests.simulation.node import Node
    from tests.simulation.world import World

CALM_S = 40.0
REST_S = 6.0


async def epilogue(world: World, chaos: Chaos) -> None:
    """Raises: Violation."""
    world.note("no more faults")
    world.faults = False
    world.cut.clear()
    for node in world.nodes:
        if node.alive:
            node.driver.lines_left = 0
        node.files.steps = None
        node.files.faults.clear()
    await asyncio.sleep(2.5)
    world.cut.clear()
    for node in world.nodes:
        chaos.restart(node)
        if node.alive:
            node.core.draining = False
    world.check()
    await _all_end(world)
    world.check()
    await _read_everything(world)
    await _crash_once_more(world, chaos)
    _close_all(world)
    await asyncio.sleep(REST_S)
    world.check()
    for node in world.nodes:
        node.now_or_never(lambda now, core=node.core: core.unpin(0, 0, now, owner="somebody"))
        _check_at_rest(node)
    await _directory_converges(world)


async def _all_end(world: World) -> None:
    tasks = [task for client in world.clients if not client.life.dead for task in client.tasks if not task.done()]
    if tasks:
        _, pending = await asyncio.wait(tasks, timeout=CALM_S)
        if pending and world.failure is None:
            raise Violation(f"{len(pending)} of {len(tasks)} clients wait for ever")


async def _read_everything(world: World) -> None:
    for node in world.nodes:
        witness = Client(world, f"witness of {node.name}", world.rng.choice((node, None)))
        world.clients.append(witness)
        for items in ITEMS:
            for fidelity_min in (Fidelity.EXACT, Fidelity.INT8):
                try:
                    await reading.read(witness.link(node), list(items), fidelity_min)
                except KvpoolError as error:
                    raise Violation(f"{node.name} does not serve when all is well: {error!r}") from error
                if items[0].is_object:
                    break


async def _crash_once_more(world: World, chaos: Chaos) -> None:
    """What is on a disk must be true also for those who have nothing else."""
    chosen = [node for node in world.nodes if node.ssd_segments and world.rng.random() < 0.7]
    for node in chosen:
        if world.rng.random() < 0.7:
            node.reboot()
        else:
            node.kill("once more")
        chaos.restart(node)
    # A node that could not start is what has failed, and not what can't be read from it.
    world.check()
    if chosen:
        await _read_everything(world)


def _close_all(world: World) -> None:
    for client in world.clients:
        for link in client.links.values():
            if not client.life.dead:
                link.lose()
            link.node.end_session(link.session, "closed")


def _check_at_rest(node: Node) -> None:
    core = node.core
    core.check_invariants()
    node.grants.check_invariants()
    counts = core.counts()
    internal = 1 if node.tier is not None else 0
    rest = {
        "sessions": counts.sessions - internal, "leases": counts.leases, "pins": counts.pins,
        "reservations": counts.reservations, "quarantined slots": counts.quarantined, "waiters": counts.waiters,
        "blocks being written": counts.blocks_writing, "awaited keys": core.waits.awaited_keys,
        "reservations known": core.reservations.unfinished,
    }  # fmt: skip
    left = {what: number for what, number in rest.items() if number}
    if left:
        raise Violation(f"{node.name} is left with {left}")
    used = np.flatnonzero(core.arrays.states != EntryState.FREE).astype(np.int32)
    if (core.arrays.states[used] != EntryState.READABLE).any():
        raise Violation(f"{node.name} has entries that are neither free nor readable")
    slots_bytes = int(core.store.slots.slots_bytes(core.store.footprints(used)).sum())
    if counts.bytes_used != slots_bytes:
        raise Violation(f"{node.name} counts {counts.bytes_used} bytes, and {slots_bytes} are readable")
    if node.tier is not None:
        _check_marks(node)
    sound = not node.harmed and not node.disk_failed
    if node.store is not None and sound and node.world.rng.random() < 0.2:
        faults = node.store.audit()
        if faults:
            raise Violation(f"the SSD of {node.name}: {'; '.join(faults)}")


def _check_marks(node: Node) -> None:
    """Raises: Violation if something in memory is taken for saved that is not on the SSD as it is in memory."""
    assert node.tier is not None and node.store is not None
    node.tier._marks.settle()
    core, arrays = node.core, node.core.arrays
    entries = np.flatnonzero(core.store.on_lower & (arrays.states == EntryState.READABLE)).astype(np.int32)
    facts = node.store.describe(core.index.key_array(entries))
    saved = facts.present & (facts.fidelities <= arrays.fidelities[entries])
    if not saved.all():
        raise Violation(f"{node.name} takes {int((~saved).sum())} blocks for saved that its SSD does not have")
    objects = entries[arrays.name_bytes[entries] > 0]
    stored = node.store.describe_stored(core.index.key_array(objects))
    same = stored.digests[:, 0] == arrays.digests[objects, 0]
    if not (same | ~stored.facts.present).all():
        raise Violation(f"{node.name} takes objects for saved of which its SSD has others")


async def _directory_converges(world: World) -> None:
    deadline_s = world.loop.time() + 20
    while world.loop.time() < deadline_s:
        wrong = [node.name for node in world.nodes if not _told(world, node)]
        if not wrong:
            world.directory.check_invariants()
            return
        await asyncio.sleep(0.5)
    raise Violation(f"the directory does not come to know what {', '.join(wrong)} holds")


def _told(world: World, node: Node) -> bool:
    """Whether the directory knows exactly what a source holds, in both tiers."""
    pairs = [(node.name, node.core.snapshot_keys())]
    if node.tier is not None:
        pairs.append((f"{node.name}.ssd", node._on_ssd()))
    for source_id, held in pairs:
        keys, fidelities = world.directory.held(source_id)
        told = dict(zip((key.tobytes() for key in keys), fidelities.tolist(), strict=True))
        true = {key.tobytes(): int(fidelity) for some, fidelity in held for key in some}
        if told != true:
            return False
    return True
