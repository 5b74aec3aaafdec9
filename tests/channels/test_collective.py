"""The collective channel over Gloo, against sources in this process and peers that are stopped and killed."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from kvpool.channels import collective_wire as wire
from kvpool.channels.base import ChannelError
from kvpool.channels.collective import CollectiveChannel, available
from kvpool.channels.collective_server import CollectiveServer
from kvpool.core.arrays import Descriptors
from kvpool.core.errors import BadArgument, Reason, Unsupported
from tests.channels.collective_peer import BLOCK_BYTES, COUNT, LEASE, RESERVATION, SESSION, Source
from tests.pool.node_process import eventually, stand_still

pytestmark = pytest.mark.skipif(not available(), reason="torch is not installed")

DEADLINE_S = 60.0


@pytest.fixture
def source() -> Iterator[Source]:
    with contextlib.closing(Source()) as made:
        yield made


def opened(source: Source) -> contextlib.closing[CollectiveChannel]:
    return contextlib.closing(CollectiveChannel.open(source.offer))


def kernel_counts() -> tuple[int, int]:
    """Threads and open files of this process, as the kernel counts them."""
    return len(list(Path("/proc/self/task").iterdir())), len(list(Path("/proc/self/fd").iterdir()))


class Peer:
    """`collective_peer.py` in a process of its own."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.channels.collective_peer", *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(DEADLINE_S)

    def close(self) -> None:
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


# ------------------------------------------------------------ bytes


@pytest.mark.parametrize("count", [1, 5, COUNT])
def test_reads_what_is_there(source: Source, count: int) -> None:
    order = np.random.default_rng(count).permutation(COUNT)[:count]
    rows = np.random.default_rng(count + 1).permutation(COUNT)[:count]
    out = np.full((COUNT, BLOCK_BYTES + 8), 0xAB, dtype=np.uint8)
    with opened(source) as channel:
        assert channel.read(LEASE, source.blocks.take(order), out, rows, deadline_s=DEADLINE_S).all()
    assert np.array_equal(out[rows, :BLOCK_BYTES], source.data[order])
    assert (out[rows, BLOCK_BYTES:] == 0xAB).all(), "bytes after a block were touched"
    assert (np.delete(out, rows, axis=0) == 0xAB).all(), "other rows were touched"


def test_writes_where_it_may_and_says_what_it_wrote(source: Source) -> None:
    source.segment[:] = 0
    slots = source.blocks.take(np.arange(3, 19))
    with opened(source) as channel:
        digests = channel.write(RESERVATION, slots, source.data, np.arange(3, 19), deadline_s=DEADLINE_S)
    assert np.array_equal(digests, slots.digests)
    stored = source.segment.reshape(COUNT, BLOCK_BYTES)
    assert np.array_equal(stored[3:19], source.data[3:19])
    assert not stored[:3].any() and not stored[19:].any()
    assert source.grants.bytes_written == 16 * BLOCK_BYTES


def test_a_bad_byte_is_seen(source: Source) -> None:
    source.segment[7 * BLOCK_BYTES] ^= 1
    with opened(source) as channel:
        good = channel.read(LEASE, source.blocks, np.zeros_like(source.data), deadline_s=DEADLINE_S)
    assert np.flatnonzero(~good).tolist() == [7]


def test_more_blocks_than_one_request_takes(monkeypatch: pytest.MonkeyPatch, source: Source) -> None:
    monkeypatch.setattr(wire, "BLOCKS_MAX", 5)
    out = np.zeros_like(source.data)
    with opened(source) as channel:
        assert channel.read(LEASE, source.blocks, out, deadline_s=DEADLINE_S).all()
        assert np.array_equal(
            channel.write(RESERVATION, source.blocks, out, deadline_s=DEADLINE_S), source.blocks.digests
        )
    assert np.array_equal(out, source.data)


def test_from_several_threads(source: Source) -> None:
    def read(first: int) -> bool:
        out = np.zeros((4, BLOCK_BYTES), dtype=np.uint8)
        good = channel.read(LEASE, source.blocks.take(np.arange(first, first + 4)), out, deadline_s=DEADLINE_S)
        return bool(good.all()) and np.array_equal(out, source.data[first : first + 4])

    with opened(source) as channel, ThreadPoolExecutor(6) as threads:
        assert all(threads.map(read, [*range(0, COUNT, 4)] * 3))
        assert source.server.pair_count == 1


# ------------------------------------------------------------ rights


def test_what_no_lease_covers_is_refused_and_the_pair_stays(source: Source) -> None:
    out = np.zeros_like(source.data)
    with opened(source) as channel:
        pair = channel._pair
        for hold in (LEASE + 1, RESERVATION):
            with pytest.raises(ChannelError, match="covers"):
                channel.read(hold, source.blocks, out, deadline_s=DEADLINE_S)
        source.grants.revoke_read(SESSION, [LEASE])
        with pytest.raises(ChannelError, match="covers"):
            channel.read(LEASE, source.blocks, out, deadline_s=DEADLINE_S)
        assert not out.any()
        source.grant()
        assert channel.read(LEASE, source.blocks, out, deadline_s=DEADLINE_S).all()
        assert channel._pair is pair


def test_what_no_reservation_covers_is_not_written(source: Source) -> None:
    other = np.zeros_like(source.data)
    with opened(source) as channel:
        with pytest.raises(ChannelError, match="covers"):
            channel.write(LEASE, source.blocks, other, deadline_s=DEADLINE_S)
        source.grants.revoke_write(SESSION, RESERVATION)
        with pytest.raises(ChannelError, match="covers"):
            channel.write(RESERVATION, source.blocks, other, deadline_s=DEADLINE_S)
    assert np.array_equal(source.segment, source.data.reshape(-1))


def test_a_lease_that_ends_under_way_is_an_error(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source asks again after it has sent."""
    readable, answers = source.grants.readable, []

    def ending(*args: object) -> object:
        answers.append(readable(*args))  # type: ignore[arg-type]
        source.grants.revoke_read(SESSION, [LEASE])
        return answers[-1]

    monkeypatch.setattr(source.grants, "readable", ending)
    with opened(source) as channel, pytest.raises(ChannelError, match="ended while"):
        channel.read(LEASE, source.blocks, np.zeros_like(source.data), deadline_s=DEADLINE_S)
    assert len(answers) == 2


def test_a_slot_taken_away_under_way_is_not_written(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever revokes, and waits until no thread is writing, may give the slots to somebody else at once."""
    begin, begun = source.grants.begin_write, 0
    revoked_at = 3
    taken = np.zeros(0, dtype=np.uint8)

    def beginning(*args: object) -> object:
        nonlocal begun, taken
        begun += 1
        if begun == revoked_at:
            source.grants.revoke_write(SESSION, RESERVATION)
            assert source.grants.wait_idle([RESERVATION], DEADLINE_S)
            taken = source.segment.copy()
        return begin(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(source.grants, "begin_write", beginning)
    with opened(source) as channel, pytest.raises(ChannelError, match="ended while"):
        channel.write(RESERVATION, source.blocks, np.zeros_like(source.data), deadline_s=DEADLINE_S)
    assert begun > revoked_at
    assert taken.any() and np.array_equal(source.segment, taken), "a late write touched a slot"


def test_descriptors_outside_the_segment(source: Source) -> None:
    out = np.zeros((1, BLOCK_BYTES), dtype=np.uint8)
    for offset in (COUNT * BLOCK_BYTES - 1, 2**63, 2**64 - 1):
        outside = source.blocks.take(np.arange(1))
        outside.offsets[0] = offset
        with opened(source) as channel, pytest.raises(ChannelError, match="refused"):
            channel.read(LEASE, outside, out, deadline_s=DEADLINE_S)


def test_strangers_are_sent_away(source: Source) -> None:
    with pytest.raises(ChannelError, match="refused"):
        CollectiveChannel.open({**source.offer, "token": "00" * wire.TOKEN_BYTES})
    host, port = source.server.address.rsplit(":", 1)
    for garbage in (b"GET / HTTP/1.1\r\n\r\n" + bytes(60), b"x"):
        # The server may hang up before all is sent.
        with socket.create_connection((host, int(port)), timeout=10) as sock, contextlib.suppress(OSError):
            sock.sendall(garbage)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(4096):
                pass
    with opened(source) as channel:
        assert channel.read(LEASE, source.blocks, np.zeros_like(source.data), deadline_s=DEADLINE_S).all()


@pytest.mark.parametrize("change", [{"address": "x"}, {"token": "zz"}, {"token": "00"}, {"backend": "mpi"}])
def test_bad_offers(change: dict[str, str]) -> None:
    with pytest.raises(BadArgument):
        CollectiveChannel.open({"address": "127.0.0.1:1", "token": "00" * 32, "backend": "gloo", **change})


def test_a_backend_that_torch_does_not_have_is_refused_before_anything_is_sent(source: Source) -> None:
    """The client takes its other channels then, and a node that was told to offer it does not start."""
    torch = pytest.importorskip("torch")
    if torch.distributed.is_nccl_available() and torch.cuda.is_available():
        pytest.skip("this build of torch has NCCL, and a GPU")
    for call in (
        lambda: CollectiveChannel.open({"address": "127.0.0.1:1", "token": "00" * 32, "backend": "nccl"}),
        lambda: CollectiveServer(source.data, source.grants, "127.0.0.1", 0, backend="nccl"),
    ):
        with pytest.raises(Unsupported, match="NCCL") as caught:
            call()
        assert "gloo" in caught.value.hint


def test_settle_waits_for_what_an_earlier_call_sent(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that was given up may still be stored when it fails; `settle` returns only after that."""
    begin, held, go_on = source.grants.begin_write, threading.Event(), threading.Event()

    def beginning(*args: object) -> object:
        if held.is_set():
            return begin(*args)  # type: ignore[arg-type]
        may = begin(*args)  # type: ignore[arg-type]
        held.set()
        assert go_on.wait(100)
        return may

    with opened(source) as channel, ThreadPoolExecutor(1) as threads:
        monkeypatch.setattr(source.grants, "begin_write", beginning)
        with pytest.raises(ChannelError) as caught:
            channel.write(RESERVATION, source.blocks, source.data, deadline_s=1.0)
        assert caught.value.reason is Reason.DEADLINE and held.wait(DEADLINE_S)
        with pytest.raises(ChannelError):
            channel.settle(RESERVATION, source.blocks, deadline_s=0.2)
        channel.settle(RESERVATION + 1, source.blocks, deadline_s=DEADLINE_S)
        settling = threads.submit(channel.settle, RESERVATION, source.blocks, deadline_s=DEADLINE_S)
        assert not settling.done()
        go_on.set()
        settling.result(DEADLINE_S)
        assert not source.grants.busy([RESERVATION])
        assert np.array_equal(
            channel.write(RESERVATION, source.blocks, source.data, deadline_s=DEADLINE_S), source.blocks.digests
        )
        channel.probe(deadline_s=DEADLINE_S)


# ------------------------------------------------------------ bounds and ends


def test_a_client_more_takes_the_place_of_the_idle_one() -> None:
    with contextlib.closing(Source(pairs_max=2)) as source:

        def all_idle() -> bool:
            # A pair is at work until its thread waits for the next request, a moment after the client has its answer.
            return not any(pair.busy for pair in source.server._pairs)

        channels = []
        for _ in range(3):
            assert eventually(all_idle)
            channels.append(CollectiveChannel.open(source.offer))
        assert source.server.pair_count == 2
        for _ in range(2):
            for channel in channels:
                out = np.zeros_like(source.data)
                assert eventually(all_idle)
                assert channel.read(LEASE, source.blocks, out, deadline_s=DEADLINE_S).all()
                assert np.array_equal(out, source.data)
                assert source.server.pair_count == 2
        for channel in channels:
            channel.close()


def test_nothing_is_left(source: Source) -> None:
    def ended() -> bool:
        with source.server._lock:
            return source.server._ended.wait_for(lambda: source.server.pair_count == 0, DEADLINE_S)

    out = np.zeros_like(source.data)
    with opened(source) as channel:
        channel.read(LEASE, source.blocks, out, deadline_s=DEADLINE_S)
    assert ended()
    threads, files = kernel_counts()
    for _ in range(3):
        with opened(source) as channel:
            channel.read(LEASE, source.blocks, out, deadline_s=DEADLINE_S)
        assert ended()
    with pytest.raises(ChannelError, match="closed"):
        channel.read(LEASE, source.blocks, out, deadline_s=DEADLINE_S)

    def no_more() -> bool:
        now = kernel_counts()
        return now[0] <= threads and now[1] <= files

    # A thread of Gloo's ends a moment after its group.
    assert eventually(no_more)


def test_the_end_of_a_session_ends_its_pairs(source: Source) -> None:
    with opened(source) as channel:
        source.grants.close_session(SESSION)
        source.server.close_session(SESSION)
        with pytest.raises(ChannelError):
            channel.read(LEASE, source.blocks, np.zeros_like(source.data), deadline_s=DEADLINE_S)


def test_a_deadline_that_has_passed(source: Source) -> None:
    with opened(source) as channel:
        with pytest.raises(ChannelError, match="deadline"):
            channel.read(LEASE, source.blocks, np.zeros_like(source.data), deadline_s=-1.0)
        with pytest.raises(ChannelError, match="deadline"):
            channel.write(RESERVATION, source.blocks, source.data, deadline_s=0.0)


def test_nobody_listens() -> None:
    with contextlib.closing(Source()) as gone:
        pass
    with pytest.raises(ChannelError, match="nothing answers"):
        CollectiveChannel.open(gone.offer)


# ------------------------------------------------------------ other processes


@pytest.fixture
def serving() -> Iterator[Peer]:
    with contextlib.closing(Peer("serve")) as peer:
        yield peer


def blocks_of_peer() -> tuple[Descriptors, np.ndarray]:
    from tests.channels.collective_peer import made_blocks

    return made_blocks()


def test_killed_source(serving: Peer) -> None:
    """Each read brings right bytes, or an error long before its deadline."""
    blocks, data = blocks_of_peer()
    out = np.zeros_like(data)
    with contextlib.closing(CollectiveChannel.open(json.loads(serving.said))) as channel:
        assert channel.read(LEASE, blocks, out, deadline_s=DEADLINE_S).all()
        assert np.array_equal(out, data)
        killer = threading.Timer(0.05, serving.kill)
        killer.start()
        with pytest.raises(ChannelError):
            while True:
                out[:] = 0
                good = channel.read(LEASE, blocks, out, deadline_s=60.0)
                assert good.all() and np.array_equal(out, data)
        killer.join()
        with pytest.raises(ChannelError, match="nothing answers"):
            channel.read(LEASE, blocks, out, deadline_s=DEADLINE_S)


@pytest.mark.parametrize("operation", ["read", "write"])
def test_stopped_source(serving: Peer, operation: str) -> None:
    """Costs the deadline, and not more; the next call works once the source does."""
    blocks, data = blocks_of_peer()
    out = np.zeros_like(data)
    with contextlib.closing(CollectiveChannel.open(json.loads(serving.said))) as channel:

        def call(deadline_s: float) -> None:
            if operation == "read":
                assert channel.read(LEASE, blocks, out, deadline_s=deadline_s).all()
                assert np.array_equal(out, data)
            else:
                assert np.array_equal(channel.write(RESERVATION, blocks, data, deadline_s=deadline_s), blocks.digests)

        call(DEADLINE_S)
        stand_still(serving.process)
        begun_s = time.monotonic()
        with pytest.raises(ChannelError, match="deadline"):
            call(0.3)
        assert time.monotonic() - begun_s < DEADLINE_S / 2
        serving.process.send_signal(signal.SIGCONT)
        call(DEADLINE_S)


@pytest.mark.parametrize(
    ("operation", "number"), [("read", signal.SIGKILL), ("write", signal.SIGKILL), ("write", signal.SIGSTOP)]
)
def test_lost_client(source: Source, operation: str, number: signal.Signals) -> None:
    """The source soon has nothing left of a client that is gone, and serves others meanwhile."""
    with contextlib.closing(Peer(operation, json.dumps(source.offer))) as client:
        before = source.grants.bytes_read + source.grants.bytes_written
        assert eventually(lambda: source.grants.bytes_read + source.grants.bytes_written > before)
        client.process.send_signal(number)
        with opened(source) as channel:
            out = np.zeros_like(source.data)
            assert channel.read(LEASE, source.blocks, out, deadline_s=DEADLINE_S).all()
            assert np.array_equal(out, source.data)
        source.server.close_session(SESSION)
        with source.server._lock:
            assert source.server._ended.wait_for(lambda: source.server.pair_count == 0, DEADLINE_S)
        assert not source.grants.busy([RESERVATION])


def test_close_ends_a_call_under_way(serving: Peer) -> None:
    blocks, data = blocks_of_peer()
    channel = CollectiveChannel.open(json.loads(serving.said))
    with contextlib.closing(channel), ThreadPoolExecutor(1) as threads:
        stand_still(serving.process)
        call = threads.submit(channel.read, LEASE, blocks, np.zeros_like(data), deadline_s=100.0)
        while not channel._turn.locked():
            assert not call.done()
        channel.close()
        with pytest.raises(ChannelError, match="closed"):
            call.result(DEADLINE_S)


# ------------------------------------------------------------ out of file descriptors


def test_without_file_descriptors_it_rests_and_says_so_once(source: Source, caplog: pytest.LogCaptureFixture) -> None:
    host, _, port = source.server.address.rpartition(":")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as client, caplog.at_level("WARNING", "kvpool.channels.collective_server"):
        client.settimeout(DEADLINE_S)
        lowest = os.open(os.devnull, os.O_RDONLY)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
        try:
            client.connect((host, int(port)))

            def complaints() -> int:
                return sum("no client can be taken" in record.message for record in caplog.records)

            end_s = time.monotonic() + DEADLINE_S
            while not complaints() and time.monotonic() < end_s:
                time.sleep(0.01)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        client.sendall(bytes(wire.GREETING.size))
        assert client.recv(1), "taken as soon as there are descriptors again"
    assert complaints() == 1
