"""A real journal read as a trace: the requests as they came, with what they were seen to generate."""

from __future__ import annotations

from pathlib import Path

import scheduler_events as made

from kvpool.core.ids import Tier
from scheduler.core import events
from scheduler.core.config import SchedulerConfig
from scheduler.core.core import SchedulerCore
from scheduler.service.journal import Journal
from scheduler.simulator.traces import read_trace


def test_a_journal_is_a_trace(tmp_path: Path) -> None:
    core = SchedulerCore(SchedulerConfig())
    journal = Journal(tmp_path, 1 << 24)
    core.handle(made.attached(1), 0)
    core.handle(made.snapshot(1, 0, "a0..a3"), 0)
    core.handle(made.joined(2, kv_tokens_total=1 << 20), 0)
    journal.begin(core)  # the instance is in the checkpoint
    happened: list[tuple[int, events.Event]] = [
        (1_000, events.GatewayOpened(3, "gw")),
        (2_000, made.attached(4, "w0-hbm", tier=Tier.HBM)),
        (10_000, made.place("r0", blocks="a0..a14", prompt_tokens=1000, max_tokens=64, sticky_key="chat")),
        (20_000, made.place("r1", blocks="a0..a7,b8..b9", prompt_tokens=650, max_tokens=64)),
        (500_000, made.outcome(3, "r0", first_token=True, tokens=1)),
        (900_000, made.outcome(3, "r0", tokens=41)),
        (950_000, made.outcome(3, "r1", tokens=13)),
        (960_000, made.place("r2", prompt_tokens=70, max_tokens=20)),
    ]
    for at_us, event in happened:
        journal.event(event, at_us)
        journal.commands(core.handle(event, at_us))
    journal.close()
    trace = read_trace(journal.path)
    assert (trace.kind, trace.block_tokens, trace.bad_lines) == ("journal", made.BLOCK_TOKENS, 0)
    assert [(r.arrival_us, r.prompt_tokens, r.output_tokens, r.session) for r in trace] == [
        (0, 1000, 41, "chat"),
        (10_000, 650, 13, ""),
        (950_000, 70, 20, ""),
    ]
    assert trace[0].hash_ids == tuple(range(15))
    assert trace[1].hash_ids == (*range(8), 15, 16)
    assert len(trace[2].hash_ids) == 1  # of a key list that is empty, blocks of its own
    assert "1 of 3 requests were not seen ending" in trace.notes[0]
