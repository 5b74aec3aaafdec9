"""Prompts as clients send them, in token ids of the tiny model: conversations, shared beginnings, odd lengths."""

from __future__ import annotations

import random
from typing import Any

from tests.vllm_real.serving import BLOCK_TOKENS

VOCABULARY = 2000


def words(seed: int, count: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(6, VOCABULARY) for _ in range(count)]


def prompts(seed: int) -> list[tuple[list[int], dict[str, Any]]]:
    """(tokens, further fields of the request), in an order in which later ones repeat parts of earlier ones."""
    draw = random.Random(seed)

    def drawn(count: int) -> list[int]:
        return [draw.randrange(6, VOCABULARY) for _ in range(count)]

    made: list[tuple[list[int], dict[str, Any]]] = []
    for _ in range(4):  # conversations of four turns
        talk = drawn(draw.randrange(40, 200))
        for _ in range(4):
            talk = talk + drawn(draw.randrange(20, 120))
            made.append((talk, {}))
    system = drawn(5 * BLOCK_TOKENS + 7)
    made += [(system + drawn(draw.randrange(1, 90)), {}) for _ in range(8)]  # a shared beginning
    for blocks in (1, 2, 7):  # whole blocks, one less, one more; twice each
        base = drawn(blocks * BLOCK_TOKENS + 1)
        made += [(base[: blocks * BLOCK_TOKENS + off], {}) for off in (-1, 0, 1, 0)]
    made += [([drawn(1)[0]], {}), ([7], {}), ([7], {})]  # one token
    made += [(system, {"cache_salt": salt}) for salt in ("one", "two", "one")]
    return made
