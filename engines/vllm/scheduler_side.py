"""The scheduler's half: how much of a prompt the pool has, what each step loads and stores, and whom to distrust.

Lives in vLLM's scheduler thread. Sees vLLM's requests and block pool as they are, but imports nothing of vLLM.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engines.vllm import handoffs
from engines.vllm.plans import Counts, LoadMode, StepPlan, Transfer
from engines.vllm.prefixes import KEY_BYTES, Bools, GroupShape, Keys
from engines.vllm.saving import SavePipeline
from engines.vllm.tracking import RequestTracker

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

    from engines.vllm.pool_link import PoolLink

#: Below vLLM's own logger, whose settings it shares.
log = logging.getLogger("vllm.kvpool")

#: Share of the engine's blocks that may be held for stores under way; what is beyond waits for a later step.
HELD_SHARE = 0.25
#: vLLM asks again in every step while a request waits for blocks: so long an answer is good.
HIT_GOOD_S, MISS_GOOD_S = 0.05, 0.25
#: How long vLLM may wait for a store to give a block back rather than preempt a request.
GIVE_BACK_S = 0.02


@dataclass(frozen=True, slots=True)
class _Answer:
    """What the pool had of a prompt of `prompt_tokens` beyond `computed_tokens`."""

    computed_tokens: int
    prompt_tokens: int
    tokens: int
    until_s: float


class SchedulerSide:
    """See the module's text. One thread: vLLM's scheduler."""

    def __init__(
        self,
        link: PoolLink,
        groups: Sequence[GroupShape],
        vllm_groups: Sequence[int],
        hash_tokens: int,
        shard_count: int,
        *,
        workers: int,
        loads: LoadMode,
        save: bool,
        handoff_wait_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            groups, vllm_groups: those that the pool holds, and vLLM's number of each.
            workers: how many report each save.
        """
        self._link, self._groups, self._vllm_groups = link, tuple(groups), tuple(vllm_groups)
        self._shards = range(shard_count)
        self._workers, self._loads, self._clock = workers, loads, clock
        self._tracker = RequestTracker(
            groups, hash_tokens, self._lookup, mask=bytes(link.namespace), save=save, keeps=self._keeps
        )
        self._handoffs = handoffs.HandoffWaits(handoff_wait_s)
        self._counts = Counts()
        self._steps = 0
        self._requests: dict[str, Request] = {}
        #: Request -> tokens that vLLM had itself when it was matched last.
        self._matched: dict[str, int] = {}
        self._answers: dict[str, _Answer] = {}
        #: Their loads have failed ahead of time; they are not loaded again, which could go on for ever.
        self._gave_up: set[str] = set()
        #: Of the step under way, if it loads anything: request -> its blocks. Others may share those that are loaded.
        self._loading: dict[str, list[int]] = {}
        self._starved_since_s: float | None = None
        self._starved_asked_s = 0.0

    def bind(self, pool: BlockPool) -> None:
        blocks = pool.blocks
        self._pool = pool
        self._saving = SavePipeline(
            blocks_max=int(HELD_SHARE * len(blocks)),
            workers=self._workers,
            hold=lambda ids: pool.touch([blocks[i] for i in ids]),
            free=lambda ids: pool.free_blocks([blocks[i] for i in ids]),
        )

    def switch_off(self) -> None:
        """Nothing is loaded or stored from here on."""
        self._loads = LoadMode.OFF
        self._tracker.stop_saving()

    @property
    def key_mask(self) -> bytes:
        return self._tracker.mask

    def take_counts(self) -> Counts:
        counts, self._counts = self._counts, Counts()
        return counts

    # ------------------------------------------------------------ requests

    def began(self, request: Request) -> None:
        # vLLM's hashes name an adapter by its name and path: which weights are there, nobody can tell.
        if request.lora_request is None:
            self._requests[request.request_id] = request

    def match(self, request: Request, computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens beyond `computed_tokens` to be loaded (None: ask again later), and whether the request waits."""
        number = request.request_id
        self._matched[number] = computed_tokens
        known = number in self._requests and number not in self._gave_up
        if self._loads is LoadMode.OFF or request.skip_reading_prefix_cache or not known:
            return 0, False
        now_s = self._clock()
        announced = handoffs.tokens_of(request.kv_transfer_params, self._tracker.mask)
        expected = min(announced, self._tracker.reach(request.num_tokens))
        awaited = expected > computed_tokens and not self._handoffs.is_over(number)
        if awaited and not self._handoffs.looks(number, now_s):
            return None, False
        tokens = self._have(request, computed_tokens, now_s, fresh=awaited)
        if awaited and computed_tokens + tokens < expected and self._link.is_up:
            if self._handoffs.lacks(number, now_s):
                return None, False
            log.warning("kvpool: the blocks of request %s did not come in time", number)
        elif awaited:
            self._handoffs.came(number)
        return tokens, tokens > 0 and self._loads is LoadMode.AHEAD

    def allocated(self, request: Request, block_ids: Sequence[Sequence[int]], external_tokens: int) -> None:
        """vLLM has blocks for a request; again with 0 external tokens when loads ahead of time are through."""
        # Of a request that has begun (loaded ahead, or a session that goes on) its own count is the newer one.
        computed = request.num_computed_tokens or self._matched.get(request.request_id, 0)
        self._answers.pop(request.request_id, None)
        self._tracker.allocated(
            request.request_id, request.block_hashes, computed, external_tokens, self._own_groups(block_ids)
        )

    def finished(self, request: Request) -> dict[str, Any] | None:
        """Returns: what the request's answer says to whoever goes on with it elsewhere."""
        stored = self._tracker.forget(request.request_id)
        self._handoffs.forget(request.request_id)
        self._matched.pop(request.request_id, None)
        self._answers.pop(request.request_id, None)
        self._gave_up.discard(request.request_id)
        self._requests.pop(request.request_id, None)
        if not handoffs.asks(request.kv_transfer_params):
            return None
        return handoffs.answer(stored if self._link.is_up else 0, bytes(self._link.namespace), self._tracker.mask)

    def _have(self, request: Request, computed_tokens: int, now_s: float, *, fresh: bool) -> int:
        last = self._answers.get(request.request_id)
        asked = (computed_tokens, request.num_tokens)
        if last is not None and not fresh and now_s < last.until_s and asked == (
            last.computed_tokens, last.prompt_tokens,
        ):  # fmt: skip
            return last.tokens
        tokens = self._tracker.match(request.block_hashes, request.num_tokens, computed_tokens)
        until_s = now_s + (HIT_GOOD_S if tokens else MISS_GOOD_S)
        self._answers[request.request_id] = _Answer(*asked, tokens, until_s)
        return tokens

    def _lookup(self, group: int, keys: Keys) -> Bools:
        begin_s = time.perf_counter()
        found = self._link.lookup(group, self._shards, keys)
        self._counts.lookups += 1
        self._counts.lookup_us += int(1e6 * (time.perf_counter() - begin_s))
        return found

    def _keeps(self, group: int, keys: Keys) -> Bools:
        return self._link.keeps(group, self._shards, keys)

    def _own_groups(self, block_ids: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        return [block_ids[group] for group in self._vllm_groups]

    # ------------------------------------------------------------ steps

    def plan(self, scheduled: SchedulerOutput) -> StepPlan:
        """What the coming step loads and stores, given what it computes."""
        self._steps += 1
        state = scheduled.kv_connector_block_state
        saves: list[Transfer] = []
        room = self._saving.room
        for request_id, count in scheduled.num_scheduled_tokens.items():
            request = self._requests.get(request_id)
            if request is None or state is None:
                continue

            def block_ids(request_id: str = request_id) -> list[Sequence[int]] | None:
                ids = state.get_block_ids(request_id)
                return None if ids is None else self._own_groups(ids)

            before = request.num_computed_tokens
            transfer = self._tracker.scheduled(
                request_id, request.block_hashes, before, before + count, block_ids, room
            )
            if transfer is not None:
                saves.append(transfer)
                room -= len(transfer.block_ids)
        self._saving.computes(self._steps, saves)
        loads = self._tracker.take_loads()
        self._loading = {}
        if loads and state is not None and self._loads is LoadMode.IN_STEP:
            requests = scheduled.num_scheduled_tokens
            self._loading = {request: list((state.get_block_ids(request) or ((),))[0]) for request in requests}
        return StepPlan(
            number=self._steps,
            idle=not scheduled.total_num_scheduled_tokens,
            awaits=self._handoffs.any,
            ahead=self._loads is LoadMode.AHEAD,
            loads=loads,
            saves=self._saving.take_confirmed(),
        )

    def output(
        self, step: int | None, saved: Mapping[int, int], lost_blocks: set[int], lost_requests: set[str]
    ) -> None:
        """A step's output has come.

        Args:
            step: its number; None if no worker said so.
            saved: save -> workers that are through with it.
            lost_blocks: blocks that could not be loaded within the step.
            lost_requests: requests whose loads ahead of time have failed.
        """
        dropped: list[Transfer] = []
        if lost_blocks:
            dropped += self._saving.failed()
            self._distrust(lost_blocks)
        self._gave_up |= lost_requests & self._requests.keys()
        self._loading = {}
        if step is not None:
            dropped += self._saving.computed(step)
            if saved:
                self._starved_since_s = None  # blocks come back: the next ones are worth waiting for, too
            self._saving.stored(saved)
        for transfer in dropped:
            self._tracker.not_stored(transfer)

    def _distrust(self, lost: set[int]) -> None:
        """Takes their hashes off blocks that stand on one that was not loaded, and has whoever shares them compute.

        vLLM gives blocks their hashes before they are loaded and leaves them, and it does not look at requests that
        were aborted meanwhile: others would find what is spoiled.
        """
        spoiled = set(lost)
        block_tokens = self._groups[0].block_tokens
        for request_id, block_ids in self._loading.items():
            first = next((n for n, block in enumerate(block_ids) if block in lost), None)
            if first is None:
                continue
            spoiled.update(block for block in block_ids[first:] if block)
            request = self._requests.get(request_id)
            if request is not None:  # else it has ended
                request.num_computed_tokens = min(request.num_computed_tokens, first * block_tokens)
        self._pool.evict_blocks(spoiled)

    def reset(self) -> None:
        """The weights may be others now: nothing is shared any more with what was stored before, by whomever."""
        self._saving.failed()
        self._saving.drop_confirmed()
        self._answers.clear()
        self._tracker.mask_with(os.urandom(KEY_BYTES))

    @property
    def has_work(self) -> bool:
        return self._saving.has_work

    def gives_back_soon(self) -> bool:
        """Whether stores hold blocks that nobody else wants, and vLLM had better wait for them for a moment."""
        blocks = self._pool.blocks
        if not any(blocks[i].ref_cnt == 1 for i in self._saving.held()):
            self._starved_since_s = None
            return False
        now_s = self._clock()
        if self._starved_since_s is None or now_s - self._starved_asked_s > GIVE_BACK_S:
            self._starved_since_s = now_s  # vLLM asks in each step as long as it lacks blocks
        self._starved_asked_s = now_s
        return now_s - self._starved_since_s < GIVE_BACK_S
