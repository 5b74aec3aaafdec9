"""What the engine knows about one request under way."""

from __future__ import annotations

from enum import Enum

import numpy as np
from numpy.typing import NDArray

from engines.torch.batching import chunk_end
from engines.torch.request import BlockSet, Phase, Request, Times
from kvpool.core.hashing import block_keys, tail_key


class State(Enum):
    WAITING = "waiting"  # holds nothing
    PULLING = "pulling"  # admitted; somebody fills its first blocks
    RUNNING = "running"


class Sequence:
    """Tokens, blocks and progress of one request.

    Tokens [0, computed) have their KV in `blocks`. `keys` are the keys of full blocks of known tokens.
    """

    def __init__(self, request: Request, block_tokens: int, arrived_us: int, hash_name: str) -> None:
        self.request = request
        self.state = State.WAITING
        self.times = Times()
        self.arrived_us = arrived_us
        self.admitted_us = 0
        self.running_us = 0  # since when it computes
        self.computed = 0
        self.blocks: list[int] = []
        self.promised = 0
        self.registered = 0  # leading blocks offered to the prefix cache
        self.exported = 0  # leading blocks handed to the publisher, or not to be
        self.pull: BlockSet | None = None
        self.prefill_share_us = 0.0
        self.prefill_done = False
        self._block_tokens, self._hash = block_tokens, hash_name
        self._tokens = np.zeros(len(request.prompt) + request.sampling.max_tokens, dtype=np.uint32)
        self._tokens[: len(request.prompt)] = request.prompt
        self.known = len(request.prompt)
        keys = block_keys(request.root, request.prompt, block_tokens, hash_name)
        self.keys: list[bytes] = [key.tobytes() for key in keys]

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt)

    @property
    def generated(self) -> int:
        """Tokens after the prompt, the first token from elsewhere included."""
        return self.known - self.prompt_tokens

    @property
    def decoding(self) -> bool:
        return self.computed >= self.prompt_tokens and self.known - self.computed == 1

    @property
    def prefill_over(self) -> bool:
        """Whether it is a PREFILL request that has computed all it is to compute."""
        return self.request.phase is Phase.PREFILL and self.computed >= self.prompt_tokens

    @property
    def samples(self) -> bool:
        """Whether a token is drawn after the known ones: a DECODE request gets its first from elsewhere."""
        return not self.waits_for_token

    @property
    def waits_for_token(self) -> bool:
        """Whether its end depends on another instance, which has still to send the first token."""
        return self.request.phase is Phase.DECODE and self.generated == 0

    def tokens(self, first: int, end: int) -> NDArray[np.uint32]:
        return self._tokens[first:end]

    def append(self, token: int) -> None:
        self._tokens[self.known] = token
        self.known += 1
        if self.known % self._block_tokens == 0:
            parent = self.keys[-1] if self.keys else self.request.root
            block = self._tokens[self.known - self._block_tokens : self.known]
            self.keys.append(block_keys(parent, block, self._block_tokens, self._hash)[0].tobytes())

    def packed_keys(self, first: int, end: int, with_tail: bool) -> bytes:
        """Keys of blocks [first, end) of known tokens, then of the prompt's partial last block, 16 bytes each."""
        return b"".join(self.keys[first:end]) + (self._tail_key() if with_tail else b"")

    def following_keys(self, chunk_tokens: int) -> bytes:
        """Keys of the blocks that the next chunk of a PREFILL request will finish, 16 bytes each."""
        if self.request.phase is not Phase.PREFILL or self.computed >= self.prompt_tokens:
            return b""
        size, prompt = self._block_tokens, self.prompt_tokens
        end = chunk_end(self.computed, prompt, chunk_tokens)
        return self.packed_keys(self.computed // size, end // size, end == prompt and prompt % size > 0)

    def _tail_key(self) -> bytes:
        end = self.prompt_tokens
        full = end // self._block_tokens
        assert full * self._block_tokens < end, "this prompt has no partial last block"
        parent = self.keys[full - 1] if full else self.request.root
        return tail_key(parent, self.tokens(full * self._block_tokens, end), self._hash)

    def blocks_worst(self) -> int:
        """Blocks that hold the KV of everything this request can ever compute here."""
        # The last token that can be drawn is never computed.
        new = 0 if self.request.phase is Phase.PREFILL else self.request.sampling.max_tokens - 1
        return -(-(self.prompt_tokens + new) // self._block_tokens)

    def blocks_reusable(self) -> int:
        """Leading full blocks that may come from a cache: at least one prompt token is left to compute."""
        left = 0 if self.request.phase is Phase.DECODE else 1
        return (self.prompt_tokens - left) // self._block_tokens
