"""Reading traces: every format, every kind of bad line, and what a trace keeps."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.core.errors import BadArgument
from scheduler.simulator.columns import TraceBuilder
from scheduler.simulator.traces import TraceRequest, read_trace, write_trace


def mooncake(timestamp: Any = 0, prompt: Any = 1000, output: Any = 10, ids: Any = (0, 1)) -> str:
    data = {"timestamp": timestamp, "input_length": prompt, "output_length": output, "hash_ids": ids}
    return json.dumps(data)


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_mooncake(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", mooncake(5), mooncake(1500.5, 512, 3, [0]), "", mooncake(7, 513, 1, [0, 2]))
    trace = read_trace(path)
    # In order of arrival, from the first one on.
    assert list(trace) == [
        TraceRequest(0, 1000, 10, (0, 1), 512),
        TraceRequest(2000, 513, 1, (0, 2), 512),
        TraceRequest(1_495_500, 512, 3, (0,), 512),
    ]
    assert (trace.kind, trace.bad_lines, trace.duration_us) == ("mooncake", 0, 1_495_500)


@pytest.mark.parametrize("name", ["t.jsonl.gz", "t.jsonl"])
def test_what_is_compressed_the_file_tells(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress((mooncake() + "\n").encode()))
    assert len(read_trace(path)) == 1


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        (mooncake(-1), "timestamp is -1"),
        (mooncake("now"), "timestamp is 'now'"),
        (mooncake(float("nan")), "timestamp is nan"),
        (mooncake(1e30), "timestamp is 1e+30"),
        (mooncake(10**400), "timestamp is 1000"),
        (mooncake(float("inf")), "timestamp is inf"),
        (mooncake(prompt=10**400), "input_length is 1000"),
        ('{"timestamp": ' + "[" * 100_000, "not JSON"),
        (mooncake(prompt=0), "input_length is 0"),
        (mooncake(prompt=True), "input_length is True"),
        (mooncake(prompt=1 << 40), "input_length is"),
        (mooncake(output=1.5), "output_length is 1.5"),
        (mooncake(ids=[0]).replace('"hash_ids"', '"ids"'), "'hash_ids' is missing"),
        (mooncake(ids=[0, 1, 2]), "3 hash_ids for 1000 tokens: 2 are needed"),
        (mooncake(ids=[]), "0 hash_ids"),
        (mooncake(ids="01"), "hash_ids is '01'"),
        (mooncake(ids=[0, "a"]), "no 64-bit whole number"),
        (mooncake(ids=[0, 1 << 70]), "no 64-bit whole number"),
        (mooncake(ids=[0, 0.5]), "no 64-bit whole number"),
    ],
)
def test_bad_lines_are_named_or_counted(tmp_path: Path, line: str, problem: str) -> None:
    path = write(tmp_path / "t.jsonl", mooncake(), line, mooncake(9, ids=[0, 3]))
    with pytest.raises(BadArgument, match=r"t\.jsonl:2: ") as caught:
        read_trace(path)
    assert problem in str(caught.value)
    assert "--skip-bad" in caught.value.hint
    trace = read_trace(path, skip_bad=True)
    assert [r.hash_ids for r in trace] == [(0, 1), (0, 3)]
    assert trace.bad_lines == 1
    assert trace.bad_examples[0].line == 2
    assert problem in trace.bad_examples[0].problem


def test_a_bad_first_line_is_one_like_others(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", "oops", mooncake())
    with pytest.raises(BadArgument, match=r"t\.jsonl:1: not JSON"):
        read_trace(path)
    assert read_trace(path, skip_bad=True).bad_lines == 1


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"hello\n", "not a trace"),
        (b"\xff\xfe\x00\x01\n", "not text"),
        (b"\x1f\x8b broken", "can't be read"),
        (gzip.compress(mooncake().encode() * 99)[:40], "can't be read"),
        (b'{"kvpool_trace":2,"block_tokens":512}\n', "format 1 is what is known"),
        (b'{"kvpool_trace":1,"block_tokens":0}\n', "block_tokens is 0"),
        (b'{"kvpool_trace":1,"block_tokens":16}\n', "has no requests"),
        (b'{"journal":7}\n', "format 7"),
        (b"TIMESTAMP,ContextTokens\n", "are needed"),
        (b'{"timestamp": 0}\n', "'input_length' is missing"),
    ],
)
def test_files_that_are_no_traces(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(BadArgument, match=problem):
        read_trace(tmp_path / "t")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadArgument, match="can't be read"):
        read_trace(tmp_path / "missing")
    with pytest.raises(BadArgument, match="can't be read"):
        read_trace(tmp_path)


def test_azure(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.csv",
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        "2023-11-16 18:17:03.9799600,4808,10",
        "2023-11-16 18:17:04.0319600,512,8",
        "2024-05-10 00:00:00.009930+00:00,1,2",
    )
    trace = read_trace(path)
    assert [r.hash_ids for r in trace] == [tuple(range(10)), (10,), (11,)]
    assert [r.arrival_us for r in trace][:2] == [0, 52_000]
    assert "no two requests share" in trace.notes[0]
    bad = write(tmp_path / "bad.csv", "TIMESTAMP,ContextTokens,GeneratedTokens", "yesterday,1,1", "2023-11-16,x,1", "1")
    with pytest.raises(BadArgument, match=r"bad\.csv:2: TIMESTAMP is 'yesterday'"):
        read_trace(bad)
    with pytest.raises(BadArgument, match="all 3 lines are bad"):
        read_trace(bad, skip_bad=True)
    wide = write(tmp_path / "wide.csv", "TIMESTAMP,ContextTokens,GeneratedTokens", "9" * 200_000)
    with pytest.raises(BadArgument, match=r"wide\.csv:2: not CSV"):
        read_trace(wide)


def journal_line(at: int, **event: Any) -> str:
    return json.dumps({"at": at, "event": event})


def place(at: int, request_id: str, keys: Sequence[bytes], prompt_tokens: int, max_tokens: int = 100) -> str:
    packed = base64.b64encode(b"".join(keys)).decode()
    batch = {"$": "KeyBatch", "group": 0, "shard": 0, "keys": {"$bytes": packed}}
    return journal_line(
        at, **{"$": "PlaceRequested"}, request_id=request_id, gateway_id="gw", keys=[batch], sticky_key="chat",
        prompt_tokens=prompt_tokens, max_tokens=max_tokens, tenant="acme", priority=3,
    )  # fmt: skip


def outcome(at: int, request_id: str, tokens: int, first_token: bool = False, error: str = "") -> str:
    return journal_line(
        at, **{"$": "OutcomeReported"}, request_id=request_id, first_token=first_token, tokens=tokens, error=error
    )


def test_journal(tmp_path: Path) -> None:
    a, b, c = b"a" * 16, b"b" * 16, b"c" * 16
    info = {"$": "InstanceInfo", "namespace": {"$": "NamespaceSpec", "groups": [{"block_tokens": 64}]}}
    header = {"journal": 1, "checkpoint": {"$dict": [["cluster", {"instances": {"$dict": [["w0", {"info": info}]]}}]]}}
    path = write(
        tmp_path / "scheduler-000001.jsonl",
        json.dumps(header),
        place(1_000_000, "r1", [a, b], 150),
        json.dumps({"commands": []}),
        place(1_200_000, "r2", [a, c], 128),
        outcome(1_300_000, "r1", 1, first_token=True),
        place(1_400_000, "r1", [a, b], 150),  # again, after a loss
        outcome(2_000_000, "r1", 40),
        place(3_000_000, "r3", [], 64, max_tokens=30),
        outcome(3_000_001, "r3", 5, error="lost"),
    )
    with path.open("a") as file:
        file.write('{"at":9,"eve')  # torn, as by a crash
    trace = read_trace(path)
    assert list(trace) == [
        TraceRequest(0, 150, 40, (0, 1), 64, "chat", "acme", 3),
        TraceRequest(200_000, 128, 40, (0, 2), 64, "chat", "acme", 3),
        TraceRequest(2_000_000, 64, 30, (3,), 64, "chat", "acme", 3),
    ]
    assert "2 of 3 requests were not seen ending: 40" in trace.notes[0]


def test_a_journal_of_two_block_sizes_is_refused(tmp_path: Path) -> None:
    infos = [{"$": "InstanceInfo", "namespace": {"groups": [{"block_tokens": n}]}} for n in (64, 128)]
    joined = [journal_line(0, **{"$": "InstanceJoined"}, info=info) for info in infos]
    with pytest.raises(BadArgument, match="blocks of 64, 128 tokens"):
        read_trace(write(tmp_path / "j", '{"journal":1}', *joined, place(1, "r", [], 10)))


REQUESTS = st.lists(
    st.tuples(
        st.integers(0, 10**9), st.integers(1, 500), st.integers(1, 50), st.integers(0, 2**62),
        st.sampled_from(["", "s1", "s2"]), st.sampled_from(["", "t"]), st.integers(-3, 3),
    ),
    min_size=1, max_size=20,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(REQUESTS, st.sampled_from(["t.jsonl", "t.jsonl.gz"]))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, rows: list[Any], name: str) -> None:
    builder = TraceBuilder("generated", 64)
    for at, prompt, output, first, session, tenant, priority in rows:
        builder.add(at, prompt, output, [first + i for i in range(-(-prompt // 64))], session, tenant, priority)
    trace = builder.build()
    first_us = min(row[0] for row in rows)
    assert [r.arrival_us + first_us for r in trace] == sorted(row[0] for row in rows)
    path = tmp_path_factory.mktemp("t") / name
    write_trace(path, trace, {"made": "here"})
    assert list(read_trace(path)) == list(trace)
    again = path.with_name("again" + name)
    write_trace(again, trace, {"made": "here"})
    assert again.read_bytes() == path.read_bytes()


def test_parts_of_a_trace() -> None:
    builder = TraceBuilder("generated", 16)
    for n in range(10):
        builder.add(n * 1000, 16 * n + 1, n + 1, list(range(n + 1)))
    trace = builder.build()
    whole = list(trace)
    assert list(trace[3:6]) == whole[3:6]
    assert list(trace[::-2]) == whole[::-2]
    assert trace[-1] == whole[-1]
    assert [r.prompt_tokens for r in trace.between(2000, 4000)] == [33, 49]
    assert [r.arrival_us for r in trace.between(2000, 4000)] == [0, 1000]
    assert [r.arrival_us for r in trace.sped_up(2.0)] == [n * 500 for n in range(10)]
    with pytest.raises(IndexError):
        trace[10]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_whatever_is_in_a_file_it_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Good files with bytes changed, dropped or added: never another error than one that names the file."""
    azure = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.97,48,10\n2023-11-16 18:17:04,5,1\n"
    own = (
        '{"kvpool_trace":1,"block_tokens":16}\n{"arrival_us":1,"prompt_tokens":20,"output_tokens":3,"hash_ids":[1,2]}\n'
    )
    journal = '{"journal":1}\n' + place(1, "r", [b"a" * 16], 600) + "\n" + outcome(2, "r", 3) + "\n"
    good = data.draw(st.sampled_from([mooncake() + "\n" + mooncake(9) + "\n", azure, own, journal])).encode()
    content = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    path = tmp_path_factory.mktemp("t") / "t"
    path.write_bytes(gzip.compress(bytes(content)) if data.draw(st.booleans()) else bytes(content))
    for skip_bad in (False, True):
        try:
            trace = read_trace(path, skip_bad)
        except BadArgument as error:
            assert str(path) in str(error)
        else:
            assert len(list(trace)) == len(trace) > 0
            assert skip_bad or not trace.bad_lines
