"""Workers over real gRPC with a real node: split requests, pulls, publishing, aborts, losses."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch

from engines.torch import copies
from engines.torch.hbm import CpuBlocks
from engines.torch.model import LoadedModel
from engines.torch.request import Finish, StepEvent
from kvpool.client import PoolClient
from kvpool.core.hashing import block_keys
from kvpool.v1 import directory_pb2, engine_pb2

from .driving import prompt
from .late import LateBlocks
from .serving import PATIENCE_S, Gateway, Node, Still, all_free, eventually, expected, split, worker

pytestmark = pytest.mark.processes
PREFILL, DECODE = engine_pb2.PHASE_PREFILL, engine_pb2.PHASE_DECODE


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    node = Node("node-t", tmp_path_factory.mktemp("node"))
    yield node
    node.stop()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_a_worker_alone_serves_many(llama: LoadedModel, stack: ExitStack) -> None:
    own = stack.enter_context(worker(llama))
    gateway = stack.enter_context(Gateway(own))
    prompts = [prompt(i, 10 + 23 * i) for i in range(10)]
    for i, tokens in enumerate(prompts):
        gateway.submit(str(i), tokens, temperature=0.5 * (i % 2), seed=i)
    for i, tokens in enumerate(prompts):
        assert gateway.tokens(str(i)) == expected(llama, tokens, 12, temperature=0.5 * (i % 2), seed=i)
        assert gateway.end(str(i)).times.computed_tokens == len(tokens)
    eventually(lambda: all_free(own), "everything released")


@pytest.mark.parametrize("length", [1, 15, 16, 17, 100, 128])
def test_split_requests_answer_like_one_engine(llama: LoadedModel, node: Node, stack: ExitStack, length: int) -> None:
    workers = [stack.enter_context(worker(llama, name, node.address, pull_grace_s=PATIENCE_S)) for name in ("p", "d")]
    prefill, decode = (stack.enter_context(Gateway(w)) for w in workers)
    tokens = prompt(100 + length, length)
    answer = split(prefill, decode, node, "first", tokens, temperature=0.7, seed=3, max_tokens=30)
    assert answer == expected(llama, tokens, 30, temperature=0.7, seed=3)
    times = decode.end("first").times
    assert times.computed_tokens == 0 and times.cached_tokens_pool == length and times.pull_failures == 0
    handed = prefill.end("first")
    assert handed.finish_reason == engine_pb2.FINISH_REASON_HANDED_OFF
    assert handed.times.blocks_published == -(-length // 16)
    # Again: all blocks are there before the prefill begins, and on the decode side before the hand-off.
    assert split(prefill, decode, node, "again", tokens, max_tokens=8) == expected(llama, tokens, 8)
    assert decode.end("again").times.computed_tokens == 0
    eventually(lambda: all(all_free(w) for w in workers), "workers release everything")
    eventually(node.nothing_held, "holds are freed")


def test_many_split_requests_at_once(llama: LoadedModel, node: Node, stack: ExitStack) -> None:
    workers = [stack.enter_context(worker(llama, name, node.address)) for name in ("p", "d1", "d2")]
    prefill, *decodes = (stack.enter_context(Gateway(w)) for w in workers)
    prompts = {f"m{i}": prompt(200 + i % 7, 40 + 11 * (i % 7)) for i in range(14)}
    for i, (name, tokens) in enumerate(prompts.items()):
        decodes[i % 2].submit(name, tokens, DECODE, handoff=node.address)
        prefill.submit(name, tokens, PREFILL)
    firsts = {}
    for i, name in enumerate(prompts):
        firsts[name] = prefill.first(name)
        decodes[i % 2].first_token(name, firsts[name])
    for i, (name, tokens) in enumerate(prompts.items()):
        assert [firsts[name], *decodes[i % 2].tokens(name)] == expected(llama, tokens, 12)
    eventually(lambda: all(all_free(w) for w in workers), "workers release everything")
    eventually(node.nothing_held, "holds are freed")


def test_generated_blocks_are_pulled_by_another_worker(llama: LoadedModel, node: Node, stack: ExitStack) -> None:
    first, second = (stack.enter_context(worker(llama, name, node.address)) for name in ("a", "b"))
    tokens = prompt(300, 50)
    gateway = stack.enter_context(Gateway(first))
    gateway.submit("turn1", tokens, max_tokens=40)
    longer = np.concatenate([tokens, np.array(gateway.tokens("turn1"), dtype=np.uint32), prompt(301, 9)])
    keys = block_keys(first.engine.namespace.id(), longer, 16)
    client = stack.enter_context(PoolClient(node.address))
    client.register(first.engine.namespace)
    # 89 tokens have KV: five blocks, three of which end in generated text.
    eventually(lambda: client.lookup(first.engine.namespace.id(), keys[:5]).all(), "generated blocks are published")
    other = stack.enter_context(Gateway(second))
    run = directory_pb2.Run(source_id="node-t", tier=2, first=0, count=6, address=node.address)
    other.submit("turn2", longer, pull=[run])
    assert other.tokens("turn2") == expected(llama, longer, 12)
    times = other.end("turn2").times
    assert (times.cached_tokens_pool, times.pull_failures) == (80, 1) and times.computed_tokens == len(longer) - 80
    assert times.bytes_pulled == 5 * second.engine.namespace.groups[0].block_bytes
    eventually(lambda: first.counters()["blocks_published"] == 5, "they are counted")
    eventually(node.nothing_held, "leases are released")


def late_memory(cache: torch.Tensor, made: list[LateBlocks], *, automatic: bool = False) -> LateBlocks:
    made.append(LateBlocks(CpuBlocks(cache)))
    made[-1].automatic = automatic
    return made[-1]


def test_nothing_is_committed_before_its_copy(llama: LoadedModel, node: Node, stack: ExitStack) -> None:
    made: list[LateBlocks] = []
    late = stack.enter_context(worker(llama, "late", node.address, memory=lambda cache: late_memory(cache, made)))
    (memory,) = made
    gateway = stack.enter_context(Gateway(late))
    tokens = prompt(400, 96)
    keys = block_keys(late.engine.namespace.id(), tokens, 16)
    client = stack.enter_context(PoolClient(node.address))
    client.register(late.engine.namespace)
    gateway.submit("late", tokens, PREFILL)
    gateway.first("late")
    seen = 0
    while gateway_open(gateway, "late"):
        eventually(lambda: bool(memory.pending) or not gateway_open(gateway, "late"), "a copy is begun")
        if memory.pending:
            found = client.lookup(late.engine.namespace.id(), keys)
            assert found.sum() == seen, "committed before the copy's event"
            seen = min(seen + 4, 6)
            memory.complete()
            eventually(lambda: bool(memory.pending) or not gateway_open(gateway, "late"), "the next copy")
    assert client.lookup(late.engine.namespace.id(), keys).all() and memory.staged == 0
    out = np.zeros((6, memory.block_bytes), dtype=np.uint8)
    assert client.get(late.engine.namespace.id(), keys, out, handoff="late").found.all()
    plain = stack.enter_context(Gateway(stack.enter_context(worker(llama, "plain"))))
    run = directory_pb2.Run(source_id="node-t", tier=2, first=0, count=6, address=node.address)
    plain.submit("r", tokens, pull=[run])
    assert plain.tokens("r") == expected(llama, tokens, 12)
    assert plain.end("r").times.cached_tokens_pool == 80


def test_nothing_is_computed_before_pulled_blocks_are_copied_in(
    llama: LoadedModel, node: Node, stack: ExitStack
) -> None:
    made: list[LateBlocks] = []
    prefill = stack.enter_context(
        worker(llama, "p", node.address, memory=lambda cache: late_memory(cache, made, automatic=True))
    )
    decode = stack.enter_context(
        worker(llama, "d", node.address, pull_grace_s=PATIENCE_S, memory=lambda cache: late_memory(cache, made))
    )
    memory = made[1]
    first_side, second_side = stack.enter_context(Gateway(prefill)), stack.enter_context(Gateway(decode))
    tokens = prompt(450, 100)
    second_side.submit("r", tokens, DECODE, handoff=node.address)
    first_side.submit("r", tokens, PREFILL)
    first = first_side.first("r")
    assert first_side.end("r").finish_reason == engine_pb2.FINISH_REASON_HANDED_OFF
    second_side.first_token("r", first)
    copies = 0
    while not second_side.events("r"):
        eventually(lambda: bool(memory.pending) or bool(second_side.events("r")), "a copy is begun")
        if memory.pending:
            assert not second_side.events("r"), "decoded before its blocks were copied in"
            memory.complete()
            copies += 1
    assert copies >= 4  # at least two batches of blocks: rows to fill, then the copy in
    assert [first, *second_side.tokens("r")] == expected(llama, tokens, 12)
    assert second_side.end("r").times.computed_tokens == 0 and memory.staged == 0
    memory.automatic = True
    memory.complete()
    eventually(lambda: all_free(decode) and all_free(prefill), "everything released")
    eventually(node.nothing_held, "holds are freed")


def gateway_open(gateway: Gateway, name: str) -> bool:
    return not any(e.finish_reason for e in gateway.events(name))


def test_a_lost_node_costs_computing_only(llama: LoadedModel, tmp_path: Path, stack: ExitStack) -> None:
    node = Node("node-lost", tmp_path)
    stack.callback(node.stop)
    workers = [stack.enter_context(worker(llama, name, node.address)) for name in ("p", "d")]
    prefill, decode = (stack.enter_context(Gateway(w)) for w in workers)
    tokens = [prompt(500 + i, 150) for i in range(4)]
    for i in range(4):
        decode.submit(str(i), tokens[i], DECODE, handoff=node.address)
    node.kill()
    for i in range(4):
        prefill.submit(str(i), tokens[i], PREFILL)
        first = prefill.first(str(i))
        decode.first_token(str(i), first)
        assert [first, *decode.tokens(str(i))] == expected(llama, tokens[i], 12)
        assert prefill.end(str(i)).finish_reason == engine_pb2.FINISH_REASON_HANDED_OFF
    eventually(lambda: all(all_free(w) for w in workers), "workers release everything")


def test_blocks_that_never_come_are_computed(llama: LoadedModel, node: Node, stack: ExitStack) -> None:
    own = stack.enter_context(worker(llama, "d", node.address))
    decode = stack.enter_context(Gateway(own))
    tokens = prompt(600, 90)
    answer = expected(llama, tokens, 12)
    decode.submit("r", tokens, DECODE, handoff=node.address)
    decode.first_token("r", answer[0])
    assert decode.tokens("r") == answer[1:]
    times = decode.end("r").times
    assert times.pull_failures == 6 and times.computed_tokens >= 90
    eventually(node.nothing_held, "waits end")


def test_aborts_and_ended_streams_leave_nothing(llama: LoadedModel, node: Node, stack: ExitStack) -> None:
    own = stack.enter_context(worker(llama, "w", node.address))
    still = Still(own, 1)
    gateway = stack.enter_context(Gateway(own))
    gateway.submit("decoding", prompt(700, 40), max_tokens=900)
    gateway.submit("handed", prompt(701, 40), DECODE, handoff=node.address)
    gateway.first("decoding")
    for name in ("decoding", "handed", "unknown"):
        gateway.abort(name)
    for name in ("decoding", "handed"):
        assert gateway.end(name).finish_reason == engine_pb2.FINISH_REASON_ABORT
    eventually(lambda: all_free(own), "aborted requests release everything")
    still.more(1)
    with Gateway(own) as other:
        other.submit("waits", prompt(703, 40), DECODE, handoff=node.address)
        other.submit("lost", prompt(702, 40), max_tokens=900)
        other.first("lost")
    eventually(lambda: all_free(own), "requests of an ended stream release everything")
    assert own.counters()["streams_lost"] == 1 and own.counters()["requests_aborted"] == 4
    still.go.set()
    gateway.submit("alive", prompt(704, 20))
    assert gateway.tokens("alive") == expected(llama, prompt(704, 20), 12)
    eventually(node.nothing_held, "holds and waits end")


def test_deadlines_end_requests_that_wait(llama: LoadedModel, node: Node, stack: ExitStack) -> None:
    own = stack.enter_context(worker(llama, "w", node.address))
    gateway = stack.enter_context(Gateway(own))
    gateway.submit("r", prompt(800, 40), DECODE, handoff=node.address, deadline_ms=200)
    end = gateway.end("r")
    assert end.finish_reason == engine_pb2.FINISH_REASON_ERROR and "deadline" in end.error
    eventually(lambda: all_free(own), "everything released")
    eventually(node.nothing_held, "waits end")


GARBAGE = [
    ({"namespace_id": b"x" * 16}, "namespace"),
    ({"token_ids": b"123"}, "multiple of 4"),
    ({"token_ids": b""}, "at least one token"),
    ({"token_ids": b"\xff" * 8}, "under 160"),
    ({"phase": 0}, "phase"),
    ({"phase": 77}, "phase"),
    ({"root_key": b"short"}, "16 bytes"),
    ({"sampling": engine_pb2.Sampling(max_tokens=0)}, "max_tokens"),
    ({"sampling": engine_pb2.Sampling(max_tokens=2**31)}, "context"),
    ({"sampling": engine_pb2.Sampling(max_tokens=1, temperature=float("nan"))}, "temperature"),
    ({"sampling": engine_pb2.Sampling(max_tokens=1, temperature=-1.0)}, "temperature"),
    ({"sampling": engine_pb2.Sampling(max_tokens=1, top_p=1.5)}, "top_p"),
    ({"request_id": ""}, "id"),
]


def test_garbage_is_refused_and_leaves_nothing(llama: LoadedModel, stack: ExitStack) -> None:
    own = stack.enter_context(worker(llama))
    Still(own, 1)
    gateway = stack.enter_context(Gateway(own))
    good = gateway.submit("good", prompt(1, 20), max_tokens=200)
    for i, (change, words) in enumerate(GARBAGE):
        submit = engine_pb2.Submit()
        submit.CopyFrom(good)
        submit.request_id = f"bad-{i}"
        for name, value in change.items():
            if isinstance(value, (bytes, str, int)):
                setattr(submit, name, value)
            else:
                getattr(submit, name).CopyFrom(value)
        gateway.send(submit)
        end = gateway.end(submit.request_id)
        assert end.finish_reason == Finish.ERROR and words in end.error, (change, end.error)
    with Gateway(own) as stranger:
        # What is another gateway's request is not a stranger's to answer.
        stranger.first_token("good", 3)
        stranger.send(engine_pb2.Submit(request_id="last"))
        stranger.end("last")
    assert not any(e.finish_reason for e in gateway.events("good"))
    gateway.first_token("good", 3)
    gateway.first_token("nobody", 3)
    gateway.send(engine_pb2.Submit())
    assert gateway.end("good").error, "a first token for a request that has its own is an error"
    eventually(lambda: all_free(own), "everything released")


def test_a_failing_step_fails_its_requests_only(
    llama: LoadedModel, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = stack.enter_context(worker(llama))
    gateway = stack.enter_context(Gateway(own))

    def fail(*_: object) -> None:
        raise MemoryError("no memory for this step")

    with monkeypatch.context() as patch:
        patch.setattr(own.engine, "_compute", fail)
        gateway.submit("r", prompt(1, 40))
        end = gateway.end("r")
    assert end.finish_reason == Finish.ERROR and "no memory" in end.error
    gateway.submit("s", prompt(1, 40))
    assert gateway.tokens("s") == expected(llama, prompt(1, 40), 12)
    eventually(lambda: all_free(own), "everything released")


def test_a_system_without_threads_computes_what_it_cannot_pull(
    llama: LoadedModel, node: Node, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = stack.enter_context(worker(llama, "d", node.address))
    gateway = stack.enter_context(Gateway(own))
    tokens = prompt(900, 90)
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "pull":
            raise RuntimeError("can't start new thread")
        start(thread)

    run = directory_pb2.Run(source_id="node-t", tier=2, first=0, count=5, address=node.address)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        gateway.submit("r", tokens, pull=[run])
        assert gateway.tokens("r") == expected(llama, tokens, 12)
    assert gateway.end("r").times.pull_failures == 5
    eventually(lambda: all_free(own), "everything released")


def test_blocks_stay_lent_while_a_slow_copy_may_still_write_them(
    llama: LoadedModel, node: Node, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "COPY_SLOW_S", 0.05)
    made: list[LateBlocks] = []
    source = stack.enter_context(Gateway(stack.enter_context(worker(llama, "p", node.address))))
    slow = stack.enter_context(worker(llama, "d", node.address, memory=lambda cache: late_memory(cache, made)))
    gateway = stack.enter_context(Gateway(slow))
    tokens = prompt(910, 64)
    source.submit("r", tokens, PREFILL)
    assert source.end("r").finish_reason == engine_pb2.FINISH_REASON_HANDED_OFF
    gateway.submit("r", tokens, DECODE, handoff=node.address)
    (memory,) = made
    eventually(lambda: len(memory.pending) == 1, "rows are asked for")
    memory.complete()
    eventually(lambda: len(memory.pending) == 1, "the copy in is begun")
    gateway.abort("r")
    assert gateway.end("r").finish_reason == engine_pb2.FINISH_REASON_ABORT
    threading.Event().wait(0.5)
    assert not all_free(slow) and memory.staged == 1, "given back under a copy that is not over"
    memory.complete()
    eventually(lambda: all_free(slow) and memory.staged == 0, "everything released")
    eventually(node.nothing_held, "holds are freed")


def test_an_end_that_is_lost_in_a_failing_step_is_told_as_an_error(
    llama: LoadedModel, node: Node, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where blocks of the request are still being published."""
    made: list[LateBlocks] = []
    own = stack.enter_context(worker(llama, "w", node.address, memory=lambda cache: late_memory(cache, made)))
    gateway = stack.enter_context(Gateway(own))
    step = own.engine.step

    def lose_the_end() -> list[StepEvent]:
        events = step()
        if any(event.finish is not Finish.NONE for event in events):
            raise MemoryError("made")
        return events

    with monkeypatch.context() as patch:
        patch.setattr(own.engine, "step", lose_the_end)
        gateway.submit("r", prompt(920, 40), max_tokens=3)
        end = gateway.end("r")
    assert end.finish_reason == Finish.ERROR and "made" in end.error
    made[0].automatic = True
    made[0].complete()
    eventually(lambda: all_free(own), "everything released")
