"""A store's calls for objects: put, get, look, remove; by value, and by address without a copy in between."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.mooncake.codes import Code
from engines.mooncake.configuration import DEFAULT_CONFIG, ReplicateConfig, SoftPinAction
from engines.mooncake.connection import StoreConnection, text, texts, usable, uses_memory
from engines.mooncake.memory import BufferHandle, Bytes, addresses
from engines.mooncake.pool import PIN_S_MAX, Codes, ObjectPool
from engines.mooncake.replicas import ReplicaDescriptor
from engines.mooncake.values import GatheredValues, Pieces, ScatteredValues, Values, WholeValues
from kvpool.core.errors import BadArgument

Bools = NDArray[np.bool_]
Rows = NDArray[np.int64]
Key = str | bytes
#: Something to ask the pool about some of a call's keys.
Call = Callable[[ObjectPool, Sequence[str], Rows], Codes]

#: A soft pin without a time of its own, as with Mooncake's master.
SOFT_PIN_S = 30 * 60.0
#: Keys of one call to the pool.
CALL_KEYS_MAX = 16_384
#: How often an upsert is tried again that somebody else's put came between.
UPSERT_TRIES = 3


class ObjectCalls(StoreConnection):
    """Objects by key. Codes are those of `Code`; names and order of arguments are Mooncake's."""

    # ------------------------------------------------------------ by value

    def put(self, key: Key, value: Any, config: ReplicateConfig = DEFAULT_CONFIG) -> int:
        """0 also if the key exists: its object is left as it is. INVALID_PARAMS for an empty value or key."""
        return self._put_values([text(key)], [as_array(value)], config, replace=False)[0]

    def put_batch(self, keys: Sequence[Key], values: Sequence[Any], config: ReplicateConfig = DEFAULT_CONFIG) -> int:
        """The first code that is not 0. Nothing is stored if one value is empty."""
        return self._put_batch(keys, values, config, replace=False)

    def put_parts(self, key: Key, *parts: Any, config: ReplicateConfig = DEFAULT_CONFIG) -> int:
        """One object of several parts. Nothing at all is no object, and no error."""
        return self._put_parts(key, parts, config, replace=False)

    def upsert(self, key: Key, value: Any, config: ReplicateConfig = DEFAULT_CONFIG) -> int:
        """Removes what the key stands for, and stores this. Not atomic: somebody may see a miss in between."""
        return self._put_values([text(key)], [as_array(value)], config, replace=True)[0]

    def upsert_batch(self, keys: Sequence[Key], values: Sequence[Any], config: ReplicateConfig = DEFAULT_CONFIG) -> int:
        return self._put_batch(keys, values, config, replace=True)

    def upsert_parts(self, key: Key, *parts: Any, config: ReplicateConfig = DEFAULT_CONFIG) -> int:
        return self._put_parts(key, parts, config, replace=True)

    def get(self, key: Key) -> bytes:
        """Empty for a miss."""
        return self.get_batch([key])[0]

    def get_batch(self, keys: Sequence[Key]) -> list[bytes]:
        """Empty for each miss; one empty value for no keys."""
        return [b"" if value is None else value.tobytes() for value in self._read(texts(keys))] or [b""]

    def get_buffer(self, key: Key) -> BufferHandle | None:
        return self.batch_get_buffer([key])[0]

    def batch_get_buffer(self, keys: Sequence[Key]) -> list[BufferHandle | None]:
        """Memory with a copy of each object; None for a miss."""
        return [None if value is None else BufferHandle(value) for value in self._read(texts(keys))]

    # ------------------------------------------------------------ by address

    def put_from(self, key: Key, buffer_ptr: int, size: int, config: ReplicateConfig = DEFAULT_CONFIG) -> int:
        """Stores registered memory. Nothing at all is no object, and no error."""
        if size == 0:
            return Code.OK
        return self.batch_put_from([key], [buffer_ptr], [size], config)[0]

    def upsert_from(self, key: Key, buffer_ptr: int, size: int, config: ReplicateConfig = DEFAULT_CONFIG) -> int:
        return self.batch_upsert_from([key], [buffer_ptr], [size], config)[0]

    def batch_put_from(
        self, keys: Sequence[Key], buffer_ptrs: Sequence[int], sizes: Sequence[int],
        config: ReplicateConfig = DEFAULT_CONFIG,
    ) -> list[int]:  # fmt: skip
        """0 for each that is stored or was there; INVALID_PARAMS for memory that is not registered."""
        return self._put_from(keys, buffer_ptrs, sizes, config, replace=False)

    def batch_upsert_from(
        self, keys: Sequence[Key], buffer_ptrs: Sequence[int], sizes: Sequence[int],
        config: ReplicateConfig = DEFAULT_CONFIG,
    ) -> list[int]:  # fmt: skip
        return self._put_from(keys, buffer_ptrs, sizes, config, replace=True)

    @uses_memory
    def batch_put_from_multi_buffers(
        self, keys: Sequence[Key], all_buffer_ptrs: Sequence[Sequence[int]], all_sizes: Sequence[Sequence[int]],
        config: ReplicateConfig = DEFAULT_CONFIG,
    ) -> list[int]:  # fmt: skip
        """As `batch_put_from`, with each object in several pieces."""
        names = texts(keys)
        if not len(names) == len(all_buffer_ptrs) == len(all_sizes):
            return [Code.INVALID_PARAMS] * len(names)
        pieces = Pieces.of(all_buffer_ptrs, all_sizes)
        return self._put(
            names, self._pieces_good(pieces), pieces.object_sizes(),
            lambda rows: self._in_one_piece(pieces.take(rows)) or GatheredValues(pieces.take(rows)),
            config, replace=False,
        )  # fmt: skip

    def put_from_with_metadata(
        self, key: Key, buffer_ptr: int, metadata_buffer_ptr: int, size: int, metadata_size: int,
        config: ReplicateConfig = DEFAULT_CONFIG,
    ) -> int:  # fmt: skip
        """One object: the metadata, then the rest."""
        if size == 0:
            return Code.OK
        both = [[metadata_buffer_ptr, buffer_ptr]], [[metadata_size, size]]
        return self.batch_put_from_multi_buffers([key], *both, config)[0]

    def get_into(self, key: Key, buffer_ptr: int, size: int) -> int:
        """The object's size; OBJECT_NOT_FOUND; INVALID_PARAMS for too little room, or memory not registered."""
        return self.batch_get_into([key], [buffer_ptr], [size])[0]

    @uses_memory
    def batch_get_into(self, keys: Sequence[Key], buffer_ptrs: Sequence[int], sizes: Sequence[int]) -> list[int]:
        """As `get_into`. Memory whose code is negative may hold anything."""
        names, pointers, rooms = texts(keys), addresses(buffer_ptrs), addresses(sizes)
        if not len(names) == len(pointers) == len(rooms):
            return [Code.INVALID_PARAMS] * len(names)
        views = self._memory.views(pointers, rooms, to_write=True)
        good = np.fromiter((view is not None and len(view) > 0 for view in views), dtype=np.bool_, count=len(views))
        return self._get(names, good, lambda rows: WholeValues.of([_known(views[row]) for row in rows.tolist()]))

    @uses_memory
    def batch_get_into_multi_buffers(
        self, keys: Sequence[Key], all_buffer_ptrs: Sequence[Sequence[int]], all_sizes: Sequence[Sequence[int]],
        prefer_alloc_in_same_node: bool = False,
    ) -> list[int]:  # fmt: skip
        """As `batch_get_into`, each object into several pieces, which it must fill: TRANSFER_FAIL if it is smaller."""
        names = texts(keys)
        if not len(names) == len(all_buffer_ptrs) == len(all_sizes):
            return [Code.INVALID_PARAMS] * len(names)
        pieces = Pieces.of(all_buffer_ptrs, all_sizes)
        good = self._pieces_good(pieces, to_write=True) & (pieces.object_sizes() > 0)
        return self._get(
            names, good, lambda rows: self._in_one_piece(pieces.take(rows)) or ScatteredValues(pieces.take(rows))
        )

    # ------------------------------------------------------------ looking

    def is_exist(self, key: Key) -> int:
        """1 or 0; negative for an error."""
        return self.batch_is_exist([key])[0]

    def batch_is_exist(self, keys: Sequence[Key]) -> list[int]:
        """Looking holds nothing, and keeps nothing alive."""
        names = texts(keys)
        found = np.zeros(len(names), dtype=np.int64)
        self._by_calls(
            found, names, np.flatnonzero(usable(names)), lambda pool, some, _: pool.exists(some).astype(np.int64)
        )
        return found.tolist()

    def get_size(self, key: Key) -> int:
        """Bytes, or OBJECT_NOT_FOUND. Nothing is read."""
        return int(self._sizes([text(key)])[0])

    def get_replica_desc(self, key: Key) -> list[ReplicaDescriptor]:
        name = text(key)
        return self.batch_get_replica_desc([name]).get(name, [])

    def batch_get_replica_desc(self, keys: Sequence[Key]) -> dict[str, list[ReplicaDescriptor]]:
        """One copy of each object that is there, in memory or on a disk."""
        names = [name for name in texts(keys) if usable([name])[0]]

        def describe(pool: ObjectPool) -> dict[str, list[ReplicaDescriptor]]:
            sizes, in_memory = pool.sizes(names).tolist(), pool.in_memory(names).tolist()
            return {
                name: [ReplicaDescriptor(size, self._hostname, memory)]
                for name, size, memory in zip(names, sizes, in_memory, strict=True)
                if size >= 0
            }

        return (self._ask(describe, {}) or {}) if names else {}

    # ------------------------------------------------------------ removing

    def remove(self, key: Key, force: bool = False) -> int:
        """0 or OBJECT_NOT_FOUND. No reader stands in the way, so `force` makes no difference."""
        return self.batch_remove([key], force)[0]

    def batch_remove(self, keys: Sequence[Key], force: bool = False) -> list[int]:
        names = texts(keys)
        codes = np.full(len(names), Code.OBJECT_NOT_FOUND, dtype=np.int64)

        def remove(pool: ObjectPool, some: Sequence[str], _: Rows) -> Codes:
            there = pool.exists(some)
            # One that appeared meanwhile goes as well, and nobody hears of it.
            pool.remove(some)
            return np.where(there, Code.OK, Code.OBJECT_NOT_FOUND)

        self._by_calls(codes, names, np.flatnonzero(usable(names)), remove)
        return codes.tolist()

    def remove_all(self, force: bool = False) -> int:
        """How many there were; this tenant's alone."""
        return self._code(lambda pool: pool.remove_all())

    def remove_by_regex(self, regex_pattern: str, force: bool = False) -> int:
        """How many keys a part of which matches there were; INVALID_PARAMS for no pattern of Python's `re`."""
        try:
            pattern = re.compile(text(regex_pattern))
        except re.error:
            return Code.INVALID_PARAMS
        return self._code(lambda pool: pool.remove_matching(pattern))

    # ------------------------------------------------------------ parts

    def _put_batch(self, keys: Sequence[Key], values: Sequence[Any], config: ReplicateConfig, *, replace: bool) -> int:
        names, arrays = texts(keys), [as_array(value) for value in values]
        if len(names) != len(arrays) or not all(len(array) for array in arrays):
            return Code.INVALID_PARAMS
        return next((code for code in self._put_values(names, arrays, config, replace=replace) if code), Code.OK)

    def _put_parts(self, key: Key, parts: Sequence[Any], config: ReplicateConfig, *, replace: bool) -> int:
        arrays = [array for part in parts if len(array := as_array(part))]
        if not arrays:
            return Code.OK
        return self._put_objects([text(key)], [arrays], config, replace=replace)[0]

    def _put_values(
        self, names: Sequence[str], arrays: Sequence[Bytes], config: ReplicateConfig, *, replace: bool
    ) -> list[int]:
        values = WholeValues.of(arrays)
        return self._put(
            names, values.sizes > 0, values.sizes,
            lambda rows: WholeValues.of([arrays[row] for row in rows.tolist()]), config, replace=replace,
        )  # fmt: skip

    def _put_objects(
        self, names: Sequence[str], objects: Sequence[Sequence[Bytes]], config: ReplicateConfig, *, replace: bool
    ) -> list[int]:
        """Objects in several arrays of this process each."""
        pieces = Pieces.of_arrays(objects)
        sizes = pieces.object_sizes()
        return self._put(
            names, sizes > 0, sizes, lambda rows: GatheredValues(pieces.take(rows)), config, replace=replace
        )

    @uses_memory
    def _put_from(
        self, keys: Sequence[Key], buffer_ptrs: Sequence[int], sizes: Sequence[int], config: ReplicateConfig,
        *, replace: bool,
    ) -> list[int]:  # fmt: skip
        names, pointers, counts = texts(keys), addresses(buffer_ptrs), addresses(sizes)
        if not len(names) == len(pointers) == len(counts):
            return [Code.INVALID_PARAMS] * len(names)
        views = self._memory.views(pointers, counts)
        good = np.fromiter((view is not None for view in views), dtype=np.bool_, count=len(views))
        return self._put(
            names, good, counts,
            lambda rows: WholeValues.of([_known(views[row]) for row in rows.tolist()]), config, replace=replace,
        )  # fmt: skip

    def _in_one_piece(self, pieces: Pieces) -> WholeValues | None:
        """Objects of one piece each, where they lie; None if one of them has more."""
        if not (np.diff(pieces.first) == 1).all():
            return None
        views = self._memory.views(pieces.pointers, pieces.sizes)
        return WholeValues([_known(view) for view in views], pieces.sizes, exact=True)

    def _pieces_good(self, pieces: Pieces, *, to_write: bool = False) -> Bools:
        """Which objects lie in registered memory; a piece of no bytes lies anywhere."""
        inside = self._memory.contains(pieces.pointers, pieces.sizes, to_write=to_write)
        return pieces.all_of(inside | (pieces.sizes == 0))

    def _put(
        self, names: Sequence[str], good: Bools, sizes: NDArray[np.uint64], values_of: Callable[[Rows], Values],
        config: ReplicateConfig, *, replace: bool,
    ) -> list[int]:  # fmt: skip
        """Stores those that are good, have bytes and a usable name.

        Args: values_of: the values of these rows.
        """
        if not isinstance(config, ReplicateConfig):
            raise TypeError(f"expected a ReplicateConfig, not {type(config).__name__}")
        codes: Codes = np.full(len(names), config.check(len(names)), dtype=np.int64)
        codes[~(good & (sizes > 0) & usable(names))] = Code.INVALID_PARAMS
        store = upserted if replace else stored
        self._by_calls(
            codes, names, np.flatnonzero(codes == Code.OK),
            lambda pool, some, rows: store(pool, some, rows, values_of, config),
        )  # fmt: skip
        return list(codes.tolist())

    def _get(self, names: Sequence[str], good: Bools, values_of: Callable[[Rows], Values]) -> list[int]:
        codes: Codes = np.where(usable(names), Code.INVALID_PARAMS, Code.OBJECT_NOT_FOUND)
        self._by_calls(
            codes, names, np.flatnonzero(good & (codes == Code.INVALID_PARAMS)),
            lambda pool, some, rows: pool.get(some, values_of(rows)),
        )  # fmt: skip
        return list(codes.tolist())

    def _sizes(self, names: Sequence[str]) -> Codes:
        """Bytes of each object, or why they are not known."""
        sizes: Codes = np.full(len(names), Code.OBJECT_NOT_FOUND, dtype=np.int64)
        self._by_calls(sizes, names, np.flatnonzero(usable(names)), lambda pool, some, _: pool.sizes(some))
        return sizes

    def _by_calls(self, codes: Codes, names: Sequence[str], rows: Rows, call: Call) -> None:
        """Fills in the codes of these rows, by as many calls to the pool as they need."""
        for first in range(0, len(rows), CALL_KEYS_MAX):
            part = rows[first : first + CALL_KEYS_MAX]
            some = names if len(part) == len(names) else [names[row] for row in part.tolist()]
            codes[part] = self._codes(len(part), bound(call, some, part))

    def _read(self, names: Sequence[str]) -> list[Bytes | None]:
        values: list[Bytes | None] = [None] * len(names)
        rows = np.flatnonzero(usable(names)).tolist()
        found = self._ask(lambda pool: pool.read([names[row] for row in rows]), None) if rows else None
        for row, value in zip(rows, found or [], strict=False):
            values[row] = value
        return values


def stored(
    pool: ObjectPool, names: Sequence[str], rows: Rows, values_of: Callable[[Rows], Values], config: ReplicateConfig
) -> Codes:
    """Puts objects. One that exists, or that somebody is writing, is a success: a key's content does not change."""
    codes = pool.put(names, values_of(rows), config.replica_num)
    pin(pool, names, codes, config)
    codes[(codes == Code.OBJECT_ALREADY_EXISTS) | (codes == Code.REPLICA_IS_NOT_READY)] = Code.OK
    return codes


def upserted(
    pool: ObjectPool, names: Sequence[str], rows: Rows, values_of: Callable[[Rows], Values], config: ReplicateConfig
) -> Codes:
    """Removes objects and puts others under their keys; REPLICA_IS_NOT_READY if others keep putting in between."""
    codes = np.full(len(names), Code.REPLICA_IS_NOT_READY, dtype=np.int64)
    left = np.arange(len(names))
    for _ in range(UPSERT_TRIES):
        some = [names[row] for row in left.tolist()]
        pool.remove(some)
        codes[left] = pool.put(some, values_of(rows[left]), config.replica_num)
        left = left[(codes[left] == Code.OBJECT_ALREADY_EXISTS) | (codes[left] == Code.REPLICA_IS_NOT_READY)]
        if not len(left):
            break
    codes[left] = Code.REPLICA_IS_NOT_READY
    pin(pool, names, codes, config)
    return codes


def pin(pool: ObjectPool, names: Sequence[str], codes: Codes, config: ReplicateConfig) -> None:
    """Pins what was stored just now, as its config wants it."""
    ttl_s = PIN_S_MAX if config.with_hard_pin else 0.0
    if config.soft_pin_action is SoftPinAction.ENABLE:
        asked_s = SOFT_PIN_S if config.soft_pin_ttl_ms is None else config.soft_pin_ttl_ms / 1000
        ttl_s = max(ttl_s, min(asked_s, PIN_S_MAX))
    mine = [name for name, code in zip(names, codes.tolist(), strict=True) if code == Code.OK]
    if ttl_s > 0 and mine:
        pool.pin(mine, ttl_s)


def bound(call: Call, names: Sequence[str], rows: Rows) -> Callable[[ObjectPool], Codes]:
    return lambda pool: call(pool, names, rows)


def as_array(value: Any) -> Bytes:
    """Bytes of anything with the buffer interface, in the order of its elements. Raises: TypeError."""
    view = memoryview(value)
    if not view.nbytes:
        return np.empty(0, dtype=np.uint8)
    return np.frombuffer(view if view.c_contiguous else view.tobytes(), dtype=np.uint8)


def _known(view: Bytes | None) -> Bytes:
    if view is None:
        raise BadArgument("memory was unregistered meanwhile")
    return view
