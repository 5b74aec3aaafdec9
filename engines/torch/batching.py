"""Which tokens the next step computes. Pure: a function of what is running and the configuration.

A step takes one token of each sequence that decodes, and chunks of prompts up to `chunk_tokens` together. Chunks end on
absolute multiples of `chunk_tokens` (or with the prompt), so where they are cut depends on the request alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Runnable:
    """A sequence that has tokens to compute: `computed` of its `known` tokens have their KV in the cache."""

    index: int  # into the caller's list
    computed: int
    known: int
    decoding: bool


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens [first, first + count) of one sequence."""

    index: int
    first: int
    count: int
    decoding: bool

    @property
    def end(self) -> int:
        return self.first + self.count


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: decode pieces first, then prompt chunks in order of arrival."""

    pieces: tuple[Piece, ...]

    @property
    def tokens(self) -> int:
        return sum(piece.count for piece in self.pieces)

    @property
    def prefill_tokens(self) -> int:
        return sum(piece.count for piece in self.pieces if not piece.decoding)


def chunk_end(first: int, known: int, chunk_tokens: int) -> int:
    """End of the chunk that begins at `first`: the next absolute multiple of `chunk_tokens`, or the prompt's end."""
    return min(known, (first // chunk_tokens + 1) * chunk_tokens)


def schedule(running: Sequence[Runnable], chunk_tokens: int, batch_max: int) -> Plan:
    """The next step.

    A chunk is taken whole or not at all; the first one that does not fit ends the step, so prompts keep their order.

    Args:
        running: in order of arrival.
        chunk_tokens: prompt tokens in one step at most.
        batch_max: decoding sequences in one step at most.
    """
    decoding = [Piece(r.index, r.computed, 1, True) for r in running if r.decoding][:batch_max]
    chunks: list[Piece] = []
    budget = chunk_tokens
    for r in running:
        if r.decoding:
            continue
        count = chunk_end(r.computed, r.known, chunk_tokens) - r.computed
        if count > budget:
            break
        chunks.append(Piece(r.index, r.computed, count, False))
        budget -= count
    return Plan((*decoding, *chunks))
