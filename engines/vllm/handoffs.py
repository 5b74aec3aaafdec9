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
#: ... and this is the answer, to be passed on to the engine that goes on,
TOKENS = "kvpool_tokens"
#: with what is needed to know the blocks in the pool by vLLM's hashes: hex of the namespace's id, and of the mask that
#: the first 16 bytes of a hash are combined with (exclusive or) to a block's key.
NAMESPACE, MASK = "kvpool_namespace", "kvpool_key_mask"
#: Between two looks into the pool, at least and at most; in between this share of the time that was waited so far, so
#: that little is lost by looking late, and a long wait asks seldom.
LOOK_INTERVAL_S_MIN, LOOK_INTERVAL_S_MAX, LOOK_SHARE = 0.001, 0.032, 0.1


def asks(parameters: Mapping[str, Any] | None) -> bool:
    return bool(parameters and parameters.get(ASKS))


def tokens_of(parameters: Mapping[str, Any] | None, mask: bytes) -> int:
    """Tokens that are on their way under keys of this mask; 0 if none are, or if it does not make sense."""
    if not parameters or parameters.get(MASK, mask.hex()) != mask.hex():
        return 0
    tokens = parameters.get(TOKENS)
    return tokens if isinstance(tokens, int) and not isinstance(tokens, bool) and tokens > 0 else 0


def answer(stored_tokens: int, namespace: bytes, mask: bytes) -> dict[str, Any]:
    return {TOKENS: stored_tokens, NAMESPACE: namespace.hex(), MASK: mask.hex()}


@dataclass(slots=True)
class _Wait:
    began_s: float
    look_s: float
    over: bool = False


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
        """Something has not come yet: whether to go on waiting for it. Once not, the wait is over for good."""
        wait = self.waits.get(request_id)
        if wait is None:
            wait = self.waits[request_id] = _Wait(now_s, now_s)
        waited_s = now_s - wait.began_s
        wait.look_s = now_s + min(max(LOOK_SHARE * waited_s, LOOK_INTERVAL_S_MIN), LOOK_INTERVAL_S_MAX)
        wait.over = waited_s >= self.wait_s
        return not wait.over

    def came(self, request_id: str) -> None:
        """All is there: the wait, if there was one, is over."""
        wait = self.waits.get(request_id)
        if wait is not None:
            wait.over = True

    @property
    def any(self) -> bool:
        """Whether some request waits."""
        return any(not wait.over for wait in self.waits.values())

    def is_over(self, request_id: str) -> bool:
        wait = self.waits.get(request_id)
        return wait is not None and wait.over

    def forget(self, request_id: str) -> None:
        self.waits.pop(request_id, None)
