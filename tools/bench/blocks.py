"""Block reads through the pool, over shm and tcp, beside what this machine allows in the same run.

Limits: memcpy of the same blocks, copy-then-hash of the same blocks, and raw sockets that move the same bytes. Rounds
of all kinds are interleaved; medians are reported. Reads go through `PoolClient.get`: lease, copy, digests, release.

python tools/bench/blocks.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvpool.channels.sections import copy_out, digest_block
from kvpool.client import PoolClient
from kvpool.core.namespace import GroupKind, GroupSpec, NamespaceSpec

SECTIONS = 4
SIZES = {"2 MiB": 2 << 20, "64 KiB": 64 << 10}
Bytes2D = NDArray[np.uint8]


class Blocks:
    """Blocks of one size: private copies, their digests, a target, and the same blocks in the pool."""

    def __init__(self, block_bytes: int, total_bytes: int) -> None:
        rng = np.random.default_rng(block_bytes)
        count = total_bytes // block_bytes
        self.data = rng.integers(0, 256, (count, block_bytes), dtype=np.uint8)
        self.out = np.zeros_like(self.data)
        self.keys = rng.integers(0, 256, (count, 16), dtype=np.uint8)
        self.digests = np.zeros((count, SECTIONS), np.uint64)
        for row, key, digests in zip(self.data, self.keys, self.digests, strict=True):
            digest_block(row, key.tobytes(), SECTIONS, digests)
        group = GroupSpec(0, GroupKind.FULL, tuple(range(SECTIONS)), 16, 1, SECTIONS, block_bytes)
        self.spec = NamespaceSpec(f"bench-{block_bytes}", "", "uint8", "", "", "xxh3_128/1", (group,))

    def memcpy(self) -> None:
        for source, target in zip(self.data, self.out, strict=True):
            np.copyto(target, source)

    def copy_then_hash(self) -> None:
        for source, target, key, digests in zip(self.data, self.out, self.keys, self.digests, strict=True):
            assert copy_out(source, target, key.tobytes(), digests)

    def get(self, client: PoolClient, *, verify: bool) -> None:
        assert client.get(self.spec.id(), self.keys, self.out, verify=verify).found.all()


class RawSockets:
    """A process that sends blocks of private memory over loopback as fast as it can."""

    def __init__(self, total_bytes: int, streams: int) -> None:
        self._streams = streams
        ready: multiprocessing.Queue[int] = multiprocessing.get_context("spawn").Queue()
        self._process = multiprocessing.get_context("spawn").Process(
            target=_send_for_ever, args=(total_bytes // streams, streams, ready), daemon=True
        )
        self._process.start()
        port = ready.get(timeout=60)
        self._sockets = [socket.create_connection(("127.0.0.1", port)) for _ in range(streams)]
        self._threads = ThreadPoolExecutor(streams)

    def receive(self, out: Bytes2D) -> None:
        shares = np.array_split(out, self._streams)

        def one(sock: socket.socket, share: Bytes2D) -> None:
            sock.sendall(len(share).to_bytes(8, "little") + share.shape[1].to_bytes(8, "little"))
            for row in share:
                view = memoryview(row)
                while view:
                    view = view[sock.recv_into(view, 0, socket.MSG_WAITALL) :]

        list(self._threads.map(one, self._sockets, shares))

    def close(self) -> None:
        for sock in self._sockets:
            sock.close()
        self._process.terminate()
        self._process.join(10)


def _send_for_ever(share_bytes: int, streams: int, ready: multiprocessing.Queue[int]) -> None:
    data = np.random.default_rng(0).integers(0, 256, share_bytes, dtype=np.uint8)
    listener = socket.create_server(("127.0.0.1", 0))
    ready.put(listener.getsockname()[1])

    def serve(sock: socket.socket) -> None:
        while head := sock.recv(16, socket.MSG_WAITALL):
            count, size = int.from_bytes(head[:8], "little"), int.from_bytes(head[8:], "little")
            view = memoryview(data)
            for i in range(count):
                sock.sendall(view[i * size : (i + 1) * size])

    with ThreadPoolExecutor(streams) as threads:
        for _ in range(streams):
            threads.submit(serve, listener.accept()[0])


def measure(kinds: dict[str, Callable[[], None]], moved_bytes: int, rounds: int) -> dict[str, float]:
    """Median GB/s of each kind; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(rounds + 1):
        for name, run in kinds.items():
            begin_s = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin_s)
    return {name: moved_bytes / statistics.median(times[1:]) / 1e9 for name, times in seconds.items()}


RATIOS = [
    ("shm unverified", "memcpy", 0.9),
    ("shm", "copy then hash", 0.9),
    ("tcp", "raw sockets, 2 streams", 0.9),
]


def run(total_bytes: int, rounds: int, address: str) -> dict[str, dict[str, float]]:
    result: dict[str, dict[str, float]] = {}
    with PoolClient(address, channels=("shm",)) as shm, PoolClient(address, channels=("tcp",)) as tcp:
        for name, block_bytes in SIZES.items():
            blocks = Blocks(block_bytes, total_bytes)
            for client in (shm, tcp):
                client.register(blocks.spec)
            assert shm.put(blocks.spec.id(), blocks.keys, blocks.data, ttl_s=120).stored.all()
            one, two = RawSockets(total_bytes, 1), RawSockets(total_bytes, 2)
            result[name] = measure(
                {
                    "memcpy": blocks.memcpy,
                    "copy then hash": blocks.copy_then_hash,
                    "shm unverified": lambda b=blocks: b.get(shm, verify=False),
                    "shm": lambda b=blocks: b.get(shm, verify=True),
                    "raw sockets, 1 stream": lambda b=blocks, s=one: s.receive(b.out),
                    "raw sockets, 2 streams": lambda b=blocks, s=two: s.receive(b.out),
                    "tcp unverified": lambda b=blocks: b.get(tcp, verify=False),
                    "tcp": lambda b=blocks: b.get(tcp, verify=True),
                },  # type: ignore[misc]
                total_bytes,
                rounds,
            )
            one.close()
            two.close()
            assert np.array_equal(blocks.out, blocks.data)
            shm.remove(blocks.spec.id(), blocks.keys)
    return result


def show(result: dict[str, dict[str, float]]) -> None:
    names = list(SIZES)
    print(f"{'GB/s, median':28}" + "".join(f"{n:>10}" for n in names))
    for kind in result[names[0]]:
        print(f"{kind:28}" + "".join(f"{result[n][kind]:10.2f}" for n in names))
    print()
    for ours, limit, aim in RATIOS:
        text = "".join(f"{result[n][ours] / result[n][limit]:10.2f}" for n in names)
        print(f"{ours + ' / ' + limit:40}{text}   (aim {aim} at 2 MiB)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=256, help="bytes a round and block size, in MiB")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--segment-dir", default="/dev/shm")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    args = parser.parse_args()
    flags = ["--listen", "127.0.0.1:0", "--memory-bytes", str(2 * args.mib << 20), "--segment-dir", args.segment_dir]
    with tempfile.TemporaryFile() as log:
        node = subprocess.Popen(
            [sys.executable, "-m", "kvpool.service.node", "--id", "bench", *flags], stdout=subprocess.PIPE, stderr=log
        )
        assert node.stdout is not None
        try:
            result = run(args.mib << 20, args.rounds, json.loads(node.stdout.readline())["address"])
        finally:
            node.terminate()
            node.wait(20)
    show(result)
    if args.json:
        args.json.write_text(json.dumps({"gb_per_s": result, "mib": args.mib, "rounds": args.rounds}, indent=2))


if __name__ == "__main__":
    main()
