"""What a reader gets of answers that go on, end or fail while it is busy with something else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvpool.core.errors import KvpoolError
from kvpool.v1 import scheduler_pb2
from scheduler.gateway import events as ev
from scheduler.gateway.config import GatewayConfig
from scheduler.gateway.errors import ApiError
from scheduler.gateway.generation import Backends, Generation, Piece
from scheduler.gateway.metrics import Metrics
from scheduler.gateway.streaming import merged
from scheduler.gateway.submission import GenerationSpec
from tests.gateway.cluster_made import run


class _Scheduler:
    async def place(self, *_: Any) -> scheduler_pb2.PlaceReply:
        target = scheduler_pb2.Target(instance_id="w")
        return scheduler_pb2.PlaceReply(placement=scheduler_pb2.Placement(prefill=target, decode=target))

    def report(self, _: Any) -> None:
        return


class _Links:
    """Args: submitted: called, a moment later, when an engine has the request."""

    def __init__(self, submitted: Callable[[], object]) -> None:
        self._submitted = submitted

    def link(self, *_: Any) -> Any:
        def submit(*_: Any) -> None:
            asyncio.get_running_loop().call_soon(self._submitted)

        def nothing(*_: Any) -> None:
            return

        return SimpleNamespace(submit=submit, abort=nothing, release=nothing)


def _generation(name: str, scheduler: Any = None, *, says: tuple[int, ...] = ()) -> Generation:
    """Args: says: tokens that its engine says at once."""
    model: Any = SimpleNamespace(
        name="m", namespace_id=bytes(16), eos_tokens=frozenset(), root_key=lambda _: bytes(16),
        block_keys=lambda *_: np.zeros((0, 16), dtype=np.uint8),
        tokenizer=SimpleNamespace(decode=lambda ids: "".join(chr(97 + i) for i in ids)),
    )  # fmt: skip
    spec = GenerationSpec(name, model, np.arange(3, dtype=np.uint32), 4, 0.0, 1.0, 1)
    links = _Links(lambda: generation.feed(ev.DecodeTokens(0, says)) if says else None)
    backends = Backends(GatewayConfig(), scheduler or _Scheduler(), links, Metrics())  # type: ignore[arg-type]
    generation = Generation(spec, backends, asyncio.get_running_loop().time())
    return generation


@pytest.mark.parametrize("count", [1, 3])
def test_an_answer_that_ends_while_its_reader_is_busy_is_whole(count: int) -> None:
    async def test() -> None:
        generations = [_generation(str(i), says=(0, 1)) for i in range(count)]
        whole = [Piece() for _ in generations]
        async with aclosing(merged(generations)) as pieces:
            async for index, piece in pieces:
                begins = not whole[index].token_ids
                whole[index].token_ids += piece.token_ids
                whole[index].text += piece.text
                whole[index].finish = piece.finish
                if begins:
                    generations[index].feed(ev.DecodeTokens(0, (2, 3), last=True))
                    generations[index].feed(ev.DecodeEnded(0, ev.Finish.LENGTH))
                    await asyncio.sleep(0)
        assert [(w.token_ids, w.text, w.finish) for w in whole] == [([0, 1, 2, 3], "abcd", "length")] * count

    run(test())


def test_what_came_before_a_failure_is_read_first() -> None:
    async def test() -> None:
        generation = _generation("r", says=(0,))
        tokens: list[int] = []
        with pytest.raises(ApiError):
            async for piece in generation.pieces():
                if not tokens:
                    generation.feed(ev.DecodeTokens(0, (1,)))
                    generation.feed(ev.DeadlinePassed())
                tokens += piece.token_ids
        assert tokens == [0, 1]

    run(test())


@pytest.mark.parametrize("count", [1, 2])
def test_a_bug_while_placing_ends_the_request(count: int) -> None:
    class Broken(_Scheduler):
        async def place(self, *_: Any) -> scheduler_pb2.PlaceReply:
            raise ValueError("made")

    async def test() -> None:
        with pytest.raises(ApiError):
            async for _ in merged([_generation(str(i), Broken()) for i in range(count)]):
                pass

    run(test())


@pytest.mark.parametrize("broken", ["tokenizer", "link"])
def test_a_bug_after_placing_ends_the_request(broken: str) -> None:
    def fail(*_: Any) -> Any:
        raise ValueError("made")

    async def test() -> None:
        generation = _generation("r", says=(0,))
        if broken == "tokenizer":
            generation._text.push = fail  # type: ignore[method-assign]
        else:
            generation._backends.links.link = fail  # type: ignore[method-assign]
        with pytest.raises(ApiError) as caught:
            async for _ in generation.pieces():
                pass
        assert caught.value.status == 500 and caught.value.code == "internal"

    run(test())


def test_a_scheduler_that_fails_on_a_request_is_not_the_clients_fault() -> None:
    class Failing(_Scheduler):
        async def place(self, *_: Any) -> scheduler_pb2.PlaceReply:
            raise KvpoolError("INTERNAL at 127.0.0.1:1: TypeError")

    async def test() -> None:
        with pytest.raises(ApiError) as caught:
            async for _ in _generation("r", Failing()).pieces():
                pass
        assert caught.value.status == 503

    run(test())


def test_a_bug_in_one_of_several_answers_ends_them_all() -> None:
    async def test() -> None:
        generations = [_generation("good"), _generation("bad")]

        async def broken() -> AsyncGenerator[Piece, None]:
            raise RuntimeError("made")
            yield Piece()

        generations[1].pieces = broken  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="made"):
            async for _ in merged(generations):
                pass

    run(test())
