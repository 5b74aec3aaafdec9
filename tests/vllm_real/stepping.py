"""vLLM's own scheduler and the connector's two halves in one process, over a model that is a sum and a pool that fails.

The model reads its cache as attention does: the value of a token depends on the cached values of all tokens before it
(of those in the window, in the second layer). So wherever a block is used that does not hold what it should, the next
token is another one than `Model.token` says, which needs no cache. There is no thread in it whose progress matters:
stores wait at a gate until the test lets them through.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.config import CacheConfig, KVTransferConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256_cbor
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    SlidingWindowSpec,
)
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from engines.attached.line import Int64s
from engines.vllm.connector import KVPoolConnector
from engines.vllm.prefixes import KEY_BYTES
from kvpool.service.client_writes import Lot

MODEL = Path(__file__).parent.parent / "models" / "tiny-llama"
BLOCK_TOKENS, WINDOW_TOKENS, TOKENS_MAX = 4, 10, 200
#: Bytes of a token in a layer: of float32, one head of one number, key and value.
TOKEN_BYTES = 8
MASK = (1 << 64) - 1
GATE_S = 60.0
#: What a step takes by the clock of the connector's scheduler side.
STEP_S = 0.005


def mixed(value: int) -> int:
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    return (value ^ (value >> 27)) * 0x94D049BB133111EB & MASK


class Model:
    """Values of tokens in each layer, from the sums of the values before them."""

    @staticmethod
    def full(weights: int, token: int, before: int) -> int:
        return mixed(weights * 7919 + token * 31 + before & MASK)

    @staticmethod
    def windowed(full: int, before: int) -> int:
        return mixed(full * 3 + before & MASK)

    @staticmethod
    def next(full: int, windowed: int) -> int:
        return 6 + mixed(full ^ windowed) % 50

    @staticmethod
    @lru_cache(maxsize=4096)
    def values(weights: int, tokens: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of all tokens, in both layers, without a cache."""
        full: list[int] = []
        windowed: list[int] = []
        for token in tokens:
            full.append(Model.full(weights, token, sum(full)))
            windowed.append(Model.windowed(full[-1], sum(windowed[-(WINDOW_TOKENS - 1) :])))
        return tuple(full), tuple(windowed)

    @staticmethod
    def token(weights: int, tokens: Sequence[int]) -> int:
        full, windowed = Model.values(weights, tuple(tokens))
        return Model.next(full[-1], windowed[-1])


@dataclass
class FlakyPool:
    """A pool that forgets, fails and is slow to store, as its test says. What is found is what was stored."""

    blocks: dict[tuple[bytes, int, bytes], bytes] = field(default_factory=dict)
    fails: float = 0.0
    draw: random.Random = field(default_factory=lambda: random.Random(0))
    gate: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.gate.set()

    def link(self, *arguments: Any) -> FlakyLink:
        return FlakyLink(self, *arguments)


class FlakyLink:
    """In the place of `PoolLink`."""

    def __init__(self, pool: FlakyPool, settings: object, spec: Any, name: str) -> None:
        self.namespace, self._pool, self.is_up = spec.id(), pool, True

    def _names(self, group: int, keys: NDArray[np.uint8]) -> list[tuple[bytes, int, bytes]]:
        return [(bytes(self.namespace), group, key.tobytes()) for key in keys]

    def lookup(self, group: int, shards: Iterable[int], keys: NDArray[np.uint8]) -> NDArray[np.bool_]:
        return self.shows(group, 0, keys)

    def shows(self, group: int, shard: int, keys: NDArray[np.uint8]) -> NDArray[np.bool_]:
        return np.array([name in self._pool.blocks for name in self._names(group, keys)], dtype=np.bool_)

    def keeps(self, group: int, shards: Iterable[int], keys: NDArray[np.uint8]) -> NDArray[np.bool_]:
        return self.shows(group, 0, keys)

    def get(
        self, group: int, shard: int, keys: NDArray[np.uint8], out: NDArray[np.uint8], timeout_s: float
    ) -> NDArray[np.bool_]:
        found = self.shows(group, shard, keys)
        if self._pool.draw.random() < self._pool.fails:
            found[self._pool.draw.randrange(len(found)) :] = False
        for row, name in enumerate(self._names(group, keys)):
            # A row that was not found may hold anything.
            out[row] = np.frombuffer(self._pool.blocks[name], dtype=np.uint8) if found[row] else 0xAA
        return found

    def put(self, group: int, shard: int, keys: NDArray[np.uint8], lots: Callable[[Int64s], Iterable[Lot]]) -> int:
        assert self._pool.gate.wait(GATE_S)
        names = self._names(group, keys)
        made = {}
        for indices, blocks, _ in lots(np.arange(len(keys))):
            made |= {names[i]: bytes(row) for i, row in zip(indices.tolist(), blocks, strict=True)}
        for name, block in made.items():
            self._pool.blocks.setdefault(name, block)
        return len(made)

    def close(self) -> None:
        self.is_up = False


class SteppedEngine:
    """One vLLM, stepped by hand. A wrong token is an AssertionError."""

    def __init__(
        self, pool: FlakyPool, *, block_count: int, hybrid: bool, step_tokens: int = 24, long_prefill_tokens: int = 0
    ) -> None:
        self.pool, self.weights = pool, 1
        self._numbers = 0
        self._config = vllm_config(block_count, step_tokens, long_prefill_tokens)
        cache = cache_config(block_count, hybrid)
        init_none_hash(sha256_cbor)
        self._hasher = get_request_block_hasher(BLOCK_TOKENS, sha256_cbor)
        self.scheduler = Scheduler(
            self._config, cache, StructuredOutputManager(self._config), BLOCK_TOKENS, log_stats=True
        )
        connector = self.scheduler.connector
        assert isinstance(connector, KVPoolConnector)
        self.connector = connector
        self._steps = 0
        assert connector._scheduler is not None
        connector._scheduler._clock = lambda: self._steps * STEP_S
        self.worker = KVPoolConnector(self._config, KVConnectorRole.WORKER, cache)
        self.values = torch.zeros((2, block_count, BLOCK_TOKENS), dtype=torch.int64)
        self.cache: NDArray[np.uint64] = self.values.numpy().view(np.uint64)
        self.worker.register_kv_caches({f"layer.{n}": layer for n, layer in enumerate(self.values)})
        told = self.worker.get_handshake_metadata()
        assert told is not None
        self.connector.set_xfer_handshake_metadata({0: told})
        self.hybrid = hybrid
        #: What each key must stand for: group -> key -> bytes.
        self.expected: dict[tuple[int, bytes], bytes] = {}
        self.loaded_blocks = self.failed_blocks = 0

    # ------------------------------------------------------------ requests

    def begin(self, prompt: Sequence[int], max_tokens: int, salt: str | None = None) -> Request:
        self._numbers += 1
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0)
        sampling.update_from_generation_config({}, 2)
        request = Request(f"r{self._numbers}", list(prompt), sampling, None, cache_salt=salt, block_hasher=self._hasher)
        self.scheduler.add_request(request)
        return request

    def abort(self, request: Request) -> None:
        self.scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)

    def new_weights(self) -> None:
        """As a trainer does: drain, load, reset. What is stored is the old weights' from here on."""
        while not self.is_idle:
            self.step()
        self.weights += 1
        while not self.scheduler.reset_prefix_cache():  # stores still hold blocks
            self.step()
        assert self.scheduler.reset_connector_cache()
        self.expected.clear()

    @property
    def is_idle(self) -> bool:
        return self.scheduler.get_num_unfinished_requests() == 0

    # ------------------------------------------------------------ steps

    def step(self, aborts: Sequence[Request] = ()) -> None:
        """Schedules, computes and takes the output; `aborts` come while it computes."""
        self._steps += 1
        planned = self.scheduler.schedule()
        computed = [self.scheduler.requests[name] for name in planned.num_scheduled_tokens]
        output = self._execute(planned)
        for request in aborts:
            self.abort(request)
        before = [request.num_tokens for request in computed]
        self.scheduler.update_from_output(planned, output)
        for request, count in zip(computed, before, strict=True):
            self._check_tokens(request, count)

    def settle(self) -> None:
        """Lets stores through, and waits until they have been reported and nothing is held for them."""
        self.pool.gate.set()
        for _ in range(1000):
            if self.is_idle and not self.connector.has_pending_push_work():
                return
            self.step()
        raise AssertionError("stores do not end")

    def _execute(self, planned: SchedulerOutput) -> ModelRunnerOutput:
        assert planned.kv_connector_metadata is not None
        self.worker.bind_connector_metadata(planned.kv_connector_metadata)
        if planned.has_sync_kv_loads:
            self.worker.start_load_kv(None)  # type: ignore[arg-type]
        sampled = [self._compute(name, count) for name, count in planned.num_scheduled_tokens.items()]
        if not planned.has_sync_kv_loads:
            self.worker.start_load_kv(None)  # type: ignore[arg-type]
        self.worker.wait_for_save()
        if self.pool.gate.is_set():
            self._wait_for_stores()
        results = self.worker.get_transfer_results(planned.finished_req_ids)
        told = KVConnectorOutput(
            finished_recving=results.finished_recving,
            failed_recving=results.failed_recving or set(),
            invalid_block_ids=self.worker.get_block_ids_with_load_errors(),
            kv_connector_stats=self.worker.get_kv_connector_stats(),
            kv_connector_worker_meta=self.worker.build_connector_worker_meta(),
        )
        if told.kv_connector_stats is not None:
            self.loaded_blocks += told.kv_connector_stats.data["blocks_loaded"]
            self.failed_blocks += told.kv_connector_stats.data["blocks_failed"]
        self.worker.clear_connector_metadata()
        names = list(planned.num_scheduled_tokens)
        return ModelRunnerOutput(names, {name: n for n, name in enumerate(names)}, sampled, kv_connector_output=told)

    def _wait_for_stores(self) -> None:
        worker = self.worker._worker
        assert worker is not None
        with worker._all_saved:
            assert worker._all_saved.wait_for(lambda: not worker._saving, GATE_S)

    def _compute(self, name: str, count: int) -> list[int]:
        """Fills the cache for a request's next tokens, from the cache alone. Returns the token behind them, if any."""
        request = self.scheduler.requests[name]
        tokens = request.all_token_ids
        # vLLM has advanced the count when it scheduled them.
        end = request.num_computed_tokens
        tables = self.scheduler.kv_cache_manager.get_block_ids(name)
        full_row, window_row = self._slots(tables[0], 0), self._slots(tables[-1], 1)
        for at in range(end - count, end):
            full = Model.full(self.weights, tokens[at], sum(map(full_row.read, range(at))))
            first = max(at - WINDOW_TOKENS + 1, 0)
            windowed = Model.windowed(full, sum(map(window_row.read, range(first, at))))
            full_row.write(at, full)
            window_row.write(at, windowed)
        if end < len(tokens):
            return []
        return [Model.next(full_row.read(end - 1), window_row.read(end - 1))]

    def _slots(self, table: Sequence[int], layer: int) -> Slots:
        return Slots(self.cache[layer], table)

    # ------------------------------------------------------------ what is stored

    def _check_tokens(self, request: Request, before: int) -> None:
        """What vLLM took of a step's tokens is right; of a step whose loads failed it takes none."""
        tokens = list(request.all_token_ids)
        for at in range(before, len(tokens)):
            wanted = Model.token(self.weights, tokens[:at])
            assert tokens[at] == wanted, f"{request.request_id}: token {at} is {tokens[at]}, not {wanted}"
        self._expect(request, tokens)

    def _expect(self, request: Request, tokens: list[int]) -> None:
        values = Model.values(self.weights, tuple(tokens))
        side = self.connector._scheduler
        assert side is not None
        mask = np.frombuffer(side.key_mask, dtype=np.uint8)
        for number, block_hash in enumerate(request.block_hashes):
            key = (np.frombuffer(block_hash[:KEY_BYTES], dtype=np.uint8) ^ mask).tobytes()
            some = slice(number * BLOCK_TOKENS, (number + 1) * BLOCK_TOKENS)
            layers = [np.array(layer[some], dtype=np.uint64).tobytes() for layer in values]
            if self.hybrid:
                self.expected[0, key], self.expected[1, key] = layers
            else:
                self.expected[0, key] = b"".join(layers)

    def check_pool(self) -> int:
        """Nothing is stored under a name that stands for something else. Returns: how many blocks were compared."""
        compared = 0
        for (_, group, key), stored in self.pool.blocks.items():
            wanted = self.expected.get((group, key))
            if wanted is not None:
                assert stored == wanted, f"a block of group {group} is stored with other bytes"
                compared += 1
        return compared

    def check_references(self) -> None:
        """Nobody holds a block once all requests have ended."""
        held = [block.block_id for block in self.scheduler.kv_cache_manager.block_pool.blocks[1:] if block.ref_cnt]
        assert not held, f"blocks {held} are held by nobody"

    def close(self) -> None:
        self.pool.gate.set()
        self.worker.shutdown()
        self.connector.shutdown()


@dataclass(frozen=True)
class Slots:
    """A request's place for each token in one layer's cache."""

    layer: NDArray[np.uint64]
    table: Sequence[int]

    def read(self, at: int) -> int:
        return int(self.layer[self.table[at // BLOCK_TOKENS], at % BLOCK_TOKENS])

    def write(self, at: int, value: int) -> None:
        self.layer[self.table[at // BLOCK_TOKENS], at % BLOCK_TOKENS] = value


def vllm_config(block_count: int, step_tokens: int, long_prefill_tokens: int) -> VllmConfig:
    cache = CacheConfig(block_size=BLOCK_TOKENS, enable_prefix_caching=True, prefix_caching_hash_algo="sha256_cbor")
    cache.num_gpu_blocks = block_count
    return VllmConfig(
        model_config=ModelConfig(model=str(MODEL), dtype="float32", max_model_len=TOKENS_MAX, skip_tokenizer_init=True),
        scheduler_config=SchedulerConfig(
            max_num_seqs=6,
            max_num_batched_tokens=step_tokens,
            max_model_len=TOKENS_MAX,
            long_prefill_token_threshold=long_prefill_tokens,
            is_encoder_decoder=False,
            async_scheduling=False,
        ),
        cache_config=cache,
        kv_transfer_config=KVTransferConfig(
            kv_connector="KVPoolConnector",
            kv_connector_module_path="engines.vllm.connector",
            kv_role="kv_both",
            kv_connector_extra_config={"model_id": "sums"},
        ),
    )


def cache_config(block_count: int, hybrid: bool) -> KVCacheConfig:
    full = FullAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=1, dtype=torch.float32)
    window = SlidingWindowSpec(
        block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=1, dtype=torch.float32, sliding_window=WINDOW_TOKENS
    )
    page = full.page_size_bytes
    assert page == BLOCK_TOKENS * TOKEN_BYTES
    groups = (
        [KVCacheGroupSpec(["layer.0"], full), KVCacheGroupSpec(["layer.1"], window)]
        if hybrid
        else [KVCacheGroupSpec(["layer.0", "layer.1"], full)]
    )
    # Of a hybrid model, vLLM gives the same bytes to layers of several groups, since a block belongs to one of them.
    # Here each layer has bytes of its own, which is the same to whoever goes by blocks.
    tensors = [KVCacheTensor(2 * block_count * page, ["layer.0", "layer.1"], block_count * page, page)]
    return KVCacheConfig(
        num_blocks=block_count,
        kv_cache_tensors=tensors,
        kv_cache_groups=groups,
        hash_block_size=BLOCK_TOKENS,
        kv_cache_layout="test",
    )
