"""Hashing a prompt of 131 072 tokens and matching it in a directory, beside the xxhash library and a dict.

python tools/bench/hash_match.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import xxhash

from kvpool.core.changes import BlockChange, ChangeKind
from kvpool.core.directory import Directory, SourceRecord
from kvpool.core.hashing import block_keys
from kvpool.core.ids import SourceId, Tier

ROOT = bytes(range(16))


def milliseconds(run: Callable[[], object], rounds: int) -> float:
    """Median; the first two runs compile and warm up."""
    times = []
    for _ in range(rounds + 2):
        begin_s = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin_s)
    return statistics.median(times[2:]) * 1e3


def library_chain(tokens: np.ndarray, block_tokens: int) -> list[bytes]:
    """The plain way: one call of the library a block."""
    packed, step, parent, keys = tokens.astype("<u4").tobytes(), 4 * block_tokens, ROOT, []
    for start in range(0, len(packed) - step + 1, step):
        parent = xxhash.xxh3_128_digest(parent + packed[start : start + step])
        keys.append(parent)
    return keys


def run(token_count: int, block_tokens: int, rounds: int) -> dict[str, float]:
    tokens = np.random.default_rng(0).integers(0, 128_000, token_count, dtype=np.uint32)
    as_list = tokens.tolist()
    keys = block_keys(ROOT, tokens, block_tokens)
    plain = library_chain(tokens, block_tokens)
    assert keys.tobytes() == b"".join(plain), "hashing differs from the library"

    directory = Directory()
    source = SourceId("node-0")
    directory.attach(SourceRecord(source, 1, Tier.DRAM), 0)
    directory.apply(source, 1, 1, [BlockChange(ChangeKind.STORED, keys.tobytes())], 0)
    assert directory.match(keys).covered == len(keys)
    table = dict.fromkeys(plain)

    def match_in_dict() -> int:
        return next((i for i, key in enumerate(plain) if key not in table), len(plain))

    return {
        "hash, from an array": milliseconds(lambda: block_keys(ROOT, tokens, block_tokens), rounds),
        "match": milliseconds(lambda: directory.match(keys), rounds),
        "hash + match, from an array": milliseconds(
            lambda: directory.match(block_keys(ROOT, tokens, block_tokens)), rounds
        ),
        "hash + match, from a list": milliseconds(
            lambda: directory.match(block_keys(ROOT, np.array(as_list, dtype=np.uint32), block_tokens)), rounds
        ),
        "limit: list to array alone": milliseconds(lambda: np.array(as_list, dtype=np.uint32), rounds),
        "plain: xxhash library, a call a block": milliseconds(lambda: library_chain(tokens, block_tokens), rounds),
        "plain: dict look-up, a key a block": milliseconds(match_in_dict, rounds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--block-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    args = parser.parse_args()
    result = run(args.tokens, args.block_tokens, args.rounds)
    print(f"{args.tokens} tokens, blocks of {args.block_tokens}; median milliseconds")
    for name, value in result.items():
        print(f"{name:40}{value:10.3f}")
    if args.json:
        document = {"milliseconds": result, "tokens": args.tokens, "block_tokens": args.block_tokens}
        args.json.write_text(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
