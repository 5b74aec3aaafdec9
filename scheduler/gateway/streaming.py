"""Answers that are made while the client listens: stops the work when it leaves, reports errors as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from scheduler.gateway import replies
from scheduler.gateway.errors import ApiError
from scheduler.gateway.generation import Generation, Piece

#: Pieces that wait for the reader of several answers at once, for each answer.
_MERGE_PIECES_MAX = 4


class WatchedResponse(Response):
    """Sends blocks as they are made. Its status is known with the first block, so an early error keeps its own."""

    def __init__(
        self,
        blocks: AsyncGenerator[bytes, None],
        *,
        stream: bool,
        request_id: str,
        on_disconnect: Callable[[], None],
        on_error: Callable[[ApiError], None],
    ) -> None:
        self._blocks = blocks
        self._stream = stream
        self._on_disconnect = on_disconnect
        self._on_error = on_error
        self.background = None
        self.status_code = 200
        media = "text/event-stream; charset=utf-8" if stream else "application/json"
        self._head = [(b"content-type", media.encode()), (b"x-request-id", request_id.encode())]
        if stream:
            self._head += [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(self._watch(receive))
        begun = False
        try:
            async with aclosing(self._blocks) as blocks:
                async for block in blocks:
                    if not begun:
                        begun = True
                        await self._begin(send, block)
                    await send({"type": "http.response.body", "body": block, "more_body": self._stream})
            if self._stream:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except ApiError as error:
            self._on_error(error)
            if not begun:
                await error.response()(scope, receive, send)
                return
            body = replies.event(error.body()) + replies.DONE
            await send({"type": "http.response.body", "body": body, "more_body": False})
        finally:
            watcher.cancel()

    async def _begin(self, send: Send, block: bytes) -> None:
        length = [] if self._stream else [(b"content-length", str(len(block)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": [*self._head, *length]})

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._on_disconnect()


async def merged(generations: Sequence[Generation]) -> AsyncGenerator[tuple[int, Piece], None]:
    """Pieces of all answers as they come, each with its index. The first error ends all. Raises: ApiError."""
    if len(generations) == 1:
        async with aclosing(generations[0].pieces()) as pieces:
            async for piece in pieces:
                yield 0, piece
        return
    queue: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue(_MERGE_PIECES_MAX * len(generations))

    async def pump(index: int, generation: Generation) -> None:
        try:
            async with aclosing(generation.pieces()) as pieces:
                async for piece in pieces:
                    await queue.put((index, piece))
        except Exception as error:  # a bug of ours too: the reader would wait for this answer for ever
            await queue.put((index, error))

    tasks = [asyncio.create_task(pump(i, g)) for i, g in enumerate(generations)]
    left = len(generations)
    try:
        while left:
            index, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            left -= bool(item.finish)
            yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def collected(generations: Sequence[Generation]) -> list[Piece]:
    """One whole piece for each answer. Raises: ApiError."""
    whole = [Piece() for _ in generations]
    async with aclosing(merged(generations)) as pieces:
        async for index, piece in pieces:
            total = whole[index]
            total.text += piece.text
            total.token_ids += piece.token_ids
            total.logprobs += piece.logprobs
            total.gaps += piece.gaps
            total.finish = piece.finish
    return whole
