"""What a client answers without asking the node, and how long it asks at most: against a node that is stopped."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpool.client import RESERVED, PoolClient
from kvpool.core.errors import BadArgument, DeadlineExceeded, KvpoolError, Reason
from kvpool.core.hashing import object_keys
from kvpool.service.client_reads import PROMOTE_SHARE, lease_times
from tests.pool.node_process import NodeProcess, namespace_spec, random_blocks

Start = Callable[..., NodeProcess]
Connect = Callable[..., PoolClient]
SPEC = namespace_spec("without a call")
#: A client's own time in these tests: whoever waits for it, waits too long for the test.
FOREVER_S = 600.0


@contextmanager
def stopped(node: NodeProcess) -> Iterator[None]:
    try:
        node.send(signal.SIGSTOP)
        yield
    finally:
        node.send(signal.SIGCONT)


def test_who_reads_exact_copies_hears_of_misses_without_a_call(start_node: Start, connect: Connect) -> None:
    node = start_node()
    client = connect(node, timeout_s=FOREVER_S)
    namespace = client.register(SPEC)
    keys, data = random_blocks(6, [1])
    client.put(namespace, keys[:2], data[:2])
    client.put(namespace, keys[2:3], data[2:3], shard=1)
    reservation = client.reserve(namespace, keys[3:4])
    assert reservation.status.tolist() == [RESERVED]
    with stopped(node):
        found = client.lookup(namespace, keys, exact=True, timeout_s=0.2)
        assert found.tolist() == [True, True, False, False, False, False], "also of what is being written"
        assert client.lookup(namespace, keys[:3], shard=1, exact=True, timeout_s=0.2).tolist() == [False, False, True]
        with pytest.raises(DeadlineExceeded):  # the node may have lossy copies
            client.lookup(namespace, keys, timeout_s=0.2)
    assert client.lookup(namespace, keys).tolist() == found.tolist()


def test_objects_are_known_by_their_names_without_a_call(start_node: Start, connect: Connect) -> None:
    node = start_node()
    near, far = connect(node, timeout_s=FOREVER_S), connect(node, channels=("tcp",), timeout_s=FOREVER_S)
    domain = near.register_objects("d")
    assert far.register_objects("d") == domain
    near.put_objects(domain, ["a", "b"], [b"bird", b"worm" * 1000])
    reservation = near.reserve(domain, object_keys(domain, ["c"]), names=["c"], sizes=np.array([1], np.uint64))
    assert reservation.status.tolist() == [RESERVED]
    names = ["b", "c", "d", "a"]
    with stopped(node):
        assert near.lookup_objects(domain, names, timeout_s=0.2).tolist() == [True, False, False, True]
        assert near.object_sizes(domain, names).tolist() == [4000, 0, 0, 4]
        assert near.object_sizes(domain, names, ask=False).tolist() == [4000, 0, 0, 4]
        with pytest.raises(DeadlineExceeded):  # by key alone: there might be another one's name
            near.lookup(domain, object_keys(domain, names), exact=True, timeout_s=0.2)
        with pytest.raises(DeadlineExceeded):
            far.lookup_objects(domain, names, timeout_s=0.2)
        assert not far.lookup_objects(domain, names, ask=False).any()
    assert far.lookup_objects(domain, names).tolist() == [True, False, False, True]
    assert far.object_sizes(domain, names).tolist() == [4000, 0, 0, 4]


def test_what_may_be_on_an_ssd_is_asked_for(start_node: Start, connect: Connect, tmp_path: Path) -> None:
    node = start_node(ssd_dir=str(tmp_path), ssd_bytes=64 << 20)
    client = connect(node, timeout_s=FOREVER_S)
    namespace = client.register(SPEC)
    keys, data = random_blocks(3, [2])
    client.put(namespace, keys[:2], data[:2])
    with stopped(node):
        assert client.lookup(namespace, keys[:2], exact=True, timeout_s=0.2).all(), "these are in memory"
        with pytest.raises(DeadlineExceeded):
            client.lookup(namespace, keys, exact=True, timeout_s=0.2)
        assert client.lookup(namespace, keys, ask=False).tolist() == [True, True, False]


def test_a_lookup_that_does_not_ask(start_node: Start, connect: Connect) -> None:
    node = start_node()
    near, far = connect(node, timeout_s=FOREVER_S), connect(node, channels=("tcp",), timeout_s=FOREVER_S)
    keys, data = random_blocks(3, [3])
    assert not near.lookup(SPEC.id(), keys, ask=False).any() and not near.connected, "it does not connect"
    near.put(near.register(SPEC), keys[:2], data[:2])
    assert far.lookup(far.register(SPEC), keys).tolist() == [True, True, False]
    with stopped(node):
        assert near.lookup(SPEC.id(), keys, ask=False).tolist() == [True, True, False]
        assert not near.lookup(namespace_spec("unknown here").id(), keys, ask=False).any()
        assert not far.lookup(SPEC.id(), keys, ask=False).any(), "there is no index to look into"
    with pytest.raises(BadArgument):
        near.lookup(SPEC.id(), keys[:, :8], ask=False)
    near.close()
    assert not near.lookup(SPEC.id(), keys, ask=False).any()


@pytest.mark.parametrize("channel", ["shm", "tcp"])
def test_a_read_ends_with_its_callers_time(start_node: Start, connect: Connect, tmp_path: Path, channel: str) -> None:
    """Whatever the client's own time is, and however long it would wait for the SSD."""
    node = start_node(ssd_dir=str(tmp_path), ssd_bytes=64 << 20)
    client = connect(node, channels=(channel,), timeout_s=FOREVER_S)
    namespace = client.register(SPEC)
    keys, data = random_blocks(3, [4])
    client.put(namespace, keys[:2], data[:2])
    out = np.zeros_like(data)
    sections = np.zeros(3, np.int64)
    with stopped(node):
        for read in (
            lambda: client.get(namespace, keys, out, ttl_s=0.2, promote_s=FOREVER_S),
            lambda: client.read_sections(namespace, keys, sections, out, ttl_s=0.2, promote_s=FOREVER_S),
        ):
            # Of the call that asks, or of the bytes, whichever was being waited for when the time was over.
            with pytest.raises(KvpoolError) as late:
                read()
            assert late.value.reason is Reason.DEADLINE
    assert client.get(namespace, keys, out).found.tolist() == [True, True, False]


@given(time_s=st.floats(0.001, 100), timeout_s=st.floats(0.001, 100), promote_s=st.floats(0, 100))
def test_times_of_a_lease(time_s: float, timeout_s: float, promote_s: float) -> None:
    call_s, promoting_s = lease_times(time_s, timeout_s, promote_s)
    assert 0 < call_s <= time_s and promoting_s <= promote_s
    assert promoting_s <= PROMOTE_SHARE * time_s, "some time is left for the answer, and for the bytes"
    assert (promoting_s == 0) == (promote_s == 0)
    if time_s >= (timeout_s + promote_s) / PROMOTE_SHARE:
        assert (call_s, promoting_s) == (timeout_s + promote_s, promote_s), "with time enough all is as asked for"
