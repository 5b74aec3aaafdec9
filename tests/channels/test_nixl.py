"""The nixl channel, against sources in this process and in others that are stopped and killed."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvpool.channels import nixl_agent
from kvpool.channels.base import Bytes2D, ChannelError
from kvpool.channels.nixl import NixlChannel, NixlOffer, available
from kvpool.channels.nixl_server import NixlServer
from kvpool.core.arrays import Descriptors
from kvpool.core.errors import BadArgument, Unavailable, Unsupported
from kvpool.core.hashing import section_digest
from kvpool.tiers.dram import PAGE_BYTES, Segment
from tests.pool.node_process import eventually, stand_still

DEADLINE_S = 60.0
SEED, COUNT, BLOCK_BYTES, SECTIONS = 11, 24, 192 << 10, 2

Stored = tuple[Descriptors, Bytes2D]

needs_nixl = pytest.mark.skipif(not available(), reason="NIXL is not installed")


@pytest.fixture(scope="module", autouse=True)
def loopback_only() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UCX_NET_DEVICES", "lo")
        yield


def made_blocks(seed: int, count: int, block_bytes: int) -> Stored:
    """Block i lies at i * block_bytes."""
    rng = np.random.default_rng(seed)
    keys = rng.integers(0, 256, (count, 16), dtype=np.uint8)
    data = rng.integers(0, 256, (count, block_bytes), dtype=np.uint8)
    digests = np.zeros((count, SECTIONS), dtype=np.uint64)
    for i in range(count):
        for section, part in enumerate(np.split(data[i], SECTIONS)):
            digests[i, section] = section_digest(np.ascontiguousarray(part), keys[i].tobytes(), section)
    offsets = np.arange(count, dtype=np.uint64) * np.uint64(block_bytes)
    sizes = np.full(count, block_bytes, dtype=np.uint64)
    return Descriptors(keys, offsets, sizes, np.zeros(count, dtype=np.uint32), digests), data


@pytest.fixture
def stored() -> Stored:
    return made_blocks(SEED, COUNT, BLOCK_BYTES)


class SourceProcess:
    """A segment and the process that offers it, with the UCX transports that the test wants."""

    def __init__(self, folder: Path, data: Bytes2D, transports: str = "") -> None:
        self.segment = Segment.create(folder, "nixl", data_bytes=data.size, index_bytes=PAGE_BYTES)
        self.segment.data[: data.size] = data.reshape(-1)
        with pytest.MonkeyPatch.context() as patch:
            if transports:
                patch.setenv("UCX_TLS", transports)
            self.server = NixlServer(self.segment.path, self.segment.uuid)
        offer = self.server.offer(1, b"")
        assert offer is not None
        self.offer = offer

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self.server._process is not None
        return self.server._process

    def kill(self) -> None:
        process = self.process
        process.kill()
        process.wait(DEADLINE_S)

    def close(self) -> None:
        if self.server._process is not None:
            self.server._process.send_signal(signal.SIGCONT)
        assert self.server.close(DEADLINE_S)
        self.segment.close()


def made_source(folder: Path, transports: str = "") -> contextlib.closing[SourceProcess]:
    return contextlib.closing(SourceProcess(folder, made_blocks(SEED, COUNT, BLOCK_BYTES)[1], transports))


@pytest.fixture
def source(tmp_path: Path) -> Iterator[SourceProcess]:
    """Reads go through shared memory, or straight from one process to the other."""
    with made_source(tmp_path) as made:
        yield made


@pytest.fixture(scope="module")
def shared_source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SourceProcess]:
    """The same, for tests that leave it as it is."""
    with made_source(tmp_path_factory.mktemp("shared")) as made:
        yield made


@pytest.fixture
def tcp_source(tmp_path: Path) -> Iterator[SourceProcess]:
    with made_source(tmp_path, "tcp") as made:
        yield made


@pytest.fixture(params=["", "tcp"], ids=["shared memory", "tcp"])
def either_source(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SourceProcess]:
    with made_source(tmp_path, request.param) as made:
        yield made


def opened(source: SourceProcess, **options: Any) -> contextlib.closing[NixlChannel]:
    return contextlib.closing(NixlChannel(NixlOffer.parse(source.offer), **options))


# ------------------------------------------------------------ without NIXL


def test_without_nixl_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl_agent, "_PACKAGES", ("kvpool_has_no_such_package",))
    monkeypatch.setattr(nixl_agent, "_api", None)
    assert not nixl_agent.available()
    for start in (lambda: NixlServer(Path("/"), bytes(16)), nixl_agent.load, lambda: NixlChannel.open({})):
        with pytest.raises(Unsupported) as caught:
            start()
        assert "kvpool[nixl]" in caught.value.hint


@pytest.mark.parametrize(
    "change", [{"agent": "%"}, {"base": "x"}, {"base": "0"}, {"bytes": "-1"}, {"mark": ""}, {"mark": "zz"}]
)
def test_bad_offers(change: dict[str, str]) -> None:
    good = {"agent": "AAAA", "base": "4096", "bytes": "10", "mark": "00", "mark_base": "8192"}
    assert NixlOffer.parse(good).data_bytes == 10
    with pytest.raises(BadArgument):
        NixlOffer.parse({**good, **change})
    for name in good:
        with pytest.raises(BadArgument):
            NixlOffer.parse({k: v for k, v in good.items() if k != name})


# ------------------------------------------------------------ one process


@needs_nixl
@pytest.mark.parametrize("chunk_bytes", [10_000, 192 << 10, 1 << 20])
def test_any_chunk_size_brings_the_same_bytes(shared_source: SourceProcess, stored: Stored, chunk_bytes: int) -> None:
    blocks, data = stored
    order = np.random.default_rng(3).permutation(COUNT)[:10]
    out = np.full((COUNT, BLOCK_BYTES + 8), 0xAB, dtype=np.uint8)
    rows = np.random.default_rng(4).permutation(COUNT)[:10]
    with opened(shared_source, chunk_bytes=chunk_bytes) as channel:
        assert channel.read(1, blocks.take(order), out, rows, deadline_s=DEADLINE_S).all()
    assert np.array_equal(out[rows, :BLOCK_BYTES], data[order])
    assert (out[rows, BLOCK_BYTES:] == 0xAB).all(), "bytes after a block were touched"
    assert (np.delete(out, rows, axis=0) == 0xAB).all(), "other rows were touched"


@needs_nixl
def test_separate_arrays_as_rows(shared_source: SourceProcess, stored: Stored) -> None:
    blocks, data = stored
    out = [np.zeros(BLOCK_BYTES + i, dtype=np.uint8) for i in range(COUNT)]
    with opened(shared_source) as channel:
        assert channel.read(1, blocks, out, deadline_s=DEADLINE_S).all()
    assert all(np.array_equal(row[:BLOCK_BYTES], want) for row, want in zip(out, data, strict=True))


@needs_nixl
@pytest.mark.parametrize("chunk_bytes", [64 << 10, 1 << 20])
def test_a_bad_byte_is_seen_even_where_nobody_asks(
    shared_source: SourceProcess, stored: Stored, chunk_bytes: int
) -> None:
    blocks, data = stored
    place = 6 * BLOCK_BYTES - 1
    shared_source.segment.data[place] ^= 1
    try:
        with opened(shared_source, chunk_bytes=chunk_bytes) as channel:
            good = channel.read(1, blocks, np.zeros_like(data), deadline_s=DEADLINE_S, verify=False)
    finally:
        shared_source.segment.data[place] ^= 1
    assert np.flatnonzero(~good).tolist() == [5]


@needs_nixl
def test_it_only_reads(shared_source: SourceProcess, stored: Stored) -> None:
    blocks, data = stored
    assert shared_source.offer["writable"] == "0"
    with opened(shared_source) as channel, pytest.raises(ChannelError) as caught:
        channel.write(1, blocks, np.zeros_like(data), deadline_s=DEADLINE_S)
    assert caught.value.hint
    assert np.array_equal(shared_source.segment.data[: data.size], data.reshape(-1))


@needs_nixl
def test_descriptors_outside_the_segment(shared_source: SourceProcess, stored: Stored) -> None:
    blocks, data = stored
    for offset in (COUNT * BLOCK_BYTES - 1, 2**63, 2**64 - 1):
        outside = blocks.take(np.arange(1))
        outside.offsets[0] = offset
        with opened(shared_source) as channel, pytest.raises(ChannelError):
            channel.read(1, outside, np.zeros_like(data), deadline_s=DEADLINE_S)


@needs_nixl
def test_another_process_in_the_sources_place_is_recognised(shared_source: SourceProcess) -> None:
    with pytest.raises(ChannelError, match="another process"):
        NixlChannel.open({**shared_source.offer, "mark": "00" * 32})


@needs_nixl
def test_probe(source: SourceProcess) -> None:
    with opened(source) as channel:
        channel.probe(deadline_s=DEADLINE_S)
        channel.probe(deadline_s=DEADLINE_S)
        source.kill()
        with pytest.raises(ChannelError):
            channel.probe(deadline_s=2.0)


@needs_nixl
def test_metadata_that_is_none(shared_source: SourceProcess) -> None:
    with pytest.raises(ChannelError):
        NixlChannel.open({**shared_source.offer, "agent": base64.b64encode(b"nonsense" * 9).decode()})


@needs_nixl
def test_a_closed_channel_leaves_nothing(shared_source: SourceProcess, stored: Stored) -> None:
    blocks, data = stored
    threads = threading.active_count()
    with opened(shared_source) as channel:
        assert channel.read(1, blocks, np.zeros_like(data), deadline_s=DEADLINE_S).all()
        assert channel._link is not None
        reader = channel._link._process
    assert reader.returncode is not None, "its process lives on"
    assert eventually(lambda: threading.active_count() <= threads)
    with pytest.raises(ChannelError):
        channel.read(1, blocks, np.zeros_like(data), deadline_s=DEADLINE_S)
    channel.close()


@needs_nixl
def test_from_several_threads(shared_source: SourceProcess, stored: Stored) -> None:
    blocks, data = stored

    def read(first: int) -> bool:
        out = np.zeros((4, BLOCK_BYTES), dtype=np.uint8)
        good = channel.read(1, blocks.take(np.arange(first, first + 4)), out, deadline_s=DEADLINE_S)
        return bool(good.all()) and np.array_equal(out, data[first : first + 4])

    with opened(shared_source) as channel, ThreadPoolExecutor(6) as threads:
        assert all(threads.map(read, [*range(0, COUNT, 4)] * 4))


# ------------------------------------------------------------ other processes


@needs_nixl
def test_reads_from_another_process(either_source: SourceProcess, stored: Stored) -> None:
    blocks, data = stored
    out = np.zeros_like(data)
    with contextlib.closing(NixlChannel.open(either_source.offer)) as channel:
        assert channel.read(1, blocks, out, deadline_s=DEADLINE_S).all()
    assert np.array_equal(out, data)


@needs_nixl
def test_a_killed_source_is_an_error(either_source: SourceProcess, stored: Stored) -> None:
    blocks, data = stored
    with contextlib.closing(NixlChannel.open(either_source.offer)) as channel:
        either_source.kill()
        for _ in range(2):
            with pytest.raises(ChannelError):
                channel.read(1, blocks, np.zeros_like(data), deadline_s=2.0)
    with pytest.raises(ChannelError):
        NixlChannel.open(either_source.offer)


@needs_nixl
def test_killed_under_way(tcp_source: SourceProcess, stored: Stored) -> None:
    """At seeded moments; each read brings right bytes or an error."""
    blocks, data = stored
    out = np.zeros_like(data)
    with contextlib.closing(NixlChannel.open(tcp_source.offer)) as channel:
        killer = threading.Timer(0.05, tcp_source.kill)
        killer.start()
        with pytest.raises(ChannelError):
            while True:
                out[:] = 0
                good = channel.read(1, blocks, out, deadline_s=10.0)
                assert np.array_equal(out[good], data[good])
        killer.join()


@needs_nixl
def test_a_stopped_source_costs_the_deadline_and_late_bytes_reach_nobody(
    tcp_source: SourceProcess, stored: Stored
) -> None:
    """What a given-up read brings, once the source goes on, must not fall into memory that is in use again."""
    blocks, data = stored
    out = np.zeros_like(data)
    with contextlib.closing(NixlChannel.open(tcp_source.offer)) as channel:
        assert channel._link is not None
        reader = channel._link._process
        stand_still(tcp_source.process)
        begun_s = time.monotonic()
        with pytest.raises(ChannelError, match="deadline"):
            channel.read(1, blocks, out, deadline_s=0.3)
        assert time.monotonic() - begun_s < DEADLINE_S / 2
        assert reader.returncode is not None, "the broken link lives on"
        assert not out.any()
        process = tcp_source.process
        process.send_signal(signal.SIGCONT)
        # UCX may end the process that finds its client gone; then there is another one to read from.
        other, good = np.zeros_like(data), np.zeros(COUNT, dtype=np.bool_)
        server = tcp_source.server
        while not good.all():
            with server._changed:
                assert server._changed.wait_for(lambda: server._process is not None, DEADLINE_S)
            offer = server.offer(1, b"")
            with contextlib.suppress(ChannelError), contextlib.closing(NixlChannel.open(offer or {})) as again:
                good = again.read(1, blocks, other, deadline_s=DEADLINE_S)
        assert np.array_equal(other, data)
        assert not out.any(), "late bytes"


@needs_nixl
def test_close_ends_a_call_under_way(tcp_source: SourceProcess, stored: Stored) -> None:
    blocks, data = stored
    with contextlib.closing(NixlChannel.open(tcp_source.offer)) as channel, ThreadPoolExecutor(1) as threads:
        stand_still(tcp_source.process)
        call = threads.submit(channel.read, 1, blocks, np.zeros_like(data), deadline_s=100.0)
        while not channel._turn.locked():
            assert not call.done()
        channel.close()
        with pytest.raises(ChannelError, match="closed"):
            call.result(DEADLINE_S)


@needs_nixl
def test_a_killed_reader_is_an_error_and_then_another_one(shared_source: SourceProcess, stored: Stored) -> None:
    blocks, data = stored
    out = np.zeros_like(data)
    with opened(shared_source) as channel:
        assert channel.read(1, blocks, out, deadline_s=DEADLINE_S).all()
        assert channel._link is not None
        channel._link._process.kill()
        channel._link._process.wait(DEADLINE_S)
        with pytest.raises(ChannelError):
            channel.read(1, blocks, out, deadline_s=DEADLINE_S)
        out[:] = 0
        assert channel.read(1, blocks, out, deadline_s=DEADLINE_S).all()
    assert np.array_equal(out, data)


@needs_nixl
def test_its_process_ends_with_a_client_that_is_killed(shared_source: SourceProcess) -> None:
    program = """if True:
        import json, sys
        from kvpool.channels.nixl import NixlChannel
        channel = NixlChannel.open(json.loads(sys.argv[1]))
        print(channel._link._process.pid, flush=True)
        sys.stdin.read()
    """
    command = [sys.executable, "-c", program, json.dumps(shared_source.offer)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        reader = os.pidfd_open(int(client.stdout.readline()))
        client.kill()
    poller = select.poll()
    poller.register(reader, select.POLLIN)
    try:
        assert poller.poll(DEADLINE_S * 1000), "an orphan"
    finally:
        os.close(reader)


# ------------------------------------------------------------ the server


@needs_nixl
def test_another_process_takes_the_place_of_one_that_ended(
    source: SourceProcess, stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks, data = stored
    server, out = source.server, np.zeros_like(data)
    before = source.process.pid
    with server._changed:
        source.kill()
        assert server._changed.wait_for(lambda: server._process is None, DEADLINE_S)
        assert server.offer(2, b"") is None
        assert server._changed.wait_for(lambda: server._process is not None, DEADLINE_S)
    offer = server.offer(2, b"")
    assert source.process.pid != before and offer is not None and offer != source.offer
    with contextlib.closing(NixlChannel.open(offer)) as channel:
        assert channel.read(1, blocks, out, deadline_s=DEADLINE_S).all()
    assert np.array_equal(out, data)


@needs_nixl
def test_sessions_wake_its_process(source: SourceProcess) -> None:
    """Without sessions it sleeps, and nothing connects; with one it does."""
    source.server.close_session(1)
    source.server.close_session(1)
    assert source.server.session_count == 0
    channel = NixlChannel(NixlOffer.parse(source.offer))
    with contextlib.closing(channel):
        blocks, data = made_blocks(SEED, 1, BLOCK_BYTES)
        with pytest.raises(ChannelError, match="deadline"):
            channel.read(1, blocks, np.zeros_like(data), deadline_s=0.3)
        source.server.offer(5, b"")
        source.server.offer(6, b"")
        assert channel.read(1, blocks, np.zeros_like(data), deadline_s=DEADLINE_S).shape == (1,)
        assert source.server.session_count == 2


@needs_nixl
def test_a_segment_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="segment"):
        NixlServer(tmp_path / "none", bytes(16))


@needs_nixl
def test_its_process_ends_with_the_node(source: SourceProcess) -> None:
    process = source.process
    assert source.server.close(DEADLINE_S)
    assert process.returncode == 0
