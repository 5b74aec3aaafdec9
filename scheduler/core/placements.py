"""Placements under way and what each holds: KV tokens on instances and a place in a prefill queue. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from scheduler.core.arrivals import Rate

#: Gateway and request: who owns a placement. Each has an expiry as well.
Owner: TypeAlias = tuple[str, str]
#: An interval that is predicted to be below this share of a TPOT objective does it no harm.
HARMLESS = 0.85


@dataclass(slots=True)
class Placement:
    """One request on its way, from the decision until exactly one of the ENDINGS."""

    owner: Owner
    model: str
    max_tokens: int
    prefill_id: str
    decode_id: str
    split: bool
    kv_tokens: int  # held on the decode instance: prompt and max_tokens in whole blocks
    prefill_kv_tokens: int  # used on the prefill instance of a split until its prefill ends
    prefill_holds: bool  # whether these are held there: only where others decode; elsewhere prefills wait their turn
    prefill_us: int  # predicted
    context_tokens: int  # in the decode batch, on average: prompt and half of what is expected to be generated
    expected_tokens: int  # to be generated
    placed_us: int
    decode_ends_us: int  # predicted
    expires_us: int
    prefill_done: bool = False
    prefill_ends_us: int = 0  # predicted; that is when it begins to decode
    #: Prefill work of others that may hold up its decode before its TPOT objective is missed; None = it has none.
    stall_us_max: int | None = None
    stall_us: int = 0  # placed so far
    tpot_slo_us: int = 0
    interval_us: int = 0  # between two tokens of those who decode where it is computed, at most
    pulls: tuple[str, ...] = ()  # sources that blocks are pulled from
    pull_ends_us: int = 0  # predicted
    pull_us: int = 0  # predicted
    prompt_tokens: int = 0
    cached_tokens: int = 0  # predicted
    #: Predicted TTFT before its correction, in parts, and all of it as it was announced.
    waited_us: int = 0
    queue_us: int = 0
    announced_us: int = 0
    handoff_guessed: bool = False  # as in Option
    compared: bool = False  # whether the prediction was compared with what happened
    peer: str = ""  # scheduler that made it; empty = this one

    def stalled_us(self, prefill_us: int, interval_us: int) -> int:
        """What a prefill that makes such intervals takes of what this decode may be held up.

        An objective is broken by intervals that are longer than it: a prompt computed in short steps takes nothing.
        Below the objective it is less and less, since the intervals are predicted.
        """
        share = (interval_us / max(self.tpot_slo_us, 1) - HARMLESS) / (1.0 - HARMLESS)
        return int(prefill_us * min(max(share, 0.0), 1.0))

    def earned_us(self, at_us: int, step_us: int, stall_share: float) -> float:
        """By how much an answer that still comes then may have been held up, if that was its last token.

        Args:
            step_us: a decode step there, as it is now.
            stall_share: of the time that an objective leaves, which prefills may take.
        """
        if not self.prefill_done or step_us <= 0:
            return 0.0
        decoded_us = max(at_us - self.prefill_ends_us - self.stall_us, 0)
        return stall_share * max(self.tpot_slo_us - step_us, 0) / step_us * decoded_us


@dataclass(slots=True)
class Holdings:
    """What placements hold on one instance. Kept as running totals; `check_invariants` recounts them."""

    #: Prefills placed and not reported finished, in order of placement, with their predicted time.
    queue: dict[Owner, int] = field(default_factory=dict)
    queue_us: int = 0
    #: Since when the first of the queue is taken to be computed.
    head_since_us: int = 0
    #: Placements that decode here or will.
    decoding: dict[Owner, None] = field(default_factory=dict)
    kv_tokens: int = 0
    #: Used by prefills without being held.
    kv_tokens_passing: int = 0
    context_tokens: int = 0
    expected_tokens: int = 0

    def queue_left_us(self, now_us: int) -> int:
        """Predicted prefill work outstanding, less what the first of the queue has had already."""
        if not self.queue:
            return 0
        head_us = self.queue[next(iter(self.queue))]
        return self.queue_us - min(max(now_us - self.head_since_us, 0), head_us)


#: Of instances that nothing was placed on, and of sources that nobody pulls from; to be read only.
_NOTHING = Holdings()
_NOBODY: dict[Owner, int] = {}


@dataclass(slots=True)
class PlacementBook:
    """All placements, by owner, by gateway and by instance."""

    placements: dict[Owner, Placement] = field(default_factory=dict)
    by_gateway: dict[str, dict[Owner, None]] = field(default_factory=dict)
    holdings: dict[str, Holdings] = field(default_factory=dict)
    #: Source -> placements that pull from it, with the predicted end of that.
    pulls: dict[str, dict[Owner, int]] = field(default_factory=dict)
    #: Those that try links which nobody has measured.
    guessed: dict[Owner, None] = field(default_factory=dict)
    #: Instances that have got free for something, and prefills that are over, since `take_news`.
    freed: dict[str, None] = field(default_factory=dict)
    finished: dict[Owner, None] = field(default_factory=dict)
    #: Instance -> microseconds of prefill a second, of late, that hold up those who decode there.
    stalling: dict[str, Rate] = field(default_factory=dict)
    #: Instances whose holdings have changed since somebody looked: columns made of them are stale.
    touched: dict[str, None] = field(default_factory=dict)

    def on(self, instance_id: str) -> Holdings:
        """What is held on an instance; empty for one that nothing was placed on."""
        return self.holdings.get(instance_id) or _NOTHING

    def open(self, placement: Placement) -> None:
        owner = placement.owner
        self.touched[placement.prefill_id] = self.touched[placement.decode_id] = None
        assert owner not in self.placements, f"{owner} is placed already"
        self.placements[owner] = placement
        self.by_gateway.setdefault(owner[0], {})[owner] = None
        target = self.holdings.setdefault(placement.decode_id, Holdings())
        target.decoding[owner] = None
        target.kv_tokens += placement.kv_tokens
        target.context_tokens += placement.context_tokens
        target.expected_tokens += placement.expected_tokens
        source = self.holdings.setdefault(placement.prefill_id, Holdings())
        if not source.queue:
            source.head_since_us = placement.placed_us
        source.queue[owner] = placement.prefill_us
        source.queue_us += placement.prefill_us
        _use(source, placement, placement.prefill_kv_tokens)
        stalled_us = placement.stalled_us(placement.prefill_us, placement.interval_us)
        if stalled_us and placement.tpot_slo_us:
            self.stalling.setdefault(placement.prefill_id, Rate()).add(stalled_us, placement.placed_us)
        for other in self.stalled_by(placement.prefill_id, placement.prefill_ends_us):
            if other is not placement:
                other.stall_us += other.stalled_us(placement.prefill_us, placement.interval_us)
        for source_id in placement.pulls:
            self.pulls.setdefault(source_id, {})[owner] = placement.pull_ends_us
        if placement.handoff_guessed:
            self.guessed[owner] = None

    def finish_prefill(self, owner: Owner, now_us: int) -> None:
        """Takes a prefill out of its queue. Does nothing if that happened before or the placement has ended."""
        placement = self.placements.get(owner)
        if placement is None or placement.prefill_done:
            return
        placement.prefill_done = True
        self.freed[placement.prefill_id] = self.touched[placement.prefill_id] = None
        self.finished[owner] = None
        for source_id in placement.pulls:
            of_source = self.pulls[source_id]
            del of_source[owner]
            if not of_source:
                del self.pulls[source_id]
        source = self.holdings[placement.prefill_id]
        if owner == next(iter(source.queue)):
            source.head_since_us = now_us
        del source.queue[owner]
        source.queue_us -= placement.prefill_us
        _use(source, placement, -placement.prefill_kv_tokens)
        self._drop_if_empty(placement.prefill_id)

    def end(self, owner: Owner, now_us: int) -> Placement | None:
        """Frees whatever a placement holds; None if there is none."""
        placement = self.placements.get(owner)
        if placement is None:
            return None
        self.finish_prefill(owner, now_us)
        self.freed[placement.decode_id] = self.touched[placement.decode_id] = None
        del self.placements[owner]
        self.guessed.pop(owner, None)
        of_gateway = self.by_gateway[owner[0]]
        del of_gateway[owner]
        if not of_gateway:
            del self.by_gateway[owner[0]]
        target = self.holdings[placement.decode_id]
        del target.decoding[owner]
        target.kv_tokens -= placement.kv_tokens
        target.context_tokens -= placement.context_tokens
        target.expected_tokens -= placement.expected_tokens
        self._drop_if_empty(placement.decode_id)
        return placement

    def _drop_if_empty(self, instance_id: str) -> None:
        holdings = self.holdings.get(instance_id)
        if holdings is not None and not holdings.queue and not holdings.decoding:
            del self.holdings[instance_id]

    def stalled_by(self, instance_id: str, prefill_ends_us: int) -> Iterator[Placement]:
        """Placements that decode on an instance, by prediction, before a prefill there has ended."""
        for owner in self.on(instance_id).decoding:
            placement = self.placements[owner]
            if placement.prefill_ends_us < prefill_ends_us:
                yield placement

    def take_news(self) -> tuple[list[str], list[Owner]]:
        """Instances that have got free for something, and prefills that are over, since the last call."""
        freed, finished = list(self.freed), list(self.finished)
        self.freed.clear()
        self.finished.clear()
        return freed, finished

    def pulling(self, source_id: str, now_us: int) -> int:
        """Transfers from a source that are predicted to be under way."""
        count = 0
        for ends_us in self.pulls.get(source_id, _NOBODY).values():
            count += ends_us > now_us
        return count

    def pulls_between(self, instance_id: str, source_id: str) -> bool:
        """Whether a placement on an instance pulls from a source."""
        of_source = self.pulls.get(source_id)
        return of_source is not None and any(self.placements[owner].prefill_id == instance_id for owner in of_source)

    def of_gateway(self, gateway_id: str) -> tuple[Owner, ...]:
        return tuple(self.by_gateway.get(gateway_id, ()))

    def queued_on(self, instance_id: str) -> tuple[Owner, ...]:
        return tuple(self.on(instance_id).queue)

    def decoding_on(self, instance_id: str) -> tuple[Owner, ...]:
        return tuple(self.on(instance_id).decoding)

    def decoding_until(self, instance_id: str, at_us: int) -> Iterator[Placement]:
        """Placements on an instance that are predicted to decode still at `at_us`."""
        for owner in self.on(instance_id).decoding:
            placement = self.placements[owner]
            if placement.decode_ends_us > at_us:
                yield placement

    def kv_tokens_settled(self, instance_id: str, placed_until_us: int) -> int:
        """KV tokens used on an instance by placements made at `placed_until_us` or before."""
        holdings = self.on(instance_id)
        total = 0
        for owner in holdings.decoding:
            placement = self.placements[owner]
            if placement.placed_us <= placed_until_us:
                total += placement.kv_tokens
        for owner in holdings.queue:
            placement = self.placements[owner]
            if placement.placed_us <= placed_until_us:
                total += placement.prefill_kv_tokens
        return total

    def kv_tokens_total(self) -> int:
        return sum(h.kv_tokens for h in self.holdings.values())

    def check_invariants(self) -> None:
        recount: dict[str, Holdings] = {}
        pulls: dict[str, dict[Owner, int]] = {}
        for owner, p in self.placements.items():
            assert owner == p.owner
            assert owner in self.by_gateway[owner[0]]
            target = recount.setdefault(p.decode_id, Holdings())
            target.decoding[owner] = None
            target.kv_tokens += p.kv_tokens
            target.context_tokens += p.context_tokens
            target.expected_tokens += p.expected_tokens
            if not p.prefill_done:
                source = recount.setdefault(p.prefill_id, Holdings())
                source.queue[owner] = p.prefill_us
                source.queue_us += p.prefill_us
                _use(source, p, p.prefill_kv_tokens)
                for source_id in p.pulls:
                    pulls.setdefault(source_id, {})[owner] = p.pull_ends_us
        assert list(self.guessed) == [owner for owner, p in self.placements.items() if p.handoff_guessed]
        assert pulls == self.pulls and not _NOBODY and Holdings() == _NOTHING
        assert sum(len(owners) for owners in self.by_gateway.values()) == len(self.placements)
        assert recount.keys() == self.holdings.keys()
        for instance_id, holdings in self.holdings.items():
            recount[instance_id].head_since_us = holdings.head_since_us
            assert recount[instance_id] == holdings, f"holdings of {instance_id} are off"
            assert list(recount[instance_id].decoding) == list(holdings.decoding)


def _use(holdings: Holdings, placement: Placement, kv_tokens: int) -> None:
    """Adds to what a prefill uses where it is computed."""
    if placement.prefill_holds:
        holdings.kv_tokens += kv_tokens
    else:
        holdings.kv_tokens_passing += kv_tokens
