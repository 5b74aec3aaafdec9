"""The simulator knows no clock, no network and no chance but that of its seed."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import scheduler.simulator

FOLDER = Path(scheduler.simulator.__file__).parent
BANNED = ("time", "asyncio", "os", "socket", "threading", "logging", "subprocess", "grpc", "torch", "kvpool.service")


@pytest.mark.parametrize("module", sorted(FOLDER.rglob("*.py")), ids=lambda path: path.stem)
def test_a_module_imports_nothing_that_two_runs_could_differ_by(module: Path) -> None:
    tree = ast.parse(module.read_text())
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            assert not any(name == banned or name.startswith(f"{banned}.") for banned in BANNED), name
            assert not name.startswith("scheduler.") or name.split(".")[1] in ("core", "simulator"), name
            assert not name.startswith("kvpool.") or name.split(".")[1] == "core", name
