"""The models that the cluster serves, with their tokenizers, as the scheduler last listed them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvpool.core import hashing
from kvpool.core.engine_keys import EngineNaming
from kvpool.core.errors import KvpoolError
from kvpool.core.ids import KeyArray
from kvpool.service.wire import namespace_from_proto
from kvpool.v1 import scheduler_pb2
from scheduler.gateway.errors import model_not_found, unavailable
from scheduler.gateway.text import Tokenizer, load_tokenizer

log = logging.getLogger(__name__)

#: Protocol of servers that speak the OpenAI HTTP API themselves.
OPENAI = "openai"
#: A tokenizer that could not be loaded is tried again after this.
_RELOAD_S = 15.0
_REFRESH_MIN_S = 0.2


@dataclass(frozen=True, slots=True)
class Model:
    """One model that clients may name."""

    name: str
    namespace_id: bytes
    hash_name: str
    block_tokens: int
    context_tokens_max: int
    eos_tokens: frozenset[int]
    tokenizer: Tokenizer
    created: int
    #: How the servers name their blocks, where the model is served by OpenAI servers; else None.
    naming: EngineNaming | None = None

    def root_key(self, salt: bytes) -> bytes:
        return hashing.root_key(self.namespace_id, hashing.Extras(salt=salt), self.hash_name)

    def block_keys(self, root: bytes, tokens: NDArray[np.uint32]) -> KeyArray:
        """Keys of the full blocks of `tokens`."""
        return hashing.block_keys(root, tokens, self.block_tokens, self.hash_name)

    def served_keys(self, tokens: NDArray[np.uint32], salt: str) -> KeyArray:
        """Keys of the full blocks of `tokens` as the model's OpenAI servers name them."""
        assert self.naming is not None
        return self.naming.keys(self.namespace_id, tokens, self.block_tokens, salt)


class Models:
    """Known models by name. A model whose last instance left stays known: its requests are refused, not unknown."""

    def __init__(
        self,
        list_models: Callable[[], Awaitable[Sequence[scheduler_pb2.ModelInfo]]],
        load: Callable[[str], Tokenizer] = load_tokenizer,
    ) -> None:
        self._list_models = list_models
        self._load = load
        self._models: dict[str, Model] = {}
        self._infos: dict[str, bytes] = {}
        self._served: tuple[str, ...] = ()
        self._tokenizers: dict[str, Tokenizer] = {}
        self._failed: dict[str, tuple[float, str]] = {}
        self._refreshing: asyncio.Task[None] | None = None
        self._refreshed_at = -_REFRESH_MIN_S
        self._listed = False

    def served(self) -> list[Model]:
        """Models with an instance, by name."""
        return [self._models[name] for name in self._served if name in self._models]

    async def get(self, name: str) -> Model:
        """The model that a client names. Raises: ApiError (404 unknown, 503 not known yet)."""
        if name not in self._models and (not self._listed or time.monotonic() - self._refreshed_at > _REFRESH_MIN_S):
            await self.refresh()
        if name in self._models:
            return self._models[name]
        if name in self._served:
            _, why = self._failed.get(name, (0.0, "it is being loaded"))
            raise unavailable(f"The tokenizer of model {name!r} is not there: {why}", "tokenizer_unavailable")
        if not self._listed:
            raise unavailable("The scheduler can't be reached, so no model is known yet.", "scheduler_unreachable")
        raise model_not_found(name)

    async def refresh(self) -> None:
        """Asks the scheduler once, however many ask for it at the same time. An error leaves things as they are."""
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(self._refresh())
        await asyncio.shield(self._refreshing)

    async def _refresh(self) -> None:
        try:
            infos = await self._list_models()
        except KvpoolError as error:
            log.debug("models not listed: %s", error)
            return
        for info in infos:
            await self._update(info)
        self._served = tuple(sorted(info.model for info in infos))
        # Not before: whoever names a model that is being loaded waits for it.
        self._refreshed_at, self._listed = time.monotonic(), True

    async def _update(self, info: scheduler_pb2.ModelInfo) -> None:
        """Takes over a new or changed model."""
        described = scheduler_pb2.ModelInfo()
        described.CopyFrom(info)
        described.instances = 0
        serialized = described.SerializeToString(deterministic=True)
        if self._infos.get(info.model) == serialized:
            return
        failed_at, _ = self._failed.get(info.model, (-_RELOAD_S, ""))
        if time.monotonic() - failed_at < _RELOAD_S:
            return
        try:
            if info.tokenizer not in self._tokenizers:
                self._tokenizers[info.tokenizer] = await asyncio.to_thread(self._load, info.tokenizer)
            self._models[info.model] = self._build(info, self._tokenizers[info.tokenizer])
        except Exception as error:
            # A tokenizer is somebody else's folder or download: it may be wrong in any way.
            log.warning("model %s can't be served: %s", info.model, error)
            self._failed[info.model] = (time.monotonic(), str(error))
            return
        self._infos[info.model] = serialized
        self._failed.pop(info.model, None)

    @staticmethod
    def _build(info: scheduler_pb2.ModelInfo, tokenizer: Tokenizer) -> Model:
        namespace = namespace_from_proto(info.namespace)
        model = Model(
            name=info.model,
            namespace_id=bytes(namespace.id()),
            hash_name=namespace.hash,
            block_tokens=namespace.groups[0].block_tokens,
            context_tokens_max=info.context_tokens_max,
            eos_tokens=frozenset(info.eos_token_ids),
            tokenizer=tokenizer,
            created=int(time.time()),
            naming=EngineNaming.of_layout(namespace.layout) if info.protocol == OPENAI else None,
        )
        # Compiled kernels are loaded now, not with the first request.
        model.block_keys(model.root_key(b""), np.zeros(model.block_tokens, dtype=np.uint32))
        return model
