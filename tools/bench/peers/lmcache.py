"""LMCache's lm:// server on loopback, spoken to with its own messages: one socket, replies into memory at hand.

pip install --no-deps lmcache, and what it imports (torch, numba, msgspec, psutil, pyyaml, ...).
"""

import socket
import subprocess
import sys
import time
from pathlib import Path

_HERE = Path(__file__).resolve().parent
# This file is called as the package is.
sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != _HERE]
import torch  # noqa: E402
from lmcache.utils import CacheEngineKey  # noqa: E402
from lmcache.v1.memory_management import MemoryFormat  # noqa: E402
from lmcache.v1.protocol import (  # noqa: E402
    ClientCommand,
    ClientMetaMessage,
    ServerMetaMessage,
    ServerReturnCode,
)

sys.path.insert(0, str(_HERE))
from serving import memory, serve, settings  # noqa: E402

PORT, READY_S = 51465, 60


class LMCache:
    def __init__(self, block_bytes, count):
        end_s = time.monotonic() + READY_S
        while True:
            try:
                self.socket = socket.create_connection(("127.0.0.1", PORT))
                break
            except OSError:
                assert time.monotonic() < end_s, "the server does not answer"
                time.sleep(0.2)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.data, self.out = memory(block_bytes, count, filled=True), memory(block_bytes, count, filled=False)
        self.put()
        self.get()
        assert (self.out == self.data).all(), "wrong bytes"

    def _ask(self, command, index, size=0):
        key = CacheEngineKey("bench", 1, 0, index, torch.uint8)
        shape = torch.Size([size, 0, 0, 0])
        self.socket.sendall(ClientMetaMessage(command, key, size, MemoryFormat(1), torch.uint8, shape).serialize())

    def _reply(self):
        wanted, text = ServerMetaMessage.packlength(), b""
        while len(text) < wanted:
            text += self.socket.recv(wanted - len(text))
        return ServerMetaMessage.deserialize(text)

    def put(self):
        for index, row in enumerate(self.data):
            self._ask(ClientCommand.PUT, index, row.nbytes)
            self.socket.sendall(row)
        self.lookup_one()  # a put has no answer; what comes after it has

    def get(self):
        for index, row in enumerate(self.out):
            self._ask(ClientCommand.GET, index)
            assert self._reply().length == row.nbytes
            view = memoryview(row)
            while view:
                view = view[self.socket.recv_into(view) :]

    def lookup_one(self):
        self._ask(ClientCommand.EXIST, 0)
        assert self._reply().code == ServerReturnCode.SUCCESS


def main():
    server = subprocess.Popen(
        [sys.executable, "-m", "lmcache.v1.server", "127.0.0.1", str(PORT), "cpu"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/",
    )  # fmt: skip
    try:
        serve(LMCache(*settings()))
    finally:
        server.terminate()
        server.wait(10)


if __name__ == "__main__":
    main()
