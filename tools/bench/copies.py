"""A process that copies on command: a client of a node, or the machine's own memcpy as a limit.

    python tools/bench/copies.py SETTINGS      (JSON; started by `same_host.py`)

It says "ready", then for each line of its input (the name of a method below) does that once and prints when it began
and ended, on the monotonic clock that all processes of a machine share.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import xxhash
from node import SECTION_COUNT, aligned_rows, block_namespace, fill, made_keys
from numpy.typing import NDArray

from kvpool.client import PoolClient

#: glibc copies past the cache only from its threshold on, which blocks do not reach; this lets them.
TUNABLES = "glibc.cpu.x86_non_temporal_threshold=1048576"
#: What is copied before it is hashed: a part of what the second cache of a core holds.
PIECE_BYTES = 256 << 10
Bytes2D = NDArray[np.uint8]


class Memcpy:
    """What the machine's own copies do with blocks of private memory; the limits."""

    def __init__(self, block_bytes: int, count: int) -> None:
        self.source, self.target = aligned_rows(count, block_bytes), aligned_rows(count, block_bytes)
        fill(np.random.default_rng(block_bytes), self.source)
        self._threads = ThreadPoolExecutor(2)

    def whole(self) -> None:
        np.copyto(self.target, self.source)

    def blocks(self) -> None:
        copy_rows(self.source, self.target)

    def hashed(self) -> None:
        copy_and_hash_rows(self.source, self.target)

    def blocks_two(self) -> None:
        self._by_two(copy_rows)

    def hashed_two(self) -> None:
        self._by_two(copy_and_hash_rows)

    def _by_two(self, run: Callable[[Bytes2D, Bytes2D], None]) -> None:
        if len(self.source) == 1:
            source, target = self.source.reshape(2, -1), self.target.reshape(2, -1)
        else:
            source, target = self.source, self.target
        half = len(source) // 2
        list(self._threads.map(run, (source[:half], source[half:]), (target[:half], target[half:])))


def copy_rows(source: Bytes2D, target: Bytes2D) -> None:
    for one, other in zip(source, target, strict=True):
        np.copyto(other, one)


def copy_and_hash_rows(source: Bytes2D, target: Bytes2D) -> None:
    """Copies and hashes in turn, in pieces that are still in the cache when they are hashed; a digest a section."""
    step = max(1, source.shape[1] // SECTION_COUNT)
    for one, other in zip(source, target, strict=True):
        if len(other) <= PIECE_BYTES:
            np.copyto(other, one)
            for section in range(0, len(other), step):
                xxhash.xxh3_64_intdigest(other[section : section + step], seed=section)
            continue
        for section in range(0, len(other), step):
            digest = xxhash.xxh3_64(seed=section)
            for at in range(section, section + step, PIECE_BYTES):
                piece = slice(at, min(at + PIECE_BYTES, section + step))
                np.copyto(other[piece], one[piece])
                digest.update(other[piece])
            digest.intdigest()


class Client:
    """A client of a node that gets blocks, or puts new ones and takes them away again."""

    def __init__(self, address: str, block_bytes: int, count: int, seed: int, channel: str = "shm") -> None:
        self.client = PoolClient(address, channels=(channel,), timeout_s=60)
        self.namespace = self.client.register(block_namespace(block_bytes))
        self.rng = np.random.default_rng([seed, block_bytes])
        self.keys, self.data = made_keys(self.rng, count), aligned_rows(count, block_bytes)
        fill(self.rng, self.data)
        self.out = aligned_rows(count, block_bytes)
        with PoolClient(address, channels=("shm",), timeout_s=60) as writer:  # not every channel writes
            writer.register(block_namespace(block_bytes))
            assert writer.put(self.namespace, self.keys, self.data, ttl_s=120).stored.all()
        self.new_keys = made_keys(self.rng, count)

    def get(self) -> None:
        self.get_as(verify=True)

    def get_unverified(self) -> None:
        self.get_as(verify=False)

    def get_as(self, *, verify: bool) -> None:
        assert self.client.get(self.namespace, self.keys, self.out, verify=verify).found.all()

    def put(self) -> None:
        assert self.client.put(self.namespace, self.new_keys, self.data, ttl_s=120).stored.all()

    def remove_put(self) -> None:
        self.client.remove(self.namespace, self.new_keys)

    def memcpy(self) -> None:
        copy_rows(self.data, self.out)

    def check(self) -> None:
        self.out[:] = 0
        self.get()
        assert np.array_equal(self.out, self.data), "wrong bytes"

    def close(self) -> None:
        self.client.remove(self.namespace, self.keys)
        self.client.close()


class Process:
    """This file in another process."""

    def __init__(self, settings: dict[str, Any], *, tuned: bool = False) -> None:
        environment = dict(os.environ, GLIBC_TUNABLES=TUNABLES) if tuned else None
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(settings)], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def begin(self, name: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(name + "\n")
        self._process.stdin.flush()

    def ended(self) -> tuple[float, float]:
        """When it began and ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a process of the benchmark has ended; its error is above")
        begin_s, end_s = json.loads(line)
        return begin_s, end_s

    def run(self, name: str) -> float:
        """Does it once. Returns seconds."""
        self.begin(name)
        begin_s, end_s = self.ended()
        return end_s - begin_s

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()


def run_together(processes: list[Process], name: str) -> float:
    """All do it at the same time. Returns seconds from the first beginning to the last end."""
    for process in processes:
        process.begin(name)
    times = [process.ended() for process in processes]
    return max(end for _, end in times) - min(begin for begin, _ in times)


def main() -> None:
    settings = json.loads(sys.argv[1])
    worker: Any = {"memcpy": Memcpy, "client": Client}[settings.pop("role")](**settings)
    print(json.dumps((0, 0)), flush=True)
    for line in sys.stdin:
        begin_s = time.monotonic()
        getattr(worker, line.strip())()
        print(json.dumps((begin_s, time.monotonic())), flush=True)
    if isinstance(worker, Client):
        worker.close()


if __name__ == "__main__":
    main()
