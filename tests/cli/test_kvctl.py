"""The commands of `kvctl`, against a pool of real processes."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from kvpool.cli.kvctl import app
from kvpool.cli.kvctl.options import parse_seconds
from kvpool.cli.kvctl.settings import link_data
from kvpool.cli.kvctl.top import Sample, rates
from kvpool.client import PoolClient
from kvpool.cluster import ClusterClient
from kvpool.v1 import block_source_pb2, source_admin_pb2
from tests.pool.node_process import BLOCK_BYTES, eventually, namespace_spec, random_blocks
from tests.pool.pool_made import Pool, running_pool

DOMAIN = "files"


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    with (
        running_pool(tmp_path_factory.mktemp("pool"), ["host-a", "host-b"]) as pool,
        ClusterClient(pool.address, timeout_s=60.0) as client,
    ):
        assert pool.joined(client, 2)
        yield pool


@pytest.fixture
def filled(pool: Pool, request: pytest.FixtureRequest) -> Iterator[tuple[Pool, PoolClient, list[str], np.ndarray]]:
    """Ten blocks and two objects on node-0, none on node-1."""
    with PoolClient(pool.nodes["node-0"].address, timeout_s=60.0) as client:
        namespace = client.register(namespace_spec(request.node.name))
        objects = client.register_objects(DOMAIN)
        keys, data = random_blocks(10, [1, *namespace])
        client.put(namespace, keys, data)
        client.put_objects(objects, ["a/one", "b/two"], [b"1" * 1000, b"2" * 2000])
        yield pool, client, [key.tobytes().hex() for key in keys], data
    for node in pool.nodes.values():
        with PoolClient(node.address, timeout_s=60.0) as client:
            client.remove_all(client.register(namespace_spec(request.node.name)))
            client.remove_all(client.register_objects(DOMAIN))
            assert empty(client)


def empty(client: PoolClient) -> bool:
    """Whether a node comes to hold nothing: leases and what was removed under them go a moment after their session."""

    def nothing() -> bool:
        stats = client.stats()
        return not (stats.blocks or stats.leases or stats.pins)

    return eventually(nothing, 60.0)


def run(*arguments: str, code: int = 0, scheduler: str = "127.0.0.1:1", words: str = "") -> str:
    """Runs kvctl in this process; its output."""
    done = CliRunner().invoke(app, list(arguments), env={"KVPOOL_SCHEDULER": scheduler})
    assert isinstance(done.exception, SystemExit | None), done.exc_info
    assert done.exit_code == code, (arguments, done.stdout, done.stderr)
    assert words in done.stderr, done.stderr
    return done.stdout


def data_of(pool: Pool, *arguments: str, code: int = 0) -> Any:
    return json.loads(run(*arguments, "--json", scheduler=pool.address, code=code))


def test_ls_and_inspect(filled: Any) -> None:
    pool, client, keys, _ = filled
    blocks = data_of(pool, "ls")["blocks"]
    assert {b["key"] for b in blocks if not b["name"]} == set(keys) and {b["node"] for b in blocks} == {"node-0"}
    assert all(b["size"] == BLOCK_BYTES and b["tier"] == "dram" for b in blocks if not b["name"])
    names = data_of(pool, "ls", "--objects", DOMAIN, "--prefix", "a/")["blocks"]
    assert [(b["name"], b["size"]) for b in names] == [("a/one", 1000)]
    assert len(data_of(pool, "ls", "--limit", "3")["blocks"]) == 3
    assert not data_of(pool, "ls", "--node", "node-1")["blocks"]
    assert keys[0] in run("ls", scheduler=pool.address)

    (copy,) = data_of(pool, "inspect", keys[0])["copies"]
    assert copy["node"] == "node-0" and copy["state"] == "readable" and copy["leases"] == 0
    assert len(copy["digests"]) == 4 and all(len(bytes.fromhex(d)) == 8 for d in copy["digests"])
    (named,) = data_of(pool, "inspect", "b/two", "--objects", DOMAIN)["copies"]
    assert named["size"] == 2000 and named["name"] == "b/two" and len(named["digests"]) == 1
    assert not data_of(pool, "inspect", "00" * 16, code=1)["copies"]
    assert eventually(lambda: client.stats().leases == 0, 60.0)


def test_names_are_shown_not_obeyed(filled: Any) -> None:
    pool, client, *_ = filled
    names = ["[bold]not bold[/bold]", "[/nothing]", "red\x1b[31m", "line\nbreak"]
    client.put_objects(client.register_objects(DOMAIN), names, [b"x"] * 4, tenant="[/t]")
    shown = run("ls", "--objects", DOMAIN, scheduler=pool.address)
    assert "[bold]not bold[/bold]" in shown and "[/nothing]" in shown and "[/t]" in shown
    assert "\x1b[31m" not in shown and "line\nbreak" not in shown
    listed = {b["name"] for b in data_of(pool, "ls", "--objects", DOMAIN)["blocks"]}
    assert listed >= set(names), "as JSON they are exact"


def test_pins_through_one_node_without_a_scheduler(filled: Any) -> None:
    pool, client, keys, _ = filled
    node = pool.nodes["node-0"].address
    run("pin", keys[0], keys[1], "--owner", "me", "--ttl", "2h", "--node", node)
    (pin,) = json.loads(run("pins", "--node", node, "--json"))["pins"]
    assert pin["owner"] == "me" and pin["kind"] == "soft" and pin["blocks"] == 2
    assert 7_000_000 < pin["expires_in_ms"] <= 7_200_000
    run("evict", keys[0], "--node", node, code=1, words="held")
    run("pin", "a/one", "--objects", DOMAIN, "--ttl", "0", "--owner", "me", "--node", "node-0", scheduler=pool.address)
    assert client.stats().pins_detached == 2
    assert data_of(pool, "unpin", "--owner", "me")["released"] == {"node-0": 2, "node-1": 0}
    run("unpin", "--owner", "me", "--node", node, code=1, words="kvctl pins")
    assert client.stats().pins == 0


def test_evict_and_rm(filled: Any) -> None:
    pool, _, keys, _ = filled
    assert data_of(pool, "evict", keys[0])["evicted"]["node-0"]["blocks"] == 1
    assert data_of(pool, "rm", keys[1])["removed"] == {"node-0": 1, "node-1": 0}
    run("rm", keys[1], scheduler=pool.address, code=1, words="kvctl ls")
    run("rm", "--objects", DOMAIN, "--all", scheduler=pool.address, code=2, words="--yes")
    assert data_of(pool, "rm", "--objects", DOMAIN, "--prefix", "a/", "--yes")["removed"]["node-0"] == 1
    assert data_of(pool, "rm", "--objects", DOMAIN, "--all", "--yes")["removed"] == {"node-0": 1, "node-1": 0}
    assert data_of(pool, "evict", "--bytes", "64KiB", "--node", "node-0")["evicted"]["node-0"]["blocks"] >= 2
    assert len(data_of(pool, "ls")["blocks"]) <= 6


def test_evict_passes_over_nodes_that_never_heard_of_the_domain(pool: Pool) -> None:
    with PoolClient(pool.nodes["node-0"].address, timeout_s=60.0) as client:
        domain = client.register_objects("known on one node")
        client.put_objects(domain, ["x"], [b"1"])
        evicted = data_of(pool, "evict", "x", "--objects", "known on one node")["evicted"]
    assert {name: counts["blocks"] for name, counts in evicted.items()} == {"node-0": 1, "node-1": 0}


def test_copy_move_verify(filled: Any) -> None:
    pool, _, keys, data = filled
    done = data_of(pool, "copy", "--from", "node-0", "--to", "node-1", keys[0], keys[1])["node-1"]
    assert done["blocks_done"] == 2 and done["bytes_done"] == 2 * BLOCK_BYTES and done["done"]
    assert [c["node"] for c in data_of(pool, "inspect", keys[0])["copies"]] == ["node-0", "node-1"]
    moved = data_of(pool, "move", "--from", "node-0", "--to", "node-1", "--objects", DOMAIN)["node-1"]
    assert moved["blocks_done"] == 2
    assert {b["node"] for b in data_of(pool, "ls", "--objects", DOMAIN)["blocks"]} == {"node-1"}
    assert data_of(pool, "verify")["node-0"]["blocks_bad"] == 0
    with pool.nodes["node-0"].segment.open("r+b") as file:
        at = file.read().index(data[3, 500:564].tobytes())
        file.seek(at)
        file.write(b"\0" * 64)
    assert data_of(pool, "verify", code=1)["node-0"]["blocks_bad"] == 1
    assert not data_of(pool, "inspect", keys[3], code=1)["copies"]
    address = pool.nodes["node-1"].address
    run("copy", "--from", address, "--to", address, code=2, words="both")
    run("copy", "--from", address, "--to", "127.0.0.1:1", code=3, words="no node answers")


def test_drain(filled: Any) -> None:
    pool, client, *_ = filled
    assert data_of(pool, "drain", "node-0", "--to", "node-1")["node-0"]["blocks_done"] == 12
    assert client.stats().blocks == 0 and client.stats().draining
    assert data_of(pool, "drain", "node-0", "--undo")["node-0"]["done"]
    assert not client.stats().draining
    assert "no new blocks" in run("drain", "node-0", scheduler=pool.address)
    assert "again" in run("drain", "node-0", "--undo", scheduler=pool.address)


def test_quota_namespaces_links(filled: Any) -> None:
    pool, *_ = filled
    assert data_of(pool, "quota", "--tenant", "t", "--max", "1MiB")["quotas"][0]["bytes_max"] == 1 << 20
    assert len(data_of(pool, "quota")["quotas"]) == 2
    assert not data_of(pool, "quota", "--tenant", "t", "--max", "0")["quotas"]
    run("quota", "--max", "1MiB", scheduler=pool.address, code=2, words="name one")
    known = data_of(pool, "namespaces")["namespaces"]
    assert {n["spec"]["model"] for n in known if n["blocks"]} >= {DOMAIN}
    assert f"objects of {DOMAIN}" in run("namespaces", scheduler=pool.address)
    data_of(pool, "copy", "--from", "node-0", "--to", "node-1")
    links = data_of(pool, "links")["links"]
    assert any(link["from"] == "node-1" and link["to"] == "node-0" for link in links)
    assert "node-0" in run("links", scheduler=pool.address)


def test_bench_leaves_nothing(pool: Pool) -> None:
    arguments = ("bench", "--node", "node-0", "--size", "64KiB", "--count", "16", "--repeat", "2", "--channel", "tcp")
    done = data_of(pool, *arguments)
    figures = {figure["operation"]: figure for figure in done["figures"]}
    assert set(figures) == {"memcpy", "put", "get", "lookup", "lookup of one"} and done["channel"] == "tcp"
    assert all(figures[name]["gb_per_s"] > 0 for name in ("memcpy", "put", "get"))
    assert all(figures[name]["keys_per_s"] > 0 for name in ("lookup", "lookup of one"))
    assert "GB/s" in run(*arguments, scheduler=pool.address)
    with PoolClient(pool.nodes["node-0"].address, timeout_s=60.0) as client:
        assert empty(client)
    run("bench", scheduler=pool.address, code=2, words="--node")
    run("bench", "--node", "node-0", "--channel", "pigeon", scheduler=pool.address, code=1, words="pigeon")


def test_bench_evicts_nothing_unless_told(filled: Any) -> None:
    pool, client, *_ = filled
    evicted = client.stats().evictions
    # The node has 32 MiB, of which ten blocks and two objects take some.
    bench = ("bench", "--node", "node-0", "--size", "1MiB", "--repeat", "1")
    run(*bench, "--count", "32", scheduler=pool.address, code=2, words="--yes")
    run(*bench, "--count", "33", "--yes", scheduler=pool.address, code=2, words="all memory")
    assert client.stats().blocks == 12 and client.stats().evictions == evicted
    assert data_of(pool, *bench, "--count", "24", "--yes")["blocks"] == 24


def test_what_was_never_measured_of_a_link_is_none() -> None:
    unused = link_data(source_admin_pb2.LinkInfo(kind="tcp", state="up", age_ms=5))
    assert (unused["latency_us"], unused["bytes_per_s"], unused["age_ms"]) == (None, None, None)
    small = link_data(source_admin_pb2.LinkInfo(kind="tcp", state="up", age_ms=5, transfers=3, latency_us=200.0))
    assert (small["latency_us"], small["bytes_per_s"], small["age_ms"]) == (200.0, None, 5)


def test_top_once(filled: Any) -> None:
    pool, *_ = filled
    nodes = {row["node"]: row for row in data_of(pool, "top", "--once", "--interval", "0.1")["nodes"]}
    assert nodes["node-0"]["blocks"] == 12 and nodes["node-1"]["blocks"] == 0
    assert nodes["node-0"]["hits_per_s"] == 0 and not nodes["node-0"]["draining"]
    run("top", "--json", scheduler=pool.address, code=2, words="--once")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("ls",), 3, "kvpool serve"),
        (("ls", "--node", "127.0.0.1:1"), 3, "no node answers"),
        (("inspect",), 2, "--text"),
        (("inspect", "xyz"), 2, "32 hex digits"),
        (("pin",), 2, "--objects"),
        (("pin", "00" * 16, "--ttl", "30d", "--node", "127.0.0.1:1"), 2, "7 days"),
        (("rm",), 2, "--all"),
        (("rm", "--all"), 2, "--namespace"),
        (("rm", "--prefix", "x"), 2, "--objects"),
        (("evict",), 2, "--bytes"),
        (("unpin", "--pin", "3"), 2, "--node"),
        (("drain", "node-0", "--undo", "--to", "x"), 2, "--undo"),
        (("ls", "--namespace", "12"), 2, "kvctl namespaces"),
        (("verify", "--rate", "fast", "--node", "127.0.0.1:1"), 2, "not a size"),
    ],
)
def test_wrong_usage_says_what_to_do(arguments: tuple[str, ...], code: int, words: str) -> None:
    run(*arguments, code=code, words=words)


def test_an_unknown_node_is_told_with_the_known(pool: Pool) -> None:
    run("ls", "--node", "node-9", scheduler=pool.address, code=1, words="node-0, node-1")


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("500ms", 0.5), ("10m", 600), ("1.5h", 5400), ("7d", 604_800), ("0", 0)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_seconds(text) == pytest.approx(seconds)


def test_rates_are_of_what_happened_between() -> None:
    def sample(at_s: float, **counts: int) -> Sample:
        return Sample(at_s, block_source_pb2.SourceStats(**counts))

    row = rates(sample(10, hits=100, misses=50, blocks=3), sample(12, hits=160, misses=70, blocks=9))
    assert (row["hits_per_s"], row["misses_per_s"], row["hit_ratio"], row["blocks"]) == (30, 10, 0.75, 9)
    restarted = rates(sample(10, hits=100), sample(12, hits=4))
    assert restarted["hits_per_s"] == 2
    assert rates(sample(10), Sample(12, None, "gone")) == {"error": "gone"}
    assert rates(Sample(10, None, "gone"), sample(12, hits=5))["hits_per_s"] == 0


def test_progress_is_silent_without_a_terminal(filled: Any) -> None:
    pool, *_ = filled
    done = subprocess.run(
        [sys.executable, "-m", "kvpool.cli.kvctl", "verify", "--scheduler", pool.address], capture_output=True,
        text=True, timeout=250, check=True,
    )  # fmt: skip
    assert done.stderr == "" and "node-0" in done.stdout


class OnTerminal:
    """`kvctl` as a process whose stdin and stderr are a terminal."""

    def __init__(self, *arguments: str) -> None:
        self._terminal, inner = os.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kvpool.cli.kvctl", *arguments], stdin=inner, stdout=inner, stderr=inner,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "160"}, start_new_session=True,
            # Whoever runs these tests in the background ignores it, and so would their children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        os.close(inner)
        self.shown = b""

    def wait_for(self, text: bytes) -> None:
        """Reads what is shown until `text` is in it."""
        while text not in self.shown:
            ready = select.select([self._terminal], [], [], 60)[0]
            assert ready, self.shown
            self.shown += os.read(self._terminal, 65_536)

    def type(self, text: bytes) -> None:
        os.write(self._terminal, text)

    def end(self) -> int:
        """Its exit code."""
        with contextlib.suppress(OSError):  # how a terminal says that nobody is at its other end
            while select.select([self._terminal], [], [], 60)[0] and (some := os.read(self._terminal, 65_536)):
                self.shown += some
        code = self.process.wait(60)
        os.close(self._terminal)
        return code


def test_top_lives_until_q(filled: Any) -> None:
    pool, *_ = filled
    top = OnTerminal("top", "--scheduler", pool.address, "--interval", "0.2")
    top.wait_for(b"node-1")
    top.type(b"xq")
    assert top.end() == 0


def test_progress_on_a_terminal_and_an_interruption(filled: Any) -> None:
    pool, client, *_ = filled
    # At this pace it would take an hour.
    verify = OnTerminal("verify", "--node", "node-0", "--rate", "100B", "--scheduler", pool.address)
    verify.wait_for(b"verifying node-0")
    verify.process.send_signal(signal.SIGINT)
    assert verify.end() == 130
    shown = verify.shown.decode(errors="replace")
    assert "interrupted after" in shown and "Traceback" not in shown, shown
    assert eventually(lambda: client.stats().pins == 0, 60.0)
