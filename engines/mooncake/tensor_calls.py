"""A store's calls for torch tensors: one object each, or one for each rank of tensor parallelism."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from engines.mooncake.codes import Code
from engines.mooncake.configuration import DEFAULT_CONFIG, ReplicateConfig
from engines.mooncake.connection import text, texts, uses_memory
from engines.mooncake.memory import Bytes, addresses
from engines.mooncake.objects import Key
from engines.mooncake.ranges import RangeCalls
from engines.mooncake.tensors import (
    HEADER_BYTES,
    Shard,
    TensorHeader,
    bytes_of,
    header_of,
    shard_name,
    shards_of,
    tensor_of,
)

if TYPE_CHECKING:
    import torch

#: Name and pieces of an object that a tensor becomes.
Part = tuple[str, list[Bytes]]


class TensorCalls(RangeCalls):
    """Tensors in the host's memory, in Mooncake's own format. What is no such tensor is INVALID_PARAMS, or None."""

    # ------------------------------------------------------------ putting

    def put_tensor(self, key: Key, tensor: Any) -> int:
        return self.batch_put_tensor([key], [tensor])[0]

    def pub_tensor(self, key: Key, tensor: Any, config: ReplicateConfig = DEFAULT_CONFIG) -> int:
        return self.batch_pub_tensor([key], [tensor], config)[0]

    def upsert_tensor(self, key: Key, tensor: Any) -> int:
        return self.batch_upsert_tensor([key], [tensor])[0]

    def upsert_pub_tensor(self, key: Key, tensor: Any, config: ReplicateConfig = DEFAULT_CONFIG) -> int:
        return self.batch_upsert_pub_tensor([key], [tensor], config)[0]

    def batch_put_tensor(self, keys: Sequence[Key], tensors_list: Sequence[Any]) -> list[int]:
        return self._put_tensors(keys, tensors_list, DEFAULT_CONFIG, replace=False)

    def batch_pub_tensor(
        self, keys: Sequence[Key], tensors_list: Sequence[Any], config: ReplicateConfig = DEFAULT_CONFIG
    ) -> list[int]:
        return self._put_tensors(keys, tensors_list, config, replace=False)

    def batch_upsert_tensor(self, keys: Sequence[Key], tensors_list: Sequence[Any]) -> list[int]:
        return self._put_tensors(keys, tensors_list, DEFAULT_CONFIG, replace=True)

    def batch_upsert_pub_tensor(
        self, keys: Sequence[Key], tensors_list: Sequence[Any], config: ReplicateConfig = DEFAULT_CONFIG
    ) -> list[int]:
        return self._put_tensors(keys, tensors_list, config, replace=True)

    def put_tensor_from(self, key: Key, buffer_ptr: int, size: int) -> int:
        """Stores a tensor that lies in registered memory, its description first, and nothing behind it."""
        return self.batch_put_tensor_from([key], [buffer_ptr], [size])[0]

    def upsert_tensor_from(self, key: Key, buffer_ptr: int, size: int) -> int:
        return self.batch_upsert_tensor_from([key], [buffer_ptr], [size])[0]

    def batch_put_tensor_from(self, keys: Sequence[Key], buffer_ptrs: Sequence[int], sizes: Sequence[int]) -> list[int]:
        return self._put_described(keys, buffer_ptrs, sizes, replace=False)

    def batch_upsert_tensor_from(
        self, keys: Sequence[Key], buffer_ptrs: Sequence[int], sizes: Sequence[int]
    ) -> list[int]:
        return self._put_described(keys, buffer_ptrs, sizes, replace=True)

    # ------------------------------------------------------------ getting

    def get_tensor(self, key: Key) -> torch.Tensor | None:
        return self.batch_get_tensor([key])[0]

    def batch_get_tensor(self, keys: Sequence[Key]) -> list[torch.Tensor | None]:
        return [None if value is None else tensor_of(value) for value in self._read(texts(keys))]

    def get_tensor_into(self, key: Key, buffer_ptr: int, size: int) -> torch.Tensor | None:
        """A tensor in the caller's registered memory, its description before it."""
        return self.batch_get_tensor_into([key], [buffer_ptr], [size])[0]

    @uses_memory
    def batch_get_tensor_into(
        self, keys: Sequence[Key], buffer_ptrs: Sequence[int], sizes: Sequence[int]
    ) -> list[torch.Tensor | None]:
        lengths = self.batch_get_into(keys, buffer_ptrs, sizes)
        views = self._views(buffer_ptrs, sizes)
        return [
            tensor_of(view[:length]) if length > 0 and view is not None else None
            for view, length in zip(views, lengths, strict=False)
        ] + [None] * (len(lengths) - len(views))

    # ------------------------------------------------------------ for each rank

    def put_tensor_with_tp(self, key: Key, tensor: Any, tp_rank: int = 0, tp_size: int = 1, split_dim: int = 0) -> int:
        """Stores each rank's part under KEY_tp_RANK, whichever `tp_rank` says. It must be cut into equal parts."""
        return self.pub_tensor_with_tp(key, tensor, DEFAULT_CONFIG, tp_rank, tp_size, split_dim)

    def pub_tensor_with_tp(
        self, key: Key, tensor: Any, config: ReplicateConfig = DEFAULT_CONFIG, tp_rank: int = 0, tp_size: int = 1,
        split_dim: int = 0,
    ) -> int:  # fmt: skip
        parts = cut(text(key), tensor, tp_size, split_dim)
        if parts is None:
            return Code.INVALID_PARAMS
        names, objects = [name for name, _ in parts], [pieces for _, pieces in parts]
        return next((code for code in self._put_objects(names, objects, config, replace=False) if code), Code.OK)

    def batch_put_tensor_with_tp(
        self, base_keys: Sequence[Key], tensors_list: Sequence[Any], tp_rank: int = 0, tp_size: int = 1,
        split_dim: int = 0,
    ) -> list[int]:  # fmt: skip
        return self.batch_pub_tensor_with_tp(base_keys, tensors_list, DEFAULT_CONFIG, tp_rank, tp_size, split_dim)

    def batch_pub_tensor_with_tp(
        self, base_keys: Sequence[Key], tensors_list: Sequence[Any], config: ReplicateConfig = DEFAULT_CONFIG,
        tp_rank: int = 0, tp_size: int = 1, split_dim: int = 0,
    ) -> list[int]:  # fmt: skip
        if len(base_keys) != len(tensors_list):
            return [Code.INVALID_PARAMS] * len(base_keys)
        return [
            self.pub_tensor_with_tp(key, tensor, config, tp_rank, tp_size, split_dim)
            for key, tensor in zip(base_keys, tensors_list, strict=True)
        ]

    @uses_memory
    def put_tensor_with_tp_from(
        self, key: Key, buffer_ptr: int, size: int, tp_rank: int = 0, tp_size: int = 1, split_dim: int = 0
    ) -> int:
        """As `put_tensor_with_tp`, of a whole tensor that lies in registered memory."""
        view = self._views([buffer_ptr], [size])[0]
        tensor = None if view is None else tensor_of(view)
        return Code.INVALID_PARAMS if tensor is None else self.put_tensor_with_tp(key, tensor, 0, tp_size, split_dim)

    def batch_put_tensor_with_tp_from(
        self, base_keys: Sequence[Key], buffer_ptrs: Sequence[int], sizes: Sequence[int], tp_rank: int = 0,
        tp_size: int = 1, split_dim: int = 0,
    ) -> list[int]:  # fmt: skip
        if not len(base_keys) == len(buffer_ptrs) == len(sizes):
            return [Code.INVALID_PARAMS] * len(base_keys)
        return [
            self.put_tensor_with_tp_from(key, pointer, size, tp_rank, tp_size, split_dim)
            for key, pointer, size in zip(base_keys, buffer_ptrs, sizes, strict=True)
        ]

    def get_tensor_with_tp(
        self, key: Key, tp_rank: int = 0, tp_size: int = 1, split_dim: int = 0
    ) -> torch.Tensor | None:
        return self.batch_get_tensor_with_tp([key], tp_rank, tp_size)[0]

    def batch_get_tensor_with_tp(
        self, base_keys: Sequence[Key], tp_rank: int = 0, tp_size: int = 1
    ) -> list[torch.Tensor | None]:
        return self.batch_get_tensor(of_rank(base_keys, tp_rank, tp_size))

    def get_tensor_with_tp_into(
        self, key: Key, buffer_ptr: int, size: int, tp_rank: int = 0, tp_size: int = 1, split_dim: int = 0
    ) -> torch.Tensor | None:
        return self.batch_get_tensor_with_tp_into([key], [buffer_ptr], [size], tp_rank, tp_size)[0]

    def batch_get_tensor_with_tp_into(
        self, base_keys: Sequence[Key], buffer_ptrs: Sequence[int], sizes: Sequence[int], tp_rank: int = 0,
        tp_size: int = 1,
    ) -> list[torch.Tensor | None]:  # fmt: skip
        return self.batch_get_tensor_into(of_rank(base_keys, tp_rank, tp_size), buffer_ptrs, sizes)

    # ------------------------------------------------------------ parts

    def _put_tensors(
        self, keys: Sequence[Key], tensors: Sequence[Any], config: ReplicateConfig, *, replace: bool
    ) -> list[int]:
        names = texts(keys)
        if len(names) != len(tensors):
            return [Code.INVALID_PARAMS] * len(names)
        headers = [header_of(tensor) for tensor in tensors]
        objects = [
            [] if header is None else [as_bytes(header), bytes_of(tensor)]
            for header, tensor in zip(headers, tensors, strict=True)
        ]
        return self._put_objects(names, objects, config, replace=replace)

    @uses_memory
    def _put_described(
        self, keys: Sequence[Key], buffer_ptrs: Sequence[int], sizes: Sequence[int], *, replace: bool
    ) -> list[int]:
        names, wanted = texts(keys), list(sizes)
        for index, view in enumerate(self._views(buffer_ptrs, sizes)):
            header = None if view is None else TensorHeader.decode(view)
            if header is None or HEADER_BYTES + header.data_bytes != wanted[index]:
                wanted[index] = 0  # which no object has
        return self._put_from(names, buffer_ptrs, wanted, DEFAULT_CONFIG, replace=replace)

    def _views(self, buffer_ptrs: Sequence[int], sizes: Sequence[int]) -> list[Bytes | None]:
        count = min(len(buffer_ptrs), len(sizes))
        return self._memory.views(addresses(buffer_ptrs[:count]), addresses(sizes[:count]))


def of_rank(keys: Sequence[Key], rank: int, ranks: int) -> list[str]:
    """The keys of a rank's parts."""
    return [name if ranks <= 1 else shard_name(name, rank) for name in texts(keys)]


def cut(name: str, tensor: Any, ranks: int, dim: int) -> list[Part] | None:
    """Names and pieces of the objects that a tensor becomes; None if it can't be stored, or not in equal parts."""
    whole = header_of(tensor)
    if whole is None:
        return None
    if ranks <= 1:
        return [(name, [as_bytes(whole), bytes_of(tensor)])]
    shards = shards_of(tensor, ranks, dim)
    if shards is None:
        return None
    parts: list[Part] = []
    for rank, shard in enumerate(shards):
        header = header_of(shard, whole=tensor, shard=Shard(rank, ranks, dim))
        assert header is not None
        parts.append((shard_name(name, rank), [as_bytes(header), bytes_of(shard)]))
    return parts


def as_bytes(header: TensorHeader) -> Bytes:
    return np.frombuffer(header.encode(), dtype=np.uint8)
