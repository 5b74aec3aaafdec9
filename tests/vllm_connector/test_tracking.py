"""What a step loads and stores, over the life of requests: scripts with blocks of 4 tokens."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engines.vllm.plans import Transfer
from engines.vllm.prefixes import GroupShape
from engines.vllm.tracking import RequestTracker


def hashes(count: int) -> list[bytes]:
    return [bytes([i + 1]) * 32 for i in range(count)]


class Made:
    """A tracker over a pool that has the first `there` blocks."""

    def __init__(self, there: int = 0, shapes: tuple[GroupShape, ...] = (GroupShape(0, 4),), save: bool = True) -> None:
        self.there = there
        self.tracker = RequestTracker(shapes, 4, self.lookup, save=save)

    def lookup(self, group: int, keys: NDArray[np.uint8]) -> NDArray[np.bool_]:
        return keys[:, 0] <= self.there


def moved(transfer: Transfer | None) -> list[tuple[int, int]]:
    """(first byte of the key, engine block) of each block."""
    if transfer is None:
        return []
    return [(part.keys[16 * i], b) for part in transfer.blocks for i, b in enumerate(part.block_ids)]


def test_one_token_is_left_to_compute() -> None:
    made = Made(there=4)
    assert made.tracker.match(hashes(4), 16, 0) == 12
    assert made.tracker.match(hashes(4), 17, 0) == 16
    assert made.tracker.match(hashes(4), 17, 8) == 8
    assert made.tracker.match(hashes(4), 17, 16) == 0
    assert made.tracker.match(hashes(0), 1, 0) == 0
    assert Made(there=0).tracker.match(hashes(4), 17, 0) == 0


def test_what_was_loaded_is_not_stored_again() -> None:
    made = Made(there=2)
    made.tracker.allocated("r", hashes(4), 0, 8, [[11, 12, 13, 14, 15]])
    assert [moved(load) for load in made.tracker.take_loads()] == [[(1, 11), (2, 12)]]
    assert made.tracker.take_loads() == []
    step = made.tracker.scheduled("r", hashes(4), 8, 17, [[11, 12, 13, 14, 15]])
    assert moved(step) == [(3, 13), (4, 14)]
    # Decoding: the fifth block is full and hashed three tokens later.
    assert made.tracker.scheduled("r", hashes(4), 17, 18, [[11, 12, 13, 14, 15]]) is None
    assert moved(made.tracker.scheduled("r", hashes(5), 19, 20, [[11, 12, 13, 14, 15]])) == [(5, 15)]


def test_blocks_of_tokens_not_known_yet_wait() -> None:
    made = Made()
    made.tracker.allocated("r", hashes(1), 0, 0, [[11, 12]])
    assert moved(made.tracker.scheduled("r", hashes(1), 0, 8, [[11, 12]])) == [(1, 11)]  # 4 drafts among them
    assert moved(made.tracker.scheduled("r", hashes(2), 5, 9, [[11, 12, 13]])) == [(2, 12)]


def test_what_was_given_up_is_stored_again() -> None:
    made = Made(there=2)
    made.tracker.allocated("r", hashes(3), 0, 8, [[11, 12, 13]])
    made.tracker.take_loads()
    assert moved(made.tracker.scheduled("r", hashes(3), 8, 12, [[11, 12, 13]])) == [(3, 13)]
    # The load had failed: the request is back at its beginning.
    assert moved(made.tracker.scheduled("r", hashes(3), 0, 12, [[11, 12, 13]])) == [(1, 11), (2, 12), (3, 13)]


def test_a_window_is_loaded_behind_the_prefix_only() -> None:
    made = Made(there=4, shapes=(GroupShape(0, 4), GroupShape(1, 4, window_tokens=5)))
    made.tracker.allocated("r", hashes(4), 0, 16, [[11, 12, 13, 14], [0, 0, 23, 24]])
    (load,) = made.tracker.take_loads()
    assert moved(load) == [(1, 11), (2, 12), (3, 13), (4, 14), (4, 24)]


def test_nothing_is_kept_of_ended_requests() -> None:
    made = Made(there=2)
    made.tracker.allocated("r", hashes(2), 0, 4, [[11, 12]])
    made.tracker.forget("r")
    made.tracker.forget("r")
    assert len(made.tracker) == 0 and made.tracker.take_loads() == []
    assert made.tracker.scheduled("r", hashes(2), 4, 8, [[11, 12]]) is None


def test_without_saving() -> None:
    made = Made(save=False)
    made.tracker.allocated("r", hashes(2), 0, 0, [[11, 12]])
    assert made.tracker.scheduled("r", hashes(2), 0, 8, [[11, 12]]) is None


def test_renamed_keys_are_others() -> None:
    made = Made(there=4)
    made.tracker.rename(bytes([0x80] * 16))
    assert made.tracker.match(hashes(4), 17, 0) == 0
    made.tracker.allocated("r", hashes(4), 0, 0, [[11]])
    assert moved(made.tracker.scheduled("r", hashes(4), 0, 4, [[11]])) == [(0x81, 11)]
