"""Redis on loopback: SET and GET of blocks one after the other over a UNIX socket, MGET of small keys.

pip install redis hiredis; apt install redis-server
"""

import subprocess
import tempfile
import time

import redis
from serving import LOOKUP_KEYS, memory, serve, settings

READY_S = 20


class Redis:
    def __init__(self, client, block_bytes, count):
        self.client = client
        self.values = [row.tobytes() for row in memory(block_bytes, count, filled=True)]
        self.names = [b"block-%d" % index for index in range(count)]
        self.known = [b"known-%d" % index for index in range(LOOKUP_KEYS)]
        client.mset(dict.fromkeys(self.known[::2], b"v" * 64))
        self.put()
        assert [client.get(name) for name in self.names] == self.values, "wrong bytes"

    def put(self):
        for name, value in zip(self.names, self.values, strict=True):
            self.client.set(name, value)

    def get(self):
        for name in self.names:
            self.client.get(name)

    def lookup(self):
        assert sum(value is not None for value in self.client.mget(self.known)) == LOOKUP_KEYS // 2

    def lookup_one(self):
        assert self.client.exists(self.known[0]) == 1


def main():
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/socket"
        server = subprocess.Popen(
            ["redis-server", "--port", "0", "--unixsocket", path, "--dir", folder, "--save", "", "--appendonly", "no"],
            stdout=subprocess.DEVNULL,
        )
        try:
            client = redis.Redis(unix_socket_path=path)
            end_s = time.monotonic() + READY_S
            while True:
                try:
                    client.ping()
                    break
                except redis.ConnectionError:
                    assert time.monotonic() < end_s, "redis-server does not answer"
                    time.sleep(0.1)
            serve(Redis(client, *settings()))
        finally:
            server.terminate()
            server.wait(10)


if __name__ == "__main__":
    main()
