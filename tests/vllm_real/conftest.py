"""Needs the real vLLM (`make test-engines`); without it these tests skip themselves."""

from __future__ import annotations

import importlib.util

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("vllm") is None:
        for item in items:
            if "vllm_real" in str(item.path):
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed here: make test-engines"))
