"""Memory for objects that are read: the caller's own, or new memory of the size that each turns out to have."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvpool.channels.base import Memory
from kvpool.core.errors import BadArgument
from kvpool.service.client_types import Bools

#: Objects as they come out: uint8, each of its own size; None = not there.
Values = list[NDArray[np.uint8] | None]


class ObjectMemory:
    """Args: out: contiguous uint8, one a name, long enough; values are then views of it. None = new memory.

    Raises: BadArgument, also by `provide` for an array that is too short.
    """

    def __init__(self, names: Sequence[str], out: Sequence[NDArray[np.uint8]] | None) -> None:
        if out is not None and len(out) != len(names):
            raise BadArgument(f"{len(out)} arrays are not one for each of {len(names)} names")
        self._names, self._out = names, out
        self._values: Values = [None] * len(names)

    def provide(self, chosen: NDArray[np.int64], sizes: NDArray[np.uint64]) -> tuple[Memory, None]:
        """Memory for the chosen objects, in their order."""
        memory: list[NDArray[np.uint8]] = []
        for index, size in zip(chosen.tolist(), sizes.tolist(), strict=True):
            array = np.empty(size, dtype=np.uint8) if self._out is None else self._out[index]
            if len(array) < size:
                raise BadArgument(f"{self._names[index]!r} has {size} bytes, its array only {len(array)}")
            self._values[index] = array[:size]
            memory.append(array[:size])
        return memory, None

    def values(self, found: Bools) -> Values:
        """Those objects that were found."""
        return [value if there else None for value, there in zip(self._values, found.tolist(), strict=True)]
