"""Processes of a cluster end with their supervisor, also if it ends before they have loaded."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kvpool.cli.processes import _SUPERVISED
from tests.e2e.conftest import PATIENCE_S

pytestmark = pytest.mark.processes

SUPERVISOR = f"""
import os, subprocess, sys
subprocess.Popen([sys.executable, "-c", sys.argv[1]], env={{**os.environ, {_SUPERVISED!r}: str(os.getpid())}})
"""
CHILD = f"""
import os, time
from kvpool.cli.processes import die_with_parent
while os.getppid() == int(os.environ[{_SUPERVISED!r}]):
    time.sleep(0.01)  # as if still loading
die_with_parent()
print("goes on without anybody")
"""


def test_a_process_whose_supervisor_is_gone_when_it_has_loaded_ends() -> None:
    # Returns once the child has ended too: it has the same output.
    done = subprocess.run(
        [sys.executable, "-c", SUPERVISOR, CHILD], capture_output=True, text=True, timeout=2 * PATIENCE_S, check=True
    )
    assert not done.stdout and "Traceback" not in done.stderr
