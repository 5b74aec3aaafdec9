"""Messages of engines: both encodings of recorded bytes, and whatever else may come over a socket."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.openai_server.kv_events import Cleared, Message, Removed, Stored, message_of, tagged_extras
from kvpool.core.errors import BadArgument
from tests.engine_bridge.recorded import BLOCK_TOKENS, PROMPT, as_arrays, payloads


def test_recorded_messages() -> None:
    first, second, salted, reset = (message_of(payload) for payload in payloads())
    (stored,) = first.events
    assert isinstance(stored, Stored)
    assert (stored.parent, stored.block_tokens, stored.medium, stored.group) == (None, BLOCK_TOKENS, "GPU", 0)
    assert list(stored.tokens) == PROMPT[:96] and len(stored.hashes) == 3 and stored.extras == ()
    (tail,) = second.events
    assert isinstance(tail, Stored) and tail.parent == stored.hashes[-1]
    (apart,) = salted.events
    assert isinstance(apart, Stored) and apart.extras == (("s",), (), ()) and apart.tokens == stored.tokens
    cleared, again = reset.events
    assert cleared == Cleared() and isinstance(again, Stored) and again.hashes == stored.hashes[:1]


def test_both_encodings_say_the_same() -> None:
    def plain(message: Message) -> Message:
        """Arrays of that time end before the kind of the cache."""
        return Message(message.time_s, tuple(_without_kind(event) for event in message.events), message.rank)

    for payload in payloads():
        written = msgspec.msgpack.encode(as_arrays(payload))
        assert message_of(msgspec.msgpack.decode(written)) == plain(message_of(payload))


def _without_kind(event: Any) -> Any:
    if not isinstance(event, Stored):
        return event
    return Stored(
        event.hashes, event.parent, event.tokens, event.block_tokens, event.adapter, event.medium, event.extras,
        event.group,
    )  # fmt: skip


def test_fields_that_are_left_out() -> None:
    short = [1.0, [["BlockStored", [7], None, [1, 2], 2, None], ["BlockRemoved", [b"x" * 32]], ["AllBlocksCleared"]]]
    assert message_of(short).events == (Stored((7,), None, (1, 2), 2), Removed((b"x" * 32,)), Cleared())
    assert message_of([1, [{"type": "BlockRemoved", "block_hashes": []}], 3]) == Message(1.0, (Removed(()),), 3)


def test_events_of_other_kinds_are_left_out() -> None:
    events = [{"type": "BlockPromoted", "block_hashes": 5}, ["SomethingNew", 1, 2], ["AllBlocksCleared"]]
    assert message_of([0.0, events]).events == (Cleared(),)


@pytest.mark.parametrize(
    "value",
    [
        None, 5, [], [1.0], ["late", []], [1.0, [5]], [1.0, [[]]], [1.0, ["AllBlocksCleared"]],
        [1.0, [["BlockStored", [7], None, [1, 2, 3], 2]]],  # three tokens are no whole block of two
        [1.0, [["BlockStored", [7], None, [1, -2], 2]]],
        [1.0, [["BlockStored", [7], None, [1, True], 2]]],
        [1.0, [["BlockStored", [7], 1.5, [1, 2], 2]]],
        [1.0, [["BlockStored", [7], None, [1, 2], 0]]],
        [1.0, [["BlockStored", [7], None, [1, 2], 2, None, 3]]],
        [1.0, [{"type": "BlockStored", "block_hashes": [7], "token_ids": [1], "block_size": 1, "extra_keys": [5]}]],
        [1.0, [{"type": "BlockStored", "block_hashes": [7], "token_ids": [1], "block_size": 1, "extra_keys": []}]],
        [1.0, [["BlockRemoved", 7]]],
    ],
)  # fmt: skip
def test_what_is_no_message(value: Any) -> None:
    with pytest.raises(BadArgument):
        message_of(value)


_ANY = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.floats(), st.text(max_size=3), st.binary(max_size=3)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)  # fmt: skip


@given(
    _ANY
    | st.tuples(
        st.floats(0, 1), st.lists(st.tuples(st.sampled_from(["BlockStored", "BlockRemoved"]), _ANY, _ANY, _ANY))
    )
)
def test_anything_is_a_message_or_refused(value: Any) -> None:
    try:
        message = message_of(value)
    except BadArgument:
        return
    assert all(isinstance(event, Stored | Removed | Cleared) for event in message.events)


def test_extras_get_the_tags_that_are_hashed() -> None:
    assert tagged_extras(()) is None
    told = ("salt", ["image", 3], b"embeds")
    assert tagged_extras(told) == (("cache_salt", "salt"), ("mm", "image", 3), ("prompt_embeds", b"embeds"))
    with pytest.raises(BadArgument):
        tagged_extras((5,))
