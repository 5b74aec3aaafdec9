"""Keys and digests: bit-exact with the xxhash library, equal to the committed vectors, strict about their input."""

import hashlib
import json
import sys
from array import array
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.core.errors import BadArgument, BadKeyLength
from kvpool.core.hashing import (
    SHA256,
    XXH3,
    Extras,
    block_digests,
    block_keys,
    object_key,
    object_keys,
    root_key,
    section_digest,
    section_seed,
    tail_key,
    token_array,
)
from kvpool.core.kernels.token_lists import words_of

GOLDEN = json.loads((Path(__file__).parent / "golden_keys.json").read_text())
NAMESPACE = bytes.fromhex(GOLDEN["namespace_id"])
KEYS = st.binary(min_size=16, max_size=16)


def golden_tokens(count):
    i = np.arange(count, dtype=np.uint64)
    ids = (i * 2654435761 + 12345) % 128256
    wide = i * 2246822519 % 2**32
    return np.where(i % 7 == 0, wide, ids).astype(np.uint32)


def chain_oracle(root, tokens, block_tokens):
    keys, parent = [], root
    for i in range(len(tokens) // block_tokens):
        piece = np.asarray(tokens[i * block_tokens : (i + 1) * block_tokens], dtype="<u4").tobytes()
        parent = xxhash.xxh3_128_digest(parent + piece)
        keys.append(parent)
    return keys


def test_golden_roots():
    for case in GOLDEN["roots"]:
        extras = Extras(**{name: bytes.fromhex(value) for name, value in case["extras"].items()})
        assert root_key(NAMESPACE, extras, case["hash"]).hex() == case["key"]


def test_golden_chains():
    for case in GOLDEN["chains"]:
        tokens = golden_tokens(case["token_count"])
        keys = block_keys(NAMESPACE, tokens, case["block_tokens"], case["hash"])
        assert [bytes(k).hex() for k in keys] == case["keys"], case["block_tokens"]


def test_golden_tails():
    for case in GOLDEN["tails"]:
        tokens = golden_tokens(case["first"] + case["count"])[case["first"] :]
        assert tail_key(bytes.fromhex(case["parent"]), tokens, case["hash"]).hex() == case["key"]


def test_golden_sections():
    for case in GOLDEN["sections"]:
        key = bytes.fromhex(case["key"])
        assert section_seed(key, case["section"]) == case["seed"]
        assert section_digest(bytes(range(256)) * 4, key, case["section"]) == case["digest"]


def test_every_message_length_is_bit_exact():
    # 20 to 2016 bytes, across the borders at 128, 240, 1024 and 1040 bytes.
    rng = np.random.default_rng(1)
    for block_tokens in range(1, 501):
        tokens = rng.integers(0, 2**32, 2 * block_tokens, dtype=np.uint32)
        root = rng.bytes(16)
        keys = block_keys(root, tokens, block_tokens)
        assert [bytes(k) for k in keys] == chain_oracle(root, tokens, block_tokens), block_tokens


@settings(max_examples=60, deadline=None)
@given(KEYS, st.integers(1, 80), st.integers(0, 400), st.integers(0, 2**32 - 1), st.integers(0, 1))
def test_chains_are_bit_exact(root, block_tokens, count, seed, offset):
    # A slice that begins in the middle of another array, and is read-only, as a message's tokens may be.
    tokens = np.random.default_rng(seed).integers(0, 2**32, count + offset, dtype=np.uint32)[offset:]
    tokens.flags.writeable = False
    keys = block_keys(root, tokens, block_tokens)
    assert keys.shape == (count // block_tokens, 16)
    assert [bytes(k) for k in keys] == chain_oracle(root, tokens, block_tokens)
    assert np.array_equal(keys, block_keys(root, tokens.tolist(), block_tokens))
    assert np.array_equal(keys, block_keys(root, tokens.astype(np.int64), block_tokens))


NUMBERS = st.one_of(
    st.integers(0, 2**32 - 1), st.integers(), st.booleans(), st.floats(), st.none(), st.text(max_size=2),
    st.integers(0, 2**31).map(np.int64), st.sampled_from([0, -1, 2**32 - 1, 2**32, 2**63, 2**64 - 1, 2**64, 2**200]),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.lists(st.integers(0, 2**32 - 1), max_size=50), st.lists(NUMBERS, max_size=3)), st.booleans())
def test_lists_become_what_the_plain_way_makes_of_them(numbers, as_tuple):
    given = tuple(numbers) if as_tuple else numbers
    words = words_of(given)
    try:
        expected = array("I", numbers)
    except (TypeError, OverflowError):
        assert words is None
        with pytest.raises(BadArgument, match="integers from 0"):
            token_array(given)
        return
    assert token_array(given).tolist() == expected.tolist()
    # numpy's integers are left to the plain way.
    assert (words is None) == any(not isinstance(number, int) for number in numbers)
    if words is not None:
        assert (words.dtype, words.tolist()) == (np.uint32, expected.tolist())


def test_what_a_list_refused_leaves_behind_is_nothing():
    """Neither an exception that comes up later nor a reference."""
    number = 2**70 + 1
    before = sys.getrefcount(number)
    for _ in range(1000):
        assert words_of([1, number]) is None
        assert words_of((number,)) is None
    assert sys.getrefcount(number) == before
    assert words_of([]) is not None


@settings(max_examples=30, deadline=None)
@given(KEYS, st.lists(st.integers(0, 2**32 - 1), max_size=70), st.integers(1, 20), st.sampled_from([XXH3, SHA256]))
def test_a_chain_can_be_continued(root, tokens, block_tokens, hash_name):
    keys = block_keys(root, tokens, block_tokens, hash_name)
    for cut in range(1, len(keys)):
        rest = block_keys(bytes(keys[cut - 1]), tokens[cut * block_tokens :], block_tokens, hash_name)
        assert np.array_equal(rest, keys[cut:])


def test_other_inputs_give_other_keys():
    roots = [root_key(NAMESPACE, extras) for extras in (
        Extras(), Extras(lora=b"a"), Extras(multimodal=b"a"), Extras(salt=b"a"), Extras(lora=b"a", salt=b"a"),
        Extras(lora=b"a\x03\x01\x00\x00\x00a"),
    )]  # fmt: skip
    assert len(dict.fromkeys(roots)) == len(roots)
    tokens = golden_tokens(16)
    full = bytes(block_keys(NAMESPACE, tokens, 16)[0])
    tails = [tail_key(NAMESPACE, tokens[:n]) for n in range(1, 17)]
    assert len(dict.fromkeys([full, *tails])) == 17
    assert full != bytes(block_keys(NAMESPACE, tokens, 16, SHA256)[0])


@pytest.mark.parametrize("sections", [1, 2, 4, 8])
def test_block_digests(sections):
    rng = np.random.default_rng(2)
    blocks = rng.integers(0, 256, (3, 1024), dtype=np.uint8)
    keys = rng.integers(0, 256, (3, 16), dtype=np.uint8)
    digests = block_digests(blocks, keys, sections)
    size = 1024 // sections
    for row in range(3):
        for section in range(sections):
            data = blocks[row, section * size : (section + 1) * size].tobytes()
            seed = section_seed(bytes(keys[row]), section)
            assert int(digests[row, section]) == xxhash.xxh3_64_intdigest(data, seed=seed)
    assert len(np.unique(block_digests(np.zeros((3, 1024), np.uint8), keys, sections))) == 3 * sections


def test_no_blocks_no_digests():
    assert block_digests(np.empty((0, 64), np.uint8), np.empty((0, 16), np.uint8), 4).shape == (0, 4)


def test_bad_input_is_refused():
    tokens = golden_tokens(32)
    for call in (
        lambda: block_keys(bytes(15), tokens, 16),
        lambda: root_key(bytes(17)),
        lambda: tail_key(b"", tokens),
        lambda: section_seed(b"", 0),
    ):
        with pytest.raises(BadKeyLength):
            call()
    for call in (
        lambda: block_keys(NAMESPACE, tokens, 0),
        lambda: block_keys(NAMESPACE, tokens, -1),
        lambda: block_keys(NAMESPACE, tokens, 16, "md5"),
        lambda: root_key(NAMESPACE, Extras(), "md5"),
        lambda: block_keys(NAMESPACE, [-1] * 16, 16),
        lambda: block_keys(NAMESPACE, [2**32] * 16, 16),
        lambda: block_keys(NAMESPACE, ["a"] * 16, 16),
        lambda: token_array(np.array([-1])),
        lambda: token_array(np.array([2**32])),
        lambda: token_array(np.array([1.5])),
        lambda: token_array(np.zeros((2, 2), np.uint32)),
        lambda: block_digests(np.zeros((1, 10), np.uint8), np.zeros((1, 16), np.uint8), 3),
        lambda: block_digests(np.zeros((2, 8), np.uint8), np.zeros((1, 16), np.uint8), 1),
    ):
        with pytest.raises(BadArgument):
            call()


def test_the_key_of_an_object_is_made_of_its_namespace_and_its_name() -> None:
    namespace = bytes(range(16))
    expected = hashlib.sha256(namespace + "naïve/1".encode()).digest()[:16]
    assert object_key(namespace, "naïve/1") == object_key(namespace, "naïve/1".encode()) == expected
    assert object_key(bytes(16), "naïve/1") != expected
    object_key(namespace, "x" * 1024)
    for name in ("", b"", "x" * 1025, "ï" * 513):
        with pytest.raises(BadArgument):
            object_key(namespace, name)
    with pytest.raises(BadKeyLength):
        object_key(b"short", "name")


@given(names=st.lists(st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=200), max_size=8))
def test_keys_of_many_objects_are_those_of_each(names):
    namespace = bytes(range(16))
    keys = object_keys(namespace, names)
    assert (keys.shape, keys.dtype) == ((len(names), 16), np.uint8)
    assert [key.tobytes() for key in keys] == [object_key(namespace, name) for name in names]


def test_names_of_many_objects_are_checked():
    for wrong in ("", "x" * 1025, "é" * 513):
        with pytest.raises(BadArgument):
            object_keys(bytes(16), ["fine", wrong])
    with pytest.raises(BadKeyLength):
        object_keys(b"short", [])
