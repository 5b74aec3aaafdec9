"""float16 and bfloat16 to float32 and back, an element at a time, inlined into the loops of other kernels.

Conversions round half to even and give the same bits on every CPU. Numba's cache does not notice that a function of
another file has changed: touch `int8.py` after a change here.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from llvmlite import binding, ir
from numba import njit, types
from numba.extending import intrinsic

_INFINITE: Final = 0x7F800000
_SIGN, _MAGNITUDE = np.uint32(0x80000000), np.uint32(0x7FFFFFFF)
_F16_MAX = np.float32(65504.0)
_HALF_UP, _HALF_DOWN = np.float32(2.0**112), np.float32(2.0**-112)
_HALF_NORMAL = np.uint32(0x38800000)  # 2**-14
_ONE_HALF_BITS = np.uint32(0x3F000000)
#: Whether the CPU converts float16 itself; elsewhere integers do, with the same bits.
_CPU_HAS_F16 = bool(binding.get_host_cpu_features().get("f16c")) or "aarch64" in binding.get_process_triple()


@njit(inline="always")
def bits_of(x: np.float32) -> np.uint32:
    return np.float32(x).view(np.uint32)


@njit(inline="always")
def float_of(bits: np.uint32) -> np.float32:
    return np.uint32(bits).view(np.float32)


@njit(inline="always")
def bfloat16_bits(x: np.float32) -> np.uint32:
    """float32 bits of the nearest bfloat16, ties to even; x is finite and stays so."""
    bits = bits_of(x)
    return (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)


@njit(inline="always")
def float16_bits_by_integers(x: np.float32) -> np.uint32:
    """The 16 bits of the nearest float16, ties to even; |x| is at most the largest float16."""
    bits = bits_of(x)
    sign, magnitude = (bits & _SIGN) >> np.uint32(16), bits & _MAGNITUDE
    scaled = bits_of(float_of(magnitude) * _HALF_DOWN)
    normal = (scaled + np.uint32(0xFFF) + ((scaled >> np.uint32(13)) & np.uint32(1))) >> np.uint32(13)
    # Beside 0.5 the last bit of a float32 is worth as much as that of a subnormal float16.
    subnormal = bits_of(float_of(magnitude) + np.float32(0.5)) - _ONE_HALF_BITS
    return np.uint32(sign | (normal if magnitude >= _HALF_NORMAL else subnormal))


@njit(inline="always")
def float16_value_by_integers(half: np.uint32) -> np.float32:
    """A float16 given by its 16 bits; NaN becomes infinite."""
    magnitude = half & np.uint32(0x7FFF)
    value = bits_of(float_of(magnitude << np.uint32(13)) * _HALF_UP)
    if magnitude >= np.uint32(0x7C00):
        value = np.uint32(_INFINITE)
    return float_of(value | ((half & np.uint32(0x8000)) << np.uint32(16)))


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def _float16_bits_by_cpu(typing_context: Any, x: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        half = builder.fptrunc(arguments[0], ir.HalfType())
        return builder.zext(builder.bitcast(half, ir.IntType(16)), ir.IntType(32))

    return types.uint32(types.float32), generate


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def _float16_value_by_cpu(typing_context: Any, half: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = builder.bitcast(builder.trunc(arguments[0], ir.IntType(16)), ir.HalfType())
        return builder.fpext(bits, ir.FloatType())

    return types.float32(types.uint32), generate


float16_bits_in_range = _float16_bits_by_cpu if _CPU_HAS_F16 else float16_bits_by_integers
float16_value = _float16_value_by_cpu if _CPU_HAS_F16 else float16_value_by_integers


@njit(inline="always")
def float16_bits(x: np.float32) -> np.uint32:
    """The 16 bits of the nearest float16, ties to even; magnitudes beyond its range become its largest number."""
    return float16_bits_in_range(min(max(x, -_F16_MAX), _F16_MAX))
