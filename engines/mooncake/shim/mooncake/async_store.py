"""`mooncake.async_store` on kvpool: each call also as `async_CALL`, in a thread."""

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import Any

from mooncake.store import MooncakeDistributedStore


class MooncakeDistributedStoreAsync(MooncakeDistributedStore):
    """The store, for callers with an event loop."""

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        call = getattr(type(self), name.removeprefix("async_"), None) if name.startswith("async_") else None
        if not callable(call):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

        async def in_thread(*args: Any, **kwargs: Any) -> Any:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(None, functools.partial(call, self, *args, **kwargs))

        return in_thread
