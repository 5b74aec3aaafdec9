"""When the interpreter looks for reference cycles: between events, and for old ones only while nobody asks for a place.

Counting references frees nearly all that a scheduler makes: its core makes no cycles, libraries make few. Left alone,
the interpreter looks inside whatever event makes the 700th object, at all objects every now and then, and somebody's
placement takes a tenth of a second.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

#: How often there is a look. What is made meanwhile is looked at in one go.
LOOK_INTERVAL_S = 0.02
#: Fewer new objects than this are left for the next look.
YOUNG_MIN = 700
#: All objects are looked at when so many have grown old since, and nobody has asked for a place for so long; and at
#: the latest when so many times more have.
OLD_MIN, OLD_MAX_FACTOR = 200_000, 50
IDLE_S = 1.0


@dataclass(slots=True)
class Collector:
    """Takes the interpreter's own collections over from `begin` to `end`. One a process.

    What survives a look at the young is frozen: it is freed with its last reference as before, and passed over by
    looks until one at all objects. So a look is short however much is held.
    """

    requests: Callable[[], int]  # how many there have been
    clock_s: Callable[[], float] = time.monotonic
    old: int = 0  # objects that have been frozen since the last look at all, at most
    seen: int = -1
    idle_since_s: float = 0.0

    def begin(self) -> None:
        gc.collect()
        gc.freeze()
        gc.disable()

    def end(self) -> None:
        """As the interpreter does it by itself."""
        gc.unfreeze()
        gc.enable()

    def look(self) -> None:
        """To be called between two events."""
        young = gc.get_count()[0]
        if young >= YOUNG_MIN:
            gc.collect(0)
            gc.freeze()
            self.old += young
        if self.old >= OLD_MIN and (self._idle() or self.old >= OLD_MIN * OLD_MAX_FACTOR):
            gc.unfreeze()
            gc.collect()
            gc.freeze()
            self.old = 0

    def _idle(self) -> bool:
        """Whether nobody has asked for a place for a while."""
        now_s, requests = self.clock_s(), self.requests()
        if requests != self.seen:
            self.seen, self.idle_since_s = requests, now_s
        return now_s - self.idle_since_s >= IDLE_S

    async def main_loop(self) -> None:
        """Looks from time to time, until it is cancelled."""
        self.begin()
        try:
            while True:
                await asyncio.sleep(LOOK_INTERVAL_S)
                self.look()
        finally:
            self.end()
