"""`kvpool` and `kvctl` from the outside: help, versions, configuration, wrong usage."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvpool import __version__
from kvpool.cli import kvctl, main, output

APPS = {"kvpool": main.app, "kvctl": kvctl.app}
MODULES = {"kvpool": "kvpool.cli.main", "kvctl": "kvpool.cli.kvctl"}


def run(program: str, *arguments: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", MODULES[program], *arguments],
        capture_output=True, text=True, timeout=250, check=False, cwd=cwd, env={**os.environ, **env},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("program", "commands"),
    [
        ("kvpool", ["serve", "node", "scheduler", "gateway", "worker", "demo"]),
        ("kvctl", ["status", "nodes", "ls", "inspect", "drain", "explain"]),
    ],
)
def test_help_names_every_command(program: str, commands: list[str]) -> None:
    done = run(program, "--help")
    assert done.returncode == 0
    assert all(command in done.stdout for command in commands)
    for command in commands:
        shown = CliRunner().invoke(APPS[program], [command, "--help"])
        assert shown.exit_code == 0 and "Usage" in shown.stdout


@pytest.mark.parametrize("program", ["kvpool", "kvctl"])
def test_version(program: str) -> None:
    assert run(program, "--version").stdout.strip() == f"{program} {__version__}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["node", "--memory", "lots"], "not a size"),
        (["node", "--memory", "1KiB", "--listen", "127.0.0.1:0"], "memory"),
        (["node", "--segment-dir", "nowhere", "--listen", "127.0.0.1:0"], "--segment-dir"),
        (["scheduler", "--policy", "psychic", "--listen", "127.0.0.1:0"], "psychic"),
        (["worker", "--model", "./no-such-model", "--listen", "127.0.0.1:0"], "no-such-model"),
        (["worker", "--model", ".", "--role", "king"], "king"),
        (["serve", "--model", ".", "--decode", "0"], "--decode 1"),
        (["--log-level", "loud", "node"], "loud"),
        (["demo", "--model", "./no-such-model"], "no-such-model"),
        (["launch"], "No such command"),
    ],
)
def test_wrong_usage_says_what_to_do(arguments: list[str], words: str, tmp_path: Path) -> None:
    done = run("kvpool", *arguments, cwd=tmp_path)
    assert done.returncode not in (0, -9)
    assert words in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_a_config_file_names_its_mistakes(tmp_path: Path) -> None:
    config = tmp_path / "kvpool.toml"
    config.write_text("[emperor]\nlisten = 'x'\n")
    done = run("kvpool", "--config", str(config), "node")
    assert done.returncode == 2 and "emperor" in done.stderr and "scheduler" in done.stderr
    config.write_text("[node]\nmemroy = '1GiB'\n")
    done = run("kvpool", "--config", str(config), "node")
    assert done.returncode == 2 and "memroy" in done.stderr and "memory" in done.stderr
    config.write_text("not toml at all")
    done = run("kvpool", "--config", str(config), "node")
    assert done.returncode == 2 and "kvpool.toml" in done.stderr


def test_config_file_environment_and_flag_share_one_spelling(tmp_path: Path) -> None:
    config = tmp_path / "kvpool.toml"
    config.write_text("[node]\nmemory = 'from the file'\n")
    assert "from the file" in run("kvpool", "--config", str(config), "node").stderr
    env = {"KVPOOL_NODE_MEMORY": "from the environment"}
    assert "from the environment" in run("kvpool", "--config", str(config), "node", **env).stderr
    flags = ["--memory", "from the flag"]
    assert "from the flag" in run("kvpool", "--config", str(config), "node", *flags, **env).stderr


def test_shadowed_packages_are_named(tmp_path: Path) -> None:
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "__init__.py").write_text("")
    done = run("kvpool", "node", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert str(tmp_path / "scheduler") in done.stderr and "PYTHONPATH" in done.stderr


@pytest.mark.parametrize(("text", "size"), [("4096", 4096), ("1KiB", 1024), ("2 GB", 2 * 10**9), ("1.5MiB", 3 << 19)])
def test_sizes(text: str, size: int) -> None:
    assert output.parse_size(text) == size
