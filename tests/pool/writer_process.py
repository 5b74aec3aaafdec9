"""A client process that reserves and writes blocks but never commits, then waits to be ended.

python -m tests.pool.writer_process ADDRESS CHANNEL BLOCKS
"""

from __future__ import annotations

import signal
import sys

import numpy as np

from kvpool.client import PoolClient
from tests.pool.node_process import namespace_spec, random_blocks


def main() -> None:
    address, channel, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    client = PoolClient(address, client="writer", channels=(channel,))
    namespace = client.register(namespace_spec("writer"))
    keys, data = random_blocks(count, [99])
    reservation = client.reserve(namespace, keys, ttl_s=600)
    client.write(reservation, np.arange(count), data)
    print("written", flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
