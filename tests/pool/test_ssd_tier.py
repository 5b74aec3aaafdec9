"""The SSD tier above a real store on a disk in memory: what goes down, what comes up, and what a failing disk does."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvpool.channels.sections import digest_block
from kvpool.core.arrays import EntryState, SourceArrays
from kvpool.core.catalog import Catalog
from kvpool.core.errors import KvpoolError, NoSsd, Overloaded
from kvpool.core.hashing import object_key
from kvpool.core.ids import Fidelity
from kvpool.core.namespace import OBJECTS_GROUP, GroupKind, GroupSpec, NamespaceSpec
from kvpool.core.results import ReserveStatus, SourceConfig
from kvpool.core.source import SourceCore
from kvpool.service.grants import Grants
from kvpool.service.source_driver import SourceDriver
from kvpool.service.ssd_tier import LISTINGS_MAX, THREADS, SsdTier
from kvpool.tiers.ssd.store import SsdStore
from kvpool.v1 import block_source_pb2 as pb
from tests.ssd.crash_files import CrashFiles

SEGMENT_BYTES = 64 << 10
MEMORY_BYTES = 1 << 20
TTL_US = 500_000_000
GROUP = GroupSpec(0, GroupKind.FULL, (0, 1), 16, 1, 2, 8192)
BLOCKS = NamespaceSpec("m", "1", "bf16", "torch", "", "xxh3_128/1", (GROUP,))
OBJECTS = NamespaceSpec.objects("things")
N, O = BLOCKS.id(), OBJECTS.id()  # noqa: E741


_OPENED: list[CrashFiles] = []


@dataclass
class Host:
    """What outlives a node's process: its memory (but for a reboot) and its disk."""

    files: CrashFiles = field(default_factory=CrashFiles)
    memory: tuple[SourceArrays, np.ndarray, bytes] | None = None
    segments: int = 32


class Node:
    """The parts of a node that its SSD tier works with. `tier` None: the disk was away when it started."""

    def __init__(self, host: Host, *, demote_from: float = 0.0) -> None:
        config = SourceConfig(MEMORY_BYTES, 256)
        self.host = host
        if host.memory is None:
            arrays, self.data = SourceArrays.allocate(256), np.zeros(MEMORY_BYTES, dtype=np.uint8)
            self.core = SourceCore(config, arrays, self.data)
        else:
            arrays, self.data, catalog = host.memory
            self.core = SourceCore.adopt(config, arrays, self.data, Catalog.from_bytes(catalog))
            self.core.release_inherited(0)
        for spec in (BLOCKS, OBJECTS):
            self.core.register_namespace(spec)
        host.memory = (arrays, self.data, self.core.catalog().to_bytes())
        self.driver = SourceDriver(self.core, Grants())
        self.session = self.core.open_session("test", 0)
        self.demote_from = demote_from
        self.tier: SsdTier | None = None

    async def start(self) -> Node:
        """Raises: NoSsd."""
        _OPENED.append(self.host.files)
        self.store = SsdStore.open(
            Path("unused"), "t", self.host.segments * SEGMENT_BYTES, segment_bytes=SEGMENT_BYTES, io_depth=2,
            files=self.host.files, records_max=1024,
        )  # fmt: skip
        tier = SsdTier(self.store, self.driver, self.data, demote_from=self.demote_from)
        await tier.startup()
        self.tier = tier
        return self

    async def copied_down(self, keys: np.ndarray) -> None:
        """Runs until these are on the SSD."""
        assert self.tier is not None
        self.tier.start()
        while not self.store.contains(keys).all():
            self.tier.wake()
            await asyncio.sleep(0.001)
        await self.at_rest()

    async def at_rest(self) -> None:
        assert self.tier is not None
        async with self.tier._alone():
            pass

    def put(self, keys: np.ndarray, data: list[np.ndarray], fidelity: Fidelity = Fidelity.EXACT) -> list[int]:
        """Blocks; statuses."""
        sizes = np.array([len(one) for one in data], dtype=np.uint64)
        return self._put(N, GROUP, keys, data, sizes=sizes, fidelity=fidelity)

    async def put_object(self, name: str, value: bytes) -> bool:
        """As `Reserve` does it; whether it was stored. Raises: NoSsd."""
        keys = key_of(name)
        assert self.tier is not None
        await self.tier.make_way(keys)
        exists = self.tier.holds(O, keys)
        status = self._put(
            O, OBJECTS_GROUP, keys, [np.frombuffer(value, np.uint8)], names=[name.encode()], exists=exists,
            sizes=np.array([len(value)], dtype=np.uint64),
        )  # fmt: skip
        return status == [ReserveStatus.RESERVED]

    def _put(self, namespace: bytes, group: Any, keys: np.ndarray, data: list[np.ndarray], **how: Any) -> list[int]:
        reserved = self.core.reserve(self.session, namespace, group, keys, TTL_US, 0, **how)
        sections = group.section_count
        for row in np.flatnonzero(reserved.status == ReserveStatus.RESERVED).tolist():
            at, size = int(reserved.slots.offsets[row]), int(reserved.slots.sizes[row])
            self.data[at : at + size] = data[row]
            digests = np.zeros(sections, dtype=np.uint64)
            digest_block(self.data[at : at + size], keys[row].tobytes(), sections, digests)
            rows, numbers = np.full(sections, row, dtype=np.uint32), np.arange(sections, dtype=np.uint32)
            self.core.commit(self.session, reserved.reservation, rows, numbers, digests, 0)
        return [int(status) for status in reserved.status]

    async def get(self, namespace: bytes, keys: np.ndarray, fidelity_min: Fidelity = Fidelity.EXACT) -> list[Any]:
        """Bytes of each key as `Lease` finds it, None for a miss."""
        release = lambda: None  # noqa: E731
        if self.tier is not None:
            release = (await self.tier.promote(namespace, keys, 30.0)).release
        leased = self.core.lease(self.session, namespace, keys, TTL_US, 0, fidelity_min=fidelity_min)
        release()
        values = [
            self.data[int(at) : int(at) + int(size)].tobytes() if found else None
            for at, size, found in zip(leased.blocks.offsets, leased.blocks.sizes, leased.found, strict=True)
        ]
        if leased.lease:
            self.core.release(self.session, [leased.lease], 0)
        return values

    async def remove(self, keys: np.ndarray | None, prefix: bytes = b"", namespace: bytes = O) -> int:
        """Raises: NoSsd."""
        assert self.tier is not None

        def above() -> int:
            if keys is not None:
                return self.core.remove(namespace, keys, 0)
            return self.core.remove_prefix(namespace, prefix, 0)

        return await self.tier.remove(namespace, keys, prefix, above)

    def crash(self, *, keep_memory: bool) -> Host:
        """kill -9, or the end of the host; what its threads did until now stands."""
        files = self.host.files.copy()
        return Host(files, self.host.memory if keep_memory else None, self.host.segments)

    async def close(self, timeout_s: float = 60.0) -> None:
        self.driver.stop()
        if self.tier is not None:
            await self.tier.close(timeout_s=timeout_s)


def key_of(*names: str) -> np.ndarray:
    return np.frombuffer(b"".join(object_key(O, name.encode()) for name in names), np.uint8).reshape(-1, 16)


def blocks_of(seed: int, count: int, size: int = 8192) -> tuple[np.ndarray, list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 16), dtype=np.uint8), list(rng.integers(0, 256, (count, size), dtype=np.uint8))


async def until(holds: Callable[[], Any]) -> None:
    """Nobody tells when a thread is done. `run` bounds it."""
    while not holds():  # noqa: ASYNC110
        await asyncio.sleep(0.001)


def run(story: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        try:
            await asyncio.wait_for(story(), 100)
        finally:
            # A test that fails must end too.
            for files in _OPENED:
                for event in files.hanging.values():
                    event.set()
            _OPENED.clear()

    asyncio.run(bounded())


# ---------------------------------------------------------------- objects


@pytest.mark.parametrize("change", ["put", "remove", "remove by prefix"])
@pytest.mark.parametrize("how", ["a read failed", "a removal failed", "its file does not go"])
def test_what_can_not_be_read_does_not_come_back(how: str, change: str) -> None:
    async def story() -> None:
        node = await Node(Host()).start()
        files = node.host.files
        assert await node.put_object("d/a", b"OLD" * 1000)
        await node.copied_down(key_of("d/a"))
        node.core.evict_keys(O, key_of("d/a"), 0)
        if how == "a read failed":
            files.faults["read"] = [errno.EIO]
            assert await node.get(O, key_of("d/a")) == [None]
        elif how == "a removal failed":
            files.faults["write"] = [errno.EIO] * 2
            with pytest.raises(NoSsd):
                await node.remove(key_of("d/a"))
        else:
            files.faults["remove"] = [errno.EIO] * 1000
            number = int(node.store._log.core.rows.segments[node.store._log.core.rows.live(key_of("d/a"))[0]])
            filler, data = blocks_of(1, 120)
            for at in range(0, 120, 4):
                node.put(filler[at : at + 4], data[at : at + 4])
                await node.copied_down(filler[at : at + 4])
            assert number in node.store._log.core.segments
        files.faults.clear()
        assert node.tier is not None
        if not node.tier.contains(O, key_of("d/a"))[0]:
            assert node.tier.holds(O, key_of("d/a"))[0], "it is on disk all the same"
        if change == "put":
            await node.tier.make_way(key_of("d/a"))
            if node.tier.contains(O, key_of("d/a"))[0]:
                await node.remove(key_of("d/a"))
            assert await node.put_object("d/a", b"NEW" * 1000)
        elif change == "remove":
            await node.remove(key_of("d/a"))
        else:
            await node.remove(None, b"d/")
        host = node.crash(keep_memory=False)
        again = await Node(host).start()
        (value,) = await again.get(O, key_of("d/a"))
        assert value != b"OLD" * 1000
        await again.close()
        await node.close()

    run(story)


def test_a_name_is_not_given_away_while_the_disk_can_not_be_written() -> None:
    async def story() -> None:
        node = await Node(Host()).start()
        files = node.host.files
        assert await node.put_object("a", b"OLD" * 1000)
        await node.copied_down(key_of("a"))
        node.core.evict_keys(O, key_of("a"), 0)
        files.faults["read"] = [errno.EIO]
        assert await node.get(O, key_of("a")) == [None]
        files.faults["write"] = [errno.EIO] * 2
        with pytest.raises(NoSsd) as caught:
            await node.put_object("a", b"NEW")
        assert caught.value.hint
        assert await node.put_object("b", b"another name"), "which has nothing to do with it"
        assert await node.put_object("a", b"NEW"), "the disk writes again"
        await node.close()

    run(story)


def test_nothing_is_changed_while_nobody_knows_what_is_on_the_disk() -> None:
    async def story() -> None:
        node = await Node(Host()).start()
        assert await node.put_object("before", b"x")
        await node.copied_down(key_of("before"))
        node.host.files.faults.update(sync=[errno.EIO], truncate=[errno.EIO])
        assert await node.put_object("a", b"OLD" * 1000)
        assert node.tier is not None
        node.tier.start()
        await until(lambda: node.store.unsure)
        await node.at_rest()
        for change in (node.remove(key_of("a")), node.put_object("b", b"x")):
            with pytest.raises(NoSsd):
                await change
        assert await node.get(O, key_of("a")) == [b"OLD" * 1000]
        again = await Node(node.crash(keep_memory=True)).start()
        assert await again.get(O, key_of("a")) == [b"OLD" * 1000]
        assert await again.remove(key_of("a")) == 1
        assert await again.put_object("a", b"NEW")
        await again.close()
        await node.close()

    run(story)


def test_what_leaves_memory_while_it_is_copied_does_not_stay_below() -> None:
    async def story() -> None:
        node = await Node(Host()).start()
        files = node.host.files
        assert await node.put_object("a", b"OLD" * 1000)
        hanging = files.hanging["write"] = threading.Event()
        assert node.tier is not None
        node.tier.start()
        await until(lambda: files.waiting.is_set())
        # As a source does that finds its own bytes bad.
        assert node.core.remove(O, key_of("a"), 0) == 1
        assert not await node.put_object("a", b"NEW"), "the old one may be on disk any moment"
        hanging.set()
        await node.at_rest()
        assert not node.store.contains(key_of("a"))[0] and not node.store.undead(key_of("a")).present[0]
        assert await node.put_object("a", b"NEW")
        again = await Node(node.crash(keep_memory=False)).start()
        assert (await again.get(O, key_of("a")))[0] in (None, b"NEW")
        await again.close()
        await node.close()

    run(story)


@pytest.mark.parametrize("seed", range(24))
def test_no_object_is_older_than_its_last_change(seed: int) -> None:
    """Any order of puts, removals, evictions, failures of the disk, crashes, and lives without it."""

    async def story() -> None:
        rng = np.random.default_rng(seed)
        names = ["d/a", "d/b", "e"]
        node = await Node(Host(segments=6)).start()
        # What may be read of each name: the last acknowledged content, or what an unacknowledged removal has left.
        legal: dict[str, bytes | None] = dict.fromkeys(names)
        closing = []
        for step in range(60):
            name = names[rng.integers(3)]
            files = node.host.files
            what = rng.choice(["put", "put", "remove", "prefix", "get", "evict", "down", "fault", "heal", "crash"])
            try:
                if what == "put" and node.tier is not None:
                    value = bytes([seed, step]) * int(rng.integers(300, 9000))
                    if await node.put_object(name, value):
                        legal[name] = value
                elif what == "remove" and node.tier is not None:
                    await node.remove(key_of(name))
                    legal[name] = None
                elif what == "prefix" and node.tier is not None:
                    await node.remove(None, b"d/")
                    legal["d/a"] = legal["d/b"] = None
                elif what == "down" and node.tier is not None:
                    await node.tier._down._demote_some()
            except KvpoolError:
                pass
            if what == "evict":
                node.core.evict_keys(O, key_of(name), 0)
            elif what == "fault":
                kind = rng.choice(["read", "write", "sync", "truncate", "remove", "create", "sync_names", "open"])
                files.faults[str(kind)] = [errno.EIO] * int(rng.integers(1, 4))
            elif what == "heal":
                files.faults.clear()
            elif what == "crash":
                faults = files.faults if rng.integers(2) else {}
                closing.append(node)
                host = node.crash(keep_memory=bool(rng.integers(2)))
                host.files.faults = faults
                node = Node(host)
                try:
                    await node.start()
                except NoSsd:
                    continue  # without its disk: what it has in memory can be read
            for one in names if rng.integers(2) else [name]:
                (found,) = await node.get(O, key_of(one))
                assert found is None or found == legal[one], f"seed {seed}, step {step}, {what}: {one}"
        for old in [*closing, node]:
            old.host.files.faults.clear()
            await old.close()

    run(story)


def test_memory_is_newer_than_the_disk_where_they_differ() -> None:
    async def story() -> None:
        host = Host()
        node = await Node(host).start()
        for name in ("same", "other"):
            assert await node.put_object(name, b"OLD" + name.encode())
        await node.copied_down(key_of("same", "other"))
        await node.close()
        # A life without the disk, in which one is put again.
        node = Node(host)
        node.core.remove(O, key_of("other"), 0)
        value = np.frombuffer(b"NEW", np.uint8)
        node._put(O, OBJECTS_GROUP, key_of("other"), [value], names=[b"other"], sizes=np.array([3], np.uint64))
        host.files.faults["create"] = [errno.EIO] * 2
        with pytest.raises(NoSsd):
            await node.start()
        assert "ssd tier" not in node.core.sessions.values()
        host.files.faults.clear()
        node = await Node(Host(host.files.copy(), host.memory)).start()
        entries = node.core.index.lookup(key_of("same", "other"))
        assert node.core.store.on_lower[entries].tolist() == [True, False]
        node.core.evict_keys(O, key_of("same", "other"), 0)
        assert await node.get(O, key_of("same", "other")) == [b"OLDsame", None]
        await node.close()

    run(story)


# ---------------------------------------------------------------- blocks and their fidelities


def test_a_lossy_copy_in_memory_does_not_hide_an_exact_one_below() -> None:
    async def story() -> None:
        node = await Node(Host()).start()
        keys, data = blocks_of(3, 2)
        assert node.put(keys, data) == [ReserveStatus.RESERVED] * 2
        await node.copied_down(keys)
        node.core.evict_keys(N, keys, 0)
        lossy = [one[:4096] for one in data]
        assert node.put(keys[:1], lossy[:1], Fidelity.INT8) == [ReserveStatus.RESERVED]
        entry = node.core.index.lookup(keys[:1])
        assert node.tier is not None
        await node.tier._down._demote_some()
        assert node.core.store.on_lower[entry].all(), "what is below is better"
        assert node.store.describe(keys).fidelities.tolist() == [Fidelity.EXACT] * 2, "and was not written over"
        assert await node.get(N, keys) == [one.tobytes() for one in data]
        await node.close()

    run(story)


def test_a_lossy_copy_below_does_not_count_as_a_copy_of_an_exact_block() -> None:
    async def story() -> None:
        node = await Node(Host()).start()
        keys, data = blocks_of(4, 1)
        assert node.put(keys, [data[0][:4096]], Fidelity.INT8) == [ReserveStatus.RESERVED]
        await node.copied_down(keys)
        assert node.put(keys, data) == [ReserveStatus.RESERVED], "an exact one takes its place"
        assert node.tier is not None
        entry = node.core.index.lookup(keys)
        node.tier._marks.mark(keys)
        assert not node.core.store.on_lower[entry].any()
        while node.store.describe(keys).fidelities[0] != Fidelity.EXACT:
            node.tier.wake()
            await asyncio.sleep(0.001)
        await node.at_rest()
        node.core.evict_keys(N, keys, 0)
        assert node.core.counts().evictions_unsaved == 0
        assert await node.get(N, keys) == [data[0].tobytes()]
        again = await Node(node.crash(keep_memory=True)).start()
        assert again.core.store.on_lower[again.core.index.lookup(keys)].all(), "known from the start"
        await again.close()
        await node.close()

    run(story)


def test_marks_go_when_there_were_too_many_changes_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        node = await Node(Host()).start()
        keys, data = blocks_of(5, 8)
        node.put(keys, data)
        await node.copied_down(keys)
        entries = node.core.index.lookup(keys)
        assert node.core.store.on_lower[entries].all()
        node.store._log.changes._keys_max = 2
        assert node.store.remove(keys[:4]).all()
        assert node.tier is not None
        node.tier._marks.settle()
        assert not node.core.store.on_lower[entries].any()
        # Found again as they are looked at, and the others are copied again.
        await until(lambda: node.core.store.on_lower[entries].all())
        assert node.store.contains(keys).all()
        await node.close()

    run(story)


# ---------------------------------------------------------------- a disk that is slow, full, or hangs


def test_writers_wake_it() -> None:
    """Not one look in vain: without being woken it would be asleep, for longer than this test lasts."""

    async def story() -> None:
        node = await Node(Host(), demote_from=0.25).start()
        from kvpool.service import ssd_demotion

        before, ssd_demotion.IDLE_S = ssd_demotion.IDLE_S, 10_000.0
        try:
            assert node.tier is not None
            node.tier.start()
            await asyncio.sleep(0.05)
            keys, data = blocks_of(6, 100)
            node.put(keys, data)
            while not node.store.contains(keys).sum() > 20:
                node.tier.wake()
                await asyncio.sleep(0.001)
            await node.close()
        finally:
            ssd_demotion.IDLE_S = before

    run(story)


def test_it_goes_on_when_a_full_disk_has_room_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvpool.service.ssd_demotion.BACKOFF_S", 0.01)

    async def story() -> None:
        node = await Node(Host()).start()
        node.host.files.capacity_bytes = 0
        keys, data = blocks_of(7, 20)
        node.put(keys, data)
        assert node.tier is not None
        node.tier.start()
        await until(lambda: node.tier is not None and node.tier.stats().state == "full")
        assert node.tier.stats().reason
        node.host.files.capacity_bytes = None
        await node.copied_down(keys)
        assert node.tier.stats().state == "ok"
        await node.close()

    run(story)


def test_what_was_evicted_before_it_was_copied_is_counted() -> None:
    async def story() -> None:
        node = await Node(Host()).start()
        keys, data = blocks_of(8, 10)
        node.put(keys, data)
        node.core.evict_keys(N, keys[:4], 0)
        assert node.tier is not None
        assert node.tier.stats().evictions_unsaved == 4
        await node.copied_down(keys[4:])
        node.core.evict_keys(N, keys[4:], 0)
        assert node.tier.stats().evictions_unsaved == 4
        await node.close()

    run(story)


def test_it_can_be_left_while_its_disk_hangs() -> None:
    async def story() -> None:
        node = await Node(Host()).start()
        keys, data = blocks_of(9, 8)
        node.put(keys, data)
        await node.copied_down(keys)
        node.core.evict_keys(N, keys[:4], 0)
        more, others = blocks_of(10, 4)
        files = node.host.files
        files.hanging["read"] = threading.Event()
        assert node.tier is not None
        promoted = await node.tier.promote(N, keys[:4], 0.05)
        assert promoted.below.all(), "whoever waits for it has its answer in time"
        promoted.release()
        await until(files.waiting.is_set)
        files.waiting.clear()
        files.hanging["write"] = threading.Event()
        node.put(more, others)
        while not files.waiting.is_set():
            node.tier.wake()
            await asyncio.sleep(0.001)
        await node.close(timeout_s=0.1)
        assert node.tier.left_behind, "the disk may still answer, into memory that was to be kept"
        for event in files.hanging.values():
            event.set()

    run(story)


def test_a_write_that_hangs_leaves_nothing_behind_in_memory() -> None:
    async def story() -> None:
        node = await Node(Host()).start()
        keys, data = blocks_of(12, 4)
        node.put(keys, data)
        files = node.host.files
        hanging = files.hanging["write"] = threading.Event()
        assert node.tier is not None
        node.tier.start()
        await until(files.waiting.is_set)
        await node.close(timeout_s=0.1)
        assert not node.tier.left_behind, "it only reads from there"
        hanging.set()

    run(story)


def test_changes_do_not_wait_for_reads_that_hang() -> None:
    async def story() -> None:
        node = await Node(Host()).start()
        keys, data = blocks_of(13, THREADS + 4)
        node.put(keys, data)
        assert await node.put_object("d/a", b"OLD" * 1000)
        await node.copied_down(np.concatenate([keys, key_of("d/a")]))
        node.core.evict_keys(O, key_of("d/a"), 0)
        node.core.evict_keys(N, keys, 0)
        files = node.host.files
        files.faults["read"] = [errno.EIO]
        assert await node.get(O, key_of("d/a")) == [None], "it can't be read, and may be there all the same"
        hanging = files.hanging["read"] = threading.Event()
        assert node.tier is not None
        for row in range(len(keys)):
            (await node.tier.promote(N, keys[row : row + 1], 0.01)).release()
        assert await node.put_object("d/a", b"NEW" * 1000), "more reads hang than there are threads for them"
        hanging.set()
        await node.close()

    run(story)


def test_listings_of_a_disk_that_hangs_are_bounded() -> None:
    async def story() -> None:
        node = await Node(Host()).start()
        assert await node.put_object("d/a", b"bird" * 1000)
        await node.copied_down(key_of("d/a"))
        node.core.evict_keys(O, key_of("d/a"), 0)
        files = node.host.files
        hanging = files.hanging["read"] = threading.Event()
        assert node.tier is not None
        request = pb.ListBlocksRequest(namespace_id=O)
        listings = [asyncio.create_task(node.tier.list_alone(request, 10)) for _ in range(LISTINGS_MAX)]
        await until(files.waiting.is_set)
        with pytest.raises(Overloaded):
            await node.tier.list_alone(request, 10)
        hanging.set()
        for listing in listings:
            assert [block.name for block in (await listing).blocks] == ["d/a"]
        assert len((await node.tier.list_alone(request, 10)).blocks) == 1
        await node.close()

    run(story)


def test_a_removal_does_not_wait_for_ever() -> None:
    async def story() -> None:
        node = await Node(Host()).start()
        keys, data = blocks_of(11, 4)
        node.put(keys, data)
        files = node.host.files
        hanging = files.hanging["write"] = threading.Event()
        assert node.tier is not None
        node.tier.start()
        await until(lambda: files.waiting.is_set())
        with pytest.MonkeyPatch.context() as impatient, pytest.raises(NoSsd, match="do not end"):
            impatient.setattr("kvpool.service.ssd_tier.BUSY_S", 0.05)
            await node.remove(keys, namespace=N)
        assert (node.core.arrays.states == EntryState.READABLE).sum() == 4, "memory is left as it is"
        hanging.set()
        await node.at_rest()
        assert await node.remove(keys, namespace=N) == 4
        await node.close()

    run(story)
