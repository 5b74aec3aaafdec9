"""Nodes for any test, random histories that don't depend on the machine's pace, and how long each part took."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvpool.core.kernels import copying, probing
from tests.pool.node_process import NodeProcess

try:
    from hypothesis import HealthCheck, settings
except ImportError:
    pass  # a Python with a GPU may have no more than pytest
else:
    # How long an example takes says nothing: the machine may be busy, or compiling.
    settings.register_profile(
        "any pace", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
    )
    settings.load_profile("any pace")


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
    """One for all tests of a file that leave it alone, each of which has names of its own, or empties it."""
    made = NodeProcess(tmp_path_factory.mktemp("node"), memory_bytes=64 << 20)
    yield made
    made.kill()


@pytest.fixture(scope="session")
def kernels() -> None:
    """Compiles what connectors load when they begin: they go on without it after a while, and a test would not."""
    copying.warm_up()
    probing.warm_up()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How long each part of the suite took (docs/testing.md has a table)."""
    tests: dict[str, set[str]] = defaultdict(set)
    seconds: dict[str, float] = defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                part = Path(report.nodeid.split("::")[0]).parent.name
                tests[part].add(report.nodeid)
                seconds[part] += report.duration
    if len(tests) > 1:
        terminalreporter.section("seconds by part")
        for part in sorted(tests):
            terminalreporter.write_line(f"{part:<16} {len(tests[part]):>6} tests {seconds[part]:>8.0f} s")
