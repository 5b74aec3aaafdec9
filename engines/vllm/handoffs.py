"""Requests whose prompt another engine has just computed: worth a short wait until its blocks are in the pool. Plain.

The prefill engine's answer says how many tokens it stores (`kv_transfer_params` of vLLM's two-step protocol); the
decode engine is given that with the request. Whatever has not come when the time is over is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: In a request's `kv_transfer_params`: true asks the engine to say how many tokens it stores ...
ASKS = "kvpool_handoff"
#: ... and this is the answer, to be passed on to the engine that goes on.
TOKENS = "kvpool_tokens"
#: Between two looks into the pool.
LOOK_INTERVAL_S = 0.001


def asks(parameters: Mapping[str, Any] | None) -> bool:
    return bool(parameters and parameters.get(ASKS))


def tokens_of(parameters: Mapping[str, Any] | None) -> int:
    """Tokens that are on their way; 0 if none are, or if it does not make sense."""
    tokens = parameters.get(TOKENS) if parameters else None
    return tokens if isinstance(tokens, int) and not isinstance(tokens, bool) and tokens > 0 else 0


@dataclass(slots=True)
class _Wait:
    until_s: float
    look_s: float
    given_up: bool = False


@dataclass(slots=True)
class HandoffWaits:
    """Which requests wait, and until when. A request waits once, at most `wait_s`."""

    wait_s: float
    waits: dict[str, _Wait] = field(default_factory=dict)

    def looks(self, request_id: str, now_s: float) -> bool:
        """Whether it is time to look (again) for a request's blocks."""
        wait = self.waits.get(request_id)
        return wait is None or now_s >= wait.look_s

    def lacks(self, request_id: str, now_s: float) -> bool:
        """Something has not come yet: whether to go on waiting for it."""
        wait = self.waits.get(request_id)
        if wait is None:
            wait = self.waits[request_id] = _Wait(now_s + self.wait_s, now_s)
        wait.look_s = now_s + LOOK_INTERVAL_S
        return now_s < wait.until_s

    def gives_up(self, request_id: str) -> bool:
        """True once, for whoever says so in the log."""
        wait = self.waits[request_id]
        first, wait.given_up = not wait.given_up, True
        return first

    def forget(self, request_id: str) -> None:
        self.waits.pop(request_id, None)
