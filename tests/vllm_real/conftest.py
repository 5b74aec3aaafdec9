"""Needs the real vLLM (`make test-engines`); without it these tests skip themselves.

A server takes half a minute to start: those that tests can share are started once, and all at the same time. Nothing
here asserts how fast something is: what depends on the pace of a machine is waited for, at most some minutes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

from tests.vllm_real.clusters import Cluster, Servers, cluster

#: Seconds for a test and the servers that it starts, on a machine that does other things too.
TEST_S = 2400


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = importlib.util.find_spec("vllm") is None
    for item in items:
        if "vllm_real" in str(item.path):
            item.add_marker(pytest.mark.timeout(TEST_S))
            if missing:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed here: make test-engines"))
    items.sort(key=_place)


def _place(item: pytest.Item) -> int:
    """Tests without the shared servers first, so that theirs do not share the memory; last those that spoil them."""
    if "vllm_real" not in str(item.path):
        return 0
    if item.path.name == "test_losses.py":
        return 2
    return int(not {"served", "servers"}.isdisjoint(getattr(item, "fixturenames", ())))


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A gateway over two servers on one node, and a server without a connector that says what is right."""
    with cluster(tmp_path_factory.mktemp("cluster")) as made:
        yield made


@pytest.fixture(scope="session")
def servers(served: Cluster) -> Servers:
    """Those of the cluster, to be asked directly."""
    prefill, decode = (server.engine for server in served.servers)
    return Servers(served.node, served.plain, prefill, decode)
