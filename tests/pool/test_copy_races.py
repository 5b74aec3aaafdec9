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
from kvpool.core.ids import NamespaceId
from kvpool.service.copy_origin import Origin
from kvpool.service.node import NodeConfig, NodeServer
from kvpool.service.removals import Removals
from kvpool.service.rpc import make_channel
from kvpool.v1 import source_admin_pb2 as pb
from kvpool.v1 import source_admin_pb2_grpc
from tests.pool.node_process import NodeProcess

NAMES = ["a/0", "a/1", "b/0"]
OLD, NEW = b"old" * 1000, b"new" * 700
TIMEOUT_S = 60.0


class Target:
    """A node in this process, so that a test can stand between the steps of its copies."""

    def __init__(self, folder: Path, ssd_bytes: int) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        config = NodeConfig(
            "target", "127.0.0.1:0", memory_bytes=32 << 20, segment_dir=str(folder),
            ssd_dir=str(folder / "ssd") if ssd_bytes else "", ssd_bytes=ssd_bytes,
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
        stats = client.stats()
        assert (stats.leases, stats.reservations, stats.blocks_writing, stats.quarantined) == (0, 0, 0, 0)


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
