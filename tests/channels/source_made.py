"""A real source in this process (segment, core, grants, data server), and a proxy that harms what passes through."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvpool.channels.base import Channel
from kvpool.channels.sections import block_keys
from kvpool.channels.shm import ShmChannel
from kvpool.channels.tcp import TcpChannel
from kvpool.channels.tcp_server import TcpDataServer
from kvpool.core.arrays import Descriptors, SourceArrays
from kvpool.core.hashing import section_digest
from kvpool.core.namespace import GroupKind, GroupSpec, NamespaceSpec
from kvpool.core.results import SourceConfig
from kvpool.core.source import SourceCore
from kvpool.service.grants import Grants, now_us
from kvpool.tiers.dram import Segment

ENTRIES = 512
TTL_US = 60_000_000
SECTIONS = 2


class MadeSource:
    """Everything that a node has below its gRPC face."""

    def __init__(self, folder: Path, *, block_bytes: int = 64 << 10, data_bytes: int = 32 << 20) -> None:
        self.segment = Segment.create(
            folder, "made", data_bytes=data_bytes, index_bytes=SourceArrays.bytes_needed(ENTRIES)
        )
        arrays = SourceArrays.over(self.segment.index, ENTRIES, fresh=True)
        self.core = SourceCore(SourceConfig(data_bytes, ENTRIES, slab_bytes=4 << 20), arrays)
        self.grants = Grants()
        self.server = TcpDataServer(self.segment.data, self.grants, "127.0.0.1", 0)
        self.group = GroupSpec(0, GroupKind.FULL, (0, 1), 16, 1, SECTIONS, block_bytes)
        spec = NamespaceSpec("made", "", "uint8", "", "", "xxh3_128/1", (self.group,))
        self.namespace = self.core.register_namespace(spec)
        self.session = self.core.open_session("test", now_us())
        self.token = self.grants.open_session(self.session)
        self._rng = np.random.default_rng(7)

    def open(self, kind: str, address: str = "") -> Channel:
        if kind == "shm":
            parameters = {"path": str(self.segment.path), "uuid": self.segment.uuid.hex(), "writable": "1"}
            return ShmChannel.open(parameters)
        return TcpChannel.open({"address": address or self.server.address, "token": self.token.hex()})

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

    def close(self) -> None:
        assert self.server.close()
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
        self.stalled = threading.Event()
        self.resume = threading.Event()  # ends a stall
        self._passed = 0
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
                    if not data or (key.fileobj is server and not self._harm(data)):
                        client.close()
                        server.close()
                        return
                    key.data.sendall(data)

    def _harm(self, data: bytearray) -> bool:
        """Changes what passes; False cuts the connection."""
        first, self._passed = self._passed, self._passed + len(data)
        if self.flip_at is not None and first <= self.flip_at < self._passed:
            data[self.flip_at - first] ^= 0x10
        if self.stall_at is not None and self._passed > self.stall_at:
            self.stalled.set()
            self.resume.wait(30)
        return self.cut_at is None or self._passed <= self.cut_at

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
