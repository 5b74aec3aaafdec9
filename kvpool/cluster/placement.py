"""Where copies of blocks go: weighted rendezvous hashing. Every client that sees the same nodes ranks them alike, and a
node that comes or goes moves only the blocks that are ranked to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvpool.core.ids import KeyArray

#: A full cache is not a bad place: it evicts. Each node counts for this part of its size, however full.
FULL_WEIGHT = 0.05

_A, _B = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


@dataclass(frozen=True, slots=True)
class Place:
    """A node as placement sees it."""

    source_id: str
    host_id: str
    bytes_total: int
    bytes_used: int

    @property
    def weight(self) -> float:
        free = max(self.bytes_total - self.bytes_used, 0)
        return free + FULL_WEIGHT * self.bytes_total + 1.0


def rank(keys: KeyArray, places: Sequence[Place]) -> NDArray[np.int64]:
    """Places for each key, best first: int64 (keys, places).

    Each place is first for its share of the keys, by weight. Ties go by the order of `places`.
    Cost: O(keys x places).
    """
    words = np.ascontiguousarray(keys).view(np.uint64).reshape(-1, 2)
    scores = np.empty((len(words), len(places)), dtype=np.float64)
    for column, place in enumerate(places):
        seed = np.uint64(xxhash.xxh3_64_intdigest(place.source_id.encode()))
        mixed = _mix(_mix(words[:, 0] ^ seed) ^ words[:, 1])
        # Uniform in (0, 1), never its ends; -weight / log(u) is the highest with the probability of the weight's share.
        uniform = ((mixed >> np.uint64(11)).astype(np.float64) + 0.5) / float(1 << 53)
        scores[:, column] = -place.weight / np.log(uniform)
    return np.argsort(-scores, axis=1, kind="stable")


def choose(order: Sequence[int], hosts: Sequence[str], taken: Sequence[int], count: int) -> list[int]:
    """The next `count` places for copies of something, each on a host of its own as long as there are any.

    Args:
        order: places that are left to choose from, best first.
        hosts: of each place.
        taken: places that have a copy already.
    """
    used = {hosts[place] for place in taken}
    chosen: list[int] = []
    left = list(order)
    while left and len(chosen) < count:
        pick = next((place for place in left if hosts[place] not in used), left[0])
        left.remove(pick)
        chosen.append(pick)
        used.add(hosts[pick])
    return chosen


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finalizer."""
    x = (x ^ (x >> np.uint64(30))) * _A
    x = (x ^ (x >> np.uint64(27))) * _B
    return x ^ (x >> np.uint64(31))
