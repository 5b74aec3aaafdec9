"""kvpool in the place of Mooncake's Python package: `mooncake.store` and what its users import besides."""

import logging

from engines.mooncake.shadowing import shadowed

__version__ = "kvpool"
#: Pools of registered buffers: as in a Mooncake that was built without them.
BufferPool = None
RegisteredBufferPool = None

__all__ = ["BufferPool", "RegisteredBufferPool"]

if _text := shadowed():
    logging.getLogger("engines.mooncake").warning("%s", _text)
