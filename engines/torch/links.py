"""Clients of the sources that a worker talks to, and what their transfers took."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from kvpool.channels.tls import TlsConfig
from kvpool.client import PoolClient
from kvpool.core.errors import DeadlineExceeded, Unavailable
from kvpool.core.namespace import NamespaceSpec

CLIENTS_MAX = 64
#: How long a source is left alone after a failure.
AVOID_S = 1.0
SAMPLES_MAX = 1024


@dataclass(frozen=True, slots=True)
class LinkSample:
    """One batch of reads from a source."""

    source_id: str
    bytes: int
    duration_us: int
    failed: bool
    concurrent: int  # transfers from that source at the same time, this one included


class Links:
    """One client for each source, opened when first needed; the least recently used one makes room for a new one."""

    def __init__(self, namespace: NamespaceSpec, *, client: str, credential: str, tls: TlsConfig | None = None) -> None:
        self.spec, self.namespace = namespace, namespace.id()
        self._name, self._credential, self._tls = client, credential, tls
        self._clients: OrderedDict[str, PoolClient] = OrderedDict()
        self._busy: dict[str, int] = {}
        self._registered: set[PoolClient] = set()
        self._avoided_until_s: dict[str, float] = {}
        self._samples: list[LinkSample] = []
        self._lock = threading.Lock()

    @contextmanager
    def client(self, address: str) -> Iterator[PoolClient]:
        """The client for a source, registered for the namespace, kept open while it is used.

        A source that failed is left alone for a moment: what hangs must not hold up everybody, one after another.

        Raises: KvpoolError.
        """
        if time.monotonic() < self._avoided_until_s.get(address, 0.0):
            raise Unavailable(f"{address} failed just now and is left alone for a moment")
        client = self._take(address)
        try:
            if client not in self._registered:
                client.register(self.spec)
                self._registered.add(client)
            yield client
        except (Unavailable, DeadlineExceeded):
            self._avoided_until_s[address] = time.monotonic() + AVOID_S
            raise
        finally:
            with self._lock:
                self._busy[address] -= 1

    @contextmanager
    def measured(self, client: PoolClient, address: str) -> Iterator[Callable[[int], None]]:
        """Times one read; call what it gives with the bytes that came. An exception is a failed transfer."""
        moved: list[int] = []
        source_id = client.source_id
        begun = time.monotonic()
        failed = True
        try:
            yield moved.append
            failed = False
        finally:
            duration_us = int((time.monotonic() - begun) * 1e6)
            with self._lock:
                if (failed or sum(moved)) and len(self._samples) < SAMPLES_MAX:
                    concurrent = self._busy[address]
                    self._samples.append(LinkSample(source_id, sum(moved), duration_us, failed, concurrent))

    def take_samples(self) -> list[LinkSample]:
        with self._lock:
            samples, self._samples = self._samples, []
        return samples

    def close(self) -> None:
        with self._lock:
            clients = list(self._clients.values())
            self._clients.clear()
        for client in clients:
            client.close()

    def _take(self, address: str) -> PoolClient:
        closing: PoolClient | None = None
        with self._lock:
            client = self._clients.get(address)
            if client is None:
                client = PoolClient(address, client=self._name, credential=self._credential, tls=self._tls)
                self._clients[address] = client
                closing = self._surplus()
            self._clients.move_to_end(address)
            self._busy[address] = self._busy.get(address, 0) + 1
        if closing is not None:
            closing.close()
        return client

    def _surplus(self) -> PoolClient | None:
        if len(self._clients) <= CLIENTS_MAX:
            return None
        idle = next((a for a in self._clients if not self._busy.get(a)), None)
        if idle is None:
            return None
        self._busy.pop(idle, None)
        self._avoided_until_s.pop(idle, None)
        client = self._clients.pop(idle)
        self._registered.discard(client)
        return client
