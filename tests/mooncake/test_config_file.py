"""The configuration that users of Mooncake have, compared with Mooncake's own reader where it is here."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.mooncake.config_file import MooncakeConfig, parse_bool, parse_size
from tests.mooncake.stores import mooncake_folder

LEAST = {"local_hostname": "here", "metadata_server": "P2PHANDSHAKE", "master_server_address": "127.0.0.1:7701"}


def written(folder: Path, **fields: Any) -> str:
    path = folder / "mooncake.json"
    path.write_text(json.dumps({**LEAST, **fields}))
    return str(path)


def test_a_file_with_the_least(tmp_path: Path) -> None:
    config = MooncakeConfig.from_file(written(tmp_path))
    assert (config.protocol, config.global_segment_size, config.tenant_id) == ("tcp", 3355443200, "default")


def test_a_file_with_more(tmp_path: Path) -> None:
    path = written(tmp_path, global_segment_size="2.5GB", local_buffer_size=1024, protocol=" RDMA ", tenant_id=None,
                   enable_ssd_offload="yes", client_http_port="9400", somebody_elses=1)  # fmt: skip
    config = MooncakeConfig.from_file(path)
    assert (config.global_segment_size, config.local_buffer_size) == (5 << 29, 1024)
    assert (config.protocol, config.enable_ssd_offload, config.client_http_port) == ("rdma", True, 9400)


@pytest.mark.parametrize(
    "wrong", [{"local_hostname": ""}, {"global_segment_size": -1}, {"global_segment_size": "many"}, {"protocol": ""},
              {"enable_ssd_offload": "perhaps"}, {"master_server_address": None}],
)  # fmt: skip
def test_mistakes_are_named(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        MooncakeConfig.from_file(written(tmp_path, **wrong))


def test_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOONCAKE_CONFIG_PATH", raising=False)
    monkeypatch.delenv("MOONCAKE_MASTER", raising=False)
    with pytest.raises(ValueError, match="MOONCAKE_MASTER"):
        MooncakeConfig.load_from_env()
    monkeypatch.setenv("MOONCAKE_MASTER", "127.0.0.1:1")
    monkeypatch.setenv("MOONCAKE_LOCAL_BUFFER_SIZE", "1k")
    config = MooncakeConfig.load_from_env()
    assert (config.master_server_address, config.local_buffer_size, config.local_hostname) == (
        "127.0.0.1:1", 1024, "localhost",
    )  # fmt: skip
    monkeypatch.setenv("MOONCAKE_CONFIG_PATH", written(tmp_path))
    assert MooncakeConfig.load_from_env().master_server_address == LEAST["master_server_address"]


@pytest.fixture(scope="module")
def theirs() -> ModuleType:
    folder = mooncake_folder()
    if not folder:
        pytest.skip("no Mooncake to compare with: set MOONCAKE_FOLDER")
    spec = importlib.util.spec_from_file_location("real_mooncake_config", f"{folder}/mooncake/mooncake_config.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


words = st.sampled_from(["1", "1.5", "3", "0", "", "12 ", " 7"])
units = st.sampled_from(["", "b", "k", "KB", "m", "Mb", "g", "GB", " gb", "t", "tb", "x"])


@settings(deadline=None)
@given(st.one_of(st.integers(0, 1 << 40), st.builds(lambda word, unit: word + unit, words, units)))
def test_sizes_are_read_as_mooncake_reads_them(theirs: ModuleType, value: int | str) -> None:
    try:
        expected = theirs._parse_segment_size(value)
    except ValueError:
        with pytest.raises(ValueError):
            parse_size(value)
    else:
        assert parse_size(value) == expected


@settings(deadline=None)
@given(st.sampled_from([True, False, 0, 1, None, "true", "No", " ON ", "", "perhaps", "disable", "ENABLE"]))
def test_words_are_read_as_mooncake_reads_them(theirs: ModuleType, value: Any) -> None:
    try:
        expected = theirs._parse_bool(value)
    except ValueError:
        with pytest.raises(ValueError):
            parse_bool(value)
    else:
        assert parse_bool(value) == expected


def test_the_fields_are_theirs(theirs: ModuleType, tmp_path: Path) -> None:
    path = written(tmp_path, global_segment_size="1gb", enable_ssd_offload=True, ssd_offload_path="/tmp/x")
    assert dataclasses.asdict(MooncakeConfig.from_file(path)) == dataclasses.asdict(
        theirs.MooncakeConfig.from_file(path)
    )
