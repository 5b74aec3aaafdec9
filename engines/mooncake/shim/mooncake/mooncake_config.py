"""`mooncake.mooncake_config` on kvpool."""

from engines.mooncake.config_file import MooncakeConfig

__all__ = ["MooncakeConfig"]
