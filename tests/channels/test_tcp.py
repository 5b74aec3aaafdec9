"""What only a network does: peers that are slow, gone or garbled, and rights that end in the middle."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from kvpool.channels import tcp_wire as wire
from kvpool.channels.base import ChannelError
from kvpool.channels.tcp import TcpChannel
from kvpool.core.arrays import Descriptors
from tests.channels.source_made import HarmfulProxy, MadeSource

DEADLINE_S = 20.0


def test_a_byte_garbled_on_the_wire_is_seen(source: MadeSource, proxy: HarmfulProxy) -> None:
    keys, data = source.store(4)
    lease, blocks = source.lease(keys)
    with contextlib.closing(source.open("tcp", proxy.address)) as channel:
        # Greeting 1, header, 4 states, then the blocks: the middle of the third.
        proxy.flip_at = 1 + wire.REPLY.size + 4 + 2 * data.shape[1] + 1000
        good = channel.read(lease, blocks, np.zeros_like(data), deadline_s=DEADLINE_S)
        assert good.tolist() == [True, True, False, True]
        assert channel.read(lease, blocks, np.zeros_like(data), deadline_s=DEADLINE_S).all()


def test_peer_dies_in_the_middle(source: MadeSource, proxy: HarmfulProxy) -> None:
    keys, data = source.store(8)
    lease, blocks = source.lease(keys)
    with contextlib.closing(source.open("tcp", proxy.address)) as channel:
        proxy.cut_at = data.nbytes // 2
        with pytest.raises(ChannelError):
            channel.read(lease, blocks, np.zeros_like(data), deadline_s=DEADLINE_S)
        proxy.cut_at = None
        out = np.zeros_like(data)
        assert channel.read(lease, blocks, out, deadline_s=DEADLINE_S).all(), "the channel did not recover"
        assert np.array_equal(out, data)


def test_slow_peer_meets_the_deadline(source: MadeSource, proxy: HarmfulProxy) -> None:
    keys, data = source.store(8)
    lease, blocks = source.lease(keys)
    with contextlib.closing(source.open("tcp", proxy.address)) as channel:
        proxy.stall_at = data.nbytes // 2
        with pytest.raises(ChannelError):
            channel.read(lease, blocks, np.zeros_like(data), deadline_s=0.3)
        assert proxy.stalled.is_set()


def test_server_restart_is_survived(source: MadeSource) -> None:
    """A kept connection that ended meanwhile is replaced without the caller noticing."""
    keys, data = source.store(2)
    lease, blocks = source.lease(keys)
    with contextlib.closing(source.open("tcp")) as channel:
        source.server.close_session(source.session)
        assert channel.read(lease, blocks, np.zeros_like(data), deadline_s=DEADLINE_S).all()


def test_released_lease_reads_nothing(source: MadeSource) -> None:
    keys, data = source.store(3)
    lease, blocks = source.lease(keys)
    source.grants.revoke_read(source.session, [lease])
    with contextlib.closing(source.open("tcp")) as channel, pytest.raises(ChannelError, match="lease"):
        channel.read(lease, blocks, np.zeros_like(data), deadline_s=DEADLINE_S, verify=False)


def test_expired_lease_reads_nothing(source: MadeSource) -> None:
    keys, data = source.store(3)
    lease, blocks = source.lease(keys, ttl_us=1)
    with contextlib.closing(source.open("tcp")) as channel, pytest.raises(ChannelError, match="lease"):
        channel.read(lease, blocks, np.zeros_like(data), deadline_s=DEADLINE_S, verify=False)


def test_lease_ends_while_it_is_read(source: MadeSource, proxy: HarmfulProxy) -> None:
    """The source says after the bytes whether the right was still there: unverified bytes do not count then."""
    keys, data = source.store(400)
    lease, blocks = source.lease(keys)
    out = np.zeros_like(data)
    channel = TcpChannel(*_host_port(proxy.address), source.token, streams=1)
    with contextlib.closing(channel), ThreadPoolExecutor(1) as thread:
        proxy.stall_at = data.nbytes // 8
        reading = thread.submit(channel.read, lease, blocks, out, deadline_s=DEADLINE_S, verify=False)
        assert proxy.stalled.wait(DEADLINE_S)
        # More is still to come than the sockets between hold, so the source has not looked again yet.
        source.grants.revoke_read(source.session, [lease])
        proxy.resume.set()
        with pytest.raises(ChannelError, match="while"):
            reading.result(DEADLINE_S)


@pytest.mark.parametrize("what", ["generation", "offset", "size", "lease", "session"])
def test_only_exactly_what_is_leased(source: MadeSource, what: str) -> None:
    keys, data = source.store(2)
    lease, blocks = source.lease(keys)
    offsets, sizes, generations = blocks.offsets.copy(), blocks.sizes.copy(), blocks.generations.copy()
    if what == "generation":
        generations[0] += 2
    elif what == "offset":
        offsets[0] += 64
    elif what == "size":
        sizes[0] -= 2
    elif what == "lease":
        lease += 1000
    token = source.grants.open_session(999) if what == "session" else source.token
    with contextlib.closing(TcpChannel(*_host_port(source.server.address), token)) as channel:
        altered = Descriptors(blocks.keys, offsets, sizes, generations, blocks.digests)
        refused = 2 if what in ("lease", "session") else 1
        with pytest.raises(ChannelError, match=f"not cover {refused} of 2"):
            channel.read(lease, altered, np.zeros_like(data), deadline_s=DEADLINE_S, verify=False)


def test_writes_only_into_a_live_reservation(source: MadeSource) -> None:
    keys, data = source.store(2)
    lease, blocks = source.lease(keys)
    before = source.segment.data.copy()
    reservation, slots = source.reserve(source.random_blocks(2)[0], ttl_us=1)
    with contextlib.closing(source.open("tcp")) as channel:
        for number, target in [(lease, blocks), (0, blocks), (reservation, slots), (reservation, blocks)]:
            with pytest.raises(ChannelError):
                channel.write(number, target, data[::-1].copy(), deadline_s=DEADLINE_S)
    assert np.array_equal(source.segment.data, before)


def test_committed_blocks_are_not_written_again(source: MadeSource) -> None:
    keys, data = source.random_blocks(2)
    reservation, slots = source.reserve(keys)
    with contextlib.closing(source.open("tcp")) as channel:
        first = slots.take(np.array([0]))
        digests = channel.write(reservation, slots, data, deadline_s=DEADLINE_S)
        source.core.commit(
            source.session, reservation, np.array([0, 0], np.uint32), np.array([0, 1], np.uint32), digests[0], 0
        )
        source.grants.committed(reservation, [0, 0], [0, 1])
        with pytest.raises(ChannelError):
            channel.write(reservation, first, data[1:], deadline_s=DEADLINE_S)
        channel.write(reservation, slots.take(np.array([1])), data[1:], deadline_s=DEADLINE_S)
    at = int(slots.offsets[0])
    assert np.array_equal(source.segment.data[at : at + data.shape[1]], data[0])


def test_revoking_interrupts_a_write_under_way(source: MadeSource) -> None:
    """After `wait_idle` nobody writes into the slots any more, whatever the peer still sends."""
    keys, data = source.random_blocks(4)
    reservation, slots = source.reserve(keys)
    with _connection(source) as sock:
        deadline = wire.Deadline(DEADLINE_S)
        head = wire.REQUEST.pack(wire.Operation.WRITE, 4, reservation, data.nbytes)
        packed = wire.pack_descriptors(slots.offsets, slots.sizes, slots.generations)
        wire.send_all(sock, [head, *packed, memoryview(data[0])], deadline)
        while not source.grants.busy([reservation]):
            os.sched_yield()
        assert not source.grants.wait_idle([reservation], 0.05), "a write is under way"
        source.grants.revoke_write(source.session, reservation)
        assert source.grants.wait_idle([reservation], DEADLINE_S)
        at, size = int(slots.offsets[1]), data.shape[1]
        before = source.segment.data[at : at + size].copy()
        with contextlib.suppress(ChannelError):
            wire.send_all(sock, [memoryview(data[1])], deadline)
        assert np.array_equal(source.segment.data[at : at + size], before)


@pytest.mark.parametrize(
    "raw",
    [
        wire.REQUEST.pack(9, 1, 1, 0) + bytes(wire.DESCRIPTOR_BYTES),  # unknown operation
        wire.REQUEST.pack(1, 0, 1, 0),  # no blocks
        wire.REQUEST.pack(1, wire.BLOCKS_MAX + 1, 1, 0),
        wire.REQUEST.pack(1, 1, 1, wire.REQUEST_BYTES_MAX + 1),
        wire.REQUEST.pack(1, 1, 1, 7) + bytes(wire.DESCRIPTOR_BYTES),  # total does not fit
        wire.REQUEST.pack(1, 1, 1, 0) + b"\xff" * 8 + bytes(8),  # outside the segment
    ],
)
def test_garbage_is_refused(source: MadeSource, raw: bytes) -> None:
    with _connection(source) as sock:
        deadline = wire.Deadline(DEADLINE_S)
        wire.send_all(sock, [raw], deadline)
        status, size = wire.REPLY.unpack(wire.receive_bytes(sock, wire.REPLY.size, deadline))
        assert status == wire.Status.BAD_REQUEST
        assert wire.receive_bytes(sock, size, deadline)
        with pytest.raises(ChannelError):
            wire.receive_bytes(sock, 1, deadline)


def test_unknown_token_is_refused(source: MadeSource) -> None:
    with pytest.raises(ChannelError):
        TcpChannel.open({"address": source.server.address, "token": "00" * wire.TOKEN_BYTES})
    with socket.create_connection(_host_port(source.server.address)) as sock:
        wire.prepare(sock)
        sock.sendall(b"GET / HTTP/1.1\r\nHost: nonsense\r\n\r\n" + bytes(64))
        assert wire.receive_bytes(sock, 1, wire.Deadline(DEADLINE_S)) == bytes([wire.Status.REFUSED])


def test_connections_end_with_their_session(source: MadeSource) -> None:
    with contextlib.closing(source.open("tcp")) as channel:
        keys, data = source.store(1)
        lease, blocks = source.lease(keys)
        source.grants.close_session(source.session)
        source.server.close_session(source.session)
        with pytest.raises(ChannelError):
            channel.read(lease, blocks, np.zeros_like(data), deadline_s=DEADLINE_S)


@contextlib.contextmanager
def _connection(source: MadeSource) -> Iterator[socket.socket]:
    with socket.create_connection(_host_port(source.server.address)) as sock:
        wire.prepare(sock)
        wire.send_all(sock, [wire.GREETING.pack(wire.MAGIC, source.token)], wire.Deadline(DEADLINE_S))
        assert wire.receive_bytes(sock, 1, wire.Deadline(DEADLINE_S)) == bytes([wire.Status.OK])
        yield sock


def _host_port(address: str) -> tuple[str, int]:
    host, port = address.rsplit(":", 1)
    return host, int(port)
