"""Copies and digests of blocks, and reads through the shared index, beside what this machine allows in the same run.

Limits: memcpy of the same blocks one by one and in one piece, and memcpy followed by the xxhash library. Reads through
the shared index come from a segment in --folder, as another process would make them. Rounds of all kinds are
interleaved; medians are reported.

python tools/bench/copying.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvpool.channels import sections
from kvpool.channels.shared_index import SharedIndex
from kvpool.core.arrays import Descriptors, SourceArrays
from kvpool.core.ids import Fidelity
from kvpool.core.index import BlockIndex, NewEntries
from kvpool.core.kernels import copying, probing
from kvpool.core.namespace import SECTIONS_MAX
from kvpool.tiers.dram import Segment

SIZES = {"2 MiB": 2 << 20, "64 KiB": 64 << 10, "16 KiB": 16 << 10, "4 KiB": 4 << 10}
SECTION_COUNT = 4
#: Of blocks of 4 KiB, which are looked up one by one and all at once.
LOOKUP_BYTES = 64 << 20


class Blocks:
    """Blocks of one size in a segment with an index, their digests, and private memory to copy them to."""

    def __init__(self, folder: Path, block_bytes: int, total_bytes: int) -> None:
        rng = np.random.default_rng(block_bytes)
        self.count = count = total_bytes // block_bytes
        self.segment = Segment.create(
            folder, "bench", data_bytes=total_bytes, index_bytes=SourceArrays.bytes_needed(count, SECTIONS_MAX),
            touch_bytes=count,
        )  # fmt: skip
        self.source = self.segment.data[: count * block_bytes].reshape(count, block_bytes)
        self.source[:] = rng.integers(0, 256, self.source.shape, dtype=np.uint8)
        memory = np.zeros(count * block_bytes + 4096, dtype=np.uint8)
        start = -memory.ctypes.data % 4096
        self.target = memory[start : start + count * block_bytes].reshape(count, block_bytes)
        self.keys = rng.integers(0, 256, (count, 16), dtype=np.uint8)
        self.sizes = np.full(count, block_bytes, dtype=np.uint64)
        offsets = (np.arange(count) * block_bytes).astype(np.uint64)
        self.sources, self.targets = offsets + self.source.ctypes.data, offsets + self.target.ctypes.data
        digests = sections.digest_blocks(self.sources, self.sizes, self.keys, SECTION_COUNT)
        self.blocks = Descriptors(self.keys, offsets, self.sizes, np.zeros(count, np.uint32), digests)
        self.words, self.counts = self.keys.view(np.uint64), np.full(count, SECTION_COUNT, dtype=np.uint64)
        self.good = np.zeros(count, dtype=np.bool_)
        self._fill_index(offsets, digests)
        self.index = SharedIndex.open({"path": str(self.segment.path), "uuid": self.segment.uuid.hex()})

    def _fill_index(self, offsets: NDArray[np.uint64], digests: NDArray[np.uint64]) -> None:
        arrays = SourceArrays.over(self.segment.index, self.count, SECTIONS_MAX, fresh=True)
        index = BlockIndex(arrays)
        names = np.zeros(self.count, dtype=np.uint16)
        entries = index.insert(
            NewEntries(
                self.keys, offsets.astype(np.int64), self.sizes, names, 0, 0, Fidelity.EXACT, SECTION_COUNT
            )
        )  # fmt: skip
        arrays.digests[entries, :SECTION_COUNT] = digests
        index.publish(entries)

    def memcpy(self) -> None:
        for source, target in zip(self.source, self.target, strict=True):
            np.copyto(target, source)

    def memcpy_then_hash(self) -> None:
        step = self.source.shape[1] // SECTION_COUNT
        for source, target in zip(self.source, self.target, strict=True):
            np.copyto(target, source)
            for at in range(0, self.source.shape[1], step):
                xxhash.xxh3_64_intdigest(target[at : at + step], seed=at)

    def copy_out(self) -> None:
        copying.copy_out_blocks(
            self.sources, self.targets, self.sizes, self.words, self.blocks.digests, self.counts, self.good
        )
        assert self.good.all()

    def copy_in(self) -> None:
        digests = self.blocks.digests.copy()
        copying.copy_in_blocks(self.sources, self.targets, self.sizes, self.words, self.counts, digests)

    def read(self, *, verify: bool) -> None:
        found = self.index.find(0, self.keys)
        assert self.index.read(found, self.target, verify=verify, deadline_s=60).all()

    def kinds(self) -> dict[str, Callable[[], object]]:
        return {
            "memcpy, block by block": self.memcpy,
            "memcpy, in one piece": lambda: np.copyto(self.target, self.source),
            "memcpy, then xxhash": self.memcpy_then_hash,
            "copy": lambda: copying.copy_blocks(self.sources, self.targets, self.sizes),
            "copy, verified": self.copy_out,
            "copy in, with digests": self.copy_in,
            "check": lambda: sections.check_blocks(self.sources, self.blocks),
            "read, two threads": lambda: self.read(verify=False),
            "read, two threads, verified": lambda: self.read(verify=True),
        }

    def close(self) -> None:
        self.index.close()
        self.segment.close()


def gigabytes_per_s(kinds: dict[str, Callable[[], object]], moved_bytes: int, rounds: int) -> dict[str, float]:
    """Median of each kind; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(rounds + 1):
        for name, run in kinds.items():
            begin_s = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin_s)
    return {name: moved_bytes / statistics.median(times[1:]) / 1e9 for name, times in seconds.items()}


def microseconds(run: Callable[[], object], calls: int, rounds: int = 5) -> float:
    """Median time of one of the `calls` that `run` makes."""
    times = []
    for _ in range(rounds + 1):
        begin_s = time.perf_counter()
        run()
        times.append((time.perf_counter() - begin_s) / calls)
    return statistics.median(times[1:]) * 1e6


def lookups(folder: Path) -> dict[str, float]:
    """Microseconds a call, and million keys a second."""
    blocks = Blocks(folder, 4096, LOOKUP_BYTES)
    order = np.random.default_rng(1).permutation(blocks.count)
    keys, index = blocks.keys[order], blocks.index
    single = [keys[i : i + 1] for i in range(1000)]
    one = np.zeros((1, 4096), dtype=np.uint8)
    missing = np.random.default_rng(2).integers(0, 256, keys.shape, dtype=np.uint8)
    table = dict.fromkeys(bytes(key) for key in keys)
    asked = [bytes(key) for key in keys]
    result = {
        "single lookup, us": microseconds(lambda: [index.lookup(0, key) for key in single], len(single)),
        "single read of 4 KiB, us": microseconds(
            lambda: [index.read(index.find(0, key), one, deadline_s=10) for key in single], len(single)
        ),
        "lookup, M keys/s": 1 / microseconds(lambda: index.lookup(0, keys), len(keys)),
        "lookup of missing keys, M keys/s": 1 / microseconds(lambda: index.lookup(0, missing), len(keys)),
        "find, M keys/s": 1 / microseconds(lambda: index.find(0, keys), len(keys)),
        "dict, M keys/s": 1 / microseconds(lambda: [key in table for key in asked], len(keys)),
    }
    blocks.close()
    return result


RATIOS = (
    ("copy", "memcpy, block by block", 0.9),
    ("copy, verified", "memcpy, block by block", 0.9),
    ("copy, verified", "memcpy, then xxhash", 1.0),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--total-mib", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="where the segment is made")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    args = parser.parse_args()
    copying.warm_up()
    probing.warm_up()
    result: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for name, size in SIZES.items():
            blocks = Blocks(Path(folder), size, args.total_mib << 20)
            result[name] = gigabytes_per_s(blocks.kinds(), blocks.count * size, args.rounds)
            blocks.close()
        found = lookups(Path(folder))
    print(f"{args.total_mib} MiB in blocks of {SECTION_COUNT} sections; median GB/s")
    print(f"{'':30}" + "".join(f"{name:>10}" for name in result))
    for kind in next(iter(result.values())):
        print(f"{kind:30}" + "".join(f"{values[kind]:10.2f}" for values in result.values()))
    for kind, limit, aim in RATIOS:
        shares = {name: values[kind] / values[limit] for name, values in result.items()}
        print(f"{kind} / {limit} (aim {aim}): " + ", ".join(f"{n} {share:.2f}" for n, share in shares.items()))
    for name, value in found.items():
        print(f"{name:40}{value:10.2f}")
    if args.json:
        args.json.write_text(json.dumps({"gigabytes_per_s": result, "shared_index": found}, indent=2))


if __name__ == "__main__":
    main()
