"""The repository keeps its own rules: layers, generated code, an installable wheel, no foreign paths."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str, cwd: Path = ROOT, **more: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False, **more)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def tracked(*patterns: str) -> list[Path]:
    listing = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.stdout.splitlines()]


def test_generated_code_is_fresh() -> None:
    run(sys.executable, "tools/generate_proto.py", "--check")


def test_wheel_installs_and_imports_from_elsewhere(tmp_path: Path) -> None:
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path), str(ROOT))
    (wheel,) = tmp_path.glob("kvpool-*.whl")
    venv.create(tmp_path / "env", system_site_packages=False, with_pip=False)
    python = str(tmp_path / "env" / "bin" / "python")
    # The base dependencies are taken from this environment; kvpool itself only from the wheel.
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path / "site"), str(wheel))
    site = next(p for p in sys.path if p.endswith("site-packages"))
    program = (
        "import sys; sys.path[:0] = [sys.argv[1]]; sys.path.append(sys.argv[2])\n"
        "import kvpool, kvpool.client, kvpool.service.node, scheduler.core.core, scheduler.service.server, engines\n"
        "assert 'torch' not in sys.modules, 'the base install must not need torch'\n"
        "for m in (kvpool, scheduler, engines): assert m.__path__[0].startswith(sys.argv[1]), m.__path__\n"
        "from kvpool.v1 import scheduler_pb2_grpc\n"
        "print(kvpool.__version__)\n"
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    run(python, "-c", program, str(tmp_path / "site"), site, cwd=elsewhere, env=env)


def test_no_paths_of_a_machine() -> None:
    # Written so that this file does not match itself.
    foreign = re.compile("/(" + "|".join(["wo" + "rk", "ro" + "ot", "ho" + "me"]) + r")/[a-z.]")
    bad = [
        f"{path.relative_to(ROOT)}: {line.strip()[:100]}"
        for path in tracked("*.py", "*.md", "*.toml", "*.txt", "Makefile", "*.yaml", "*.service", ".ci/run")
        for line in path.read_text(encoding="utf-8").splitlines()
        if foreign.search(line)
    ]
    assert not bad, bad


def test_modules_stay_readable() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in tracked("kvpool/*.py", "scheduler/*.py", "engines/*.py")
        if not path.name.endswith(("_pb2.py", "_pb2_grpc.py"))
        and (lines := len(path.read_text(encoding="utf-8").splitlines())) > 450
    }
    assert not long, long
