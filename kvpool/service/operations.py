"""Long operations of operators: each in a thread of its own, telling how far it is, ended with the call that began it.

The work itself is ordinary blocking code that is given an `Operation`; it touches the core through `Operation.turn`
alone, which runs in the core's event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import Any, TypeVar

from kvpool.core.errors import KvpoolError, Overloaded, Unavailable
from kvpool.core.ids import KeyArray, SessionId
from kvpool.core.source import SourceCore
from kvpool.service.lower_tier import LowerTier
from kvpool.service.source_driver import SourceDriver
from kvpool.service.ssd_tier import SsdTier
from kvpool.tiers.ssd.daemon_threads import DaemonThreads
from kvpool.v1 import block_source_pb2
from kvpool.v1 import source_admin_pb2 as pb

log = logging.getLogger(__name__)

#: Operations of one process at a time; one more is refused.
OPERATIONS_MAX = 8
PROGRESS_INTERVAL_S = 1.0
TURN_TIMEOUT_S = 10.0
REMOVE_TIMEOUT_S = 60.0
#: An operation that was asked to stop ends within the deadline of its current batch, or is left behind.
STOP_TIMEOUT_S = 15.0

Result = TypeVar("Result")


@dataclass
class Counts:
    """How far an operation is; fields as Progress on the wire. Written by its thread, read by the loop."""

    blocks_total: int = 0
    blocks_done: int = 0
    bytes_done: int = 0
    blocks_failed: int = 0
    blocks_bad: int = 0
    message: str = ""

    def failed(self, blocks: int, why: str) -> None:
        """Blocks that could not be done; the last reason is shown."""
        if blocks:
            self.blocks_failed += blocks
            self.message = why

    def to_proto(self, *, done: bool) -> pb.Progress:
        return pb.Progress(**self.__dict__, done=done)


class Operation:
    """What the work of one operation may use. `writes`: whether it writes into the segment."""

    def __init__(self, driver: SourceDriver, loop: asyncio.AbstractEventLoop, *, writes: bool = False) -> None:
        self.counts, self.writes = Counts(), writes
        self._driver, self._loop = driver, loop
        self._stop = threading.Event()

    @property
    def stopped(self) -> bool:
        """Whether nobody wants the rest any more: end soon, as after the last batch."""
        return self._stop.is_set()

    def stop(self) -> None:
        self._stop.set()

    def pause(self, seconds: float) -> None:
        """Waits, or until asked to stop."""
        if seconds > 0:
            self._stop.wait(seconds)

    def turn(self, call: Callable[[SourceCore, int], Result]) -> Result:
        """Calls the core, with the time, in its loop.

        Raises: what the call raises; Unavailable if the loop is stuck or gone.
        """

        async def run() -> Result:
            with self._driver.turn() as now_us:
                result = call(self._driver.core, now_us)
                self._driver.save_catalog()
                return result

        return self._in_loop(run(), TURN_TIMEOUT_S)

    def check_objects(self) -> None:
        """Raises: NoSsd while no object may be changed here."""
        self._driver.check_objects()

    @contextlib.contextmanager
    def promoted(self, lower: LowerTier, namespace_id: bytes, keys: KeyArray) -> Iterator[None]:
        """With these keys brought up from the tier below, as far as that can be had, and held in memory.

        Raises: Unavailable if it takes too long.
        """
        promoted = self._in_loop(lower.promote(namespace_id, keys, TURN_TIMEOUT_S), 2 * TURN_TIMEOUT_S)
        try:
            yield
        finally:
            with contextlib.suppress(Unavailable):
                self.turn(lambda *_: promoted.release())

    def list_below(self, lower: SsdTier, request: block_source_pb2.ListBlocksRequest) -> Any:
        """A page of what lies on the SSD alone. Raises: Unavailable if it takes too long."""
        return self._in_loop(lower.list_alone(request, request.limit), 2 * TURN_TIMEOUT_S)

    def remove_below(
        self, lower: LowerTier, namespace_id: bytes, keys: KeyArray, remove_above: Callable[[SourceCore], int]
    ) -> None:
        """Removes keys from the tier below, and then, in the same turn, what of them came up meanwhile.

        Raises: KvpoolError if it can't be had; Unavailable if it takes too long.
        """

        def above() -> int:
            with self._driver.turn():
                return remove_above(self._driver.core)

        async def run() -> int:
            return await lower.remove(namespace_id, keys, b"", above)

        self._in_loop(run(), REMOVE_TIMEOUT_S)

    def _in_loop(self, coroutine: Coroutine[Any, Any, Result], timeout_s: float) -> Result:
        """What a coroutine returns; one that is late goes on by itself. Those of one thread begin in order."""
        try:
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout_s)
        except FutureTimeout:
            raise Unavailable(f"the source took no call for {timeout_s:.0f} s") from None
        except RuntimeError as error:  # how asyncio says that its loop is closed
            coroutine.close()
            raise Unavailable("the source stops") from error

    @contextlib.contextmanager
    def session(self, name: str) -> Iterator[SessionId]:
        """A session of the core for what the work holds; everything is given back at the end.

        The work writes with its own thread only, and has stopped to when it leaves: nothing needs quarantine.
        """
        opened: list[SessionId] = []

        def end(core: SourceCore, now_us: int) -> None:
            for session in opened:
                core.close_session(session, now_us, writer_gone=True)

        try:
            self.turn(lambda core, now_us: opened.append(core.open_session(name, now_us)))
            yield opened[0]
        finally:
            # One that was opened too late for anybody to use it is ended too: turns of a thread come in order.
            with contextlib.suppress(Unavailable):
                self.turn(end)


class Operations:
    """Starts operations and streams their progress; belongs to the event loop."""

    def __init__(self, driver: SourceDriver) -> None:
        self._driver = driver
        # One that hangs on a dead disk must not keep the process from ending.
        self._threads = DaemonThreads(OPERATIONS_MAX, "operation")
        self._live: dict[Operation, Future[None]] = {}
        self._closing = False
        #: After `close`: work that did not end, and so may still write into memory.
        self.left_behind = False

    async def run(
        self, name: str, work: Callable[[Operation], None], *, writes: bool = False
    ) -> AsyncGenerator[pb.Progress, None]:
        """Runs `work` in a thread; it is asked to stop when the stream is closed.

        Args: writes: whether it writes into the segment.
        Yields: how far it is, once a second; the last one is done.
        Raises: what the work raises; Overloaded.
        """
        if self._closing or len(self._live) >= OPERATIONS_MAX:
            raise Overloaded(f"{len(self._live)} operations run already", hint="wait until one ends, or end one")
        operation = Operation(self._driver, asyncio.get_running_loop(), writes=writes)
        future = self._threads.submit(work, operation)
        self._live[operation] = future
        ended = asyncio.wrap_future(future)
        ended.add_done_callback(lambda done: self._ended(name, operation, done))
        try:
            while True:
                await asyncio.wait({ended}, timeout=PROGRESS_INTERVAL_S)
                if ended.done():
                    break
                yield operation.counts.to_proto(done=False)
            ended.result()
            yield operation.counts.to_proto(done=True)
        finally:
            operation.stop()

    def _ended(self, name: str, operation: Operation, done: asyncio.Future[None]) -> None:
        self._live.pop(operation, None)
        error = None if done.cancelled() else done.exception()
        counts, how = operation.counts, "stopped" if operation.stopped else "ended"
        log.info(
            "%s %s: %d blocks, %d bytes, %d failed, %d bad: %s", name, how, counts.blocks_done, counts.bytes_done,
            counts.blocks_failed, counts.blocks_bad, error or "no error",
        )  # fmt: skip
        if error is not None and not isinstance(error, KvpoolError):
            log.error("%s failed", name, exc_info=error)

    async def close(self) -> None:
        """Stops all and waits for their threads; `left_behind` then says whether one may still touch the segment."""
        self._closing = True
        live = {asyncio.wrap_future(future): operation for operation, future in self._live.items()}
        for operation in live.values():
            operation.stop()
        if live:
            _, late = await asyncio.wait(live, timeout=STOP_TIMEOUT_S)
            self.left_behind = any(live[future].writes for future in late)
            if late:
                log.error("%d operations did not end within %.0f s", len(late), STOP_TIMEOUT_S)
        self._threads.shutdown(wait=False, cancel_futures=True)
