"""`import engines.mooncake.as_mooncake` makes `mooncake.store` kvpool's in this process. It must come first.

Raises: ImportError if a real Mooncake has been imported already: its objects would not be ours.
"""

from __future__ import annotations

import sys

from engines.mooncake.shadowing import SHIM

_loaded = sys.modules.get("mooncake.store") or sys.modules.get("mooncake")
if _loaded is not None and not str(getattr(_loaded, "__file__", "")).startswith(str(SHIM)):
    raise ImportError(
        f"mooncake was imported from {getattr(_loaded, '__file__', '?')} before engines.mooncake.as_mooncake"
    )
if str(SHIM) not in sys.path:
    sys.path.insert(0, str(SHIM))

import mooncake.store  # noqa: E402, F401
