"""Memory by address: what is registered, compared with a plain list of bytes."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.mooncake.codes import Code
from engines.mooncake.memory import BufferHandle, HostMemory, RegisteredMemory, addresses, host_access, memory_at

ARENA = np.zeros(256, dtype=np.uint8)
BASE = ARENA.ctypes.data

pieces = st.tuples(st.integers(0, 255), st.integers(1, 64)).filter(lambda piece: sum(piece) <= 256)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), pieces), max_size=20),
    st.lists(st.tuples(st.integers(-300, 600), st.integers(0, 80)), max_size=20),
)
def test_pieces_are_inside_exactly_if_one_registered_run_has_all_their_bytes(
    changes: list[tuple[bool, tuple[int, int]]], asked: list[tuple[int, int]]
) -> None:
    memory, plain = RegisteredMemory(), {}
    for adds, (begin, size) in changes:
        if adds:
            free = all(begin + size <= first or last <= begin for first, last in plain.items())
            assert memory.register(BASE + begin, size) == (Code.OK if free else Code.INVALID_PARAMS)
            if free:
                plain[begin] = begin + size
        else:
            assert memory.unregister(BASE + begin) == (Code.OK if begin in plain else Code.INVALID_PARAMS)
            plain.pop(begin, None)
    pointers = addresses([BASE + begin for begin, _ in asked])
    sizes = addresses([size for _, size in asked])
    # A piece of no bytes counts as inside where a run begins before it and does not end before it.
    inside = [any(first <= begin and begin + size <= last for first, last in plain.items()) for begin, size in asked]
    for row, (begin, size) in enumerate(asked):
        got = bool(memory.contains(pointers, sizes)[row])
        assert got == inside[row] or size == 0, (plain, begin, size)
    for view, (begin, size), there in zip(memory.views(pointers, sizes), asked, inside, strict=True):
        if there and size:
            assert view is not None and view.ctypes.data == BASE + begin and len(view) == size
        elif size:
            assert view is None


def test_addresses_near_the_end_of_the_address_space_do_not_wrap() -> None:
    memory = RegisteredMemory()
    assert memory.register(BASE, 256) == Code.OK
    huge = addresses(np.array([BASE + 1, (1 << 64) - 8, 1], dtype=np.uint64))
    sizes = addresses(np.array([(1 << 64) - 1, 16, (1 << 64) - 1], dtype=np.uint64))
    assert not memory.contains(huge, sizes).any()
    assert memory.register((1 << 64) - 8, 16) == Code.INVALID_PARAMS


def test_what_is_no_memory_of_this_process_is_not_registered() -> None:
    memory = RegisteredMemory()
    assert memory.register(0, 10) == Code.INVALID_PARAMS
    assert memory.register(4096, 10) == Code.INVALID_PARAMS  # the first pages are never mapped
    assert memory.register(BASE, 0) == Code.INVALID_PARAMS
    assert memory.register(BASE, 1 << 46) == Code.INVALID_PARAMS


MAPS = """1000-2000 rw-p 00000000 00:00 0
2000-3000 r--p 00000000 00:00 0    /some/file
3000-4000 ---p 00000000 00:00 0
5000-6000 rw-s 00000000 00:00 0    /dev/shm/x
"""


def test_access_is_that_of_all_maps_that_a_run_touches() -> None:
    assert host_access(0x1000, 0x2000, MAPS) == "rw"
    assert host_access(0x1800, 0x2800, MAPS) == "r"
    assert host_access(0x2800, 0x3800, MAPS) == ""  # may not be touched
    assert host_access(0x3800, 0x5800, MAPS) == ""  # a gap
    assert host_access(0x5000, 0x6001, MAPS) == ""  # beyond the end
    assert host_access(0x5FFF, 0x6000, MAPS) == "rw"
    assert host_access(0x100, 0x1001, MAPS) == ""


def test_lent_memory_is_written_and_freed_once() -> None:
    host = HostMemory()
    pointer = host.alloc(10_000)
    assert pointer % 4096 == 0
    memory_at(pointer, 10_000)[:] = 7
    assert memory_at(pointer, 10_000).sum() == 70_000
    assert (host.free(pointer), host.free(pointer), host.free(12345)) == (0, -1, -1)
    pointer = host.alloc(4096)
    memory = memory_at(pointer, 4096)
    del host
    gc.collect()
    memory[:] = 1  # it is there until it is freed
    assert HostMemory().free(pointer) == 0
    host = HostMemory()
    assert host.alloc(-1) == 0 and host.alloc(1 << 60) == 0


def test_a_handle_is_a_buffer_with_an_address() -> None:
    handle = BufferHandle(b"abc")
    assert memory_at(handle.ptr(), handle.size()).tobytes() == b"abc" == bytes(memoryview(handle))


def test_memory_is_unregistered_when_calls_that_use_it_have_ended() -> None:
    memory, begun, end = RegisteredMemory(), threading.Event(), threading.Event()
    assert memory.register(BASE, 256) == Code.OK

    def use() -> None:
        with memory.in_use():
            begun.set()
            assert end.wait(60)

    thread = threading.Thread(target=use)
    thread.start()
    assert begun.wait(60)
    assert memory.unregister(BASE, timeout_s=0.01) == Code.RPC_TIMEOUT
    assert memory.contains(addresses([BASE]), addresses([256])).all()  # as before
    waiting = threading.Timer(0.0, end.set)
    waiting.start()
    assert memory.unregister(BASE, timeout_s=60) == Code.OK
    assert not thread.is_alive() or end.is_set()
    thread.join(60)
    waiting.join(60)
    assert not memory.contains(addresses([BASE]), addresses([256])).any()


def test_nobody_waits_for_an_unregister_that_waits() -> None:
    """The thread that registers here would otherwise wait for the one that waits for it."""
    memory, other = RegisteredMemory(), np.zeros(16, dtype=np.uint8)
    codes: list[int] = []
    assert memory.register(BASE, 256) == Code.OK
    with memory.in_use():
        thread = threading.Thread(target=lambda: codes.append(memory.unregister(BASE, timeout_s=60)))
        thread.start()
        while memory.contains(addresses([BASE]), addresses([256])).any():
            assert thread.is_alive()
        assert memory.register(other.ctypes.data, 16) == Code.OK
        assert memory.register(BASE, 8) == Code.OK  # in its place
        assert memory.unregister(BASE + 1) == Code.INVALID_PARAMS
    thread.join(60)
    assert codes == [Code.OK]
    there = memory.contains(addresses([BASE, other.ctypes.data, BASE]), addresses([8, 16, 9]))
    assert there.tolist() == [True, True, False]


def test_what_others_registered_meanwhile_stays_when_an_unregister_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = RegisteredMemory()
    assert memory.register(BASE, 256) == Code.OK

    def waits(ended: Callable[[], bool], timeout_s: float) -> bool:
        """What another thread does while one waits, and the end of its time."""
        assert memory.register(BASE + 128, 8) == Code.OK
        return ended()

    monkeypatch.setattr(memory._ended, "wait_for", waits)
    with memory.in_use():
        assert memory.unregister(BASE, timeout_s=60) == Code.RPC_TIMEOUT
        whole, part = memory.contains(addresses([BASE, BASE + 128]), addresses([256, 8])).tolist()
    assert part and not whole and len(memory._runs.views) == 1
