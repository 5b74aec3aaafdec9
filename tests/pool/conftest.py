from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from kvpool.client import PoolClient
from tests.pool.node_process import NodeProcess


@pytest.fixture(scope="module")
def shared_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """One node for all tests of a module that leave nothing behind."""
    node = NodeProcess(tmp_path_factory.mktemp("node"))
    yield node
    assert node.stop() == 0
    assert not node.segment.exists()


@pytest.fixture
def connect() -> Iterator[Callable[..., PoolClient]]:
    """Makes clients; all are closed with the test."""
    clients: list[PoolClient] = []

    def make(node: NodeProcess, **options: object) -> PoolClient:
        clients.append(PoolClient(node.address, **{"timeout_s": 10.0, **options}))  # type: ignore[arg-type]
        return clients[-1]

    yield make
    for client in clients:
        client.close()
