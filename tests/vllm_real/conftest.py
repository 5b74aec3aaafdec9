"""Needs the real vLLM (`make test-engines`); without it these tests skip themselves.

A server takes half a minute to start: those that tests can share are started once, and all at the same time.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

from tests.vllm_real.serving import Servers, running_servers

#: Seconds for a test and the servers that it starts, on a machine that does other things too.
TEST_S = 1500


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = importlib.util.find_spec("vllm") is None
    for item in items:
        if "vllm_real" in str(item.path):
            item.add_marker(pytest.mark.timeout(TEST_S))
            if missing:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed here: make test-engines"))
    # Last, so that nobody else's servers have to share the memory with theirs.
    items.sort(key=lambda item: "servers" in getattr(item, "fixturenames", ()) and "vllm_real" in str(item.path))


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """One server without a connector, one to prefill and one to decode on a node of theirs. Leave them running."""
    with running_servers(tmp_path_factory.mktemp("servers")) as started:
        yield started
