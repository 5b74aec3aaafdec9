"""What a cluster on one machine is made of: segments that nobody will come back for, names, ports."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest
import typer

from kvpool.cli.local import LocalOptions, metrics_ports, node_name, remove_orphans
from kvpool.cli.serving import check_port
from kvpool.service.node import NodeConfig, open_memory


def test_only_segments_without_an_owner_are_removed(tmp_path: Path) -> None:
    orphan, owned = tmp_path / "kvpool-node-local-1-a.segment", tmp_path / "kvpool-node-local-2-b.segment"
    others = [tmp_path / "kvpool-node-0-c.segment", tmp_path / "something.else"]
    for path in (orphan, owned, *others):
        path.write_bytes(b"x")
    with owned.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        remove_orphans(tmp_path)
        assert not orphan.exists()
        assert owned.exists() and all(path.exists() for path in others)
    remove_orphans(tmp_path / "missing")


def test_the_node_of_an_ssd_folder_keeps_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    there = node_name(LocalOptions("m", ssd_dir=str(tmp_path / "ssd")))
    assert there == node_name(LocalOptions("m", ssd_dir="ssd")) != node_name(LocalOptions("m", ssd_dir="other"))
    assert there != node_name(LocalOptions("m"))


def test_metrics_have_ports_in_a_row() -> None:
    assert metrics_ports(LocalOptions("m", prefill=2, decode=1, metrics_port=9700)) == [9700, 9701, 9702, 9703, 9704]
    assert not metrics_ports(LocalOptions("m"))


def test_a_port_that_there_is_not_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """As the last of several in a row may be."""
    with pytest.raises(typer.Exit):
        check_port("127.0.0.1", 65_536, "--metrics-port")
    assert "--metrics-port" in capsys.readouterr().err


def test_clients_are_told_the_whole_path_of_a_segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    segment, _ = open_memory(NodeConfig(segment_dir=".", memory_bytes=4 << 20))
    try:
        assert segment.path.is_absolute() and segment.path.parent == tmp_path
    finally:
        segment.close()
