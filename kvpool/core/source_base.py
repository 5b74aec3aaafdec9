"""What all parts of a source's core share: its state, its namespaces and sessions, and how holders end.

See `source` for the whole. Pure: every call takes the time.
"""

from __future__ import annotations

import json
from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from kvpool.core.arrays import FLAG_LOWER_TIER, FLAGS, SourceArrays
from kvpool.core.bounds import Bounds
from kvpool.core.catalog import Catalog, Tenants
from kvpool.core.demotion import Demotion
from kvpool.core.errors import BadArgument, Overloaded, UnknownSession
from kvpool.core.evictors import EVICTORS
from kvpool.core.expiry import Expiries, Expiry
from kvpool.core.held import HeldBlocks
from kvpool.core.holds import Holds
from kvpool.core.ids import KeyArray, LeaseId, NamespaceId, PinId, ReservationId, SessionId, WaitId
from kvpool.core.index import BlockIndex
from kvpool.core.names import Names
from kvpool.core.namespace import SECTIONS_MAX, GroupSpec, Namespaces, NamespaceSpec
from kvpool.core.quotas import Quotas
from kvpool.core.reservations import Reservations, ReservationState
from kvpool.core.results import SourceConfig
from kvpool.core.spans import SlotAllocator
from kvpool.core.store import BlockStore
from kvpool.core.usage import Usage
from kvpool.core.waits import Waits, WaitState


class SourceBase:
    """State of one source. Not thread-safe: one thread calls it."""

    def __init__(
        self,
        config: SourceConfig,
        arrays: SourceArrays | None = None,
        data: NDArray[np.uint8] | None = None,
        *,
        slots: SlotAllocator | None = None,
    ) -> None:
        """Args: data: uint8, the segment's data, where names of objects are kept; None = objects are refused.
        slots: what is taken already in `arrays`; None = nothing is.

        Raises: BadArgument for arrays of other sizes, or an eviction policy that does not exist.
        """
        if config.eviction not in EVICTORS:
            raise BadArgument(f"no eviction policy {config.eviction!r}", hint=f"one of {', '.join(EVICTORS)}")
        self.config = config
        self.arrays = arrays or SourceArrays.allocate(config.entries_max, SECTIONS_MAX)
        if (self.arrays.entries, self.arrays.sections) != (config.entries_max, SECTIONS_MAX):
            raise BadArgument(f"an index of {self.arrays.entries} entries is not one of {config.entries_max}")
        self.index = BlockIndex(self.arrays)
        self.holds = Holds(config.entries_max)
        self.names = Names(self.arrays, data)
        self.usage = Usage(config.tenants_max)
        slots = slots or SlotAllocator(config.capacity_bytes, config.unit_bytes)
        self.store = BlockStore(self.index, self.holds, slots, self.names, self.usage, config.eviction)
        self.quotas_set = Quotas(self.store, config.quotas_max)
        self.reservations = Reservations()
        self.waits = Waits()
        self.sessions: dict[SessionId, str] = {}
        self._pongs: dict[SessionId, int] = {}  # number of the last one, by session
        self.draining = False
        self.catalog_changed = False
        self.hits = self.misses = 0  # blocks asked for by lease
        self.expired = 0  # reservations, leases, pins and hand-offs ended by time
        self.adopted = 0  # blocks taken over from the process before
        self.namespaces_known = Namespaces()
        self.tenants = Tenants(config.tenants_max)
        self._catalog_bytes = 0
        self._bounds = Bounds(config)
        self._expiries = Expiries()
        self._held = HeldBlocks(self.holds, self.store, self._expiries)
        self._next_session = 1
        self._demotion = Demotion(self.store)
        # Entries of slots that writers of the process before may still be writing.
        self._inherited = np.empty(0, dtype=np.int32)

    # ---------------------------------------------------------------- namespaces, tenants

    def register_namespace(self, spec: NamespaceSpec) -> NamespaceId:
        """Makes a namespace known. Idempotent. Raises: BadArgument, Overloaded."""
        spec.validate()
        if self.namespaces_known.knows(spec):
            return spec.id()
        size = self._check_catalog_room(len(spec.canonical()))
        namespace = self.namespaces_known.register(spec)
        self._catalog_bytes, self.catalog_changed = size, True
        return namespace

    def namespace_number(self, namespace_id: bytes) -> int:
        """By which entries of the index name it. Raises: UnknownNamespace."""
        return self.namespaces_known.number(namespace_id)

    def group(self, namespace_id: bytes, group: int, shard: int) -> GroupSpec:
        """A group of a namespace; of one of objects, OBJECTS_GROUP. Raises: UnknownNamespace, BadArgument."""
        return self.namespaces_known.group(namespace_id, group, shard)

    def catalog(self) -> Catalog:
        """What the numbers in the index stand for, and the quotas."""
        quotas = tuple((namespace, tenant, most) for (namespace, tenant), most, _ in self.quotas_set.items())
        return Catalog(tuple(self.namespaces_known.specs), tuple(self.tenants.names), quotas)

    def set_lower_tier(self, present: bool) -> None:
        """Whether what is not here may be in a lower tier: readers of the index then have to ask."""
        flags = int(self.arrays.header[FLAGS])
        self.arrays.header[FLAGS] = flags | FLAG_LOWER_TIER if present else flags & ~FLAG_LOWER_TIER

    # ---------------------------------------------------------------- sessions

    def open_session(self, client: str, now_us: int) -> SessionId:
        """Raises: Overloaded."""
        if len(self.sessions) >= self.config.sessions_max:
            raise Overloaded(f"{self.config.sessions_max} sessions are open already", hint="close idle clients")
        session = SessionId(self._next_session)
        self._next_session += 1
        self.sessions[session] = client
        self._pongs[session] = 0
        return session

    def ping(self, session: SessionId, now_us: int) -> None:
        """Raises: UnknownSession."""
        if session not in self.sessions:
            raise UnknownSession(f"no session {session}", hint="the connection was lost; open a new session")

    def next_pong(self, session: SessionId) -> int:
        """Number of a pong that is about to be sent. Raises: UnknownSession."""
        self.ping(session, 0)
        self._pongs[session] += 1
        return self._pongs[session]

    def written_no_more(self, session: SessionId, seen: int, writing: Collection[int]) -> list[ReservationId]:
        """Expired reservations that the session's client has stopped to write: for `abort`, as if it had called it.

        None of its writes begins after its reservation's expiry. So what had expired when a pong was sent, and is not
        being written when that pong has come, is not written any more.

        Args:
            seen: number of a pong that the client has; 0 = it does not say what it writes.
            writing: reservations that it was writing, at a time after that pong came.
        Raises: UnknownSession; BadArgument for a pong that was never sent.
        """
        self.ping(session, 0)
        if seen > self._pongs[session]:
            raise BadArgument(f"pong {seen} of session {session} was never sent")
        return [n for n in self.reservations.expired_before(session, seen) if n not in writing]

    def close_session(self, session: SessionId, now_us: int, *, writer_gone: bool) -> None:
        """Ends what a session holds. Its slots go to quarantine unless its writer is proven gone. Idempotent."""
        if self.sessions.pop(session, None) is None:
            return
        del self._pongs[session]
        self._held.end_session(session)
        for wait in self.waits.of_session(session):
            self._expiries.cancel(Expiry.WAIT, wait)
            self.waits.cancel(wait)
        for reservation in self.reservations.of_session(session):
            state = self.reservations.find(session, reservation).state
            if state is ReservationState.LIVE:
                self._drop_reservation(reservation, quarantine=not writer_gone)
            elif state is ReservationState.FINISHED:
                self.reservations.remove(reservation)
                self._expiries.cancel(Expiry.RESERVATION, reservation)
        if writer_gone:
            self.writer_gone(session, now_us)

    def writer_gone(self, session: SessionId, now_us: int) -> int:
        """The writer behind a session can't write any more: its quarantined slots are free. Returns how many."""
        freed = 0
        for reservation in self.reservations.of_session(session):
            if self.reservations.find(session, reservation).state is ReservationState.EXPIRED:
                entries = self.reservations.remove(reservation)
                self.store.end_quarantine(entries)
                freed += len(entries)
        return freed

    # ---------------------------------------------------------------- time

    def tick(self, now_us: int) -> None:
        """Ends what has expired, takes note of what was read without a call, and evicts: what is beyond a quota, and
        down to the low watermark where the high one is passed."""
        for kind, number in self._expiries.due(now_us):
            self._expire(kind, number)
        self.store.drain_touches()
        self.quotas_set.enforce()
        config, capacity_bytes = self.config, self.store.slots.capacity_bytes
        if self.store.slots.bytes_used > config.high_watermark * capacity_bytes:
            self.store.evict_to(int(config.low_watermark * capacity_bytes))

    def next_deadline_us(self) -> int | None:
        """When `tick` has something to do."""
        return self._expiries.next_us()

    # ---------------------------------------------------------------- parts

    def _check_call(self, session: SessionId, namespace_id: bytes, keys: KeyArray, ttl_us: int) -> int:
        """The namespace's number, where all is well."""
        self._bounds.keys(keys)
        self._bounds.ttl(ttl_us)
        self.ping(session, 0)
        return self.namespaces_known.number(namespace_id)

    def _check_catalog_room(self, size: int) -> int:
        """Bytes of the catalog with `size` more. Raises: Overloaded."""
        size += self._catalog_bytes + 16
        if size > self.config.catalog_bytes_max:
            raise Overloaded(f"more than {self.config.catalog_bytes_max} bytes of namespaces and tenants")
        return size

    def _tenant(self, name: str) -> int:
        """The number of a tenant, a new one for a new name. Raises: Overloaded."""
        number = self.tenants.number(name)
        if number is None:
            size = self._check_catalog_room(len(json.dumps(name, ensure_ascii=False).encode()))
            number = self.tenants.add(name)
            self._catalog_bytes, self.catalog_changed = size, True
        return number

    def _drop_reservation(self, reservation: ReservationId, *, quarantine: bool) -> int:
        """Ends a live reservation: its incomplete blocks are dropped, their slots freed or put in quarantine."""
        found = self.reservations.get(reservation)
        assert found is not None and found.state is ReservationState.LIVE
        entries = found.pending_entries
        keys = self.index.keys_of(entries) if len(self.waits) else []
        self._expiries.cancel(Expiry.RESERVATION, reservation)
        if quarantine:
            self.store.quarantine(entries)
            self.reservations.quarantine(reservation, self._pongs.get(found.session, 0))
        else:
            self.store.discard(entries)
            self.reservations.remove(reservation)
        for key in keys:
            self.waits.key_changed(key, WaitState.ABANDONED)
        return len(entries)

    def _expire(self, kind: Expiry, number: int | str) -> None:
        """Ends one holder whose time has come."""
        self.expired += kind is not Expiry.WAIT
        if kind is Expiry.HANDOFF:
            self._held.end_handoff(str(number))
        elif kind is Expiry.LEASE:
            self._held.end_lease(LeaseId(int(number)))
        elif kind is Expiry.PIN:
            self._held.end_pin(PinId(int(number)))
        elif kind is Expiry.WAIT:
            self.waits.expire(WaitId(int(number)))
        else:
            found = self.reservations.get(ReservationId(int(number)))
            assert found is not None
            if found.state is ReservationState.LIVE:
                self._drop_reservation(ReservationId(int(number)), quarantine=True)
            else:
                self.expired -= 1
                self.reservations.remove(ReservationId(int(number)))
