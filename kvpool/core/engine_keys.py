"""Names of blocks in engines that bring their own: vLLM's hash chain, computed from tokens as the engine does. Pure.

A prompt's keys can so be known outside the engine: 16 bytes of each hash are the key under which the engine's connector
stores the block in the pool, and as which the block is announced while it lies in the engine's own cache.

Source: vLLM 0.32, `vllm/v1/core/kv_cache_utils.py` and `vllm/utils/hashing.py`: the hash of a block is
sha256(serialized (hash of the block before, its tokens, extras or none)); the first one's parent is the hash of a seed.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvpool.core import hashing
from kvpool.core.errors import BadArgument
from kvpool.core.ids import KEY_BYTES, KeyArray

#: Beginning of a namespace's layout that tells how an engine names its blocks.
_LAYOUT = "engine-named"
#: vLLM's seed where PYTHONHASHSEED is not set.
VLLM_SEED = "vllm-none-hash"
#: kvpool's own chain, for engines whose hashes can't be computed outside of them.
OWN = "kvpool"
_NO_MASK = "-"
#: The serialization of vLLM's `sha256`: one form for all Pythons that write this version.
_PICKLE_PROTOCOL = 5

#: What besides tokens goes into a block's hash, tagged as vLLM tags it: ("cache_salt", text), ("mm", id, offset), ...
Extras = tuple[tuple[str | int | bytes, ...], ...]


def _pickled(parent: bytes, tokens: Sequence[int], extras: Extras | None) -> bytes:
    return pickle.dumps((parent, tuple(tokens), extras), protocol=_PICKLE_PROTOCOL)


def _cbor_head(major: int, value: int) -> bytes:
    """Type and length, or a whole number, in the shortest form. Source: RFC 8949, §3."""
    if value < 24:
        return bytes([major << 5 | value])
    for code, size in ((24, 1), (25, 2), (26, 4), (27, 8)):
        if value < 1 << (8 * size):
            return bytes([major << 5 | code]) + value.to_bytes(size, "big")
    raise BadArgument(f"{value} has more than 64 bits")


def cbor(value: object) -> bytes:
    """Canonical CBOR of numbers from 0 on, texts, bytes, None, and tuples or lists of them. Raises: BadArgument."""
    match value:
        case None:
            return b"\xf6"
        case int() if value >= 0 and not isinstance(value, bool):
            return _cbor_head(0, value)
        case bytes():
            return _cbor_head(2, len(value)) + value
        case str():
            text = value.encode()
            return _cbor_head(3, len(text)) + text
        case tuple() | list():
            return _cbor_head(4, len(value)) + b"".join(map(cbor, value))
    raise BadArgument(f"{type(value).__name__} has no place in a block's hash")


class _Numbers(dict[int, bytes]):
    """Numbers as CBOR, made when first asked for: tokens come again and again. All go when there are too many."""

    COUNT_MAX = 1 << 20

    def __missing__(self, number: int) -> bytes:
        if len(self) >= self.COUNT_MAX:
            self.clear()
        return self.setdefault(number, cbor(number))


_NUMBERS = _Numbers()


def _cbored(parent: bytes, tokens: Sequence[int], extras: Extras | None) -> bytes:
    numbers = b"".join([_NUMBERS[token] for token in tokens])
    return b"\x83" + cbor(parent) + _cbor_head(4, len(tokens)) + numbers + cbor(extras)


_SERIALIZED: dict[str, Callable[[bytes, Sequence[int], Extras | None], bytes]] = {
    "sha256": _pickled,
    "sha256_cbor": _cbored,
}
_SEEDS: dict[str, Callable[[str], bytes]] = {
    "sha256": lambda seed: pickle.dumps(seed, protocol=_PICKLE_PROTOCOL),
    "sha256_cbor": cbor,
}


@dataclass(frozen=True, slots=True)
class EngineNaming:
    """How an engine names its blocks.

    algorithm: vLLM's `--prefix-caching-hash-algo` (`sha256`, `sha256_cbor`), or `kvpool` for kvpool's own chain.
    hash_tokens: tokens a hash.
    seed: PYTHONHASHSEED of the engine's process, if that is set.
    mask: what the engine's connector mixes into its keys in the pool, 16 bytes; empty = nothing.
    """

    algorithm: str
    hash_tokens: int
    seed: str = VLLM_SEED
    mask: bytes = b""

    def __post_init__(self) -> None:
        if self.algorithm not in (*_SERIALIZED, OWN):
            raise BadArgument(f"hash algorithm {self.algorithm!r} is not one of {', '.join((*_SERIALIZED, OWN))}")
        if self.hash_tokens < 1:
            raise BadArgument("a hash is of at least one token")
        if len(self.mask) not in (0, KEY_BYTES):
            raise BadArgument(f"a mask has {KEY_BYTES} bytes")

    @classmethod
    def of_engine(cls, algorithm: str, hash_tokens: int, seed: str = "", mask: bytes = b"") -> EngineNaming:
        """The naming of an engine with this algorithm, known here or not."""
        if algorithm not in _SERIALIZED:
            return cls(OWN, hash_tokens)
        return cls(algorithm, hash_tokens, seed or VLLM_SEED, mask)

    @classmethod
    def of_layout(cls, layout: str) -> EngineNaming:
        """The naming that a namespace's layout tells of. Raises: BadArgument if it tells of none."""
        parts = layout.split(" ", 4)
        try:
            word, algorithm, hash_tokens, mask, seed = parts
            if word != _LAYOUT:
                raise ValueError(word)
            return cls(algorithm, int(hash_tokens), seed, b"" if mask == _NO_MASK else bytes.fromhex(mask))
        except ValueError as error:
            raise BadArgument(f"layout {layout!r} does not say how blocks are named") from error

    @property
    def layout(self) -> str:
        return f"{_LAYOUT} {self.algorithm} {self.hash_tokens} {self.mask.hex() or _NO_MASK} {self.seed}"

    @property
    def own(self) -> bool:
        return self.algorithm == OWN

    def root(self, namespace_id: bytes, salt: str = "") -> bytes:
        """Parent of a prompt's first block."""
        if self.own:
            return hashing.root_key(namespace_id, hashing.Extras(salt=salt.encode()))
        return hashlib.sha256(_SEEDS[self.algorithm](self.seed)).digest()

    def next_hash(self, parent: bytes, tokens: Sequence[int], extras: Extras | None = None) -> bytes:
        """Hash of a block behind `parent`, which has as many tokens as a hash, or a whole number of times as many.

        `extras` are those of its first hash. kvpool's own chain has extras in its root alone.
        """
        for first in range(0, len(tokens), self.hash_tokens):
            piece = tokens[first : first + self.hash_tokens]
            if self.own:
                parent = hashing.block_keys(parent, piece, len(piece)).tobytes()
            else:
                parent = hashlib.sha256(_SERIALIZED[self.algorithm](parent, piece, extras)).digest()
            extras = None
        return parent

    def key(self, full: bytes) -> bytes:
        """A block's key, from its hash."""
        key = full[:KEY_BYTES]
        if not self.mask:
            return key
        return (int.from_bytes(key, "big") ^ int.from_bytes(self.mask, "big")).to_bytes(KEY_BYTES, "big")

    def keys(self, namespace_id: bytes, tokens: NDArray[np.uint32], block_tokens: int, salt: str = "") -> KeyArray:
        """Keys of the full blocks of a prompt without images or adapters: uint8 (len(tokens) // block_tokens, 16)."""
        parent = self.root(namespace_id, salt)
        extras: Extras | None = (("cache_salt", salt),) if salt and not self.own else None
        packed, values = [], tokens.tolist()
        for first in range(0, len(values) // block_tokens * block_tokens, block_tokens):
            parent = self.next_hash(parent, values[first : first + block_tokens], extras if first == 0 else None)
            packed.append(self.key(parent))
        return np.frombuffer(b"".join(packed), dtype=np.uint8).reshape(-1, KEY_BYTES)


def same_hash(computed: bytes, told: bytes | int) -> bool:
    """Whether a hash is the one that an engine speaks of, which may tell only its last 64 bits, as a number."""
    if isinstance(told, int):
        return int.from_bytes(computed[-8:], "big") == told % (1 << 64)
    return computed == told
