"""What a store answers, in the plainest way: the oracle that kvpool's and Mooncake's own are compared with."""

from __future__ import annotations

import re
from collections.abc import Sequence

BAD, MISSING, SHORT = -600, -704, -800


class PlainStore:
    """Objects in a dict; addresses are offsets into one piece of memory."""

    def __init__(self, size_bytes: int) -> None:
        self.memory = bytearray(size_bytes)
        self.objects: dict[str, bytes] = {}

    # ------------------------------------------------------------ by value

    def put(self, key: str, value: bytes) -> int:
        if not key or not value:
            return BAD
        self.objects.setdefault(key, bytes(value))
        return 0

    def put_batch(self, keys: Sequence[str], values: Sequence[bytes]) -> int:
        if len(keys) != len(values) or not all(values):
            return BAD
        codes = [self.put(key, value) for key, value in zip(keys, values, strict=True)]
        return next((code for code in codes if code), 0)

    def put_parts(self, key: str, *parts: bytes) -> int:
        return self.put(key, b"".join(parts)) if any(parts) else 0

    def upsert(self, key: str, value: bytes) -> int:
        if not key or not value:
            return BAD
        self.objects[key] = bytes(value)
        return 0

    def upsert_batch(self, keys: Sequence[str], values: Sequence[bytes]) -> int:
        if len(keys) != len(values) or not all(values):
            return BAD
        codes = [self.upsert(key, value) for key, value in zip(keys, values, strict=True)]
        return next((code for code in codes if code), 0)

    def upsert_parts(self, key: str, *parts: bytes) -> int:
        return self.upsert(key, b"".join(parts)) if any(parts) else 0

    def get(self, key: str) -> bytes:
        return self.objects.get(key, b"")

    def get_batch(self, keys: Sequence[str]) -> list[bytes]:
        return [self.get(key) for key in keys] or [b""]

    def batch_get_buffer(self, keys: Sequence[str]) -> list[bytes | None]:
        return [self.objects.get(key) for key in keys]

    # ------------------------------------------------------------ by address

    def put_from(self, key: str, at: int, size: int) -> int:
        return self.put(key, self._at(at, size)) if size else 0

    def batch_put_from(self, keys: Sequence[str], at: Sequence[int], sizes: Sequence[int]) -> list[int]:
        if not len(keys) == len(at) == len(sizes):
            return [BAD] * len(keys)
        return [self.put(key, self._at(*piece)) for key, *piece in zip(keys, at, sizes, strict=True)]

    def batch_upsert_from(self, keys: Sequence[str], at: Sequence[int], sizes: Sequence[int]) -> list[int]:
        if not len(keys) == len(at) == len(sizes):
            return [BAD] * len(keys)
        return [self.upsert(key, self._at(*piece)) for key, *piece in zip(keys, at, sizes, strict=True)]

    def batch_put_from_multi_buffers(
        self, keys: Sequence[str], at: Sequence[Sequence[int]], sizes: Sequence[Sequence[int]]
    ) -> list[int]:
        if not len(keys) == len(at) == len(sizes):
            return [BAD] * len(keys)
        return [
            self.put(key, b"".join(self._at(*piece) for piece in zip(places, lengths, strict=True)))
            for key, places, lengths in zip(keys, at, sizes, strict=True)
        ]

    def put_from_with_metadata(self, key: str, at: int, metadata_at: int, size: int, metadata_size: int) -> int:
        return self.put(key, self._at(metadata_at, metadata_size) + self._at(at, size)) if size else 0

    def get_into(self, key: str, at: int, size: int) -> int:
        return self.batch_get_into([key], [at], [size])[0]

    def batch_get_into(self, keys: Sequence[str], at: Sequence[int], sizes: Sequence[int]) -> list[int]:
        if not len(keys) == len(at) == len(sizes):
            return [BAD] * len(keys)
        codes = []
        for key, place, room in zip(keys, at, sizes, strict=True):
            value = self.objects.get(key)
            if value is None:
                codes.append(MISSING)
            elif len(value) > room:
                codes.append(BAD)
            else:
                self.memory[place : place + len(value)] = value
                codes.append(len(value))
        return codes

    def batch_get_into_multi_buffers(
        self, keys: Sequence[str], at: Sequence[Sequence[int]], sizes: Sequence[Sequence[int]]
    ) -> list[int]:
        if not len(keys) == len(at) == len(sizes):
            return [BAD] * len(keys)
        return [self._scatter(*one) for one in zip(keys, at, sizes, strict=True)]

    def _scatter(self, key: str, at: Sequence[int], sizes: Sequence[int]) -> int:
        value = self.objects.get(key)
        if value is None:
            return MISSING
        if len(value) != sum(sizes):
            return BAD if len(value) > sum(sizes) else SHORT
        done = 0
        for place, size in zip(at, sizes, strict=True):
            self.memory[place : place + size] = value[done : done + size]
            done += size
        return len(value)

    def _at(self, place: int, size: int) -> bytes:
        return bytes(self.memory[place : place + size])

    # ------------------------------------------------------------ looking, removing

    def is_exist(self, key: str) -> int:
        return int(key in self.objects)

    def batch_is_exist(self, keys: Sequence[str]) -> list[int]:
        return [self.is_exist(key) for key in keys]

    def get_size(self, key: str) -> int:
        return len(self.objects[key]) if key in self.objects else MISSING

    def remove(self, key: str, force: bool) -> int:
        return MISSING if self.objects.pop(key, None) is None else 0

    def batch_remove(self, keys: Sequence[str], force: bool) -> list[int]:
        return [self.remove(key, force) for key in keys]

    def remove_by_regex(self, pattern: str, force: bool) -> int:
        try:
            compiled = re.compile(pattern)
        except re.error:
            return BAD
        found = [key for key in self.objects if compiled.search(key)]
        for key in found:
            del self.objects[key]
        return len(found)

    def remove_all(self, force: bool) -> int:
        count = len(self.objects)
        self.objects.clear()
        return count
