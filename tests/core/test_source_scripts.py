"""Golden scripts for SourceCore: commands, dashes, the expected answers. KVPOOL_REWRITE=1 writes them anew.

Keys are numbers; `1-3,7` are four of them; objects are named. Times are seconds and start at 0; sizes are pages of
4 KiB. Behind an answer stand the changes and the news for waiting readers that the command caused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from kvpool.core.arrays import SourceArrays
from kvpool.core.catalog import Catalog
from kvpool.core.errors import KvpoolError
from kvpool.core.hashing import object_key
from kvpool.core.holds import Hold
from kvpool.core.ids import KeyArray, NamespaceId, ReservationId, SessionId
from kvpool.core.namespace import GroupKind, GroupSpec, NamespaceSpec
from kvpool.core.results import ReserveStatus, SourceConfig
from kvpool.core.source import SourceCore
from kvpool.core.waits import WaitState

SCRIPTS = sorted((Path(__file__).parent / "testdata").glob("source*.txt"))
PAGE = 4096
SECOND = 1_000_000


def numbers(text: str) -> list[int]:
    result: list[int] = []
    for piece in filter(None, text.split(",")):
        first, _, last = piece.partition("-")
        result += range(int(first), int(last or first) + 1)
    return result


def packed(text: str) -> KeyArray:
    return np.frombuffer(b"".join(n.to_bytes(16, "big") for n in numbers(text)), dtype=np.uint8).reshape(-1, 16)


def shown(values: list[int]) -> str:
    """The inverse of `numbers`, in the order given."""
    breaks = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(values)) if b != a + 1), len(values)]
    pieces = [values[a:b] for a, b in pairwise(breaks) if a < b]
    return ",".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in pieces) or "none"


def options(words: tuple[str, ...]) -> dict[str, str]:
    return dict(word.split("=", 1) if "=" in word else (word, "") for word in words)


class Runner:
    def __init__(self) -> None:
        self.now_us = 0
        self.sessions: dict[str, SessionId] = {}
        self.names: dict[bytes, str] = {}

    def run(self, line: str) -> list[str]:
        name, *words = line.split()
        try:
            answer = getattr(self, name)(*words)
        except KvpoolError as error:
            answer = f"{type(error).__name__}: {error}"
        self.core.check_invariants()
        return [answer, *(f"  {text}" for text in self.effects())]

    def effects(self) -> Iterator[str]:
        for change in self.core.take_changes():
            yield f"{change.kind.name.lower()} {self.keys_shown(change.keys)}"
        for wakeup in self.core.take_wakeups():
            news = [
                f"{index} {WaitState(state).name.lower()}{f' {section}' if state == WaitState.SECTION else ''}"
                for index, state, section in zip(wakeup.indices, wakeup.states, wakeup.sections, strict=True)
            ]
            yield f"wait {wakeup.wait}: {', '.join(news) or 'nothing'}{'; done' if wakeup.done else ''}"

    def source(self, *words: str) -> str:
        given = options(words)
        bounds = {k: int(v) for k, v in given.items() if k.endswith("_max")}
        self.config = SourceConfig(
            capacity_bytes=int(given["pages"]) * PAGE,
            eviction=given.get("eviction", "lru"),
            unit_bytes=int(given.get("unit", 1)) * PAGE,
            high_watermark=float(given.get("high", 1)),
            low_watermark=float(given.get("low", 1)),
            **{"entries_max": 16, **bounds},
        )
        entries = self.config.entries_max
        self.data = np.zeros(self.config.capacity_bytes, dtype=np.uint8)
        buffer = np.zeros(SourceArrays.bytes_needed(entries), dtype=np.uint8)
        self.core = SourceCore(self.config, SourceArrays.over(buffer, entries, fresh=True), self.data)
        sections = int(given.get("sections", 1))
        groups = tuple(
            GroupSpec(i, GroupKind.FULL, tuple(range(sections)), 16, 1, sections, size * PAGE)
            for i, size in enumerate(numbers(given.get("sizes", "1")))
        )
        self.sections = sections
        self.namespace = self.core.register_namespace(
            NamespaceSpec("m", "", "float32", "t", "lkthd", "sha256/1", groups)
        )
        self.objects = self.core.register_namespace(NamespaceSpec.objects("things"))
        return "ok"

    def keys_shown(self, keys: bytes) -> str:
        packed_keys = [keys[i : i + 16] for i in range(0, len(keys), 16)]
        named = [self.names[key] for key in packed_keys if key in self.names]
        numbered = [int.from_bytes(key, "big") for key in packed_keys if key not in self.names]
        return ",".join(filter(None, [shown(numbered) if numbered else "", *named]))

    def at(self, seconds: str) -> str:
        """Time goes on and the shell's timer fires."""
        self.now_us = int(float(seconds) * SECOND)
        self.core.tick(self.now_us)
        return "ok"

    def late(self, seconds: str) -> str:
        """Time goes on, but the timer has not fired yet."""
        self.now_us = int(float(seconds) * SECOND)
        return "ok"

    def deadline(self) -> str:
        deadline = self.core.next_deadline_us()
        return "none" if deadline is None else f"at {deadline / SECOND:g}"

    def open(self, name: str) -> str:
        self.sessions[name] = self.core.open_session(name, self.now_us)
        return "ok"

    def close(self, name: str, *words: str) -> str:
        self.core.close_session(self.sessions[name], self.now_us, writer_gone="gone" in words)
        return "ok"

    def gone(self, name: str) -> str:
        return f"{self.core.writer_gone(self.sessions[name], self.now_us)} slots freed"

    def reserve(self, name: str, keys: str, *words: str) -> str:
        given = options(words)
        request, _, ttl = given.get("hold", "").partition("/")
        reserved = self.core.reserve(
            self.sessions[name],
            self.namespace,
            self.core.group(self.namespace, int(given.get("group", 0)), 0),
            packed(keys),
            int(float(given.get("ttl", 10)) * SECOND),
            self.now_us,
            hold=Hold(request, int(float(ttl) * SECOND)) if request else None,
            tenant=given.get("tenant", ""),
        )
        statuses = " ".join(ReserveStatus(s).name for s in reserved.status.tolist())
        mask = reserved.status == ReserveStatus.RESERVED
        pages = [int(offset) // PAGE for offset in reserved.slots.offsets[mask]]
        return f"reservation {reserved.reservation}: {statuses}; pages {shown(pages)}"

    def commit(self, name: str, reservation: str, indices: str, *words: str) -> str:
        """`section=1` commits one section of each, else all; `digest=7` instead of the index."""
        given = options(words)
        sections = numbers(given["section"]) if "section" in given else list(range(self.sections))
        items = [(i, s, int(given.get("digest", i))) for i in numbers(indices) for s in sections]
        columns = list(zip(*items, strict=True))
        done = self.core.commit(
            self.sessions[name],
            ReservationId(int(reservation)),
            np.array(columns[0], dtype=np.uint32),
            np.array(columns[1], dtype=np.uint32),
            np.array(columns[2], dtype=np.uint64),
            self.now_us,
        )
        return f"{done} complete"

    def publish(self, name: str, keys: str, *words: str) -> str:
        """Reserve and commit, as one good writer does."""
        answer = self.reserve(name, keys, *words)
        number, statuses = answer.removeprefix("reservation ").split(";")[0].split(":")
        rows = [str(i) for i, status in enumerate(statuses.split()) if status == "RESERVED"]
        if rows:
            self.commit(name, number, ",".join(rows))
        return answer

    def put(self, name: str, objects: str, *words: str) -> str:
        """Reserves and commits objects: `cat/5000,dog/1` names them and their bytes; `open` leaves them uncommitted."""
        given = options(words)
        pairs = [text.split("/") for text in objects.split(",")]
        keys = [object_key(self.objects, text) for text, _ in pairs]
        self.names.update(zip(keys, (text for text, _ in pairs), strict=True))
        reserved = self.core.reserve(
            self.sessions[name], self.objects, None, np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, 16),
            int(float(given.get("ttl", 10)) * SECOND), self.now_us, tenant=given.get("tenant", ""),
            sizes=np.array([int(size) for _, size in pairs], np.uint64), names=[text.encode() for text, _ in pairs],
        )  # fmt: skip
        rows = np.flatnonzero(reserved.status == ReserveStatus.RESERVED)
        pages = shown([int(offset) // PAGE for offset in reserved.slots.offsets[rows]])
        if len(rows) and "open" not in given:
            zeros = np.zeros(len(rows), np.uint32)
            self.core.commit(
                self.sessions[name], reserved.reservation, rows.astype(np.uint32), zeros, zeros.astype(np.uint64),
                self.now_us,
            )  # fmt: skip
        return f"{' '.join(ReserveStatus(s).name for s in reserved.status.tolist())}; pages {pages}"

    def quota(self, holder: str, pages: str) -> str:
        """Of the namespace `blocks` or `objects`, or of a tenant."""
        namespace = {"blocks": self.namespace, "objects": self.objects}.get(holder, b"")
        self.core.set_quota(int(pages) * PAGE, namespace_id=namespace, tenant="" if namespace else holder)
        return "ok"

    def quotas(self) -> str:
        names = {self.namespace: "blocks", self.objects: "objects"}
        lines = [
            f"{q.tenant or names[NamespaceId(q.namespace_id)]}: {q.bytes_used / PAGE:g} of {q.bytes_max / PAGE:g} pages"
            for q in self.core.quotas()
        ]
        return "\n".join(lines) or "none"

    def read(self, keys: str) -> str:
        """As a reader of the shared memory does, without a call."""
        self.core.arrays.touches[self.core.index.lookup(packed(keys))] = 1
        return "ok"

    def evict(self, pages: str) -> str:
        blocks, size = self.core.evict_bytes(int(pages) * PAGE, self.now_us)
        return f"{blocks} evicted, {size / PAGE:g} pages"

    def below(self, keys: str, *words: str) -> str:
        """A lower tier has copies; with `lost`, no longer."""
        self.core.mark_lower(packed(keys), "lost" not in words)
        return "ok"

    def cold(self, count: str) -> str:
        return self.keys_shown(self.core.demotion_candidates(1 << 40, int(count)).keys.tobytes()) or "none"

    def takeover(self) -> str:
        """The process is killed; another one takes its memory over. Sessions, and what they held, are gone."""
        catalog = Catalog.from_bytes(self.core.catalog().to_bytes())
        self.core = SourceCore.adopt(self.config, self.core.arrays, self.data, catalog)
        self.sessions.clear()
        return f"{self.core.adopted} adopted"

    def inherited(self) -> str:
        """The writers of the process before are gone."""
        return f"{self.core.release_inherited(self.now_us)} slots freed"

    def drop(self, prefix: str) -> str:
        return f"{self.core.remove_prefix(self.objects, prefix.encode(), self.now_us)} removed"

    def abort(self, name: str, reservation: str) -> str:
        return f"{self.core.abort(self.sessions[name], ReservationId(int(reservation)), self.now_us)} dropped"

    def writable(self, reservation: str) -> str:
        return f"pages {shown([int(o) // PAGE for o in self.core.writable_extents(int(reservation)).offsets])}"

    def lease(self, name: str, keys: str, *words: str) -> str:
        given = options(words)
        leased = self.core.lease(
            self.sessions[name], self.namespace, packed(keys), int(float(given.get("ttl", 10)) * SECOND), self.now_us,
            handoff=given.get("handoff", ""),
        )  # fmt: skip
        hits = [n for n, found in zip(numbers(keys), leased.found.tolist(), strict=True) if found]
        return f"lease {leased.lease}: {shown(hits)}"

    def release(self, name: str, *leases: str) -> str:
        self.core.release(self.sessions[name], [int(n) for n in leases], self.now_us)
        return "ok"

    def pin(self, name: str, keys: str, *words: str) -> str:
        given = options(words)
        ttl = int(float(given.get("ttl", 0)) * SECOND)
        pinned = self.core.pin(
            self.sessions[name], self.namespace, packed(keys), ttl, self.now_us, owner=given.get("owner", "")
        )
        hits = [n for n, found in zip(numbers(keys), pinned.found.tolist(), strict=True) if found]
        return f"pin {pinned.pin}: {shown(hits)}"

    def unpin(self, name: str, pin: str) -> str:
        self.core.unpin(self.sessions[name], int(pin), self.now_us)
        return "ok"

    def unpin_owner(self, owner: str) -> str:
        return f"{self.core.unpin(SessionId(0), 0, self.now_us, owner=owner)} released"

    def pins(self) -> str:
        lines = [
            f"{r.kind} {r.owner or r.session}: {r.blocks} blocks"
            + (f" until {r.expires_us / SECOND:g}" if r.expires_us else "")
            for r in self.core.pins()
        ]
        return "\n".join(lines) or "none"

    def wait(self, name: str, keys: str, *words: str) -> str:
        given = options(words)
        deadline = int(float(given.get("until", 60)) * SECOND)
        wait = self.core.wait(
            self.sessions[name], self.namespace, packed(keys), deadline, self.now_us,
            absent_is_abandoned="impatient" in given,
        )  # fmt: skip
        return f"wait {wait}"

    def remove(self, keys: str) -> str:
        return f"{self.core.remove(self.namespace, packed(keys), self.now_us)} removed"

    def blocks(self, limit: str = "100") -> str:
        cursor, lines = 0, []
        while True:
            page, cursor = self.core.list_blocks(cursor, int(limit))
            for b in page:
                text = f"{self.keys_shown(b.key)} {b.state} at page {b.offset // PAGE}"
                lines.append(text + f" leases {b.leases}" * bool(b.leases) + f" pins {b.pins}" * bool(b.pins))
            if not cursor:
                return "\n".join(lines) or "none"

    def counts(self) -> str:
        counts = self.core.counts()
        names = ("blocks", "blocks_writing", "sessions", "leases", "pins", "reservations", "quarantined", "waiters")
        parts = [f"{name} {getattr(counts, name)}" for name in names if getattr(counts, name)]
        return ", ".join([f"{counts.bytes_used // PAGE} of {counts.bytes_total // PAGE} pages", *parts])


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_script(path: Path) -> None:
    runner, written = Runner(), []
    for step in path.read_text().strip().split("\n\n"):
        commands, _, _ = step.partition("\n----")
        answers = [text for line in commands.splitlines() if line[:1] != "#" for text in runner.run(line)]
        written.append("\n".join([commands, "----", *answers]) if answers else commands)
    text = "\n\n".join(written) + "\n"
    if os.environ.get("KVPOOL_REWRITE"):
        path.write_text(text)
    assert text == path.read_text()


def test_there_are_scripts() -> None:
    assert len(SCRIPTS) >= 5
