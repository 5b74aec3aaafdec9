"""Names of objects compared in a segment, against plain slices."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.core.kernels.names import keep_equal

#: What is wanted, what is there, and whether the row counts at all.
Rows = st.lists(st.tuples(st.binary(min_size=1, max_size=6), st.none() | st.binary(max_size=6), st.booleans()))


@settings(deadline=None)
@given(Rows, st.integers(0, 2**32))
def test_a_name_counts_if_it_is_the_same_to_the_last_byte(
    rows: list[tuple[bytes, bytes | None, bool]], seed: int
) -> None:
    """None: the very name is there."""
    there = [wanted if other is None else other for wanted, other, _ in rows]
    order = np.random.default_rng(seed).permutation(len(rows))
    begins = np.zeros(len(rows), dtype=np.uint64)
    data = b"\xff"
    for row in order.tolist():
        begins[row] = len(data)
        data += there[row] + b"\xff"
    sizes = np.array([len(name) for name in there], dtype=np.uint64)
    kept = np.array([counts for _, _, counts in rows], dtype=np.bool_)
    begins[~kept] = np.uint64(2**64 - 1)  # would be far outside
    ends = np.cumsum([len(wanted) for wanted, _, _ in rows], dtype=np.uint64)
    wanted = np.frombuffer(b"".join(wanted for wanted, _, _ in rows) or b"\0", dtype=np.uint8)
    expected = [counts and name == want for (want, _, counts), name in zip(rows, there, strict=True)]
    keep_equal(np.frombuffer(data, dtype=np.uint8), begins, sizes, wanted, ends, kept)
    assert kept.tolist() == expected
