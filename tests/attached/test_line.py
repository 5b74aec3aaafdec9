"""A line to real nodes: several namespaces, nodes that come and go, and what is left alone for how long."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from engines.attached import line as lines
from engines.attached.line import Bools, Keys, NodeLine
from engines.attached.options import NodeOptions
from engines.attached.quiet_log import QuietLog
from kvpool.channels.base import ChannelError
from kvpool.core.errors import BadArgument, DeadlineExceeded
from kvpool.core.ids import NamespaceId
from kvpool.core.namespace import NamespaceSpec
from tests.pool.node_process import BLOCK_BYTES, NodeProcess, eventually, free_port, namespace_spec

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("kernels")]

#: A machine that does other things too may be slow.
LOOKUP_S, CALL_S = 60.0, 60.0
Connect = Callable[..., NodeLine]


@pytest.fixture
def connect() -> Iterator[Connect]:
    made: list[NodeLine] = []

    def connect(address: str, begin_thread: Callable[[], None] | None = None) -> NodeLine:
        options = NodeOptions.of({"node": address}, {})
        log = logging.getLogger("made.kvpool")
        made.append(NodeLine(options, "test", engine="the engine", log=log, begin_thread=begin_thread))
        return made[-1]

    yield connect
    for one in made:
        one.close()


def known_to_node(line: NodeLine, name: str = "test") -> NamespaceId:
    """A namespace that the node knows."""
    namespace = line.use(namespace_spec(name))
    assert eventually(lambda: line.is_up)
    return namespace


def keys(seed: int, count: int = 4) -> Keys:
    return np.random.default_rng(seed).integers(0, 256, (count, 16), dtype=np.uint8)


def blocks(seed: int, count: int = 4) -> np.ndarray:
    return np.random.default_rng(1000 + seed).integers(0, 256, (count, BLOCK_BYTES), dtype=np.uint8)


def read(line: NodeLine, namespace: bytes, wanted: Keys, **named: float) -> tuple[Bools, np.ndarray]:
    rows = np.zeros((len(wanted), BLOCK_BYTES), dtype=np.uint8)
    return line.get(namespace, 0, 0, wanted, rows, CALL_S, **named), rows  # type: ignore[arg-type]


def there(line: NodeLine, namespace: bytes, wanted: Keys) -> list[bool]:
    return line.lookup(namespace, 0, (0,), wanted, LOOKUP_S).tolist()  # type: ignore[arg-type]


def test_namespaces_come_one_by_one_and_are_known_to_the_next_node_too(
    start_node: Callable[..., NodeProcess], connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "made.kvpool")
    node = start_node(listen=f"127.0.0.1:{free_port()}")
    line = connect(node.address)
    assert not line.is_up and not line.lookup(namespace_spec("one").id(), 0, (0,), keys(1), LOOKUP_S).any()
    one = known_to_node(line, "one")
    other = known_to_node(line, "other")
    assert line.put(one, 0, 0, keys(1), blocks(1), CALL_S).all()
    assert (there(line, one, keys(1)), there(line, other, keys(1))) == ([True] * 4, [False] * 4)
    node.kill()
    assert eventually(lambda: not any(there(line, one, keys(1))) and not line.is_up)
    again = start_node(listen=node.address)
    assert again.address == node.address and eventually(lambda: line.is_up)
    for number, namespace in ((2, one), (3, other)):
        assert line.put(namespace, 0, 0, keys(number), blocks(number), CALL_S).all()
        found, rows = read(line, namespace, keys(number))
        assert found.all() and (rows == blocks(number)).all()
    said = [record.getMessage() for record in caplog.records]
    used = [text.partition("is used, namespace ")[2].partition(":")[0] for text in said if "is used, namespace" in text]
    assert used == [one.hex(), other.hex()] * 2  # once each before and after
    assert sum("is away, the engine computes by itself meanwhile" in text for text in said) == 1


def test_a_namespace_that_can_not_be_is_refused_at_once(connect: Connect) -> None:
    line = connect("127.0.0.1:1")
    with pytest.raises(BadArgument):
        line.use(NamespaceSpec("", "", "", "", "", "", ()))


def test_threads_of_the_client_are_begun_behind_what_the_line_was_told_to_begin_with(
    node: NodeProcess, connect: Connect
) -> None:
    # Others' threads may end at any time.
    before, begun = set(threading.enumerate()), []
    line = connect(node.address, lambda: begun.append([t.name for t in threading.enumerate() if t not in before]))
    known_to_node(line)
    assert begun == [["kvpool-link"]]


def test_rows_and_what_was_there_before(node: NodeProcess, connect: Connect) -> None:
    line = connect(node.address)
    namespace = known_to_node(line, "rows")
    assert line.put(namespace, 0, 0, keys(11), blocks(11), CALL_S, rows=np.array([2, 0, 3, 1])).all()
    assert line.put(namespace, 0, 0, keys(11), blocks(12), CALL_S).all()  # left alone, and there
    found, rows = read(line, namespace, keys(11))
    assert found.all() and (rows == blocks(11)[[2, 0, 3, 1]]).all()
    out = np.zeros((9, BLOCK_BYTES), dtype=np.uint8)
    assert line.get(namespace, 0, 0, keys(11), out, CALL_S, rows=np.array([8, 6, 4, 2])).all()
    assert (out[[8, 6, 4, 2]] == rows).all() and not out[[0, 1, 3, 5, 7]].any()
    none = keys(11, 0)
    assert not len(line.lookup(namespace, 0, (0,), none, LOOKUP_S)) and not len(read(line, namespace, none)[0])
    assert line.clear(namespace) == 4 and not any(there(line, namespace, keys(11)))


@pytest.mark.parametrize("error", [ChannelError("too slow"), DeadlineExceeded("too slow")])
def test_what_took_too_long_rests_and_the_end_of_less_than_a_fair_time_says_nothing(
    node: NodeProcess, connect: Connect, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(lines, "MOVE_REST_S", 600.0)
    line = connect(node.address)
    namespace = known_to_node(line, f"slow {type(error).__name__}")
    seed = 20 + 2 * isinstance(error, ChannelError)
    mine, other = keys(seed), keys(seed + 1)
    assert line.put(namespace, 0, 0, mine, blocks(21), CALL_S).all()

    def fails(*arguments: object, **named: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(line._client, "get", fails)
        assert not read(line, namespace, mine, fair_s=2 * CALL_S)[0].any()
    assert line.is_up and all(there(line, namespace, mine)) and read(line, namespace, mine)[0].all()
    with monkeypatch.context() as patched:
        patched.setattr(line._client, "put", fails)
        assert not line.put(namespace, 0, 0, other, blocks(22), CALL_S).any()
    # Stores rest, and nothing else does.
    assert not line.put(namespace, 0, 0, other, blocks(22), CALL_S).any()
    assert all(there(line, namespace, mine)) and read(line, namespace, mine)[0].all()
    with monkeypatch.context() as patched:
        patched.setattr(line._client, "get", fails)
        assert not read(line, namespace, mine, fair_s=CALL_S / 2)[0].any()
    assert line.is_up and not any(there(line, namespace, mine)) and not read(line, namespace, mine)[0].any()


def test_what_nobody_expects_is_a_miss_and_ends_no_thread(
    node: NodeProcess, connect: Connect, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    line = connect(node.address)
    namespace = known_to_node(line, "broken")
    line.quiet = QuietLog(logging.getLogger("made.kvpool"), interval_s=600.0)

    def broken(*arguments: object, **named: object) -> None:
        raise RuntimeError("unforeseen")

    with monkeypatch.context() as patched:
        for name in ("lookup", "get", "put", "remove_all", "register"):
            patched.setattr(line._client, name, broken)
        for _ in range(3):
            assert not any(there(line, namespace, keys(31))) and not read(line, namespace, keys(31))[0].any()
            assert not line.put(namespace, 0, 0, keys(31), blocks(31), CALL_S).any()
            assert not line.shows(namespace, 0, 0, keys(31)).any() and line.clear(namespace) is None
        line.use(namespace_spec("another"))
    assert line._thread.is_alive() and line.is_up
    said = [record.getMessage() for record in caplog.records if "unforeseen" in record.getMessage()]
    assert len(said) == 2 and all("not meant to happen" in text for text in said)
    assert line.put(namespace, 0, 0, keys(31), blocks(31), CALL_S).all()


def test_after_its_end_a_line_finds_nothing(node: NodeProcess, connect: Connect) -> None:
    line = connect(node.address)
    namespace = known_to_node(line, "ended")
    assert line.put(namespace, 0, 0, keys(41), blocks(41), CALL_S).all()
    line.close()
    assert not line.is_up and not line._thread.is_alive()
    assert not any(there(line, namespace, keys(41))) and not read(line, namespace, keys(41))[0].any()
    assert not line.put(namespace, 0, 0, keys(42), blocks(42), CALL_S).any()
    line.use(namespace_spec("late"))  # waits for nobody
    assert not line.is_up
