"""Loads and stores of shared words that the compiler may neither merge, drop nor move across each other.

A plain second read of an array element inside a kernel is optimised into the first one. Indices are not checked.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_WORDS = (types.uint8, types.uint32, types.uint64)


def _element(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    """Pointer to array[index]."""
    array_type = signature.args[0]
    array = context.make_array(array_type)(context, builder, arguments[0])
    return builder.gep(array.data, [arguments[1]])


def _is_word_array(array: Any) -> bool:
    return isinstance(array, types.Array) and array.ndim == 1 and array.layout == "C" and array.dtype in _WORDS


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def load_acquire(typing_context: Any, array: Any, index: Any) -> Any:
    """array[index] of a contiguous uint8, uint32 or uint64 (n): nothing later is read before it."""
    if not _is_word_array(array):
        return None

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _element(context, builder, signature, arguments)
        return builder.load_atomic(pointer, "acquire", align=array.dtype.bitwidth // 8)

    return array.dtype(array, types.intp), generate


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def store_release(typing_context: Any, array: Any, index: Any, value: Any) -> Any:
    """array[index] = value in a contiguous uint8, uint32 or uint64 (n): nothing earlier is written after it."""
    if not _is_word_array(array):
        return None

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _element(context, builder, signature, arguments)
        builder.store_atomic(arguments[2], pointer, "release", align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, array.dtype), generate


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def fence_acquire(typing_context: Any) -> Any:
    """What was read before is read before anything that follows: between a copy and the check that it may stand."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("acquire")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def fence_stores(typing_context: Any) -> Any:
    """All that was stored before, streaming stores too, is seen before anything that follows."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def array_address(typing_context: Any, array: Any) -> Any:
    """Where a contiguous array begins. Use the array itself after the last use of its address: it frees its memory."""
    if not isinstance(array, types.Array) or array.layout != "C":
        return None

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(array)(context, builder, arguments[0]).data
        return builder.ptrtoint(data, ir.IntType(64))

    return types.uint64(array), generate
