from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from kvpool.channels.links import Links
from kvpool.client import PoolClient
from kvpool.core.links import LinkConfig
from tests.pool.node_process import NodeProcess

#: A link is not given up because this machine was slow for a second.
PATIENT = LinkConfig(probe_timeout_us=60_000_000)


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
        patient = {"timeout_s": 30.0, "links": Links(PATIENT), **options}
        clients.append(PoolClient(node.address, **patient))  # type: ignore[arg-type]
        return clients[-1]

    yield make
    for client in clients:
        client.close()
