"""Atomic loads and stores: in the machine code, and between threads."""

import threading

import numba
import numpy as np
import pytest

from kvpool.core.kernels.atomics import fence_acquire, load_acquire, store_release


@numba.njit(nogil=True)
def read_twice(words):
    first = load_acquire(words, 0)
    fence_acquire()
    return first, load_acquire(words, 0)


@numba.njit(nogil=True)
def write(words, value):
    store_release(words, 1, value)


@numba.njit(nogil=True)
def spin(words, spins_max):
    """Raises word 1, then waits until word 0 changes; returns it, also if it did not."""
    before = load_acquire(words, 0)
    store_release(words, 1, before + words.dtype.type(1))
    for _ in range(spins_max):
        now = load_acquire(words, 0)
        if now != before:
            return now
    return before


@numba.njit(nogil=True)
def put_in_order(data, flag, count):
    """For each number: the data, then the flag that says it is there."""
    for number in range(1, count + 1):
        data[0] = number
        data[7] = number
        store_release(flag, 0, np.uint64(number))


@numba.njit(nogil=True)
def read_in_order(data, flag, count, reads_max):
    """How often data was older than a flag that was seen before it, and the last flag seen."""
    older = 0
    seen = np.uint64(0)
    for _ in range(reads_max):
        seen = load_acquire(flag, 0)
        older += data[7] < seen
        older += data[0] < seen
        if seen == np.uint64(count):
            break
    return older, seen


@pytest.mark.parametrize("dtype", [np.uint8, np.uint32, np.uint64])
def test_two_reads_are_two_loads(dtype):
    words = np.array([3, 0], dtype=dtype)
    assert read_twice(words) == (3, 3)
    signature = read_twice.signatures[-1]
    llvm = read_twice.inspect_llvm(signature)
    body = llvm[llvm.index("define") :].split("\n}")[0]
    assert body.count("load atomic") == 2 and body.count("acquire, align") == 2, body
    assert "fence acquire" in body


@pytest.mark.parametrize("dtype", [np.uint8, np.uint32, np.uint64])
def test_a_store_is_a_release(dtype):
    words = np.zeros(2, dtype=dtype)
    write(words, dtype(200))
    assert words.tolist() == [0, 200]
    assert "store atomic" in write.inspect_llvm(write.signatures[-1])


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
def test_a_kernel_sees_what_another_thread_writes(dtype):
    words = np.array([5, 0], dtype=dtype)
    spin(words, 1)  # compiled before the thread starts
    words[:] = (5, 0)
    result = []
    # As good as for ever: this thread may be held up for as long as the host likes. A loop whose load was moved out of
    # it ends at once, or is left behind.
    thread = threading.Thread(target=lambda: result.append(spin(words, 1 << 62)), daemon=True)
    thread.start()
    while words[1] == 0 and thread.is_alive():  # until the kernel has read the old value
        pass
    words[0] = 9
    thread.join(60)
    assert result == [9]


def test_what_is_written_before_a_release_is_seen_after_an_acquire():
    data, flag, count = np.zeros(8, dtype=np.int64), np.zeros(1, dtype=np.uint64), 2_000_000
    put_in_order(data, flag, 0)
    read_in_order(data, flag, 0, 1)
    writer = threading.Thread(target=put_in_order, args=(data, flag, count))
    writer.start()
    older, _ = read_in_order(data, flag, count, 100_000_000)
    writer.join()
    assert older == 0


def test_other_arrays_are_refused():
    with pytest.raises(numba.TypingError):
        read_twice(np.zeros(4, dtype=np.int32))
    with pytest.raises(numba.TypingError):
        read_twice(np.zeros(4, dtype=np.uint64)[::2])
