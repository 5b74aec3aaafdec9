"""Keys of pages, and how much of a prompt can be had: against a plain reading of the rules."""

from __future__ import annotations

import hashlib

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engines.sglang.hits import ends_all, ends_trailing, leading, page_keys, restorable
from kvpool.core.ids import NamespaceId

#: A crowded machine may take long over anything.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
Presence = st.lists(st.booleans(), max_size=40).map(lambda bits: np.array(bits, dtype=np.bool_))


def naive_ends(there: list[bool], window: int | None) -> list[bool]:
    """Of each prefix length whether the pages it needs are there; window None: all of them."""
    ends = []
    for length in range(1, len(there) + 1):
        needed = there[:length] if window is None else there[max(0, length - window) : length]
        ends.append(all(needed))
    return ends


@unhurried
@given(Presence)
def test_leading_and_all(there: np.ndarray) -> None:
    plain = there.tolist()
    assert leading(there) == next((i for i, one in enumerate(plain) if not one), len(plain))
    assert ends_all(there).tolist() == naive_ends(plain, None)


@unhurried
@given(Presence, st.integers(1, 50))
def test_trailing(there: np.ndarray, window: int) -> None:
    assert ends_trailing(there, window).tolist() == naive_ends(there.tolist(), window)


@unhurried
@given(st.lists(st.lists(st.booleans(), min_size=8, max_size=8), max_size=3), st.integers(0, 8))
def test_restorable(pools: list[list[bool]], kv_pages: int) -> None:
    named = {f"pool{i}": np.array(bits, dtype=np.bool_) for i, bits in enumerate(pools)}
    lengths, longest = restorable(kv_pages, named)
    assert lengths == [n for n in range(1, kv_pages + 1) if all(bits[n - 1] for bits in pools)]
    for name, bits in named.items():
        own = [n for n in range(1, kv_pages + 1) if bits[n - 1]]
        assert longest.get(name, 0) == max(own, default=0)


def test_keys_tell_namespaces_and_hashes_apart() -> None:
    texts = [hashlib.sha256(bytes([i])).hexdigest() for i in range(50)] + ["not a hash", "z" * 64, "e" * 63, ""]
    one, other = NamespaceId(bytes(range(16))), NamespaceId(bytes(range(1, 17)))
    keys = np.concatenate([page_keys(one, texts), page_keys(other, texts)])
    assert keys.dtype == np.uint8 and keys.shape == (2 * len(texts), 16)
    assert len({key.tobytes() for key in keys}) == len(keys)
    assert np.array_equal(page_keys(one, texts), keys[: len(texts)])
    assert page_keys(one, []).shape == (0, 16)


def test_keys_are_the_hashes_of_sglang_and_stay_so() -> None:
    text = "00112233445566778899aabbccddeeff" + "0" * 32
    assert page_keys(NamespaceId(bytes(16)), [text]).tobytes().hex() == text[:32]
    assert page_keys(NamespaceId(b"\xff" * 16), [text]).tobytes().hex() == "ffeeddccbbaa99887766554433221100"
