"""Blocking work in threads, for code in an event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

Result = TypeVar("Result")


async def in_thread(call: Callable[..., Result], *args: object, threads: Executor | None = None) -> Result:
    """Runs `call` in a thread and does not end before it: what it reads or writes must stay ours until then.

    Args: threads: to use instead of the loop's own.
    """
    if threads is None:
        future = asyncio.ensure_future(asyncio.to_thread(call, *args))
    else:
        future = asyncio.ensure_future(asyncio.get_running_loop().run_in_executor(threads, call, *args))
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        while not future.done():
            # Cancelled again: it changes nothing for the thread.
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([future])
        if not future.cancelled():
            future.exception()  # nobody is left to hear of it
        raise
