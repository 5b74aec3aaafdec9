"""Readers who await keys that others are still writing."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from kvpool.core.ids import SessionId, WaitId


class WaitState(IntEnum):
    """What became of an awaited key; numbers as on the wire. All but SECTION are final."""

    COMMITTED = 1
    ABANDONED = 2
    DEADLINE = 3
    SECTION = 4


@dataclass(slots=True)
class Wakeup:
    """News for one wait: `indices[i]` (into its keys) is in `states[i]`, with `sections[i]` where that is SECTION."""

    wait: WaitId
    indices: list[int] = field(default_factory=list)
    states: list[int] = field(default_factory=list)
    sections: list[int] = field(default_factory=list)
    done: bool = False


@dataclass(slots=True)
class _Wait:
    session: SessionId
    pending: dict[int, bytes]  # index -> key


class Waits:
    """Who waits for which key. Each wait ends by its deadline."""

    def __init__(self) -> None:
        self._waits: dict[WaitId, _Wait] = {}
        self._by_key: dict[bytes, dict[tuple[WaitId, int], None]] = {}
        self._news: dict[WaitId, Wakeup] = {}
        self._next = 1
        self.awaited_keys = 0

    def __len__(self) -> int:
        return len(self._waits)

    def add(self, session: SessionId) -> WaitId:
        wait = WaitId(self._next)
        self._next += 1
        self._waits[wait] = _Wait(session, {})
        return wait

    def await_key(self, wait: WaitId, index: int, key: bytes) -> None:
        self._waits[wait].pending[index] = key
        self.awaited_keys += 1
        self._by_key.setdefault(key, {})[(wait, index)] = None

    def tell(self, wait: WaitId, index: int, state: WaitState, section: int = 0) -> None:
        """Notes news for one index of one wait."""
        news = self._news.setdefault(wait, Wakeup(wait))
        news.indices.append(index)
        news.states.append(int(state))
        news.sections.append(section)

    def close_if_complete(self, wait: WaitId) -> None:
        """Ends a wait that waits for nothing (more)."""
        found = self._waits.get(wait)
        if found is not None and not found.pending:
            self._news.setdefault(wait, Wakeup(wait)).done = True
            del self._waits[wait]

    def key_changed(self, key: bytes, state: WaitState, section: int = 0) -> None:
        """Tells everybody who waits for `key`."""
        waiting = self._by_key.get(key)
        if not waiting:
            return
        for wait, index in list(waiting):
            self.tell(wait, index, state, section)
            if state is not WaitState.SECTION:
                self._drop(wait, index, key)
                self.close_if_complete(wait)

    def awaited(self, key: bytes) -> bool:
        return key in self._by_key

    def cancel(self, wait: WaitId) -> None:
        """Forgets a wait; nothing more is told to it."""
        found = self._waits.pop(wait, None)
        self._news.pop(wait, None)
        if found is not None:
            for index, key in found.pending.items():
                self._forget(wait, index, key)

    def of_session(self, session: SessionId) -> list[WaitId]:
        return [w for w, found in self._waits.items() if found.session == session]

    def expire(self, wait: WaitId) -> None:
        """Ends a wait whose deadline has come, if it has not ended."""
        found = self._waits.get(wait)
        if found is None:
            return
        for index, key in list(found.pending.items()):
            self.tell(wait, index, WaitState.DEADLINE)
            self._drop(wait, index, key)
        self.close_if_complete(wait)

    def take(self) -> list[Wakeup]:
        news, self._news = list(self._news.values()), {}
        return news

    def check_invariants(self) -> None:
        listed = {(w, i, k) for k, waiting in self._by_key.items() for w, i in waiting}
        pending = {(w, i, k) for w, found in self._waits.items() for i, k in found.pending.items()}
        assert listed == pending
        assert self.awaited_keys == len(pending)
        assert all(found.pending for found in self._waits.values())
        assert all(self._by_key.values())

    def _drop(self, wait: WaitId, index: int, key: bytes) -> None:
        del self._waits[wait].pending[index]
        self._forget(wait, index, key)

    def _forget(self, wait: WaitId, index: int, key: bytes) -> None:
        waiting = self._by_key[key]
        del waiting[(wait, index)]
        self.awaited_keys -= 1
        if not waiting:
            del self._by_key[key]
