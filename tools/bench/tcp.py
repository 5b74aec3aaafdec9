"""The tcp channel over loopback beside plain Python sockets that move the same bytes in the same run.

Reads of the channel are checked against digests, writes compute them; plain sockets do neither. Both ends of the
channel are real; who may read what is not asked (that is the node's part: `remote.py`). "tuned" sockets have the buffer
sizes that the channel uses on one host.

python tools/bench/tcp.py [--json FILE] [--mib 128] [--rounds 7]
"""

from __future__ import annotations

import multiprocessing
import socket
import subprocess
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from harness import Case, Report, arguments, measure, size_name
from numpy.typing import NDArray

from kvpool.channels.tcp import TcpChannel
from kvpool.channels.tcp_server import Connection, TcpDataServer
from kvpool.channels.tcp_wire import TOKEN_BYTES
from kvpool.channels.tls import TlsConfig
from kvpool.core.arrays import Descriptors
from kvpool.core.hashing import block_digests

SECTIONS = 4
SIZES = (64 << 10, 2 << 20, 64 << 20)
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


@contextmanager
def other_process(total_bytes: int, config: TlsConfig) -> Iterator[dict[str, str]]:
    """The addresses at which it serves."""
    spawn = multiprocessing.get_context("spawn")
    addresses: multiprocessing.Queue[dict[str, str]] = spawn.Queue()
    process = spawn.Process(target=serve, args=(total_bytes, config, addresses), daemon=True)
    process.start()
    try:
        yield addresses.get(timeout=60)
    finally:
        process.terminate()
        process.join(10)


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
            if not len(share):
                return
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


def run(args: Namespace, report: Report, addresses: dict[str, str], config: TlsConfig) -> None:
    total_bytes = args.mib << 20
    tcp = TcpChannel.open({"address": addresses["tcp"], "token": TOKEN.hex()})
    tls = TcpChannel.open({"address": addresses["tls"], "token": TOKEN.hex(), "tls": "1"}, tls_config=config)
    raw = {
        f"{n} sockets, {s} stream{'s' * (s > 1)}": RawSockets(addresses[n], n, s)
        for n in ("raw", "tuned")
        for s in (1, 2)
    }
    for size in [int(word) for word in args.sizes.split(",")]:
        data = content(total_bytes).reshape(-1, size)
        blocks, out = descriptors(data), np.zeros_like(data)
        cases = read_cases(raw, tcp, tls, blocks, out) + write_cases(raw, tcp, tls, blocks, data)
        report.add(f"Blocks of {size_name(size)}", measure(cases, args.rounds, quiet_s=args.quiet_s))
        assert np.array_equal(out, data)
    tcp.close()
    tls.close()


def read_cases(
    raw: dict[str, RawSockets], tcp: TcpChannel, tls: TcpChannel, blocks: Descriptors, out: Bytes2D
) -> list[Case]:
    limits = tuple(f"read: {name}" for name in raw if name.startswith("raw"))
    aim = 0.9 if out.shape[1] >= 2 << 20 else 0.7

    def read(channel: TcpChannel, verify: bool) -> None:
        assert channel.read(1, blocks, out, deadline_s=DEADLINE_S, verify=verify).all()

    return [
        *[Case(f"read: {n}", partial(sockets.move, out, 0), out.nbytes) for n, sockets in raw.items()],
        Case("read: tcp, unverified", lambda: read(tcp, False), out.nbytes, limits=limits),
        Case("read: tcp", lambda: read(tcp, True), out.nbytes, limits=limits, aim=aim),
        Case("read: tcp with TLS", lambda: read(tls, True), out.nbytes, limits=limits),
    ]


def write_cases(
    raw: dict[str, RawSockets], tcp: TcpChannel, tls: TcpChannel, blocks: Descriptors, data: Bytes2D
) -> list[Case]:
    limits = tuple(f"write: {name}" for name in raw if name.startswith("raw"))

    def write(channel: TcpChannel) -> None:
        channel.write(1, blocks, data, deadline_s=DEADLINE_S)

    return [
        *[Case(f"write: {n}", partial(sockets.move, data, 1), data.nbytes) for n, sockets in raw.items()],
        Case("write: tcp", lambda: write(tcp), data.nbytes, limits=limits),
        Case("write: tcp with TLS", lambda: write(tls), data.nbytes, limits=limits),
    ]


def certificate(folder: Path) -> TlsConfig:
    """Signed by itself, good for a day."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    names = ["-subj", "/CN=bench", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command, "-keyout", key, "-out", cert, "-days", "1", *names], check=True, capture_output=True)
    return TlsConfig(cert, key, cert)


def main() -> None:
    parser = arguments(__doc__, rounds=7)
    parser.add_argument("--mib", type=int, default=128, help="bytes a run, in MiB")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="bytes of a block")
    args = parser.parse_args()
    report = Report("the tcp channel on loopback", args.json)
    with tempfile.TemporaryDirectory() as folder:
        config = certificate(Path(folder))
        with other_process(args.mib << 20, config) as addresses:
            run(args, report, addresses, config)
    report.save()


if __name__ == "__main__":
    main()
