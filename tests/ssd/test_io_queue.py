"""Writes in queues of the kernel: what they write, what becomes of those that fail, and that none is left in flight."""

import errno
import mmap
import os
import resource
import signal
import threading

import numpy as np
import pytest

from kvpool.core.ssd.format import PAGE_BYTES
from kvpool.tiers.ssd import lanes as lanes_module
from kvpool.tiers.ssd.files import DiskFile
from kvpool.tiers.ssd.group_writing import PORTION_BYTES, WRITE_BYTES, write_group
from kvpool.tiers.ssd.io_queue import IoQueue
from kvpool.tiers.ssd.lanes import BUFFERS_MAX, QUEUES_KEPT_MAX, Lanes, address_of
from kvpool.tiers.ssd.store import SsdStore
from kvpool.tiers.ssd.write_loop import FAILED, IN_FLIGHT, LOST, STATE_WORDS, begin_writes, finish_writes

from .records_made import batch_of, content, keys_of

SIZE = 65_536
COUNT = 200


def has_queues():
    try:
        IoQueue(1).close()
    except OSError:
        return False
    return True


pytestmark = pytest.mark.skipif(not has_queues(), reason="this system has no queues of the kernel")


def refuse_queues(monkeypatch):
    def refused(depth):
        raise OSError(errno.EAGAIN, "no more queues")

    monkeypatch.setattr(lanes_module, "IoQueue", refused)


@pytest.fixture
def lanes():
    lanes = Lanes(4, "test", 1 << 20)
    yield lanes
    lanes.close()


@pytest.fixture
def store(tmp_path):
    store = SsdStore.open(tmp_path, "a", 128 << 20, segment_bytes=32 << 20, io_depth=4)
    if not store.stats().direct:
        store.close()
        pytest.skip("files here do not bypass the system's cache")
    yield store
    store.close()


def pages(count, rng):
    data = np.frombuffer(mmap.mmap(-1, count * PAGE_BYTES), np.uint8)
    data[:] = rng.integers(0, 256, len(data), dtype=np.uint8)
    return data


def empty_file(path):
    """DiskFile past the system's cache where that is possible; the loop needs no more than whole pages for it."""
    flags = os.O_RDWR | os.O_CREAT
    try:
        fd = os.open(path, flags | os.O_DIRECT, 0o600)
    except OSError:
        fd = os.open(path, flags, 0o600)
    return DiskFile(fd)


# ------------------------------------------------------------ writing


@pytest.mark.parametrize("queued", [True, False], ids=["queue", "lanes"])
@pytest.mark.parametrize("seed", range(6))
def test_a_group_is_what_its_buffers_hold(tmp_path, lanes, monkeypatch, seed, queued):
    """Many small buffers, so that a write takes all it can of them; large ones, which are cut."""
    if not queued:
        refuse_queues(monkeypatch)
    rng = np.random.default_rng(seed)
    pages_max = [1, 3, 40, 300, 2000, 5000][seed]
    buffers = []
    left = 2 * PORTION_BYTES // PAGE_BYTES + int(rng.integers(3000))
    while left > 0:
        buffers.append(pages(min(left, int(rng.integers(1, pages_max + 1))), rng))
        left -= len(buffers[-1]) // PAGE_BYTES
    if seed % 2:
        # As payloads in memory of others may be.
        buffers[0].flags.writeable = False
    place, size = PAGE_BYTES * int(rng.integers(4)), sum(map(len, buffers))
    file = empty_file(tmp_path / "file")
    end, writes = write_group(lanes, file, (buffer.data for buffer in buffers), place, direct=True)
    file.close()
    assert end == place + size
    assert writes >= max(-(-size // WRITE_BYTES), len(buffers) // BUFFERS_MAX)
    assert (tmp_path / "file").read_bytes()[place:] == b"".join(buffer.tobytes() for buffer in buffers)


def test_what_was_refused_is_tried_the_plain_way_whose_error_is_told(tmp_path, lanes):
    (tmp_path / "file").write_bytes(bytes(PAGE_BYTES))
    file = DiskFile(os.open(tmp_path / "file", os.O_RDONLY))
    data = pages(8, np.random.default_rng(1))
    with pytest.raises(OSError) as caught:
        write_group(lanes, file, iter([data.data]), 0, direct=True)
    assert caught.value.errno == errno.EBADF
    file.close()
    assert (tmp_path / "file").read_bytes() == bytes(PAGE_BYTES)


def test_a_write_that_is_cut_short_is_told(tmp_path, lanes):
    """The request is begun here, and it is its event that says so."""
    limit = 64 << 20
    file = empty_file(tmp_path / "file")
    data = pages(8, np.random.default_rng(1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError) as caught:
            write_group(lanes, file, iter([data.data]), limit - 4 * PAGE_BYTES, direct=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    file.close()
    assert (tmp_path / "file").stat().st_size == limit


def test_a_failure_while_laying_out_leaves_nothing_in_flight(tmp_path, lanes):
    rng = np.random.default_rng(2)
    first, second = pages(PORTION_BYTES // PAGE_BYTES, rng), pages(4, rng)

    def buffers():
        yield first.data
        raise MemoryError("no room for the next")

    file = empty_file(tmp_path / "file")
    with pytest.raises(MemoryError):
        write_group(lanes, file, buffers(), 0, direct=True)
    # The queue is free again: were anything in flight, its events would be taken for those of what follows.
    assert write_group(lanes, file, iter([second.data]), PORTION_BYTES, direct=True) == (
        PORTION_BYTES + len(second), 1,
    )  # fmt: skip
    file.close()
    assert (tmp_path / "file").read_bytes() == first.tobytes() + second.tobytes()


def test_a_queue_that_can_not_be_asked_is_closed_when_all_has_ended(tmp_path):
    queue = IoQueue(4)
    file = empty_file(tmp_path / "file")
    data = pages(1024, np.random.default_rng(3))
    state = np.zeros(STATE_WORDS, np.int64)
    buffers = np.array([(address_of(data), len(data))], np.uint64)
    begin_writes(np.uint64(queue.context), 4, state, file.descriptor, np.uint64(0), buffers, np.uint64(1 << 20), 16)
    assert (state[IN_FLIGHT], state[FAILED], state[LOST]) == (4, 0, 0)
    finish_writes(np.uint64(12_345), state)
    assert state[LOST] == 1
    queue.close()
    queue.close()
    file.close()
    assert (tmp_path / "file").read_bytes() == data.tobytes()


def test_signals_do_not_end_a_wait(tmp_path, lanes):
    before = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    data = pages(6000, np.random.default_rng(5))
    file = empty_file(tmp_path / "file")
    ends = []

    def write():
        ends.extend(write_group(lanes, file, iter([data.data]), 0, direct=True)[0] for _ in range(6))

    writer = threading.Thread(target=write)
    try:
        writer.start()
        while writer.is_alive():
            signal.pthread_kill(writer.ident, signal.SIGUSR1)
            writer.join(0.001)
    finally:
        writer.join()
        signal.signal(signal.SIGUSR1, before)
    file.close()
    assert ends == [len(data)] * 6
    assert (tmp_path / "file").read_bytes() == data.tobytes()


# ------------------------------------------------------------ queues


def test_queues_are_kept_for_the_next(lanes):
    queues = [lanes.borrow_queue() for _ in range(QUEUES_KEPT_MAX + 2)]
    assert len({queue.context for queue in queues}) == len(queues)
    contexts = [queue.context for queue in queues]
    queues[0].close()
    for queue in queues:
        lanes.return_queue(queue)
    assert [bool(queue.context) for queue in queues] == [False] + [True] * QUEUES_KEPT_MAX + [False]
    assert lanes.borrow_queue().context in contexts[1:-1]


def test_a_system_without_more_queues_says_so():
    with pytest.raises(OSError):
        IoQueue(1 << 30)


# ------------------------------------------------------------ a store with and without them


def fill(store):
    records = [(number, 0, SIZE) for number in range(COUNT)]
    assert store.append(batch_of(records, named=False)).all()


def read_some(store, numbers):
    """Those that are not good are None."""
    targets = [np.zeros(SIZE, np.uint8) for _ in numbers]
    good = store.read(keys_of(numbers), targets).good
    return [target if right else None for target, right in zip(targets, good.tolist(), strict=True)]


def check_contents(numbers, found):
    for number, target in zip(numbers, found, strict=True):
        assert target is not None, number
        assert np.array_equal(target, content(number, 0, SIZE)), number


@pytest.mark.parametrize("queues", [True, False])
def test_with_and_without_queues_a_store_is_the_same(store, tmp_path, monkeypatch, queues):
    if not queues:
        refuse_queues(monkeypatch)
    fill(store)
    numbers = np.random.default_rng(4).permutation(COUNT).tolist()
    check_contents(numbers[:50], read_some(store, numbers[:50]))
    store.close()
    again = SsdStore.open(tmp_path, "a", 128 << 20, io_depth=4)
    check_contents(numbers, read_some(again, numbers))
    assert again.audit() == ()
    again.close()


def test_a_group_that_can_not_be_written_is_not_there(store, tmp_path):
    fill(store)
    (segment,) = store._log.segments.values()
    fd = segment.file.descriptor
    kept, unwritable = os.dup(fd), os.open(tmp_path / "kvpool-a" / "store", os.O_RDONLY)
    os.dup2(unwritable, fd)
    acknowledged = store.append(batch_of([(COUNT + n, 0, SIZE) for n in range(20)], named=False))
    os.dup2(kept, fd)
    os.close(kept)
    os.close(unwritable)
    assert not acknowledged.any()
    assert store.stats().counters.io_errors > 0
    assert not store.contains(keys_of(range(COUNT, COUNT + 20))).any()
    check_contents(list(range(COUNT)), read_some(store, list(range(COUNT))))
