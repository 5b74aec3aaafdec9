"""Real clusters of real processes for the end-to-end tests."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from kvpool.cli.kvctl import Cluster
from kvpool.cli.local import LocalCluster, LocalOptions

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "tests" / "models" / "tiny-llama"
#: Of each step of a test: what does not come at all, not what comes late on a busy machine.
PATIENCE_S = 60.0


def eventually(check: Callable[[], bool], what: str) -> None:
    """Polls, since what is awaited happens in other processes."""
    end_s = time.monotonic() + PATIENCE_S
    while not check():
        assert time.monotonic() < end_s, f"not within {PATIENCE_S:.0f} s: {what}"
        time.sleep(0.05)


def options(**changes: object) -> LocalOptions:
    base = {"model": str(MODEL), "deterministic": True, "memory_bytes": 256 << 20, "kv_tokens": 16384}
    return LocalOptions(**(base | changes))  # type: ignore[arg-type]


class Running:
    """A running cluster with the clients that tests need."""

    def __init__(self, local: LocalCluster) -> None:
        self.local = local
        self.control = Cluster(local.scheduler_address)
        self.http = httpx.Client(base_url=local.gateway_url, timeout=2 * PATIENCE_S)

    def wait_instances(self, count: int) -> None:
        """Waits until so many instances, and a node, are alive, and nothing keeps them from handing over."""

        def there() -> bool:
            alive = [i for i in self.control.instances() if i["state"] == "alive"]
            nodes = [n for n in self.control.nodes() if n["state"] == "alive"]
            # One that joined before its node answered joins again with the node's name.
            return len(alive) == count and all(i["info"]["node_source_id"] for i in alive) and bool(nodes)

        eventually(there, f"{count} instances that know their node, and a node, are alive")

    def wait_nothing_held(self) -> None:
        def nothing() -> bool:
            status = self.control.status()
            held = self.control.held()
            return not any(held.values()) and status["kv_tokens_reserved"] == 0 and status["active_requests"] == 0

        eventually(nothing, "everything released")

    def blocks_on_node(self) -> int:
        """As the node says; 0 where it does not answer."""
        return sum(node.get("stats", {}).get("blocks", 0) for node in self.control.nodes())

    def outcome(self, request_id: str) -> dict:
        """What the gateway has told the scheduler of a request's end; it does so beside answering the client."""
        outcome: dict = self.control.explain(request_id).get("outcome", {})
        return outcome

    def complete(self, prompt: object, max_tokens: int = 16, *, policy: str = "", **more: object) -> dict:
        body = {"model": "tiny-llama", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
                "return_token_ids": True, "kvpool": {"policy": policy}, **more}  # fmt: skip
        response = self.http.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        return response.json()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One prefill and two decode workers."""
    folder = tmp_path_factory.mktemp("cluster")
    local = LocalCluster(options(prefill=1, decode=2, journal=str(folder / "journal")), folder / "logs")
    local.start()
    running = Running(local)
    try:
        running.wait_instances(3)
        yield running
    finally:
        running.http.close()
        local.stop()


@pytest.fixture(scope="session")
def reference() -> Callable[[list[int], int], list[int]]:
    """Greedy tokens of the plain Hugging Face model: no paging, no pool, no batching."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)

    def generate(prompt: list[int], count: int) -> list[int]:
        """`generate` of transformers would ban the end-of-sequence token, so the loop is written out."""
        out: list[int] = []
        with torch.inference_mode():
            step = model(torch.tensor([prompt]), use_cache=True)
            while len(out) < count:
                out.append(int(step.logits[0, -1].argmax()))
                step = model(torch.tensor([out[-1:]]), past_key_values=step.past_key_values, use_cache=True)
        return out

    return generate


@pytest.fixture(scope="session")
def prompts() -> Callable[[int, int], list[int]]:
    """Token ids of real text: `prompts(index, tokens)`."""
    import textwrap

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids: list[int] = tokenizer.encode(Path(textwrap.__file__).read_text(encoding="utf-8"), add_special_tokens=False)

    def cut(index: int, tokens: int) -> list[int]:
        start = (index * 331) % (len(ids) - tokens)
        return ids[start : start + tokens]

    return cut
