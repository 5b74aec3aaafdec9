"""Servers whose blocks in the pool go by other keys than the scheduler knows: noticed where a prompt is handed over."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

log = logging.getLogger(__name__)

#: What a prefill's answer says of the keys of its blocks, see `engines.vllm.handoffs`.
KEY_MASK = "kvpool_key_mask"
#: Instances remembered; beyond it the oldest may be told of again.
INSTANCES_MAX = 1024


@dataclass
class KeyMasks:
    """The masks that were told of so far, of those that are not the listed ones."""

    told: dict[str, str] = field(default_factory=dict)

    def differs(self, instance: str, transfer: object, listed: bytes) -> bool:
        """Whether a hand-off goes by other keys than those that are listed; said once in the log.

        It is no error: what the other server does not find, it computes.

        Args:
            transfer: `kv_transfer_params` of the prefill's answer.
            listed: the mask that the model's servers joined with.
        """
        mask: Any = transfer.get(KEY_MASK) if isinstance(transfer, Mapping) else None
        if not isinstance(mask, str) or mask in ("", listed.hex()):
            self.told.pop(instance, None)
            return False
        if self.told.get(instance) != mask:
            if len(self.told) >= INSTANCES_MAX:
                self.told.pop(next(iter(self.told)))
            self.told[instance] = mask
            log.warning(
                "%s stores its blocks under other keys than it is listed with, since its external cache was reset: "
                "what it hands over is computed again until it has joined anew", instance,
            )  # fmt: skip
        return True
