"""The raw codec: stored bytes are the engine's own bytes."""

from __future__ import annotations

from kvpool.core.ids import Fidelity
from kvpool.core.namespace import GroupSpec


class Raw:
    """Keeps blocks as they are."""

    fidelity = Fidelity.EXACT

    def stored_bytes(self, group: GroupSpec) -> int:
        """Bytes that one block of `group` takes in a source."""
        return group.block_bytes
