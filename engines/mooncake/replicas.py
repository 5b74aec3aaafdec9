"""What a store says about copies of an object: enough to see whether it is in memory, and how large it is."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class ReplicaStatus(IntEnum):
    UNDEFINED = 0
    INITIALIZED = 1
    PROCESSING = 2
    COMPLETE = 3
    REMOVED = 4
    FAILED = 5


@dataclass(frozen=True, slots=True)
class Descriptor:
    """Where a copy lies. The pool gives no addresses away: `buffer_address` is 0."""

    size: int
    transport_endpoint: str
    buffer_address: int = 0


@dataclass(frozen=True, slots=True)
class MemoryDescriptor:
    buffer_descriptor: Descriptor


@dataclass(frozen=True, slots=True)
class DiskDescriptor:
    object_size: int
    file_path: str = ""


@dataclass(frozen=True, slots=True)
class ReplicaDescriptor:
    """One copy, in a node's memory or on its SSD alone."""

    size: int
    endpoint: str
    in_memory: bool
    status: ReplicaStatus = ReplicaStatus.COMPLETE

    def is_memory_replica(self) -> bool:
        return self.in_memory

    def is_disk_replica(self) -> bool:
        return not self.in_memory

    def is_local_disk_replica(self) -> bool:
        return not self.in_memory

    def get_memory_descriptor(self) -> MemoryDescriptor:
        """Raises: RuntimeError for a copy on disk, as Mooncake's does."""
        if not self.in_memory:
            raise RuntimeError("Expected MemoryDescriptor")
        return MemoryDescriptor(Descriptor(self.size, self.endpoint))

    def get_disk_descriptor(self) -> DiskDescriptor:
        """Raises: RuntimeError for a copy in memory."""
        if self.in_memory:
            raise RuntimeError("Expected DiskDescriptor")
        return DiskDescriptor(self.size)
