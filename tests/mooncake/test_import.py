"""How `mooncake.store` comes to be kvpool's, and what is said where a real Mooncake is there too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engines.mooncake.shadowing import SHIM, distribution_of, real_package

ROOT = str(Path(__file__).parents[2])


def python(*arguments: str, path: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*path, ROOT])}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=100, check=False
    )


@pytest.fixture
def real(tmp_path: Path) -> str:
    """A folder with what looks like a real Mooncake."""
    package = tmp_path / "mooncake"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "store_native.so").write_bytes(b"")
    (package / "store.py").write_text("")
    metadata = tmp_path / "mooncake_transfer_engine-9.9.9.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: mooncake-transfer-engine\nVersion: 9.9.9\n")
    return str(tmp_path)


def test_the_printed_folder_makes_it_ours() -> None:
    printed = python("-m", "engines.mooncake", "path", path=[])
    assert printed.returncode == 0 and printed.stdout.strip() == str(SHIM)
    checked = python("-m", "engines.mooncake", "check", path=[str(SHIM)])
    assert checked.returncode == 0 and "is kvpool's" in checked.stdout
    code = "import mooncake, mooncake.store, mooncake.mooncake_config, mooncake.async_store; print(mooncake.store)"
    imported = python("-c", code, path=[str(SHIM)])
    assert str(SHIM) in imported.stdout and imported.stderr == ""


def test_a_real_one_that_is_shadowed_is_named(real: str) -> None:
    imported = python("-c", "import mooncake.store", path=[str(SHIM), real])
    assert imported.returncode == 0
    assert "mooncake-transfer-engine 9.9.9" in imported.stderr and "shadowed" in imported.stderr
    assert real_package([str(SHIM), real]) == Path(real, "mooncake")
    assert distribution_of(Path(real, "mooncake")) == "mooncake-transfer-engine 9.9.9"
    assert real_package([str(SHIM)]) is None


def test_where_the_real_one_comes_first_check_says_so(real: str) -> None:
    checked = python("-m", "engines.mooncake", "check", path=[real, str(SHIM)])
    assert checked.returncode == 1 and "not kvpool's" in checked.stdout


def test_in_a_program_of_ones_own(real: str) -> None:
    code = "import engines.mooncake.as_mooncake; import mooncake.store as s; print(s.MooncakeDistributedStore)"
    imported = python("-c", code, path=[])
    assert "engines.mooncake.store.MooncakeDistributedStore" in imported.stdout
    late = python("-c", "import mooncake.store; import engines.mooncake.as_mooncake", path=[real])
    assert late.returncode and "before engines.mooncake.as_mooncake" in late.stderr


def test_the_asynchronous_store_awaits_the_same_calls() -> None:
    code = (
        "import asyncio\n"
        "from mooncake.async_store import MooncakeDistributedStoreAsync as Store\n"
        "store = Store()\n"
        "print(asyncio.run(store.async_is_exist('a')), asyncio.run(store.async_get('a')), store.get('a'))\n"
        "try: store.async_nothing\n"
        "except AttributeError as error: print(error)\n"
    )
    ran = python("-c", code, path=[str(SHIM)])
    assert ran.stdout.splitlines()[0] == "-600 b'' b''" and "async_nothing" in ran.stdout
