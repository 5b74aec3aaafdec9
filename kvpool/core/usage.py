"""Bytes and blocks by namespace and by tenant, kept as they change, so that nobody has to scan for them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpool.core.namespace import NAMESPACES_MAX


class Usage:
    """Counters: bytes in slots, whatever the state of what is in them, and readable blocks."""

    def __init__(self, tenants_max: int) -> None:
        # The last one is for slots of a damaged index, of which nobody knows whose they are.
        self.namespace_bytes = np.zeros(NAMESPACES_MAX + 1, dtype=np.int64)
        self.namespace_blocks = np.zeros(NAMESPACES_MAX + 1, dtype=np.int64)
        self.tenant_bytes = np.zeros(tenants_max + 1, dtype=np.int64)

    def add_bytes(self, namespaces: NDArray[Any], tenants: NDArray[Any], slots_bytes: NDArray[np.int64]) -> None:
        """Slots were taken, or with negative sizes given back; a row each."""
        np.add.at(self.namespace_bytes, namespaces, slots_bytes)
        np.add.at(self.tenant_bytes, tenants, slots_bytes)

    def add_blocks(self, namespaces: NDArray[Any], change: int) -> None:
        """Blocks became readable (1) or stopped being so (-1)."""
        np.add.at(self.namespace_blocks, namespaces, change)
