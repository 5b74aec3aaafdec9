"""Times to come back that refused requests were told, and what that is worth when they come. Pure.

Who was told to come back stands in the line of those who wait, as it were: newcomers go behind it, and what it will
take counts for them, from when their turn would be until shortly after its time, by the share of promises that are kept
of late. Nothing is kept free longer than that, and where nobody comes back newcomers are not held up at all.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Any

from scheduler.core.placements import Owner
from scheduler.core.waiting import Order

#: A promise counts for this long after its time: nobody comes back to the millisecond, and HTTP says whole seconds.
GRACE_US = 1_500_000
#: Who comes this much before its time has kept it.
EARLY_US = 50_000
#: Weight of one promise, kept or not, in the share of those that are kept.
KEPT_WEIGHT = 0.2
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
    mark: bytes = b""  # of its prompt: who comes again may have another id
    order: Order = (0, 0)  # in which it will stand in line
    start_us: int = 0  # virtual, of the next one of its tenant


@dataclass(frozen=True, slots=True)
class Ahead:
    """Work promised to those before somebody in the order, by when they are to come. Microseconds, absolute times."""

    now_us: int
    due_us: tuple[int, ...]  # sorted
    work_us: tuple[int, ...]  # of all up to each

    def work_before_us(self, delay_us: int) -> int:
        """Of those who come before somebody whose turn is after a delay, or so soon after that it is worth waiting."""
        count = bisect_right(self.due_us, self.now_us + delay_us + GRACE_US)
        return self.work_us[count - 1] if count else 0


@dataclass(slots=True)
class PromiseBook:
    """Promises by owner, instance and prompt; of more than `promises_max` the one made first is forgotten."""

    promises_max: int
    promises: dict[Owner, Promise] = field(default_factory=dict)
    #: Instance -> owners of promises to decode there, in the order in which they were made.
    on: dict[str, dict[Owner, None]] = field(default_factory=dict)
    #: (model, tenant, mark of the prompt) -> owners, in the order in which they were made.
    marks: dict[tuple[str, str, bytes], dict[Owner, None]] = field(default_factory=dict)
    #: Of those who were told to come back, who came when they were told to; of late.
    kept_share: float = 0.0

    def note(self, promise: Promise) -> None:
        self.drop(promise.owner)
        if len(self.promises) >= self.promises_max:
            self.drop(next(iter(self.promises)))
        self.promises[promise.owner] = promise
        self.on.setdefault(promise.decode_id, {})[promise.owner] = None
        self.marks.setdefault(_marked(promise), {})[promise.owner] = None

    def drop(self, owner: Owner) -> None:
        promise = self.promises.pop(owner, None)
        if promise is None:
            return
        _discard(self.on, promise.decode_id, owner)
        _discard(self.marks, _marked(promise), owner)

    def came(self, owner: Owner, model: str, tenant: str, mark: bytes, now_us: int) -> Promise | None:
        """Ends the promise to a request that has come, by its id or by its prompt.

        Returns: the promise if it has come when it was told to.
        """
        while self.promises:
            first = next(iter(self.promises.values()))
            if first.due_us + GRACE_US >= now_us:
                break
            self.drop(first.owner)
            self.kept_share -= KEPT_WEIGHT * self.kept_share
        if owner not in self.promises:
            # Others may ask the same: only a promise whose time has come is taken for this one's.
            alike = (o for o in self.marks.get((model, tenant, mark), ()) if self._is_due(o, now_us))
            owner = next(alike, owner)
        promise = self.promises.get(owner)
        self.drop(owner)
        if promise is None or promise.model != model or promise.tenant != tenant:
            return None
        if not promise.due_us - EARLY_US <= now_us <= promise.due_us + GRACE_US:
            return None
        self.kept_share += KEPT_WEIGHT * (1.0 - self.kept_share)
        return promise

    def _is_due(self, owner: Owner, now_us: int) -> bool:
        return self.promises[owner].due_us - EARLY_US <= now_us

    def start_us(self, model: str, tenant: str, start_us: int, now_us: int) -> int:
        """Virtual start of a newcomer: behind what its tenant was promised, as far as that is kept."""
        last_us = start_us
        for promise in self.promises.values():
            if promise.model == model and promise.tenant == tenant and promise.due_us + GRACE_US >= now_us:
                last_us = max(last_us, promise.start_us)
        return start_us + int(self.kept_share * (last_us - start_us))

    def ahead(self, model: str, order: Order, now_us: int) -> Ahead | None:
        """What was promised to those before a place in the order; None if nothing."""
        those = [
            (p.due_us, p.service_us)
            for p in self.promises.values()
            if p.order < order and p.model == model and p.due_us + GRACE_US >= now_us
        ]
        if not those:
            return None
        those.sort()
        works, work_us = [], 0
        for _, service_us in those:
            work_us += service_us
            works.append(int(self.kept_share * work_us))
        return Ahead(now_us, tuple(due_us for due_us, _ in those), tuple(works))

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
        assert len(self.promises) <= self.promises_max and 0.0 <= self.kept_share <= 1.0
        for owner, promise in self.promises.items():
            assert owner == promise.owner
            assert owner in self.on[promise.decode_id] and owner in self.marks[_marked(promise)]
        for index in (self.on, self.marks):
            assert all(index.values())
            assert sum(len(owners) for owners in index.values()) == len(self.promises)


def _marked(promise: Promise) -> tuple[str, str, bytes]:
    return promise.model, promise.tenant, promise.mark


def _discard(index: dict[Any, dict[Owner, None]], key: Any, owner: Owner) -> None:
    owners = index[key]
    del owners[owner]
    if not owners:
        del index[key]
