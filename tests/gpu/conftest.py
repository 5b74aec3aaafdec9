from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engines.torch.model import LoadedModel, model_from_config
from tests.engine.conftest import CONFIGS
from tests.gpu.device import DEVICE, missing

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder needs a device, tests that are defined elsewhere too."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session", autouse=True)
def _device() -> None:
    """Before the fixtures that put something on the device."""
    if reason := missing():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def models() -> dict[str, LoadedModel]:
    """Those of the engine's own tests, on the device."""
    device = torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device(DEVICE)
    made = {name: model_from_config(config, seed=3, name=name) for name, config in CONFIGS.items()}
    return {name: replace(m, module=m.module.to(device), device=device) for name, m in made.items()}


@pytest.fixture(scope="session")
def llama(models: dict[str, LoadedModel]) -> LoadedModel:
    return models["llama"]
