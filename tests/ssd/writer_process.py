"""A process that appends and removes until it is killed, and says on stdout what it has acknowledged."""

import sys
from pathlib import Path

import numpy as np

from kvpool.tiers.ssd.store import SsdStore

from .records_made import batch_of, keys_of


def main():
    folder, seed, version = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    rng = np.random.default_rng(seed)
    store = SsdStore.open(folder, "k", 64 << 20, segment_bytes=1 << 20)
    print("ready", flush=True)
    while True:
        version += 1
        numbers = rng.choice(60, int(rng.integers(1, 6)), replace=False).tolist()
        if rng.integers(4) == 0:
            print("removing", *numbers, flush=True)
            assert store.remove(keys_of(numbers)).all()
            print("removed", *numbers, flush=True)
            continue
        size = int(rng.choice([10, 900, 5000, 40_000, 150_000]))
        print("putting", version, size, *numbers, flush=True)
        assert store.append(batch_of([(number, version, size) for number in numbers])).all(), store.stats()
        print("put", version, size, *numbers, flush=True)


if __name__ == "__main__":
    main()
