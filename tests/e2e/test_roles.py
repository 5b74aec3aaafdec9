"""Real workers change their roles while they serve: no request notices, and later ones go by the new roles."""

from __future__ import annotations

import concurrent.futures
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from kvpool.cli.kvctl import app
from kvpool.cli.local import LocalCluster
from scheduler.replay.exact import replay_file
from scheduler.replay.reading import files_of
from tests.e2e.conftest import PATIENCE_S, Running, eventually, options

pytestmark = pytest.mark.processes
Cut = Callable[[int, int], list[int]]
Generate = Callable[[list[int], int], list[int]]
ANSWER_TOKENS = 80


@pytest.fixture
def changeable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """One worker that prefills and two that decode; all of them may be given other roles."""
    monkeypatch.setenv("KVPOOL_WORKER_ROLE_CHANGEABLE", "1")
    local = LocalCluster(options(prefill=1, decode=2, journal=str(tmp_path / "journal")), tmp_path / "logs")
    local.start()
    running = Running(local)
    try:
        running.wait_instances(3)
        yield running
    finally:
        running.http.close()
        local.stop()


def streamed(running: Running, prompt: list[int], begun: threading.Event) -> list[int]:
    """All tokens of a long answer. Args: begun: set with the first of them."""
    body = {"model": "tiny-llama", "prompt": prompt, "max_tokens": ANSWER_TOKENS, "temperature": 0, "ignore_eos": True,
            "stream": True, "return_token_ids": True, "kvpool": {"policy": "always_split"}}  # fmt: skip
    tokens: list[int] = []
    with httpx.stream(
        "POST", f"{running.local.gateway_url}/v1/completions", json=body, timeout=2 * PATIENCE_S
    ) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            tokens += json.loads(line.removeprefix("data: "))["choices"][0].get("token_ids", [])
            if tokens:
                begun.set()
    return tokens


def roles(running: Running) -> dict[str, str]:
    return {i["info"]["instance_id"]: i["info"]["role"] for i in running.control.instances()}


def set_role(running: Running, worker: str, role: str) -> dict[str, object]:
    where = ["-s", running.local.scheduler_address, "--timeout", str(PATIENCE_S)]
    done = CliRunner().invoke(app, ["role", worker, role, *where, "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.mark.timeout(400)
def test_workers_change_their_roles_under_load(
    changeable: Running, prompts: Cut, reference: Generate, tmp_path: Path
) -> None:
    asked = [prompts(index, 150 + 40 * index) for index in range(3)]
    with concurrent.futures.ThreadPoolExecutor(len(asked)) as pool:
        begun = [threading.Event() for _ in asked]
        answers = [pool.submit(streamed, changeable, *each) for each in zip(asked, begun, strict=True)]
        assert all(first.wait(PATIENCE_S) for first in begun)
        assert set_role(changeable, "decode-0", "prefill")["role"] == "prefill"
        assert roles(changeable) == {"prefill-0": "prefill", "decode-0": "prefill", "decode-1": "decode"}
        # Whatever was being decoded there goes on, and comes to its end with the right tokens.
        for prompt, answer in zip(asked, answers, strict=True):
            assert answer.result(2 * PATIENCE_S) == reference(prompt, ANSWER_TOKENS)
    eventually(lambda: not changeable.control.plan()["changes"], "the change is over")
    prompt = prompts(7, 300)
    answer = changeable.complete(prompt, 12, policy="always_split")
    assert answer["choices"][0]["token_ids"] == reference(prompt, 12)
    placement = changeable.control.explain(answer["id"])["choice"]["placement"]
    assert placement["decode"]["instance_id"] == "decode-1" != placement["prefill"]["instance_id"]

    # The last one that decodes keeps doing so; one that dies comes back as it was started.
    done = CliRunner().invoke(app, ["role", "decode-1", "prefill", "-s", changeable.local.scheduler_address])
    assert done.exit_code == 1 and "no other instance decodes" in done.stderr
    changeable.local.process("decode-0").kill()
    eventually(lambda: "decode-0" not in roles(changeable), "it is gone")
    changeable.local.restart("decode-0")
    eventually(lambda: roles(changeable).get("decode-0") == "decode", "it decodes again")
    changeable.wait_nothing_held()
    changeable.local.process("scheduler").stop()
    replays = [replay_file(path) for path in files_of(tmp_path / "journal")]
    assert replays and all(replay.identical for replay in replays)
