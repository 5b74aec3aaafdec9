"""A real source in this process (segment, core, grants, data servers), the channels to it, and a proxy that does harm.

Adding a channel to the contract suite is one entry in `CHANNELS`.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvpool.channels.base import Channel, Offer
from kvpool.channels.collective import CollectiveChannel
from kvpool.channels.collective_server import CollectiveServer
from kvpool.channels.failover import FailoverChannel
from kvpool.channels.links import Links
from kvpool.channels.nixl import NixlChannel
from kvpool.channels.nixl import available as nixl_available
from kvpool.channels.nixl_server import NixlServer
from kvpool.channels.sections import block_keys
from kvpool.channels.shm import ShmChannel
from kvpool.channels.tcp import TcpChannel
from kvpool.channels.tcp_server import TcpDataServer
from kvpool.core.arrays import Descriptors, SourceArrays
from kvpool.core.hashing import section_digest
from kvpool.core.ids import LeaseId
from kvpool.core.links import LinkConfig
from kvpool.core.namespace import GroupKind, GroupSpec, NamespaceSpec
from kvpool.core.results import SourceConfig
from kvpool.core.source import SourceCore
from kvpool.service.grants import Grants, now_us
from kvpool.tiers.dram import Segment
from tests.channels.certificates import client_tls, server_tls

ENTRIES = 512
TTL_US = 600_000_000
SECTIONS = 2
#: Only for what hangs: how fast this machine is proves nothing.
CLOSE_S = 60.0
#: Of one link: nothing is to be heard of it but what the transfers of a test do.
UNPROBED = LinkConfig(idle_us=1 << 60)


class DataServer(Protocol):
    """What a source runs for a channel."""

    address: str

    def close_session(self, session: int) -> None: ...

    def close(self, timeout_s: float = ...) -> bool: ...


@dataclass(frozen=True)
class MadeChannel:
    """How to serve and to open a channel of one kind, and what the tests may expect of it."""

    kind: str
    open: Callable[[MadeSource, str], Channel]  # the source, the address of its data server or of a proxy to it
    serve: Callable[[MadeSource], DataServer]
    networked: bool = True  # bytes pass through a stream that `HarmfulProxy` can harm
    same_host: bool = False
    sees_rights: bool = True  # refuses what no live lease or reservation covers
    writes: bool = True


def _no_server(source: MadeSource) -> DataServer:
    raise AssertionError("this channel needs no data server")


def _open_shm(source: MadeSource, address: str) -> Channel:
    parameters = {"path": str(source.segment.path), "uuid": source.segment.uuid.hex(), "writable": "1"}
    return ShmChannel.open(parameters)


def _open_tcp(source: MadeSource, address: str) -> Channel:
    return TcpChannel.open({"address": address, "token": source.token.hex()})


def _open_tls(source: MadeSource, address: str) -> Channel:
    parameters = {"address": address, "token": source.token.hex(), "tls": "1"}
    return TcpChannel.open(parameters, tls_config=client_tls(own="ours"))


def _open_failover(source: MadeSource, address: str) -> Channel:
    offer = Offer("tcp", {"address": address, "token": source.token.hex()})
    return FailoverChannel.open("made", [offer], {"tcp": TcpChannel.open}, Links(UNPROBED))


def _serve_tcp(source: MadeSource) -> DataServer:
    return TcpDataServer(source.segment.data, source.grants, "127.0.0.1", 0)


def _serve_tls(source: MadeSource) -> DataServer:
    config = server_tls(verify_clients=True)
    return TcpDataServer(source.segment.data, source.grants, "127.0.0.1", 0, tls_config=config)


def _open_collective(source: MadeSource, address: str) -> Channel:
    return CollectiveChannel.open(source.serving("collective").offer(source.session, source.token))


def _serve_collective(source: MadeSource) -> CollectiveServer:
    return CollectiveServer(source.segment.data, source.grants, "127.0.0.1", 0)


def _open_nixl(source: MadeSource, address: str) -> Channel:
    return NixlChannel.open(source.serving("nixl").offer(source.session, source.token))


def _serve_nixl(source: MadeSource) -> NixlServer:
    return NixlServer(source.segment.path, source.segment.uuid)


# The faults of collective and nixl have tests of their own: their bytes do not pass through a stream of ours.
CHANNELS = {
    "shm": MadeChannel("shm", _open_shm, _no_server, networked=False, same_host=True, sees_rights=False),
    "tcp": MadeChannel("tcp", _open_tcp, _serve_tcp),
    "tcp+tls": MadeChannel("tcp", _open_tls, _serve_tls),
    "failover": MadeChannel("tcp", _open_failover, _serve_tcp),
    "collective": MadeChannel("collective", _open_collective, _serve_collective, networked=False),
    "nixl": MadeChannel("nixl", _open_nixl, _serve_nixl, networked=False, sees_rights=False, writes=False),
}
#: Kinds that can be had here: nixl is an extra.
AVAILABLE = [name for name in CHANNELS if name != "nixl" or nixl_available()]


class MadeSource:
    """Everything that a node has below its gRPC face."""

    def __init__(self, folder: Path, *, block_bytes: int = 64 << 10, data_bytes: int = 32 << 20) -> None:
        self.segment = Segment.create(
            folder, "made", data_bytes=data_bytes, index_bytes=SourceArrays.bytes_needed(ENTRIES)
        )
        arrays = SourceArrays.over(self.segment.index, ENTRIES, fresh=True)
        self.core = SourceCore(SourceConfig(data_bytes, ENTRIES, "lru"), arrays)
        self.grants = Grants()
        self.servers: dict[str, DataServer] = {}
        self.server = self.serving("tcp")
        self.group = GroupSpec(0, GroupKind.FULL, (0, 1), 16, 1, SECTIONS, block_bytes)
        spec = NamespaceSpec("made", "", "uint8", "", "", "xxh3_128/1", (self.group,))
        self.namespace = self.core.register_namespace(spec)
        self.session = self.core.open_session("test", now_us())
        self.token = self.grants.open_session(self.session)
        self._rng = np.random.default_rng(7)

    def serving(self, kind: str) -> DataServer:
        """The data server of a channel that needs one, started when first asked for."""
        if kind not in self.servers:
            self.servers[kind] = CHANNELS[kind].serve(self)
        return self.servers[kind]

    def open(self, kind: str, address: str = "") -> Channel:
        """Opens a channel; `address`: of a proxy to its data server."""
        made = CHANNELS[kind]
        return made.open(self, address or (self.serving(kind).address if made.networked else ""))

    def random_blocks(self, count: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        keys = self._rng.integers(0, 256, (count, 16), dtype=np.uint8)
        return keys, self._rng.integers(0, 256, (count, self.group.block_bytes), dtype=np.uint8)

    def reserve(self, keys: NDArray[np.uint8], ttl_us: int = TTL_US) -> tuple[int, Descriptors]:
        now = now_us()
        reserved = self.core.reserve(self.session, self.namespace, self.group, keys, ttl_us, now)
        mine = reserved.status == 1
        self.grants.grant_write(
            self.session, reserved.reservation, reserved.slots, mine, self.group.section_count, now + ttl_us
        )
        slots = reserved.slots
        digests = np.zeros((len(keys), SECTIONS), np.uint64)
        return reserved.reservation, Descriptors(keys, slots.offsets, slots.sizes, slots.generations, digests)

    def commit(self, reservation: int, digests: NDArray[np.uint64]) -> int:
        count = len(digests)
        indices = np.repeat(np.arange(count, dtype=np.uint32), SECTIONS)
        sections = np.tile(np.arange(SECTIONS, dtype=np.uint32), count)
        complete = self.core.commit(self.session, reservation, indices, sections, digests.ravel(), now_us())
        self.grants.committed(reservation, indices.tolist(), sections.tolist())
        return complete

    def store(self, count: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Random blocks, written straight into their slots."""
        keys, data = self.random_blocks(count)
        reservation, slots = self.reserve(keys)
        for i, (key, offset) in enumerate(zip(block_keys(slots), slots.offsets.tolist(), strict=True)):
            self.segment.data[offset : offset + data.shape[1]] = data[i]
            for s in range(SECTIONS):
                slots.digests[i, s] = section_digest(np.ascontiguousarray(np.split(data[i], SECTIONS)[s]), key, s)
        assert self.commit(reservation, slots.digests) == count
        return keys, data

    def lease(self, keys: NDArray[np.uint8], ttl_us: int = TTL_US) -> tuple[int, Descriptors]:
        now = now_us()
        leased = self.core.lease(self.session, self.namespace, keys, ttl_us, now)
        assert leased.found.all()
        self.grants.grant_read(self.session, leased.lease, leased.blocks, leased.found, now + ttl_us)
        b = leased.blocks
        return leased.lease, Descriptors(b.keys, b.offsets, b.sizes, b.generations, b.digests[:, :SECTIONS].copy())

    def write_sections(
        self, slots: Descriptors, sections: NDArray[np.int64], data: NDArray[np.uint8]
    ) -> NDArray[np.uint64]:
        """One section of each slot, written straight into it. Returns their digests."""
        digests = np.zeros(len(sections), dtype=np.uint64)
        for i, (key, section) in enumerate(zip(block_keys(slots), sections.tolist(), strict=True)):
            begin = int(slots.offsets[i]) + section * data.shape[1]
            self.segment.data[begin : begin + data.shape[1]] = data[i]
            digests[i] = section_digest(data[i], key, section)
        return digests

    def commit_sections(self, reservation: int, sections: NDArray[np.int64], digests: NDArray[np.uint64]) -> None:
        """One section of each block of a reservation."""
        indices = np.arange(len(sections), dtype=np.uint32)
        self.core.commit(self.session, reservation, indices, sections.astype(np.uint32), digests, now_us())
        self.grants.committed(reservation, indices.tolist(), sections.tolist())

    def lease_sections(self, keys: NDArray[np.uint8]) -> tuple[int, Descriptors, NDArray[np.uint8]]:
        """A lease of blocks that may be incomplete, and their committed sections as bits."""
        now = now_us()
        leased = self.core.lease(self.session, self.namespace, keys, TTL_US, now, incomplete=True)
        self.grants.grant_read(
            self.session, leased.lease, leased.blocks, leased.found, now + TTL_US, SECTIONS, leased.sections
        )
        b = leased.blocks
        digests = b.digests[:, :SECTIONS].copy()
        return leased.lease, Descriptors(b.keys, b.offsets, b.sizes, b.generations, digests), leased.sections

    def drop(self, lease: int, keys: NDArray[np.uint8]) -> None:
        """Gives a lease back and removes the blocks."""
        self.grants.revoke_read(self.session, [lease])
        self.core.release(self.session, [LeaseId(lease)], now_us())
        self.core.remove(self.namespace, keys, now_us())

    def close(self) -> None:
        for server in self.servers.values():
            assert server.close(CLOSE_S)
        self.grants.check_invariants()
        self.core.check_invariants()
        self.segment.close()


class HarmfulProxy:
    """Passes bytes between a client and the data server, and on the way back does what the test asks for."""

    def __init__(self, target: str) -> None:
        host, port = target.rsplit(":", 1)
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.flip_at: int | None = None  # the byte of the replies with this number is changed
        self.cut_at: int | None = None  # the connection is cut after so many bytes of replies
        self.stall_at: int | None = None  # nothing more is passed on after so many
        self.hold_at: int | None = None  # what clients send beyond so many bytes is kept back until `let_go`
        self.hold_connections_max = 1 << 30  # of so many connections
        self._kept: list[tuple[socket.socket, bytes]] = []
        self.record: bytearray | None = None  # all that passes, either way
        self.stalled = threading.Event()
        self.resume = threading.Event()  # ends a stall
        self.passed = 0  # bytes of replies
        self.sent = 0  # bytes of requests, while `hold_at` is set
        self._sockets: list[socket.socket] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while not self._stop.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._target)
            self._sockets += [client, server]
            thread = threading.Thread(target=self._pass, args=(client, server), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _pass(self, client: socket.socket, server: socket.socket) -> None:
        with selectors.DefaultSelector() as selector, contextlib.suppress(OSError):
            selector.register(client, selectors.EVENT_READ, server)
            selector.register(server, selectors.EVENT_READ, client)
            while not self._stop.is_set():
                for key, _ in selector.select(0.1):
                    data = bytearray(key.fileobj.recv(65536))  # type: ignore[union-attr]
                    if self.record is not None:
                        self.record += data
                    if key.fileobj is client and self._holds(server, data):
                        if not data:
                            selector.unregister(client)
                        continue
                    if not data or (key.fileobj is server and not self._harm(data)):
                        client.close()
                        server.close()
                        return
                    key.data.sendall(data)

    def _holds(self, server: socket.socket, data: bytearray) -> bool:
        """Keeps back what is to be kept. The connection to the source then stays open, as if the client were gone."""
        held = any(server is kept for kept, _ in self._kept)
        others = {id(kept) for kept, _ in self._kept if kept is not server}
        if self.hold_at is not None and data and len(others) < self.hold_connections_max:
            held = held or self.sent + len(data) > self.hold_at
            self.sent += len(data)
        if held:
            self._kept.append((server, bytes(data)))
        return held

    def _harm(self, data: bytearray) -> bool:
        """Changes what passes; False cuts the connection."""
        first, self.passed = self.passed, self.passed + len(data)
        if self.flip_at is not None and first <= self.flip_at < self.passed:
            data[self.flip_at - first] ^= 0x10
        if self.stall_at is not None and self.passed > self.stall_at:
            self.stalled.set()
            self.resume.wait(100)
        return self.cut_at is None or self.passed <= self.cut_at

    def let_go(self) -> None:
        """Sends what was kept back."""
        for server, data in self._kept:
            with contextlib.suppress(OSError):
                server.sendall(data)

    def close(self) -> None:
        self._stop.set()
        self.resume.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(5)
        for sock in self._sockets:
            sock.close()
