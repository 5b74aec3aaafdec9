"""Prompts being prefilled: blocks that are not there yet, but will be, and that others may wait for. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from kvpool.core.ids import KEY_BYTES
from scheduler.core.placements import Owner

#: Prompts compared with one request at most, those placed last first.
COMPARED_MAX = 16
#: How long after its prefill a prompt's blocks may be unknown to the directory.
GRACE_US = 500_000


@dataclass(slots=True)
class PendingPrompt:
    """The full blocks of one prompt under way on an instance."""

    owner: Owner
    instance_id: str
    keys: bytes  # packed, of the first key list; chained: one equal key is an equal prefix
    placed_us: int
    ends_us: int  # predicted
    done_us: int | None = None  # when the prefill was reported finished

    @property
    def blocks(self) -> int:
        return len(self.keys) // KEY_BYTES

    def overdue(self, now_us: int) -> bool:
        """Whether it takes so long that nobody should count on it."""
        return self.done_us is None and now_us - self.placed_us > 2 * (self.ends_us - self.placed_us) + GRACE_US

    def left_us(self, now_us: int) -> int:
        """Until its blocks are there; zero once its prefill is finished."""
        return 0 if self.done_us is not None else max(self.ends_us - now_us, 1)


@dataclass(slots=True)
class PendingBook:
    """Prompts under way, found by any request that shares a prefix with them; at most `prompts_max`, then no more.

    Keys are chained, so it is enough to index a prompt by its 1st, 2nd, 4th, 8th ... key: the longest of these that
    two prompts share gives their common prefix within a factor of two, and bisection the rest.
    """

    prompts_max: int
    prompts: dict[Owner, PendingPrompt] = field(default_factory=dict)
    marks: dict[bytes, dict[Owner, None]] = field(default_factory=dict)
    #: Finished ones, the earliest first.
    done: dict[Owner, None] = field(default_factory=dict)

    def open(self, prompt: PendingPrompt, now_us: int) -> None:
        self._forget_done(now_us)
        if len(self.prompts) >= self.prompts_max or not prompt.keys:
            return
        self.drop(prompt.owner)
        self.prompts[prompt.owner] = prompt
        for key in _marks(prompt.keys):
            self.marks.setdefault(key, {})[prompt.owner] = None

    def finish(self, owner: Owner, now_us: int) -> None:
        """Its prefill is over. It is kept until the directory must know its blocks."""
        prompt = self.prompts.get(owner)
        if prompt is not None and prompt.done_us is None:
            prompt.done_us = now_us
            self.done[owner] = None

    def drop(self, owner: Owner) -> None:
        prompt = self.prompts.pop(owner, None)
        if prompt is None:
            return
        self.done.pop(owner, None)
        for key in _marks(prompt.keys):
            owners = self.marks[key]
            del owners[owner]
            if not owners:
                del self.marks[key]

    def drop_instance(self, instance_id: str) -> None:
        for owner in [o for o, p in self.prompts.items() if p.instance_id == instance_id]:
            self.drop(owner)

    def _forget_done(self, now_us: int) -> None:
        while self.done:
            owner = next(iter(self.done))
            done_us = self.prompts[owner].done_us
            assert done_us is not None
            if now_us - done_us <= GRACE_US:
                return
            self.drop(owner)

    def find(self, keys: bytes, now_us: int) -> list[tuple[PendingPrompt, int]]:
        """Prompts that share a prefix with `keys`, with the number of blocks shared: the longest for each instance.

        The longest come first, and of equal ones those that are done first.

        Cost: O(log blocks) look-ups, and as many comparisons for each of at most `COMPARED_MAX` prompts.
        """
        best: dict[str, tuple[PendingPrompt, int]] = {}
        if not self.prompts:
            return []
        self._compare(keys, now_us, best)
        return sorted(best.values(), key=lambda pair: (-pair[1], pair[0].left_us(now_us), pair[0].owner))

    def _compare(self, keys: bytes, now_us: int, best: dict[str, tuple[PendingPrompt, int]]) -> None:
        seen: dict[Owner, None] = {}
        for key in reversed(list(_marks(keys))):
            for owner in reversed(self.marks.get(key, {})):
                if len(seen) >= COMPARED_MAX:
                    return
                prompt = self.prompts[owner]
                if owner not in seen and self._usable(prompt, now_us):
                    shared = shared_blocks(keys, prompt.keys)
                    known = best.get(prompt.instance_id)
                    if known is None or (known[1], -known[0].left_us(now_us)) < (shared, -prompt.left_us(now_us)):
                        best[prompt.instance_id] = prompt, shared
                seen[owner] = None

    @staticmethod
    def _usable(prompt: PendingPrompt, now_us: int) -> bool:
        if prompt.done_us is not None:
            return now_us - prompt.done_us <= GRACE_US
        return not prompt.overdue(now_us)

    def check_invariants(self) -> None:
        assert len(self.prompts) <= self.prompts_max
        marks: dict[bytes, list[Owner]] = {}
        for owner, prompt in self.prompts.items():
            assert owner == prompt.owner and prompt.keys
            assert (prompt.done_us is not None) == (owner in self.done)
            for key in _marks(prompt.keys):
                marks.setdefault(key, []).append(owner)
        assert {key: sorted(owners) for key, owners in self.marks.items()} == {k: sorted(o) for k, o in marks.items()}


def _marks(keys: bytes) -> Iterator[bytes]:
    """The 1st, 2nd, 4th, 8th ... key."""
    at = 1
    while at * KEY_BYTES <= len(keys):
        yield keys[(at - 1) * KEY_BYTES : at * KEY_BYTES]
        at *= 2


def shared_blocks(a: bytes, b: bytes) -> int:
    """Leading keys that two packed chains have in common, by bisection."""
    low, high = 0, min(len(a), len(b)) // KEY_BYTES
    while low < high:
        middle = (low + high + 1) // 2
        at = (middle - 1) * KEY_BYTES
        if a[at : at + KEY_BYTES] == b[at : at + KEY_BYTES]:
            low = middle
        else:
            high = middle - 1
    return low
