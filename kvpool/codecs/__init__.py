"""How blocks are stored: one codec for each fidelity."""

from __future__ import annotations

from typing import Protocol

from kvpool.codecs.int8 import Int8
from kvpool.codecs.raw import Raw
from kvpool.core.errors import Unsupported
from kvpool.core.ids import Fidelity
from kvpool.core.namespace import GroupSpec


class Codec(Protocol):
    """A way to store the bytes of a block."""

    fidelity: Fidelity

    def stored_bytes(self, group: GroupSpec) -> int:
        """Bytes of one stored block of `group`. Raises: Unsupported if this codec can't store such blocks."""
        ...


CODECS: dict[Fidelity, Codec] = {codec.fidelity: codec for codec in (Raw(), Int8())}


def codec_for(fidelity: Fidelity) -> Codec:
    """Raises: Unsupported if no codec of this release stores blocks so."""
    codec = CODECS.get(fidelity)
    if codec is None:
        raise Unsupported(f"no codec stores blocks as {fidelity.name.lower()}", hint="ask for exact blocks")
    return codec
