"""What a call may ask for, and how much may be held: refuses before anything is changed."""

from __future__ import annotations

from typing import Final

from kvpool.core.errors import BadArgument, Overloaded
from kvpool.core.holds import Hold, Holds
from kvpool.core.ids import KeyArray
from kvpool.core.results import SourceConfig

TTL_US_MAX: Final = 600_000_000
#: Of pins that outlive their session.
PIN_TTL_US_MAX: Final = 7 * 24 * 3600 * 1_000_000


class Bounds:
    """The limits of a source's configuration, as checks. Each raises BadArgument or Overloaded."""

    def __init__(self, config: SourceConfig) -> None:
        self._config = config

    def keys(self, keys: KeyArray) -> None:
        if len(keys) > self._config.keys_per_call_max:
            raise BadArgument(f"{len(keys)} keys in one call; at most {self._config.keys_per_call_max}")

    def ttl(self, ttl_us: int, ttl_us_max: int = TTL_US_MAX) -> None:
        if not 0 < ttl_us <= ttl_us_max:
            raise BadArgument(f"a time to live must be over 0 and at most {ttl_us_max // 1_000_000} s")

    def hold(self, hold: Hold, holds: Holds) -> None:
        if not hold.request_id or not 0 < hold.ttl_us <= TTL_US_MAX:
            raise BadArgument("a hand-off hold needs a request id and a time to live")
        if len(holds.handoffs) >= self._config.handoffs_max:
            raise Overloaded(f"{self._config.handoffs_max} hand-offs are held already")

    def room_for_hold(self, holds: Holds, rows: int) -> None:
        if len(holds.leases) + len(holds.pins) >= self._config.leases_max:
            raise Overloaded(f"{self._config.leases_max} leases and pins are held already")
        if holds.rows + rows > self._config.held_rows_max:
            raise Overloaded(f"leases and pins hold {holds.rows} keys already", hint="release what is not read")

    def room_for_detached_pin(self, holds: Holds) -> None:
        if holds.detached >= self._config.pins_detached_max:
            raise Overloaded(
                f"{self._config.pins_detached_max} pins without a session are held already", hint="kvctl pins"
            )

    def waits(self, waits: int, awaited_keys: int) -> None:
        if waits >= self._config.waits_max:
            raise Overloaded(f"{self._config.waits_max} readers are waiting already")
        if awaited_keys > self._config.awaited_keys_max:
            raise Overloaded(f"{self._config.awaited_keys_max} keys are awaited already")
