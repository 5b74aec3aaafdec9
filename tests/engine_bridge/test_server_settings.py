"""Servers by flag and by file."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.openai_server.settings import ServerSettings, checked, server_of_flag, servers_of_file
from kvpool.core.errors import BadArgument


def test_a_flag() -> None:
    assert server_of_flag("http://h:8000") == ServerSettings("http://h:8000")
    assert server_of_flag("http://h:8000").instance_id == "h:8000"
    told = server_of_flag("http://h:8000/,id=p0,role=prefill,events=tcp://h:5557,batch_max=8,role_changeable=true")
    assert told == ServerSettings("http://h:8000/", "p0", "prefill", "tcp://h:5557", batch_max=8, role_changeable=True)
    assert told.address == "http://h:8000"


def test_a_file(tmp_path: Path) -> None:
    file = tmp_path / "servers.toml"
    file.write_text('[[server]]\nurl = "http://a:1"\n[[server]]\nurl = "http://b:1"\nrole = "decode"\nbatch_max = 4\n')
    assert servers_of_file(file) == [
        ServerSettings("http://a:1"), ServerSettings("http://b:1", role="decode", batch_max=4),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "h:8000", "ftp://h:1", "http://h:1/v1", "http://h:1,role=both,x=1", "http://h:1,role=all", "http://h:1,role",
        "http://h:1,batch_max=0", "http://h:1,batch_max=x", "http://h:1,handoff=udp", "http://h:1,role_changeable=yes",
        "http://h:1,replay=tcp://h:2", "",
    ],
)  # fmt: skip
def test_flags_that_make_no_sense(text: str) -> None:
    with pytest.raises(BadArgument):
        server_of_flag(text)


@pytest.mark.parametrize(
    "text",
    ["", "[server]\nurl='http://a:1'", "[[server]]\nrole='both'", "[[server]]\nurl=5", "[[serv]]", "x", "server=[1]"],
)
def test_files_that_make_no_sense(tmp_path: Path, text: str) -> None:
    (tmp_path / "f").write_text(text)
    with pytest.raises(BadArgument):
        servers_of_file(tmp_path / "f")


def test_names_are_unique() -> None:
    with pytest.raises(BadArgument):
        checked([ServerSettings("http://a:1"), ServerSettings("http://b:1", id="a:1")])
    with pytest.raises(BadArgument):
        checked([])
