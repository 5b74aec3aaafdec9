"""The mirror of an engine's cache: against recorded messages, and against a played engine whose state is known."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.openai_server.cache_mirror import CacheMirror, Change
from engines.openai_server.kv_events import CacheEvent, Cleared, EngineHash, Message, Removed, Stored
from kvpool.core.engine_keys import OWN, EngineNaming
from tests.engine_bridge.recorded import BLOCK_TOKENS, PROMPT, as_arrays, message_of, messages, payloads

NAMESPACE = bytes(range(16))


def keys_of(naming: EngineNaming, tokens: list[int], block_tokens: int, salt: str = "") -> list[bytes]:
    keys = naming.keys(NAMESPACE, np.asarray(tokens, dtype=np.uint32), block_tokens, salt)
    return [key.tobytes() for key in keys]


def test_recorded_messages_become_the_keys_of_their_prompts() -> None:
    for told in (messages(), [message_of(as_arrays(payload)) for payload in payloads()]):
        naming = EngineNaming("sha256", BLOCK_TOKENS)
        mirror = CacheMirror(naming, NAMESPACE)
        first, second, salted, reset = told
        prompt_keys, salted_keys = keys_of(naming, PROMPT, 32), keys_of(naming, PROMPT, 32, "s")
        assert mirror.apply(first) == [(True, key) for key in prompt_keys]
        assert [stored for stored, _ in mirror.apply(second)] == [True]
        assert mirror.apply(salted) == [(True, key) for key in salted_keys]
        changes = mirror.apply(reset)
        assert [stored for stored, _ in changes] == [False] * 7 + [True] and changes[-1][1] == prompt_keys[0]
        assert mirror.keys == prompt_keys[:1]
        mirror.check_invariants()


def test_an_engine_with_another_seed_is_not_mirrored() -> None:
    mirror = CacheMirror(EngineNaming("sha256", BLOCK_TOKENS, "123"), NAMESPACE)
    assert mirror.apply(messages()[0]) == [] and mirror.counts.other_hash == 3


def test_kvpools_own_chain_where_the_engines_is_unknown() -> None:
    naming = EngineNaming(OWN, BLOCK_TOKENS)
    mirror = CacheMirror(naming, NAMESPACE)
    for message in messages()[:3]:
        mirror.apply(message)
    assert mirror.keys[:3] == keys_of(naming, PROMPT, 32) and mirror.keys[4:] == keys_of(naming, PROMPT, 32, "s")


def test_what_is_left_out_is_counted() -> None:
    naming = EngineNaming(OWN, 2)
    mirror = CacheMirror(naming, NAMESPACE, blocks_max=2)

    def store(event: CacheEvent) -> list[Change]:
        changes = mirror.apply(Message(0.0, (event,)))
        mirror.check_invariants()
        return changes

    assert store(Stored((5,), 4, (1, 2), 2)) == [] and mirror.counts.unknown_parent == 1
    assert store(Stored((5,), None, (1, 2), 2, adapter=True)) == []
    assert store(Stored((5,), None, (1, 2), 2, extras=((["image", 0]),))) == []
    assert mirror.counts.unknown_extras == 2
    assert store(Stored((5,), None, (1, 2), 2, medium="CPU")) == []
    assert store(Stored((5,), None, (1, 2), 2, group=1, kind="sliding_window")) == []
    assert len(store(Stored((5, 6, 7), None, (1, 2, 3, 4, 5, 6), 2))) == 2 and mirror.counts.beyond_limit == 1
    assert store(Removed((5,), group=1)) == [] and store(Removed((5,), medium="DISK")) == []
    assert [stored for stored, _ in store(Removed((5, 99)))] == [False]


class PlayedEngine:
    """An engine's cache as chains of tokens; its hashes are numbers or bytes of its own making."""

    def __init__(self, naming: EngineNaming, block_tokens: int, numbers: bool) -> None:
        self.naming, self.block_tokens, self.numbers = naming, block_tokens, numbers
        self.held: dict[tuple[int, ...], EngineHash] = {}

    def name(self, chain: tuple[int, ...]) -> EngineHash:
        parent = self.naming.root(NAMESPACE)
        for first in range(0, len(chain), self.block_tokens):
            parent = self.naming.next_hash(parent, chain[first : first + self.block_tokens])
        return int.from_bytes(parent[-8:], "big") if self.numbers else parent

    def store(self, chain: list[int]) -> list[CacheEvent]:
        size, held = self.block_tokens, 0
        while tuple(chain[: held + size]) in self.held and held < len(chain):
            held += size
        fresh = [tuple(chain[: end + size]) for end in range(held, len(chain), size)]
        if not fresh:
            return []
        names = {prefix: self.name(prefix) for prefix in fresh}
        parent = self.held[tuple(chain[:held])] if held else None
        self.held |= names
        return [Stored(tuple(names.values()), parent, tuple(chain[held:]), size)]

    def remove(self, number: int) -> list[CacheEvent]:
        """A block that no other stands on, as engines evict."""
        leaves = [c for c in self.held if not any(o[: len(c)] == c and o != c for o in self.held)]
        return [Removed((self.held.pop(leaves[number % len(leaves)]),))] if leaves else []

    def clear(self) -> list[CacheEvent]:
        self.held.clear()
        return [Cleared()]


_STEPS = st.lists(
    st.tuples(st.just("store"), st.lists(st.integers(0, 2), min_size=1, max_size=5))
    | st.tuples(st.just("remove"), st.integers(0, 9))
    | st.tuples(st.just("clear"), st.none()),
    max_size=30,
)


@settings(max_examples=150, deadline=None)
@given(_STEPS, st.sampled_from(["sha256_cbor", "sha256", OWN]), st.booleans())
def test_the_mirror_holds_what_the_engine_holds(steps: list[tuple[str, object]], algorithm: str, numbers: bool) -> None:
    naming = EngineNaming(algorithm, 2)
    engine, mirror, followed = PlayedEngine(naming, 2, numbers), CacheMirror(naming, NAMESPACE), set[bytes]()
    for what, value in steps:
        match what, value:
            case "store", list(blocks):
                events = engine.store([token for block in blocks for token in (block, block + 1)])
            case "remove", int(number):
                events = engine.remove(number)
            case _:
                events = engine.clear()
        for stored, key in mirror.apply(Message(0.0, tuple(events))):
            # Changes are exact: nothing is stored twice or removed without having been there.
            assert (key in followed) is not stored
            (followed.add if stored else followed.remove)(key)
        mirror.check_invariants()
        expected = {keys_of(naming, list(chain), 2)[-1] for chain in engine.held}
        assert set(mirror.keys) == expected == followed
