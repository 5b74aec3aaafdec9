"""Errors of codecs. They stay inside the process that decodes: none travels on the wire."""

from __future__ import annotations

from kvpool.core.errors import KvpoolError


class CorruptBlock(KvpoolError):
    """Stored bytes that are not what a codec writes. Treat it as a miss."""
