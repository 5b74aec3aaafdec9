"""An event loop whose clock is simulated, and processes that can be killed between any two of its steps."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import Callable, Coroutine
from typing import Any

from kvpool.core.errors import Unavailable


class Killed(BaseException):
    """The process that runs this code is dead: nothing may catch it, nothing that it still does is of effect."""


class Life:
    """One process: everything that runs in its context stops for good at `kill`, without running a `finally`."""

    def __init__(self, loop: SimulatedLoop, owner: object = None) -> None:
        self.dead, self.owner = False, owner
        self._loop = loop
        #: Bytes that threads of this process may write: number of the grant -> number of the memory.
        self.grants: dict[int, int] = {}
        self.context = contextvars.copy_context()
        self.context.run(LIFE.set, self)
        self._outstanding: dict[asyncio.Future[Any], None] = {}

    def kill(self) -> None:
        if self.dead:
            return
        self.dead = True
        self._loop.drop_dead()
        for reply in list(self._outstanding):
            if not reply.done():
                reply.set_exception(Unavailable("the other process has died"))
        self._outstanding.clear()

    async def call(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Runs a coroutine in this process for a caller in another one. Raises: Unavailable if this one dies first."""
        if self.dead:
            coroutine.close()
            raise Unavailable("nobody listens there")
        reply = self._loop.create_future()
        self._outstanding[reply] = None

        def answer(task: asyncio.Task[Any]) -> None:
            self._outstanding.pop(reply, None)
            error = task.exception()
            if reply.done():
                return
            if isinstance(error, Killed):
                reply.set_exception(Unavailable("the other process has died"))
            elif error is not None:
                reply.set_exception(error)
            else:
                reply.set_result(task.result())

        self._loop.create_task(coroutine, context=self.context).add_done_callback(answer)
        return await reply


LIFE: contextvars.ContextVar[Life | None] = contextvars.ContextVar("LIFE", default=None)


class _Clock:
    """Stands for the selector: nothing ever comes from outside, so waiting only moves the time."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def select(self, timeout_s: float | None) -> list[Any]:
        assert timeout_s is not None, "everybody waits, and nothing will ever happen"
        self.now_s += timeout_s
        return []


class SimulatedLoop(asyncio.BaseEventLoop):
    """Time passes only when nothing can be done now."""

    def __init__(self) -> None:
        super().__init__()
        self._selector = self.clock = _Clock()
        #: Tasks of dead processes: kept, so that their code is not unwound while others live.
        self.graveyard: list[object] = []
        self._tasks: list[asyncio.Task[Any]] = []

    def time(self) -> float:
        return self.clock.now_s

    def now_us(self) -> int:
        return int(self.clock.now_s * 1e6)

    def call_soon(
        self, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        handle = super().call_soon(callback, *args, context=context)
        self._bury_dead(handle)
        return handle

    def call_at(
        self, when: float, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        handle = super().call_at(when, callback, *args, context=context)
        self._bury_dead(handle)
        return handle

    def drop_dead(self) -> None:
        """Forgets all that dead processes were about to do."""
        for handle in [*self._ready, *self._scheduled]:
            self._bury_dead(handle)

    def _bury_dead(self, handle: asyncio.Handle) -> None:
        life = handle._context.get(LIFE)
        if life is not None and life.dead and not handle.cancelled():
            # `cancel` forgets the callback, which may be all that keeps a task from being unwound.
            self.graveyard.append((handle._callback, handle._args))
            handle.cancel()

    def create_task(self, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        task = super().create_task(coroutine, **options)
        task._log_destroy_pending = False
        self._tasks.append(task)
        return task

    def unwind(self) -> None:
        """Ends what never ended, when it can do no harm any more."""
        for task in self._tasks:
            if not task.done():
                with contextlib.suppress(BaseException):
                    task.get_coro().close()

    def _process_events(self, event_list: list[Any]) -> None:
        assert not event_list

    def _write_to_self(self) -> None:
        """Nobody else is there to wake up."""
