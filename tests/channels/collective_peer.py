"""A process that serves or uses a collective channel, for tests that stop and kill it.

It holds blocks that follow from a seed; block i lies at i * BLOCK_BYTES, and one lease or reservation covers all.
"""

from __future__ import annotations

import json
import sys

import numpy as np
from numpy.typing import NDArray

from kvpool.channels.collective import CollectiveChannel
from kvpool.channels.collective_server import CollectiveServer
from kvpool.core.arrays import Descriptors
from kvpool.core.hashing import section_digest
from kvpool.service.grants import Grants, now_us

SEED, COUNT, BLOCK_BYTES, SECTIONS = 5, 24, 384 << 10, 2
SESSION, LEASE, RESERVATION = 1, 10, 20
TTL_US = 600_000_000


def made_blocks() -> tuple[Descriptors, NDArray[np.uint8]]:
    rng = np.random.default_rng(SEED)
    keys = rng.integers(0, 256, (COUNT, 16), dtype=np.uint8)
    data = rng.integers(0, 256, (COUNT, BLOCK_BYTES), dtype=np.uint8)
    digests = np.zeros((COUNT, SECTIONS), dtype=np.uint64)
    for i in range(COUNT):
        for section, part in enumerate(np.split(data[i], SECTIONS)):
            digests[i, section] = section_digest(np.ascontiguousarray(part), keys[i].tobytes(), section)
    offsets = np.arange(COUNT, dtype=np.uint64) * np.uint64(BLOCK_BYTES)
    sizes = np.full(COUNT, BLOCK_BYTES, dtype=np.uint64)
    return Descriptors(keys, offsets, sizes, np.ones(COUNT, dtype=np.uint32), digests), data


class Source:
    """Memory, rights and a server; everything is covered by one lease and one reservation."""

    def __init__(self, **options: int) -> None:
        self.blocks, self.data = made_blocks()
        self.segment = self.data.reshape(-1).copy()
        self.grants = Grants()
        self.token = self.grants.open_session(SESSION)
        self.grant()
        self.server = CollectiveServer(self.segment, self.grants, "127.0.0.1", 0, **options)
        self.offer = self.server.offer(SESSION, self.token)

    def grant(self) -> None:
        everything, expires_us = np.ones(COUNT, dtype=np.bool_), now_us() + TTL_US
        self.grants.grant_read(SESSION, LEASE, self.blocks, everything, expires_us)
        self.grants.grant_write(SESSION, RESERVATION, self.blocks, everything, SECTIONS, expires_us)

    def close(self) -> None:
        assert self.server.close()
        self.grants.check_invariants()


def main() -> None:
    if sys.argv[1] == "serve":
        print(json.dumps(Source().offer), flush=True)
        sys.stdin.read()
        return
    blocks, data = made_blocks()
    channel = CollectiveChannel.open(json.loads(sys.argv[2]))
    print("open", flush=True)
    while True:
        if sys.argv[1] == "write":
            channel.write(RESERVATION, blocks, data, deadline_s=30)
        else:
            assert channel.read(LEASE, blocks, data, deadline_s=30).all()


if __name__ == "__main__":
    main()
