"""Golden scripts through the scheduler core; see scheduler_scripts.py for how to read and rewrite them."""

from __future__ import annotations

from pathlib import Path

import pytest
from scheduler_scripts import run_file

SCRIPTS = sorted((Path(__file__).parent / "testdata").glob("*.txt"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_script(path: Path) -> None:
    expected, actual = run_file(path)
    assert actual == expected


def test_there_are_scripts() -> None:
    assert len(SCRIPTS) >= 6
