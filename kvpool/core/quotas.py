"""How many bytes a namespace or a tenant may have: beyond it its own coldest blocks go first."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvpool.core.coldest import Coldest, Rows
from kvpool.core.errors import Overloaded
from kvpool.core.index import Entries
from kvpool.core.store import BlockStore

#: A namespace's number and -1, or -1 and a tenant's.
Holder: TypeAlias = tuple[int, int]

NONE = -1


class _Quota:
    """One quota, and where its own victims are found."""

    def __init__(self, holder: Holder, bytes_max: int, store: BlockStore) -> None:
        self.holder, self.bytes_max, self._store = holder, bytes_max, store
        self.coldest = Coldest(store.arrays, store.evictor, self._chosen, lambda: store.freshness)
        self.free_known: tuple[int | None, int] = (None, 0)  # at which freshness how many bytes could go

    @property
    def bytes_used(self) -> int:
        namespace, tenant = self.holder
        usage = self._store.usage
        return int(usage.namespace_bytes[namespace] if tenant == NONE else usage.tenant_bytes[tenant])

    @property
    def bytes_left(self) -> int:
        """Below 0 when there is more than there may be."""
        return self.bytes_max - self.bytes_used

    def _chosen(self, entries: Rows) -> NDArray[np.bool_]:
        namespace, tenant = self.holder
        arrays = self._store.arrays
        chosen: NDArray[np.bool_] = (
            arrays.namespaces[entries] == namespace if tenant == NONE else arrays.tenants[entries] == tenant
        )
        return chosen


class Quotas:
    """All quotas of a source."""

    def __init__(self, store: BlockStore, quotas_max: int) -> None:
        self._store, self._quotas_max = store, quotas_max
        self._quotas: dict[Holder, _Quota] = {}

    def __len__(self) -> int:
        return len(self._quotas)

    def set(self, holder: Holder, bytes_max: int) -> None:
        """Sets a quota, or with 0 removes it. Evicts nothing: `enforce` does. Raises: Overloaded."""
        if not bytes_max:
            self._quotas.pop(holder, None)
        elif holder in self._quotas:
            self._quotas[holder].bytes_max = bytes_max
        elif len(self._quotas) >= self._quotas_max:
            raise Overloaded(f"{self._quotas_max} quotas are set already", hint="remove those that nobody needs")
        else:
            self._quotas[holder] = _Quota(holder, bytes_max, self._store)

    def items(self) -> list[tuple[Holder, int, int]]:
        """(holder, bytes it may have, bytes it has), in the order in which they were set."""
        return [(holder, quota.bytes_max, quota.bytes_used) for holder, quota in self._quotas.items()]

    def admit(self, namespace: int, tenant: int, slots_bytes: NDArray[np.int64]) -> int:
        """How many leading blocks of such sizes may come, after evicting blocks of the same holders just for them."""
        both = (self._quotas.get(holder) for holder in ((namespace, NONE), (NONE, tenant)))
        quotas = [quota for quota in both if quota is not None]
        after = np.cumsum(slots_bytes)
        for quota in quotas:
            after = after[: self._could_admit(quota, after)]
        if not len(after):
            return 0
        for quota in quotas:
            self._evict_own(quota, int(after[-1]) - quota.bytes_left)
        left = min((quota.bytes_left for quota in quotas), default=int(after[-1]))
        return int(np.searchsorted(after, left, side="right"))

    def enforce(self) -> None:
        """Evicts what holders have beyond their quotas, as far as it may go."""
        for quota in self._quotas.values():
            if quota.bytes_left < 0:
                self._evict_own(quota, -quota.bytes_left)

    # ---------------------------------------------------------------- parts

    def _could_admit(self, quota: _Quota, after: NDArray[np.int64]) -> int:
        """For how many blocks, of so many bytes of slots up to each, a holder's own could make room."""
        wanted = int(after[-1]) - quota.bytes_left if len(after) else 0
        if wanted > 0:
            self._store.drain_touches()
        freeable = self._freeable(quota, wanted) if wanted > 0 else 0
        return int(np.searchsorted(after, quota.bytes_left + freeable, side="right"))

    def _freeable(self, quota: _Quota, bytes_wanted: int) -> int:
        """Bytes of slots of a holder's blocks that may go, or so many as are wanted."""
        known_at, bytes_known = quota.free_known
        # It can only have become less.
        if known_at == self._store.freshness and bytes_known == 0:
            return 0
        together = self._store.evictor.evictable_together
        candidates = quota.coldest.candidates()
        remembered = self._slots_bytes(candidates[together(candidates)])
        if remembered >= bytes_wanted:
            return remembered
        own = quota.coldest.all()
        quota.free_known = self._store.freshness, self._slots_bytes(own[together(own)])
        return quota.free_known[1]

    def _evict_own(self, quota: _Quota, bytes_wanted: int) -> None:
        """Evicts a holder's coldest blocks for so many bytes of slots, or as many as may go."""
        freed = 0
        while freed < bytes_wanted:
            victims = self._next_own(quota, bytes_wanted - freed)
            if not len(victims):
                return
            freed += self._slots_bytes(victims)
            self._store.evict(victims)

    def _slots_bytes(self, entries: Entries) -> int:
        return int(self._store.slots.slots_bytes(self._store.footprints(entries)).sum())

    def _next_own(self, quota: _Quota, bytes_wanted: int) -> Entries:
        """The coldest blocks for no more than so many bytes, but at least one, that may go together; or nobody."""
        evictor, candidates = self._store.evictor, quota.coldest.candidates()
        count = len(self._leading(candidates, bytes_wanted))
        while count and count <= 4 * len(candidates):
            part = candidates[:count]
            part = self._leading(part[evictor.evictable_together(part)], bytes_wanted)
            part = part[evictor.evictable_together(part)]
            if len(part):
                return part
            count *= 4
        # All of the cold ones have something hotter standing on them.
        own = quota.coldest.all()
        leaves = own[evictor.evictable(own)]
        return self._leading(leaves[np.argsort(evictor.rank(leaves))], bytes_wanted)

    def _leading(self, entries: Entries, bytes_wanted: int) -> Entries:
        """As few of them as have so many bytes of slots, or all."""
        after = np.cumsum(self._store.slots.slots_bytes(self._store.footprints(entries)))
        return entries[: int(np.searchsorted(after, bytes_wanted)) + 1]
