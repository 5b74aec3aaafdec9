"""In which order an engine's numbered messages are taken, what is asked for again, and when all is forgotten. Pure.

Messages are numbered from 0. A subscriber that comes late, or misses some, asks the engine to send again from a number
on; the engine keeps a bounded number of them. What can't be had any more leaves the set of blocks unknown: it is
forgotten, and begins anew with what comes.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TypeAlias

from engines.openai_server.kv_events import Message

#: Messages that wait for the end of a replay; beyond it the oldest go, and are missing then.
WAITING_MAX = 10_000


@dataclass(frozen=True, slots=True)
class Take:
    """Apply a message."""

    message: Message


@dataclass(frozen=True, slots=True)
class Forget:
    """What was known before is void."""


@dataclass(frozen=True, slots=True)
class AskFrom:
    """Have the engine send its messages again, from this number on."""

    number: int


Action: TypeAlias = Take | Forget | AskFrom


class EventOrder:
    """Say what arrives; do what it answers, in order.

    A new process of the engine is known by its first message. Where just that is lost, its numbers can look like a
    continuation: whoever sees by other means that the process is new begins with a new order.

    Args:
        replays: whether the engine can be asked to send again.
    """

    def __init__(self, *, replays: bool) -> None:
        self._replays = replays
        self._expected = 0
        self._last_s = float("-inf")
        self._asked = False
        self._asked_from = 0
        self._restarted = False
        self._waiting: deque[tuple[int, Message]] = deque(maxlen=WAITING_MAX)
        self.gaps = 0

    @property
    def replaying(self) -> bool:
        return self._asked

    def start(self) -> list[Action]:
        """Just subscribed: whatever was before is asked for."""
        return self._ask(0)

    def live(self, number: int, message: Message) -> list[Action]:
        """A message as it was published."""
        if self._asked:
            if self._waiting and number <= self._waiting[-1][0] and message.time_s > self._waiting[-1][1].time_s:
                # Another process: nobody knows which of the two answers what was asked.
                self._waiting.clear()
                self._restarted = True
            self._waiting.append((number, message))
            return []
        if number < self._expected:
            if message.time_s <= self._last_s:
                return []  # came with a replay already
            # Numbers that begin again are those of another process.
            self._expected = 0
            actions: list[Action] = [Forget()]
            return actions + (self.live(number, message) if number == 0 else self._missing(number, message))
        if number > self._expected:
            return self._missing(number, message)
        return [self._take(number, message)]

    def replayed(self, number: int, message: Message) -> list[Action]:
        """A message that was asked for."""
        if not self._asked or number < self._expected:
            return []
        return [*self._lost_until(number), self._take(number, message)]

    def replay_ended(self) -> list[Action]:
        """All has come that was asked for, or nothing more will."""
        if not self._asked:
            return []
        self._asked = False
        if self._restarted:
            self._restarted, self._expected, self._last_s = False, 0, float("-inf")
            return [Forget(), *self._ask(0)]
        actions: list[Action] = []
        while self._waiting:
            number, message = self._waiting.popleft()
            if message.time_s < self._last_s:
                continue  # came with the replay, or is of a process before the one that replayed
            if number < self._expected and message.time_s > self._last_s:
                self._expected = 0
                actions.append(Forget())
            if number > self._expected > self._asked_from:
                self.gaps += 1
                # Lost meanwhile. Asking once more for what has just been asked for would not help.
                self._waiting.appendleft((number, message))
                return [*actions, *self._ask(self._expected)]
            if number >= self._expected:
                actions += [*self._lost_until(number), self._take(number, message)]
        return actions

    def check_invariants(self) -> None:
        assert self._expected >= 0
        assert self._asked or not self._waiting
        assert self._replays or not self._asked

    def _missing(self, number: int, message: Message) -> list[Action]:
        self.gaps += 1
        if not self._replays:
            return [*self._lost_until(number), self._take(number, message)]
        self._waiting.append((number, message))
        return self._ask(self._expected)

    def _ask(self, number: int) -> list[Action]:
        if not self._replays:
            return []
        self._asked, self._asked_from = True, number
        return [AskFrom(number)]

    def _lost_until(self, number: int) -> list[Action]:
        """Removals may be among what is lost: what was known is not to be trusted."""
        return [Forget()] if number > self._expected else []

    def _take(self, number: int, message: Message) -> Action:
        self._expected = number + 1
        self._last_s = max(self._last_s, message.time_s)
        return Take(message)
