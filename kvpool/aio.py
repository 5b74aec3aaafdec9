"""The library for asyncio: the verbs of `PoolClient` and `ClusterClient`, each in a thread of a bounded number.

A call that is cancelled ends when its thread does not touch the caller's memory any more, at the latest by the call's
own deadline; what it had come to hold meanwhile is given back. Beyond `threads` calls at a time the next ones wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from kvpool.client import PoolClient, Reservation, Waited
from kvpool.cluster import ClusterClient
from kvpool.core.errors import Overloaded
from kvpool.service.client_types import Bools, Counters, News

__all__ = ["AsyncClusterClient", "AsyncPoolClient"]

THREADS = 16
#: Waits at a time; one more is refused. Each has a thread of its own, for as long as it lasts.
WAITS_MAX = 64

P = ParamSpec("P")
R = TypeVar("R")


class _Threaded:
    """Runs calls of a synchronous client in threads."""

    def __init__(self, threads: int) -> None:
        self._threads = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="async-client")

    async def _run(self, call: Callable[[], R], undo: Callable[[R], object] | None = None) -> R:
        """Runs one call to its end, also if cancelled meanwhile: `undo` then gives back what it came to hold."""
        future = self._threads.submit(call)
        try:
            return await asyncio.shield(asyncio.wrap_future(future))
        except asyncio.CancelledError:
            if not future.cancel():
                await self._end(future, undo)
            raise

    async def _end(self, future: Any, undo: Callable[[R], object] | None) -> None:
        """Waits for a call that nobody wants any more, however often it is cancelled again."""
        ended = asyncio.ensure_future(asyncio.wrap_future(future))
        while not ended.done():
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await asyncio.shield(ended)
        if undo is not None and ended.exception() is None:
            undone = asyncio.wrap_future(self._threads.submit(undo, ended.result()))
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await asyncio.shield(undone)

    async def _iterate(self, make: Callable[[], Iterator[R]]) -> AsyncIterator[R]:
        items = await self._run(make)
        missing = object()
        while (item := await self._run(lambda: next(items, missing))) is not missing:
            yield item  # type: ignore[misc]


def _verb(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, R]]:
    """The same method, in a thread."""

    @functools.wraps(method)
    async def call(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
        result: R = await self._run(lambda: method(self.sync, *args, **kwargs))
        return result

    return call


def _listing(method: Callable[Concatenate[Any, P], Iterator[R]]) -> Callable[Concatenate[Any, P], AsyncIterator[R]]:
    """The same generator, its items fetched in a thread."""

    @functools.wraps(method)
    def call(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> AsyncIterator[R]:
        items: AsyncIterator[R] = self._iterate(lambda: method(self.sync, *args, **kwargs))
        return items

    return call


def _held(
    method: Callable[Concatenate[Any, P], R], undo: Callable[[Any, R], object]
) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, R]]:
    """The same method, in a thread; what it came to hold is given back if nobody waits for it any more."""

    @functools.wraps(method)
    async def call(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
        held: R = await self._run(lambda: method(self.sync, *args, **kwargs), lambda got: undo(self.sync, got))
        return held

    return call


def _abort(client: PoolClient, reservation: Reservation) -> None:
    if reservation.id:
        client.abort(reservation)


class AsyncPoolClient(_Threaded):
    """`PoolClient` for asyncio; `sync` is the client beneath.

    Args: as `PoolClient`; `threads`: calls at a time.
    """

    def __init__(self, address: str, *, threads: int = THREADS, **options: Any) -> None:
        super().__init__(threads)
        self.sync = PoolClient(address, **options)
        self._waits: set[News] = set()
        self._waiting = 0
        self._wait_threads = ThreadPoolExecutor(max_workers=WAITS_MAX, thread_name_prefix="async-wait")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the session, and with it all that it holds; calls under way fail."""
        for news in list(self._waits):
            news.close()
        await asyncio.get_running_loop().run_in_executor(None, self.sync.close)
        self._threads.shutdown(wait=False)
        self._wait_threads.shutdown(wait=False)

    @property
    def address(self) -> str:
        return self.sync.address

    @property
    def connected(self) -> bool:
        return self.sync.connected

    @property
    def counters(self) -> Counters:
        return self.sync.counters

    info = _verb(PoolClient.info)
    stats = _verb(PoolClient.stats)
    register = _verb(PoolClient.register)
    register_objects = _verb(PoolClient.register_objects)
    put = _verb(PoolClient.put)
    put_lots = _verb(PoolClient.put_lots)
    get = _verb(PoolClient.get)
    put_objects = _verb(PoolClient.put_objects)
    get_objects = _verb(PoolClient.get_objects)
    lookup = _verb(PoolClient.lookup)
    lookup_objects = _verb(PoolClient.lookup_objects)
    object_sizes = _verb(PoolClient.object_sizes)
    remove = _verb(PoolClient.remove)
    remove_all = _verb(PoolClient.remove_all)
    remove_objects = _verb(PoolClient.remove_objects)
    free_hold = _verb(PoolClient.free_hold)
    reserve = _held(PoolClient.reserve, _abort)
    write = _verb(PoolClient.write)
    fill = _verb(PoolClient.fill)
    commit = _verb(PoolClient.commit)
    write_sections = _verb(PoolClient.write_sections)
    commit_sections = _verb(PoolClient.commit_sections)
    read_sections = _verb(PoolClient.read_sections)
    abort = _verb(PoolClient.abort)
    unpin = _verb(PoolClient.unpin)
    list_blocks = _listing(PoolClient.list_blocks)

    @functools.wraps(PoolClient.pin)
    async def pin(self, *args: Any, **kwargs: Any) -> tuple[int, Bools]:
        """As `PoolClient.pin`; a pin that nobody waits for any more is released, with its owner's word."""
        owner = kwargs.get("owner", "")
        return await self._run(
            lambda: self.sync.pin(*args, **kwargs),
            lambda pinned: self.sync.unpin(pinned[0], owner=owner) if pinned[0] else None,
        )

    @functools.wraps(PoolClient.wait)
    async def wait(self, *args: Any, **kwargs: Any) -> AsyncIterator[Waited]:
        """News of keys, as `PoolClient.wait`. The wait begins with the first step, and ends when the iterator does.

        Raises: Overloaded at the bound of waits; Unavailable when the source is lost.
        """
        if self._waiting >= WAITS_MAX:
            raise Overloaded(f"{WAITS_MAX} waits are under way", hint="wait for more keys at once")
        # Before anything is awaited, so that no more can begin than there are threads for.
        self._waiting += 1
        try:
            news = await self._run(lambda: self.sync.wait(*args, **kwargs), lambda begun: begun.close())
            self._waits.add(news)
            loop = asyncio.get_running_loop()
            try:
                while (item := await loop.run_in_executor(self._wait_threads, next, news, None)) is not None:
                    yield item
            finally:
                self._waits.discard(news)
                news.close()
        finally:
            self._waiting -= 1


class AsyncClusterClient(_Threaded):
    """`ClusterClient` for asyncio; `sync` is the client beneath.

    Args: as `ClusterClient`; `threads`: calls at a time.
    """

    def __init__(self, scheduler: str, *, threads: int = THREADS, **options: Any) -> None:
        super().__init__(threads)
        self.sync = ClusterClient(scheduler, **options)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the sessions with all nodes; calls under way fail."""
        await asyncio.get_running_loop().run_in_executor(None, self.sync.close)
        self._threads.shutdown(wait=False)

    nodes = _verb(ClusterClient.nodes)
    refresh = _verb(ClusterClient.refresh)
    register = _verb(ClusterClient.register)
    register_objects = _verb(ClusterClient.register_objects)
    put = _verb(ClusterClient.put)
    get = _verb(ClusterClient.get)
    put_objects = _verb(ClusterClient.put_objects)
    get_objects = _verb(ClusterClient.get_objects)
    lookup = _verb(ClusterClient.lookup)
    lookup_objects = _verb(ClusterClient.lookup_objects)
    object_sizes = _verb(ClusterClient.object_sizes)
    remove = _verb(ClusterClient.remove)
    remove_all = _verb(ClusterClient.remove_all)
    remove_objects = _verb(ClusterClient.remove_objects)
    stats = _verb(ClusterClient.stats)
