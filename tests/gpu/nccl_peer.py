"""One side of a collective channel on a device of its own (CUDA_VISIBLE_DEVICES): for tests that need two."""

from __future__ import annotations

import contextlib
import json
import sys

import numpy as np

from kvpool.channels.collective import CollectiveChannel
from tests.channels.collective_peer import BLOCK_BYTES, COUNT, LEASE, RESERVATION, Source, made_blocks

DEADLINE_S = 60.0


def serve(backend: str) -> None:
    """Prints the offer, then whatever the segment's content is worth at each line of input."""
    blocks, data = made_blocks()
    with contextlib.closing(Source(backend=backend)) as source:  # type: ignore[arg-type]
        print(json.dumps(source.offer), flush=True)
        for _ in sys.stdin:
            print(json.dumps(bool(np.array_equal(source.segment, data.reshape(-1)))), flush=True)
    assert len(blocks.keys) == COUNT


def use(offer: str) -> None:
    """Reads all, writes all, and reads it again; prints whether all was right."""
    blocks, data = made_blocks()
    with contextlib.closing(CollectiveChannel.open(json.loads(offer))) as channel:
        print("open", flush=True)
        out = np.zeros((COUNT, BLOCK_BYTES), dtype=np.uint8)
        right = bool(channel.read(LEASE, blocks, out, deadline_s=DEADLINE_S).all()) and np.array_equal(out, data)
        digests = channel.write(RESERVATION, blocks, data, deadline_s=DEADLINE_S)
        right &= np.array_equal(digests, blocks.digests)
        out[:] = 0
        right &= bool(channel.read(LEASE, blocks, out, deadline_s=DEADLINE_S).all()) and np.array_equal(out, data)
    print(json.dumps(bool(right)), flush=True)


if __name__ == "__main__":
    {"serve": serve, "use": use}[sys.argv[1]](sys.argv[2])
