"""Blocks of a worker's HBM, pulled by others straight from the worker: exact bytes or a miss, and nothing left over."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from engines.torch.engine import Engine
from engines.torch.generate import generate
from engines.torch.model import LoadedModel
from engines.torch.request import Sampling
from engines.torch.worker import EngineWorker
from kvpool.client import PoolClient
from kvpool.core.errors import KvpoolError, NamespaceMismatch, Unsupported
from kvpool.core.hashing import block_keys
from kvpool.core.ids import Tier
from kvpool.v1 import directory_pb2

from .conftest import EXACT
from .driving import cached_contents, prompt
from .serving import PATIENCE_S, Gateway, all_free, eventually, expected, worker
from .test_worker import late_memory

pytestmark = pytest.mark.processes
STAGING_BYTES = 4 << 20


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def holder(model: LoadedModel, folder: Path, name: str = "holder", **changes: object) -> EngineWorker:
    """A worker whose HBM is a source."""
    changes = {"hbm_staging_bytes": STAGING_BYTES, "segment_dir": str(folder), **changes}
    return worker(model, name, **changes)  # type: ignore[arg-type]


def reader(own: EngineWorker, stack: ExitStack, **more: object) -> PoolClient:
    made = PoolClient(own.address, client="reader", timeout_s=PATIENCE_S, **more)  # type: ignore[arg-type]
    client = stack.enter_context(made)
    client.register(own.engine.namespace)
    return client


def nothing_held(client: PoolClient) -> bool:
    stats = client.stats()
    names = ("leases", "pins", "reservations", "quarantined", "waiters", "blocks_writing")
    return not any(getattr(stats, name) for name in names)


def run_of(own: EngineWorker, count: int) -> directory_pb2.Run:
    return directory_pb2.Run(
        source_id=own.info().hbm_source_id, tier=int(Tier.HBM), first=0, count=count, address=own.address
    )


def blocks_of(model: LoadedModel, *prompts: np.ndarray, count: int = 1) -> dict[bytes, bytes]:
    """What blocks of these prompts hold, computed by an engine of our own."""
    engine = Engine(model, EXACT)
    generate(engine, [p.tolist() for p in prompts], Sampling(count, ignore_eos=True))
    return cached_contents(engine)


def test_a_worker_pulls_from_the_hbm_of_another(llama: LoadedModel, tmp_path: Path, stack: ExitStack) -> None:
    """No node at all: prompt blocks and generated ones."""
    first = stack.enter_context(holder(llama, tmp_path))
    second = stack.enter_context(worker(llama, "second"))
    gateway, other = stack.enter_context(Gateway(first)), stack.enter_context(Gateway(second))
    tokens = prompt(1, 100)
    gateway.submit("turn1", tokens, max_tokens=40)
    longer = np.concatenate([tokens, np.array(gateway.tokens("turn1"), dtype=np.uint32), prompt(2, 20)])
    other.submit("turn2", longer, pull=[run_of(first, 8)])
    assert other.tokens("turn2") == expected(llama, longer, 12)
    times = other.end("turn2").times
    assert (times.cached_tokens_pool, times.pull_failures) == (128, 0)
    assert times.computed_tokens == len(longer) - 128
    assert first.counters()["hbm_blocks_promoted"] == 8
    eventually(lambda: all_free(first) and all_free(second), "both release everything")
    client = reader(first, stack)
    eventually(lambda: nothing_held(client), "leases are released")


@pytest.mark.parametrize("channel", ["shm", "tcp"])
def test_readers_get_just_the_engines_bytes(llama: LoadedModel, tmp_path: Path, stack: ExitStack, channel: str) -> None:
    own = stack.enter_context(holder(llama, tmp_path))
    gateway, client = stack.enter_context(Gateway(own)), reader(own, stack, channels=[channel])
    tokens = prompt(3, 150)
    gateway.submit("r", tokens, max_tokens=1)
    gateway.tokens("r")
    spec = own.engine.namespace
    keys = block_keys(spec.id(), np.concatenate([tokens, prompt(4, 64)]), 16)
    eventually(lambda: client.lookup(spec.id(), keys).sum() == 9, "computed blocks are known")
    truth = blocks_of(llama, tokens)
    for _ in ("copied out of HBM", "still staged"):
        out = np.zeros((len(keys), spec.groups[0].block_bytes), dtype=np.uint8)
        result = client.get(spec.id(), keys, out)
        assert result.found.tolist() == [True] * 9 + [False] * 4 and result.channel == channel
        assert all(out[i].tobytes() == truth[keys[i].tobytes()] for i in range(9))
    assert own.counters()["hbm_blocks_promoted"] == 9, "what is staged is not copied again"
    assert client.info().tier == int(Tier.HBM) and client.source_id == own.info().hbm_source_id
    eventually(lambda: nothing_held(client) and all_free(own), "everything released")


def test_what_is_gone_costs_a_failed_lease(llama: LoadedModel, tmp_path: Path, stack: ExitStack) -> None:
    """The hint is stale: the next origin is asked, then the rest is computed."""
    empty, full = (stack.enter_context(holder(llama, tmp_path, name)) for name in ("empty", "full"))
    gateway, other = stack.enter_context(Gateway(full)), stack.enter_context(Gateway(empty))
    tokens = prompt(5, 100)
    gateway.submit("r", tokens, max_tokens=1)
    gateway.tokens("r")
    last = stack.enter_context(worker(llama, "last"))
    reads = stack.enter_context(Gateway(last))
    reads.submit("stale", tokens, pull=[run_of(empty, 6), run_of(full, 6)])
    assert reads.tokens("stale") == expected(llama, tokens, 12)
    assert reads.end("stale").times.cached_tokens_pool == 96
    other.submit("alone", prompt(6, 100), pull=[run_of(full, 6)])
    assert other.tokens("alone") == expected(llama, prompt(6, 100), 12)
    assert other.end("alone").times.pull_failures == 6
    eventually(lambda: all(all_free(w) for w in (empty, full, last)), "all release everything")


def test_nobody_writes_or_removes(llama: LoadedModel, tmp_path: Path, stack: ExitStack) -> None:
    own = stack.enter_context(holder(llama, tmp_path))
    client, spec = reader(own, stack), own.engine.namespace
    keys = block_keys(spec.id(), prompt(7, 32), 16)
    with pytest.raises(Unsupported):
        client.reserve(spec.id(), keys)
    with pytest.raises(Unsupported):
        client.remove(spec.id(), keys)
    with pytest.raises(NamespaceMismatch):
        client.register(Engine(llama).namespace)
    with pytest.raises(NamespaceMismatch):
        client.register_objects("things")


def test_nothing_is_readable_before_its_copy_is_over(llama: LoadedModel, tmp_path: Path, stack: ExitStack) -> None:
    made: list = []  # type: ignore[type-arg]
    own = stack.enter_context(holder(llama, tmp_path, memory=lambda cache: late_memory(cache, made)))
    gateway, client = stack.enter_context(Gateway(own)), reader(own, stack)
    tokens, spec = prompt(8, 70), own.engine.namespace
    gateway.submit("r", tokens, max_tokens=1)
    gateway.tokens("r")
    keys = block_keys(spec.id(), tokens, 16)
    eventually(lambda: client.lookup(spec.id(), keys).all(), "computed blocks are known")
    out = np.zeros((4, spec.groups[0].block_bytes), dtype=np.uint8)
    found: list[np.ndarray] = []

    def read() -> None:
        found.append(client.get(spec.id(), keys, out, ttl_s=PATIENCE_S, promote_s=PATIENCE_S).found)

    thread = threading.Thread(target=read)
    thread.start()
    eventually(lambda: len(made[0].pending) == 1, "the copy is begun")
    assert {block.state for block in client.list_blocks()} == {"writing"}, "readable before the copy's event"
    assert not found and not all_free(own), "the engine's blocks are held meanwhile"
    made[0].complete()
    thread.join(PATIENCE_S)
    truth = blocks_of(llama, tokens)
    assert found[0].all() and all(out[i].tobytes() == truth[keys[i].tobytes()] for i in range(4))
    eventually(lambda: all_free(own) and made[0].staged == 0 and nothing_held(client), "everything released")


def test_reading_while_the_engine_reuses_its_blocks(llama: LoadedModel, tmp_path: Path, stack: ExitStack) -> None:
    """HBM and staging memory both too small: whatever is read is right, and what is gone is a miss."""
    block_bytes = Engine(llama, EXACT).namespace.groups[0].block_bytes
    own = stack.enter_context(
        holder(llama, tmp_path, kv_tokens=16 * 24, hbm_staging_bytes=12 * block_bytes, batch_max=2)
    )
    gateway, client = stack.enter_context(Gateway(own)), reader(own, stack)
    spec, prompts = own.engine.namespace, [prompt(20 + i, 130) for i in range(6)]
    truth = blocks_of(llama, *prompts)
    hits, done, wrong = 0, threading.Event(), []

    def read() -> None:
        nonlocal hits
        rng = np.random.default_rng(9)
        while not done.is_set():
            keys = block_keys(spec.id(), prompts[int(rng.integers(6))], 16)
            out = np.zeros((len(keys), block_bytes), dtype=np.uint8)
            for i in np.flatnonzero(client.get(spec.id(), keys, out).found).tolist():
                hits += 1
                if out[i].tobytes() != truth[keys[i].tobytes()]:
                    wrong.append(i)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        # Readers that were slow to begin have their time.
        n, end_s = 0, time.monotonic() + PATIENCE_S
        while n < 24 or not (hits or time.monotonic() > end_s):
            gateway.submit(str(n), prompts[n % 6], max_tokens=2)
            gateway.tokens(str(n))
            n += 1
    finally:
        done.set()
        for thread in threads:
            thread.join(PATIENCE_S)
    assert not wrong and hits > 0
    assert client.counters.digest_errors == 0
    eventually(lambda: all_free(own) and nothing_held(client), "everything released")


def test_without_room_the_worker_serves_all_the_same(llama: LoadedModel, tmp_path: Path, stack: ExitStack) -> None:
    for change in ({"segment_dir": str(tmp_path / "nowhere")}, {"hbm_staging_bytes": 4096}):
        with holder(llama, tmp_path, **change) as own, Gateway(own) as gateway:
            gateway.submit("r", prompt(9, 40))
            assert gateway.tokens("r") == expected(llama, prompt(9, 40), 12)
            with pytest.raises(KvpoolError), PoolClient(own.address, timeout_s=2.0) as client:
                client.register(own.engine.namespace)
    assert not list(tmp_path.iterdir()), "no segment is left"
