"""What an agent is told of each server, by flag or by file. Pure but for reading the file."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kvpool.core.errors import BadArgument

ROLES = ("prefill", "decode", "both")
HANDOFFS = ("pool", "nixl", "none")


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """One server.

    url: of its HTTP API, without a path.
    id: name of the instance, unique in the cluster; empty = host:port of the url.
    role: what the scheduler may place there.
    events, replay, topic: its ZMQ endpoints for KV events; empty = none: what its cache holds is not known.
    node: host:port of the pool's node on its host, which its connector uses; empty = none.
    handoff: how a prompt's KV gets from it to another instance: through the pool, by vLLM's NixlConnector, or not.
    hash_seed: PYTHONHASHSEED of its process, if that is set.
    batch_max: its --max-num-seqs.
    block_bytes: KV of one block of its cache over all ranks, for predictions; equal for servers that hand over.
    tokenizer: folder or hub id, where the gateway can't use the server's own path.
    host_id: equal for processes that share memory; empty = this agent's host.
    role_changeable: the scheduler may give it another role. It says what is placed there; the server takes no part.
    """

    url: str
    id: str = ""
    role: str = "both"
    events: str = ""
    replay: str = ""
    topic: str = ""
    node: str = ""
    handoff: str = "pool"
    hash_seed: str = ""
    batch_max: int = 256
    block_bytes: int = 2 << 20
    tokenizer: str = ""
    host_id: str = ""
    role_changeable: bool = False

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/"):
            raise BadArgument(f"{self.url!r} is not the address of a server", hint="write http://host:port")
        if self.role not in ROLES:
            raise BadArgument(f"role {self.role!r} is not one of {', '.join(ROLES)}")
        if self.handoff not in HANDOFFS:
            raise BadArgument(f"handoff {self.handoff!r} is not one of {', '.join(HANDOFFS)}")
        if self.replay and not self.events:
            raise BadArgument("replay is of no use without events")
        if self.batch_max < 1 or self.block_bytes < 1:
            raise BadArgument("batch_max and block_bytes must be at least 1")

    @property
    def address(self) -> str:
        """As the gateway calls it."""
        return self.url.rstrip("/")

    @property
    def instance_id(self) -> str:
        return self.id or urlsplit(self.url).netloc


def server_of_flag(text: str) -> ServerSettings:
    """`URL[,name=value]...`. Raises: BadArgument."""
    url, *pairs = text.split(",")
    values: dict[str, Any] = {"url": url}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise BadArgument(f"{pair!r} is not name=value", hint="URL,role=prefill,events=tcp://host:5557")
        values[name.strip()] = _value(name.strip(), value)
    return _server(values)


def _value(name: str, text: str) -> str | int | bool:
    """A setting's value from a flag; what is none stays text, and is refused by its type."""
    if name in ("batch_max", "block_bytes") and text.isdecimal():
        return int(text)
    return text == "true" if name == "role_changeable" and text in ("true", "false") else text


def servers_of_file(path: Path) -> list[ServerSettings]:
    """The `[[server]]` tables of a TOML file. Raises: BadArgument."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadArgument(f"can't read {path}: {error}") from error
    tables = content.get("server")
    if not isinstance(tables, list) or set(content) != {"server"} or not all(isinstance(t, dict) for t in tables):
        raise BadArgument(f"{path} must hold [[server]] tables and nothing else")
    return [_server(table) for table in tables]


def checked(servers: Iterable[ServerSettings]) -> list[ServerSettings]:
    """Raises: BadArgument if there is none, or if two have one name."""
    listed = list(servers)
    if not listed:
        raise BadArgument("no server is named", hint="--server http://host:port, or --servers FILE")
    names = [server.instance_id for server in listed]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BadArgument(f"two servers are called {twice[0]!r}", hint="give one of them an id")
    return listed


def _server(values: Mapping[str, Any]) -> ServerSettings:
    known = {field.name: type(field.default) if field.name != "url" else str for field in fields(ServerSettings)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise BadArgument(f"a server has no setting {unknown[0]!r}", hint=f"known are {', '.join(known)}")
    for name, value in values.items():
        if type(value) is not known[name]:
            raise BadArgument(f"{name} = {value!r}: must be a {known[name].__name__}")
    if "url" not in values:
        raise BadArgument("a server needs a url")
    return ServerSettings(**values)
