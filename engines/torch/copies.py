"""Waiting for copies between the cache and its staging memory."""

from __future__ import annotations

import logging
import threading

from kvpool.tiers.hbm import CopyEvent

log = logging.getLogger(__name__)

#: A copy that takes longer is complained about; a device that works needs milliseconds.
COPY_SLOW_S = 30.0


def wait_for_copy(event: CopyEvent, closing: threading.Event) -> bool:
    """Waits until a copy is over. False only when its owner closes.

    Never given up for its slowness: blocks or staging rows that went back before would be somebody else's when the copy
    writes them after all. What a stuck device holds up is bounded by job slots and queues; requests end by their own
    deadlines.
    """
    while not event.wait(COPY_SLOW_S):
        if closing.is_set():
            return False
        log.error("a copy is not over after %.0f s; its blocks stay lent", COPY_SLOW_S)
    return True
