"""What engines publish about their caches, from vLLM's and SGLang's messages, in both encodings. Pure.

A message is `[time, [event, ...], rank]`. An event is a map with the key `type` (vLLM since 2026), or an array that
begins with the type (vLLM before, SGLang); fields that are left out have their defaults.

Source: vLLM 0.32, `vllm/distributed/kv_events.py`; SGLang 0.5, `sglang/srt/disaggregation/kv_events.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from kvpool.core.errors import BadArgument

#: As an engine names a block: the whole hash, or 64 bits of it.
EngineHash: TypeAlias = bytes | int

#: Order of the fields in arrays.
_STORED = (
    "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name", "extra_keys",
    "group_idx", "kv_cache_spec_kind",
)  # fmt: skip
_REMOVED = ("block_hashes", "medium", "group_idx")
_FIELDS = {"BlockStored": _STORED, "BlockRemoved": _REMOVED, "AllBlocksCleared": ()}
#: Of the engine's own cache, on whatever device that is; None from engines that have no other.
OWN_MEDIUMS = ("GPU", None)
BLOCK_TOKENS_MAX = 1 << 16


@dataclass(frozen=True, slots=True)
class Stored:
    """Blocks that lie one behind the other, the first behind `parent` (None: at the beginning of a prompt)."""

    hashes: tuple[EngineHash, ...]
    parent: EngineHash | None
    tokens: tuple[int, ...]
    block_tokens: int
    adapter: bool = False
    medium: str | None = None
    #: Of each block, in the order of its hash: salts, images, embeddings; empty where no block has any.
    extras: tuple[tuple[Any, ...], ...] = ()
    group: int | None = None
    kind: str | None = None


@dataclass(frozen=True, slots=True)
class Removed:
    hashes: tuple[EngineHash, ...]
    medium: str | None = None
    group: int | None = None


@dataclass(frozen=True, slots=True)
class Cleared:
    """The cache is empty."""


CacheEvent: TypeAlias = Stored | Removed | Cleared


@dataclass(frozen=True, slots=True)
class Message:
    """One message: `time_s` by the engine's clock, `rank` of a data-parallel engine."""

    time_s: float
    events: tuple[CacheEvent, ...]
    rank: int = 0


def message_of(value: Any) -> Message:
    """A message from its decoded form. Events of types that are not known here are left out.

    Raises: BadArgument for anything that is none.
    """
    if not isinstance(value, list | tuple) or len(value) < 2 or not isinstance(value[1], list | tuple):
        raise BadArgument("an event message is [time, [event, ...], rank]")
    time_s = value[0]
    if isinstance(time_s, bool) or not isinstance(time_s, int | float):
        raise BadArgument("an event message begins with a time")
    rank = value[2] if len(value) > 2 and isinstance(value[2], int) else 0
    events = [_event_of(event) for event in value[1]]
    return Message(float(time_s), tuple(event for event in events if event is not None), rank)


def _event_of(value: Any) -> CacheEvent | None:
    name, fields = _named_fields(value)
    if name == "AllBlocksCleared":
        return Cleared()
    if name == "BlockRemoved":
        return Removed(_hashes(fields), _text(fields, "medium"), _whole(fields, "group_idx"))
    if name == "BlockStored":
        return _stored(fields)
    return None


def _named_fields(value: Any) -> tuple[str, Mapping[str, Any]]:
    if isinstance(value, Mapping):
        return str(value.get("type")), value
    if isinstance(value, list | tuple) and value and isinstance(value[0], str):
        return value[0], dict(zip(_FIELDS.get(value[0], ()), value[1:], strict=False))
    raise BadArgument("an event is a map with a type, or an array that begins with one")


def _stored(fields: Mapping[str, Any]) -> Stored:
    hashes, tokens = _hashes(fields), fields.get("token_ids")
    block_tokens = _whole(fields, "block_size")
    if not isinstance(tokens, list | tuple) or not all(type(t) is int and 0 <= t < 1 << 32 for t in tokens):
        raise BadArgument("token_ids must be token ids")
    if block_tokens is None or not 1 <= block_tokens <= BLOCK_TOKENS_MAX or len(tokens) != block_tokens * len(hashes):
        raise BadArgument(f"{len(tokens)} tokens are not {len(hashes)} blocks of {block_tokens}")
    parent = fields.get("parent_block_hash")
    return Stored(
        hashes=hashes,
        parent=None if parent is None else _hash(parent),
        tokens=tuple(tokens),
        block_tokens=block_tokens,
        adapter=fields.get("lora_id") is not None or bool(fields.get("lora_name")),
        medium=_text(fields, "medium"),
        extras=_extras(fields.get("extra_keys"), len(hashes)),
        group=_whole(fields, "group_idx"),
        kind=_text(fields, "kv_cache_spec_kind"),
    )


def _hashes(fields: Mapping[str, Any]) -> tuple[EngineHash, ...]:
    hashes = fields.get("block_hashes")
    if not isinstance(hashes, list | tuple):
        raise BadArgument("block_hashes must be a list")
    return tuple(_hash(value) for value in hashes)


def _hash(value: Any) -> EngineHash:
    if isinstance(value, bytes) or type(value) is int:
        return value
    raise BadArgument("a block hash is bytes or a number")


def _extras(value: Any, count: int) -> tuple[tuple[Any, ...], ...]:
    if value is None:
        return ()
    if not isinstance(value, list | tuple) or len(value) != count:
        raise BadArgument("extra_keys has not one entry a block")
    if not all(entry is None or isinstance(entry, list | tuple) for entry in value):
        raise BadArgument("an entry of extra_keys is a list")
    extras = tuple(tuple(entry or ()) for entry in value)
    return extras if any(extras) else ()


def _text(fields: Mapping[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if value is None or isinstance(value, str):
        return value
    raise BadArgument(f"{name} must be a text")


def _whole(fields: Mapping[str, Any], name: str) -> int | None:
    value = fields.get(name)
    if value is None or type(value) is int:
        return value
    raise BadArgument(f"{name} must be a number")


def tagged_extras(extras: Sequence[Any]) -> tuple[tuple[Any, ...], ...] | None:
    """What vLLM hashes with a block, from what it publishes, which lacks the tags.

    Returns: None for a block without extras.
    Raises: BadArgument for what has no known tag.
    """
    tagged: list[tuple[Any, ...]] = []
    for extra in extras:
        match extra:
            case str():
                tagged.append(("cache_salt", extra))
            case bytes():
                tagged.append(("prompt_embeds", extra))
            case [str() as identifier, int() as offset]:
                tagged.append(("mm", identifier, offset))
            case _:
                raise BadArgument("an extra of a block's hash that is not known here")
    return tuple(tagged) or None
