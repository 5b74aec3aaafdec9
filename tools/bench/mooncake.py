"""kvpool's `mooncake.store` beside Mooncake's own: the same calls, in the same run, between processes of one host.

Ours: a node process, and this one as its client. Theirs (`--peers --peer-python mooncake=PYTHON`): master, a process
that owns the segment, and a client, over TCP, as a client of another process reaches it. The limit is a copy of objects
of the same size in private memory. Theirs checks no digest; ours does, with each read.

python tools/bench/mooncake.py [--json FILE] [--peers mooncake --peer-python mooncake=PYTHON]
"""

from __future__ import annotations

from argparse import Namespace

import numpy as np
from copies import Memcpy
from harness import Case, Report, Row, arguments, measure, size_name
from node import NodeProcess
from peers.running import TOTAL_BYTES, Peer, add_peer_arguments, peers_wanted

from engines.mooncake.store import MooncakeDistributedStore

SIZES = (64 << 10, 2 << 20)
#: Pieces of an object, as many as a model has layers.
PIECES = 32
LOOKUPS, SINGLES = 1000, 50


class Ours:
    """A client of the node, with memory to put from and to get into."""

    def __init__(self, address: str, size_bytes: int) -> None:
        self.store = MooncakeDistributedStore()
        assert self.store.setup("bench", "P2PHANDSHAKE", 0, 0, "tcp", "", address) == 0
        count = min(1024, TOTAL_BYTES // size_bytes)
        rng = np.random.default_rng(1)
        self.source = rng.integers(0, 256, (count, size_bytes), dtype=np.uint8)
        self.target = np.zeros_like(self.source)
        for rows in (self.source, self.target):
            assert self.store.register_buffer(rows.ctypes.data, rows.nbytes) == 0
        self.names = [f"{size_bytes}/{index}" for index in range(count)]
        self.sizes = [size_bytes] * count
        self.sources, self.targets = ([row.ctypes.data for row in rows] for rows in (self.source, self.target))
        step = size_bytes // PIECES
        self.piece_sizes = [[step] * PIECES] * count
        self.piece_sources, self.piece_targets = (
            [[row + step * piece for piece in range(PIECES)] for row in rows] for rows in (self.sources, self.targets)
        )
        self.put()

    def put(self) -> None:
        assert not any(self.store.batch_put_from(self.names, self.sources, self.sizes))

    def get(self) -> None:
        assert self.store.batch_get_into(self.names, self.targets, self.sizes) == self.sizes

    def put_pieces(self) -> None:
        assert not any(self.store.batch_put_from_multi_buffers(self.names, self.piece_sources, self.piece_sizes))

    def get_pieces(self) -> None:
        got = self.store.batch_get_into_multi_buffers(self.names, self.piece_targets, self.piece_sizes)
        assert got == self.sizes

    def remove(self) -> None:
        self.store.remove_all(True)
        self.target[:] = 0

    def check(self) -> None:
        assert np.array_equal(self.source, self.target)

    def close(self) -> None:
        self.store.remove_all(True)
        self.store.close()


def measure_size(args: Namespace, address: str, size_bytes: int, peers: list[Peer]) -> list[Row]:
    ours = Ours(address, size_bytes)
    count, total = len(ours.names), ours.source.nbytes
    copies = Memcpy(size_bytes, count)
    cases = [
        Case("memcpy, object by object", copies.blocks, total),
        Case("batch_put_from", ours.put, total, prepare=ours.remove,
             limits=("memcpy, object by object",)),
        Case("batch_get_into", ours.get, total,
             limits=("memcpy, object by object",)),
        Case(f"batch_put_from_multi_buffers, {PIECES} pieces", ours.put_pieces, total, prepare=ours.remove,
             limits=("memcpy, object by object",)),
        Case(f"batch_get_into_multi_buffers, {PIECES} pieces", ours.get_pieces, total,
             limits=("memcpy, object by object",)),
    ]  # fmt: skip
    for peer in peers:
        cases += [
            Case(f"{peer.name}: batch_put_from", lambda p=peer: p.run("put"), total,  # type: ignore[misc]
                 limits=("batch_put_from",)),
            Case(f"{peer.name}: batch_get_into", lambda p=peer: p.run("get"), total,  # type: ignore[misc]
                 limits=("batch_get_into",)),
        ]  # fmt: skip
    rows = measure(cases, args.rounds, quiet_s=args.quiet_s)
    ours.check()
    ours.close()
    return rows


def measure_lookups(args: Namespace, address: str, peers: list[Peer]) -> list[Row]:
    store = MooncakeDistributedStore()
    assert store.setup("bench", "P2PHANDSHAKE", 0, 0, "tcp", "", address) == 0
    known = [f"known-{index}" for index in range(LOOKUPS)]
    assert store.put_batch(known[::2], [b"v" * 64] * (LOOKUPS // 2)) == 0

    def lookup() -> None:
        assert sum(store.batch_is_exist(known)) == LOOKUPS // 2

    def one() -> None:
        for _ in range(SINGLES):
            assert store.is_exist(known[0]) == 1

    cases = [Case("batch_is_exist", lookup, LOOKUPS, "k/s"), Case("is_exist", one, SINGLES, "us")]
    for peer in peers:
        cases += [
            Case(f"{peer.name}: batch_is_exist", lambda p=peer: p.run("lookup"), LOOKUPS, "k/s",  # type: ignore[misc]
                 limits=("batch_is_exist",)),
            Case(f"{peer.name}: is_exist", lambda p=peer: p.run("lookup_one"), 1, "us",  # type: ignore[misc]
                 limits=("is_exist",)),
        ]  # fmt: skip
    rows = measure(cases, args.rounds, quiet_s=args.quiet_s)
    store.remove_all(True)
    store.close()
    return rows


def main() -> None:
    parser = arguments(__doc__, rounds=7)
    add_peer_arguments(parser, ("mooncake",))
    args = parser.parse_args()
    report = Report("mooncake.store", args.json)
    with NodeProcess(1 << 30, entry_bytes_min=4096) as node:
        for size in SIZES:
            with peers_wanted(args, size, min(1024, TOTAL_BYTES // size)) as peers:
                report.add(f"Objects of {size_name(size)}", measure_size(args, node.address, size, peers))
        with peers_wanted(args) as peers:
            report.add(f"Lookups, {LOOKUPS} keys, half of them there", measure_lookups(args, node.address, peers))
    report.save()


if __name__ == "__main__":
    main()
