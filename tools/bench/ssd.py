"""The SSD tier beside what the disk allows in the same run: append, read, recovery.

The store is full: it appends into space that it gave back, as it does for most of its life. Limits:

* `loop`: a compiled loop in as many threads, see `disk_loop`: the same memory, the same calls of 32 MiB, for writes a
  sync after each, into space that was written before.
* fio, where it is installed, at the same size, depth and file size; its options are printed. It moves the same few
  buffers again and again, which stay in the caches, and syncs once at the end. `fio write` makes a new file, `fio
  rewrite` writes the one that is there.

The kinds differ: the store writes, as fio does, from one thread through a queue of the kernel, but blocks where they
lie; it reads, as `loop` does, in threads, but small blocks into memory that stays in the caches, as fio's does, and
moves them from there to where they belong.

Rounds of all kinds are interleaved; medians are reported, of ratios those of each round's ratio. Reads of the store
verify digests, and read a page more a block; `copy then hash` says what verifying alone costs in memory.

python tools/bench/ssd.py [--dir FOLDER] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from disk_loop import LoopFile
from numpy.typing import NDArray

from kvpool.core.hashing import block_digests
from kvpool.core.ssd.format import segment_number
from kvpool.core.ssd.records import RecordBatch
from kvpool.tiers.ssd.store import SsdStore

SECTIONS = 4
SIZES = {"2 MiB": 2 << 20, "256 KiB": 256 << 10, "64 KiB": 64 << 10}
#: Blocks of one call.
CALL_BYTES = 32 << 20


#: One job, which is a process: what more jobs add is not this disk's, but other CPUs'.
FIO_OPTIONS = [
    "--ioengine=libaio",
    "--direct=1",
    "--numjobs=1",
    "--fallocate=native",
    "--end_fsync=1",
    "--randrepeat=0",
]


def memory(size_bytes: int) -> NDArray[np.uint8]:
    return np.frombuffer(mmap.mmap(-1, size_bytes), np.uint8)


def open_store(folder: Path, block_bytes: int, total_bytes: int, depth: int) -> SsdStore:
    """One that is full after three rounds."""
    return SsdStore.open(
        folder, f"bench-{block_bytes}", 3 * total_bytes, io_depth=depth, segment_bytes=total_bytes // 2
    )


class Blocks:
    """Blocks of one size in page-aligned memory, a target as large, and a store that gets them again and again."""

    def __init__(self, folder: Path, block_bytes: int, total_bytes: int, depth: int) -> None:
        rng = np.random.default_rng(block_bytes)
        self.count = total_bytes // block_bytes
        self.data = memory(total_bytes).reshape(self.count, block_bytes)
        self.data[:] = rng.integers(0, 256, self.data.shape, dtype=np.uint8)
        self.out = memory(total_bytes).reshape(self.count, block_bytes)
        self.out[:] = 0
        self.rng = rng
        self.store = open_store(folder, block_bytes, total_bytes, depth)
        self.batches: list[RecordBatch] = []
        self.renew()

    def renew(self) -> None:
        """New keys, so that nothing is there already."""
        if self.batches:
            self.store.remove(np.concatenate([batch.keys for batch in self.batches]))
        keys = self.rng.integers(0, 256, (self.count, 16), dtype=np.uint8)
        digests = block_digests(self.data, keys, SECTIONS)
        step = max(1, CALL_BYTES // self.data.shape[1])
        self.batches = [
            RecordBatch(
                keys[at : at + step],
                np.zeros((len(keys[at : at + step]), 16), np.uint8),
                np.ones(len(keys[at : at + step]), np.uint8),
                np.full(len(keys[at : at + step]), SECTIONS, np.uint8),
                digests[at : at + step],
                list(self.data[at : at + step]),
            )
            for at in range(0, self.count, step)
        ]

    def append(self) -> None:
        for batch in self.batches:
            assert self.store.append(batch).all(), self.store.stats()

    def read(self, order: NDArray[np.int64]) -> None:
        keys = np.concatenate([batch.keys for batch in self.batches])[order]
        step = max(1, CALL_BYTES // self.data.shape[1])
        for at in range(0, self.count, step):
            rows = order[at : at + step]
            assert self.store.read(keys[at : at + step], [self.out[row] for row in rows]).good.all()

    def copy_then_hash(self) -> None:
        np.copyto(self.out, self.data)
        block_digests(self.out, self.batches[0].keys[:1].repeat(self.count, axis=0), SECTIONS)


def fio(folder: Path, kind: str, block_bytes: int, total_bytes: int, depth: int) -> float:
    """GB/s of one run."""
    path = folder / f"fio-{block_bytes}"
    if kind == "write":
        path.unlink(missing_ok=True)
    rw = "write" if kind == "rewrite" else kind
    command = [
        "fio", "--name=x", f"--filename={path}", f"--rw={rw}", f"--bs={block_bytes}", f"--size={total_bytes}",
        f"--iodepth={depth}", *FIO_OPTIONS, "--output-format=json",
    ]  # fmt: skip
    job = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=120).stdout)["jobs"][0]
    side = job["write" if rw == "write" else "read"]
    return float(side["io_bytes"] / (job["job_runtime"] / 1e3) / 1e9)


def measure_size(folder: Path, block_bytes: int, total_bytes: int, depth: int, rounds: int) -> dict[str, float]:
    """Median GB/s of each kind, and median ratio of each pair of RATIOS; the first round warms up."""
    blocks = Blocks(folder, block_bytes, total_bytes, depth)
    loop = LoopFile(folder / "loop", blocks.data, depth, CALL_BYTES)
    for _ in range(3):
        blocks.renew()
        blocks.append()
    speeds: dict[str, list[float]] = {}
    for _ in range(rounds + 1):
        order = blocks.rng.permutation(blocks.count)
        blocks.renew()
        kinds: dict[str, Callable[[], None]] = {
            "loop write": lambda: loop.write(blocks.data),
            "append": blocks.append,
            "loop random read": lambda o=order: loop.read(blocks.out, o),  # type: ignore[misc]
            "copy then hash": blocks.copy_then_hash,
            "read in order": lambda: blocks.read(np.arange(blocks.count)),
            "random read": lambda o=order: blocks.read(o),  # type: ignore[misc]
        }
        for name, run in kinds.items():
            if name.endswith("read"):
                blocks.out[:] = 0
            begin_s = time.perf_counter()
            run()
            speeds.setdefault(name, []).append(total_bytes / (time.perf_counter() - begin_s) / 1e9)
        if shutil.which("fio"):
            kinds_of_fio = {"fio write": "write", "fio rewrite": "rewrite", "fio random read": "randread"}
            for name, kind in kinds_of_fio.items():
                speeds.setdefault(name, []).append(fio(folder, kind, block_bytes, total_bytes, depth))
        assert np.array_equal(blocks.out, blocks.data)
    loop.close()
    blocks.store.close()
    medians = {name: statistics.median(values[1:]) for name, values in speeds.items()}
    for ours, limit in RATIOS:
        if limit in speeds:
            shares = [one / other for one, other in zip(speeds[ours][1:], speeds[limit][1:], strict=True)]
            medians[f"{ours} / {limit}"] = statistics.median(shares)
    return medians


def measure_recovery(folder: Path, block_bytes: int, total_bytes: int) -> dict[str, float]:
    """Seconds per GB of the store: from footers, and from a scan of everything as if no segment had a footer."""
    blocks = Blocks(folder, block_bytes, total_bytes, 8)
    blocks.append()
    blocks.store.close()
    result = {}
    for name in ("from footers", "by scan"):
        if name == "by scan":
            for path in (folder / f"kvpool-bench-{block_bytes}").iterdir():
                if segment_number(path.name) is not None:
                    os.truncate(path, path.stat().st_size - 4096)
        store = open_store(folder, block_bytes, total_bytes, 8)
        stats = store.stats()
        assert stats.space.records == blocks.count, stats
        result[name] = stats.counters.recovery_s / (stats.space.payload_bytes / 1e9)
        store.close()
    return result


RATIOS = [
    ("append", "loop write"), ("append", "fio write"), ("append", "fio rewrite"), ("random read", "loop random read"),
    ("random read", "fio random read"),
]  # fmt: skip


def show(result: dict[str, dict[str, float]], recovery: dict[str, float], depth: int) -> None:
    names = list(result)
    print(f"{'median':40}" + "".join(f"{name:>10}" for name in names))
    for kind in result[names[0]]:
        unit = "aim 0.9" if "/" in kind else "GB/s"
        print(f"{kind:40}" + "".join(f"{result[name][kind]:10.2f}" for name in names) + f"   ({unit})")
    print(f"\nfio: --iodepth={depth} " + " ".join(FIO_OPTIONS))
    print("\nrecovery, s per GB: " + ", ".join(f"{name} {value:.4f}" for name, value in recovery.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512, help="bytes a round and block size, in MiB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--depth", type=int, default=8, help="reads or writes in flight")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="a folder on the disk to measure")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    args = parser.parse_args()
    result = {}
    for name, block_bytes in SIZES.items():
        with tempfile.TemporaryDirectory(dir=args.dir) as folder:
            result[name] = measure_size(Path(folder), block_bytes, args.mib << 20, args.depth, args.rounds)
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        recovery = measure_recovery(Path(folder), 2 << 20, args.mib << 20)
    show(result, recovery, args.depth)
    if args.json:
        args.json.write_text(
            json.dumps(
                {
                    "medians": result,
                    "recovery_s_per_gb": recovery,
                    "mib": args.mib,
                    "depth": args.depth,
                    "fio": FIO_OPTIONS,
                },
                indent=2,
            )
        )


if __name__ == "__main__":
    main()
