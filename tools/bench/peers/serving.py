"""The peers' side: does what it is told, line by line, and says how long it took.

Runs under a peer's own Python: nothing but the standard library and numpy may be imported here.
"""

import json
import mmap
import sys
import time

import numpy as np

#: Keys of a look-up; half of them are there.
LOOKUP_KEYS = 1000
#: Calls of one run of hash, match and hash_match: the first one, which finds the caches cold, does not count for much.
PROMPT_CALLS = 20


def settings():
    """Block bytes and blocks of a run."""
    return int(sys.argv[1]), int(sys.argv[2])


def memory(block_bytes, count, *, filled):
    """Page-aligned, touched; uint8 (count, block_bytes)."""
    rows = np.frombuffer(mmap.mmap(-1, block_bytes * count), dtype=np.uint8).reshape(count, block_bytes)
    pattern = np.random.default_rng(1).integers(0, 256, block_bytes + 8 * count, dtype=np.uint8)
    for index, row in enumerate(rows):
        row[:] = pattern[8 * index : 8 * index + block_bytes] if filled else 0
    return rows


def serve(peer):
    """Until the input ends. A method may return the seconds that count; it is timed otherwise."""
    names = ("get", "put", "lookup", "lookup_one", "hash", "match", "hash_match")
    _say({"does": [name for name in names if hasattr(peer, name)]})
    for line in sys.stdin:
        begin_s = time.perf_counter()
        known_s = getattr(peer, line.strip())()
        _say({"seconds": time.perf_counter() - begin_s if known_s is None else known_s})


def timed(run):
    """Seconds."""
    begin_s = time.perf_counter()
    run()
    return time.perf_counter() - begin_s


def _say(answer):
    print("\n@bench " + json.dumps(answer), flush=True)
