"""Which blocks an engine's own cache holds, under the keys that others can compute from tokens. Pure.

Engines name a block by a hash of their own, or by 64 bits of it. The mirror follows their chain of hashes from the
tokens that come with each event, so a key needs nothing of the engine but its events. Where the engine's way of hashing
is known, each hash is checked against the one that the engine tells: what differs is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from engines.openai_server.kv_events import (
    OWN_MEDIUMS,
    CacheEvent,
    Cleared,
    EngineHash,
    Message,
    Removed,
    Stored,
    tagged_extras,
)
from kvpool.core.engine_keys import EngineNaming, same_hash
from kvpool.core.errors import BadArgument
from kvpool.core.ids import KEY_BYTES

#: Kinds of caches in which a block means all of a prefix; what a window or a state keeps says nothing by itself.
_WHOLE_KINDS = ("full_attention", "mla_attention", None)

#: (stored or removed, key), in order.
Change = tuple[bool, bytes]


@dataclass(slots=True)
class MirrorCounts:
    """Blocks that an engine told of and that are not mirrored, by reason."""

    unknown_parent: int = 0
    unknown_extras: int = 0
    other_hash: int = 0
    beyond_limit: int = 0


class CacheMirror:
    """Feed it messages in order; it says how the set of keys changed.

    Args:
        namespace_id: of the keys, where the naming is kvpool's own.
        blocks_max: beyond it blocks are not mirrored, and counted.
    """

    def __init__(self, naming: EngineNaming, namespace_id: bytes, blocks_max: int = 1 << 20) -> None:
        self._naming, self._namespace_id, self._blocks_max = naming, namespace_id, blocks_max
        self._hashes: dict[EngineHash, bytes] = {}
        #: Groups whose blocks are not mirrored.
        self._skipped_groups: dict[int, None] = {}
        self.counts = MirrorCounts()

    def __len__(self) -> int:
        return len(self._hashes)

    @property
    def keys(self) -> list[bytes]:
        return [self._naming.key(full) for full in self._hashes.values()]

    def apply(self, message: Message) -> list[Change]:
        return [change for event in message.events for change in self._apply(event)]

    def clear(self) -> list[Change]:
        """Nothing is known any more: messages were lost, or the engine began anew."""
        changes = [(False, key) for key in self.keys]
        self._hashes.clear()
        return changes

    def check_invariants(self) -> None:
        assert len(self._hashes) <= self._blocks_max
        assert all(len(full) >= KEY_BYTES for full in self._hashes.values())
        if not self._naming.own:
            assert all(same_hash(full, told) for told, full in self._hashes.items())

    def _apply(self, event: CacheEvent) -> list[Change]:
        match event:
            case Cleared():
                return self.clear()
            case Removed():
                return self._removed(event)
            case Stored():
                return self._stored(event)

    def _removed(self, event: Removed) -> list[Change]:
        if event.medium not in OWN_MEDIUMS or event.group in self._skipped_groups:
            return []
        gone = [self._hashes.pop(told, None) for told in event.hashes]
        return [(False, self._naming.key(full)) for full in gone if full is not None]

    def _stored(self, event: Stored) -> list[Change]:
        if event.medium not in OWN_MEDIUMS:
            return []
        if event.kind not in _WHOLE_KINDS:
            if event.group is not None:
                self._skipped_groups[event.group] = None
            return []
        if event.adapter:  # named by its path, which is not told
            self.counts.unknown_extras += len(event.hashes)
            return []
        parent = self._parent(event)
        if parent is None:
            self.counts.unknown_parent += len(event.hashes)
            return []
        changes: list[Change] = []
        for index, told in enumerate(event.hashes):
            full = self._next(event, index, parent)
            if full is None:
                break  # what stands on it has no name either
            parent = full
            if told in self._hashes:
                continue
            if len(self._hashes) >= self._blocks_max:
                self.counts.beyond_limit += len(event.hashes) - index
                break
            self._hashes[told] = full
            changes.append((True, self._naming.key(full)))
        return changes

    def _parent(self, event: Stored) -> bytes | None:
        if event.parent is not None:
            return self._hashes.get(event.parent)
        return self._naming.root(self._namespace_id, self._salt(event))

    def _salt(self, event: Stored) -> str:
        """The salt of a prompt's first block, for a chain whose root holds it."""
        if not self._naming.own or not event.extras:
            return ""
        return next((extra for extra in event.extras[0] if isinstance(extra, str)), "")

    def _next(self, event: Stored, index: int, parent: bytes) -> bytes | None:
        """The hash of one block of an event; None, and counted, where it can't be had."""
        tokens = event.tokens[index * event.block_tokens : (index + 1) * event.block_tokens]
        extras = event.extras[index] if event.extras else ()
        left = len(event.hashes) - index
        try:
            tagged = tagged_extras(extras)
            if self._naming.own and any(tag != "cache_salt" for tag, *_ in tagged or ()):
                raise BadArgument("kvpool's own chain knows no images here")
            full = self._naming.next_hash(parent, tokens, tagged)
        except BadArgument:
            self.counts.unknown_extras += left
            return None
        if not self._naming.own and not same_hash(full, event.hashes[index]):
            self.counts.other_hash += left
            return None
        return full
