"""Advice: the cases in which splitting lost for others, links that are broken, storage that is slow, and words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from kvpool.cli.kvctl import app
from kvpool.core.errors import BadArgument
from scheduler.advisor import measured, sizing, words
from scheduler.advisor.advice import GAIN_MIN, Advice, Answer, advise
from scheduler.advisor.demand import Demand, Sample
from scheduler.advisor.model import Objectives
from scheduler.simulator.hardware import PROFILES, Hardware

A800, H200 = PROFILES["a800x8-llama3-70b"], PROFILES["h200-gpt-oss-120b"]
#: Without the size of its memory in its name a GPU's other TP degrees are not known, and not tried.
H200_TP1 = replace(H200, gpu="H200")
runner = CliRunner()


def demand(prompt: float, output: float, rate_per_s: float = 1.0, cached: float = 0.0) -> Demand:
    sizes = (np.full(200, float(x)) for x in (prompt, output, cached))
    return Demand(rate_per_s, 1.0, Sample(*sizes), capacity_blocks=1)


def four_gpus(broken_bytes_s: float, state: str = "up") -> measured.Links:
    """Links between each two of four GPUs; one pair is not as the others."""
    names = [f"gpu{i}" for i in range(4)]
    bad = {"gpu2", "gpu3"}
    return measured.links_of(
        [
            {"from": a, "to": b, "bytes_per_s": broken_bytes_s if {a, b} == bad else 150e9,
             "state": state if {a, b} == bad else "up"}
            for a in names for b in names if a != b
        ]
    )  # fmt: skip


# ---------------------------------------------------------------- cases that went wrong elsewhere


@pytest.mark.parametrize("gpus", [2, 4, 8, 16])
def test_long_prompts_and_short_answers_on_h200_gain_nothing(gpus: int) -> None:
    advice = advise([H200], gpus, None, demand(32_768, 512), Objectives())
    assert advice.answer is Answer.COLOCATE
    assert advice.gain < GAIN_MIN
    assert advice.bytes_s_turns is None  # not for want of a faster link


def test_four_gpus_and_a_broken_pair_stay_together_and_the_link_is_fixed_first() -> None:
    advice = advise([H200], 4, four_gpus(2e9), demand(32_768, 512), Objectives())
    assert advice.answer is Answer.COLOCATE
    text = list(words.sentences(advice))
    assert text[0].startswith("Stay co-located, fix the link first")
    broken = next(line for line in text if line.startswith("Broken"))
    assert "gpu2 to gpu3 carries 2.0 GB/s" in broken and "the others carry 150.0 GB/s" in broken
    assert advice.chosen is not None
    assert ("Put no instance across" in broken) == (advice.chosen.design.decode.gpus_per_instance > 1)


def test_a_broken_link_turns_an_answer_that_a_whole_one_would_give() -> None:
    """Very long prompts with very short intervals: here a split wins, if its link is whole."""
    asked, objectives = demand(65_536, 1024), Objectives(10e6, 15e3, 0.9)
    sound = measured.links_of([{"from": "a", "to": "b", "bytes_per_s": 150e9}] * 2)
    assert advise([H200_TP1], 4, sound, asked, objectives).answer is Answer.SPLIT
    advice = advise([H200_TP1], 4, four_gpus(1e8), asked, objectives)
    assert advice.answer is Answer.COLOCATE
    assert advice.healed_gain is not None and advice.healed_gain >= GAIN_MIN
    text = " ".join(words.sentences(advice))
    assert "fix the link first" in text and "a split would be worth it then" in text
    down = advise([H200_TP1], 4, four_gpus(150e9, "down"), asked, objectives)
    assert down.answer is Answer.COLOCATE
    assert "gpu2 to gpu3 is down" in " ".join(words.sentences(down))


def test_slow_storage_is_not_read() -> None:
    """Reported: 2450 ms to read from files what took 1725 ms to compute."""
    tokens = 47_000
    seconds = float(A800.prefill_us(tokens, 0)) / 1e6
    speed = tokens * A800.kv_token_bytes / (seconds * 2450 / 1725)
    slow = replace(A800, ssd_bytes=1 << 40, ssd_bytes_s=speed)
    advice = advise([slow], 32, None, demand(48_000, 200, cached=tokens), Objectives())
    ssd = next(one for one in advice.storage if "SSD" in one.place)
    assert not ssd.pays
    assert ssd.pull_us / ssd.recompute_us == pytest.approx(2450 / 1725, rel=0.01)
    assert f"A prefix of {tokens:,} tokens in the SSD of the same node: recompute" in " ".join(words.sentences(advice))
    memory = next(one for one in advice.storage if one.place == "memory of the same node")
    assert memory.pays
    without = advise([replace(slow, ssd_bytes=0)], 32, None, demand(48_000, 200, cached=tokens), Objectives())
    assert not any("SSD" in one.place for one in without.storage), "nothing is said of drives that are not there"


def test_fetching_pays_exactly_from_where_it_is_said_to() -> None:
    advice = advise([replace(A800, gpu="A800")], 32, None, demand(48_000, 200, cached=10_000), Objectives())
    local = advice.storage[0]
    assert local.tokens_min is not None
    for tokens, pays in ((local.tokens_min, True), (local.tokens_min - 1, False)):
        fetched_us = A800.local_latency_us + tokens * A800.kv_token_bytes / A800.local_bytes_s * 1e6
        assert (fetched_us < A800.prefill_us(tokens, 0)) == pays


def test_chunks_that_are_too_large_are_an_alternative_to_splitting() -> None:
    """Chunks of 8192 stretch steps beyond the limit: cut them smaller, or else split."""
    coarse = replace(A800, gpu="A800", chunk_tokens=8192)
    asked, objectives = demand(12_000, 340), Objectives(30e6, 100e3, 0.9)
    advice = advise([coarse], 128, None, asked, objectives)
    assert advice.answer is Answer.COLOCATE and advice.unchanged is not None
    assert advice.chosen is not None and advice.chosen.evaluation.chunk_tokens < 8192
    assert advice.unchanged.capacity_per_s < 0.9 * advice.chosen.capacity_per_s
    text = " ".join(words.sentences(advice))
    assert "With 8192 as the engines have it" in text and "a split is worth it" in text
    best = advice.chosen.evaluation.chunk_tokens
    fine = advise([replace(coarse, chunk_tokens=best)], 128, None, asked, objectives)
    assert fine.unchanged is None


# ---------------------------------------------------------------- where the answer changes


def test_the_turning_bandwidth_is_where_the_gain_is_enough() -> None:
    asked, objectives = demand(65_536, 1024), Objectives(10e6, 15e3, 0.9)
    advice = advise([H200_TP1], 4, None, asked, objectives)
    assert advice.answer is Answer.SPLIT and advice.bytes_s_turns is not None
    for factor, worth in ((1.05, True), (0.9, False)):
        together = sizing.capacity_per_s(sizing.colocated(H200, 4), asked, objectives)
        apart = sizing.best_split(H200, 4, advice.bytes_s_turns * factor, asked, objectives)
        assert apart is not None
        assert (apart.capacity_per_s >= (1 + GAIN_MIN) * together) == worth


def test_ranges_cover_all_counts_once() -> None:
    advice = advise([H200_TP1], 4, None, demand(65_536, 1024), Objectives(10e6, 15e3, 0.9))
    assert advice.by_gpus[0].answer is Answer.COLOCATE  # a single instance can't be split
    assert {part.answer for part in advice.by_gpus} == {Answer.COLOCATE, Answer.SPLIT}
    for one, following in zip(advice.by_gpus, advice.by_gpus[1:], strict=False):
        assert one.gpus_max < following.gpus_min
        assert one.answer is not following.answer


def test_without_a_number_the_cheapest_is_chosen() -> None:
    dear = replace(A800, name="dear", gpu="D", price_gpu_hour=99.0)
    plain = replace(A800, gpu="A")
    advice = advise([dear, plain], None, None, demand(8192, 256, rate_per_s=6.0), Objectives())
    assert advice.chosen is not None and advice.carries
    assert advice.chosen.design.decode.gpu == "A"
    prices = [one.design.price_hour for one in advice.designs]
    assert prices == sorted(prices)
    tokens_per_hour = 6.0 * 3600 * (8192 + 256)
    assert advice.cost_per_million == pytest.approx(advice.chosen.design.price_hour / tokens_per_hour * 1e6)


def test_roles_may_have_different_hardware() -> None:
    """One kind computes fast and holds little, the other reads fast: a pair beats each alone."""
    computes = replace(A800, name="c", gpu="C", prefill_token_us=20.0, prefill_pair_us=0.0, step_us=200e3)
    reads = replace(A800, name="r", gpu="R", prefill_token_us=2000.0)
    advice = advise([computes, reads], None, None, demand(8192, 256, rate_per_s=4.0), Objectives(10e6, 100e3, 0.9))
    assert advice.answer is Answer.SPLIT and advice.chosen is not None
    assert (advice.chosen.design.prefill.gpu, advice.chosen.design.decode.gpu) == ("C", "R")


def test_what_can_not_be_done_is_said() -> None:
    advice = advise([A800], 16, None, demand(100_000, 100), Objectives(1e3, 200e3, 0.9))
    assert advice.answer is Answer.NEITHER and advice.chosen is None and advice.cost_per_million is None
    assert next(words.sentences(advice)).startswith("Neither works")
    small = advise([A800], 8, None, demand(8192, 256, rate_per_s=50.0), Objectives())
    assert not small.carries
    assert "does not carry the trace" in " ".join(words.sentences(small))


def test_json_is_complete_and_finite() -> None:
    for advice in (
        advise([A800], 16, None, demand(100_000, 100), Objectives(1e3, 200e3, 0.9)),
        advise([H200], 4, four_gpus(2e9), demand(65_536, 1024), Objectives(10e6, 15e3, 0.9)),
        advise([A800, H200], None, None, demand(4096, 256), Objectives()),
    ):
        data = json.loads(json.dumps(words.to_json(advice), allow_nan=False))
        assert data["answer"] in ("co-locate", "split", "neither")
        assert data["text"] and data["storage"] and data["by_gpus"]
        for one in (data["colocated"], data["split"]):
            assert one is None or {"gpus", "roles", "prefill_busy", "decode_kv_share", "carries_requests_per_s"} <= set(
                one
            )


# ---------------------------------------------------------------- measurements


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({}, "a list is expected"),
        ({"links": []}, "no link was ever measured"),
        ({"links": [3]}, "link 1: an object"),
        ([{"from": "a"}], "'to' must name"),
        ([{"from": "a", "to": "b", "state": "odd"}], "state 'odd'"),
        ([{"from": "a", "to": "b", "bytes_per_s": -1}], "bytes_per_s is -1"),
        ([{"from": "a", "to": "b", "bytes_per_s": "fast"}], "bytes_per_s is 'fast'"),
        ([{"from": "a", "to": "b", "bytes_per_s": None}], "no link was ever measured"),
    ],
)
def test_bad_links(data: Any, problem: str) -> None:
    with pytest.raises(BadArgument, match=problem):
        measured.links_of(data)


def test_of_several_channels_the_one_in_use_counts() -> None:
    def link(kind: str, bytes_s: float, active: bool, to: str = "b") -> dict[str, Any]:
        return {"from": "a", "to": to, "kind": kind, "bytes_per_s": bytes_s, "active": active, "state": "up"}

    links = measured.links_of([link("tcp", 9e9, False), link("nixl", 5e9, True), link("shm", 20e9, True, "c")])
    assert (links.slowest_bytes_s, links.healthy_bytes_s, links.broken) == (5e9, 5e9, ())
    # Shared memory alone is better than nothing.
    assert measured.links_of([link("shm", 20e9, True)]).slowest_bytes_s == 20e9


def test_links_that_differ_a_little_are_not_broken() -> None:
    links = measured.links_of([{"from": "a", "to": str(n), "bytes_per_s": (6 + n) * 1e9} for n in range(6)])
    assert not links.broken


def status(name: str, **over: Any) -> dict[str, Any]:
    group = {"block_bytes": 65_536, "block_tokens": 64, "shard_count": 2}
    info = {
        "instance_id": name, "model": "m", "gpu": "X-80GB", "tp": 2, "price_per_hour": 6.0, "host_id": name[0],
        "kv_tokens_total": 100_000, "context_tokens_max": 32_768, "batch_max": 64, "chunk_tokens": 1024,
        "namespace": {"groups": [group]},
    }  # fmt: skip
    fits = {
        "prefill_base_us": 5.0, "prefill_per_token_us": 50.0, "prefill_attention_us": 0.001, "decode_base_us": 9000.0,
        "decode_per_sequence_us": 30.0, "decode_per_kv_token_us": 0.02,
    }  # fmt: skip
    info |= {key: value for key, value in over.items() if key in info}
    rest = {key: value for key, value in over.items() if key not in info}
    return {"info": info, "state": "alive", **fits, **rest}


def test_a_running_cluster_as_hardware() -> None:
    instances = [
        status("a1"), status("a2", prefill_per_token_us=60.0), status("b1", prefill_per_token_us=500.0),
        status("b2", state="suspect", decode_base_us=1.0),
    ]  # fmt: skip
    links = measured.links_of([{"from": "a", "to": "b", "bytes_per_s": 3e9}])
    hardware = measured.hardware_of_instances(instances, A800, links)
    assert hardware.prefill_token_us == 60.0  # the median: one that is out of order does not count
    assert (hardware.step_us, hardware.kv_token_bytes, hardware.gpus_per_instance) == (9000.0, 2048, 2)
    assert (hardware.price_instance_hour, hardware.pull_bytes_s, hardware.kv_tokens) == (6.0, 3e9, 100_000)
    assert hardware.ssd_bytes_s == A800.ssd_bytes_s  # what nobody says is the base's
    hardware.check()


def test_clusters_that_are_no_one_kind() -> None:
    with pytest.raises(BadArgument, match="no instance is alive"):
        measured.hardware_of_instances([status("a", state="suspect")], A800, None)
    with pytest.raises(BadArgument, match=r"several kinds: m on X-80GB, TP2; m on Y, TP2"):
        measured.hardware_of_instances([status("a"), status("b", gpu="Y")], A800, None)


# ---------------------------------------------------------------- the command


def trace_file(folder: Path, requests: int = 300) -> Path:
    path = folder / "t.jsonl"
    done = runner.invoke(
        app, ["trace", "generate", "--kind", "multi-turn", "--requests", str(requests), "--out", str(path)]
    )
    assert done.exit_code == 0, done.output
    return path


def test_the_command(tmp_path: Path) -> None:
    path, links = trace_file(tmp_path), tmp_path / "links.json"
    pairs = [("a", "b", 50e9), ("a", "c", 50e9), ("b", "c", 1e9)]
    links.write_text(json.dumps({"links": [{"from": a, "to": b, "bytes_per_s": s} for a, b, s in pairs]}))
    command = ["advise", "--trace", str(path), "--hardware", "h200-gpt-oss-120b", "--gpus", "4", "--links", str(links)]
    done = runner.invoke(app, command)
    assert done.exit_code == 0, done.output
    assert done.output.startswith("Stay co-located, fix the link first")
    done = runner.invoke(app, [*command, "--json"])
    data = json.loads(done.output)
    assert data["broken_links"] == [{"from": "b", "to": "c", "state": "up", "bytes_per_s": 1e9}]
    assert data["simulated"] == []


def test_the_command_checks_by_simulation(tmp_path: Path) -> None:
    path = trace_file(tmp_path)
    command = ["advise", "--trace", str(path), "--hardware", "a800x8-llama3-70b", "--gpus", "16"]
    done = runner.invoke(app, [*command, "--simulate", "60", "--json"])
    assert done.exit_code == 0, done.output
    checks = json.loads(done.output)["simulated"]
    assert len(checks) == 2
    for check in checks:
        assert check["simulated_good_share"] == pytest.approx(check["predicted_good_share"], abs=0.1)


@pytest.mark.parametrize(
    ("more", "code", "problem"),
    [
        ([], 2, "which hardware?"),
        (["--hardware", "tpu"], 1, "'tpu' is not one of"),
        (["--hardware", "h200-gpt-oss-120b", "--links", "missing.json"], 1, "can't be read"),
        (["--hardware", "h200-gpt-oss-120b", "--gpus", "0"], 2, ""),
        (["--hardware", "a800x8-llama3-70b", "--gpus", "3"], 1, "3 GPUs are too few"),
    ],
)
def test_bad_options(tmp_path: Path, more: list[str], code: int, problem: str) -> None:
    done = runner.invoke(app, ["advise", "--trace", str(trace_file(tmp_path, 10)), *more])
    assert done.exit_code == code
    assert problem in done.stderr


def test_live_without_a_cluster(tmp_path: Path) -> None:
    path = trace_file(tmp_path, 10)
    done = runner.invoke(app, ["advise", "--trace", str(path), "--live", "--scheduler", "127.0.0.1:1"])
    assert done.exit_code == 3
    assert "no scheduler answers" in done.stderr


def test_unfit_for_this_hardware_is_not_hidden() -> None:
    """Requests longer than what an instance holds: nothing carries them."""
    tiny: Hardware = replace(H200, kv_tokens=10_000, context_tokens_max=10_000)
    advice: Advice = advise([tiny], 4, None, demand(32_768, 512), Objectives())
    assert advice.answer is Answer.NEITHER
