"""Times to come back that refused requests were told: what was promised to others is not promised again. Pure.

A promise holds nothing: who does not come back takes nothing from those who come. It only has the next one told a later
time, in the order of refusals.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from scheduler.core.placements import Owner

#: A promise counts for this long after its time, as nobody comes back to the millisecond.
GRACE_US = 1_000_000
#: Promises on one instance that are looked at, those made last: more are told times behind these.
COUNTED_MAX = 256


@dataclass(frozen=True, slots=True)
class Promise:
    """What a refused request is going to take when it comes back as it was told. Absolute times."""

    owner: Owner
    model: str
    tenant: str
    prefill_id: str
    decode_id: str
    due_us: int  # when it is to come back
    prefill_ends_us: int
    ends_us: int
    kv_tokens: int


@dataclass(slots=True)
class PromiseBook:
    """Promises by owner and by instance; of more than `promises_max` the one made first is forgotten."""

    promises_max: int
    promises: dict[Owner, Promise] = field(default_factory=dict)
    #: Instance -> owners of promises to prefill or decode there, in the order in which they were made.
    on: dict[str, dict[Owner, None]] = field(default_factory=dict)

    def note(self, promise: Promise) -> None:
        self.drop(promise.owner)
        if len(self.promises) >= self.promises_max:
            self.drop(next(iter(self.promises)))
        self.promises[promise.owner] = promise
        for instance_id in (promise.prefill_id, promise.decode_id):
            self.on.setdefault(instance_id, {})[promise.owner] = None

    def drop(self, owner: Owner) -> None:
        promise = self.promises.pop(owner, None)
        if promise is None:
            return
        for instance_id in dict.fromkeys((promise.prefill_id, promise.decode_id)):
            of_instance = self.on[instance_id]
            del of_instance[owner]
            if not of_instance:
                del self.on[instance_id]

    def came(self, owner: Owner, model: str, tenant: str, now_us: int) -> None:
        """A request has come: the one that was told to, or, since who comes again may have another id, one like it."""
        while self.promises:
            first = next(iter(self.promises.values()))
            if first.due_us + GRACE_US >= now_us:
                break
            self.drop(first.owner)
        if owner not in self.promises:
            due = (p for p in self.promises.values() if p.due_us <= now_us)
            kept = next((p for p in due if (p.model, p.tenant, p.owner[0]) == (model, tenant, owner[0])), None)
            owner = kept.owner if kept is not None else owner
        self.drop(owner)

    def _those_on(self, instance_id: str, now_us: int) -> list[Promise]:
        owners = list(self.on.get(instance_id, ()))[-COUNTED_MAX:]
        found = [self.promises[owner] for owner in owners]
        return [promise for promise in found if promise.due_us + GRACE_US >= now_us]

    def prefills_until_us(self, instance_id: str, now_us: int) -> int:
        """When the last prefill that was promised on an instance is predicted to end; 0 if none was."""
        those = self._those_on(instance_id, now_us)
        return max((p.prefill_ends_us for p in those if p.prefill_id == instance_id), default=0)

    def decodes_on(self, instance_id: str, now_us: int) -> list[tuple[int, int, int]]:
        """Of each promise to decode on an instance: when it comes, when it ends, and its KV tokens."""
        those = self._those_on(instance_id, now_us)
        return [(p.due_us, p.ends_us, p.kv_tokens) for p in those if p.decode_id == instance_id]

    def drop_instance(self, instance_id: str) -> None:
        for owner in list(self.on.get(instance_id, ())):
            self.drop(owner)

    def check_invariants(self) -> None:
        assert len(self.promises) <= self.promises_max
        for owner, promise in self.promises.items():
            assert owner == promise.owner
            assert owner in self.on[promise.prefill_id] and owner in self.on[promise.decode_id]
        for owners in self.on.values():
            assert owners and all(owner in self.promises for owner in owners)
