"""Namespaces: who may share blocks. Two engines do if and only if their specifications are equal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any, Final

from kvpool.core.errors import BadArgument, Overloaded, UnknownNamespace
from kvpool.core.ids import NamespaceId

HASHES = ("xxh3_128/1", "sha256/1")
GROUPS_MAX = 64
BLOCK_TOKENS_MAX = 4096
BLOCK_BYTES_MAX = 1 << 30
SECTIONS_MAX = 8
SHARDS_MAX = 1024
NAMESPACES_MAX = 1024
#: Layout of a namespace of objects: things of any size under string names.
OBJECTS_LAYOUT = "objects"


class GroupKind(IntEnum):
    """What a group of layers caches; numbers as on the wire."""

    FULL = 1
    WINDOW = 2
    MLA = 3
    STATE = 4


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """Layers whose KV is cut and stored alike. `block_bytes` counts one shard of one block."""

    id: int
    kind: GroupKind
    layers: tuple[int, ...]
    block_tokens: int
    shard_count: int
    section_count: int
    block_bytes: int
    kv_heads: int = 0
    head_dim: int = 0
    window_tokens: int = 0

    @property
    def section_bytes(self) -> int:
        return self.block_bytes // self.section_count

    def validate(self) -> None:
        """Raises: BadArgument with the field that is wrong."""
        checks = {
            "layers must not be empty": bool(self.layers),
            f"block_tokens must be 1 to {BLOCK_TOKENS_MAX}": 1 <= self.block_tokens <= BLOCK_TOKENS_MAX,
            f"block_bytes must be 1 to {BLOCK_BYTES_MAX}": 1 <= self.block_bytes <= BLOCK_BYTES_MAX,
            f"shard_count must be 1 to {SHARDS_MAX}": 1 <= self.shard_count <= SHARDS_MAX,
            f"section_count must be 1 to {SECTIONS_MAX}": 1 <= self.section_count <= SECTIONS_MAX,
            "section_count must divide the number of layers": bool(self.layers)
            and self.section_count > 0
            and len(self.layers) % self.section_count == 0,
            "section_count must divide block_bytes": self.section_count > 0
            and self.block_bytes % self.section_count == 0,
            "window_tokens belongs to window groups": (self.window_tokens > 0) == (self.kind is GroupKind.WINDOW),
        }
        for rule, holds in checks.items():
            if not holds:
                raise BadArgument(f"group {self.id}: {rule}")


#: Stands for the group of a namespace of objects, whose sizes come with each reservation.
OBJECTS_GROUP: Final = GroupSpec(0, GroupKind.FULL, (), 0, 1, 1, 0)


@dataclass(frozen=True, slots=True)
class NamespaceSpec:
    """Canonical description of what is stored; see the .proto for each field."""

    model: str
    revision: str
    dtype: str
    backend: str
    layout: str
    hash: str
    groups: tuple[GroupSpec, ...]

    @classmethod
    def objects(cls, domain: str) -> NamespaceSpec:
        """A namespace of objects; `domain` tells it from others."""
        return cls(domain, "", "", "", OBJECTS_LAYOUT, "sha256/1", ())

    @classmethod
    def from_mapping(cls, fields: Mapping[str, Any]) -> NamespaceSpec:
        """The inverse of `asdict`, and of reading `canonical` as JSON. Raises: BadArgument for anything else."""
        try:
            groups = tuple(
                GroupSpec(**{**group, "kind": GroupKind(group["kind"]), "layers": tuple(group["layers"])})
                for group in fields["groups"]
            )
            return cls(**{**fields, "groups": groups})
        except (TypeError, KeyError, ValueError) as error:
            raise BadArgument(f"not the description of a namespace: {error}") from error

    @property
    def is_objects(self) -> bool:
        return self.layout == OBJECTS_LAYOUT

    def validate(self) -> None:
        """Raises: BadArgument with the field that is wrong."""
        if not self.model:
            raise BadArgument("model must not be empty")
        if self.hash not in HASHES:
            raise BadArgument(f"hash {self.hash!r} is not one of {', '.join(HASHES)}")
        if self.is_objects:
            if self.groups:
                raise BadArgument("a namespace of objects has no groups")
            return
        if not 1 <= len(self.groups) <= GROUPS_MAX:
            raise BadArgument(f"a namespace has 1 to {GROUPS_MAX} groups")
        if [g.id for g in self.groups] != list(range(len(self.groups))):
            raise BadArgument("group ids must be 0, 1, 2, ... in order")
        for group in self.groups:
            group.validate()

    def canonical(self) -> bytes:
        """The one text of this specification: JSON with sorted keys and no spaces, UTF-8."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

    def id(self) -> NamespaceId:
        """sha256 of the canonical form, first 16 bytes."""
        return NamespaceId(hashlib.sha256(self.canonical()).digest()[:16])


class Namespaces:
    """The namespaces that a source knows, numbered in order of registration."""

    def __init__(self) -> None:
        self._specs: dict[NamespaceId, NamespaceSpec] = {}
        self._numbers: dict[NamespaceId, int] = {}
        self._ids: list[NamespaceId] = []

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def specs(self) -> list[NamespaceSpec]:
        """By number."""
        return list(self._specs.values())

    def knows(self, spec: NamespaceSpec) -> bool:
        return spec.id() in self._specs

    def register(self, spec: NamespaceSpec) -> NamespaceId:
        """Makes a namespace known. Idempotent. Raises: BadArgument, Overloaded."""
        spec.validate()
        namespace = spec.id()
        if namespace not in self._specs:
            if len(self._specs) >= NAMESPACES_MAX:
                raise Overloaded(f"{NAMESPACES_MAX} namespaces are registered already")
            self._numbers[namespace] = len(self._specs)
            self._specs[namespace] = spec
            self._ids.append(namespace)
        return namespace

    def number(self, namespace_id: bytes) -> int:
        """Raises: UnknownNamespace."""
        number = self._numbers.get(NamespaceId(namespace_id))
        if number is None:
            raise UnknownNamespace(
                f"namespace {bytes(namespace_id).hex() or '(empty)'} is not registered", hint="call RegisterNamespace"
            )
        return number

    def id_of(self, number: int) -> NamespaceId:
        """Empty for a number that nobody was given: an index that was taken over may hold such."""
        return self._ids[number] if number < len(self._ids) else NamespaceId(b"")

    def spec(self, namespace_id: bytes) -> NamespaceSpec:
        """Raises: UnknownNamespace."""
        self.number(namespace_id)
        return self._specs[NamespaceId(namespace_id)]

    def group(self, namespace_id: bytes, group: int, shard: int) -> GroupSpec:
        """Raises: UnknownNamespace, BadArgument."""
        spec = self.spec(namespace_id)
        groups = (OBJECTS_GROUP,) if spec.is_objects else spec.groups
        if not 0 <= group < len(groups):
            raise BadArgument(f"group {group} is not one of the namespace's {len(groups)}")
        if not 0 <= shard < groups[group].shard_count:
            raise BadArgument(f"shard {shard} is not one of the group's {groups[group].shard_count}")
        return groups[group]
