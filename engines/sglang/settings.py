"""What a deployment may set, in SGLang's `--hicache-storage-backend-extra-config`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from kvpool.core.errors import BadArgument

#: Address of a node where none is given.
NODE_DEFAULT = "127.0.0.1:7701"
#: Keys of the extra config that are SGLang's own.
OF_SGLANG = frozenset(
    (
        "backend_name", "module_path", "class_name", "interface_v1", "extra_backend_tag", "tp_lcm_size",
        "prefetch_threshold", "prefetch_timeout_base", "prefetch_timeout_per_ki_token",
        "hicache_storage_pass_prefix_keys",
    )
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class BackendSettings:
    """One backend's settings; each name is a key of the extra config.

    node: host:port of the pool's node on this host. Default: the environment's KVPOOL_NODE, else 127.0.0.1:7701.
    credential: what the node wants to see, if it wants to. Default: the environment's KVPOOL_CREDENTIAL.
    tls_ca, tls_cert, tls_key: files, where the node speaks TLS.
    model_id: what identifies the model's weights in the pool. Default: a digest of its files.
    tenant: whose quota the pages count against.
    lookup_timeout_ms: how long a question about a prompt may take; what is not answered counts as absent.
    load_timeout_s, store_timeout_s: how long one call of SGLang's may take to read or store its pages.
    """

    node: str = ""
    credential: str = ""
    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    model_id: str = ""
    tenant: str = ""
    lookup_timeout_ms: int = 500
    load_timeout_s: float = 5.0
    store_timeout_s: float = 10.0

    @classmethod
    def of(cls, extra_config: Mapping[str, Any] | None, environment: Mapping[str, str] = os.environ) -> BackendSettings:
        """Raises: BadArgument for a name that is neither ours nor SGLang's, or a value of another type."""
        given = {name: value for name, value in (extra_config or {}).items() if name not in OF_SGLANG}
        known = {field.name: field for field in fields(cls)}
        unknown = sorted(name for name in given if name not in known)
        if unknown:
            raise BadArgument(
                f"hicache-storage-backend-extra-config has unknown settings: {', '.join(unknown)}",
                hint=f"kvpool knows {', '.join(known)}",
            )
        values: dict[str, Any] = {
            "node": environment.get("KVPOOL_NODE", ""),
            "credential": environment.get("KVPOOL_CREDENTIAL", ""),
        }
        for name, value in given.items():
            values[name] = _checked(name, value, type(known[name].default))
        values["node"] = values["node"] or NODE_DEFAULT
        settings = cls(**values)
        settings._validate()
        return settings

    def _validate(self) -> None:
        host, colon, port = self.node.rpartition(":")
        if not (host and colon and port.isdigit()):
            raise BadArgument(f"node must be host:port, not {self.node!r}")
        for name in ("lookup_timeout_ms", "load_timeout_s", "store_timeout_s"):
            if not getattr(self, name) > 0:
                raise BadArgument(f"{name} must be above 0, not {getattr(self, name)!r}")


def _checked(name: str, value: Any, wanted: type) -> Any:
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not wanted:
        raise BadArgument(f"{name} must be of type {wanted.__name__}, not {value!r}")
    return value
