"""A tensor as Mooncake stores it: 304 bytes that describe it, then its bytes. Torch is imported when it is needed.

The layout is that of release 0.3.13, as its own store writes it (tests/mooncake/test_against_mooncake.py compares):

    u32 magic, u16 version, u16 header bytes, i32 dtype, i32 dimensions, i32 kind (0 whole, 1 shard), i32 0,
    i64 header bytes, i64 data bytes, i64[8] shape of the whole, i64[8] shape of what is here (-1 beyond),
    of a shard: i32 1, 0, 1, 0, rank, ranks, split dimension, 0, length along it; zeros to the end
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from engines.mooncake.memory import Bytes

if TYPE_CHECKING:
    import torch

MAGIC: Final = 0x4D4F4F4E
VERSION: Final = 1
DIMENSIONS_MAX: Final = 8
_HEADER: Final = struct.Struct("<IHHii2i2q8q8q34i")
HEADER_BYTES: Final = _HEADER.size
WHOLE, SHARD = 0, 1

#: Names of torch's dtypes by the number that stands for them.
DTYPES: Final = (
    "float32", "float64", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "bool",
    "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Shard:
    """Which part of a tensor this is: of `ranks` along dimension `dim`."""

    rank: int
    ranks: int
    dim: int


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """What a stored tensor is. `whole_shape` differs from `shape` for a shard only."""

    dtype: int
    shape: tuple[int, ...]
    whole_shape: tuple[int, ...]
    data_bytes: int
    shard: Shard | None = None

    def encode(self) -> bytes:
        part = [0] * 34
        if self.shard is not None:
            part[:9] = [1, 0, 1, 0, self.shard.rank, self.shard.ranks, self.shard.dim, 0, self.shape[self.shard.dim]]
        return _HEADER.pack(
            MAGIC, VERSION, HEADER_BYTES, self.dtype, len(self.shape), SHARD if self.shard else WHOLE, 0,
            HEADER_BYTES, self.data_bytes, *_padded(self.whole_shape), *_padded(self.shape), *part,
        )  # fmt: skip

    @classmethod
    def decode(cls, data: bytes | Bytes) -> TensorHeader | None:
        """None for what no tensor begins with."""
        if len(data) < HEADER_BYTES:
            return None
        magic, version, size, dtype, dimensions, kind, _, offset, data_bytes, *rest = _HEADER.unpack(
            bytes(data[:HEADER_BYTES])
        )
        if (magic, version, size, offset) != (MAGIC, VERSION, HEADER_BYTES, HEADER_BYTES):
            return None
        if not (0 <= dtype < len(DTYPES) and 0 <= dimensions <= DIMENSIONS_MAX and data_bytes >= 0):
            return None
        whole, shape, part = rest[:dimensions], rest[8 : 8 + dimensions], rest[16:]
        if any(length < 0 for length in (*whole, *shape)):
            return None
        shard = Shard(*part[4:7]) if kind == SHARD else None
        return cls(dtype, tuple(shape), tuple(whole), data_bytes, shard)


def _padded(shape: Sequence[int]) -> list[int]:
    return [*shape, *[-1] * (DIMENSIONS_MAX - len(shape))]


def header_of(tensor: Any, *, whole: Any = None, shard: Shard | None = None) -> TensorHeader | None:
    """The description of a torch tensor, or None for what can't be stored: no tensor, or of another dtype."""
    import torch

    if not isinstance(tensor, torch.Tensor) or tensor.dim() > DIMENSIONS_MAX or tensor.device.type != "cpu":
        return None
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in DTYPES:
        return None
    of = tensor if whole is None else whole
    return TensorHeader(
        DTYPES.index(name), tuple(tensor.shape), tuple(of.shape), tensor.numel() * tensor.element_size(), shard
    )


def bytes_of(tensor: torch.Tensor) -> Bytes:
    """The bytes of a tensor in the order of its elements, uint8 (n): its own memory if that is contiguous."""
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, dtype=np.uint8)


def tensor_of(data: Bytes) -> torch.Tensor | None:
    """The tensor that bytes are, in their memory; None if they are none, or not all of one."""
    import torch

    header = TensorHeader.decode(data)
    if header is None or len(data) < HEADER_BYTES + header.data_bytes:
        return None
    dtype = getattr(torch, DTYPES[header.dtype])
    elements = int(np.prod(header.shape, dtype=np.int64))
    if elements * dtype.itemsize != header.data_bytes:
        return None
    payload = data[HEADER_BYTES : HEADER_BYTES + header.data_bytes]
    if not header.data_bytes:
        return torch.empty(header.shape, dtype=dtype)
    if payload.ctypes.data % dtype.itemsize or not payload.flags.writeable:
        payload = payload.copy()
    return torch.from_numpy(payload).view(dtype).reshape(header.shape)


def shards_of(tensor: torch.Tensor, ranks: int, dim: int) -> list[torch.Tensor] | None:
    """A tensor cut into equal parts along a dimension; None if there is no such dimension, or it can't be cut so."""
    if not 0 <= dim < tensor.dim() or tensor.shape[dim] % ranks:
        return None
    return list(tensor.chunk(ranks, dim))


def shard_name(name: str, rank: int) -> str:
    """The key under which a rank's part is kept."""
    return f"{name}_tp_{rank}"
