"""The schedule of a step: bounded, in order, cut where the request alone says."""

from hypothesis import given
from hypothesis import strategies as st

from engines.torch.batching import Runnable, chunk_end, schedule

_RUNNABLE = st.tuples(st.integers(0, 500), st.integers(1, 500), st.booleans())


def test_chunks_end_on_absolute_multiples_or_with_the_prompt() -> None:
    assert chunk_end(0, 200, 64) == 64
    assert chunk_end(48, 200, 64) == 64
    assert chunk_end(64, 200, 64) == 128
    assert chunk_end(192, 200, 64) == 200


@given(st.lists(_RUNNABLE, max_size=20), st.sampled_from([16, 64, 128]), st.integers(1, 8))
def test_bounds_and_order(rows: list[tuple[int, int, bool]], chunk_tokens: int, batch_max: int) -> None:
    running = [
        Runnable(i, computed, computed + (1 if decoding else new), decoding)
        for i, (computed, new, decoding) in enumerate(rows)
    ]
    plan = schedule(running, chunk_tokens, batch_max)
    decoding = [p for p in plan.pieces if p.decoding]
    chunks = [p for p in plan.pieces if not p.decoding]
    assert list(plan.pieces) == decoding + chunks
    assert len(decoding) == min(batch_max, sum(r.decoding for r in running))
    assert plan.prefill_tokens <= chunk_tokens
    assert [p.index for p in chunks] == [r.index for r in running if not r.decoding][: len(chunks)]
    for piece in chunks:
        assert piece.end == running[piece.index].known or piece.end % chunk_tokens == 0
        assert piece.first == running[piece.index].computed and piece.count > 0
    assert bool(plan.pieces) == bool(running), "whatever can run makes progress"
