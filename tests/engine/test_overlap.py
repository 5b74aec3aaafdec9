"""A split request's blocks travel while later chunks are computed, and how much of it decode waits for is measured."""

from __future__ import annotations

import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest

from engines.torch.batching import Plan
from engines.torch.counters import Counters
from engines.torch.exposure import Exposure, ExposureMeter, exposure
from engines.torch.hbm import CpuBlocks
from engines.torch.links import Links
from engines.torch.metrics import serve_metrics
from engines.torch.model import LoadedModel
from engines.torch.publishing import Handoff, Publisher, PublishJob
from engines.torch.request import BlockSet
from engines.torch.worker import EngineWorker
from kvpool.client import Hold, PoolClient
from kvpool.core.hashing import block_keys
from kvpool.v1 import engine_pb2

from .driving import prompt
from .serving import PATIENCE_S, Gateway, Node, Still, all_free, eventually, expected, split, worker

PREFILL, DECODE = engine_pb2.PHASE_PREFILL, engine_pb2.PHASE_DECODE
TRIES_S = 200.0
CHUNK_BLOCKS = 4  # of 16 tokens, as `serving.worker` has it


# ---------------------------------------------------------------- the definition


def test_exposed_is_what_is_not_hidden_behind_the_prefill() -> None:
    reads = [(1.0, 1.5), (2.0, 2.25), (3.0, 3.5)]
    assert exposure(reads, first_token_s=4.0, ended_s=3.5) == Exposure(1_250_000, 0, 1_250_000)
    # One read is cut by the first token; publishing that is waited for is exposed too.
    late = exposure(reads, first_token_s=3.25, ended_s=3.5)
    assert late == Exposure(1_250_000, 250_000, 1_250_000) and late.ratio == 0.2
    waiting = exposure(reads, first_token_s=2.25, ended_s=3.5)
    assert waiting == Exposure(1_250_000, 1_250_000, 2_000_000)
    assert exposure([], first_token_s=1.0, ended_s=2.0).ratio == 1.0
    assert exposure([], first_token_s=2.0, ended_s=1.0).ratio == 0.0


def test_histograms_count_each_hand_off_once() -> None:
    meter = ExposureMeter()
    for exposed_us in (0, 100, 400, 1000):
        meter.add(Exposure(1000, exposed_us, 1000))
    ratio = meter.histograms()["kvpool_exposed_transfer_ratio"]
    by_bound = dict(zip(ratio.bounds, ratio.counts, strict=True))
    assert (by_bound[0.0], by_bound[0.1], by_bound[0.5], by_bound[1.0], ratio.count) == (1, 2, 3, 4, 4)
    assert ratio.total == pytest.approx(1.5)


def test_metrics_are_served() -> None:
    counters, meter = Counters(), ExposureMeter()
    counters.add("requests", 3)
    meter.add(Exposure(1000, 400, 1000))
    port, stop = serve_metrics(0, "w", counters.snapshot, meter.histograms)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_S) as reply:
            lines = set(reply.read().decode().splitlines())
    finally:
        stop()
    assert 'kvpool_worker_requests_total{instance="w"} 3.0' in lines
    assert 'kvpool_exposed_transfer_ratio_bucket{instance="w",le="0.3"} 0.0' in lines
    assert 'kvpool_exposed_transfer_ratio_bucket{instance="w",le="0.5"} 1.0' in lines
    assert 'kvpool_exposed_transfer_ratio_bucket{instance="w",le="+Inf"} 1.0' in lines
    assert 'kvpool_exposed_transfer_ratio_sum{instance="w"} 0.4' in lines


# ---------------------------------------------------------------- over a real node


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    node = Node("node-o", tmp_path_factory.mktemp("node"))
    yield node
    node.stop()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def compute_slowly(own: EngineWorker, seconds: float) -> None:
    """As on a device: a chunk takes its time, and none of this process's."""
    compute = own.engine._compute

    def slow(running: object, plan: Plan) -> None:
        if plan.prefill_tokens:
            threading.Event().wait(seconds)
        compute(running, plan)  # type: ignore[arg-type]

    own.engine._compute = slow  # type: ignore[method-assign]


class Gate:
    """Stops a worker's computing before its n-th prompt chunk."""

    def __init__(self, own: EngineWorker, stack: ExitStack, chunk: int) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        compute, self._left = own.engine._compute, chunk
        stack.callback(self.open.set)

        def gated(running: object, plan: Plan) -> None:
            if plan.prefill_tokens:
                self._left -= 1
                if self._left == 0:
                    self.reached.set()
                    assert self.open.wait(3 * PATIENCE_S)
            compute(running, plan)  # type: ignore[arg-type]

        own.engine._compute = gated  # type: ignore[method-assign]


@pytest.mark.processes
def test_blocks_are_read_while_later_chunks_are_computed(llama: LoadedModel, node: Node, stack: ExitStack) -> None:
    """And the last chunk's slots are reserved before it is computed: copy and commit are all that is left then."""
    workers = [stack.enter_context(worker(llama, name, node.address, pull_grace_s=PATIENCE_S)) for name in ("p", "d")]
    gate = Gate(workers[0], stack, chunk=5)
    prefill, decode = (stack.enter_context(Gateway(w)) for w in workers)
    tokens = prompt(40, 4 * 64 + 40)
    decode.submit("r", tokens, DECODE, handoff=node.address)
    prefill.submit("r", tokens, PREFILL)
    assert gate.reached.wait(PATIENCE_S)
    eventually(lambda: workers[1].counters()["blocks_pulled"] == 4 * CHUNK_BLOCKS, "blocks of four chunks are read")
    # Two full blocks and the partial last one.
    eventually(lambda: node.held()["blocks_writing"] == 3, "the last chunk's slots are reserved")
    gate.open.set()
    first = prefill.first("r")
    decode.first_token("r", first)
    assert [first, *decode.tokens("r")] == expected(llama, tokens, 12)
    times = decode.end("r").times
    assert (times.computed_tokens, times.cached_tokens_pool) == (0, len(tokens))
    assert prefill.end("r").times.blocks_published == 4 * CHUNK_BLOCKS + 3
    assert workers[1].exposures()["kvpool_exposed_transfer_ratio"].count == 1
    eventually(lambda: all(all_free(w) for w in workers), "workers release everything")
    eventually(node.nothing_held, "holds are freed")


@pytest.mark.processes
def test_an_aborted_prefill_gives_back_what_it_reserved_ahead(llama: LoadedModel, node: Node, stack: ExitStack) -> None:
    own = stack.enter_context(worker(llama, "p", node.address))
    Still(own, 2)
    gateway = stack.enter_context(Gateway(own))
    gateway.submit("r", prompt(41, 300), PREFILL)
    eventually(lambda: own.counters()["blocks_published"] == 2 * CHUNK_BLOCKS, "blocks of two chunks are published")
    eventually(lambda: node.held()["blocks_writing"] == CHUNK_BLOCKS, "the third chunk's slots are reserved")
    gateway.abort("r")
    assert gateway.end("r").finish_reason == engine_pb2.FINISH_REASON_ABORT
    eventually(lambda: node.held()["blocks_writing"] == 0 and node.held()["reservations"] == 0, "slots are given back")
    eventually(lambda: all_free(own), "the worker releases everything")
    with PoolClient(node.address) as client:
        client.register(own.engine.namespace)
        namespace = own.engine.namespace.id()
        client.free_hold(namespace, block_keys(namespace, prompt(41, 300), 16), "r")
    eventually(node.nothing_held, "nothing is left")


@pytest.mark.processes
def test_a_reservation_that_was_lost_is_made_again(llama: LoadedModel, node: Node, stack: ExitStack) -> None:
    own = stack.enter_context(worker(llama, "p", node.address))
    spec, ended = own.engine.namespace, threading.Semaphore(0)
    links = Links(spec, client="publisher", credential="")
    stack.callback(links.close)
    done: list[int] = []

    def on_ended(job: PublishJob, count: int) -> None:
        done.append(count)
        ended.release()

    counters, memory = Counters(), CpuBlocks(own.engine.cache)
    publisher = Publisher(memory, links, counters, on_ended=on_ended, jobs_max=8)
    stack.callback(publisher.close)
    keys = np.random.default_rng(5).integers(0, 256, (6, 16)).astype(np.uint8)
    handoff = Handoff(node.address, Hold("lost", 60.0))
    publisher.submit(PublishJob(BlockSet("r", 0, keys[:2], np.arange(2), following=keys[2:]), node.address, handoff))
    assert ended.acquire(timeout=PATIENCE_S)
    eventually(lambda: handoff.ahead is not None, "four blocks are reserved ahead")
    assert handoff.ahead is not None
    with links.client(node.address) as client:
        client.abort(handoff.ahead[1])
    publisher.submit(
        PublishJob(BlockSet("r", 2, keys[2:], np.arange(2, 6), parent=keys[1].tobytes()), node.address, handoff)
    )
    assert ended.acquire(timeout=PATIENCE_S) and done == [2, 4]
    publisher.end(handoff)
    out = np.zeros((6, memory.block_bytes), dtype=np.uint8)
    with links.client(node.address) as client:
        assert client.get(spec.id(), keys, out, handoff="lost").found.all()
    assert handoff.publish_us > 0 and counters.snapshot()["blocks_published"] == 6
    eventually(node.nothing_held, "nothing is left")


@pytest.mark.processes
@pytest.mark.parametrize("chunks", [4, 8])
def test_under_a_tenth_of_the_transfer_is_exposed(
    llama: LoadedModel, node: Node, stack: ExitStack, chunks: int
) -> None:
    workers = [
        stack.enter_context(worker(llama, name, node.address, kv_tokens=16384, chunk_tokens=96)) for name in ("p", "d")
    ]
    compute_slowly(workers[0], 0.03)
    prefill, decode = (stack.enter_context(Gateway(w)) for w in workers)
    ratios: list[float] = []
    end_s = time.monotonic() + TRIES_S
    while sum(ratio < 0.1 for ratio in ratios) < 3:
        # What is left is a few round trips: whoever else uses this machine makes them longer, but not each time.
        assert time.monotonic() < end_s, sorted(ratios)
        name, before = f"r{len(ratios)}", [w.counters() for w in workers]
        tokens = prompt(1000 * chunks + len(ratios), 96 * chunks - 5)
        split(prefill, decode, node, name, tokens, max_tokens=4)
        prefill.end(name)
        spent = {n: sum(w.counters()[n] - b[n] for w, b in zip(workers, before, strict=True)) for n in before[0]}
        assert spent["handoff_publish_us"] > 0 and spent["handoff_read_us"] > 0
        ratios.append(spent["handoff_exposed_us"] / (spent["handoff_publish_us"] + spent["handoff_read_us"]))
    print("exposed part of the transfer:", [round(ratio, 3) for ratio in ratios])
