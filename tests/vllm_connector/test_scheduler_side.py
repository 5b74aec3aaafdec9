"""The scheduler's half over plain stand-ins for vLLM's requests and blocks; `tests/vllm_real` has the real ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engines.vllm.plans import LoadMode
from engines.vllm.prefixes import Bools, GroupShape, Keys
from engines.vllm.scheduler_side import GIVE_BACK_S, HIT_GOOD_S, MISS_GOOD_S, SchedulerSide

BLOCKS = 40


@dataclass
class FakeRequest:
    """What the connector sees of one: blocks of 4 tokens, hashes by number."""

    request_id: str = "r"
    num_tokens: int = 17
    num_computed_tokens: int = 0
    kv_transfer_params: dict[str, Any] | None = None
    skip_reading_prefix_cache: bool = False
    lora_request: object = None

    @property
    def block_hashes(self) -> list[bytes]:
        return [bytes([number + 1]) * 32 for number in range(self.num_tokens // 4)]


@dataclass
class FakeLink:
    """Has the first `there` blocks."""

    there: int = 0
    kept: int = 255
    looks: int = 0
    is_up: bool = True
    namespace: bytes = bytes(16)

    def lookup(self, group: int, shards: range, keys: Keys) -> Bools:
        self.looks += 1
        return keys[:, 0] <= self.there

    def keeps(self, group: int, shards: range, keys: Keys) -> Bools:
        return keys[:, 0] <= self.kept


@dataclass
class FakeBlock:
    block_id: int
    ref_cnt: int = 0


@dataclass
class FakePool:
    blocks: list[FakeBlock] = field(default_factory=lambda: [FakeBlock(number) for number in range(BLOCKS)])
    evicted: set[int] = field(default_factory=set)

    def touch(self, blocks: list[FakeBlock]) -> None:
        for block in blocks:
            block.ref_cnt += 1

    def free_blocks(self, blocks: list[FakeBlock]) -> None:
        for block in blocks:
            block.ref_cnt -= 1

    def evict_blocks(self, numbers: set[int]) -> None:
        self.evicted |= numbers


class Made:
    def __init__(self, there: int = 0, loads: LoadMode = LoadMode.IN_STEP, wait_s: float = 1.0) -> None:
        self.link, self.pool, self.now_s = FakeLink(there), FakePool(), 100.0
        self.side = SchedulerSide(
            self.link, [GroupShape(0, 4)], [0], 4, 1, workers=1, loads=loads, save=True,  # type: ignore[arg-type]
            handoff_wait_s=wait_s, clock=lambda: self.now_s,
        )  # fmt: skip
        self.side.bind(self.pool)  # type: ignore[arg-type]

    def began(self, **fields: Any) -> Any:
        request = FakeRequest(**fields)
        self.side.began(request)  # type: ignore[arg-type]
        return request

    def plan(self, tokens: dict[str, int], blocks: list[int]) -> Any:
        state = SimpleNamespace(get_block_ids=lambda request: (blocks,))
        return self.side.plan(
            SimpleNamespace(
                num_scheduled_tokens=tokens,
                total_num_scheduled_tokens=sum(tokens.values()),
                kv_connector_block_state=state,
            )  # type: ignore[arg-type]
        )


@pytest.mark.parametrize(("there", "tokens", "good_s"), [(0, 0, MISS_GOOD_S), (2, 8, HIT_GOOD_S)])
def test_the_pool_is_not_asked_again_in_every_step(there: int, tokens: int, good_s: float) -> None:
    made = Made(there)
    request = made.began()
    for _ in range(5):
        assert made.side.match(request, 0) == (tokens, False)
    assert made.link.looks == 1
    made.side.match(request, 4)  # vLLM has some of it itself by now: another question
    assert made.link.looks == 2
    made.now_s += good_s
    made.side.match(request, 4)
    assert made.link.looks == 3
    assert made.side.take_counts().lookups == 3 and made.side.take_counts().lookups == 0


def test_an_answer_is_good_for_one_life_of_a_request() -> None:
    made = Made(there=4)
    request = made.began()
    assert made.side.match(request, 0) == (16, False)
    made.side.allocated(request, [[1, 2, 3, 4, 5]], 16)
    made.link.there = 2  # it is preempted, and what it had of the pool is gone
    assert made.side.match(request, 0) == (8, False)
    made.side.finished(request)
    made.link.there = 1
    assert made.side.match(made.began(), 0) == (4, False)  # another request of that name


def test_what_is_announced_is_waited_for_and_then_not() -> None:
    made = Made(there=1, wait_s=1.0)
    request = made.began(kv_transfer_params={"kvpool_tokens": 16})
    assert made.side.match(request, 0) == (None, False)
    made.link.there = 2
    made.now_s += 0.5
    assert made.side.match(request, 0) == (None, False)
    made.now_s += 0.6
    assert made.side.match(request, 0) == (8, False)
    looks = made.link.looks
    for _ in range(5):  # over for good: vLLM may ask again as long as it has no blocks to give
        assert made.side.match(request, 0) == (8, False)
    assert made.link.looks == looks
    made.link.there, made.now_s = 4, made.now_s + 1
    assert made.side.match(request, 0) == (16, False)


def test_nothing_is_waited_for_while_the_node_is_away() -> None:
    made = Made()
    made.link.is_up = False
    assert made.side.match(made.began(kv_transfer_params={"kvpool_tokens": 16}), 0) == (0, False)


def test_requests_that_are_left_to_vllm() -> None:
    made = Made(there=4)
    assert made.side.match(made.began(request_id="lora", lora_request=object()), 0) == (0, False)
    assert made.side.match(made.began(request_id="skips", skip_reading_prefix_cache=True), 0) == (0, False)
    off = Made(there=4, loads=LoadMode.OFF)
    assert off.side.match(off.began(), 0) == (0, False)
    assert made.side.match(made.began(request_id="one"), 0) == (16, False)
    made.side.switch_off()
    assert made.side.match(made.began(request_id="other"), 0) == (0, False)
    made.side.allocated(made.began(request_id="other"), [[1, 2]], 0)
    assert made.plan({"other": 8}, [1, 2]).saves == {} and made.side.take_counts().lookups == 1
    assert not any(block.ref_cnt for block in made.pool.blocks)  # nor is it stored later


def test_a_load_ahead_that_failed_is_not_tried_again() -> None:
    made = Made(there=4, loads=LoadMode.AHEAD)
    request = made.began()
    assert made.side.match(request, 0) == (16, True)
    made.side.allocated(request, [[1, 2, 3, 4, 5]], 16)
    plan = made.plan({}, [1, 2, 3, 4, 5])
    assert plan.ahead and plan.idle and [load.block_ids for load in plan.loads] == [(1, 2, 3, 4)]
    request.num_computed_tokens = 16
    made.side.output(plan.number, {}, {2}, {"r", "gone"})
    assert request.num_computed_tokens == 16  # vLLM begins it anew by itself
    assert made.side.match(request, 0) == (0, False)
    made.side.finished(request)
    assert made.side.match(made.began(), 0) == (16, True)  # another request of that name


def test_after_a_load_ahead_the_rest_is_stored() -> None:
    made = Made(there=2, loads=LoadMode.AHEAD)
    request = made.began()
    assert made.side.match(request, 0) == (8, True)
    made.side.allocated(request, [[1, 2]], 8)
    made.plan({}, [1, 2])
    request.num_computed_tokens = 8
    made.side.allocated(request, [[1, 2, 3, 4, 5]], 0)
    step = made.plan({"r": 9}, [1, 2, 3, 4, 5])
    made.side.output(step.number, {}, set(), set())
    (saved,) = made.plan({}, [1, 2, 3, 4, 5]).saves.values()
    assert [transfer.block_ids for transfer in saved] == [(3, 4)]


def test_vllm_waits_for_stores_rather_than_preempt_but_not_long() -> None:
    made = Made()
    request = made.began()
    made.side.allocated(request, [[1, 2, 3, 4]], 0)
    step = made.plan({"r": 16}, [1, 2, 3, 4])
    made.side.output(step.number, {}, set(), set())
    made.pool.touch(made.pool.blocks[1:5])
    assert not made.side.gives_back_soon()  # the request's own
    made.pool.free_blocks(made.pool.blocks[1:5])
    assert made.side.has_work and made.side.gives_back_soon()
    made.now_s += 0.6 * GIVE_BACK_S
    assert made.side.gives_back_soon()
    made.now_s += 0.6 * GIVE_BACK_S
    assert not made.side.gives_back_soon()
    made.now_s += 50 * GIVE_BACK_S
    assert made.side.gives_back_soon()  # another time
    made.plan({}, [])
    made.side.output(2, {step.number: 1}, set(), set())
    assert not made.side.gives_back_soon() and not made.side.has_work
    assert not any(block.ref_cnt for block in made.pool.blocks)


def test_vllm_goes_on_waiting_as_long_as_blocks_come_back() -> None:
    made = Made()
    request = made.began()
    made.side.allocated(request, [[1, 2, 3, 4]], 0)
    for number, before in enumerate((0, 8), 1):
        request.num_computed_tokens = before
        step = made.plan({"r": 8}, [1, 2, 3, 4])
        assert step.number == number
        made.side.output(step.number, {}, set(), set())
    made.plan({}, [])
    assert made.side.gives_back_soon()
    made.now_s += 0.6 * GIVE_BACK_S
    assert made.side.gives_back_soon()
    made.side.output(3, {1: 1}, set(), set())
    made.now_s += 0.6 * GIVE_BACK_S
    assert made.side.gives_back_soon()  # since the first came back, the second may
    made.now_s += 0.6 * GIVE_BACK_S
    assert made.side.gives_back_soon()
    made.now_s += 0.6 * GIVE_BACK_S
    assert not made.side.gives_back_soon()


def test_what_the_pool_has_lost_is_stored_again() -> None:
    made = Made()
    request = made.began()
    made.link.kept = 1
    assert made.side.match(request, 12) == (0, False)
    made.side.allocated(request, [[1, 2, 3, 4, 5]], 0)  # vLLM has three blocks itself, the pool has the first of them
    request.num_computed_tokens = 12
    step = made.plan({"r": 5}, [1, 2, 3, 4, 5])
    made.side.output(step.number, {}, set(), set())
    (saved,) = made.plan({}, []).saves.values()
    assert [transfer.block_ids for transfer in saved] == [(2, 3, 4)]


def test_what_others_are_told() -> None:
    made = Made()
    request = made.began(kv_transfer_params={"kvpool_handoff": True})
    made.side.allocated(request, [[1, 2, 3, 4, 5]], 0)
    made.plan({"r": 17}, [1, 2, 3, 4, 5])
    assert made.side.finished(request) == {
        "kvpool_tokens": 16, "kvpool_namespace": "00" * 16, "kvpool_key_mask": "00" * 16,
    }  # fmt: skip
    assert made.side.finished(made.began()) is None
    made.side.reset()
    made.link.is_up = False
    made.side.allocated(request, [[1, 2, 3, 4, 5]], 16)
    told = made.side.finished(made.began(kv_transfer_params={"kvpool_handoff": True}))
    assert told is not None and told["kvpool_tokens"] == 0 and told["kvpool_key_mask"] != "00" * 16


def test_who_stands_on_a_lost_block_computes_from_there() -> None:
    made = Made(there=4)
    first, sharer, other = made.began(), made.began(request_id="sharer"), made.began(request_id="other")
    made.side.match(first, 0)
    made.side.allocated(first, [[1, 2, 3, 4, 5]], 16)
    # Block 0 stands for what a window has let go, in every request.
    behind = made.began(request_id="behind", num_computed_tokens=4)
    blocks = {"r": [1, 2, 3, 4, 5], "sharer": [1, 2, 3, 0, 9], "other": [20, 21], "behind": [1, 2, 3], "ended": [3, 7]}
    state = SimpleNamespace(get_block_ids=lambda request: (blocks[request],))
    scheduled = SimpleNamespace(
        num_scheduled_tokens={"r": 1, "sharer": 4, "other": 5, "behind": 0, "ended": 1}, total_num_scheduled_tokens=11,
        kv_connector_block_state=state,
    )  # fmt: skip
    plan = made.side.plan(scheduled)  # type: ignore[arg-type]
    first.num_computed_tokens, sharer.num_computed_tokens, other.num_computed_tokens = 17, 16, 5
    made.side.output(plan.number, {}, {3, 4}, set())
    assert made.pool.evicted == {3, 4, 5, 7, 9}
    assert (first.num_computed_tokens, sharer.num_computed_tokens, other.num_computed_tokens) == (8, 8, 5)
    assert behind.num_computed_tokens == 4  # it was not that far
    sharer.num_computed_tokens = 16
    made.side.output(None, {}, {3}, set())
    assert sharer.num_computed_tokens == 16  # that step is over


def test_nothing_is_kept_of_a_request_that_has_ended() -> None:
    made = Made(there=2, loads=LoadMode.AHEAD)
    waits = made.began(request_id="waits", kv_transfer_params={"kvpool_tokens": 16})
    assert made.side.match(waits, 0) == (None, False)
    lora = made.began(request_id="lora", lora_request=object())
    assert made.side.match(lora, 0) == (0, False)
    loads = made.began()
    assert made.side.match(loads, 0) == (8, True)
    made.side.allocated(loads, [[1, 2, 3, 4, 5]], 8)
    plan = made.plan({}, [1, 2, 3, 4, 5])
    made.side.output(plan.number, {}, set(), {"r", "gone"})
    assert made.side.match(loads, 0) == (0, False)
    for request in (waits, lora, loads):
        made.side.finished(request)
    side = made.side
    kept = (side._requests, side._matched, side._answers, side._gave_up, side._handoffs.waits, side._loading)
    assert not any(kept) and not len(side._tracker)


def test_what_is_awaited_is_looked_for_anew_each_time() -> None:
    made = Made(there=0)
    request = made.began(kv_transfer_params={"kvpool_tokens": 16})
    assert made.side.match(request, 0) == (None, False)
    made.link.there, made.now_s = 4, made.now_s + 0.2 * MISS_GOOD_S
    assert made.side.match(request, 0) == (16, False)


def test_a_step_whose_load_failed_stores_nothing_yet() -> None:
    made = Made(there=2)
    request, other = made.began(), made.began(request_id="other")
    made.side.match(request, 0)
    made.side.allocated(request, [[1, 2, 3, 4, 5]], 8)
    made.side.allocated(other, [[11, 12]], 0)
    blocks = {"r": [1, 2, 3, 4, 5], "other": [11, 12]}
    state = SimpleNamespace(get_block_ids=lambda name: (blocks[name],))
    request.num_computed_tokens = 8
    scheduled = SimpleNamespace(
        num_scheduled_tokens={"r": 9, "other": 8}, total_num_scheduled_tokens=17, kv_connector_block_state=state
    )
    plan = made.side.plan(scheduled)  # type: ignore[arg-type]
    assert any(block.ref_cnt for block in made.pool.blocks)
    made.side.output(plan.number, {}, {2}, set())
    assert not any(block.ref_cnt for block in made.pool.blocks) and not made.side.has_work
    # What was computed rightly is stored with the next step, and so is what was computed again.
    request.num_computed_tokens, other.num_computed_tokens = 4, 8
    scheduled.num_scheduled_tokens = {"r": 13, "other": 1}
    plan = made.side.plan(scheduled)  # type: ignore[arg-type]
    assert plan.saves == {}
    made.side.output(plan.number, {}, set(), set())
    (saved,) = made.plan({}, []).saves.values()
    assert [transfer.block_ids for transfer in saved] == [(2, 3, 4), (11, 12)]


def test_a_step_that_nobody_heard_of_again_is_stored_with_a_later_one() -> None:
    made = Made()
    request = made.began()
    made.side.allocated(request, [[1, 2, 3, 4, 5]], 0)
    made.plan({"r": 8}, [1, 2, 3, 4, 5])
    request.num_computed_tokens = 8
    second = made.plan({"r": 8}, [1, 2, 3, 4, 5])
    made.side.output(second.number, {}, set(), set())
    assert [block.ref_cnt for block in made.pool.blocks[1:5]] == [0, 0, 1, 1]
    request.num_computed_tokens = 16
    third = made.plan({"r": 1}, [1, 2, 3, 4, 5])
    made.side.output(third.number, {}, set(), set())
    (saved,) = made.plan({}, []).saves.values()
    assert [transfer.block_ids for transfer in saved] == [(1, 2, 3, 4)]


def test_two_requests_share_what_may_be_held() -> None:
    made = Made()  # 10 blocks at once
    for number, name in enumerate(("one", "two")):
        made.side.allocated(
            made.began(request_id=name, num_tokens=33), [list(range(1 + 9 * number, 10 + 9 * number))], 0
        )
    made.plan({"one": 33, "two": 33}, list(range(1, 10)))
    assert sum(block.ref_cnt for block in made.pool.blocks) == 10


def test_a_reset_leaves_nothing_of_before() -> None:
    made = Made(there=4)
    request = made.began()
    made.side.allocated(request, [[1, 2, 3, 4, 5]], 0)
    first = made.plan({"r": 8}, [1, 2, 3, 4, 5])
    made.side.output(first.number, {}, set(), set())
    asked = made.began(request_id="asked")
    assert made.side.match(asked, 0) == (16, False)
    request.num_computed_tokens = 8
    made.side.reset()
    assert not any(block.ref_cnt for block in made.pool.blocks) and not made.side.has_work
    assert made.plan({"r": 9}, [1, 2, 3, 4, 5]).saves == {}
    looks = made.link.looks
    made.side.match(asked, 0)
    assert made.link.looks == looks + 1


def test_what_a_step_computes_during_a_reset_is_not_stored() -> None:
    made = Made()
    request = made.began()
    made.side.allocated(request, [[1, 2, 3, 4, 5]], 0)
    step = made.plan({"r": 8}, [1, 2, 3, 4, 5])
    made.side.reset()
    assert not any(block.ref_cnt for block in made.pool.blocks)
    made.side.output(step.number, {}, set(), set())
    assert made.plan({}, []).saves == {} and not made.side.has_work


def test_keys_depend_on_the_namespace() -> None:
    made = Made(there=4)
    other = Made(there=4)
    other.link.namespace = bytes([0x80] * 16)
    other.side = SchedulerSide(
        other.link, [GroupShape(0, 4)], [0], 4, 1, workers=1, loads=LoadMode.IN_STEP, save=True,  # type: ignore[arg-type]
        handoff_wait_s=1.0,
    )  # fmt: skip
    assert made.side.match(made.began(), 0) == (16, False)
    assert other.side.match(other.began(), 0) == (0, False)
    assert np.frombuffer(other.side.key_mask, dtype=np.uint8).tolist() == [0x80] * 16
