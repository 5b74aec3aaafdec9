"""Processes are killed and stopped under load: right tokens for all, nothing held, all join again by themselves."""

from __future__ import annotations

import concurrent.futures
import json
import signal
import threading
from collections.abc import Callable, Iterator

import grpc
import pytest

from kvpool.cli.local import LocalCluster
from tests.e2e.conftest import PATIENCE_S, Running, eventually, options
from tests.pool.node_process import stand_still

# Eight processes: on a busy machine their start alone takes a minute.
pytestmark = [pytest.mark.processes, pytest.mark.timeout(400)]
Cut = Callable[[int, int], list[int]]
Generate = Callable[[list[int], int], list[int]]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Two prefill and two decode workers, so that each role survives the loss of one; two gateways."""
    folder = tmp_path_factory.mktemp("faults")
    local = LocalCluster(options(prefill=2, decode=2, gateways=2), folder)
    local.start()
    running = Running(local)
    try:
        running.wait_instances(4)
        yield running
    finally:
        running.http.close()
        local.stop()


class Stream:
    """One streamed completion, read in a thread."""

    def __init__(self, cluster: Running, prompt: list[int], tokens: int) -> None:
        self.tokens: list[int] = []
        self.request_id = ""
        self.started, self.half = threading.Event(), threading.Event()
        self._want = tokens
        body = {"model": "tiny-llama", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
                "stream": True, "return_token_ids": True, "kvpool": {"policy": "always_split"}}  # fmt: skip
        self._thread = threading.Thread(target=self._read, args=(cluster, body), daemon=True)
        self.error: Exception | None = None
        self._thread.start()

    def _read(self, cluster: Running, body: dict) -> None:
        try:
            with cluster.http.stream("POST", "/v1/completions", json=body) as response:
                assert response.status_code == 200, response.read()
                for line in response.iter_lines():
                    if not line.startswith("data: {"):
                        continue
                    chunk = json.loads(line[6:])
                    assert "error" not in chunk, chunk
                    self.request_id = chunk["id"]
                    for choice in chunk["choices"]:
                        self.tokens += choice.get("token_ids") or []
                    if self.tokens:
                        self.started.set()
                    if 2 * len(self.tokens) >= self._want:
                        self.half.set()
        except Exception as error:  # handed to the test's thread by `result`
            self.error = error
            self.started.set()
            self.half.set()

    def result(self) -> list[int]:
        self._thread.join(timeout=2 * PATIENCE_S)
        assert not self._thread.is_alive(), "the stream did not end"
        if self.error:
            raise self.error
        return self.tokens


def decoder_of(cluster: Running, request_id: str) -> str:
    return cluster.control.explain(request_id)["choice"]["placement"]["decode"]["instance_id"]


def test_decode_worker_dies_mid_stream(cluster: Running, prompts: Cut, reference: Generate) -> None:
    prompt = prompts(2, 260)
    stream = Stream(cluster, prompt, 120)
    assert stream.half.wait(2 * PATIENCE_S)
    victim = decoder_of(cluster, stream.request_id)
    cluster.local.process(victim).kill()
    assert stream.result() == reference(prompt, 120)
    cluster.local.restart(victim)
    cluster.wait_instances(4)
    cluster.wait_nothing_held()


@pytest.mark.parametrize("victim", ["prefill-0", "node"])
def test_killed_under_load(cluster: Running, prompts: Cut, reference: Generate, victim: str) -> None:
    asked = [prompts(i, 300 + 60 * (i % 5)) for i in range(16)]
    killed = threading.Event()

    def ask(index: int) -> list[int]:
        answer = cluster.complete(asked[index], 12, policy="always_split")
        if index == 3:
            cluster.local.process(victim).kill()
            killed.set()
        return answer["choices"][0]["token_ids"]

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(ask, range(len(asked))))
    assert killed.is_set()
    for prompt, tokens in zip(asked, answers, strict=True):
        assert tokens == reference(prompt, 12)
    cluster.local.restart(victim)
    cluster.wait_instances(4)
    cluster.wait_nothing_held()
    prompt = prompts(40, 400)
    tokens = reference(prompt, 8)

    def split() -> bool:
        answer = cluster.complete(prompt, 8, policy="always_split")
        assert answer["choices"][0]["token_ids"] == tokens
        return bool(cluster.control.explain(answer["id"])["choice"]["placement"]["split"])

    # Links that failed when it died are left alone for a while, the longer the more reads had failed.
    eventually(split, "what came back is used again, not only listed")


def test_scheduler_dies_and_comes_back(cluster: Running, prompts: Cut, reference: Generate) -> None:
    prompt = prompts(5, 320)
    eventually(lambda: cluster.control.status()["directory_blocks"] > 0, "blocks are known")
    before = cluster.control.status()["directory_blocks"]
    stream = Stream(cluster, prompt, 150)
    assert stream.started.wait(2 * PATIENCE_S)
    cluster.local.process("scheduler").kill()
    assert stream.result() == reference(prompt, 150)
    cluster.local.restart("scheduler")

    def rebuilt() -> bool:
        try:
            status = cluster.control.status()
        except grpc.RpcError:  # the connection to the process that died
            return False
        return status["directory_blocks"] >= before and status["instances_alive"] == 4

    eventually(rebuilt, "the directory is rebuilt")
    assert cluster.complete(prompt, 8)["choices"][0]["token_ids"] == reference(prompt, 8)
    cluster.wait_nothing_held()


def test_stopped_node_is_suspect_and_comes_back(cluster: Running, prompts: Cut, reference: Generate) -> None:
    prompt = prompts(7, 256)
    cluster.complete(prompt, 4)
    eventually(lambda: cluster.blocks_on_node() > 0, "blocks on the node")
    held_before = cluster.blocks_on_node()
    node = cluster.local.process("node").popen
    stand_still(node)
    try:
        nodes = lambda: [s for s in cluster.control.sources() if s["source"]["tier"] == "dram"]  # noqa: E731
        node_states = lambda: [s["state"] for s in nodes()]  # noqa: E731
        eventually(lambda: node_states() == ["suspect"], "the node is suspect")
        fresh = prompts(50, 200)
        assert cluster.complete(fresh, 6)["choices"][0]["token_ids"] == reference(fresh, 6)
    finally:
        node.send_signal(signal.SIGCONT)
    eventually(lambda: node_states() == ["alive"], "the node is back")
    eventually(lambda: cluster.blocks_on_node() >= held_before, "it has its blocks")
    cluster.wait_nothing_held()


def test_killed_gateway_leaves_nothing_held(cluster: Running, prompts: Cut) -> None:
    def streams_lost() -> int:
        """As workers tell in their logs, when requests were under way."""
        logs = cluster.local.supervisor.log_folder.glob("*.log")
        return sum(log.read_text().count("a gateway's stream has ended") for log in logs)

    victim = "gateway-1"
    url = f"http://{cluster.local.address(victim)}"
    # As long as the context allows: it must not end by itself before it is seen to run.
    body = {"model": "tiny-llama", "prompt": prompts(8, 100), "max_tokens": 3900, "ignore_eos": True, "stream": True}
    before = streams_lost()
    with cluster.http.stream("POST", f"{url}/v1/completions", json=body) as response:
        lines = response.iter_lines()  # kept: httpx closes the response with its iterator
        next(lines)
        eventually(lambda: any(i["running"] for i in cluster.control.instances()), "it runs")
        cluster.local.process(victim).kill()
    eventually(lambda: streams_lost() > before, "aborted on the workers")
    eventually(lambda: all(not i["running"] for i in cluster.control.instances()), "nothing runs any more")
    cluster.wait_nothing_held()
    cluster.local.restart(victim)
    eventually(lambda: cluster.control.status()["gateways"] == 2, "the gateway is back")


def test_fifty_arrivals_do_not_overbook(cluster: Running, prompts: Cut, reference: Generate) -> None:
    total = {i["info"]["instance_id"]: i["info"]["kv_tokens_total"] for i in cluster.control.instances()}
    highest: dict[str, int] = dict.fromkeys(total, 0)
    stop = threading.Event()

    def observe() -> None:
        for i in cluster.control.instances():
            name = i["info"]["instance_id"]
            highest[name] = max(highest[name], i["kv_tokens_reserved"])

    def go_on_observing() -> None:
        while not stop.wait(0.02):
            observe()

    observer = threading.Thread(target=go_on_observing, daemon=True)
    observer.start()
    asked = [prompts(i, 1200) for i in range(50)]

    # Nobody leaves, and frees what was reserved, before everybody has an answer.
    answered = threading.Barrier(len(asked), action=observe)

    def ask(prompt: list[int]) -> tuple[int, str | None]:
        # Long answers: those that were placed must not come to their end while others wait for a place.
        body = {"model": "tiny-llama", "prompt": prompt, "max_tokens": 2800, "temperature": 0, "ignore_eos": True,
                "stream": True}  # fmt: skip
        with cluster.http.stream("POST", "/v1/completions", json=body) as response:
            answered.wait(timeout=3 * PATIENCE_S)
            return response.status_code, response.headers.get("retry-after")

    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(ask, asked))
    stop.set()
    observer.join(timeout=PATIENCE_S)
    # Each wants 4000 tokens, and the two decode workers have 16384 each: some fit, and not all.
    assert {code for code, _ in answers} == {200, 429}
    assert all(retry and int(retry) >= 1 for code, retry in answers if code == 429)
    assert any(highest.values())
    assert all(highest[name] <= total[name] for name in total), (highest, total)
    cluster.wait_nothing_held()
