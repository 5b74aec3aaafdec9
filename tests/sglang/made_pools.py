"""Host pools made of plain arrays, with what they say about themselves, and pages to fill them with. No SGLang.

The two functions of a pool are SGLang's: where the runs of a page lie, and a page as one flat piece.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engines.sglang.pages import Pages, pages_of
from engines.sglang.settings import BackendSettings
from kvpool.core.namespace import GroupKind, GroupSpec, NamespaceSpec

LAYOUTS = ("layer_first", "page_first")


@dataclass(frozen=True)
class MadePool:
    """K and V, of each layer, page by page (`layer_first`) or together by page (`page_first`); bytes for tokens."""

    layout: str
    page_count: int
    layers: int
    run_bytes: int  # K or V of one layer of one page
    memory: NDArray[np.uint8]

    @classmethod
    def of(cls, layout: str, page_count: int, layers: int, run_bytes: int) -> MadePool:
        shape = (2, layers, page_count) if layout == "layer_first" else (2, page_count, layers)
        return cls(layout, page_count, layers, run_bytes, np.zeros((*shape, run_bytes), dtype=np.uint8))

    def runs(self, page: int) -> tuple[list[int], list[int]]:
        """In the order in which SGLang's pools name them: of each layer K, then V; or K, then V."""
        if self.layout == "layer_first":
            arrays = [self.memory[kv, layer, page] for layer in range(self.layers) for kv in (0, 1)]
        else:
            arrays = [self.memory[kv, page] for kv in (0, 1)]
        return [array.ctypes.data for array in arrays], [array.nbytes for array in arrays]

    def flat(self, page: int) -> NDArray[np.uint8]:
        """A copy of a page's bytes, in the order of the memory."""
        part = self.memory[:, :, page] if self.layout == "layer_first" else self.memory[:, page]
        return part.reshape(-1).copy()

    def fill(self, seed: int) -> None:
        self.memory[...] = np.random.default_rng(seed).integers(0, 256, self.memory.shape, dtype=np.uint8)

    def pages(self) -> Pages:
        return pages_of(self.runs, self.page_count, one_buffer=True)


def made_spec(pages: Pages, model: str = "made") -> NamespaceSpec:
    groups = tuple(
        GroupSpec(number, GroupKind.FULL, (0,), 4, len(pages.shards), 1, size)
        for number, size in enumerate(pages.group_bytes)
    )
    return NamespaceSpec(model, "", "uint8", "made", "made", "sha256/1", groups)


def hashes(count: int, seed: object) -> list[str]:
    """As SGLang's: sha256 in hex."""
    return [hashlib.sha256(f"{seed} {number}".encode()).hexdigest() for number in range(count)]


def settings(address: str, **others: object) -> BackendSettings:
    return BackendSettings.of({"node": address, **others}, {})


def numbers(*pages: int) -> NDArray[np.int64]:
    return np.array(pages, dtype=np.int64)


def all_numbers(pages: Sequence[int] | range) -> NDArray[np.int64]:
    return np.array(list(pages), dtype=np.int64)
