"""vLLM's hash chain: against recorded hashes of the real engine, and against a plain encoder written beside it."""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpool.core import hashing
from kvpool.core.engine_keys import OWN, VLLM_SEED, EngineNaming, cbor, same_hash
from kvpool.core.errors import BadArgument
from tests.engine_bridge.recorded import BLOCK_TOKENS, PROMPT, messages

NAMESPACE = bytes(range(16))


def test_the_recorded_engine_names_its_blocks_so() -> None:
    naming = EngineNaming("sha256", BLOCK_TOKENS)
    told = [event.hashes for message in messages() for event in message.events if hasattr(event, "tokens")]
    parent, hashes = naming.root(NAMESPACE), []
    for first in range(0, 96, BLOCK_TOKENS):
        parent = naming.next_hash(parent, PROMPT[first : first + BLOCK_TOKENS])
        hashes.append(parent)
    assert all(same_hash(mine, theirs) for mine, theirs in zip(hashes, told[0], strict=True))
    salted = naming.keys(NAMESPACE, np.asarray(PROMPT, dtype=np.uint32), BLOCK_TOKENS, "s")
    assert len(salted) == 3 and salted.tobytes() != b"".join(full[:16] for full in hashes)
    first_salted = naming.next_hash(naming.root(NAMESPACE), PROMPT[:32], (("cache_salt", "s"),))
    assert same_hash(first_salted, told[2][0]) and salted[0].tobytes() == first_salted[:16]


def _oracle(value: Any) -> bytes:
    """CBOR by the letter of RFC 8949: shortest heads, definite lengths."""
    if value is None:
        return bytes([0xF6])
    if isinstance(value, int):
        return _head(0, value)
    if isinstance(value, bytes):
        return _head(2, len(value)) + value
    if isinstance(value, str):
        return _head(3, len(value.encode())) + value.encode()
    return _head(4, len(value)) + b"".join(_oracle(item) for item in value)


def _head(major: int, number: int) -> bytes:
    if number <= 23:
        return struct.pack(">B", major * 32 + number)
    if number <= 0xFF:
        return struct.pack(">BB", major * 32 + 24, number)
    if number <= 0xFFFF:
        return struct.pack(">BH", major * 32 + 25, number)
    if number <= 0xFFFFFFFF:
        return struct.pack(">BI", major * 32 + 26, number)
    return struct.pack(">BQ", major * 32 + 27, number)


_VALUES = st.recursive(
    st.none() | st.integers(0, 2**64 - 1) | st.binary(max_size=300) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=30).map(tuple),
    max_leaves=40,
)


@given(_VALUES)
def test_cbor(value: Any) -> None:
    assert cbor(value) == _oracle(value)


@pytest.mark.parametrize("value", [-1, True, 1.5, {"a": 1}, 2**64])
def test_cbor_of_what_is_in_no_hash(value: Any) -> None:
    with pytest.raises(BadArgument):
        cbor(value)


@given(
    st.lists(st.integers(0, 2**32 - 1), max_size=60),
    st.integers(1, 8),
    st.integers(1, 3),
    st.sampled_from(["sha256_cbor", "sha256"]),
    st.sampled_from(["", "salt", "ümlaut"]),
)
def test_keys_are_the_chain(tokens: list[int], hash_tokens: int, hashes: int, algorithm: str, salt: str) -> None:
    naming, block_tokens = EngineNaming(algorithm, hash_tokens), hash_tokens * hashes
    if algorithm == "sha256_cbor":
        parent = hashlib.sha256(_oracle(VLLM_SEED)).digest()
        assert naming.root(NAMESPACE) == parent
    parent, expected, step = naming.root(NAMESPACE), [], 0
    while (step + 1) * hash_tokens <= len(tokens) // block_tokens * block_tokens:
        piece = tuple(tokens[step * hash_tokens : (step + 1) * hash_tokens])
        extras = (("cache_salt", salt),) if salt and step == 0 else None
        if algorithm == "sha256_cbor":
            parent = hashlib.sha256(_oracle((parent, piece, extras))).digest()
        else:
            parent = naming.next_hash(parent, piece, extras)
        step += 1
        if step % hashes == 0:
            expected.append(parent[:16])
    keys = naming.keys(NAMESPACE, np.asarray(tokens, dtype=np.uint32), block_tokens, salt)
    assert keys.shape == (len(tokens) // block_tokens, 16) and keys.tobytes() == b"".join(expected)


@given(st.lists(st.integers(0, 5000), min_size=8, max_size=40), st.sampled_from(["", "s"]))
def test_kvpools_own_chain(tokens: list[int], salt: str) -> None:
    naming = EngineNaming.of_engine("xxhash", 4, "whatever")
    assert naming.own and naming.algorithm == OWN
    root = hashing.root_key(NAMESPACE, hashing.Extras(salt=salt.encode()))
    words = np.asarray(tokens, dtype=np.uint32)
    assert naming.keys(NAMESPACE, words, 4, salt).tobytes() == hashing.block_keys(root, words, 4).tobytes()


def test_a_mask_is_mixed_into_each_key() -> None:
    tokens = np.arange(64, dtype=np.uint32)
    plain, masked = EngineNaming("sha256_cbor", 32), EngineNaming("sha256_cbor", 32, mask=NAMESPACE)
    expected = plain.keys(NAMESPACE, tokens, 32) ^ np.frombuffer(NAMESPACE, dtype=np.uint8)
    assert masked.keys(NAMESPACE, tokens, 32).tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    "naming",
    [
        EngineNaming("sha256", 16),
        EngineNaming("sha256_cbor", 128, "a seed with spaces", NAMESPACE),
        EngineNaming(OWN, 1),
    ],
)
def test_a_layout_tells_the_naming(naming: EngineNaming) -> None:
    assert EngineNaming.of_layout(naming.layout) == naming


@pytest.mark.parametrize(
    "layout",
    [
        "lkthd",
        "engine-named",
        "other sha256 32 - s",
        "N sha256 x - s",
        "N md5 32 - s",
        "N sha256 32 zz s",
        "N sha256 0 - s",
    ],
)
def test_layouts_that_tell_no_naming(layout: str) -> None:
    with pytest.raises(BadArgument):
        EngineNaming.of_layout(layout.replace("N ", "engine-named "))
