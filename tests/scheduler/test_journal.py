"""The journal: what is recorded replays to the same decisions, from each file alone."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import scheduler_events as made
from hypothesis import given
from hypothesis import strategies as st

from kvpool.core.errors import BadArgument
from kvpool.core.ids import Role, Tier
from scheduler.core import events
from scheduler.core.commands import Placed, Refused
from scheduler.core.config import SchedulerConfig
from scheduler.core.core import SchedulerCore
from scheduler.replay.exact import replay_file
from scheduler.service import codec, journal
from scheduler.service.journal import Journal
from scheduler.service.shell import Shell

PROMPTS = ("a0..a31", "b0..b31", "c0..c31", "a0..a7,b0..b7")


class Clock:
    def __init__(self) -> None:
        self.us = 1_000_000

    def __call__(self) -> int:
        return self.us


class Line:
    """A life line that keeps what was said on it."""

    def __init__(self) -> None:
        self.said: list[tuple[int, bool]] = []
        self.closed = ""

    def acknowledge(self, seq: int, want_snapshot: bool) -> None:
        self.said.append((seq, want_snapshot))

    def close(self, reason: str) -> None:
        self.closed = reason


def traffic(seed: int, requests: int) -> Iterator[tuple[int, events.Event]]:
    """(Time to pass before it, event): sources, instances, and requests that come and go. Streams count from 1."""
    rng = random.Random(seed)
    yield 0, made.attached(1, "node-0")
    yield 0, made.snapshot(1, 0, "a0..a31")
    for number, role in enumerate((Role.PREFILL, Role.DECODE, Role.DECODE)):
        yield 0, made.joined(2 + number, f"w{number}", role=role)
        yield 0, made.attached(5 + number, f"w{number}-hbm", tier=Tier.HBM, address="")
        yield 0, made.snapshot(5 + number, 0, f"b0..b{number}")
    yield 0, events.GatewayOpened(8, "gw")
    seqs = dict.fromkeys((1, 5, 6, 7), 0)
    live: list[str] = []
    for number in range(requests):
        stream = rng.choice(list(seqs))
        seqs[stream] += 1
        yield rng.randrange(30_000), made.stored(stream, seqs[stream], f"{rng.choice('abc')}{rng.randrange(40)}")
        # Those that come back no more would fill the line: most are placed now or never.
        patience_us = None if rng.random() < 0.1 else 0
        prompt_tokens = rng.randrange(64, 2000)
        yield (
            0,
            made.place(f"r{number}", blocks=rng.choice(PROMPTS), prompt_tokens=prompt_tokens, wait_us_max=patience_us),
        )
        live.append(f"r{number}")
        for member in range(2, 5):
            sample = events.PrefillSample(rng.randrange(1, 2000), 0, rng.randrange(1000, 300_000))
            link = events.LinkSample("node-0", rng.randrange(1, 1 << 24), rng.randrange(1, 50_000), False, 1)
            yield 0, made.reported(member, prefill=(sample,), links=(link,), finished_prefills=tuple(live[:1]))
        yield 0, events.GatewayHeartbeat(8, len(live))
        for source in seqs:
            yield 0, events.SourceHeartbeat(source, 1, 1)
        if rng.random() < 0.8:
            yield rng.randrange(30_000), made.outcome(8, live.pop(rng.randrange(len(live))), tokens=rng.randrange(100))


async def drive(shell: Shell, clock: Clock, seed: int, requests: int) -> list[Placed | Refused]:
    lines = [Line() for _ in range(8)]
    assert [shell.open_stream(line) for line in lines] == list(range(1, 9))
    shell.start()
    decisions: list[Placed | Refused] = []
    for wait_us, event in traffic(seed, requests):
        clock.us += wait_us
        decisions += [c for c in shell.submit(event) if isinstance(c, Placed | Refused)]
    await shell.stop()
    return decisions


def record(folder: Path, *, requests: int = 60, bytes_max: int = 1 << 26) -> tuple[Shell, list[Placed | Refused]]:
    clock = Clock()
    shell = Shell(SchedulerCore(SchedulerConfig()), Journal(folder, bytes_max), clock_us=clock)
    return shell, asyncio.run(drive(shell, clock, 7, requests))


def test_replay_decides_as_recorded(tmp_path: Path) -> None:
    shell, decisions = record(tmp_path)
    assert sum(isinstance(d, Placed) for d in decisions) > 20
    assert any(isinstance(d, Placed) and d.split for d in decisions)
    (path,) = journal.files(tmp_path)
    replay = replay_file(path)
    assert replay.identical and not replay.torn
    assert list(replay.decisions) == decisions
    assert replay.core.book == shell.core.book and replay.core.costs == shell.core.costs


def test_each_file_replays_alone_and_all_stay_small(tmp_path: Path) -> None:
    bytes_max = 900_000
    shell, decisions = record(tmp_path, requests=500, bytes_max=bytes_max)
    paths = journal.files(tmp_path)
    assert len(paths) >= 2 and "000001" not in paths[0].name, "nothing was rotated away"
    assert sum(path.stat().st_size for path in paths) <= bytes_max * 5 // 4
    assert shell.journal is not None and shell.journal.path == str(paths[-1])
    kept: list[Placed | Refused] = []
    for path in paths:
        replay = replay_file(path)
        assert replay.identical and replay.events > 0
        kept += replay.decisions
    assert kept == decisions[-len(kept) :]


def test_a_recorder_without_a_journal_decides_the_same(tmp_path: Path) -> None:
    _, with_rotation = record(tmp_path, requests=120, bytes_max=400_000)
    clock = Clock()
    plain = asyncio.run(drive(Shell(SchedulerCore(SchedulerConfig()), clock_us=clock), clock, 7, 120))
    assert plain == with_rotation


def test_a_source_half_through_a_snapshot_is_sent_away_for_a_checkpoint(tmp_path: Path) -> None:
    async def run() -> None:
        clock = Clock()
        shell = Shell(SchedulerCore(SchedulerConfig()), Journal(tmp_path, 40_000), clock_us=clock)
        shell.start()
        line = Line()
        shell.submit(made.attached(shell.open_stream(line), "node-0"))
        while not line.closed:
            shell.submit(events.SourceHeartbeat(1, 1, 1))
        assert "checkpoint" in line.closed and not shell.core.cluster.sources
        await shell.stop()

    asyncio.run(run())
    paths = journal.files(tmp_path)
    assert paths[-1].name == "scheduler-000002.jsonl" and all(replay_file(path).identical for path in paths)


def test_a_torn_line_ends_the_replay(tmp_path: Path) -> None:
    record(tmp_path)
    (path,) = journal.files(tmp_path)
    whole = replay_file(path)
    path.write_bytes(path.read_bytes()[:-10])
    replay = replay_file(path)
    assert replay.torn and replay.identical and replay.events in (whole.events, whole.events - 1)


def test_other_decisions_are_found(tmp_path: Path) -> None:
    record(tmp_path)
    (path,) = journal.files(tmp_path)
    lines = path.read_text().splitlines(keepends=True)
    at = next(n for n, line in enumerate(lines) if '"Placed"' in line)
    lines[at] = lines[at].replace('"cached_tokens":', '"cached_tokens":1')
    path.write_text("".join(lines))
    replay = replay_file(path)
    assert [difference.line for difference in replay.differences] == [at]  # of the event


@pytest.mark.parametrize("text", ["", "{}\n", "nonsense\n", '{"journal":99}\n'])
def test_what_is_no_journal_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "scheduler-000001.jsonl"
    path.write_text(text)
    with pytest.raises(BadArgument):
        replay_file(path)


def test_a_full_disk_ends_the_journal_and_not_the_scheduler(tmp_path: Path) -> None:
    folder = tmp_path / "file"
    folder.write_text("not a folder")
    shell, decisions = record(folder)
    assert shell.journal is not None and shell.journal.error and not shell.journal.path
    assert len(decisions) + len(shell.core.room.entries) == 60


def test_lines_can_be_searched(tmp_path: Path) -> None:
    record(tmp_path, requests=3)
    (path,) = journal.files(tmp_path)
    (line,) = [line for line in path.read_text().splitlines() if '"PlaceRequested","request_id":"r1"' in line]
    assert json.loads(line)["event"]["gateway_id"] == "gw"


PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(
    PLAIN | st.binary() | st.sampled_from(Tier),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.tuples(st.text(), st.integers()), inner)
        | st.builds(events.KeyBatch, st.integers(), st.integers(), st.binary())
    ),
    max_leaves=20,
)


@given(VALUES)
def test_codec_is_exact(value: object) -> None:
    back = codec.loads(codec.dumps(value))
    assert back == value and repr(back) == repr(value)


@pytest.mark.parametrize("text", ['{"$":"Path"}', '{"a":1}', '{"$bytes":"?"}', "{", '{"$enum":"Tier","name":"X"}'])
def test_codec_reads_nothing_else(text: str) -> None:
    with pytest.raises(BadArgument):
        codec.loads(text)
