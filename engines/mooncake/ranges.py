"""A store's calls for ranges of objects: sessions that put or get an object piece by piece, and scattered reads."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from engines.mooncake.codes import Code
from engines.mooncake.configuration import DEFAULT_CONFIG, ReplicateConfig
from engines.mooncake.connection import texts, uses_memory
from engines.mooncake.memory import Bytes, addresses
from engines.mooncake.objects import Key, ObjectCalls
from engines.mooncake.pool import Codes
from engines.mooncake.sessions import Session, Sessions
from kvpool.core.kernels.copying import copy_blocks

#: Objects, and bytes unless it is one object, that are read at a time when sessions start.
READ_KEYS, READ_BYTES = 64, 64 << 20


class RangeCalls(ObjectCalls):
    """Puts and gets by ranges."""

    def __init__(self) -> None:
        super().__init__()
        self._puts, self._gets = Sessions(), Sessions()

    def close(self) -> int:
        self._puts.clear()
        self._gets.clear()
        return super().close()

    # ------------------------------------------------------------ putting

    def batch_put_session_start(
        self, keys: Sequence[Key], sizes: Sequence[int], config: ReplicateConfig = DEFAULT_CONFIG
    ) -> list[int]:
        """Makes room for objects; nobody sees them before `batch_put_session_end`.

        Returns for each: 0; OBJECT_ALREADY_EXISTS; NO_AVAILABLE_HANDLE beyond the bytes that sessions may have.
        """
        names, wanted = texts(keys), addresses(sizes).tolist()
        if len(names) != len(wanted) or config.check(len(names)) != Code.OK:
            return [Code.INVALID_PARAMS] * len(names)
        exists, codes, now_s = self.batch_is_exist(names), [], time.monotonic()
        for name, size, there in zip(names, wanted, exists, strict=True):
            if there:
                codes.append(Code.OBJECT_ALREADY_EXISTS if there > 0 else there)
            elif not size:
                codes.append(Code.INVALID_PARAMS)
            else:
                opened = self._puts.open(name, size, now_s)
                if isinstance(opened, int):
                    codes.append(opened)
                    continue
                # Its groups are those of all keys of this call.
                opened.config = config if config.group_ids is None else replace(config, group_ids=None)
                codes.append(Code.OK)
        return codes

    def batch_put_from_multi_buffer_ranges(
        self, keys: Sequence[Key], all_buffer_ptrs: Sequence[Sequence[int]], all_sizes: Sequence[Sequence[int]],
        all_dst_offsets: Sequence[Sequence[int]],
    ) -> list[int]:  # fmt: skip
        """Bytes written of each; INVALID_PARAMS without a session, beyond the object, or for unregistered memory."""
        return self._move(self._puts, keys, all_buffer_ptrs, all_sizes, all_dst_offsets, to_caller=False)

    def batch_put_session_end(self, keys: Sequence[Key]) -> list[int]:
        """Stores what was written. INVALID_WRITE for an object that was not written wholly; it is dropped."""
        names, codes = texts(keys), []
        for name in names:
            session = self._puts.close(name)
            if session is None:
                codes.append(Code.INVALID_PARAMS)
            elif not session.is_complete:
                codes.append(Code.INVALID_WRITE)
            else:
                codes.append(self._put_values([name], [session.data], session.config, replace=False)[0])
        return codes

    def batch_put_session_revoke(self, keys: Sequence[Key]) -> list[int]:
        """Ends sessions without storing anything."""
        dropped = [self._puts.close(name) for name in texts(keys)]
        return [Code.INVALID_PARAMS if session is None else Code.OK for session in dropped]

    # ------------------------------------------------------------ getting

    def batch_get_session_start(self, keys: Sequence[Key]) -> list[int]:
        """Reads and checks objects, for ranges of them to be taken.

        Returns for each: 0, or why not; NO_AVAILABLE_HANDLE, and not read, beyond the bytes of all sessions.
        """
        names, now_s = texts(keys), time.monotonic()
        sizes = self._sizes(names)
        room = self._gets.room(names, now_s)
        codes: list[int] = sizes.tolist()
        for row in np.flatnonzero(sizes > 0).tolist():
            if codes[row] > room:
                codes[row] = sizes[row] = Code.NO_AVAILABLE_HANDLE
            else:
                room -= codes[row]
        for lot in lots(sizes):
            for row, value in zip(lot, self._read([names[row] for row in lot]), strict=True):
                codes[row] = Code.OBJECT_NOT_FOUND if value is None else self._open_read(names[row], value, now_s)
        return codes

    def _open_read(self, name: str, value: Bytes, now_s: float) -> int:
        opened = self._gets.open(name, len(value), now_s, value)
        return opened if isinstance(opened, int) else Code.OK

    def batch_get_into_multi_buffer_ranges(
        self, keys: Sequence[Key], all_buffer_ptrs: Sequence[Sequence[int]], all_sizes: Sequence[Sequence[int]],
        all_src_offsets: Sequence[Sequence[int]],
    ) -> list[int]:  # fmt: skip
        """Bytes read of each; INVALID_PARAMS without a session, beyond the object, or for unregistered memory."""
        return self._move(self._gets, keys, all_buffer_ptrs, all_sizes, all_src_offsets, to_caller=True)

    def batch_get_session_end(self, keys: Sequence[Key]) -> int:
        """0, whether there were sessions or not."""
        for name in texts(keys):
            self._gets.close(name)
        return Code.OK

    @uses_memory
    def get_into_ranges(
        self, buffer_ptrs: Sequence[int], all_keys: Sequence[Sequence[Key]],
        all_dst_offsets: Sequence[Sequence[Sequence[int]]], all_src_offsets: Sequence[Sequence[Sequence[int]]],
        all_sizes: Sequence[Sequence[Sequence[int]]],
    ) -> list[list[list[int]]]:  # fmt: skip
        """Reads pieces of objects into pieces of buffers; of each piece its bytes, or a code."""
        return [
            [
                self._read_ranges(pointer, key, list(targets), list(offsets), list(sizes))
                for key, targets, offsets, sizes in zip(*of_buffer, strict=True)
            ]
            for pointer, *of_buffer in zip(
                buffer_ptrs, all_keys, all_dst_offsets, all_src_offsets, all_sizes, strict=True
            )
        ]

    # ------------------------------------------------------------ parts

    def _read_ranges(
        self, pointer: int, key: Key, targets: list[int], offsets: list[int], sizes: list[int]
    ) -> list[int]:
        if not len(targets) == len(offsets) == len(sizes):
            return [Code.INVALID_PARAMS] * len(targets)
        value = self._read(texts([key]))[0]
        if value is None:
            return [Code.OBJECT_NOT_FOUND] * len(targets)
        codes = []
        for target, offset, size in zip(targets, offsets, sizes, strict=True):
            moved = Session(value, 0.0).within([offset], [size]) and self._copy(
                value, [pointer + target], [size], [offset], to_caller=True
            )
            codes.append(size if moved else Code.INVALID_PARAMS)
        return codes

    @uses_memory
    def _move(
        self, sessions: Sessions, keys: Sequence[Key], all_pointers: Sequence[Sequence[int]],
        all_sizes: Sequence[Sequence[int]], all_offsets: Sequence[Sequence[int]], *, to_caller: bool,
    ) -> list[int]:  # fmt: skip
        names = texts(keys)
        if not len(names) == len(all_pointers) == len(all_sizes) == len(all_offsets):
            return [Code.INVALID_PARAMS] * len(names)
        codes, now_s = [], time.monotonic()
        for name, pointers, sizes, offsets in zip(names, all_pointers, all_sizes, all_offsets, strict=True):
            session = sessions.find(name, now_s)
            fits = (
                session is not None
                and len(pointers) == len(sizes) == len(offsets) > 0
                and session.within(offsets, sizes)
                and self._copy(session.data, pointers, sizes, offsets, to_caller=to_caller)
            )
            if fits and session is not None and not to_caller:
                session.written += [(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True)]
            codes.append(sum(sizes) if fits else Code.INVALID_PARAMS)
        return codes

    def _copy(
        self, data: Bytes, pointers: Sequence[int], sizes: Sequence[int], offsets: Sequence[int], *, to_caller: bool
    ) -> bool:
        """Copies between ranges of an object and registered memory; False if that is not all registered."""
        outside, counts = addresses(pointers), addresses(sizes)
        if not self._memory.contains(outside, counts, to_write=to_caller).all():
            return False
        inside = addresses(offsets) + np.uint64(data.ctypes.data)
        if to_caller:
            copy_blocks(inside, outside, counts)
        else:
            copy_blocks(outside, inside, counts)
        return True


def lots(sizes: Codes) -> Iterator[list[int]]:
    """The rows of objects to read, READ_KEYS and READ_BYTES at a time. Args: sizes: those not above 0 are left out."""
    lot: list[int] = []
    lot_bytes = 0
    for row in np.flatnonzero(sizes > 0).tolist():
        size = int(sizes[row])
        if lot and (len(lot) == READ_KEYS or lot_bytes + size > READ_BYTES):
            yield lot
            lot, lot_bytes = [], 0
        lot.append(row)
        lot_bytes += size
    if lot:
        yield lot
