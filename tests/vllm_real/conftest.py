"""Needs the real vLLM (`make test-engines`); without it these tests skip themselves.

A server takes half a minute to start: those that tests can share are started once, and all at the same time.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

from tests.vllm_real.serving import Servers, running_servers


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("vllm") is None:
        for item in items:
            if "vllm_real" in str(item.path):
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed here: make test-engines"))


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """One server without a connector, one to prefill and one to decode on a node of theirs. Leave them running."""
    with running_servers(tmp_path_factory.mktemp("servers")) as started:
        yield started
