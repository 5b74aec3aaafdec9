"""What vLLM's scheduler side keeps of each request: how far the pool has its blocks, and what a step has to move.

Plain: requests come as ids, hashes and numbers; the pool as a function that says which keys are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engines.vllm.plans import GroupBlocks, Transfer
from engines.vllm.prefixes import KEY_BYTES, GroupShape, Lookup, keys_of, longest_prefix


@dataclass(slots=True)
class _Tracked:
    """One request. Tokens up to `stored_tokens` are in the pool, on their way there, or came from there."""

    stored_tokens: int


class RequestTracker:
    """Plans loads and saves. One thread: vLLM's scheduler."""

    def __init__(self, groups: Sequence[GroupShape], hash_tokens: int, lookup: Lookup, *, save: bool) -> None:
        """
        Args:
            groups: those that the pool holds, in its order; `block_tokens` of each a whole number of `hash_tokens`.
            hash_tokens: tokens a block hash of vLLM.
        """
        self._groups = tuple(groups)
        self._hash_tokens = hash_tokens
        self._lookup = lookup
        self._save = save
        self._step_tokens = int(np.lcm.reduce([shape.block_tokens for shape in groups]))
        self._requests: dict[str, _Tracked] = {}
        self._loads: list[Transfer] = []
        self._salt = np.zeros(KEY_BYTES, dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._requests)

    def rename(self, salt: bytes) -> None:
        """From here on the same hashes are other keys; `salt` has 16 bytes."""
        self._salt = np.frombuffer(salt, dtype=np.uint8)

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
        reach = longest_prefix(
            self._groups, self._keys(hashes), self._lookup, computed_tokens, end_tokens, self._step_tokens
        )
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
        self._requests[request_id] = _Tracked(stored_tokens=reach)
        if external_tokens:
            blocks = tuple(
                part
                for shape, keys, ids in zip(self._groups, self._keys(hashes), block_ids, strict=True)
                if len(part := self._part(shape, keys, ids, computed_tokens, reach, needed_only=True))
            )
            self._loads.append(Transfer(request_id, blocks))

    # ------------------------------------------------------------ steps

    def scheduled(
        self,
        request_id: str,
        hashes: Sequence[bytes],
        before_tokens: int,
        after_tokens: int,
        block_ids: Sequence[Sequence[int]],
    ) -> Transfer | None:
        """A step computes a request from `before_tokens` to `after_tokens`: its blocks that are full and hashed then.

        Tokens that are not known yet (drafts, placeholders) have no hash, and so their blocks wait. What was computed
        before and given up since (a preemption, a load that failed) counts as not stored.
        """
        tracked = self._requests.get(request_id)
        if tracked is None or not self._save:
            return None
        tracked.stored_tokens = min(tracked.stored_tokens, before_tokens // self._step_tokens * self._step_tokens)
        known = min(after_tokens, len(hashes) * self._hash_tokens)
        reach = known // self._step_tokens * self._step_tokens
        if reach <= tracked.stored_tokens:
            return None
        blocks = tuple(
            part
            for shape, keys, ids in zip(self._groups, self._keys(hashes), block_ids, strict=True)
            if len(part := self._part(shape, keys, ids, tracked.stored_tokens, reach, needed_only=False))
        )
        tracked.stored_tokens = reach
        return Transfer(request_id, blocks) if blocks else None

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

    def _keys(self, hashes: Sequence[bytes]) -> list[NDArray[np.uint8]]:
        return [keys_of(hashes, self._hash_tokens, shape.block_tokens) ^ self._salt for shape in self._groups]

    @staticmethod
    def _part(
        shape: GroupShape,
        keys: NDArray[np.uint8],
        block_ids: Sequence[int],
        begin_tokens: int,
        end_tokens: int,
        *,
        needed_only: bool,
    ) -> GroupBlocks:
        """Blocks of one group between two places; block 0 stands for one that vLLM has let go."""
        first, last = begin_tokens // shape.block_tokens, end_tokens // shape.block_tokens
        if needed_only:
            first = max(first, shape.first_needed(end_tokens))
        last = min(last, len(keys), len(block_ids))
        chosen = [i for i in range(first, last) if block_ids[i]]
        return GroupBlocks(shape.group, keys[chosen].tobytes(), tuple(int(block_ids[i]) for i in chosen))
