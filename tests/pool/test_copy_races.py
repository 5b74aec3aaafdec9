"""Removals while a copy is under way: what was removed stays removed, and what was put since is not touched."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvpool.client import PoolClient
from kvpool.core.errors import Unavailable
from kvpool.core.hashing import object_keys
from kvpool.core.ids import Fidelity, NamespaceId
from kvpool.core.namespace import GroupKind, GroupSpec, NamespaceSpec
from kvpool.service.copy_origin import Origin
from kvpool.service.node import NodeConfig, NodeServer
from kvpool.service.removals import Removals
from kvpool.service.rpc import make_channel
from kvpool.service.source_calls import key_list
from kvpool.v1 import source_admin_pb2 as pb
from kvpool.v1 import source_admin_pb2_grpc
from tests.pool.node_process import NodeProcess, eventually, held, namespace_spec, random_blocks

NAMES = ["a/0", "a/1", "b/0"]
OLD, NEW = b"old" * 1000, b"new" * 700
TIMEOUT_S = 60.0


class Target:
    """A node in this process, so that a test can stand between the steps of its copies."""

    def __init__(self, folder: Path, ssd_bytes: int, **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        config = NodeConfig(
            "target", "127.0.0.1:0", memory_bytes=32 << 20, segment_dir=str(folder),
            ssd_dir=str(folder / "ssd") if ssd_bytes else "", ssd_bytes=ssd_bytes, **options,
        )  # fmt: skip
        self._node = NodeServer(config)
        self._run(self._node.startup())
        self.address = self._node.address
        self._channel = make_channel(self.address)
        self._admin: Any = source_admin_pb2_grpc.SourceAdminStub(self._channel)  # type: ignore[no-untyped-call]

    def _run(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(TIMEOUT_S)

    def copy(self, origin: NodeProcess, namespace: NamespaceId, *, move: bool = False) -> pb.Progress:
        request = pb.CopyRequest(from_address=origin.address, namespace_id=namespace, move=move)
        *_, last = self._admin.Copy(request, timeout=TIMEOUT_S)
        assert isinstance(last, pb.Progress)
        return last

    def evict(self, namespace: NamespaceId, keys: np.ndarray) -> int:
        request = pb.EvictRequest(namespace_id=namespace, keys=key_list(keys, 0, 0))
        return int(self._admin.Evict(request, timeout=TIMEOUT_S).blocks)

    def close(self) -> None:
        self._channel.close()
        self._run(self._node.shutdown())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(TIMEOUT_S)
        self._loop.close()


@pytest.fixture(scope="module", params=[0, 64 << 20], ids=["memory", "ssd"])
def target(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Target]:
    with closing(Target(tmp_path_factory.mktemp("target"), request.param)) as target:
        yield target


@pytest.fixture
def here(shared_node: NodeProcess, connect: Callable[..., PoolClient]) -> PoolClient:
    return connect(shared_node)


@pytest.fixture
def there(target: Target, connect: Callable[..., PoolClient]) -> PoolClient:
    return connect(target)


@pytest.fixture
def namespace(here: PoolClient, there: PoolClient) -> Iterator[NamespaceId]:
    """Objects, old ones at the origin; nothing is left or held anywhere afterwards."""
    namespace = here.register_objects("copy races")
    there.register_objects("copy races")
    assert here.put_objects(namespace, NAMES, [OLD] * 3).stored.all()
    yield namespace
    for client in (here, there):
        client.remove_all(namespace)
        # Releases are not waited for.
        assert eventually(lambda client=client: held(client.stats()).keys() <= {"sessions"}), held(client.stats())


@pytest.fixture
def during(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Does something, once, before or after one step of a copy."""

    def stand_in(owner: object, name: str, act: Callable[[], object], *, after: bool = False) -> None:
        step, acts = getattr(owner, name), [act]

        def stepped(*args: Any, **kwargs: Any) -> Any:
            if acts and not after:
                acts.pop()()
            result = step(*args, **kwargs)
            if acts:
                acts.pop()()
            return result

        monkeypatch.setattr(owner, name, stepped)

    return stand_in


def values(client: PoolClient, namespace: NamespaceId) -> list[bytes | None]:
    return [None if v is None else v.tobytes() for v in client.get_objects(namespace, NAMES).values]


@pytest.mark.parametrize("how", ["names", "prefix", "all"])
def test_removed_from_both_while_under_way(
    here: PoolClient, there: PoolClient, shared_node: NodeProcess, target: Target, namespace: NamespaceId,
    during: Callable[..., None], how: str,
) -> None:  # fmt: skip
    def remove() -> None:
        for client in (here, there):
            if how == "names":
                client.remove_objects(namespace, NAMES[:2])
            elif how == "prefix":
                client.remove_objects(namespace, prefix="a/")
            else:
                client.remove_all(namespace)
        here.put_objects(namespace, NAMES[:1], [NEW])

    during(Origin, "lease", remove, after=True)
    last = target.copy(shared_node, namespace)
    rest = OLD if how != "all" else None
    assert values(there, namespace) == [None, None, rest]
    assert values(here, namespace) == [NEW, None, rest]
    assert last.blocks_failed == (3 if how == "all" else 2) and "removed" in last.message


@pytest.mark.parametrize("move", [False, True])
def test_removed_from_the_target_alone(
    here: PoolClient, there: PoolClient, shared_node: NodeProcess, target: Target, namespace: NamespaceId,
    during: Callable[..., None], move: bool,
) -> None:  # fmt: skip
    during(Origin, "lease", lambda: there.remove_objects(namespace, NAMES[:1]), after=True)
    target.copy(shared_node, namespace, move=move)
    assert values(there, namespace) == [None, OLD, OLD]
    assert values(here, namespace) == [OLD, *([None, None] if move else [OLD, OLD])], "what was not taken stays"


@pytest.mark.parametrize("move", [False, True])
@pytest.mark.parametrize("step", ["lease", "unchanged"])
def test_removed_from_the_origin_alone(
    here: PoolClient, there: PoolClient, shared_node: NodeProcess, target: Target, namespace: NamespaceId,
    during: Callable[..., None], step: str, move: bool,
) -> None:  # fmt: skip
    def replace() -> None:
        here.remove_objects(namespace, NAMES[:2])
        here.put_objects(namespace, NAMES[:1], [NEW])

    during(Origin, step, replace, after=step == "lease")
    target.copy(shared_node, namespace, move=move)
    assert values(there, namespace) == [None, None, OLD]
    assert values(here, namespace) == [NEW, None, None if move else OLD], "a move drops what it moved, nothing newer"


def test_what_was_put_here_since_is_not_taken_back(
    here: PoolClient, there: PoolClient, shared_node: NodeProcess, target: Target, namespace: NamespaceId,
    during: Callable[..., None],
) -> None:  # fmt: skip
    def replace() -> None:
        for client in (here, there):
            client.remove_objects(namespace, NAMES[:2])
        there.put_objects(namespace, NAMES[:1], [NEW])

    during(Origin, "unchanged", replace)
    target.copy(shared_node, namespace)
    assert values(there, namespace) == [NEW, None, OLD]


def test_an_origin_that_can_not_be_asked_again(
    here: PoolClient, there: PoolClient, shared_node: NodeProcess, target: Target, namespace: NamespaceId,
    during: Callable[..., None],
) -> None:  # fmt: skip
    """What was committed is not left standing: the next attempt brings what is still there."""

    def fail() -> None:
        assert values(there, namespace) == [OLD] * 3
        here.remove_objects(namespace, NAMES[:2])
        raise Unavailable("the link is down")

    during(Origin, "unchanged", fail)
    last = target.copy(shared_node, namespace)
    assert values(there, namespace) == [None, None, OLD]
    assert last.blocks_done == 1 and last.blocks_failed == 2


def test_what_was_here_before_stays(
    here: PoolClient, there: PoolClient, shared_node: NodeProcess, target: Target, namespace: NamespaceId,
    during: Callable[..., None],
) -> None:  # fmt: skip
    """A removal at the origin takes back what the copy brought, not what others had put here."""
    there.put_objects(namespace, NAMES[:1], [OLD])
    during(Origin, "lease", lambda: here.remove_objects(namespace, NAMES[:2]), after=True)
    target.copy(shared_node, namespace)
    assert values(there, namespace) == [OLD, None, OLD]


def test_a_move_drops_what_it_has_brought_and_nothing_newer(
    here: PoolClient, shared_node: NodeProcess, target: Target, there: PoolClient, namespace: NamespaceId,
    during: Callable[..., None],
) -> None:  # fmt: skip
    def replace() -> None:
        here.remove_objects(namespace, NAMES[:1])
        here.put_objects(namespace, NAMES[:1], [NEW])

    during(Origin, "drop", replace)
    last = target.copy(shared_node, namespace, move=True)
    assert values(here, namespace) == [NEW, None, None]
    assert values(there, namespace) == [OLD] * 3
    assert (last.blocks_done, last.blocks_failed) == (2, 1) and "changed at their origin" in last.message


def test_a_block_that_takes_its_other_form_meanwhile(
    here: PoolClient, shared_node: NodeProcess, target: Target, there: PoolClient, during: Callable[..., None]
) -> None:
    """Listed as int8, it is exact when it is leased: its slot here would be too short, and its label wrong."""
    group = GroupSpec(0, GroupKind.FULL, (0, 1), 16, 1, 2, 2 * 2 * 16 * 2 * 64 * 4, kv_heads=2, head_dim=64)
    spec = NamespaceSpec("forms", "", "float32", "test", "lkthd", "xxh3_128/1", (group,))
    namespace = here.register(spec)
    there.register(spec)
    keys, _ = random_blocks(2, [11])
    values = np.random.default_rng(12).standard_normal((2, group.block_bytes // 4)).astype(np.float32)
    blocks = values.view(np.uint8)
    assert here.put(namespace, keys, blocks, fidelity=Fidelity.INT8).stored.all()
    during(Origin, "lease", lambda: here.put(namespace, keys[:1], blocks[:1]))
    last = target.copy(shared_node, namespace)
    assert (last.blocks_done, last.blocks_failed) == (1, 1) and "replaced" in last.message
    out = np.zeros_like(blocks)
    got = there.get(namespace, keys, out, fidelity_min=Fidelity.INT8)
    assert got.found.tolist() == [False, True]
    assert target.copy(shared_node, namespace).blocks_done == 2
    got = there.get(namespace, keys, out, fidelity_min=Fidelity.INT8)
    assert got.found.all() and np.array_equal(out[0], blocks[0])
    assert got.fidelities is not None and got.fidelities.tolist() == [Fidelity.EXACT, Fidelity.INT8]
    for client in (here, there):
        client.remove_all(namespace)


def test_a_node_whose_ssd_is_out_of_reach_takes_no_objects(
    here: PoolClient, shared_node: NodeProcess, namespace: NamespaceId, connect: Callable[..., PoolClient],
    tmp_path: Path,
) -> None:  # fmt: skip
    """An older one may lie there, and would come back with it."""
    (tmp_path / "ssd").write_text("not a folder")
    blocks_namespace = here.register(namespace_spec("copied without its SSD"))
    keys, blocks = random_blocks(3, [13])
    here.put(blocks_namespace, keys, blocks)
    with closing(Target(tmp_path, 64 << 20)) as target:
        there = connect(target)
        last = target.copy(shared_node, namespace)
        assert (last.blocks_done, last.blocks_failed) == (0, 3) and "SSD is out of reach" in last.message
        there.register(namespace_spec("copied without its SSD"))
        assert target.copy(shared_node, blocks_namespace).blocks_done == 3
        there.register_objects("copy races")
        assert values(there, namespace) == [None] * 3
        assert there.get(blocks_namespace, keys, np.zeros_like(blocks)).found.all()
        there.close()
    here.remove_all(blocks_namespace)


def test_what_lies_on_the_ssd_here_is_compared(
    here: PoolClient, shared_node: NodeProcess, namespace: NamespaceId, connect: Callable[..., PoolClient],
    tmp_path: Path,
) -> None:  # fmt: skip
    """Another object under the name would come up again after the copy was evicted; the same one is a copy already."""
    with closing(Target(tmp_path, 64 << 20, ssd_demote_from=0.0)) as target:
        there = connect(target)
        there.register_objects("copy races")
        assert there.put_objects(namespace, NAMES[:2], [OLD, NEW]).stored.all()
        assert eventually(lambda: there.stats().ssd.records == 2)
        # One that is just being copied is held, and not evicted.
        evicted = 0

        def all_gone() -> bool:
            nonlocal evicted
            evicted += target.evict(namespace, object_keys(namespace, NAMES[:2]))
            return evicted == 2

        assert eventually(all_gone), evicted
        last = target.copy(shared_node, namespace)
        assert (last.blocks_done, last.blocks_failed) == (2, 1) and "something else" in last.message
        assert values(there, namespace) == [OLD, NEW, OLD]
        there.close()


# ---------------------------------------------------------------- the removals alone

ONE, OTHER = b"n" * 16, b"m" * 16


def keys(*numbers: int) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (8, 16), dtype=np.uint8)[list(numbers)]


def test_removals_since_a_mark() -> None:
    removals = Removals()
    removals.note(ONE, keys(0))
    mark = removals.mark()
    wanted, names = keys(0, 1, 2, 3), [b"x/0", b"x/1", b"y/2", b"z"]
    assert not removals.since(mark, ONE, wanted, names).any(), "that was before"
    removals.note(OTHER, keys(0, 1))
    removals.note(ONE, keys(5, 1, 6))
    assert removals.since(mark, ONE, wanted, names).tolist() == [False, True, False, False]
    removals.note(ONE, None, b"y/")
    assert removals.since(mark, ONE, wanted, names).tolist() == [False, True, True, False]
    assert not removals.since(removals.mark(), ONE, wanted, names).any()
    removals.note(ONE, None)
    assert removals.since(mark, ONE, wanted, names).all()
    assert removals.since(mark, OTHER, wanted, names).tolist() == [True, True, False, False]


def test_forgotten_removals_count_as_removals_of_all() -> None:
    removals = Removals(bytes_max=2000)
    marks = [removals.mark()]
    for _ in range(20):
        removals.note(OTHER, keys(0))
        marks.append(removals.mark())
    forgotten = [bool(removals.since(mark, ONE, keys(1, 2), [b"", b""]).all()) for mark in marks]
    assert forgotten[0] and not forgotten[-1] and forgotten == sorted(forgotten, reverse=True)
    removals.note(OTHER, None, b"p" * 4000)
    assert removals.since(marks[-1], ONE, keys(1), [b""]).all(), "one that is larger than all room"
    assert not removals.since(removals.mark(), ONE, keys(1), [b""]).any()
