"""Life lines: one long stream a source, instance or gateway, read and answered at the same time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from kvpool.core.errors import BadArgument, Overloaded
from kvpool.core.ids import Role
from scheduler.core.events import Event
from scheduler.service.shell import Shell

Message = TypeVar("Message")
Reply = TypeVar("Reply")


class Outbox:
    """What is to be said on a life line. Holds at most one answer and one role: a newer one takes the older one in."""

    def __init__(self) -> None:
        self._acknowledged: tuple[int, bool] | None = None
        self._role: Role | None = None
        self._closed: str | None = None
        self._changed = asyncio.Event()

    def acknowledge(self, seq: int, want_snapshot: bool) -> None:
        wanted_before = self._acknowledged is not None and self._acknowledged[1]
        self._acknowledged = (seq, want_snapshot or wanted_before)
        self._changed.set()

    def change_role(self, role: Role) -> None:
        self._role = role
        self._changed.set()

    def take_role(self) -> Role | None:
        role, self._role = self._role, None
        return role

    def close(self, reason: str) -> None:
        self._closed = reason
        self._changed.set()

    def wake(self) -> None:
        self._changed.set()

    async def changed(self) -> None:
        await self._changed.wait()
        self._changed.clear()

    def take(self) -> tuple[int, bool] | None:
        answer, self._acknowledged = self._acknowledged, None
        return answer

    @property
    def closed(self) -> str | None:
        return self._closed


async def serve_life_line(
    shell: Shell,
    messages: AsyncIterator[Message],
    *,
    begin: Callable[[Message, int], Event],
    read: Callable[[Message, int], Event],
    end: Callable[[int], Event],
    greeting: Reply,
    answer: Callable[[int, bool], Reply],
    beat: Callable[[int], Reply],
    order: Callable[[Role], Reply] | None = None,
) -> AsyncIterator[Reply]:
    """Serves one life line from its first message to its end.

    Args:
        begin, read: make events of the first and of each later message; they raise BadArgument for wrong ones.
        end: makes the event of the stream's end, whatever ended it.
        greeting: said when the first message has been taken in.
        beat: what is said of the last batch acknowledged when there was nothing to say for a heartbeat interval.
        order: how an instance is told its role; None: nobody here has one.
    Raises: BadArgument for wrong messages; Overloaded when the core ends the life line, with its reason.
    """
    try:
        first = await anext(messages)
    except StopAsyncIteration:
        raise BadArgument("the stream ended before its first message") from None
    outbox = Outbox()
    stream = shell.open_stream(outbox)
    try:
        shell.submit(begin(first, stream))
    except BaseException:
        shell.close_stream(stream, end(stream))
        raise
    reader = asyncio.create_task(_read(shell, messages, read, stream, outbox))
    interval_s = shell.core.config.heartbeat_interval_us / 1e6
    acknowledged = 0
    try:
        if outbox.closed is None:
            yield greeting
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(outbox.changed(), interval_s)
            role, taken = outbox.take_role(), outbox.take()
            if role is not None and order is not None:
                yield order(role)
            if taken is not None:
                acknowledged = taken[0]
                yield answer(*taken)
            elif role is None and outbox.closed is None and not reader.done():
                # A scheduler that hangs is told from one that has nothing to say.
                yield beat(acknowledged)
            if outbox.closed is not None:
                raise Overloaded(outbox.closed, hint="connect again")
            if reader.done():
                reader.result()
                return
    finally:
        reader.cancel()
        shell.close_stream(stream, end(stream))
        await asyncio.gather(reader, return_exceptions=True)


async def _read(
    shell: Shell, messages: AsyncIterator[Any], read: Callable[[Any, int], Event], stream: int, outbox: Outbox
) -> None:
    try:
        async for message in messages:
            shell.submit(read(message, stream))
    finally:
        outbox.wake()
