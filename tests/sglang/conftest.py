from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.pool.node_process import NodeProcess
from tests.sglang import real_sglang


@pytest.fixture
def start_node(tmp_path: Path) -> Iterator[Callable[..., NodeProcess]]:
    """Starts nodes; all are ended with the test."""
    nodes: list[NodeProcess] = []

    def start(**options: object) -> NodeProcess:
        nodes.append(NodeProcess(tmp_path, **options))
        return nodes[-1]

    yield start
    for node in nodes:
        if node.process.poll() is None:
            node.kill()


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """One for all tests of a file, each of which has pages of its own."""
    made = NodeProcess(tmp_path_factory.mktemp("node"))
    yield made
    made.kill()


@pytest.fixture(scope="session")
def sglang() -> None:
    """Skips a test where the real SGLang is not installed."""
    if missing := real_sglang.why_not():
        pytest.skip(missing)
    real_sglang.prepare()
