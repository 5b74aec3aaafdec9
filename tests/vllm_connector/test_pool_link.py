"""The line to a real node that hangs, dies, comes back, is not there, or is of another version."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from engines.attached import line as lines
from engines.attached.line import Int64s
from engines.attached.quiet_log import QuietLog
from engines.vllm.pool_link import PoolLink, log
from engines.vllm.prefixes import Bools, Keys
from engines.vllm.settings import ConnectorSettings
from kvpool.core.namespace import GroupKind, GroupSpec, NamespaceSpec
from kvpool.service.client_writes import Lot
from tests.pool.node_process import stand_still
from tests.vllm_real.serving import Node, Process, free_port, start

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("kernels")]

BLOCK_BYTES, WAIT_S = 1 << 16, 60.0
SPEC = NamespaceSpec(
    model="m", revision="", dtype="float32", backend="test", layout="test", hash="sha256/1",
    groups=(GroupSpec(id=0, kind=GroupKind.FULL, layers=(0,), block_tokens=16, shard_count=2, section_count=1,
                      block_bytes=BLOCK_BYTES, window_tokens=0),),
)  # fmt: skip
#: As the defaults are, a slow machine would compute what it could load.
PATIENT = {"lookup_timeout_ms": 20_000, "load_timeout_s": 20.0}
#: A node that speaks another version of the protocol.
OTHER_VERSION = """
import sys, kvpool.service.rpc as rpc
rpc.PROTOCOL = "99"
from kvpool.cli.main import app
sys.argv = ["kvpool", "node", "--id", "other", "--listen", sys.argv[1], "--memory", "16MiB"]
app()
"""


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    one = Node(tmp_path, "16MiB")
    yield one
    one.process.stop()


@pytest.fixture
def connect() -> Iterator[Callable[..., PoolLink]]:
    links: list[PoolLink] = []

    def make(address: str, *, there: bool = True, **settings: object) -> PoolLink:
        links.append(PoolLink(ConnectorSettings.of({"node": address, **PATIENT, **settings}, {}), SPEC, "test"))
        if there:
            until(lambda: links[-1].is_up)
        return links[-1]

    yield make
    for link in links:
        link.close()


def keys(first: int, count: int) -> Keys:
    return np.random.default_rng(first).integers(0, 256, (16, 16), dtype=np.uint8)[:count]


def content(first: int, count: int) -> np.ndarray:
    return np.random.default_rng(1000 + first).integers(0, 256, (count, BLOCK_BYTES), dtype=np.uint8)


def whole(blocks: np.ndarray) -> Callable[[Int64s], list[Lot]]:
    """All of some blocks as one lot."""
    return lambda rows: [(rows, blocks, rows)]


def read(link: PoolLink, wanted: Keys, shard: int = 0, timeout_s: float = 20.0) -> tuple[Bools, np.ndarray]:
    rows = np.zeros((len(wanted), BLOCK_BYTES), dtype=np.uint8)
    return link.get(0, shard, wanted, rows, timeout_s), rows


def until(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline_s
        threading.Event().wait(0.02)


def test_what_is_stored_is_found_in_all_shards_only(node: Node, connect: Callable[..., PoolLink]) -> None:
    link = connect(node.address)
    assert link.put(0, 0, keys(1, 4), whole(content(1, 4))) == 4
    assert link.put(0, 1, keys(1, 3), whole(content(2, 3))) == 3
    assert link.lookup(0, range(2), keys(1, 4)).tolist() == [True, True, True, False]
    assert link.shows(0, 0, keys(1, 4)).all() and not link.shows(0, 0, keys(5, 4)).any()
    found, rows = read(link, keys(1, 4))
    assert found.all() and (rows == content(1, 4)).all()


def test_what_is_kept_is_known_once_the_index_was_seen(node: Node, connect: Callable[..., PoolLink]) -> None:
    link = connect(node.address)
    assert link.keeps(0, range(1), keys(1, 4)).all()  # nothing was ever seen: it may be out of sight
    link.put(0, 0, keys(1, 2), whole(content(1, 2)))
    assert link.keeps(0, range(1), keys(1, 4)).tolist() == [True, True, False, False]
    assert not link.keeps(0, range(1), keys(9, 4)).any()


def test_a_node_that_hangs_costs_a_moment(
    node: Node, connect: Callable[..., PoolLink], caplog: pytest.LogCaptureFixture
) -> None:
    link = connect(node.address, lookup_timeout_ms=50)
    link.put(0, 0, keys(1, 4), whole(content(1, 4)))
    stand_still(node.process.popen)
    try:
        # What the index in shared memory shows is there, hung or not, and so are the bytes.
        assert link.lookup(0, range(1), keys(1, 4)).all()
        found, rows = read(link, keys(1, 4))
        assert found.all() and (rows == content(1, 4)).all()
        assert not link.lookup(0, range(2), keys(9, 3)).any()
        assert link.is_up
    finally:
        node.process.popen.send_signal(signal.SIGCONT)
    assert not [record for record in caplog.records if "is away" in record.getMessage()]


def test_a_node_that_hangs_is_not_asked_all_the_time(
    tmp_path: Path, connect: Callable[..., PoolLink], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an SSD a miss of the index is not the end: the node is asked, and vLLM's scheduler waits for it."""
    for rest in ("ASK_REST_S", "MOVE_REST_S"):
        monkeypatch.setattr(lines, rest, 600.0)
    (tmp_path / "ssd").mkdir()
    node = Node(tmp_path, "16MiB", ["--ssd-dir", str(tmp_path / "ssd"), "--ssd-size", "64MiB"])
    asked = 0
    try:
        link = connect(node.address, lookup_timeout_ms=50, load_timeout_s=0.2)
        link.put(0, 0, keys(1, 4), whole(content(1, 4)))
        look = link._line._client.lookup

        def counted(*arguments: object, ask: bool, **named: object) -> Bools:
            nonlocal asked
            asked += ask
            return look(*arguments, ask=ask, **named)  # type: ignore[arg-type]

        link._line._client.lookup = counted  # type: ignore[method-assign]
        stand_still(node.process.popen)
        found = [link.lookup(0, range(1), np.concatenate([keys(1, 4), keys(9, 3)])).tolist() for _ in range(20)]
        assert found == [[True] * 4 + [False] * 3] * 20
        assert asked == 1 and link.is_up
        # A load that no index can settle ends in time, and is not tried again at once.
        assert not read(link, keys(9, 3), timeout_s=0.05)[0].any()
        assert link.lookup(0, range(1), keys(1, 4)).all()  # the end of a step's time says nothing about the node
        assert not read(link, keys(9, 3), timeout_s=0.2)[0].any()
        assert not link.lookup(0, range(1), keys(1, 4)).any()
    finally:
        node.process.popen.send_signal(signal.SIGCONT)
        node.process.stop()
    said = [record.getMessage() for record in caplog.records]
    assert any("takes more than 50 ms to say what it has" in text for text in said)


def test_a_node_that_dies_and_comes_back(
    node: Node, connect: Callable[..., PoolLink], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vllm.kvpool")
    link = connect(node.address)
    link.put(0, 0, keys(1, 4), whole(content(1, 4)))
    node.process.stop(signal.SIGKILL)

    def is_away() -> bool:
        link.lookup(0, range(1), keys(1, 4))
        return not link.is_up

    until(is_away)
    assert not read(link, keys(1, 4))[0].any() and link.put(0, 0, keys(2, 1), whole(content(2, 1))) == 0
    assert not link.lookup(0, range(1), keys(1, 4)).any()
    node.start()
    until(lambda: link.is_up)
    # Its memory outlives it; what is found is what was stored.
    found, rows = read(link, keys(1, 4))
    assert (rows[found] == content(1, 4)[found]).all()
    assert link.put(0, 0, keys(3, 2), whole(content(3, 2))) == 2 and read(link, keys(3, 2))[0].all()
    said = [record.getMessage() for record in caplog.records]
    assert sum("is away" in text for text in said) == 1
    assert sum("is used, namespace" in text and "blocks of full 16 tokens" in text for text in said) == 2


def test_a_node_of_another_version(
    tmp_path: Path, connect: Callable[..., PoolLink], caplog: pytest.LogCaptureFixture
) -> None:
    address = f"127.0.0.1:{free_port()}"
    other: Process = start([sys.executable, "-c", OTHER_VERSION, address], tmp_path / "other.log")
    try:
        until(lambda: "ready" in other.text.lower() or other.popen.poll() is not None)
        other.must_run()
        link = connect(address, there=False)

        def told() -> list[str]:
            said = [record.getMessage() for record in caplog.records if record.name == "vllm.kvpool"]
            return [text for text in said if "speaks protocol 99" in text]

        until(lambda: bool(told()))
        assert not link.is_up and not link.lookup(0, range(1), keys(1, 2)).any()
        (said,) = told()
        assert f"kvpool node {address} can't be used, vLLM computes by itself meanwhile" in said
    finally:
        other.stop()


def test_a_bug_of_ours_does_not_end_vllm(
    node: Node, connect: Callable[..., PoolLink], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    link = connect(node.address)
    link._line.quiet = QuietLog(log, interval_s=600.0)

    def broken(*arguments: object, **named: object) -> None:
        raise RuntimeError("unforeseen")

    for name in ("lookup", "get", "put", "put_lots"):
        monkeypatch.setattr(link._line._client, name, broken)
    for _ in range(3):
        assert not link.lookup(0, range(1), keys(1, 2)).any() and not read(link, keys(1, 2))[0].any()
        assert link.put(0, 0, keys(1, 2), whole(content(1, 2))) == 0 and not link.shows(0, 0, keys(1, 2)).any()
    assert link.is_up
    assert [record.getMessage() for record in caplog.records if "unforeseen" in record.getMessage()] == [
        "kvpool: RuntimeError('unforeseen'), which is not meant to happen"
    ]
