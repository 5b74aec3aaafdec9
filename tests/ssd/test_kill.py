"""kill -9 in the middle of whatever the writer was doing, again and again on the same files."""

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from kvpool.tiers.ssd.store import SsdStore

from .records_made import content, read_all

SEED = 5


@pytest.mark.processes
def test_killed_writers_lose_nothing_that_they_acknowledged(tmp_path):
    rng = np.random.default_rng(SEED)
    possible, version = {}, 0
    for round_ in range(4):
        lines = run_and_kill(tmp_path, round_, version, int(rng.integers(2, 120)))
        for line in lines:
            verb, *rest = line.split()
            words = [int(word) for word in rest]
            if verb in ("putting", "put"):
                version, size, *numbers = words
                for number in numbers:
                    value = (version, size)
                    possible[number] = {value} if verb == "put" else possible.get(number, {None}) | {value}
            else:
                for number in words:
                    possible[number] = {None} if verb == "removed" else possible.get(number, {None}) | {None}
        version += 1
        store = SsdStore.open(tmp_path, "k", 64 << 20)
        for number, data in read_all(store, sorted(possible)).items():
            right = [
                value for value in possible[number] if (content(number, *value).tobytes() if value else None) == data
            ]
            assert right, f"seed {SEED}, round {round_}: {number} is none of {possible[number]}"
            possible[number] = set(right)
        assert store.audit() == ()
        store.close()


def run_and_kill(folder, seed, version, count):
    """All that the process said; it is killed once it has said `count` things."""
    command = [sys.executable, "-m", "tests.ssd.writer_process", str(folder), str(seed), str(version)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2], text=True)
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    lines = []
    for line in process.stdout:
        lines.append(line)
        if len(lines) == count:
            process.kill()
    watchdog.cancel()
    process.wait(60)
    assert lines[0] == "ready\n"
    # The last line may have been cut off.
    return [line for line in lines[1:] if line.endswith("\n")]
