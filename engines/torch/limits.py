"""Sizes and bounds of an engine, and which requests it can ever serve."""

from __future__ import annotations

from dataclasses import dataclass

from engines.torch.model import LoadedModel
from engines.torch.request import Request
from kvpool.core.errors import BadArgument, KvpoolError, Reason
from kvpool.core.ids import KEY_BYTES
from kvpool.core.namespace import BLOCK_TOKENS_MAX, HASHES

TEMPERATURE_MAX = 100.0


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Sizes and bounds of an engine."""

    block_tokens: int = 64  # tokens a block
    kv_tokens: int = 32_768  # cache capacity, rounded down to blocks; a request that can never fit is refused
    chunk_tokens: int = 512  # prompt tokens a step; longer prompts take several steps
    batch_max: int = 32  # requests admitted at a time; more wait
    waiting_max: int = 256  # requests that wait; one more is refused as OVERLOADED
    block_hash: str = HASHES[0]  # of block keys; sha256/1 where several tenants share a cluster
    deterministic: bool = False  # results do not depend on batching, chunking, reuse or placement; slower

    def validate(self) -> None:
        """Raises: BadArgument with the field that is wrong."""
        checks = {
            f"block_tokens must be 1 to {BLOCK_TOKENS_MAX}": 1 <= self.block_tokens <= BLOCK_TOKENS_MAX,
            "kv_tokens must hold at least one block": self.kv_tokens >= self.block_tokens,
            "chunk_tokens must be a multiple of block_tokens": self.chunk_tokens > 0
            and self.chunk_tokens % self.block_tokens == 0,
            "batch_max must be at least 1": self.batch_max >= 1,
            "waiting_max must be at least 1": self.waiting_max >= 1,
            f"block_hash must be one of {', '.join(HASHES)}": self.block_hash in HASHES,
        }
        for rule, holds in checks.items():
            if not holds:
                raise BadArgument(rule)

    @property
    def block_count(self) -> int:
        return self.kv_tokens // self.block_tokens


def check(request: Request, config: EngineConfig, model: LoadedModel, taken: bool) -> None:
    """Whether the engine can serve a request, now or later; `taken`: its id is under way already.

    Raises: BadArgument, or KvpoolError with CONTEXT_TOO_LONG or NO_CAPACITY.
    """
    sampling = request.sampling
    rules = {
        "the prompt must have at least one token": len(request.prompt) > 0,
        "max_tokens must be at least 1": sampling.max_tokens >= 1,
        f"temperature must be 0 to {TEMPERATURE_MAX:g}": 0.0 <= sampling.temperature <= TEMPERATURE_MAX,
        "top_p must be over 0 and at most 1": 0.0 < sampling.top_p <= 1.0,
        f"root must have {KEY_BYTES} bytes": len(request.root) == KEY_BYTES,
        f"request id {request.id!r} is taken or empty": bool(request.id) and not taken,
    }
    for rule, holds in rules.items():
        if not holds:
            raise BadArgument(rule)
    if int(request.prompt.max()) >= model.vocabulary_size:
        raise BadArgument(f"token ids must be under {model.vocabulary_size}")
    tokens = len(request.prompt) + sampling.max_tokens
    if tokens > model.context_tokens_max:
        raise KvpoolError(
            f"prompt and max_tokens are {tokens} tokens, the context is {model.context_tokens_max}",
            reason=Reason.CONTEXT_TOO_LONG,
        )
    capacity = config.block_count * config.block_tokens
    if tokens > capacity:
        raise KvpoolError(f"{tokens} tokens never fit into a KV cache of {capacity}", reason=Reason.NO_CAPACITY)
