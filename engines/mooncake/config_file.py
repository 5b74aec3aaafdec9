"""`MooncakeConfig`: the JSON file at MOONCAKE_CONFIG_PATH, or variables of the environment, as Mooncake reads them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

SEGMENT_BYTES_DEFAULT = 3355443200
BUFFER_BYTES_DEFAULT = 1 << 30
REQUIRED = ("local_hostname", "metadata_server", "master_server_address")

_UNITS = {"": 1, "b": 1, "k": 1 << 10, "kb": 1 << 10, "m": 1 << 20, "mb": 1 << 20, "g": 1 << 30, "gb": 1 << 30,
          "t": 1 << 40, "tb": 1 << 40}  # fmt: skip
_WORDS = {"true": True, "1": True, "yes": True, "on": True, "enable": True,
          "": False, "false": False, "0": False, "no": False, "off": False, "disable": False}  # fmt: skip

#: Field of the configuration by variable of the environment.
_VARIABLES = {
    "local_hostname": "MOONCAKE_LOCAL_HOSTNAME", "metadata_server": "MOONCAKE_TE_META_DATA_SERVER",
    "global_segment_size": "MOONCAKE_GLOBAL_SEGMENT_SIZE", "local_buffer_size": "MOONCAKE_LOCAL_BUFFER_SIZE",
    "protocol": "MOONCAKE_PROTOCOL", "device_name": "MOONCAKE_DEVICE", "master_server_address": "MOONCAKE_MASTER",
    "enable_ssd_offload": "MOONCAKE_OFFLOAD_ENABLED", "ssd_offload_path": "MOONCAKE_OFFLOAD_FILE_STORAGE_PATH",
    "tenant_id": "MOONCAKE_TENANT_ID", "enable_client_http_server": "MOONCAKE_ENABLE_CLIENT_HTTP_SERVER",
    "client_http_port": "MOONCAKE_CLIENT_HTTP_PORT",
}  # fmt: skip


@dataclass
class MooncakeConfig:
    """What a client of Mooncake is configured with; what of it kvpool uses is said at `MooncakeDistributedStore.setup`.

    Raises: ValueError from all ways of making one: a required field empty, a size negative, a text that is no size.
    """

    local_hostname: str
    metadata_server: str
    global_segment_size: int = SEGMENT_BYTES_DEFAULT
    local_buffer_size: int = BUFFER_BYTES_DEFAULT
    protocol: str = "tcp"
    device_name: str | None = ""
    master_server_address: str = ""
    enable_ssd_offload: bool = False
    ssd_offload_path: str = ""
    tenant_id: str = "default"
    enable_client_http_server: bool = False
    client_http_port: int = 9300

    def __post_init__(self) -> None:
        if not isinstance(self.protocol, str) or not self.protocol.strip():
            raise ValueError(f"protocol must be a text that is not empty, not {self.protocol!r}")
        self.protocol = self.protocol.strip().lower()
        for name in REQUIRED:
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"{name} must be a text that is not empty, not {value!r}")
        for name in ("global_segment_size", "local_buffer_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")

    @staticmethod
    def from_file(file_path: str) -> MooncakeConfig:
        settings = json.loads(Path(file_path).read_text())
        for name in REQUIRED:
            if name not in settings:
                raise ValueError(f"{file_path} lacks {name}")
        return _made(settings)

    @staticmethod
    def load_from_env() -> MooncakeConfig:
        path = os.environ.get("MOONCAKE_CONFIG_PATH")
        if path is not None:
            return MooncakeConfig.from_file(path)
        if not os.environ.get("MOONCAKE_MASTER"):
            raise ValueError("neither MOONCAKE_CONFIG_PATH nor MOONCAKE_MASTER is set")
        given = {name: os.environ[variable] for name, variable in _VARIABLES.items() if variable in os.environ}
        return _made({"local_hostname": "localhost", "metadata_server": "P2PHANDSHAKE", **given})


def _made(settings: Mapping[str, Any]) -> MooncakeConfig:
    """Of the fields that are known and not null; others are somebody else's."""
    values: dict[str, Any] = {}
    for known in fields(MooncakeConfig):
        value = settings.get(known.name)
        if value is None:
            continue
        if known.name.endswith("_size"):
            value = parse_size(value)
        elif known.type == "bool":
            value = parse_bool(value)
        elif known.type == "int":
            value = int(value)
        values[known.name] = value
    return MooncakeConfig(**values)


def parse_size(value: Any) -> int:
    """Bytes of a number, or of a text like "3.5GB" (powers of 1024). Raises: ValueError."""
    if not isinstance(value, str):
        return int(value)
    text = value.strip().lower()
    number = text.rstrip("bkmgt")
    unit = text[len(number) :]
    try:
        return int(float(number) * _UNITS[unit])
    except (ValueError, KeyError) as error:
        raise ValueError(f"{value!r} is no size") from error


def parse_bool(value: Any) -> bool:
    """Raises: ValueError for a text that says neither yes nor no."""
    if not isinstance(value, str):
        return bool(value)
    word = value.strip().lower()
    if word not in _WORDS:
        raise ValueError(f"{value!r} is neither true nor false")
    return _WORDS[word]
