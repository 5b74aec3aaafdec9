"""What a deployment may set, in SGLang's `--hicache-storage-backend-extra-config`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from engines.attached.options import NodeOptions

#: Keys of the extra config that are SGLang's own.
OF_SGLANG = frozenset(
    (
        "backend_name", "module_path", "class_name", "interface_v1", "extra_backend_tag", "tp_lcm_size",
        "prefetch_threshold", "prefetch_timeout_base", "prefetch_timeout_per_ki_token",
        "hicache_storage_pass_prefix_keys",
    )
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class BackendSettings(NodeOptions):
    """One backend's settings; each name is a key of the extra config.

    tenant: whose quota the pages count against.
    lookup_timeout_ms: how long a question about a prompt may take; what is not answered counts as absent.
    load_timeout_s, store_timeout_s: how long one call of SGLang's may take to read or store its pages.
    """

    WRITTEN_IN: ClassVar[str] = "hicache-storage-backend-extra-config"

    tenant: str = ""
    lookup_timeout_ms: int = 500
    load_timeout_s: float = 5.0
    store_timeout_s: float = 10.0


def settings_of(extra_config: Mapping[str, Any] | None, environment: Mapping[str, str] = os.environ) -> BackendSettings:
    """The settings among SGLang's own. Raises: BadArgument for a name that is neither's, or a wrong value."""
    ours = {name: value for name, value in (extra_config or {}).items() if name not in OF_SGLANG}
    return BackendSettings.of(ours, environment)
