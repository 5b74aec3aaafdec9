"""A node's own memory: what its process needs besides the segment that it shares, empty and full of small things.

python tools/bench/footprint.py [--json FILE] [--count 1000000] [--objects]
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from harness import Report, Row, arguments
from node import NodeProcess, block_namespace, made_keys

from kvpool.client import PoolClient

SIZE_BYTES = 1024
BATCH = 16_384
AIM_BYTES = 200 << 20
#: The segment keeps slots in spans of its units; with room to spare nothing is evicted.
ROOM = 1.4


@dataclass(frozen=True)
class Footprint:
    """Bytes of a process's memory, by who else has it."""

    segment: int  # mapped from the shared segment
    anonymous: int  # in no file, so its own
    libraries: int  # pages of files, which every process that maps the same ones shares


def footprint(process: int) -> Footprint:
    """From /proc/PID/smaps."""
    segment = anonymous = libraries = 0
    for name, sizes in _mappings(Path(f"/proc/{process}/smaps").read_text()):
        if name.endswith(".segment"):
            segment += sizes["Rss"]
            continue
        anonymous += sizes["Anonymous"]
        libraries += sizes["Rss"] - sizes["Anonymous"]
    return Footprint(segment, anonymous, libraries)


def _mappings(text: str) -> Iterator[tuple[str, dict[str, int]]]:
    name, sizes = "", {}
    for line in text.splitlines():
        if re.match(r"^[0-9a-f]+-[0-9a-f]+ ", line):
            if sizes:
                yield name, sizes
            name, sizes = line.split(None, 5)[5] if len(line.split(None, 5)) > 5 else "", {}
        elif line.endswith(" kB"):
            key, value, _ = line.split()
            sizes[key.rstrip(":")] = int(value) << 10
    if sizes:
        yield name, sizes


def rows(title: str, found: Footprint, count: int) -> list[Row]:
    mib = 1 << 20
    share = AIM_BYTES / found.anonymous
    return [
        Row.figure(f"{title}: anonymous memory", found.anonymous / mib, "MiB", limit="200 MiB", ratio=share),
        Row.figure(f"{title}: pages of libraries", found.libraries / mib, "MiB"),
        Row.figure(f"{title}: segment mapped", found.segment / mib, "MiB"),
        *([Row.figure(f"{title}: anonymous, each", found.anonymous / count, "B")] if count else []),
    ]


def put_blocks(client: PoolClient, count: int) -> None:
    namespace = client.register(block_namespace(SIZE_BYTES, 1))
    rng, data = np.random.default_rng(0), np.zeros((BATCH, SIZE_BYTES), dtype=np.uint8)
    for at in range(0, count, BATCH):
        keys = made_keys(rng, min(BATCH, count - at))
        assert client.put(namespace, keys, data[: len(keys)], ttl_s=120).stored.all()


def put_objects(client: PoolClient, count: int) -> None:
    domain = client.register_objects("bench")
    value = np.zeros(SIZE_BYTES - 64, dtype=np.uint8)
    for at in range(0, count, BATCH):
        names = [f"object/{number}" for number in range(at, min(at + BATCH, count))]
        assert client.put_objects(domain, names, [value] * len(names), ttl_s=120).stored.all()


def main() -> None:
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--objects", action="store_true", help="objects with names, not blocks")
    args = parser.parse_args()
    report = Report("a node's own memory", args.json)
    memory = int(args.count * SIZE_BYTES * ROOM) + (64 << 20)
    with NodeProcess(memory, entry_bytes_min=SIZE_BYTES) as node:
        with PoolClient(node.address, channels=("shm",), timeout_s=60) as client:
            report.add("Empty", rows("empty", footprint(node.process.pid), 0))
            begin_s = time.perf_counter()
            (put_objects if args.objects else put_blocks)(client, args.count)
            took_s = time.perf_counter() - begin_s
            stats = client.stats()
            assert stats.evictions == 0, "the segment was too small for this"
            what = f"{args.count} {'objects' if args.objects else 'blocks'} of {SIZE_BYTES} B"
            report.add(what, [
                *rows("full", footprint(node.process.pid), args.count),
                Row.figure("put", args.count / took_s / 1e3, "k/s"),
            ])  # fmt: skip
        time.sleep(1)
        report.add("After its client has gone", rows("idle", footprint(node.process.pid), args.count))
    report.save()


if __name__ == "__main__":
    main()
