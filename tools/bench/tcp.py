"""The tcp channel over loopback beside plain Python sockets that move the same bytes in the same run.

Reads of the channel are checked against digests, writes compute them; plain sockets do neither. Both ends of the
channel are real; who may read what is not asked (that is the node's part, see tools/bench/blocks.py). Rounds of all
kinds are interleaved; medians are reported. "tuned" sockets have the buffer sizes that the channel uses.

python tools/bench/tcp.py [--json FILE] [--mib 128] [--rounds 7]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvpool.channels.tcp import TcpChannel
from kvpool.channels.tcp_server import Connection, TcpDataServer
from kvpool.channels.tcp_wire import TOKEN_BYTES
from kvpool.channels.tls import TlsConfig
from kvpool.core.arrays import Descriptors
from kvpool.core.hashing import block_digests

SECTIONS = 4
SIZES = {"2 MiB": 2 << 20, "64 KiB": 64 << 10, "16 KiB": 16 << 10}
TUNED_BYTES = 256 << 10
DEADLINE_S = 60.0
TOKEN = bytes(TOKEN_BYTES)
Bytes2D = NDArray[np.uint8]


class OpenGate:
    """Lets everybody do everything."""

    def admit(self, token: bytes) -> int | None:
        return 1

    def readable(
        self,
        session: int,
        lease: int,
        offsets: NDArray[np.uint64],
        sizes: NDArray[np.uint64],
        generations: NDArray[np.uint32],
    ) -> NDArray[np.bool_]:
        return np.ones(len(offsets), dtype=np.bool_)

    def begin_write(
        self,
        session: int,
        reservation: int,
        offsets: NDArray[np.uint64],
        sizes: NDArray[np.uint64],
        generations: NDArray[np.uint32],
        connection: Connection,
    ) -> NDArray[np.bool_]:
        return np.ones(len(offsets), dtype=np.bool_)

    def end_write(self, reservation: int, connection: Connection) -> None: ...

    def count(self, *, bytes_read: int = 0, bytes_written: int = 0) -> None: ...


def content(total_bytes: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, total_bytes, dtype=np.uint8)


def serve(total_bytes: int, config: TlsConfig, addresses: multiprocessing.Queue[dict[str, str]]) -> None:
    """The other process: a data server without and one with TLS, and sockets that send or take what is asked for."""
    data = content(total_bytes)
    plain = TcpDataServer(data, OpenGate(), "127.0.0.1", 0)
    encrypted = TcpDataServer(data, OpenGate(), "127.0.0.1", 0, tls_config=config)
    listeners = {name: socket.create_server(("127.0.0.1", 0)) for name in ("raw", "tuned")}
    found = {name: f"127.0.0.1:{listener.getsockname()[1]}" for name, listener in listeners.items()}
    addresses.put({"tcp": plain.address, "tls": encrypted.address, **found})
    view = memoryview(data)  # type: ignore[arg-type]
    with ThreadPoolExecutor(32) as threads:
        list(threads.map(lambda name: _accept(listeners[name], name, view, threads), listeners))


def _accept(listener: socket.socket, name: str, data: memoryview, threads: ThreadPoolExecutor) -> None:
    while True:
        sock, _ = listener.accept()
        _tune(sock, name)
        threads.submit(_answer, sock, data)


def _answer(sock: socket.socket, data: memoryview) -> None:
    """A request: sending (0) or taking (1), offset, block bytes, blocks."""
    while head := sock.recv(32, socket.MSG_WAITALL):
        takes, offset, size, count = (int.from_bytes(head[i : i + 8], "little") for i in range(0, 32, 8))
        for at in range(offset, offset + size * count, size):
            view = data[at : at + size]
            if not takes:
                sock.sendall(view)
            while takes and view:
                view = view[sock.recv_into(view, 0, socket.MSG_WAITALL) :]
        if takes:
            sock.sendall(b"1")


def _tune(sock: socket.socket, name: str) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if name == "tuned":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, TUNED_BYTES)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, TUNED_BYTES)


class RawSockets:
    """Block by block, each stream its share, as fast as Python can."""

    def __init__(self, address: str, name: str, streams: int) -> None:
        host, port = address.rsplit(":", 1)
        self._sockets = [socket.create_connection((host, int(port))) for _ in range(streams)]
        for sock in self._sockets:
            _tune(sock, name)
        self._threads = ThreadPoolExecutor(streams)

    def move(self, blocks: Bytes2D, takes: int) -> None:
        shares = np.array_split(np.arange(len(blocks)), len(self._sockets))

        def one(sock: socket.socket, share: NDArray[np.int64]) -> None:
            size = blocks.shape[1]
            head = (takes, int(share[0]) * size, size, len(share))
            sock.sendall(b"".join(number.to_bytes(8, "little") for number in head))
            for row in share.tolist():
                view = memoryview(blocks[row])
                if takes:
                    sock.sendall(view)
                while not takes and view:
                    view = view[sock.recv_into(view, 0, socket.MSG_WAITALL) :]
            if takes:
                assert sock.recv(1) == b"1"

        list(self._threads.map(one, self._sockets, shares))


def descriptors(data: Bytes2D) -> Descriptors:
    count, size = data.shape
    keys = np.random.default_rng(size).integers(0, 256, (count, 16), dtype=np.uint8)
    digests = block_digests(data, keys, SECTIONS)
    offsets = np.arange(count, dtype=np.uint64) * np.uint64(size)
    return Descriptors(keys, offsets, np.full(count, size, np.uint64), np.ones(count, np.uint32), digests)


def measure(kinds: dict[str, Callable[[], None]], moved_bytes: int, rounds: int) -> dict[str, float]:
    """Median GB/s of each kind; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(rounds + 1):
        for name, run in kinds.items():
            begin_s = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin_s)
    return {name: moved_bytes / statistics.median(times[1:]) / 1e9 for name, times in seconds.items()}


def run(total_bytes: int, rounds: int, addresses: dict[str, str], config: TlsConfig) -> dict[str, dict[str, float]]:
    result: dict[str, dict[str, float]] = {}
    offer = {"address": addresses["tcp"], "token": TOKEN.hex()}
    tcp = TcpChannel.open(offer)
    tls = TcpChannel.open({"address": addresses["tls"], "token": TOKEN.hex(), "tls": "1"}, tls_config=config)
    raw = {f"{n}, {s} streams": RawSockets(addresses[n], n, s) for n in ("raw", "tuned") for s in (1, 2)}
    for name, size in SIZES.items():
        data = content(total_bytes).reshape(-1, size)
        blocks, out = descriptors(data), np.zeros_like(data)

        def read(channel: TcpChannel, verify: bool, blocks: Descriptors = blocks, out: Bytes2D = out) -> None:
            assert channel.read(1, blocks, out, deadline_s=DEADLINE_S, verify=verify).all()

        def write(channel: TcpChannel, blocks: Descriptors = blocks, data: Bytes2D = data) -> None:
            channel.write(1, blocks, data, deadline_s=DEADLINE_S)

        kinds: dict[str, Callable[[], None]] = {}
        for kind, sockets in raw.items():
            kinds[f"{kind}: read"] = lambda s=sockets, o=out: s.move(o, 0)  # type: ignore[misc]
        kinds["tcp unverified: read"] = lambda r=read: r(tcp, False)  # type: ignore[misc]
        kinds["tcp: read"] = lambda r=read: r(tcp, True)  # type: ignore[misc]
        kinds["tcp+tls: read"] = lambda r=read: r(tls, True)  # type: ignore[misc]
        for kind, sockets in raw.items():
            kinds[f"{kind}: write"] = lambda s=sockets, d=data: s.move(d, 1)  # type: ignore[misc]
        kinds["tcp: write"] = lambda w=write: w(tcp)  # type: ignore[misc]
        result[name] = measure(kinds, total_bytes, rounds)
        assert np.array_equal(out, data)
    tcp.close()
    tls.close()
    return result


def show(result: dict[str, dict[str, float]]) -> None:
    names = list(result)
    print(f"{'GB/s, median':28}" + "".join(f"{n:>10}" for n in names))
    for kind in result[names[0]]:
        print(f"{kind:28}" + "".join(f"{result[n][kind]:10.2f}" for n in names))
    print()
    for what in ("read", "write"):
        for limit in ("raw", "tuned"):
            best = [max(result[n][f"{limit}, {s} streams: {what}"] for s in (1, 2)) for n in names]
            text = "".join(f"{result[n][f'tcp: {what}'] / b:10.2f}" for n, b in zip(names, best, strict=True))
            print(f"{f'tcp / best {limit} sockets: {what}':28}{text}")
    print("aim: reads at least 0.9 of raw sockets at 2 MiB, 0.7 at 64 KiB")


def certificate(folder: Path) -> TlsConfig:
    """Signed by itself, good for a day."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    names = ["-subj", "/CN=bench", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command, "-keyout", key, "-out", cert, "-days", "1", *names], check=True, capture_output=True)
    return TlsConfig(cert, key, cert)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=128, help="bytes a round and block size, in MiB")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    args = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        config = certificate(Path(folder))
        addresses: multiprocessing.Queue[dict[str, str]] = spawn.Queue()
        process = spawn.Process(target=serve, args=(args.mib << 20, config, addresses), daemon=True)
        process.start()
        try:
            result = run(args.mib << 20, args.rounds, addresses.get(timeout=60), config)
        finally:
            process.terminate()
            process.join(10)
    show(result)
    if args.json:
        args.json.write_text(json.dumps({"gb_per_s": result, "mib": args.mib, "rounds": args.rounds}, indent=2))


if __name__ == "__main__":
    main()
