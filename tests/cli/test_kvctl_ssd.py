"""What lies on a node's SSD alone, as `kvctl` shows, moves and removes it; and what it says of the SSD itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from kvpool.cli.kvctl import app
from kvpool.client import PoolClient
from kvpool.cluster import ClusterClient
from tests.pool.node_process import BLOCK_BYTES, eventually, namespace_spec, random_blocks
from tests.pool.pool_made import Pool, running_pool

DOMAIN = "checkpoints"
SSD_BYTES = 64 << 20


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    folder = tmp_path_factory.mktemp("pool")
    # From the first block on everything goes down to the SSD.
    options = {"ssd_dir": str(folder), "ssd_bytes": SSD_BYTES, "ssd_demote_from": 0.0}
    with running_pool(folder, ["a", "b"], **options) as pool, ClusterClient(pool.address, timeout_s=60.0) as client:
        assert pool.joined(client, 2)
        yield pool


@pytest.fixture
def below(pool: Pool, request: pytest.FixtureRequest) -> Iterator[tuple[Pool, list[str], np.ndarray]]:
    """Ten blocks and two objects on the SSD of node-0 alone."""
    spec = namespace_spec(request.node.name)
    with PoolClient(pool.nodes["node-0"].address, timeout_s=60.0) as client:
        namespace, objects = client.register(spec), client.register_objects(DOMAIN)
        keys, data = random_blocks(10, [3, *namespace])
        assert client.put(namespace, keys, data).stored.all()
        client.put_objects(objects, ["a/one", "b/two"], [b"1" * 1000, b"2" * 2000])
        # Until the writes that brought them down have let go of them.
        assert eventually(lambda: (client.stats().ssd.records, client.stats().leases) == (12, 0), 60.0)
        evicted = asked(pool, "evict", "--bytes", "1GiB", "--node", "node-0")["evicted"]["node-0"]["blocks"]
        assert evicted == 12 and client.stats().blocks == 0
        yield pool, [key.tobytes().hex() for key in keys], data
    for node in pool.nodes.values():
        with PoolClient(node.address, timeout_s=60.0) as client:
            client.remove_all(client.register(spec))
            client.remove_all(client.register_objects(DOMAIN))
            assert empty(client)


def empty(client: PoolClient) -> bool:
    """Whether a node comes to hold nothing: what was removed under a lease goes with it."""

    def nothing() -> bool:
        stats = client.stats()
        return not (stats.blocks or stats.leases or stats.ssd.records)

    return eventually(nothing, 60.0)


def run(pool: Pool, *arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, list(arguments), env={"KVPOOL_SCHEDULER": pool.address})
    assert done.exit_code == code, (arguments, done.stdout, done.stderr)
    return done.stdout


def asked(pool: Pool, *arguments: str, code: int = 0) -> Any:
    return json.loads(run(pool, *arguments, "--json", code=code))


def held_by(pool: Pool, node: str, keys: list[str], data: np.ndarray, model: str) -> bool:
    """Whether a node gives all blocks as they were put."""
    with PoolClient(pool.nodes[node].address, timeout_s=60.0) as client:
        out = np.zeros_like(data)
        packed = np.frombuffer(bytes.fromhex("".join(keys)), dtype=np.uint8).reshape(-1, 16)
        got = client.get(client.register(namespace_spec(model)), packed, out, ttl_s=60.0)
        return bool(got.found.all() and (out == data).all())


def test_ls_and_inspect_show_what_is_below(below: Any) -> None:
    pool, keys, _ = below
    listed = asked(pool, "ls")["blocks"]
    assert {b["key"] for b in listed if not b["name"]} == set(keys)
    assert {(b["tier"], b["state"], b["node"]) for b in listed} == {("ssd", "readable", "node-0")}
    assert {b["size"] for b in listed if not b["name"]} == {BLOCK_BYTES}
    named = asked(pool, "ls", "--objects", DOMAIN, "--prefix", "a/")["blocks"]
    assert [(b["name"], b["size"]) for b in named] == [("a/one", 1000)]
    assert len(asked(pool, "ls", "--limit", "5")["blocks"]) == 5
    (copy,) = asked(pool, "inspect", keys[0])["copies"]
    assert (copy["tier"], copy["size"], copy["fidelity"]) == ("ssd", BLOCK_BYTES, "exact")
    (copy,) = asked(pool, "inspect", "b/two", "--objects", DOMAIN)["copies"]
    assert (copy["name"], copy["size"]) == ("b/two", 2000)
    assert "ssd" in run(pool, "inspect", keys[0])


def test_copy_and_move_bring_it_up(below: Any, request: pytest.FixtureRequest) -> None:
    pool, keys, data = below
    assert asked(pool, "copy", "--from", "node-0", "--to", "node-1", keys[0])["node-1"]["blocks_done"] == 1
    assert asked(pool, "copy", "--from", "node-0", "--to", "node-1")["node-1"]["blocks_done"] == 12
    assert held_by(pool, "node-1", keys, data, request.node.name)
    moved = asked(pool, "move", "--from", "node-0", "--to", "node-1", "--objects", DOMAIN)["node-1"]
    assert moved["blocks_done"] == 2 and moved["blocks_failed"] == 0
    assert {b["node"] for b in asked(pool, "ls", "--objects", DOMAIN)["blocks"]} == {"node-1"}


def test_drain_says_what_stays_on_the_ssd_and_moves_it_when_told(below: Any, request: pytest.FixtureRequest) -> None:
    pool, keys, data = below
    stayed = asked(pool, "drain", "node-0", "--to", "node-1")["node-0"]
    assert stayed["blocks_done"] == 0 and stayed["message"] == "12 blocks stay on its SSD"
    done = asked(pool, "drain", "node-0", "--to", "node-1", "--ssd")["node-0"]
    assert done["blocks_done"] == 12 and done["blocks_failed"] == 0
    assert not asked(pool, "ls", "--node", "node-0")["blocks"]
    assert held_by(pool, "node-1", keys, data, request.node.name)
    run(pool, "drain", "node-0", "--undo")
    run(pool, "drain", "node-0", "--ssd", code=2)


def test_what_can_not_be_pinned_is_told(below: Any) -> None:
    pool, keys, _ = below
    done = CliRunner().invoke(app, ["pin", keys[0]], env={"KVPOOL_SCHEDULER": pool.address})
    assert done.exit_code == 1 and "SSD alone" in done.stderr


def test_rm_removes_it(below: Any) -> None:
    pool, keys, _ = below
    assert asked(pool, "rm", keys[0], "--node", "node-0")["removed"] == {"node-0": 1}
    assert asked(pool, "rm", "--objects", DOMAIN, "--prefix", "a/", "--yes", "--node", "node-0")["removed"]["node-0"]
    assert len(asked(pool, "ls", "--node", "node-0")["blocks"]) == 10


def test_nodes_tell_the_ssd_from_the_memory(below: Any) -> None:
    pool, *_ = below
    nodes = {node["source"]["source_id"]: node for node in asked(pool, "nodes")["nodes"]}
    ssd = nodes["node-0.ssd"]["stats"]["ssd"]
    assert ssd["state"] == "ok" and ssd["records"] == 12 and ssd["bytes_total"] <= SSD_BYTES
    shown = run(pool, "nodes")
    row = next(line for line in shown.splitlines() if "node-0.ssd" in line)
    assert "of 64.0 MiB" in row, "the SSD's own size, not that of the memory"


def test_an_ssd_that_did_not_open_is_in_the_row_of_its_node(pool: Pool, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    (node,) = pool.start(["c"], ssd_dir=str(blocked), ssd_bytes=SSD_BYTES)
    with ClusterClient(pool.address, timeout_s=60.0) as client:
        assert pool.joined(client, 3)
    try:
        row = next(line for line in run(pool, "nodes").splitlines() if f"{node.name} " in line)
        assert "no SSD" in row
    finally:
        node.kill()
