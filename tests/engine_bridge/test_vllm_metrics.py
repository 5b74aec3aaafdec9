"""What is read out of a /metrics page, recorded from vLLM 0.32.0 and shortened."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.openai_server.exposition import read_page
from engines.openai_server.vllm_metrics import NAMES, CacheFacts, LoadTracker, PrefillSample, StepSample, cache_facts
from kvpool.core.errors import Unsupported

CACHE_LINE = (
    'vllm:cache_config_info{block_size="32",cache_dtype="auto",enable_prefix_caching="True",engine="0",'
    'hash_block_size="None",kv_cache_memory_bytes="1073741824",kv_cache_size_tokens="174752",num_gpu_blocks="5461",'
    'prefix_caching_hash_algo="sha256",sliding_window="None"} 1.0'
)


def page(**values: float) -> str:
    names = {
        "running": "vllm:num_requests_running", "waiting": "vllm:num_requests_waiting",
        "usage": "vllm:kv_cache_usage_perc", "prefill_s": "vllm:request_prefill_time_seconds_sum",
        "prefills": "vllm:request_prefill_time_seconds_count", "prompt": "vllm:request_prompt_tokens_sum",
        "computed": "vllm:request_prefill_kv_computed_tokens_sum", "step_s": "vllm:inter_token_latency_seconds_sum",
        "steps": "vllm:inter_token_latency_seconds_count",
    }  # fmt: skip
    lines = [f'{names[name]}{{engine="0",model_name="tiny"}} {value}' for name, value in values.items()]
    return "\n".join(["# HELP x y", CACHE_LINE, "process_start_time_seconds 1.79528028911e+09", *lines]) + "\n"


def test_the_cache_of_an_engine() -> None:
    facts = cache_facts(read_page(page(), NAMES))
    assert facts == CacheFacts(32, 32, 174752, "sha256", "auto", True)


@pytest.mark.parametrize(
    "text", ["", "up 1", CACHE_LINE.replace('"5461"', '"None"'), CACHE_LINE.replace('"32"', '"x"')]
)
def test_pages_of_something_else(text: str) -> None:
    with pytest.raises(Unsupported):
        cache_facts(read_page(text, NAMES))


def test_load_and_samples_between_two_looks() -> None:
    tracker = LoadTracker(1000)
    first = tracker.look(
        read_page(page(running=2, waiting=1, usage=0.25, prefills=3, prefill_s=1, computed=100), NAMES)
    )
    assert (first.running, first.waiting, first.kv_tokens_free, first.prefill, first.steps) == (2, 1, 750, (), ())
    later = page(
        running=1, waiting=0, usage=0.5, prefills=5, prefill_s=1.5, computed=300, prompt=500, step_s=0.2, steps=10
    )
    second = tracker.look(read_page(later, NAMES))
    assert second.kv_tokens_free == 500
    assert second.prefill == (PrefillSample(100, 150, 250_000),)
    assert second.steps == (StepSample(2, 500, 20_000),)
    again = tracker.look(read_page(later, NAMES))
    assert again.prefill == () and again.steps == ()


def test_sums_over_engines_and_labels_with_quotes() -> None:
    text = 'vllm:num_requests_running{engine="0"} 2\nvllm:num_requests_running{engine="1",m="a\\"b\\\\{}, c"} 3 17\n'
    read = read_page(text, NAMES)
    assert read.value("vllm:num_requests_running") == 5
    assert read.labels["vllm:num_requests_running"] == {"engine": "1", "m": 'a"b\\{}, c'}


@given(st.text(max_size=200))
def test_any_text_is_read(text: str) -> None:
    read_page(text + "\n" + f"vllm:kv_cache_usage_perc{text}", NAMES)
