"""vLLM's own MooncakeStoreConnector where there is no GPU: it asks for two things that the CPU platform does not have.

Named as `kv_connector_module_path`, so that it is imported in vLLM's processes before the connector is made.
"""

from __future__ import annotations

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.store.connector import MooncakeStoreConnector

__all__ = ["MooncakeStoreConnector"]


class _Event:
    """What has been computed on the CPU is there when the call returns."""

    def record(self, stream: object = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


if not torch.cuda.is_available():
    torch.cuda.Event = _Event  # type: ignore[assignment,misc]
    torch.accelerator.current_device_index = lambda: 0  # type: ignore[assignment]
