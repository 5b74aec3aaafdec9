"""What work costs as a source grows: memory a block, look-ups, reserve and commit, insertion and eviction.

Each size is measured in a process of its own, on the core alone: CPU time of one thread, no RPC, no bytes moved.

python tools/bench/growth.py [--json FILE] [--blocks 1000,1000000,10000000]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from harness import Report, Row, arguments, wait_until_quiet
from node import block_namespace, made_keys
from numpy.typing import NDArray

from kvpool.core.arrays import SourceArrays
from kvpool.core.ids import SessionId
from kvpool.core.kernels.compiling import compile_kernels
from kvpool.core.namespace import SECTIONS_MAX, GroupSpec
from kvpool.core.results import SourceConfig
from kvpool.core.source import SourceCore

BLOCK_BYTES = 4096
#: Blocks of a call where the rate counts; one and thirty-two where the time of a call does.
BATCH, PROMPT = 4096, 32
TTL_US = 60_000_000
#: Blocks of the largest unit of a segment: with whole units just so many fit.
WHOLE_UNITS = 1024
#: With fewer blocks, memory that was freed before hides what they take.
PRIVATE_BLOCKS_MIN = 500_000


class Source:
    """A core with room for just so many blocks."""

    def __init__(self, blocks: int, eviction: str) -> None:
        assert blocks % WHOLE_UNITS == 0
        before = private_bytes()
        self.arrays = SourceArrays.allocate(blocks, SECTIONS_MAX)
        self.arrays.digests[:] = 0  # all pages there, so that what is added later is private
        arrays_bytes = private_bytes() - before
        config = SourceConfig(blocks * BLOCK_BYTES, blocks, eviction=eviction, high_watermark=1.0, low_watermark=1.0)
        self.core = SourceCore(config, self.arrays)
        self.namespace = self.core.register_namespace(block_namespace(BLOCK_BYTES, 1))
        self.session = SessionId(self.core.open_session("bench", 0))
        self.group: GroupSpec = self.core.group(self.namespace, 0, 0)
        self.rng = np.random.default_rng(blocks)
        self.keys: list[NDArray[np.uint8]] = []
        self._base = before + arrays_bytes

    def fill(self, blocks: int) -> float:
        """Returns seconds."""
        took_s = 0.0
        for at in range(0, blocks, BATCH):
            keys = made_keys(self.rng, min(BATCH, blocks - at))
            self.keys.append(keys)
            took_s += self.put(keys)
        return took_s

    def put(self, keys: NDArray[np.uint8]) -> float:
        """Reserve and commit, as a writer and what is told to the directory make it. Returns seconds."""
        digests = np.zeros(len(keys), dtype=np.uint64)
        rows, sections = np.arange(len(keys), dtype=np.uint32), np.zeros(len(keys), dtype=np.uint32)
        begin_s = time.thread_time()
        reserved = self.core.reserve(self.session, self.namespace, self.group, keys, TTL_US, 0)
        complete = self.core.commit(self.session, reserved.reservation, rows, sections, digests, 0)
        self.core.take_changes()
        took_s = time.thread_time() - begin_s
        assert complete == len(keys)
        return took_s

    def private_bytes_grown(self) -> int:
        return private_bytes() - self._base


def private_bytes() -> int:
    """Anonymous memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("no RssAnon in /proc/self/status")


def measure_one(blocks: int, eviction: str, rounds: int) -> dict[str, list[float]]:
    """All figures of one size."""
    compile_kernels()
    Source(4 * WHOLE_UNITS, eviction).fill(12 * WHOLE_UNITS)
    blocks = -(-blocks // WHOLE_UNITS) * WHOLE_UNITS
    source = Source(blocks, eviction)
    filled_s = source.fill(blocks)
    private = source.private_bytes_grown() - sum(keys.nbytes for keys in source.keys)
    every = np.concatenate(source.keys)
    core, index = source.core, source.core.index
    batch = every[source.rng.integers(0, blocks, BATCH)]
    single = [every[row : row + 1] for row in source.rng.integers(0, blocks, 200).tolist()]
    shared = SourceArrays.bytes_needed(blocks, SECTIONS_MAX) + blocks  # and a touch mark each
    times = {
        "batch": lambda: clock(lambda: index.lookup(batch)) / BATCH,
        "single": lambda: clock(lambda: [index.lookup(key) for key in single]) / len(single),
        "lease": lambda: clock(lambda: lease(source, batch[:PROMPT])),
        "evicting": lambda: source.put(made_keys(source.rng, min(BATCH, blocks // 2))) / min(BATCH, blocks // 2),
        "put one": lambda: statistics.median(source.put(made_keys(source.rng, 1)) for _ in range(50)),
        "put prompt": lambda: statistics.median(source.put(made_keys(source.rng, PROMPT)) for _ in range(20)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in times}
    for number in range(rounds + 1):
        for name, run in times.items():
            wait_until_quiet(0.5 if number else 0)
            took_s = run()
            if number:
                seconds[name].append(took_s)
    assert core.counts().blocks == blocks, core.counts()
    own = {"private B": [private / blocks]} if blocks >= PRIVATE_BLOCKS_MIN else {}
    return {
        "shared B": [shared / blocks], **own, "filling": [filled_s / blocks], **seconds,
    }  # fmt: skip


def lease(source: Source, keys: NDArray[np.uint8]) -> None:
    leased = source.core.lease(source.session, source.namespace, keys, TTL_US, 0)
    if leased.lease:
        source.core.release(source.session, [leased.lease], 0)


def clock(run: Callable[[], object]) -> float:
    begin_s = time.thread_time()
    run()
    return time.thread_time() - begin_s


#: What is shown of each figure: name, unit, and how seconds become it.
SHOWN: dict[str, tuple[str, str, Callable[[float], float]]] = {
    "shared B": ("index in shared memory, a block", "B", lambda value: value),
    "private B": ("private memory of the core, a block", "B", lambda value: value),
    "filling": (f"filling, {BATCH} a call", "M blocks/s", lambda s: 1e-6 / s),
    "evicting": (f"filling when full, evicting as many, {BATCH} a call", "M blocks/s", lambda s: 1e-6 / s),
    "batch": (f"look-up, {BATCH} a call", "M keys/s", lambda s: 1e-6 / s),
    "single": ("look-up of one key", "us", lambda s: 1e6 * s),
    "lease": (f"lease and release of {PROMPT} keys", "us", lambda s: 1e6 * s),
    "put one": ("reserve and commit of 1 block, evicting 1", "us", lambda s: 1e6 * s),
    "put prompt": (f"reserve and commit of {PROMPT} blocks, evicting {PROMPT}", "us", lambda s: 1e6 * s),
}


def rows_of(found: dict[str, list[float]]) -> list[Row]:
    rows = []
    for key, values_found in found.items():
        name, unit, shown = SHOWN[key]
        values = sorted(shown(value) for value in values_found)
        rows.append(Row(name, unit, statistics.median(values), values[0], values[-1], len(values)))
    return rows


def main() -> None:
    parser = arguments(__doc__, rounds=7)
    parser.add_argument("--blocks", default="1000,1000000,10000000", help="sizes of the index")
    parser.add_argument("--eviction", default="prefix", help="policy")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure_one(args.one, args.eviction, args.rounds)))
        return
    report = Report(f"growth, eviction {args.eviction}", args.json)
    for blocks in [int(word) for word in args.blocks.split(",")]:
        command = [sys.executable, __file__, "--one", str(blocks), "--eviction", args.eviction]
        done = subprocess.run([*command, "--rounds", str(args.rounds)], stdout=subprocess.PIPE, check=True)
        report.add(f"{blocks} blocks", rows_of(json.loads(done.stdout.splitlines()[-1])))
    report.save()


if __name__ == "__main__":
    main()
