"""kvpool's `mooncake.store` on real nodes: what its callers rely on besides codes, and where it differs on purpose."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest

from engines.mooncake.codes import Code
from engines.mooncake.connection import REST_S
from engines.mooncake.sessions import Sessions
from engines.mooncake.store import (
    MooncakeDistributedStore,
    MooncakeHostMemAllocator,
    ReplicateConfig,
    SoftPinAction,
)
from kvpool.client import PoolClient
from kvpool.cluster import ClusterClient, members
from kvpool.core.errors import DeadlineExceeded
from kvpool.core.hashing import object_keys
from kvpool.v1.block_source_pb2 import SourceStats
from tests.mooncake.stores import At, Ours
from tests.pool.node_process import NodeProcess, eventually, free_port
from tests.pool.pool_made import Pool, running_pool

Connect = Callable[..., MooncakeDistributedStore]
Start = Callable[..., NodeProcess]

#: Far more than anything takes.
PATIENCE_S = 60.0


# ---------------------------------------------------------------- memory


def test_memory_that_is_not_registered_is_a_code_and_is_not_touched(ours: Ours) -> None:
    store = ours.store
    assert store.put("a", b"12345678") == 0
    other = np.zeros(64, dtype=np.uint8)
    pointer = other.ctypes.data
    assert store.put_from("b", pointer, 64) == Code.INVALID_PARAMS
    assert store.get_into("a", pointer, 64) == Code.INVALID_PARAMS
    assert store.batch_put_from_multi_buffers(["b"], [[pointer]], [[64]]) == [Code.INVALID_PARAMS]
    assert store.batch_get_into_multi_buffers(["a"], [[pointer]], [[8]]) == [Code.INVALID_PARAMS]
    assert not other.any() and store.is_exist("b") == 0


def test_one_bad_piece_of_a_batch_leaves_the_others_alone(ours: Ours) -> None:
    end = len(ours.memory)
    ours.fill(bytes(range(200)))
    codes = ours.call("batch_put_from", ["past", "b"], [At(end - 10), At(0)], [20, 20])
    assert codes == [Code.INVALID_PARAMS, 0]
    codes = ours.call("batch_get_into", ["b", "none", "b", "b"], [At(1000), At(2000), At(end - 5), At(3000)],
                      [20, 20, 20, 19])  # fmt: skip
    assert codes == [20, Code.OBJECT_NOT_FOUND, Code.INVALID_PARAMS, Code.INVALID_PARAMS]
    assert ours.bytes_at(1000, 20) == bytes(range(20))


def test_read_only_memory_is_put_from_and_not_read_into(ours: Ours, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 8192)
    mapped = np.memmap(tmp_path / "file", dtype=np.uint8, mode="r")
    assert ours.store.register_buffer(mapped.ctypes.data, 8192) == 0
    assert ours.store.put_from("a", mapped.ctypes.data, 100) == 0
    assert ours.store.get_into("a", mapped.ctypes.data, 100) == Code.INVALID_PARAMS
    assert ours.store.batch_get_into_multi_buffers(["a"], [[mapped.ctypes.data]], [[100]]) == [Code.INVALID_PARAMS]
    assert ours.store.unregister_buffer(mapped.ctypes.data) == 0


def test_the_allocators_memory_can_be_registered(ours: Ours) -> None:
    allocator = MooncakeHostMemAllocator()
    pointer = allocator.alloc(1 << 20)
    assert ours.store.register_buffer(pointer, 1 << 20) == 0
    assert ours.store.put("a", b"abc") == 0 and ours.store.get_into("a", pointer + 5, 3) == 3
    assert ours.store.unregister_buffer(pointer) == 0 and allocator.free(pointer) == 0


# ---------------------------------------------------------------- sizes, keys, values


def test_an_object_larger_than_the_node_is_no_room_and_the_others_are_stored(ours: Ours) -> None:
    large = np.zeros(65 << 20, dtype=np.uint8)
    assert ours.store.register_buffer(large.ctypes.data, large.nbytes) == 0
    codes = ours.store.batch_put_from(["large", "small"], [large.ctypes.data] * 2, [large.nbytes, 100])
    assert codes == [Code.NO_AVAILABLE_HANDLE, 0]


def test_pieces_of_more_than_one_lot_come_back_whole(ours: Ours) -> None:
    rng = np.random.default_rng(5)
    source, target = rng.integers(0, 256, 20 << 20, dtype=np.uint8), np.zeros(20 << 20, dtype=np.uint8)
    for array in (source, target):
        assert ours.store.register_buffer(array.ctypes.data, array.nbytes) == 0
    names, size = [f"k{i}" for i in range(5)], 4 << 20
    cuts = [0, 1, 4096, 1 << 20, size]
    lengths = [end - begin for begin, end in itertools.pairwise(cuts)]
    at = [[i * size + cut for cut in cuts[:-1]] for i in range(5)]
    from_source = [[source.ctypes.data + offset for offset in row] for row in at]
    into_target = [[target.ctypes.data + offset for offset in row] for row in at]
    assert ours.store.batch_put_from_multi_buffers(names, from_source, [lengths] * 5) == [0] * 5
    assert ours.store.batch_get_into_multi_buffers(names, into_target, [lengths] * 5) == [size] * 5
    assert np.array_equal(source, target)


def test_keys_have_at_most_1024_bytes(ours: Ours) -> None:
    assert ours.store.put("k" * 1024, b"x") == 0
    assert ours.store.put("k" * 1025, b"x") == Code.INVALID_PARAMS
    assert ours.store.put("ü" * 513, b"x") == Code.INVALID_PARAMS
    assert ours.store.put("\udc80", b"x") == Code.INVALID_PARAMS
    assert ours.store.batch_is_exist(["k" * 1024, "k" * 1025, "\udc80"]) == [1, 0, 0]
    assert ours.store.get_batch(["k" * 1025, "k" * 1024]) == [b"", b"x"]
    assert ours.store.put(b"bytes", b"x") == 0 and ours.store.is_exist("bytes") == 1


def test_a_key_may_come_twice_in_a_call(ours: Ours) -> None:
    """The first one is stored."""
    ours.fill(bytes(range(100)))
    assert ours.call("batch_put_from", ["a", "b", "a"], [At(0), At(10), At(20)], [5, 5, 5]) == [0, 0, 0]
    assert ours.store.get_batch(["a", "a", "b"]) == [bytes(range(5)), bytes(range(5)), bytes(range(10, 15))]
    assert ours.call("batch_get_into", ["a", "a"], [At(200), At(300)], [5, 5]) == [5, 5]
    assert ours.bytes_at(200, 5) == ours.bytes_at(300, 5) == bytes(range(5))
    assert ours.store.upsert_batch(["a", "a"], [b"first", b"last"]) == 0 and ours.store.get("a") == b"last"


def test_values_are_stored_in_the_order_of_their_elements(ours: Ours) -> None:
    numbers = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert ours.store.put("rows", numbers) == 0 and ours.store.get("rows") == numbers.tobytes()
    assert ours.store.put("columns", numbers.T) == 0 and ours.store.get("columns") == numbers.T.tobytes()


@pytest.mark.parametrize("wrong", ["text", None, 5])
def test_what_is_no_value_or_key_is_a_type_error(ours: Ours, wrong: object) -> None:
    with pytest.raises(TypeError):
        ours.store.put("a", wrong)
    if not isinstance(wrong, str):
        with pytest.raises(TypeError):
            ours.store.put(wrong, b"x")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        ours.store.put("a", b"x", wrong)  # type: ignore[arg-type]


def test_answers_are_plain_integers(ours: Ours) -> None:
    """vLLM looks at the type."""
    answers = [
        ours.store.put("a", b"x"), ours.store.put("", b"x"), ours.store.get_size("a"), ours.store.remove("a"),
        ours.store.register_buffer(0, 0), ours.store.unregister_buffer(0), ours.store.remove_all(),
        ours.store.put_batch([], []), *ours.store.batch_is_exist(["a"]), *ours.store.batch_remove(["a"]),
    ]  # fmt: skip
    assert {type(answer) for answer in answers} == {int}


# ---------------------------------------------------------------- configs


def test_configs_are_checked(ours: Ours) -> None:
    def put(**fields: object) -> int:
        config = ReplicateConfig()
        for name, value in fields.items():
            setattr(config, name, value)
        return ours.store.put("a", b"x", config)

    assert put(replica_num=0) == Code.INVALID_PARAMS
    assert put(soft_pin_ttl_ms=5) == Code.INVALID_PARAMS
    assert put(group_ids=["g", "h"]) == Code.INVALID_PARAMS
    assert put(group_ids=["g"], preferred_segment="elsewhere:1", replica_num=3) == 0
    with pytest.raises(AttributeError):
        put(session_ids=["s"])


def test_pins_keep_objects_while_others_are_evicted(start_node: Start, connected: Connect) -> None:
    node = start_node(memory_bytes=8 << 20)
    store = connected(node.address)
    hard, soft = ReplicateConfig(with_hard_pin=True), ReplicateConfig(soft_pin_action=SoftPinAction.ENABLE)
    value = bytes(1 << 20)
    assert store.put("hard", value, hard) == 0 and store.put("soft", value, soft) == 0 and store.put("none", value) == 0
    assert all(store.put(f"more {i}", value) == 0 for i in range(20))
    assert store.batch_is_exist(["hard", "soft", "none"]) == [1, 1, 0]
    assert store.remove("hard") == 0 and store.is_exist("hard") == 0


def test_a_pin_ends_with_its_object(start_node: Start, connected: Connect) -> None:
    """Also if another process removes it, and however it is removed."""
    node = start_node(memory_bytes=8 << 20)
    store, other = connected(node.address), connected(node.address)
    hard, value = ReplicateConfig(with_hard_pin=True), bytes(3 << 20)
    with PoolClient(node.address) as pool:
        empty = pool.stats().bytes_used
        ways = [
            lambda: other.remove("a"), lambda: other.batch_remove(["a", "b"]), lambda: other.remove_all(),
            lambda: other.remove_by_regex("a"), lambda: other.upsert("a", b"small") or other.remove("a"),
        ]  # fmt: skip
        for remove in ways:
            assert store.put("a", value, hard) == 0 and store.upsert("a", value, hard) == 0
            assert pool.stats().pins == 1
            remove()
            assert (pool.stats().pins, pool.stats().bytes_used) == (0, empty)


# ---------------------------------------------------------------- upsert


def test_an_upsert_is_never_read_as_a_mixture(node: NodeProcess, connected: Connect) -> None:
    writer, reader = connected(node.address), connected(node.address)
    size, seen, found, stop = 300_000, set(), threading.Event(), threading.Event()
    assert writer.upsert("changing", bytes(size)) == 0

    def read() -> None:
        while not stop.is_set():
            value = reader.get("changing")
            seen.add((len(value), bytes(sorted(set(value)))))
            if value:
                found.set()

    thread = threading.Thread(target=read)
    thread.start()
    end_s, number = time.monotonic() + PATIENCE_S, 0
    try:
        # Until the other thread has had its turn.
        while number < 60 or not (found.is_set() or time.monotonic() > end_s):
            number += 1
            assert writer.upsert("changing", bytes([number % 251]) * size) == 0
    finally:
        stop.set()
        thread.join(60)
    assert all((length, len(values)) in ((size, 1), (0, 0)) for length, values in seen)
    assert found.is_set()
    assert reader.get("changing") == bytes([number % 251]) * size


# ---------------------------------------------------------------- sessions and ranges


def test_an_object_put_by_ranges_is_seen_when_it_is_complete(ours: Ours) -> None:
    ours.fill(bytes(range(100)))
    assert ours.call("batch_put_session_start", ["a", "b", "", "c"], [10, 10, 5, 0])[:2] == [0, 0]
    ranges = [[At(0), At(20)], [At(0)]], [[4, 6], [4]], [[6, 0], [0]]
    assert ours.call("batch_put_from_multi_buffer_ranges", ["a", "b"], *ranges) == [10, 4]
    assert ours.store.batch_is_exist(["a", "b"]) == [0, 0]
    assert ours.call("batch_put_from_multi_buffer_ranges", ["a"], [[At(0)]], [[5]], [[6]]) == [Code.INVALID_PARAMS]
    # What was not written wholly is dropped.
    assert ours.store.batch_put_session_end(["a", "b", "none"]) == [0, Code.INVALID_WRITE, Code.INVALID_PARAMS]
    assert ours.store.get("a") == bytes(range(20, 26)) + bytes(range(4))
    assert ours.store.is_exist("b") == 0
    assert ours.store.batch_put_session_start(["a"], [10]) == [Code.OBJECT_ALREADY_EXISTS]


def test_a_session_that_is_revoked_stores_nothing(ours: Ours) -> None:
    assert ours.store.batch_put_session_start(["a"], [4]) == [0]
    assert ours.call("batch_put_from_multi_buffer_ranges", ["a"], [[At(0)]], [[4]], [[0]]) == [4]
    assert ours.store.batch_put_session_revoke(["a", "b"]) == [0, Code.INVALID_PARAMS]
    assert ours.store.batch_put_session_end(["a"]) == [Code.INVALID_PARAMS] and ours.store.is_exist("a") == 0


def test_ranges_of_an_object_are_of_one_version_of_it(ours: Ours) -> None:
    assert ours.store.put("a", bytes(range(50))) == 0
    assert ours.store.batch_get_session_start(["a", "none"]) == [0, Code.OBJECT_NOT_FOUND]
    ranges = [[At(0), At(100)], [At(0)]], [[10, 5], [1]], [[40, 0], [0]]
    assert ours.call("batch_get_into_multi_buffer_ranges", ["a", "none"], *ranges) == [15, Code.INVALID_PARAMS]
    assert ours.bytes_at(0, 10) == bytes(range(40, 50)) and ours.bytes_at(100, 5) == bytes(range(5))
    assert ours.store.upsert("a", b"z" * 50) == 0
    assert ours.call("batch_get_into_multi_buffer_ranges", ["a"], [[At(0)]], [[10]], [[20]]) == [10]
    assert ours.bytes_at(0, 10) == bytes(range(20, 30))
    assert ours.call("batch_get_into_multi_buffer_ranges", ["a"], [[At(0)]], [[10]], [[41]]) == [Code.INVALID_PARAMS]
    assert ours.store.batch_get_session_end(["a", "none"]) == 0
    assert ours.call("batch_get_into_multi_buffer_ranges", ["a"], [[At(0)]], [[1]], [[0]]) == [Code.INVALID_PARAMS]


def test_what_has_no_room_in_the_sessions_is_not_read(ours: Ours, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ours.store.put_batch(["a", "b", "c"], [b"x" * 40, b"y" * 70, b"z" * 50]) == 0
    monkeypatch.setattr(ours.store, "_gets", Sessions(bytes_max=100))
    pool, read = ours.store._pool, []
    assert pool is not None
    monkeypatch.setattr(pool, "read", lambda names, plain=pool.read: (read.extend(names), plain(names))[1])
    start = ours.store.batch_get_session_start
    assert start(["a", "b", "none", "c"]) == [0, Code.NO_AVAILABLE_HANDLE, Code.OBJECT_NOT_FOUND, 0]
    assert read == ["a", "c"]
    assert start(["a", "c"]) == [0, 0]  # in place of those before
    assert start(["b"]) == [Code.NO_AVAILABLE_HANDLE]
    assert ours.store.batch_get_session_end(["a", "c"]) == 0 and start(["b"]) == [0]


def test_scattered_reads_of_several_objects(ours: Ours) -> None:
    assert ours.store.put("a", bytes(range(10))) == 0
    codes = ours.call(
        "get_into_ranges", [At(0)], [["a", "none"]], [[[0, 50, 60], [70]]], [[[0, 5, 8], [0]]], [[[5, 5, 3], [1]]]
    )
    assert codes == [[[5, 5, Code.INVALID_PARAMS], [Code.OBJECT_NOT_FOUND]]]
    assert ours.bytes_at(0, 5) == bytes(range(5)) and ours.bytes_at(50, 5) == bytes(range(5, 10))


# ---------------------------------------------------------------- tenants, nodes, losses


def test_tenants_neither_see_nor_remove_each_others_objects(node: NodeProcess, connected: Connect) -> None:
    one, two = connected(node.address, tenant_id="one"), connected(node.address, tenant_id="two")
    assert one.put("a", b"of one") == 0 and two.is_exist("a") == 0
    assert two.put("a", b"of two") == 0 and one.get("a") == b"of one"
    assert two.remove_all() == 1 and one.get("a") == b"of one"


def test_a_store_without_setup_says_so(ours: Ours) -> None:
    store = MooncakeDistributedStore()
    assert store.health_check() == 1 and store.close() == 0
    assert store.put("a", b"x") == store.get_size("a") == store.remove("a") == Code.INVALID_PARAMS
    assert store.batch_is_exist(["a"]) == store.batch_remove(["a"]) == [Code.INVALID_PARAMS]
    assert (store.get("a"), store.get_buffer("a"), store.get_replica_desc("a")) == (b"", None, [])


def test_setup_by_a_dict_and_its_mistakes(node: NodeProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    store = MooncakeDistributedStore()
    assert store.setup({"local_hostname": "h"}) == Code.INVALID_PARAMS
    wanted = {"local_hostname": "h", "metadata_server": "P2PHANDSHAKE"}
    assert store.setup(wanted) == Code.INVALID_PARAMS  # nothing says where the pool is
    assert store.setup({**wanted, "master_server_addr": "127.0.0.1:1"}) == Code.RPC_FAIL
    with pytest.raises(TypeError):
        store.setup("h", "P2PHANDSHAKE", 0, 0, "tcp", "", node.address, unheard_of=1)
    monkeypatch.setenv("KVPOOL_NODE", node.address)
    assert store.setup({**wanted, "master_server_addr": "127.0.0.1:1"}) == 0 and store.get_hostname() == "h"
    assert store.close() == 0


def test_a_lost_node_is_a_code_and_comes_back(start_node: Start, connected: Connect) -> None:
    node = start_node(id="mine", listen=f"127.0.0.1:{free_port()}")
    store = connected(node.address)
    memory = np.zeros(100, dtype=np.uint8)
    pointer = memory.ctypes.data
    assert store.register_buffer(pointer, 100) == 0 and store.put("a", b"abc") == 0
    node.kill()
    lost = (Code.RPC_FAIL, Code.RPC_TIMEOUT)
    assert store.put("b", b"x") in lost and store.health_check() == 2
    assert store.batch_put_from(["b"], [pointer], [5])[0] in lost
    assert (store.get("b"), store.get_buffer("b"), store.batch_get_tensor(["b"])) == (b"", None, [None])
    assert store.is_exist("b") in (*lost, 0) and store.remove("a") in lost and store.remove_all() in lost
    again = start_node(id="mine", listen=node.address)
    assert again.address == node.address
    with PoolClient(node.address) as pool:
        pool.info()
    assert eventually(lambda: store.health_check() == 0)
    assert store.put("c", b"after") == 0 and store.get("c") == b"after"


class FailingPool:
    """A pool whose every call ends with an error; counts them."""

    def __init__(self, error: Exception) -> None:
        self.error, self.calls = error, 0

    def __getattr__(self, name: str) -> Callable[..., object]:
        def call(*_: object) -> object:
            self.calls += 1
            raise self.error

        return call


def test_a_pool_that_does_not_answer_is_left_alone_for_a_moment() -> None:
    store, pool = MooncakeDistributedStore(), FailingPool(DeadlineExceeded("made up"))
    store._pool = pool  # type: ignore[assignment]
    now = time.monotonic()
    answers = [store.is_exist("a") for _ in range(20)] + [store.put("a", b"x"), store.get_size("a")]
    assert set(answers) == {Code.RPC_TIMEOUT} and store.get("a") == b""
    # One call a REST_S goes through, and they take next to no time.
    assert 1 <= pool.calls <= 2 + (time.monotonic() - now) / REST_S


@pytest.mark.parametrize("error", [ValueError("closed"), MemoryError(), AssertionError("a mistake")])
def test_no_error_leaves_a_call_as_an_exception(error: Exception) -> None:
    store, pool = MooncakeDistributedStore(), FailingPool(error)
    store._pool = pool  # type: ignore[assignment]
    assert store.batch_is_exist(["a", "b"]) == [Code.INTERNAL_ERROR] * 2
    assert store.put("a", b"x") == store.get_size("a") == store.remove_all() == Code.INTERNAL_ERROR
    assert (store.get("a"), store.get_buffer("a"), store.get_replica_desc("a")) == (b"", None, [])


def _leased(pool: Pool) -> list[tuple[int, int]]:
    """What readers have asked each node for: blocks that were there, and blocks that were not."""
    with ClusterClient(pool.address) as client:
        told: dict[str, SourceStats] = {}

        def all_have_answered() -> bool:
            told.update(client.stats())
            return len(told) == len(pool.nodes)

        assert eventually(all_have_answered)
        return [(told[name].hits, told[name].misses) for name in sorted(told)]


def _described(store: MooncakeDistributedStore, key: str) -> list[int]:
    """Bytes of each copy that an object is said to have."""
    return [one.get_memory_descriptor().buffer_descriptor.size for one in store.get_replica_desc(key)]


@contextmanager
def _somebody_writes(pool: Pool, name: str) -> Iterator[None]:
    """An object that is reserved on every node."""
    with ExitStack() as stack:
        for node in pool.nodes.values():
            client = stack.enter_context(PoolClient(node.address))
            namespace = client.register_objects("mooncake/default")
            sizes = np.array([4], dtype=np.uint64)
            keys = object_keys(namespace, [name])
            kept = client.reserve(namespace, keys, sizes=sizes, names=[name], ttl_s=10 * PATIENCE_S)
            stack.callback(client.abort, kept)
        yield


def test_copies_lie_on_several_nodes_of_a_cluster(
    tmp_path: Path, connected: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a slow machine may make a miss is asked again: who does not answer in 2 s counts as having nothing."""
    monkeypatch.setattr(members, "FORGET_S", 600.0)
    with running_pool(tmp_path, ["host-a", "host-b"]) as pool:
        with ClusterClient(pool.address) as client:
            assert pool.joined(client, 2)
        store = connected(pool.address)
        memory = np.arange(200, dtype=np.uint8)
        pointer = memory.ctypes.data
        assert store.register_buffer(pointer, 200) == 0
        twice = ReplicateConfig(replica_num=2)
        assert store.put("a", b"both", twice) == 0
        assert store.batch_put_from_multi_buffers(["b"], [[pointer, pointer + 50]], [[20, 30]], twice) == [0]
        assert store.put("b", b"other") == 0
        asked = _leased(pool)
        sizes = (4, 50, Code.OBJECT_NOT_FOUND)
        assert eventually(lambda: tuple(store.get_size(name) for name in "abc") == sizes)
        assert eventually(lambda: _described(store, "b") == [50])
        assert _leased(pool) == asked  # sizes are asked for, nothing is read
        with _somebody_writes(pool, "slow"):
            assert store.put("slow", b"other") == 0  # as on one node: it will be there
            assert store.is_exist("slow") == 0
            codes: set[int] = set()

            def is_refused() -> bool:
                codes.add(store.upsert("slow", b"other"))
                return Code.REPLICA_IS_NOT_READY in codes

            assert eventually(is_refused) and Code.OK not in codes
        next(iter(pool.nodes.values())).kill()
        assert eventually(lambda: store.get("a") == b"both")
        assert eventually(lambda: store.get_into("b", pointer + 100, 100) == 50)
        assert memory[100:150].tolist() == [*range(20), *range(50, 80)]
        # A node that may still have the old bytes stands in the way of new ones.
        assert store.upsert("a", b"new") in (Code.RPC_FAIL, Code.RPC_TIMEOUT)
