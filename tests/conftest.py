"""At the end of a run: how long each part of the suite took (docs/testing.md has a table of it)."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
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
