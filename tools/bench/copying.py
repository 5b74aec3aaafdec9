"""Copies and digests of blocks, and reads through the shared index, beside what this machine allows in the same run.

Limits: memcpy of the same blocks one by one and in one piece, and memcpy followed by the xxhash library. Reads through
the shared index come from a segment in --folder, as another process would make them. Rounds of all kinds are
interleaved; medians are reported.

python tools/bench/copying.py [--json FILE]
"""

from __future__ import annotations

import functools
import tempfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import xxhash
from harness import Case, Report, Row, arguments, measure, size_name
from numpy.typing import NDArray

from kvpool.channels import sections
from kvpool.channels.shared_index import SharedIndex
from kvpool.core.arrays import Descriptors, SourceArrays
from kvpool.core.ids import Fidelity
from kvpool.core.index import BlockIndex, NewEntries
from kvpool.core.kernels import copying, probing
from kvpool.core.namespace import SECTIONS_MAX
from kvpool.tiers.dram import Segment

SIZES = (2 << 20, 64 << 10, 16 << 10, 4 << 10)
SECTION_COUNT = 4
#: Of blocks of 4 KiB, which are looked up one by one and all at once.
LOOKUP_BYTES = 64 << 20
BLOCKS, HASHED = "memcpy, block by block", "memcpy, then xxhash"


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

    def cases(self) -> list[Case]:
        works: dict[str, tuple[Callable[[], object], tuple[str, ...], float | None]] = {
            BLOCKS: (self.memcpy, (), None),
            "memcpy, in one piece": (lambda: np.copyto(self.target, self.source), (), None),
            HASHED: (self.memcpy_then_hash, (), None),
            "copy": (lambda: copying.copy_blocks(self.sources, self.targets, self.sizes), (BLOCKS,), 0.9),
            "copy, verified": (self.copy_out, (BLOCKS,), 0.9),
            "copy in, with digests": (self.copy_in, (HASHED,), 1.0),
            "check": (lambda: sections.check_blocks(self.sources, self.blocks), (), None),
            "read, two threads": (lambda: self.read(verify=False), (BLOCKS,), None),
            "read, two threads, verified": (lambda: self.read(verify=True), (BLOCKS,), None),
        }
        return [
            Case(name, functools.partial(_discard, work), self.source.size, limits=limits, aim=aim)
            for name, (work, limits, aim) in works.items()
        ]

    def close(self) -> None:
        self.index.close()
        self.segment.close()


def _discard(work: Callable[[], object]) -> None:
    work()


def lookups(folder: Path, args: Namespace) -> list[Row]:
    """In an index of blocks of 4 KiB."""
    blocks = Blocks(folder, 4096, LOOKUP_BYTES)
    order = np.random.default_rng(1).permutation(blocks.count)
    keys, index = blocks.keys[order], blocks.index
    single = [keys[i : i + 1] for i in range(1000)]
    one = np.zeros((1, 4096), dtype=np.uint8)
    missing = np.random.default_rng(2).integers(0, 256, keys.shape, dtype=np.uint8)
    table = dict.fromkeys(bytes(key) for key in keys)
    asked = [bytes(key) for key in keys]
    works: dict[str, tuple[Callable[[], object], int, str]] = {
        "single lookup": (lambda: [index.lookup(0, key) for key in single], len(single), "us"),
        "single read of 4 KiB": (
            lambda: [index.read(index.find(0, key), one, deadline_s=10) for key in single], len(single), "us"
        ),
        "lookup": (lambda: index.lookup(0, keys), len(keys), "M keys/s"),
        "lookup of missing keys": (lambda: index.lookup(0, missing), len(keys), "M keys/s"),
        "find": (lambda: index.find(0, keys), len(keys), "M keys/s"),
        "dict": (lambda: [key in table for key in asked], len(keys), "M keys/s"),
    }  # fmt: skip
    cases = [Case(name, functools.partial(_discard, work), n, unit) for name, (work, n, unit) in works.items()]
    rows = measure(cases, args.rounds, quiet_s=args.quiet_s)
    blocks.close()
    return rows


def main() -> None:
    parser = arguments(__doc__, rounds=7)
    parser.add_argument("--mib", type=int, default=128, help="bytes a run, in MiB")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="where the segment is made")
    args = parser.parse_args()
    copying.warm_up()
    probing.warm_up()
    report = Report(f"kernels, blocks of {SECTION_COUNT} sections", args.json)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for size in SIZES:
            blocks = Blocks(Path(folder), size, args.mib << 20)
            report.add(f"Blocks of {size_name(size)}", measure(blocks.cases(), args.rounds, quiet_s=args.quiet_s))
            blocks.close()
        report.add("The shared index", lookups(Path(folder), args))
    report.save()


if __name__ == "__main__":
    main()
