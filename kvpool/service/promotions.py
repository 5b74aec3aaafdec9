"""Blocks on their way up from a lower tier: one task a batch, shared by all who ask for its blocks meanwhile.

What arrives is leased by the tier itself until everybody who asked for it has it in his own hands.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpool.core.errors import KvpoolError
from kvpool.core.ids import LeaseId, SessionId
from kvpool.service.lower_tier import Promoted
from kvpool.service.source_driver import SourceDriver


class Promotion:
    """One batch. Known by identity.

    Fields: leases: of what has arrived, added by whoever brings it.
    """

    def __init__(self) -> None:
        self.task: asyncio.Task[None]
        self.leases: list[LeaseId] = []
        self.users = 0
        self.ended = False


class Promotions:
    """All batches under way. Runs in the event loop of its source.

    Args: session: of the core, which holds what is on its way.
    """

    def __init__(self, driver: SourceDriver, session: SessionId) -> None:
        self._driver, self._session = driver, session
        self._batches: dict[bytes, Promotion] = {}
        #: Tasks that have not ended.
        self.tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        """Blocks under way."""
        return len(self._batches)

    def missing(self, keys: list[bytes]) -> list[bytes]:
        """Those that are not under way, each once, in order."""
        return [key for key in dict.fromkeys(keys) if key not in self._batches]

    def begin(self, keys: list[bytes], bring: Callable[[list[bytes], Promotion], Coroutine[Any, Any, None]]) -> None:
        """Starts a batch of `missing` keys. `bring` adds leases to it, and logs its own errors."""
        promotion = Promotion()

        def ended(task: asyncio.Task[None]) -> None:
            self.tasks.discard(task)
            for key in keys:
                del self._batches[key]
            promotion.ended = True
            self._let_go(promotion)

        promotion.task = asyncio.get_running_loop().create_task(bring(keys, promotion))
        # Also for a task that is cancelled before it runs; and before those who wait for it go on.
        promotion.task.add_done_callback(ended)
        self._batches.update(dict.fromkeys(keys, promotion))
        self.tasks.add(promotion.task)

    async def join(self, keys: list[bytes], below: NDArray[np.bool_], timeout_s: float) -> Promoted:
        """Waits for those batches that bring some of these keys; until `release` what they brought is held."""
        mine = list(dict.fromkeys(self._batches[key] for key in keys if key in self._batches))
        for promotion in mine:
            promotion.users += 1

        def release() -> None:
            for promotion in mine:
                promotion.users -= 1
                self._let_go(promotion)

        try:
            if mine:
                await asyncio.wait([promotion.task for promotion in mine], timeout=max(0.0, timeout_s))
        except BaseException:
            release()
            raise
        return Promoted(below, release)

    async def quiet(self, timeout_s: float) -> bool:
        """Waits for all that is under way now. Returns whether it has ended."""
        if not self._batches:
            return True
        _, late = await asyncio.wait({promotion.task for promotion in self._batches.values()}, timeout=timeout_s)
        return not late

    def _let_go(self, promotion: Promotion) -> None:
        """Ends the hold on what was brought up, once it is complete and nobody waits for it."""
        if promotion.ended and promotion.users == 0 and promotion.leases:
            leases, promotion.leases = promotion.leases, []
            with contextlib.suppress(KvpoolError), self._driver.turn() as now:
                self._driver.core.release(self._session, leases, now)
