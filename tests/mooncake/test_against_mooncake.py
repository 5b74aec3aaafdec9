"""The same program of calls for kvpool's store, for a plain model, and for Mooncake's own store where it is installed.

Codes and bytes must agree in all calls. `MOONCAKE_FOLDER`: the folder of a Mooncake that is not on the import path.
Left out is where kvpool differs on purpose (docs/migrating-from-mooncake.md): memory that is not registered, removal of
what was read a moment ago without `force`, values that are not contiguous, keys of more than 1024 bytes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from tests.mooncake.plain_store import PlainStore
from tests.mooncake.stores import MEMORY_BYTES, At, Ours, Theirs, mooncake_folder, offsets, running_mooncake
from tests.pool.node_process import NodeProcess

HALF = MEMORY_BYTES // 2
#: The lower half is what is put, the upper half where things are read to, each in its own place.
PLACES, ROOM = 8, HALF // 8
KEYS = ["a", "b", "c/d", "key with spaces", "schlüssel", "鍵", "x" * 1000, "model@1@0@abc", "A", "a.b", "[a]", ""]

keys = st.sampled_from(KEYS)
key_lists = st.lists(keys, max_size=5)
#: No key twice: Mooncake 0.3.13 then gives, and stores, wrong bytes at times.
key_sets = st.lists(keys, max_size=5, unique=True)
values = st.binary(max_size=300)
sizes = st.integers(0, 3000)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Theirs | None]:
    folder = mooncake_folder()
    if not folder:
        yield None
        return
    with running_mooncake(folder, tmp_path_factory.mktemp("mooncake")) as store:
        yield store


class Programs(RuleBasedStateMachine):
    """Calls, each made of every store."""

    ours: ClassVar[Ours]
    theirs: ClassVar[Theirs | None]

    @initialize(seed=st.integers(0, 1 << 32))
    def begin(self, seed: int) -> None:
        self.model = PlainStore(MEMORY_BYTES)
        data = random.Random(seed).randbytes(MEMORY_BYTES)
        self.model.memory[:] = data
        for store in self.stores():
            store.fill(data)
            store.call("remove_all", True)

    def stores(self) -> list[Ours | Theirs]:
        return [self.ours] if self.theirs is None else [self.ours, self.theirs]

    def same(self, name: str, *arguments: Any) -> Any:
        expected = getattr(self.model, name)(*[offsets(argument) for argument in arguments])
        for store in self.stores():
            answer = store.call(name, *arguments)
            assert answer == expected, f"{type(store).__name__}.{name}{arguments}: {answer}, not {expected}"
        return expected

    def same_bytes(self, place: int, size: int) -> None:
        for store in self.stores():
            assert store.bytes_at(place, size) == bytes(self.model.memory[place : place + size]), type(store).__name__

    # ------------------------------------------------------------ by value

    @rule(key=keys, value=values)
    def put(self, key: str, value: bytes) -> None:
        self.same("put", key, value)

    @rule(some=key_sets, value=values)
    def put_batch(self, some: list[str], value: bytes) -> None:
        self.same("put_batch", some, [value + bytes([number]) for number in range(len(some))])

    @rule(key=keys, parts=st.lists(values, max_size=4))
    def put_parts(self, key: str, parts: list[bytes]) -> None:
        self.same("put_parts", key, *parts)

    @rule(key=keys, value=values)
    def upsert(self, key: str, value: bytes) -> None:
        self.same("upsert", key, value)

    @rule(some=key_sets, value=values)
    def upsert_batch(self, some: list[str], value: bytes) -> None:
        self.same("upsert_batch", some, [value + bytes([number]) for number in range(len(some))])

    @rule(key=keys)
    def get(self, key: str) -> None:
        self.same("get", key)

    @rule(some=key_sets)
    def get_several(self, some: list[str]) -> None:
        self.same("get_batch", some)
        self.same("batch_get_buffer", some)

    # ------------------------------------------------------------ by address

    @rule(key=keys, at=st.integers(0, HALF - 3000), size=sizes)
    def put_from(self, key: str, at: int, size: int) -> None:
        self.same("put_from", key, At(at), size)

    @rule(some=key_sets, at=st.integers(0, HALF - 10_000), size=sizes, lacking=st.booleans())
    def batch_put_from(self, some: list[str], at: int, size: int, lacking: bool) -> None:
        places = [At(at + 1000 * number) for number in range(len(some))]
        self.same("batch_put_from", some, places[1:] if lacking else places, [size] * len(some))

    @rule(some=key_sets, at=st.integers(0, HALF - 10_000), size=sizes)
    def batch_upsert_from(self, some: list[str], at: int, size: int) -> None:
        places = [At(at + 1000 * number) for number in range(len(some))]
        self.same("batch_upsert_from", some, places, [size] * len(some))

    @rule(some=key_sets, at=st.integers(0, HALF - 10_000), lengths=st.lists(st.integers(0, 900), max_size=6))
    def put_pieces(self, some: list[str], at: int, lengths: list[int]) -> None:
        places = [[At(at + 1000 * piece + number) for piece in range(len(lengths))] for number in range(len(some))]
        self.same("batch_put_from_multi_buffers", some, places, [lengths] * len(some))

    # An empty key is 600 to Mooncake here, and -600 everywhere else.
    @rule(key=keys.filter(bool), at=st.integers(0, HALF - 3000), size=sizes, metadata=st.integers(0, 300))
    def put_with_metadata(self, key: str, at: int, size: int, metadata: int) -> None:
        self.same("put_from_with_metadata", key, At(at), At(at // 2), size, metadata)

    @rule(some=key_sets, room=st.integers(1, 4000))
    def get_into(self, some: list[str], room: int) -> None:
        places = [HALF + ROOM * number for number in range(len(some))]
        codes = self.same("batch_get_into", some, [At(place) for place in places], [room] * len(some))
        for place, code in zip(places, codes, strict=True):
            self.same_bytes(place, max(code, 0))

    @rule(some=key_sets, lengths=st.lists(st.integers(1, 900), min_size=1, max_size=6))
    def get_pieces(self, some: list[str], lengths: list[int]) -> None:
        places = [[HALF + ROOM * row + 1000 * piece for piece in range(len(lengths))] for row in range(len(some))]
        at = [[At(place) for place in of_key] for of_key in places]
        codes = self.same("batch_get_into_multi_buffers", some, at, [lengths] * len(some))
        for of_key, code in zip(places, codes, strict=True):
            for place, length in zip(of_key, lengths, strict=True):
                self.same_bytes(place, length if code > 0 else 0)

    @rule(key=keys, half=st.booleans())
    def get_pieces_of_one(self, key: str, half: bool) -> None:
        """In pieces that fit."""
        size = self.model.get_size(key)
        if size < 2:
            return
        lengths = [size // 2, size - size // 2] if half else [1, size - 1]
        at = [HALF, HALF + ROOM]
        self.same("batch_get_into_multi_buffers", [key], [[At(place) for place in at]], [lengths])
        for place, length in zip(at, lengths, strict=True):
            self.same_bytes(place, length)

    # ------------------------------------------------------------ looking, removing

    @rule(some=key_lists)
    def look(self, some: list[str]) -> None:
        self.same("batch_is_exist", some)
        for key in some:
            self.same("is_exist", key)
            self.same("get_size", key)

    @rule(key=keys)
    def remove(self, key: str) -> None:
        self.same("remove", key, True)

    @rule(some=key_sets)
    def batch_remove(self, some: list[str]) -> None:
        self.same("batch_remove", some, True)

    @rule(pattern=st.sampled_from(["^a", "b$", "a", "x{3}", "(", "nothing", "^[A-Z]"]))
    def remove_by_regex(self, pattern: str) -> None:
        self.same("remove_by_regex", pattern, True)

    @rule()
    def remove_all(self) -> None:
        self.same("remove_all", True)


@pytest.mark.timeout(600)
def test_the_same_program_gives_the_same_answers(node: NodeProcess, theirs: Theirs | None, tmp_path: Path) -> None:
    ours = Ours(node.address)
    programs = type("TheseStores", (Programs,), {"ours": ours, "theirs": theirs})
    try:
        run_state_machine_as_test(
            programs,
            settings=settings(
                max_examples=15, stateful_step_count=40, deadline=None, print_blob=True,
                suppress_health_check=[HealthCheck.too_slow],
            ),
        )  # fmt: skip
    finally:
        ours.close()
