"""What only a network does: peers that are slow, gone or garbled, and rights that end in the middle."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvpool.channels import tcp
from kvpool.channels import tcp_wire as wire
from kvpool.channels.base import ChannelError
from kvpool.channels.tcp import TcpChannel
from kvpool.channels.tcp_server import TcpDataServer
from kvpool.core.arrays import Descriptors
from kvpool.core.errors import Reason
from tests.channels.source_made import HarmfulProxy, MadeSource

DEADLINE_S = 60.0


def _one_block(offset: int, size: int) -> Descriptors:
    return Descriptors(
        np.zeros((1, 16), np.uint8), np.array([offset], np.uint64), np.array([size], np.uint64),
        np.array([1], np.uint32), np.zeros((1, 1), np.uint64),
    )  # fmt: skip


def test_a_byte_garbled_on_the_wire_is_seen(source: MadeSource, proxy: HarmfulProxy) -> None:
    keys, data = source.store(4)
    lease, blocks = source.lease(keys)
    with contextlib.closing(source.open("tcp", proxy.address)) as channel:
        # Welcome, header, then the blocks: the middle of the third.
        proxy.flip_at = wire.WELCOME.size + wire.REPLY.size + 2 * data.shape[1] + 1000
        good = channel.read(lease, blocks, np.zeros_like(data), deadline_s=DEADLINE_S)
        assert good.tolist() == [True, True, False, True]
        assert channel.read(lease, blocks, np.zeros_like(data), deadline_s=DEADLINE_S).all()


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
    with _connection(source) as (sock, _):
        deadline = wire.Deadline(DEADLINE_S)
        head = wire.REQUEST.pack(wire.Operation.WRITE, 4, reservation, 0, data.nbytes)
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


def _described(operation: int, blocks: Descriptors, skip: int, total: int, hold: int = 1) -> bytes:
    head = wire.REQUEST.pack(operation, len(blocks), hold, skip, total)
    return head + b"".join(wire.pack_descriptors(blocks.offsets, blocks.sizes, blocks.generations))


@pytest.mark.parametrize(
    "raw",
    [
        wire.REQUEST.pack(9, 1, 1, 0, 1) + bytes(wire.DESCRIPTOR_BYTES),  # unknown operation
        wire.REQUEST.pack(9, 0, 1, 0, 0),
        wire.REQUEST.pack(1, 0, 1, 0, 0),  # no blocks
        wire.REQUEST.pack(3, 0, 0, 0, 7),  # a ping about something
        wire.REQUEST.pack(1, wire.BLOCKS_MAX + 1, 1, 0, 0),
        wire.REQUEST.pack(1, 1, 1, 0, 0) + bytes(wire.DESCRIPTOR_BYTES),  # a block without bytes
        _described(1, _one_block(0, 100), 0, 0),
        _described(1, _one_block(0, 100), 0, 101),  # total does not fit
        _described(1, _one_block(0, 100), 90, 11),
        _described(1, _one_block(0, 100), (1 << 64) - 10, 20),  # wraps around
        _described(1, _one_block((1 << 64) - 50, 100), 0, 100),  # outside the segment
        _described(1, _one_block(0, 1 << 40), 0, 1 << 20),
        _described(1, _one_block(32 << 20, 1), 0, 1),
    ],
)
def test_garbage_is_refused(source: MadeSource, raw: bytes) -> None:
    with _connection(source) as (sock, _):
        deadline = wire.Deadline(DEADLINE_S)
        wire.send_all(sock, [raw], deadline)
        status, size = wire.REPLY.unpack(wire.receive_bytes(sock, wire.REPLY.size, deadline))
        assert status == wire.Status.BAD_REQUEST
        assert wire.receive_bytes(sock, size, deadline)
        with pytest.raises(ChannelError):
            wire.receive_bytes(sock, 1, deadline)


@settings(
    max_examples=60, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(data=st.data())
def test_any_request_is_answered_or_ended(source: MadeSource, data: st.DataObject) -> None:
    """Whatever the numbers in a request: no byte of the segment changes, and the server goes on serving."""
    before = source.segment.data[: 1 << 20].copy()
    number = st.one_of(st.integers(0, 3), st.integers(0, (1 << 64) - 1), st.sampled_from([100, 1 << 20, 32 << 20]))
    raw = wire.REQUEST.pack(data.draw(st.integers(0, 5)), data.draw(st.integers(0, 3)), *(data.draw(number),) * 3)
    raw += b"".join(data.draw(number).to_bytes(8, "little") for _ in range(data.draw(st.integers(0, 8))))
    with _connection(source) as (sock, _), contextlib.suppress(ChannelError):
        deadline = wire.Deadline(DEADLINE_S)
        wire.send_all(sock, [raw], deadline)
        sock.shutdown(socket.SHUT_WR)
        while True:
            wire.receive_bytes(sock, 1, deadline)
    assert np.array_equal(source.segment.data[: 1 << 20], before)
    with contextlib.closing(source.open("tcp")) as channel:
        assert isinstance(channel, TcpChannel)
        channel.probe(deadline_s=DEADLINE_S)


def test_unknown_token_is_refused(source: MadeSource) -> None:
    with pytest.raises(ChannelError) as caught:
        TcpChannel.open({"address": source.server.address, "token": "00" * wire.TOKEN_BYTES})
    assert caught.value.reason is Reason.UNKNOWN_SESSION
    with socket.create_connection(_host_port(source.server.address)) as sock:
        wire.prepare(sock)
        sock.sendall(b"GET / HTTP/1.1\r\nHost: nonsense\r\n\r\n" + bytes(64))
        welcome = wire.receive_bytes(sock, wire.WELCOME.size, wire.Deadline(DEADLINE_S))
        assert wire.WELCOME.unpack(welcome) == (wire.Status.REFUSED, 0)


def test_too_many_connections_are_turned_away(source: MadeSource) -> None:
    servers = [
        TcpDataServer(source.segment.data, source.grants, "127.0.0.1", 0, connections_max=2),
        TcpDataServer(source.segment.data, source.grants, "127.0.0.1", 0, session_connections_max=2),
    ]
    for server in servers:
        with contextlib.ExitStack() as stack:
            stack.callback(server.close)
            opened = [stack.enter_context(_connection(source, server.address)) for _ in range(2)]
            with pytest.raises(ChannelError) as caught:
                TcpChannel.open({"address": server.address, "token": source.token.hex()})
            assert caught.value.reason is Reason.OVERLOADED and caught.value.hint
            # Others are not concerned by the bound of one session; the places of ended connections are free again.
            opened[0][0].close()
            while server.connection_count > 1:
                os.sched_yield()
            TcpChannel.open({"address": server.address, "token": source.token.hex()}).close()


def test_settling_ends_a_write_that_hangs(source: MadeSource) -> None:
    """What a broken connection still carries can't arrive after `settle`, not even what the source has not read yet."""
    keys, data = source.random_blocks(4)
    reservation, slots = source.reserve(keys)
    at, size = int(slots.offsets[1]), data.shape[1]
    request = _described(wire.Operation.WRITE, slots, 0, data.nbytes, reservation)
    with _connection(source) as (sock, number), _connection(source) as (other, other_number):
        deadline = wire.Deadline(DEADLINE_S)
        wire.send_all(sock, [request, memoryview(data[0])], deadline)
        while not source.grants.busy([reservation]):
            os.sched_yield()
        for settled in (number, number, 10**6):  # again, and one that never was: nothing is left to be ended
            wire.send_all(other, [wire.REQUEST.pack(wire.Operation.SETTLE, 0, settled, 0, 0)], deadline)
            status, _ = wire.REPLY.unpack(wire.receive_bytes(other, wire.REPLY.size, deadline))
            assert status == wire.Status.OK
        assert not source.grants.busy([reservation])
        before = source.segment.data[at : at + size].copy()
        with contextlib.suppress(ChannelError):
            wire.send_all(sock, [memoryview(data[1])], deadline)
        assert np.array_equal(source.segment.data[at : at + size], before)
        assert number != other_number


def test_sessions_settle_their_own_connections_only(source: MadeSource) -> None:
    with _connection(source) as (sock, number), contextlib.ExitStack() as stack:
        token = source.grants.open_session(999)
        other, _ = stack.enter_context(_connection(source, token=token))
        deadline = wire.Deadline(DEADLINE_S)
        wire.send_all(other, [wire.REQUEST.pack(wire.Operation.SETTLE, 0, number, 0, 0)], deadline)
        wire.receive_bytes(other, wire.REPLY.size, deadline)
        wire.send_all(sock, [wire.REQUEST.pack(wire.Operation.PING, 0, 0, 0, 0)], deadline)
        assert wire.REPLY.unpack(wire.receive_bytes(sock, wire.REPLY.size, deadline)) == (wire.Status.OK, 0)


def test_a_failed_write_is_settled_before_the_next(source: MadeSource, proxy: HarmfulProxy) -> None:
    """The network keeps most bytes of the first write back: the source waits for them, until it is told to stop."""
    keys, data = source.random_blocks(16)
    reservation, slots = source.reserve(keys)
    with contextlib.closing(source.open("tcp", proxy.address)) as channel:
        proxy.hold_at = data.nbytes // 4
        with pytest.raises(ChannelError):
            channel.write(reservation, slots, data[::-1].copy(), deadline_s=2.0)
        while not source.grants.busy([reservation]):
            os.sched_yield()
        proxy.hold_at = None
        digests = channel.write(reservation, slots, data, deadline_s=DEADLINE_S)
    assert source.commit(reservation, digests) == 16
    assert not source.grants.busy([reservation])
    proxy.let_go()
    lease, blocks = source.lease(keys)
    with contextlib.closing(source.open("tcp")) as channel:
        out = np.zeros_like(data)
        assert channel.read(lease, blocks, out, deadline_s=DEADLINE_S).all()
        assert np.array_equal(out, data)


def test_failed_writes_that_nobody_settles_are_bounded(
    source: MadeSource, proxy: HarmfulProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp, "UNSETTLED_MAX", 0)
    keys, data = source.random_blocks(16)
    reservation, slots = source.reserve(keys)
    with contextlib.closing(source.open("tcp", proxy.address)) as channel:
        assert isinstance(channel, TcpChannel)
        proxy.hold_at = data.nbytes // 4
        with pytest.raises(ChannelError):
            channel.write(reservation, slots, data, deadline_s=2.0)
        proxy.hold_at = None
        other, other_slots = source.reserve(source.random_blocks(16)[0])
        with pytest.raises(ChannelError, match="too many") as caught:
            channel.write(other, other_slots, data, deadline_s=DEADLINE_S)
        assert caught.value.hint
        channel.settle(reservation, slots, deadline_s=DEADLINE_S)
        channel.write(other, other_slots, data, deadline_s=DEADLINE_S)


@pytest.mark.parametrize("at", range(0, 60, 3))
def test_closing_at_any_moment_of_a_call(source: MadeSource, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """The call has ended in every stream when it returns: nothing touches the caller's memory any more."""
    keys, data = source.store(48)
    lease, blocks = source.lease(keys)
    moved = 0
    receive_all = wire.receive_all

    def counted(*arguments: object) -> None:
        nonlocal moved
        moved += 1
        if moved == at:
            channel.close()
        receive_all(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(wire, "receive_all", counted)
    monkeypatch.setattr(tcp, "CHUNK_BYTES", 256 << 10)
    channel = TcpChannel(*_host_port(source.server.address), source.token, streams=3)
    out = np.zeros_like(data)
    with contextlib.closing(channel), contextlib.suppress(ChannelError):
        assert channel.read(lease, blocks, out, deadline_s=DEADLINE_S).all()
        assert np.array_equal(out, data)
    out[:] = 0x11
    assert source.server.close(DEADLINE_S)
    assert (out == 0x11).all()


def test_probe(source: MadeSource, proxy: HarmfulProxy) -> None:
    with contextlib.closing(source.open("tcp", proxy.address)) as channel:
        assert isinstance(channel, TcpChannel)
        channel.probe(deadline_s=DEADLINE_S)
        source.server.close_session(source.session)  # the kept connection ends: that alone is no bad sign
        channel.probe(deadline_s=DEADLINE_S)
        proxy.stall_at = 0
        with pytest.raises(ChannelError) as caught:
            channel.probe(deadline_s=0.2)
        assert caught.value.reason is Reason.DEADLINE


def test_connections_end_with_their_session(source: MadeSource) -> None:
    with contextlib.closing(source.open("tcp")) as channel:
        keys, data = source.store(1)
        lease, blocks = source.lease(keys)
        source.grants.close_session(source.session)
        source.server.close_session(source.session)
        with pytest.raises(ChannelError):
            channel.read(lease, blocks, np.zeros_like(data), deadline_s=DEADLINE_S)


@contextlib.contextmanager
def _connection(source: MadeSource, address: str = "", token: bytes = b"") -> Iterator[tuple[socket.socket, int]]:
    """A connection of the source's session, and its number."""
    with socket.create_connection(_host_port(address or source.server.address)) as sock:
        wire.prepare(sock)
        wire.send_all(sock, [wire.GREETING.pack(wire.MAGIC, token or source.token)], wire.Deadline(DEADLINE_S))
        welcome = wire.receive_bytes(sock, wire.WELCOME.size, wire.Deadline(DEADLINE_S))
        status, number = wire.WELCOME.unpack(welcome)
        assert status == wire.Status.OK
        yield sock, number


def _host_port(address: str) -> tuple[str, int]:
    host, port = address.rsplit(":", 1)
    return host, int(port)
