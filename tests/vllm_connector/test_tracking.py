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

    def __init__(
        self, there: int = 0, shapes: tuple[GroupShape, ...] = (GroupShape(0, 4),), save: bool = True,
        kept: tuple[int, ...] | None = None,
    ) -> None:  # fmt: skip
        """Args: kept: of each group, how many blocks of its hashes the pool still has."""
        self.there, self.kept = there, kept
        keeps = None if kept is None else self.keeps
        self.tracker = RequestTracker(shapes, 4, self.lookup, mask=bytes(16), save=save, keeps=keeps)

    def scheduled(
        self, known: int, before: int, after: int, block_ids: list[list[int]] | None, room: int = 99
    ) -> Transfer | None:
        return self.tracker.scheduled("r", hashes(known), before, after, lambda: block_ids, room)

    def lookup(self, group: int, keys: NDArray[np.uint8]) -> NDArray[np.bool_]:
        return keys[:, 0] <= self.there

    def keeps(self, group: int, keys: NDArray[np.uint8]) -> NDArray[np.bool_]:
        assert self.kept is not None
        return keys[:, 0] <= self.kept[group]


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
    step = made.scheduled(4, 8, 17, [[11, 12, 13, 14, 15]])
    assert moved(step) == [(3, 13), (4, 14)]
    # Decoding: the fifth block is full and hashed three tokens later.
    assert made.scheduled(4, 17, 18, [[11, 12, 13, 14, 15]]) is None
    assert moved(made.scheduled(5, 19, 20, [[11, 12, 13, 14, 15]])) == [(5, 15)]


def test_blocks_of_tokens_not_known_yet_wait() -> None:
    made = Made()
    made.tracker.allocated("r", hashes(1), 0, 0, [[11, 12]])
    assert moved(made.scheduled(1, 0, 8, [[11, 12]])) == [(1, 11)]  # 4 drafts among them
    assert moved(made.scheduled(2, 5, 9, [[11, 12, 13]])) == [(2, 12)]


def test_what_was_given_up_is_stored_again() -> None:
    made = Made(there=2)
    made.tracker.allocated("r", hashes(3), 0, 8, [[11, 12, 13]])
    made.tracker.take_loads()
    assert moved(made.scheduled(3, 8, 12, [[11, 12, 13]])) == [(3, 13)]
    # The load had failed: the request is back at its beginning.
    assert moved(made.scheduled(3, 0, 12, [[11, 12, 13]])) == [(1, 11), (2, 12), (3, 13)]


def test_a_window_is_loaded_behind_the_prefix_only() -> None:
    made = Made(there=4, shapes=(GroupShape(0, 4), GroupShape(1, 4, window_tokens=5)))
    made.tracker.allocated("r", hashes(4), 0, 16, [[11, 12, 13, 14], [0, 0, 23, 24]])
    (load,) = made.tracker.take_loads()
    assert moved(load) == [(1, 11), (2, 12), (3, 13), (4, 14), (4, 24)]


def test_what_is_hashed_but_not_computed_is_not_stored() -> None:
    made = Made()
    made.tracker.allocated("r", hashes(4), 0, 0, [[11, 12, 13, 14]])
    assert moved(made.scheduled(4, 0, 8, [[11, 12, 13, 14]])) == [(1, 11), (2, 12)]
    assert moved(made.scheduled(4, 8, 16, [[11, 12, 13, 14]])) == [(3, 13), (4, 14)]


def test_blocks_that_a_window_has_let_go_are_not_stored() -> None:
    made = Made(shapes=(GroupShape(0, 4), GroupShape(1, 4, window_tokens=5)))
    made.tracker.allocated("r", hashes(4), 0, 0, [[11, 12, 13, 14], [0, 0, 23, 24]])
    step = made.scheduled(4, 0, 16, [[11, 12, 13, 14], [0, 0, 23, 24]])
    assert moved(step) == [(1, 11), (2, 12), (3, 13), (4, 14), (3, 23), (4, 24)]


def test_nothing_is_kept_of_ended_requests() -> None:
    made = Made(there=2)
    made.tracker.allocated("r", hashes(2), 0, 4, [[11, 12]])
    made.tracker.forget("r")
    made.tracker.forget("r")
    assert len(made.tracker) == 0 and made.tracker.take_loads() == []
    assert made.scheduled(2, 4, 8, [[11, 12]]) is None


def test_without_saving() -> None:
    made = Made(save=False)
    made.tracker.allocated("r", hashes(2), 0, 0, [[11, 12]])
    assert made.scheduled(2, 0, 8, [[11, 12]]) is None


def test_under_another_mask_keys_are_others() -> None:
    made = Made(there=4)
    made.tracker.mask_with(bytes([0x80] * 16))
    assert made.tracker.mask == bytes([0x80] * 16) and made.tracker.match(hashes(4), 17, 0) == 0
    made.tracker.allocated("r", hashes(4), 0, 0, [[11]])
    assert moved(made.scheduled(4, 0, 4, [[11]])) == [(0x81, 11)]


def test_requests_of_before_another_mask_are_not_stored() -> None:
    made = Made(there=2)
    made.tracker.allocated("r", hashes(4), 0, 8, [[11, 12, 13]])
    made.tracker.mask_with(bytes([0x80] * 16))
    assert made.tracker.take_loads() == [] and made.scheduled(4, 8, 12, [[11, 12, 13]]) is None


def test_what_has_no_room_is_stored_later() -> None:
    made = Made()
    made.tracker.allocated("r", hashes(5), 0, 0, [[11, 12, 13, 14, 15]])
    assert moved(made.scheduled(5, 0, 20, [[11, 12, 13, 14, 15]], room=2)) == [(1, 11), (2, 12)]
    assert made.scheduled(5, 20, 21, [[11, 12, 13, 14, 15]], room=0) is None
    assert moved(made.scheduled(5, 21, 22, [[11, 12, 13, 14, 15]], room=2)) == [(3, 13), (4, 14)]
    assert made.tracker.forget("r") == 16


def test_what_was_not_stored_is_stored_later() -> None:
    made = Made()
    made.tracker.allocated("r", hashes(5), 0, 0, [[11, 12, 13, 14, 15]])
    made.scheduled(5, 0, 8, [[11, 12, 13, 14, 15]])
    second = made.scheduled(5, 8, 16, [[11, 12, 13, 14, 15]])
    assert second is not None
    made.tracker.not_stored(second)
    made.tracker.not_stored(Transfer("gone", (), 0))
    assert moved(made.scheduled(5, 16, 20, [[11, 12, 13, 14, 15]])) == [(3, 13), (4, 14), (5, 15)]


def test_block_ids_are_asked_for_only_when_a_block_is_full() -> None:
    made = Made()
    made.tracker.allocated("r", hashes(2), 0, 0, [[11, 12]])

    def never() -> list[list[int]]:
        raise AssertionError("asked for")

    assert made.tracker.scheduled("r", hashes(1), 3, 4, lambda: [[11]], 9) is not None
    for before in (4, 5, 6):
        assert made.tracker.scheduled("r", hashes(1), before, before + 1, never, 9) is None
    assert made.scheduled(2, 7, 8, None) is None  # its blocks are gone


def test_a_block_that_is_hashed_after_its_step_is_stored_then() -> None:
    made = Made()
    made.tracker.allocated("r", hashes(1), 0, 0, [[11, 12]])
    assert moved(made.scheduled(1, 0, 8, [[11, 12]])) == [(1, 11)]
    assert moved(made.scheduled(2, 8, 9, [[11, 12]])) == [(2, 12)]


def test_a_block_that_vllm_does_not_list_yet_is_stored_later() -> None:
    made = Made(shapes=(GroupShape(0, 4), GroupShape(1, 4, window_tokens=5)))
    made.tracker.allocated("r", hashes(4), 0, 0, [[11, 12, 13], [21, 22]])
    assert moved(made.scheduled(4, 0, 16, [[11, 12, 13], [21, 22]])) == [(1, 11), (2, 12), (1, 21), (2, 22)]
    assert made.scheduled(4, 16, 17, [[11, 12, 13], [21, 22]]) is None
    ids = [[11, 12, 13, 14], [0, 22, 23, 24]]
    assert moved(made.scheduled(4, 17, 18, ids)) == [(3, 13), (4, 14), (3, 23), (4, 24)]


def test_of_several_steps_that_were_not_stored_the_first_counts() -> None:
    made = Made()
    made.tracker.allocated("r", hashes(4), 0, 0, [[11, 12, 13, 14]])
    steps = [made.scheduled(4, before, before + 8, [[11, 12, 13, 14]]) for before in (0, 8)]
    for step in steps:
        assert step is not None
        made.tracker.not_stored(step)
    assert moved(made.scheduled(4, 16, 17, [[11, 12, 13, 14]])) == [(1, 11), (2, 12), (3, 13), (4, 14)]


def test_room_is_for_the_blocks_of_all_groups() -> None:
    made = Made(shapes=(GroupShape(0, 4), GroupShape(1, 8)))  # three blocks every 8 tokens
    made.tracker.allocated("r", hashes(4), 0, 0, [[11, 12, 13, 14], [21, 22]])
    ids = [[11, 12, 13, 14], [21, 22]]
    assert made.scheduled(4, 0, 16, ids, room=2) is None
    assert moved(made.scheduled(4, 16, 17, ids, room=5)) == [(1, 11), (2, 12), (2, 21)]
    assert moved(made.scheduled(4, 17, 18, ids, room=3)) == [(3, 13), (4, 14), (4, 22)]


def test_what_a_prompt_can_have_from_the_pool() -> None:
    assert [Made().tracker.reach(tokens) for tokens in (1, 4, 5, 16, 17)] == [0, 0, 4, 12, 16]
    both = Made(there=9, shapes=(GroupShape(0, 4), GroupShape(1, 8)))
    assert [both.tracker.reach(tokens) for tokens in (8, 9, 16, 17)] == [0, 8, 8, 16]
    # What vLLM has itself ends within a block of the second group: nothing can be put behind it.
    assert [both.tracker.match(hashes(8), 33, computed) for computed in (0, 4, 8)] == [32, 0, 24]


def test_what_vllm_has_itself_is_stored_again_from_where_the_pool_has_lost_it() -> None:
    shapes = (GroupShape(0, 4), GroupShape(1, 8), GroupShape(2, 4, window_tokens=5))
    ids = [[11, 12, 13, 14, 15, 16], [21, 22, 23], [0, 0, 0, 34, 35, 36]]
    for kept, stored in (
        ((99, 99, 0), 16),
        ((3, 99, 0), 8),
        ((99, 2, 0), 8),
        ((1, 3, 0), 0),
        ((3, 0, 0), 0),
        ((0, 99, 0), 0),
    ):
        made = Made(shapes=shapes, kept=kept)
        made.tracker.allocated("r", hashes(6), 16, 0, ids)
        step = made.scheduled(6, 16, 24, ids)
        assert step is not None and step.begin_tokens == stored, kept
    # Whoever stores nothing has no use for what is lost, and what comes from the pool is there.
    quiet = Made(shapes=shapes, kept=(0, 0, 0), save=False)
    quiet.tracker.allocated("r", hashes(6), 16, 0, ids)
    assert quiet.tracker.forget("r") == 16
    loaded = Made(there=9, shapes=shapes, kept=(0, 0, 0))
    loaded.tracker.allocated("r", hashes(6), 0, 16, ids)
    assert loaded.tracker.forget("r") == 16
