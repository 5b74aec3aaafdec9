"""What a deployment may set, under `kv_connector_extra_config` of vLLM's `--kv-transfer-config`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from engines.attached.options import NodeOptions


@dataclass(frozen=True, slots=True)
class ConnectorSettings(NodeOptions):
    """One connector's settings; each name is a key of the extra config.

    load, save: whether blocks are read from the pool and stored there.
    lookup_timeout_ms: how long vLLM's scheduler may wait for an answer about a prompt.
    load_timeout_s: how long a step may wait for all its loads together before what is missing is computed.
    handoff_wait_s: how long a request waits for blocks that another engine has announced to be on their way.
    """

    WRITTEN_IN: ClassVar[str] = "kv_connector_extra_config"

    load: bool = True
    save: bool = True
    lookup_timeout_ms: int = 100
    load_timeout_s: float = 2.0
    handoff_wait_s: float = 1.0
