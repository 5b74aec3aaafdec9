"""What a deployment may set, under `kv_connector_extra_config` of vLLM's `--kv-transfer-config`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from kvpool.core.errors import BadArgument

#: Address of a node where none is given.
NODE_DEFAULT = "127.0.0.1:7701"


@dataclass(frozen=True, slots=True)
class ConnectorSettings:
    """One connector's settings; each name is a key of the extra config.

    node: host:port of the pool's node on this host. Default: the environment's KVPOOL_NODE, else 127.0.0.1:7701.
    credential: what the node wants to see, if it wants to. Default: the environment's KVPOOL_CREDENTIAL.
    tls_ca, tls_cert, tls_key: files, where the node speaks TLS.
    model_id: what identifies the model's weights in the pool. Default: a digest of its files.
    load, save: whether blocks are read from the pool and stored there.
    lookup_timeout_ms: how long vLLM's scheduler may wait for an answer about a prompt.
    handoff_wait_s: how long a request waits for blocks that another engine has announced to be on their way.
    load_timeout_s: how long a step may wait for all its loads together before what is missing is computed.
    """

    node: str = ""
    credential: str = ""
    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    model_id: str = ""
    load: bool = True
    save: bool = True
    lookup_timeout_ms: int = 100
    load_timeout_s: float = 2.0
    handoff_wait_s: float = 1.0

    @classmethod
    def of(cls, extra_config: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> ConnectorSettings:
        """Raises: BadArgument for a name that is none of ours, or a value of another type."""
        known = {field.name: field for field in fields(cls)}
        unknown = sorted(name for name in extra_config if name not in known)
        if unknown:
            raise BadArgument(
                f"kv_connector_extra_config has unknown settings: {', '.join(unknown)}",
                hint=f"known are {', '.join(known)}",
            )
        values: dict[str, Any] = {
            "node": environment.get("KVPOOL_NODE", ""),
            "credential": environment.get("KVPOOL_CREDENTIAL", ""),
        }
        for name, value in extra_config.items():
            values[name] = _checked(name, value, type(known[name].default))
        values["node"] = values["node"] or NODE_DEFAULT
        settings = cls(**values)
        settings._validate()
        return settings

    def _validate(self) -> None:
        host, colon, port = self.node.rpartition(":")
        if not (host and colon and port.isdigit()):
            raise BadArgument(f"node must be host:port, not {self.node!r}")
        for name in ("lookup_timeout_ms", "load_timeout_s", "handoff_wait_s"):
            if not getattr(self, name) > 0:
                raise BadArgument(f"{name} must be above 0, not {getattr(self, name)!r}")


def _checked(name: str, value: Any, wanted: type) -> Any:
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not wanted:
        raise BadArgument(f"{name} must be of type {wanted.__name__}, not {value!r}")
    return value
