"""Which blocks go first: the policies, one module each, behind one interface. They name entries; others drop them."""

from __future__ import annotations

from typing import Final

from kvpool.core.evictors.base import Evictor
from kvpool.core.evictors.lfu import Lfu
from kvpool.core.evictors.lru import Lru
from kvpool.core.evictors.prefix import Prefix
from kvpool.core.evictors.s3fifo import S3Fifo

EVICTORS: Final[dict[str, type[Evictor]]] = {cls.name: cls for cls in (Lru, Lfu, S3Fifo, Prefix)}

__all__ = ["EVICTORS", "Evictor", "Lfu", "Lru", "Prefix", "S3Fifo"]
