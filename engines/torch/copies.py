"""Waiting for copies between the cache and its staging memory."""

from __future__ import annotations

import logging
import threading

from kvpool.tiers.hbm import CopyEvent

log = logging.getLogger(__name__)

#: A copy that takes longer is complained about; a device that works needs milliseconds.
COPY_SLOW_S = 30.0
#: A wait looks up this often whether its owner closes.
CLOSING_LOOK_S = 0.5


def wait_for_copy(event: CopyEvent, closing: threading.Event) -> bool:
    """Waits until a copy is over. False only when its owner closes.

    Never given up for its slowness: blocks or staging rows that went back before would be somebody else's when the copy
    writes them after all. What a stuck device holds up is bounded by job slots and queues; requests end by their own
    deadlines.
    """
    waited_s = 0.0
    while not event.wait(min(COPY_SLOW_S, CLOSING_LOOK_S)):
        if closing.is_set():
            return False
        waited_s += CLOSING_LOOK_S
        if waited_s >= COPY_SLOW_S:
            waited_s = 0.0
            log.error("a copy is not over after %.0f s; its blocks stay lent", COPY_SLOW_S)
    return True
