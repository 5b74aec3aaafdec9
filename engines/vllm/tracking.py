"""What vLLM's scheduler side keeps of each request: how far the pool has its blocks, and what a step has to move.

Plain: requests come as ids, hashes and numbers; the pool as a function that says which keys are there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from engines.vllm.plans import GroupBlocks, Transfer
from engines.vllm.prefixes import KEY_BYTES, GroupShape, Keys, Lookup, keys_of, longest_prefix

#: Of a request's blocks, how many at most are looked up to see whether the pool has lost any.
KEPT_BLOCKS_MAX = 4096
#: An engine's blocks of a request, of each group from the request's first block on; None if there are none any more.
#: A function, since vLLM makes the whole list each time and few steps need it.
BlockIds = Callable[[], Sequence[Sequence[int]] | None]


@dataclass(slots=True)
class _Tracked:
    """One request. Tokens up to `stored_tokens` are in the pool, on their way there, or came from there."""

    stored_tokens: int


class RequestTracker:
    """Plans loads and saves. One thread: vLLM's scheduler."""

    def __init__(
        self,
        groups: Sequence[GroupShape],
        hash_tokens: int,
        lookup: Lookup,
        *,
        mask: bytes,
        save: bool,
        keeps: Lookup | None = None,
    ) -> None:
        """
        Args:
            groups: those that the pool holds, in its order; `block_tokens` of each a whole number of `hash_tokens`.
            hash_tokens: tokens a block hash of vLLM.
            mask: 16 bytes, see `mask`.
            keeps: which keys the pool still has, at no cost; None: it is taken to have all.
        """
        self._groups = tuple(groups)
        self._hash_tokens = hash_tokens
        self._lookup, self._keeps = lookup, keeps
        self._save = save
        self._step_tokens = int(np.lcm.reduce([shape.block_tokens for shape in groups]))
        self._step_blocks = sum(self._step_tokens // shape.block_tokens for shape in groups)
        self._requests: dict[str, _Tracked] = {}
        self._loads: list[Transfer] = []
        self._mask = np.frombuffer(mask, dtype=np.uint8)
        assert len(self._mask) == KEY_BYTES

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def mask(self) -> bytes:
        """A block's key is the first 16 bytes of its hash, exclusive or this.

        The namespace is in it, since vLLM's hashes are the same for all models, and a source keeps one block of a key.
        """
        return self._mask.tobytes()

    def mask_with(self, mask: bytes) -> None:
        """From here on the same hashes are other keys.

        Requests under way have blocks of before: nothing of them is stored, unless they begin anew.
        """
        self._mask = np.frombuffer(mask, dtype=np.uint8)
        self._requests.clear()
        self._loads.clear()

    def stop_saving(self) -> None:
        self._save = False

    # ------------------------------------------------------------ matching

    def reach(self, prompt_tokens: int) -> int:
        """What of a prompt can come from the pool at most: whole blocks, and at least one token is left to compute."""
        return (prompt_tokens - 1) // self._step_tokens * self._step_tokens

    def match(self, hashes: Sequence[bytes], prompt_tokens: int, computed_tokens: int) -> int:
        """Tokens beyond `computed_tokens` that the pool has; at least one token of the prompt is left to compute.

        Has no side effect: vLLM may ask again, and may not act on the answer.
        """
        end_tokens = prompt_tokens - 1
        if computed_tokens % self._step_tokens or end_tokens - computed_tokens < self._step_tokens:
            return 0
        keys = [self._keys(hashes, shape, 0, end_tokens) for shape in self._groups]
        reach = longest_prefix(self._groups, keys, self._lookup, computed_tokens, end_tokens, self._step_tokens)
        return reach - computed_tokens

    def allocated(
        self,
        request_id: str,
        hashes: Sequence[bytes],
        computed_tokens: int,
        external_tokens: int,
        block_ids: Sequence[Sequence[int]],
    ) -> None:
        """vLLM has blocks for a request, of which `external_tokens` behind `computed_tokens` are to be loaded.

        Args:
            block_ids: of each group, from the request's first block on.
        """
        reach = computed_tokens + external_tokens
        self._requests[request_id] = _Tracked(self._kept(hashes, computed_tokens, reach))
        if external_tokens:
            blocks = self._parts(hashes, block_ids, computed_tokens, reach, needed_only=True)
            self._loads.append(Transfer(request_id, blocks, computed_tokens))

    def _kept(self, hashes: Sequence[bytes], computed_tokens: int, reach: int) -> int:
        """`reach`, or up to the first block of those that vLLM has itself which the pool has lost since.

        What every engine has is never read from the pool, and so is the first to go there; without this it would
        never be stored again, and what is stored behind it could not be reached.
        """
        if self._keeps is None or not self._save or not computed_tokens:
            return reach
        kept = reach
        for shape in self._groups:
            keys = self._keys(hashes, shape, 0, computed_tokens)[:KEPT_BLOCKS_MAX]
            if not shape.window_tokens and len(keys) and not (there := self._keeps(shape.group, keys)).all():
                kept = min(kept, int(np.argmin(there)) * shape.block_tokens)
        return reach if kept == reach else kept // self._step_tokens * self._step_tokens

    # ------------------------------------------------------------ steps

    def scheduled(
        self,
        request_id: str,
        hashes: Sequence[bytes],
        before_tokens: int,
        after_tokens: int,
        block_ids: BlockIds,
        room_blocks: int,
    ) -> Transfer | None:
        """A step computes a request from `before_tokens` to `after_tokens`: its blocks that are full and hashed then.

        Tokens that are not known yet (drafts, placeholders) have no hash, and so their blocks wait. What was computed
        before and given up since (a preemption, a load that failed) counts as not stored.

        Args: room_blocks: how many may be stored now; what is beyond waits for a later step of the request.
        """
        tracked = self._requests.get(request_id)
        if tracked is None or not self._save:
            return None
        step = self._step_tokens
        tracked.stored_tokens = min(tracked.stored_tokens, before_tokens // step * step)
        known = min(after_tokens, len(hashes) * self._hash_tokens)
        reach = min(known // step * step, tracked.stored_tokens + room_blocks // self._step_blocks * step)
        if reach <= tracked.stored_tokens:
            return None
        ids = block_ids()
        if ids is None:
            return None
        # Never beyond the blocks that there are: what is left out now would count as stored.
        here = min(len(own) * shape.block_tokens for shape, own in zip(self._groups, ids, strict=True))
        reach = min(reach, here // step * step)
        if reach <= tracked.stored_tokens:
            return None
        begin, tracked.stored_tokens = tracked.stored_tokens, reach
        blocks = self._parts(hashes, ids, begin, reach, needed_only=False)
        return Transfer(request_id, blocks, begin) if blocks else None

    def not_stored(self, transfer: Transfer) -> None:
        """What was planned to be stored is not, and is tried again if the request goes on."""
        tracked = self._requests.get(transfer.request_id)
        if tracked is not None:
            tracked.stored_tokens = min(tracked.stored_tokens, transfer.begin_tokens)

    def forget(self, request_id: str) -> int:
        """A request has ended. Returns: how many of its tokens are in the pool or on their way there."""
        tracked = self._requests.pop(request_id, None)
        if tracked is None:
            return 0
        self._loads = [transfer for transfer in self._loads if transfer.request_id != request_id]
        return tracked.stored_tokens

    def take_loads(self) -> list[Transfer]:
        """What the coming step loads."""
        loads, self._loads = self._loads, []
        return loads

    # ------------------------------------------------------------ parts

    def _keys(self, hashes: Sequence[bytes], shape: GroupShape, first: int, end_tokens: int) -> Keys:
        """Of a group's blocks from number `first` up to a place: uint8 (blocks, 16)."""
        last = end_tokens // shape.block_tokens
        return keys_of(hashes, self._hash_tokens, shape.block_tokens, first, last) ^ self._mask

    def _parts(
        self,
        hashes: Sequence[bytes],
        block_ids: Sequence[Sequence[int]],
        begin_tokens: int,
        end_tokens: int,
        *,
        needed_only: bool,
    ) -> tuple[GroupBlocks, ...]:
        """Blocks of all groups between two places; block 0 stands for one that vLLM has let go."""
        parts = []
        for shape, ids in zip(self._groups, block_ids, strict=True):
            first = begin_tokens // shape.block_tokens
            if needed_only:
                first = max(first, shape.first_needed(end_tokens))
            keys = self._keys(hashes, shape, first, end_tokens)
            last = min(first + len(keys), len(ids))
            chosen = [i for i in range(first, last) if ids[i]]
            if chosen:
                packed = keys[[i - first for i in chosen]].tobytes()
                parts.append(GroupBlocks(shape.group, packed, tuple(int(ids[i]) for i in chosen)))
        return tuple(parts)
