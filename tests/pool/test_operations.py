"""Operations of operators in one process: what they leave behind when their loop or their work is stuck."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import numpy as np
import pytest

from kvpool.core.arrays import SourceArrays
from kvpool.core.errors import KvpoolError, Overloaded, Unavailable
from kvpool.core.results import SourceConfig
from kvpool.core.source import SourceCore
from kvpool.service import operations
from kvpool.service.grants import Grants
from kvpool.service.operations import Operation, Operations
from kvpool.service.source_driver import SourceDriver


def new_driver() -> SourceDriver:
    """In a running loop."""
    core = SourceCore(SourceConfig(1 << 20, 64), SourceArrays.allocate(64), np.zeros(1 << 20, np.uint8))
    return SourceDriver(core, Grants())


def test_a_session_that_is_opened_too_late_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread has given up, and nobody else knows of it: it would be there for ever."""
    monkeypatch.setattr(operations, "TURN_TIMEOUT_S", 0.05)
    raised: list[KvpoolError] = []

    async def story() -> None:
        driver = new_driver()
        operation = Operation(driver, asyncio.get_running_loop())
        ended = threading.Event()

        def work() -> None:
            try:
                with operation.session("late"):
                    pass
            except KvpoolError as error:
                raised.append(error)
            finally:
                ended.set()

        thread = threading.Thread(target=work)
        thread.start()
        assert ended.wait(60), "while this waits, the loop takes no turns"
        thread.join()
        assert [type(error) for error in raised] == [Unavailable]
        for _ in range(5):
            await asyncio.sleep(0)
        assert driver.core.counts().sessions == 0
        driver.stop()

    asyncio.run(story())


def test_a_session_that_is_refused_is_said() -> None:
    async def story() -> None:
        driver = new_driver()
        operation = Operation(driver, asyncio.get_running_loop())

        def work() -> None:
            with operation.session("one"):
                pass

        def refuse(*_: object) -> None:
            raise Overloaded("no more sessions")

        await asyncio.to_thread(work)
        assert driver.core.counts().sessions == 0
        driver.core.open_session = refuse  # type: ignore[assignment,method-assign]
        with pytest.raises(Overloaded):
            await asyncio.to_thread(work)
        driver.stop()

    asyncio.run(story())


@pytest.mark.parametrize("writes", [True, False])
def test_what_may_still_write_into_memory_is_known_after_closing(monkeypatch: pytest.MonkeyPatch, writes: bool) -> None:
    monkeypatch.setattr(operations, "STOP_TIMEOUT_S", 0.05)

    async def story() -> None:
        driver = new_driver()
        tested, begun, hanging = Operations(driver), threading.Event(), threading.Event()

        def hang(_: Operation) -> None:
            begun.set()
            hanging.wait()

        async def follow(work: Callable[[Operation], None], *, writes: bool) -> None:
            async for _ in tested.run("test", work, writes=writes):
                pass

        await follow(lambda _: None, writes=True)
        stuck = asyncio.create_task(follow(hang, writes=writes))
        assert await asyncio.to_thread(begun.wait, 60)
        await tested.close()
        assert tested.left_behind is writes
        hanging.set()
        await stuck
        driver.stop()

    asyncio.run(story())
