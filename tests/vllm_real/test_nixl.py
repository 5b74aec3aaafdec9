"""vLLM's NixlConnector behind the gateway: one server computes the prompt, another takes it over and answers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.vllm_real.clusters import Cluster, nixl_cluster
from tests.vllm_real.prompts import prompts

pytestmark = pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason="NIXL is not installed here")


def test_prompts_are_handed_over(served: Cluster, tmp_path: Path) -> None:
    asked = prompts(6)[::3]
    with nixl_cluster(tmp_path, served.plain) as nixl:
        splits = 0
        for number, (tokens, fields) in enumerate(asked):
            expected = served.plain.complete(tokens, **fields).tokens
            answer = nixl.streamed(tokens, kvpool={"policy": "always_split"}, **fields)
            assert answer.tokens == expected and answer.finish == "length", f"prompt {number}"
            splits += any(placement["split"] for placement in answer.placements)
        assert splits
        moved = sum(member.engine.metric("vllm:nixl_bytes_transferred_sum") for member in nixl.servers)
        assert moved > 0
        nixl.until(nixl.nothing_left, "something is left")
