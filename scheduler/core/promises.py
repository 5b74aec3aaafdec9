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
    decode_id: str
    due_us: int  # when it is to come back
    service_us: int  # until its first token
    ends_us: int
    kv_tokens: int


@dataclass(slots=True)
class PromiseBook:
    """Promises by owner and by instance; of more than `promises_max` the one made first is forgotten."""

    promises_max: int
    promises: dict[Owner, Promise] = field(default_factory=dict)
    #: Instance -> owners of promises to decode there, in the order in which they were made.
    on: dict[str, dict[Owner, None]] = field(default_factory=dict)

    def note(self, promise: Promise) -> None:
        self.drop(promise.owner)
        if len(self.promises) >= self.promises_max:
            self.drop(next(iter(self.promises)))
        self.promises[promise.owner] = promise
        self.on.setdefault(promise.decode_id, {})[promise.owner] = None

    def drop(self, owner: Owner) -> None:
        promise = self.promises.pop(owner, None)
        if promise is None:
            return
        of_instance = self.on[promise.decode_id]
        del of_instance[owner]
        if not of_instance:
            del self.on[promise.decode_id]

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

    def ahead_of(self, model: str, now_us: int) -> tuple[int, int]:
        """Work promised to others of a model before their first tokens, and when the last of them is to come.

        Whoever comes back goes wherever that is best then, so the work is not any one instance's; and who came before
        the last of them would take its place.
        """
        work_us, last_us = 0, 0
        for promise in self.promises.values():
            if promise.model == model and promise.due_us + GRACE_US >= now_us:
                work_us, last_us = work_us + promise.service_us, max(last_us, promise.due_us)
        return work_us, last_us

    def decodes_on(self, instance_id: str, now_us: int) -> list[tuple[int, int, int]]:
        """Of each promise to decode on an instance: when it comes, when it ends, and its KV tokens."""
        those = [self.promises[owner] for owner in list(self.on.get(instance_id, ()))[-COUNTED_MAX:]]
        return [(p.due_us, p.ends_us, p.kv_tokens) for p in those if p.due_us + GRACE_US >= now_us]

    def drop_instance(self, instance_id: str) -> None:
        for owner in list(self.on.get(instance_id, ())):
            self.drop(owner)

    def check_invariants(self) -> None:
        assert len(self.promises) <= self.promises_max
        for owner, promise in self.promises.items():
            assert owner == promise.owner
            assert owner in self.on[promise.decode_id]
        for owners in self.on.values():
            assert owners and all(owner in self.promises for owner in owners)
