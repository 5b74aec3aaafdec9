"""What a deployment may set of any connector, out of the mapping in which its engine hands settings over."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from kvpool.channels.tls import TlsConfig
from kvpool.core.errors import BadArgument

#: Address of a node where none is given.
NODE_DEFAULT = "127.0.0.1:7701"


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """The settings that every connector has; each name is a key of the mapping. Subclasses add their own.

    Numbers are durations and bounds, so all must be above 0.

    node: host:port of the pool's node on this host. Default: the environment's KVPOOL_NODE, else 127.0.0.1:7701.
    credential: what the node wants to see, if it wants to. Default: the environment's KVPOOL_CREDENTIAL.
    tls_ca, tls_cert, tls_key: files, where the node speaks TLS.
    model_id: what identifies the model's weights in the pool. Default: a digest of its files.
    """

    #: What the mapping is called where people write it.
    WRITTEN_IN: ClassVar[str] = "the settings"

    node: str = ""
    credential: str = ""
    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    model_id: str = ""

    @classmethod
    def of(cls, given: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> Self:
        """Raises: BadArgument for a name that is none of ours, or a value of another type or range."""
        known = {field.name: type(field.default) for field in fields(cls)}
        unknown = sorted(name for name in given if name not in known)
        if unknown:
            raise BadArgument(
                f"{cls.WRITTEN_IN} has unknown settings: {', '.join(unknown)}", hint=f"known are {', '.join(known)}"
            )
        values: dict[str, Any] = {
            "node": environment.get("KVPOOL_NODE", ""),
            "credential": environment.get("KVPOOL_CREDENTIAL", ""),
        }
        for name, value in given.items():
            values[name] = _checked(name, value, known[name])
        values["node"] = values["node"] or NODE_DEFAULT
        host, colon, port = values["node"].rpartition(":")
        if not (host and colon and port.isdigit()):
            raise BadArgument(f"node must be host:port, not {values['node']!r}")
        return cls(**values)

    def tls(self) -> TlsConfig | None:
        return TlsConfig.of_files(self.tls_cert, self.tls_key, self.tls_ca)


def _checked(name: str, value: Any, wanted: type) -> Any:
    if wanted is float and type(value) is int:
        value = float(value)
    if type(value) is not wanted:
        raise BadArgument(f"{name} must be of type {wanted.__name__}, not {value!r}")
    if isinstance(value, int | float) and wanted is not bool and not value > 0:
        raise BadArgument(f"{name} must be above 0, not {value!r}")
    return value
