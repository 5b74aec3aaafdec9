"""TLS with real certificates from end to end: every role, the libraries, `kvctl`, and what goes between nodes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from typer.testing import CliRunner

from kvpool.channels.tls import TlsConfig
from kvpool.cli.kvctl import app
from kvpool.cli.local import LocalCluster, LocalOptions
from kvpool.cli.main import app as kvpool
from kvpool.cli.processes import Supervisor
from kvpool.client import PoolClient
from kvpool.cluster import ClusterClient
from kvpool.core.errors import Unavailable
from kvpool.service import rpc
from kvpool.v1 import scheduler_pb2, scheduler_pb2_grpc
from tests.channels.certificates import authority, certificate
from tests.pool.node_process import eventually, namespace_spec, random_blocks
from tests.pool.pool_made import HostedNode

MODEL = Path(__file__).resolve().parents[1] / "models" / "tiny-llama"


@dataclass(frozen=True)
class Files:
    """What a process is started with."""

    cert: str
    key: str
    ca: str

    def environment(self) -> dict[str, str]:
        named = {"CERT": self.cert, "KEY": self.key, "CA": self.ca}
        return {f"KVPOOL_TLS_{name}": file for name, file in named.items()}

    def config(self) -> TlsConfig:
        config = TlsConfig.of_files(self.cert, self.key, self.ca)
        assert config is not None
        return config


def files(signed_by: str = "ours", trusts: str = "ours") -> Files:
    cert, key = certificate(signed_by, "process")
    return Files(str(cert), str(key), str(authority(trusts) / "ca.pem"))


@dataclass(frozen=True)
class Encrypted:
    """A scheduler and two nodes that say that they are on hosts of their own, all of one authority."""

    scheduler: str
    nodes: tuple[HostedNode, ...]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Encrypted]:
    folder, mine = tmp_path_factory.mktemp("encrypted"), files()
    with ExitStack() as stack:
        supervisor = stack.enter_context(Supervisor(folder, mine.environment()))
        process = supervisor.start("scheduler", ["scheduler", "--listen", "127.0.0.1:0"])
        scheduler = process.wait_ready(120)["address"]
        nodes = []
        for name in ("a", "b"):
            options = {"tls_cert": mine.cert, "tls_key": mine.key, "tls_ca": mine.ca}
            node = HostedNode(folder, f"host-{name}", id=name, scheduler=scheduler, **options)
            stack.callback(node.kill)
            nodes.append(node)
        yield Encrypted(scheduler, tuple(nodes))


def kvctl(pool: Encrypted, mine: Files | None, *arguments: str, code: int = 0, words: str = "") -> str:
    env = {"KVPOOL_SCHEDULER": pool.scheduler, **(mine.environment() if mine is not None else {})}
    done = CliRunner().invoke(app, list(arguments), env=env)
    assert done.exit_code == code, (arguments, done.stdout, done.stderr)
    assert words in done.stderr, done.stderr
    return done.stdout


def test_one_of_several_schedulers_is_known_by_its_own_name(pool: Encrypted) -> None:
    """A certificate names one process, never the whole list."""
    for several in (f"127.0.0.1:1,{pool.scheduler}", f"{pool.scheduler},127.0.0.1:1"):
        with ClusterClient(several, timeout_s=60.0, tls=files().config()) as cluster:

            def joined(cluster: ClusterClient = cluster) -> bool:
                cluster.refresh()
                return cluster.nodes() == ["a", "b"]

            assert eventually(joined, 60.0)
        listed = json.loads(kvctl(replace(pool, scheduler=several), files(), "nodes", "--json"))
        assert len(listed["nodes"]) == 2


def test_blocks_go_through_every_way_encrypted(pool: Encrypted) -> None:
    mine = files()
    first, second = pool.nodes
    with ClusterClient(pool.scheduler, timeout_s=60.0, tls=mine.config(), channels=("tcp",)) as cluster:

        def joined() -> bool:
            cluster.refresh()
            return cluster.nodes() == ["a", "b"]

        assert eventually(joined, 60.0)
        namespace = cluster.register(namespace_spec())
        keys, data = random_blocks(8, [2, *namespace])
        assert cluster.put(namespace, keys, data, replicas=2).stored.all()
        out = np.zeros_like(data)
        assert cluster.get(namespace, keys, out).found.all() and (out == data).all()
        assert cluster.remove(namespace, keys)
    with PoolClient(first.address, timeout_s=60.0, channels=("tcp",), tls=mine.config()) as client:
        namespace = client.register(namespace_spec())
        client.put(namespace, keys, data)
        assert client.channel == "tcp"
        copied = json.loads(kvctl(pool, mine, "copy", "--from", "a", "--to", "b", "--json"))["b"]
        assert copied["blocks_done"] == len(keys)
        # From node to node over tcp: their segments are of different hosts.
        (link,) = [x for x in json.loads(kvctl(pool, mine, "links", "--node", "b", "--json"))["links"]
                   if (x["from"], x["kind"]) == ("b", "tcp")]  # fmt: skip
        assert link["bytes"] == data.nbytes
    with PoolClient(second.address, timeout_s=60.0, channels=("tcp",), tls=mine.config()) as client:
        client.register(namespace_spec())
        out = np.zeros_like(data)
        assert client.get(namespace, keys, out).found.all() and (out == data).all()
    drained = json.loads(kvctl(pool, mine, "drain", "b", "--to", "a", "--json"))["b"]
    assert drained["blocks_done"] == len(keys)
    kvctl(pool, mine, "drain", "b", "--undo")
    kvctl(pool, mine, "bench", "--node", "a", "--size", "64KiB", "--count", "4", "--repeat", "1", "--channel", "tcp")


def test_who_has_no_certificate_or_a_foreign_one_is_told_what_to_do(pool: Encrypted) -> None:
    kvctl(pool, None, "nodes", code=3, words="--tls-ca")
    kvctl(pool, files(signed_by="theirs"), "nodes", code=3, words="--tls-cert")
    kvctl(pool, files(trusts="theirs"), "nodes", code=3, words="of no authority that is trusted here")
    kvctl(pool, None, "nodes", "--tls-ca", files().ca, code=3, words="--tls-key")
    kvctl(pool, None, "nodes", "--tls-cert", files().cert, code=2, words="--tls-cert needs --tls-key")
    kvctl(pool, None, "nodes", "--tls-key", files().key, code=2, words="--tls-key needs --tls-cert")
    kvctl(pool, None, "nodes", "--tls-ca", "no-such-file", code=2, words="no-such-file")
    kvctl(pool, files(), "nodes", "--scheduler", pool.scheduler.replace("127.0.0.1", "localhost"), code=3, words="name")
    for tls in (None, files(signed_by="theirs").config()):
        with PoolClient(pool.nodes[0].address, timeout_s=60.0, tls=tls) as client, pytest.raises(Unavailable) as caught:
            client.stats()
        assert "--tls" in caught.value.hint


@pytest.mark.parametrize("role", ["node", "scheduler"])
def test_a_server_needs_its_own_certificate(role: str) -> None:
    done = CliRunner().invoke(kvpool, [role, "--listen", "127.0.0.1:0", "--tls-ca", files().ca])
    assert done.exit_code == 2 and "--tls-cert and --tls-key" in done.stderr, done.stderr


def test_a_plain_server_is_told_from_one_that_does_not_answer(tmp_path: Path) -> None:
    with Supervisor(tmp_path) as supervisor:
        address = supervisor.start("scheduler", ["scheduler", "--listen", "127.0.0.1:0"]).wait_ready(120)["address"]
        mine = files().environment() | {"KVPOOL_SCHEDULER": address}
        done = CliRunner().invoke(app, ["status"], env=mine)
        assert done.exit_code == 3 and "does not speak TLS" in done.stderr, done.stderr


@pytest.mark.processes
def test_a_whole_cluster_serves_encrypted(tmp_path: Path) -> None:
    mine = files()
    options = LocalOptions(
        model=str(MODEL), prefill=1, decode=1, memory_bytes=128 << 20, kv_tokens=4096, tls=mine.config(),
        hbm_staging_bytes=8 << 20, deterministic=True,
    )  # fmt: skip
    with LocalCluster(options, tmp_path / "logs") as cluster:
        body = {
            "model": "tiny-llama",
            "prompt": "import os\n" * 40,
            "max_tokens": 8,
            "kvpool": {"policy": "always_split"},
        }
        reply = httpx.post(f"{cluster.gateway_url}/v1/completions", json=body, timeout=250)
        assert reply.status_code == 200, reply.text
        assert reply.json()["usage"]["completion_tokens"] == 8
        with rpc.make_channel(cluster.scheduler_address, tls=mine.config()) as channel:
            status = scheduler_pb2_grpc.SchedulerStub(channel).GetStatus(scheduler_pb2.GetStatusRequest())
        assert status.instances_alive == 2 and status.splits == 1
