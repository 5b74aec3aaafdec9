"""Mooncake Store over TCP on this host: master, the process that owns the segment, and this one, its client.

pip install mooncake-transfer-engine-non-cuda; apt install libibverbs1 librdmacm1 libnuma1 libcurl4
"""

import os
import subprocess
import sys
import time
from pathlib import Path

# This file is called as the package is.
sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
from mooncake.store import MooncakeDistributedStore  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent))
from serving import LOOKUP_KEYS, memory, serve, settings, timed  # noqa: E402

PORT, METRICS_PORT = 51051, 51053
SEGMENT_BYTES, BUFFER_BYTES = 1 << 30, 512 << 20
READY_S = 30


def connect(segment_bytes, buffer_bytes):
    store = MooncakeDistributedStore()
    end_s = time.monotonic() + READY_S
    while store.setup("127.0.0.1", "P2PHANDSHAKE", segment_bytes, buffer_bytes, "tcp", "", f"127.0.0.1:{PORT}"):
        assert time.monotonic() < end_s, "no master"
        time.sleep(0.2)
    return store


class Mooncake:
    def __init__(self, block_bytes, count):
        self.store = connect(0, BUFFER_BYTES)
        self.data, self.out = memory(block_bytes, count, filled=True), memory(block_bytes, count, filled=False)
        for rows in (self.data, self.out):
            assert self.store.register_buffer(rows.ctypes.data, rows.nbytes) == 0
        self.sizes = [block_bytes] * count
        self.sources = [row.ctypes.data for row in self.data]
        self.targets = [row.ctypes.data for row in self.out]
        self.generation = 0
        self.known = [f"known-{index}" for index in range(LOOKUP_KEYS)]
        for key in self.known[::2]:
            assert self.store.put(key, b"v" * 64) == 0
        self.put()
        self.get()
        assert (self.out == self.data).all(), "wrong bytes"

    def _keys(self):
        return [f"{self.generation}-{index}" for index in range(len(self.sizes))]

    def put(self):
        if self.generation:
            self.store.batch_remove(self._keys(), True)
        self.generation += 1
        keys = self._keys()

        def run():
            assert not any(self.store.batch_put_from(keys, self.sources, self.sizes))

        return timed(run)

    def get(self):
        keys = self._keys()

        def run():
            assert self.store.batch_get_into(keys, self.targets, self.sizes) == self.sizes

        return timed(run)

    def lookup(self):
        assert sum(self.store.batch_is_exist(self.known)) == LOOKUP_KEYS // 2

    def lookup_one(self):
        assert self.store.is_exist(self.known[0]) == 1


def own_segment():
    store = connect(SEGMENT_BYTES, 64 << 20)
    print("ready", flush=True)
    sys.stdin.read()
    store.close()


def main():
    if sys.argv[1] == "segment":
        own_segment()
        return
    master = [
        str(Path(sys.executable).parent / "mooncake_master"), f"--rpc_port={PORT}", "--rpc_address=127.0.0.1",
        "--metrics_host=127.0.0.1", f"--metrics_port={METRICS_PORT}",
    ]  # fmt: skip
    os.environ["MC_TCP_BIND_ADDRESS"] = "127.0.0.1"
    processes = [subprocess.Popen(master, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)]
    try:
        time.sleep(1)
        owner = subprocess.Popen(
            [sys.executable, __file__, "segment"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        processes.append(owner)
        while not (line := owner.stdout.readline()).startswith(b"ready"):
            assert line, "the owner of the segment has ended"
        peer = Mooncake(*settings())
        serve(peer)
        peer.store.close()
    finally:
        for process in reversed(processes):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
    os._exit(0)  # its threads may wait for the master for long


if __name__ == "__main__":
    main()
