"""What `mooncake.store` offers, on kvpool: import from here what Mooncake's module of that name has.

Left out, since memory and copies are the pool's own affair: segments to mount, tasks to copy or move, the calls with
general parallelism layouts, and CUDA tensors.
"""

from __future__ import annotations

from engines.mooncake.configuration import ObjectDataType, ReplicateConfig, SoftPinAction
from engines.mooncake.memory import BufferHandle, HostMemory
from engines.mooncake.replicas import Descriptor, DiskDescriptor, MemoryDescriptor, ReplicaDescriptor, ReplicaStatus
from engines.mooncake.tensor_calls import TensorCalls

__all__ = [
    "BufferHandle", "Descriptor", "DiskDescriptor", "MemoryDescriptor", "MooncakeDistributedStore",
    "MooncakeHostMemAllocator", "ObjectDataType", "ReplicaDescriptor", "ReplicaStatus", "ReplicateConfig",
    "SoftPinAction",
]  # fmt: skip


class MooncakeDistributedStore(TensorCalls):
    """A client of the pool with Mooncake Store's calls and return codes. For any thread; moving bytes frees the GIL.

    Calls before `setup` or after `close` find nothing, and return INVALID_PARAMS.
    """


class MooncakeHostMemAllocator(HostMemory):
    """Host memory by address."""
