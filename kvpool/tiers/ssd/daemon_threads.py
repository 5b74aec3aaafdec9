"""Threads that a hung disk can't keep from ending: neither `shutdown` nor the end of the process waits for ever."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, InvalidStateError
from queue import Empty, SimpleQueue
from typing import Any, Final, ParamSpec, TypeVar

#: How long `shutdown` waits for what is under way.
SHUTDOWN_S: Final = 5.0

Result = TypeVar("Result")
Parameters = ParamSpec("Parameters")


class DaemonThreads(Executor):
    """Runs calls in up to `count` threads, made when they are needed. Calls beyond that wait for one of them.

    As `ThreadPoolExecutor`, whose threads the interpreter joins when it ends, however long that takes.
    """

    def __init__(self, count: int, name: str) -> None:
        self._count, self._name = count, name
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._idle = threading.Semaphore(0)
        self._threads: list[threading.Thread] = []
        #: Calls that have not ended, those that wait for a thread too, by the identity of their future.
        self._left: dict[int, Future[Any]] = {}
        self._closed = False

    def submit(
        self, call: Callable[Parameters, Result], /, *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Future[Result]:
        """Raises: RuntimeError after `shutdown`."""
        future: Future[Result] = Future()

        def run() -> None:
            with self._lock:
                if id(future) not in self._left:  # abandoned while it waited
                    return
                if not future.set_running_or_notify_cancel():
                    del self._left[id(future)]
                    return
            try:
                result = call(*args, **kwargs)
            except BaseException as error:
                if self._ends(future):
                    future.set_exception(error)
            else:
                if self._ends(future):
                    future.set_result(result)

        with self._lock:
            if self._closed:
                raise RuntimeError("these threads have been shut down")
            if not self._idle.acquire(blocking=False) and len(self._threads) < self._count:
                thread = threading.Thread(target=self._work, name=f"{self._name}-{len(self._threads)}", daemon=True)
                thread.start()  # raises where the system has no more: nothing has begun then
                self._threads.append(thread)
            self._left[id(future)] = future
            self._calls.put(run)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Ends the threads when what was submitted is done; with `wait`, waits for them up to `SHUTDOWN_S`."""
        with self._lock:
            self._closed = True
            threads, self._threads = self._threads, []
        for _ in threads:
            self._calls.put(None)
        end_s = time.monotonic() + SHUTDOWN_S
        for thread in threads if wait else ():
            thread.join(max(0.0, end_s - time.monotonic()))

    def abandon(self, error: BaseException) -> int:
        """Ends the futures of all calls with an error, though those under way go on; those that wait never begin.

        Only for a process that is about to end: what these calls read and write is nobody's any more.

        Returns: how many calls had not ended.
        """
        with self._lock:
            left, self._left = self._left, {}
        for future in left.values():
            with contextlib.suppress(InvalidStateError):  # cancelled while it waited
                future.set_exception(error)
        return len(left)

    def _ends(self, future: Future[Any]) -> bool:
        """False: it was abandoned."""
        with self._lock:
            return self._left.pop(id(future), None) is not None

    def _work(self) -> None:
        while True:
            call = self._next()
            if call is None:
                return
            call()
            # What it held must not live on until the next call.
            del call

    def _next(self) -> Callable[[], None] | None:
        with self._lock:
            # `submit` looks for an idle thread under this lock, too: idle are those for which nothing waits.
            with contextlib.suppress(Empty):
                return self._calls.get_nowait()
            self._idle.release()
        return self._calls.get()
