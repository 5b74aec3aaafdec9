"""Blocking work in threads, for code in an event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


async def in_thread(call: Callable[..., Result], *args: object) -> Result:
    """Runs `call` in a thread and does not end before it: what it reads or writes must stay ours until then."""
    future = asyncio.ensure_future(asyncio.to_thread(call, *args))
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        while not future.done():
            # Cancelled again: it changes nothing for the thread.
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([future])
        raise
