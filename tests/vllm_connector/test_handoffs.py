"""How long a request waits for blocks that were announced to it."""

from __future__ import annotations

from typing import Any

import pytest

from engines.vllm.handoffs import HandoffWaits, answer, asks, tokens_of


@pytest.mark.parametrize(
    ("parameters", "tokens"),
    [(None, 0), ({}, 0), ({"kvpool_tokens": 64}, 64), ({"kvpool_tokens": "64"}, 0), ({"kvpool_tokens": True}, 0),
     ({"kvpool_tokens": -1}, 0), ({"do_remote_prefill": True}, 0)],
)  # fmt: skip
def test_what_is_announced(parameters: dict[str, Any] | None, tokens: int) -> None:
    assert tokens_of(parameters, b"m" * 16) == tokens


def test_who_asks() -> None:
    assert asks({"kvpool_handoff": True}) and not asks({"kvpool_handoff": False}) and not asks(None)


def test_what_is_answered_is_understood() -> None:
    told = answer(64, b"n" * 16, b"m" * 16)
    assert told == {"kvpool_tokens": 64, "kvpool_namespace": "6e" * 16, "kvpool_key_mask": "6d" * 16}
    assert tokens_of(told, b"m" * 16) == 64 and tokens_of(answer(0, b"n" * 16, b"m" * 16), b"m" * 16) == 0
    assert tokens_of(told, b"n" * 16) == 0  # their keys are others: nothing will ever come


def test_one_wait() -> None:
    waits = HandoffWaits(wait_s=1.0)
    assert waits.looks("r", 10.0) and not waits.any and waits.lacks("r", 10.0) and waits.any
    assert not waits.looks("r", 10.0005) and waits.looks("r", 10.0015)
    assert waits.lacks("r", 10.0015) and not waits.looks("r", 10.002) and waits.looks("r", 10.003)
    # A tenth of what it has waited: neither much too late, nor all the time.
    assert waits.lacks("r", 10.1) and not waits.looks("r", 10.109) and waits.looks("r", 10.111)
    assert waits.lacks("r", 10.6) and not waits.looks("r", 10.63) and waits.looks("r", 10.633)
    assert waits.lacks("r", 10.999) and not waits.is_over("r") and waits.any
    assert not waits.lacks("r", 11.0) and waits.is_over("r") and not waits.is_over("other") and not waits.any
    waits.forget("r")
    waits.forget("r")
    assert not waits.waits


def test_a_wait_ends_when_all_has_come() -> None:
    waits = HandoffWaits(wait_s=1.0)
    waits.came("nobody waits for this")
    assert waits.lacks("a", 0.0) and waits.lacks("b", 0.0)
    waits.came("a")
    assert waits.is_over("a") and waits.any
    waits.came("b")
    assert not waits.any
