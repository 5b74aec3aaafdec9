"""Blocks that travel and are kept as int8: encoded before they are written, decoded after they were read and checked.

A block that would break the error bound is written as it is; a reader who allows lossy copies takes whichever is there.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvpool.channels.base import Memory, Rows, check_memory, row_numbers
from kvpool.codecs.int8 import Int8
from kvpool.codecs.layout import KvLayout
from kvpool.core.ids import Fidelity
from kvpool.core.namespace import GroupSpec, NamespaceSpec
from kvpool.service.client_reads import Outcome, as_rows
from kvpool.service.client_types import Bools


class LossyBlocks:
    """The int8 codec for one group of a namespace. Raises: Unsupported if its blocks can't be encoded."""

    def __init__(self, spec: NamespaceSpec, group: GroupSpec) -> None:
        self._codec, self._layout = Int8(), KvLayout.of(spec, group)
        self.stored_bytes, self.block_bytes = self._codec.stored_bytes(group), group.block_bytes

    def encode(self, blocks: Memory, rows: Rows) -> tuple[NDArray[np.uint8], Bools]:
        """The encoded form of each row, uint8 (n, stored_bytes), and which of them are within the bound."""
        rows = row_numbers(rows, len(rows), len(blocks))
        check_memory(blocks, rows, np.full(len(rows), self.block_bytes, dtype=np.uint64))
        encoded = np.empty((len(rows), self.stored_bytes), dtype=np.uint8)
        return encoded, self._codec.encode(blocks, encoded, self._layout, rows=rows).ok

    def decode(self, encoded: Memory, out: Memory, out_rows: Rows) -> None:
        """Decodes verified blocks into rows of `out`. Raises: CorruptBlock."""
        self._codec.decode(encoded, out, self._layout, out_rows=out_rows)


class LossyRead:
    """Memory for blocks that may arrive in either form: exact ones go to their rows, encoded ones by a detour."""

    def __init__(self, codec: LossyBlocks, out: Memory, rows: Rows | None, count: int) -> None:
        self._codec, self._out = codec, out
        self._rows = row_numbers(None if rows is None else as_rows(rows, count), count, len(out))
        check_memory(out, self._rows, np.full(count, codec.block_bytes, dtype=np.uint64), to_write=True)
        self._staged: dict[int, NDArray[np.uint8]] = {}

    def provide(self, chosen: NDArray[np.int64], sizes: NDArray[np.uint64]) -> tuple[Memory, None]:
        memory: list[NDArray[np.uint8]] = []
        for index, size in zip(chosen.tolist(), sizes.tolist(), strict=True):
            if size == self._codec.stored_bytes:
                self._staged[index] = np.empty(size, dtype=np.uint8)
                memory.append(self._staged[index])
            else:
                memory.append(self._out[int(self._rows[index])])
        return memory, None

    def finish(self, outcome: Outcome) -> None:
        """Decodes what was found encoded. What the source says counts, not the size: the two forms may be as long."""
        encoded = outcome.fidelities == int(Fidelity.INT8)
        for index, value in self._staged.items():
            if outcome.found[index] and not encoded[index]:
                self._out[int(self._rows[index])][: len(value)] = value
        for index in np.flatnonzero(outcome.found & encoded).tolist():
            if index not in self._staged:  # encoded by something else: of no use here
                outcome.found[index] = False
        lossy = np.flatnonzero(outcome.found & encoded)
        if len(lossy):
            self._codec.decode([self._staged[index] for index in lossy.tolist()], self._out, self._rows[lossy])
