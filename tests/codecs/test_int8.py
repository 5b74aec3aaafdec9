"""The int8 codec against its plain oracle, its bound, and what it refuses."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.codecs import codec_for
from kvpool.codecs.errors import CorruptBlock
from kvpool.codecs.int8 import HEADER, HEADER_BYTES, Int8, mixed_bytes_max, stored_bytes
from kvpool.codecs.layout import ELEMENT_BYTES, KvLayout
from kvpool.core.errors import BadArgument, Unsupported
from kvpool.core.ids import Fidelity
from kvpool.core.kernels.halves import float16_bits_by_integers, float16_value_by_integers
from kvpool.core.kernels.int8 import warm_up
from kvpool.core.namespace import GroupKind, NamespaceSpec
from tests.codecs.made_kv import (
    encode_oracle,
    from_blocks,
    group_of,
    narrow,
    normal_blocks,
    to_blocks,
    without_errors,
)

DTYPES = tuple(ELEMENT_BYTES)
CODEC = Int8()
SMALL = KvLayout("float32", layers=4, block_tokens=16, kv_heads=2, head_dim=32, section_count=2)


def encoded(blocks, layout, codec=CODEC):
    out = np.full((len(blocks), stored_bytes(layout)), 0xAA, dtype=np.uint8)
    return out, codec.encode(blocks, out, layout)


def decoded(stored, layout, **options):
    out = np.full((len(stored), layout.block_bytes), 0x55, dtype=np.uint8)
    CODEC.decode(stored, out, layout, **options)
    return out


def sections_of(row, layout):
    return [part.tobytes() for part in row.reshape(layout.section_count, -1)]


def check_against_oracle(blocks, layout):
    stored, result = encoded(blocks, layout, Int8(error_max=0.999))
    again = decoded(stored, layout)
    for i, block in enumerate(blocks):
        sections, plain, errors = encode_oracle(block, layout)
        np.testing.assert_allclose(result.error[i], errors, rtol=1e-4)
        assert result.ok[i]
        assert [without_errors(s) for s in sections_of(stored[i], layout)] == sections
        assert np.array_equal(again[i], plain)


layouts = st.builds(
    lambda dtype, layers, tokens, heads, dim, n: KvLayout(dtype, layers * n, tokens, heads, dim, n),
    st.sampled_from(DTYPES), st.integers(1, 2), st.integers(1, 33), st.integers(1, 5), st.integers(1, 70),
    st.integers(1, 3),
)  # fmt: skip


@settings(max_examples=120, deadline=None)
@given(layouts, st.integers(0, 2**32 - 1), st.sampled_from([1e-4, 1.0, 300.0]))
def test_bytes_are_those_of_the_oracle(layout, seed, size):
    rng = np.random.default_rng(seed)
    shape = (2, layout.layers, 2, layout.block_tokens, layout.kv_heads, layout.head_dim)
    values = (rng.normal(size=shape) * size).astype(np.float32)
    values *= rng.choice([0.0, 0.01, 1.0, 20.0], size=shape[-1]).astype(np.float32)
    check_against_oracle(to_blocks(values, layout), layout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("exponent", [-149, -140, -126, -100, -30, -24, -15, -5, 0, 7, 15, 60, 120])
def test_every_magnitude_is_as_the_oracle_says(dtype, exponent):
    layout = replace(SMALL, dtype=dtype)
    if dtype == "float16" and exponent > 13:
        exponent = 13
    values = np.random.default_rng(exponent + 200).normal(size=(1, 4, 2, 16, 2, 32)).clip(-3, 3).astype(np.float32)
    with np.errstate(under="ignore"):
        blocks = to_blocks(np.ldexp(values, exponent).astype(np.float32), layout)
    stored, result = encoded(blocks, layout, Int8(error_max=0.999))
    sections, plain, errors = encode_oracle(blocks[0], layout)
    np.testing.assert_allclose(result.error[0], errors, rtol=1e-4)
    if result.ok[0]:
        assert [without_errors(s) for s in sections_of(stored[0], layout)] == sections
        assert np.array_equal(decoded(stored, layout)[0], plain)
    else:
        assert max(errors) > 0.99, "only what is lost altogether may be refused here"


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_bound_holds_for_any_bits(dtype, seed):
    """Random bits hold every exponent, infinities and NaN: what is ok decodes within the bound, the rest is raw."""
    layout = KvLayout(dtype, 2, 4, 2, 8, 2)
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (4, layout.block_bytes), dtype=np.uint8)
    blocks[1:] = normal_blocks(layout, 3, seed)
    blocks[1].view(np.uint32)[rng.integers(0, layout.block_bytes // 4)] = rng.integers(0, 2**32, dtype=np.uint32)
    codec = Int8(error_max=0.008)
    mixed = np.zeros((4, mixed_bytes_max(layout)), dtype=np.uint8)
    result = codec.encode_mixed(blocks, mixed, layout)
    back = decoded(mixed, layout, sizes=result.sizes)
    before, after = from_blocks(blocks, layout), from_blocks(back, layout)
    for i in range(4):
        for section in range(2):
            if result.fell_back[i, section]:
                part = slice(section * layout.section_bytes, (section + 1) * layout.section_bytes)
                assert np.array_equal(blocks[i, part], back[i, part])
                continue
            x, y = before[i, section].astype(np.float64), after[i, section].astype(np.float64)
            for kind in range(2):
                power = np.sqrt(np.square(x[kind]).sum())
                assert np.sqrt(np.square(x[kind] - y[kind]).sum()) <= 0.0080001 * power


@pytest.mark.parametrize("dtype", DTYPES)
def test_normal_numbers_stay_within_one_per_cent(dtype):
    layout = KvLayout(dtype, 4, 16, 8, 128, 4)
    _, result = encoded(normal_blocks(layout, 3, 1), layout)
    assert result.ok.all() and not result.fell_back.any()
    assert (result.error > 0.004).all() and (result.error < 0.01).all()
    assert (result.sizes == stored_bytes(layout)).all()


def outlier_channel_in_v(values):
    values[:, 1, 1, :, :, 3] *= 60.0


def huge_element_in_a_row_of_v(values):
    values[:, 1, 1, :, 0, 5] = 500.0


def small_v_with_outliers_behind_large_k(values):
    values[:, 1, 0] *= 1000.0
    outlier_channel_in_v(values)


def not_a_number(values):
    values[:, 1, 0, 3, 1, 7] = np.nan


def infinite(values):
    values[:, 1, 1, 15, 1, 31] = -np.inf


BREAKERS = (
    outlier_channel_in_v, huge_element_in_a_row_of_v,  small_v_with_outliers_behind_large_k,
    not_a_number, infinite,
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("breaks", BREAKERS, ids=lambda f: f.__name__)
def test_a_section_that_breaks_the_bound_falls_back(dtype, breaks):
    layout = replace(SMALL, dtype=dtype)
    values = from_blocks(normal_blocks(layout, 2, 5), layout).copy()
    breaks(values[1:])
    blocks = to_blocks(values, layout)
    stored, result = encoded(blocks, layout)
    assert result.ok.tolist() == [True, False]
    assert result.fell_back.tolist() == [[False, False], [True, False]]
    assert result.sizes.tolist() == [stored_bytes(layout), 0]
    assert result.error[1, 0] > 0.01 and result.error[1, 1] < 0.01

    mixed = np.full((2, mixed_bytes_max(layout)), 0xAA, dtype=np.uint8)
    sent = CODEC.encode_mixed(blocks, mixed, layout)
    assert sent.ok.all() and np.array_equal(sent.fell_back, result.fell_back)
    assert np.array_equal(mixed[0, : sent.sizes[0]], stored[0]), "a block within the bound is the same in both forms"
    back = decoded(mixed, layout, sizes=sent.sizes)
    half = layout.section_bytes
    assert np.array_equal(back[1, :half], blocks[1, :half]), "raw sections are exact"
    assert not np.array_equal(back[1, half:], blocks[1, half:])
    assert (mixed[1, sent.sizes[1] :] == 0xAA).all()


def test_numbers_that_would_decode_to_infinity_fall_back():
    layout = KvLayout("float16", 1, 4, 1, 8, 1)
    values = np.full((1, 1, 2, 4, 1, 8), 65504.0, dtype=np.float32)
    _, result = encoded(to_blocks(values, layout), layout)
    assert not result.ok[0] and np.isinf(result.error[0, 0])


def test_a_block_of_zeros_is_exact():
    blocks = np.zeros((1, SMALL.block_bytes), dtype=np.uint8)
    stored, result = encoded(blocks, SMALL)
    assert result.ok[0] and result.error.max() == 0
    assert np.array_equal(decoded(stored, SMALL), blocks)


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_threads_or_batches(dtype):
    layout = KvLayout(dtype, 2, 16, 4, 64, 2)
    blocks = normal_blocks(layout, 12, 9)
    together, whole = encoded(blocks, layout)
    alone = np.empty_like(together)
    with ThreadPoolExecutor(4) as pool:
        rows = [np.arange(i, min(i + 2, 12)) for i in range(0, 12, 2)]
        results = list(pool.map(lambda r: CODEC.encode(blocks, alone, layout, rows=r, out_rows=r), rows))
    assert np.array_equal(alone, together)
    assert np.array_equal(np.concatenate([r.error for r in results]), whole.error)


def test_memory_may_be_rows_anywhere():
    """Rows of a wider array, in any order, at odd addresses, read-only, or arrays of their own."""
    layout = replace(SMALL, dtype="bfloat16")
    size, stored_size = layout.block_bytes, stored_bytes(layout)
    blocks = normal_blocks(layout, 4, 2)
    plain, _ = encoded(blocks, layout)
    wide = np.zeros((6, size + 7), dtype=np.uint8)[:, 3 : 3 + size]
    order = np.array([5, 0, 3, 1])
    wide[order] = blocks
    wide.flags.writeable = False
    outs = [np.zeros(stored_size + i, dtype=np.uint8) for i in range(4)]
    assert CODEC.encode(wide, outs, layout, rows=order).ok.all()
    assert all(np.array_equal(out[:stored_size], row) for out, row in zip(outs, plain, strict=True))
    back = np.zeros((9, size), dtype=np.uint8)
    CODEC.decode(outs, back, layout, out_rows=np.array([8, 1, 2, 0]))
    assert np.array_equal(back[[8, 1, 2, 0]], decoded(plain, layout))
    assert not back[3:8].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_sections_can_be_coded_by_themselves(dtype):
    layout = KvLayout(dtype, 6, 16, 2, 32, 3)
    blocks = normal_blocks(layout, 2, 3)
    stored, _ = encoded(blocks, layout)
    one = layout.one_section()
    for section in range(3):
        part = blocks.reshape(2, 3, -1)[:, section]
        alone, result = encoded(part, one)
        assert result.ok.all()
        assert np.array_equal(alone, stored.reshape(2, 3, -1)[:, section])
        assert np.array_equal(decoded(alone, one), decoded(stored, layout).reshape(2, 3, -1)[:, section])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_changed_header_is_refused_or_harmless(data):
    """Bytes are verified before they come here; a header that lies is found all the same, and nothing is written."""
    blocks = normal_blocks(SMALL, 1, 4)
    stored, _ = encoded(blocks, SMALL)
    section = data.draw(st.integers(0, 1))
    at = section * (stored.shape[1] // 2) + data.draw(st.integers(0, 23))
    stored[0, at] ^= data.draw(st.integers(1, 255))
    out = np.full((1, SMALL.block_bytes), 0x55, dtype=np.uint8)
    with pytest.raises(CorruptBlock) as caught:
        CODEC.decode(stored, out, SMALL)
    assert caught.value.hint
    assert (out == 0x55).all()


def test_sizes_that_do_not_fit_are_refused():
    blocks = normal_blocks(SMALL, 1, 4)
    stored, _ = encoded(blocks, SMALL)
    out = np.zeros((1, SMALL.block_bytes), dtype=np.uint8)
    whole = stored_bytes(SMALL)
    for size in (0, HEADER_BYTES - 1, whole // 2, whole // 2 + HEADER_BYTES, whole - 64):
        with pytest.raises(CorruptBlock):
            CODEC.decode(stored, out, SMALL, sizes=np.array([size]))
    with pytest.raises(BadArgument):
        CODEC.decode(stored, out, SMALL, sizes=np.array([whole + 64]))
    with pytest.raises(CorruptBlock):
        CODEC.decode(stored, out, replace(SMALL, dtype="float16"))
    longer = np.concatenate([stored, np.zeros((1, 64), dtype=np.uint8)], axis=1)
    with pytest.raises(CorruptBlock):
        CODEC.decode(longer, out, SMALL, sizes=np.array([whole + 64]))


def test_memory_that_does_not_fit_is_refused():
    blocks = normal_blocks(SMALL, 2, 4)
    room = np.zeros((2, stored_bytes(SMALL)), dtype=np.uint8)
    frozen = room.copy()
    frozen.flags.writeable = False
    for sources, targets, options in (
        (blocks[:, :-1], room, {}),
        (blocks, room[:, :-1], {}),
        (blocks, room[:1], {}),
        (blocks, frozen, {}),
        (blocks, room, {"rows": np.array([0, 2])}),
        (blocks, room, {"rows": np.array([-1])}),
        (blocks, room, {"out_rows": np.array([0])}),
        (blocks.view(np.uint16), room, {}),
        (blocks[0], room, {}),
        (blocks[:, ::2].repeat(2, axis=1)[:, ::-1], room, {}),
    ):
        with pytest.raises(BadArgument):
            CODEC.encode(sources, targets, SMALL, **options)
    assert not room.any()


def test_headers_say_what_was_achieved():
    stored, result = encoded(normal_blocks(SMALL, 1, 8), SMALL)
    for section, content in enumerate(sections_of(stored[0], SMALL)):
        header = np.frombuffer(content[:HEADER_BYTES], dtype=HEADER)[0]
        assert header["error"] == result.error[0, section]
        assert header["error_max"] == np.float32(0.01)


# ------------------------------------------------------------ layouts


def spec(layout, name="lkthd", **changes):
    return NamespaceSpec("m", "", layout.dtype, "b", name, "xxh3_128/1", (group_of(layout, **changes),))


def test_layouts_that_can_not_be_transcoded_are_refused():
    assert KvLayout.of(spec(SMALL), group_of(SMALL)) == SMALL
    for namespace, group in (
        (spec(SMALL, "opaque:vllm-cpu"), group_of(SMALL)),
        (replace(spec(SMALL), dtype="float8_e4m3"), group_of(SMALL)),
        (spec(SMALL), group_of(SMALL, kind=GroupKind.MLA)),
        (spec(SMALL), group_of(SMALL, kind=GroupKind.STATE)),
        (spec(SMALL), group_of(SMALL, kv_heads=0)),
        (spec(SMALL), group_of(SMALL, kv_heads=4)),
    ):
        with pytest.raises(Unsupported) as caught:
            KvLayout.of(namespace, group)
        assert caught.value.hint


@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_size_follows_from_the_group(dtype):
    layout = KvLayout(dtype, 8, 16, 8, 128, 8)
    codec = codec_for(Fidelity.INT8)
    assert codec.fidelity is Fidelity.INT8
    assert codec.stored_bytes(group_of(layout)) == stored_bytes(layout)
    assert stored_bytes(layout) % layout.section_count == 0
    assert stored_bytes(layout) < layout.block_bytes * (0.55 if ELEMENT_BYTES[dtype] == 2 else 0.28)
    with pytest.raises(Unsupported):
        codec.stored_bytes(group_of(layout, block_bytes=4096))


@pytest.mark.parametrize("error_max", [0, -0.1, 1, float("nan")])
def test_bounds_that_mean_nothing_are_refused(error_max):
    with pytest.raises(BadArgument):
        Int8(error_max)


# ------------------------------------------------------------ float16 without the CPU's help


def test_float16_by_integers_is_float16():
    every = np.arange(1 << 16, dtype=np.uint16)
    finite = every[np.isfinite(every.view(np.float16))]
    wide = finite.view(np.float16).astype(np.float32)
    assert [float16_value_by_integers(np.uint32(h)) for h in finite] == wide.tolist()
    between = np.float32(0.5) * (wide + np.roll(wide, 1))
    rng = np.random.default_rng(0)
    drawn = np.ldexp(rng.uniform(-1, 1, 20_000), rng.integers(-30, 16, 20_000)).astype(np.float32)
    numbers = np.concatenate([wide, between[np.abs(between) <= 65504], drawn[np.abs(drawn) <= 65504]])
    expected = narrow(numbers, "float16").view(np.uint16)
    assert [float16_bits_by_integers(x) for x in numbers] == expected.tolist()


def test_kernels_warm_up():
    warm_up()
