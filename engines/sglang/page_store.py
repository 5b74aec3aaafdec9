"""One host pool's pages in one namespace of the pool: which are there, reading them, storing them.

A page counts only if all of it does: every group and every shard that this process holds. What is read or stored in
part is a miss.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np

from engines.attached.line import NodeLine
from engines.attached.planes import Int64s, Rows
from engines.sglang.hits import Bools, Keys, leading, page_keys
from engines.sglang.pages import Pages
from engines.sglang.settings import BackendSettings
from kvpool.channels.base import Memory
from kvpool.core.ids import NamespaceId

#: Pages are moved in batches of about this size, so that each call ends in time and a miss costs one batch at most.
BATCH_BYTES = 64 << 20
#: Pages of many planes are put together in a buffer of this size: large enough that the calls of a store, two for each
#: batch, weigh little.
STAGED_BATCH_BYTES = 16 << 20
#: How long a page that another engine is storing right now is waited for.
WRITER_WAIT_S = 1.0


class PageStore:
    """Reads and stores pages. For any thread; calls that need the buffer of one direction take turns."""

    def __init__(
        self, line: NodeLine, settings: BackendSettings, namespace: NamespaceId, pages: Pages, first_shard: int
    ) -> None:
        """Args: first_shard: number in the namespace of the first shard of `pages`."""
        self._line, self._settings, self.namespace, self.pages = line, settings, namespace, pages
        self._shards = range(first_shard, first_shard + len(pages.shards))
        self._groups = range(len(pages.group_bytes))
        self._views = [[pages.view(shard, group) for group in self._groups] if pages.direct else [] for shard in
                       range(len(pages.shards))]  # fmt: skip
        staged_pages = 0 if pages.direct else max(STAGED_BATCH_BYTES // pages.shard_bytes, 1)
        self._load_buffer = np.empty((staged_pages, pages.shard_bytes), dtype=np.uint8)
        self._store_buffer = np.empty_like(self._load_buffer)
        self._loading, self._storing = threading.Lock(), threading.Lock()
        page_bytes = pages.shard_bytes * len(pages.shards)
        self._batch_pages = staged_pages or max(BATCH_BYTES // page_bytes, 1)

    @property
    def page_bytes(self) -> int:
        return self.pages.shard_bytes * len(self.pages.shards)

    def keys(self, hashes: Sequence[str]) -> Keys:
        return page_keys(self.namespace, hashes)

    def there(self, hashes: Sequence[str], *, prefix_only: bool = False) -> Bools:
        """Which pages are there, whole. prefix_only: nothing after the first gap is asked for, nor counted."""
        keys, timeout_s = self.keys(hashes), self._settings.lookup_timeout_ms / 1e3
        found = np.ones(len(keys), dtype=np.bool_)
        for shard in self._shards:
            for group in self._groups:
                end = leading(found) if prefix_only else len(keys)
                found[:end] &= self._line.lookup(self.namespace, group, (shard,), keys[:end], timeout_s)
        if prefix_only:
            found[leading(found) :] = False
        return found

    # ------------------------------------------------------------ pages of the host pool

    def load(self, hashes: Sequence[str], numbers: Int64s, timeout_s: float) -> Bools:
        """Reads pages into the host pool, up to the first that is not there; what follows it is not looked for.

        Args: numbers: page of the host pool for each hash, int64 (pages,). Pages not read may hold anything.
        """
        self.pages.check(numbers)
        keys, end_s = self.keys(hashes), time.monotonic() + timeout_s
        done = np.zeros(len(keys), dtype=np.bool_)
        for first in range(0, len(keys), self._batch_pages):
            some = slice(first, first + self._batch_pages)
            good = self._load_batch(keys[some], numbers[some], end_s)
            done[first : first + good] = True
            if good < len(keys[some]):
                break
        return done

    def _load_batch(self, keys: Keys, numbers: Int64s, end_s: float) -> int:
        """Pages read before the first that is not there."""
        good = len(keys)
        if not self.pages.direct:
            with self._loading:
                for place, shard in enumerate(self._shards):
                    rows = self._load_buffer[:good]
                    good = leading(self._get(0, shard, keys[:good], rows, None, end_s))
                    self.pages.scatter(place, rows, numbers[:good])
            return good
        for place, shard in enumerate(self._shards):
            for group in self._groups:
                view = self._views[place][group]
                good = leading(self._get(group, shard, keys[:good], view, numbers[:good], end_s))
        return good

    def store(self, hashes: Sequence[str], numbers: Int64s, timeout_s: float, parent: str = "") -> Bools:
        """Stores pages of the host pool; which are in the pool now.

        Args: parent: hash of the page before the first one, if there is one and it is known.
        """
        self.pages.check(numbers)
        keys, end_s = self.keys(hashes), time.monotonic() + timeout_s
        before = self.keys([parent])[0].tobytes() if parent else b""
        done = np.zeros(len(keys), dtype=np.bool_)
        for first in range(0, len(keys), self._batch_pages):
            some = slice(first, first + self._batch_pages)
            done[some] = self._store_batch(keys[some], numbers[some], before, end_s)
            before = keys[some][-1].tobytes()
        return done

    def _store_batch(self, keys: Keys, numbers: Int64s, parent: bytes, end_s: float) -> Bools:
        there = np.ones(len(keys), dtype=np.bool_)
        if not self.pages.direct:
            with self._storing:
                for place, shard in enumerate(self._shards):
                    rows = self._store_buffer[: len(keys)]
                    self.pages.gather(place, numbers, rows)
                    there &= self._put(0, shard, keys, rows, None, parent, end_s)
            return there
        for place, shard in enumerate(self._shards):
            for group in self._groups:
                # What is not there in one part need not be stored in the next.
                left = np.flatnonzero(there)
                view = self._views[place][group]
                there[left] = self._put(group, shard, keys[left], view, numbers[left], parent, end_s)
        return there

    # ------------------------------------------------------------ flat pages

    def load_flat(self, hashes: Sequence[str], pages: Sequence[Rows], timeout_s: float) -> Bools:
        """Reads pages into flat arrays, uint8 (page_bytes,) each, in the order of the pool's own flat pages."""
        keys, end_s = self.keys(hashes), time.monotonic() + timeout_s
        found = np.ones(len(keys), dtype=np.bool_)
        for group, begin, end in self._parts():
            memory = [page[begin:end] for page in pages]
            found &= self._get(group, self._shards[0], keys, memory, None, end_s)
        return found

    def store_flat(self, hashes: Sequence[str], pages: Sequence[Rows], timeout_s: float) -> Bools:
        """Stores flat pages, uint8 (page_bytes,) each."""
        keys, end_s = self.keys(hashes), time.monotonic() + timeout_s
        there = np.ones(len(keys), dtype=np.bool_)
        for group, begin, end in self._parts():
            memory = [page[begin:end] for page in pages]
            there &= self._put(group, self._shards[0], keys, memory, None, b"", end_s)
        return there

    def _parts(self) -> list[tuple[int, int, int]]:
        """Groups, and where their bytes begin and end in a flat page of one shard."""
        ends = np.cumsum(self.pages.group_bytes).tolist()
        return [(group, end - size, end) for group, (size, end) in
                enumerate(zip(self.pages.group_bytes, ends, strict=True))]  # fmt: skip

    # ------------------------------------------------------------ one group of one shard, until a time

    def _get(self, group: int, shard: int, keys: Keys, out: Memory, rows: Int64s | None, end_s: float) -> Bools:
        fair_s = self._settings.load_timeout_s / 2
        left_s = end_s - time.monotonic()
        return self._line.get(self.namespace, group, shard, keys, out, left_s, rows=rows, fair_s=fair_s)

    def _put(
        self, group: int, shard: int, keys: Keys, pages: Memory, rows: Int64s | None, parent: bytes, end_s: float
    ) -> Bools:
        return self._line.put(
            self.namespace, group, shard, keys, pages, end_s - time.monotonic(), rows=rows, parent=parent,
            tenant=self._settings.tenant, others_s=WRITER_WAIT_S,
        )  # fmt: skip
