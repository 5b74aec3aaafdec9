"""All tests: the simulated histories in a process of low priority, beside the others, whose processes wait a lot.

    python tools/run_tests.py                    # as `make test` does
    python tools/run_tests.py tests/gateway -x   # with arguments it is pytest alone

What the histories print comes at the end.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HISTORIES = "tests/simulation"
NICE = 15
STOP_S = 30.0
INTERRUPTED = 130


def main(arguments: Sequence[str]) -> int:
    pytest = [sys.executable, "-m", "pytest"]
    if arguments:
        return subprocess.run([*pytest, *arguments], cwd=ROOT, check=False).returncode
    with tempfile.TemporaryFile() as out:
        beside = subprocess.Popen(
            [*pytest, HISTORIES, "-p", "no:cacheprovider"], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT,
            preexec_fn=partial(os.nice, NICE),
        )  # fmt: skip
        try:
            others = subprocess.run([*pytest, f"--ignore={HISTORIES}"], cwd=ROOT, check=False).returncode
            print(f"{HISTORIES}:", flush=True)
            histories = beside.wait()
        except KeyboardInterrupt:
            return INTERRUPTED
        finally:
            _end(beside)
            out.seek(0)
            sys.stdout.write(out.read().decode(errors="replace"))
    return others or histories


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
