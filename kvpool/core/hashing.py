"""Block keys and digests: which bytes are hashed, in which order. Pure; compiled loops are in `kernels`.

A key says which tokens were computed behind which prefix, in which namespace and with which extras; it depends on
nothing of the process. Key bytes are the library's canonical digest (big-endian).
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvpool.core.errors import BadArgument, BadKeyLength
from kvpool.core.ids import KEY_BYTES, KeyArray
from kvpool.core.kernels.token_lists import words_of
from kvpool.core.kernels.xxh3 import chain_keys
from kvpool.core.namespace import BLOCK_TOKENS_MAX, SECTIONS_MAX

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

XXH3 = "xxh3_128/1"
SHA256 = "sha256/1"

_MASK64 = (1 << 64) - 1
_SEED_SECTION = 0x9E3779B97F4A7C15
#: Tags of extras in a hashed message; a tag and the length of its value go before the value.
_TAG_LORA, _TAG_MULTIMODAL, _TAG_SALT, _TAG_TAIL = 1, 2, 3, 4

#: Token ids in prompt order: uint32 (tokens,). A list of ints is taken too, and converted.
Tokens: TypeAlias = NDArray[np.uint32] | Sequence[int]


@dataclass(frozen=True, slots=True)
class Extras:
    """What besides the tokens decides the KV, or who may see it. Empty means absent."""

    lora: bytes = b""
    multimodal: bytes = b""
    salt: bytes = b""


def _xxh3_128(message: bytes) -> bytes:
    return xxhash.xxh3_128_digest(message)


def _sha256(message: bytes) -> bytes:
    return hashlib.sha256(message).digest()[:KEY_BYTES]


_HASHES: dict[str, Callable[[bytes], bytes]] = {XXH3: _xxh3_128, SHA256: _sha256}


def _hash(name: str) -> Callable[[bytes], bytes]:
    if name not in _HASHES:
        raise BadArgument(f"hash {name!r} is not one of {', '.join(_HASHES)}")
    return _HASHES[name]


def _check_key(key: bytes) -> None:
    if len(key) != KEY_BYTES:
        raise BadKeyLength(f"a key has {KEY_BYTES} bytes, not {len(key)}")


def _tagged(tag: int, value: bytes) -> bytes:
    """Tag, length and value, so that no two lists of extras read alike."""
    return bytes([tag]) + len(value).to_bytes(4, "little") + value


def root_key(namespace_id: bytes, extras: Extras = Extras(), hash_name: str = XXH3) -> bytes:
    """Parent of a prompt's first block: the namespace's id, with the extras hashed in where there are any.

    Raises: BadArgument, BadKeyLength.
    """
    _check_key(namespace_id)
    digest = _hash(hash_name)
    pairs = ((_TAG_LORA, extras.lora), (_TAG_MULTIMODAL, extras.multimodal), (_TAG_SALT, extras.salt))
    tagged = b"".join(_tagged(tag, value) for tag, value in pairs if value)
    return digest(bytes(namespace_id) + tagged) if tagged else bytes(namespace_id)


def token_array(tokens: Tokens) -> NDArray[np.uint32]:
    """Token ids as uint32 (tokens,), contiguous; a view where the input is that already.

    Raises: BadArgument if they are not one row of integers from 0 to 2**32 - 1.
    """
    if isinstance(tokens, list | tuple):
        words = words_of(tokens)
        if words is not None:
            return words
        try:
            # Slower, but takes numpy's integers too, and says what is wrong.
            return np.frombuffer(array("I", tokens), dtype=np.uint32)
        except (TypeError, OverflowError) as error:
            raise BadArgument(f"tokens must be integers from 0 to 2**32 - 1: {error}") from error
    values = np.asarray(tokens)
    if values.ndim != 1 or (values.size and not np.issubdtype(values.dtype, np.integer)):
        raise BadArgument("tokens must be a one-dimensional array of integers")
    if values.dtype != np.uint32 and values.size and (int(values.min()) < 0 or int(values.max()) > 0xFFFFFFFF):
        raise BadArgument("tokens must be integers from 0 to 2**32 - 1")
    return np.require(values, dtype=np.uint32, requirements=["C", "A"])


def block_keys(root: bytes, tokens: Tokens, block_tokens: int, hash_name: str = XXH3) -> KeyArray:
    """Chained keys of the full blocks of a prompt: each is hash(parent ‖ tokens as little-endian u32).

    Args:
        root: `root_key`, or the key of the block before the first token.
        tokens: uint32 (tokens,).
    Returns: uint8 (len(tokens) // block_tokens, 16).
    Raises: BadArgument, BadKeyLength.
    Cost: about 30 ns a block of 16 tokens with xxh3; the GIL is released.
    """
    _check_key(root)
    digest = _hash(hash_name)
    if not 1 <= block_tokens <= BLOCK_TOKENS_MAX:
        raise BadArgument(f"block_tokens must be 1 to {BLOCK_TOKENS_MAX}, not {block_tokens}")
    words = token_array(tokens)
    keys: KeyArray = np.empty((len(words) // block_tokens, KEY_BYTES), dtype=np.uint8)
    if hash_name == XXH3:
        # Always read-only, so that the kernel is compiled for one type.
        words = words.view()
        words.flags.writeable = False
        first, second = np.frombuffer(bytes(root), dtype=np.uint64)
        chain_keys(first, second, words, block_tokens, keys.view(np.uint64))
        return keys
    parent, packed, size = bytes(root), words.astype("<u4").tobytes(), 4 * block_tokens
    for block in range(len(keys)):
        parent = digest(parent + packed[block * size : (block + 1) * size])
        keys[block] = np.frombuffer(parent, dtype=np.uint8)
    return keys


def tail_key(parent: bytes, tokens: Tokens, hash_name: str = XXH3) -> bytes:
    """Key of a partial last block: its tokens and, tagged, their number, so that it is no full block's key.

    Args:
        parent: key of the last full block, or the root.
    Raises: BadArgument, BadKeyLength.
    """
    _check_key(parent)
    words = token_array(tokens)
    length = _tagged(_TAG_TAIL, len(words).to_bytes(4, "little"))
    return _hash(hash_name)(bytes(parent) + words.astype("<u4").tobytes() + length)


#: Bytes of an object's name, in UTF-8.
NAME_BYTES_MAX = 1024


def object_key(namespace_id: bytes, name: str | bytes) -> bytes:
    """Key of an object: sha256(namespace id ‖ name), first 16 bytes; its whole name is kept and compared beside it.

    Args: name: text, or its UTF-8.
    Raises: BadArgument for a name of no or more than 1024 bytes; BadKeyLength for a namespace id that is none.
    """
    _check_key(namespace_id)
    encoded = name.encode() if isinstance(name, str) else bytes(name)
    if not 1 <= len(encoded) <= NAME_BYTES_MAX:
        raise BadArgument(f"the name of an object has 1 to {NAME_BYTES_MAX} bytes, not {len(encoded)}")
    return _sha256(bytes(namespace_id) + encoded)


def object_keys(namespace_id: bytes, names: Sequence[str]) -> KeyArray:
    """`object_key` of many names, in half the time; uint8 (names, 16). Raises: as `object_key`."""
    _check_key(namespace_id)
    encoded = [name.encode() for name in names]
    if encoded and not 1 <= min(map(len, encoded)) <= max(map(len, encoded)) <= NAME_BYTES_MAX:
        for name in encoded:
            object_key(namespace_id, name)
    prefix, sha256 = bytes(namespace_id), hashlib.sha256
    packed = b"".join([sha256(prefix + name).digest()[:KEY_BYTES] for name in encoded])
    return np.frombuffer(packed, dtype=np.uint8).reshape(-1, KEY_BYTES)


def section_seed(key: bytes, section: int) -> int:
    """Seed of a section's digest: bytes stored under another key or as another section do not verify."""
    _check_key(key)
    first, second = int.from_bytes(key[:8], "little"), int.from_bytes(key[8:], "little")
    return (first ^ second ^ (section * _SEED_SECTION)) & _MASK64


def section_digest(data: ReadableBuffer, key: bytes, section: int) -> int:
    """xxh3_64 of one section's bytes. `data` must be contiguous."""
    return xxhash.xxh3_64_intdigest(data, seed=section_seed(key, section))


def block_digests(blocks: NDArray[np.uint8], keys: KeyArray, section_count: int) -> NDArray[np.uint64]:
    """Digests of whole blocks.

    Args:
        blocks: uint8 (n, block_bytes), rows contiguous; section_count divides block_bytes.
        keys: uint8 (n, 16).
    Returns: uint64 (n, section_count).
    Raises: BadArgument if the shapes do not fit.
    """
    if blocks.ndim != 2 or not 1 <= section_count <= SECTIONS_MAX or blocks.shape[1] % section_count:
        raise BadArgument(f"{section_count} sections do not divide blocks of shape {blocks.shape}")
    if len(keys) != len(blocks):
        raise BadArgument(f"{len(keys)} keys do not name {len(blocks)} blocks")
    size = blocks.shape[1] // section_count
    digests = np.empty((len(blocks), section_count), dtype=np.uint64)
    for row, block in enumerate(blocks):
        key = keys[row].tobytes()
        for section in range(section_count):
            digests[row, section] = section_digest(block[section * size : (section + 1) * size], key, section)
    return digests
