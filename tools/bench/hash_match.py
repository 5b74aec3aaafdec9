"""Hashing a prompt of 131 072 tokens and matching it in a directory, beside the xxhash library, a dict, and Dynamo.

python tools/bench/hash_match.py [--json FILE] [--peers --peer-python dynamo=PYTHON]
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import xxhash
from harness import Case, Report, Row, arguments, measure
from numpy.typing import NDArray
from peers.running import Peer, add_peer_arguments, peers_wanted
from peers.serving import PROMPT_CALLS

from kvpool.core.changes import BlockChange, ChangeKind
from kvpool.core.directory import Directory, SourceRecord
from kvpool.core.hashing import block_keys, token_array
from kvpool.core.ids import SourceId, Tier

ROOT = bytes(range(16))
SOURCES, EVENT_BLOCKS = 16, 1024
CONVERTED = "plain: list to array.array"
CHAIN = "plain: xxhash library, a call a block"

PEER_METHODS = {"hash": "hash, from a list", "match": "match", "hash_match": "hash + match, from a list"}

Keys = NDArray[np.uint8]


def library_chain(tokens: np.ndarray, block_tokens: int) -> list[bytes]:
    """The plain way: one call of the library a block."""
    packed, step, parent, keys = tokens.astype("<u4").tobytes(), 4 * block_tokens, ROOT, []
    for start in range(0, len(packed) - step + 1, step):
        parent = xxhash.xxh3_128_digest(parent + packed[start : start + step])
        keys.append(parent)
    return keys


def prompt_cases(token_count: int, block_tokens: int, peers: list[Peer]) -> list[Case]:
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

    # From a list as Dynamo is: of 0.25 of its time from an array, which it does not take, and 0.9 from a list.
    theirs = tuple(f"{peer.name}: hash + match, from a list" for peer in peers)
    aims = (1 / 0.25, 1 / 0.9) if peers else (None, None)
    works: dict[str, tuple[Callable[[], object], tuple[str, ...], float | None]] = {
        "hash, from an array": (lambda: block_keys(ROOT, tokens, block_tokens), (), None),
        "match": (lambda: directory.match(keys), (), None),
        "hash + match, from an array": (
            lambda: directory.match(block_keys(ROOT, tokens, block_tokens)), theirs or (CHAIN,), aims[0],
        ),
        "hash + match, from a list": (
            lambda: directory.match(block_keys(ROOT, as_list, block_tokens)), theirs or (CHAIN,), aims[1],
        ),
        "list to array": (lambda: token_array(as_list), (CONVERTED,), None),
        CONVERTED: (lambda: array("I", as_list), (), None),
        CHAIN: (lambda: library_chain(tokens, block_tokens), (), None),
        "plain: dict look-up, a key a block": (match_in_dict, (), None),
    }  # fmt: skip
    cases = [
        Case(name, partial(_repeat, work), PROMPT_CALLS, "ms", limits, aim)
        for name, (work, limits, aim) in works.items()
    ]
    for peer in peers:
        for method, what in PEER_METHODS.items():
            cases.append(Case(f"{peer.name}: {what}", partial(peer.run, method), PROMPT_CALLS, "ms"))
    return cases


def _repeat(work: Callable[[], object]) -> None:
    for _ in range(PROMPT_CALLS):
        work()


class Filling:
    """A directory that learns of blocks, batch by batch, as sources tell them."""

    def __init__(self, total: int) -> None:
        self.keys = np.random.default_rng(1).integers(0, 256, (total, 16), dtype=np.uint8)
        self.renew()

    def renew(self) -> None:
        self.directory, self.seq = Directory(), 0
        for number in range(SOURCES):
            self.directory.attach(SourceRecord(SourceId(f"node-{number}"), 1, Tier.DRAM), 0)

    def store(self) -> None:
        self._tell(ChangeKind.STORED)

    def remove(self) -> None:
        self._tell(ChangeKind.REMOVED)

    def _tell(self, kind: ChangeKind) -> None:
        for at in range(0, len(self.keys), EVENT_BLOCKS * SOURCES):
            self.seq += 1
            for number in range(SOURCES):
                start = at + number * EVENT_BLOCKS
                packed = self.keys[start : start + EVENT_BLOCKS].tobytes()
                self.directory.apply(SourceId(f"node-{number}"), 1, self.seq, [BlockChange(kind, packed)], 0)

    def cases(self) -> list[Case]:
        """Each begins where the one before it ended."""
        total = len(self.keys)
        return [
            Case("stored, beginning with nothing", self.store, total, "M blocks/s", prepare=self.renew),
            Case("removed", self.remove, total, "M blocks/s"),
            Case("stored again, where it has room", self.store, total, "M blocks/s"),
        ]

    def bytes_a_block(self) -> float:
        """Of memory that grew; the pages of what was freed before are used again, so this is measured first."""
        before = private_bytes()
        self.store()
        return (private_bytes() - before) / len(self.keys)


def private_bytes() -> int:
    """Anonymous memory of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) << 10


def main() -> None:
    parser = arguments(__doc__, rounds=21)
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--block-tokens", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=1_048_576, help="blocks that the directory learns of")
    add_peer_arguments(parser, ("dynamo",))
    args = parser.parse_args()
    report = Report("hash and match", args.json)
    filling = Filling(args.blocks)
    Filling(4 * EVENT_BLOCKS * SOURCES).store()  # loads the kernels
    each = filling.bytes_a_block()
    with peers_wanted(args, args.block_tokens, args.tokens // args.block_tokens) as peers:
        cases = prompt_cases(args.tokens, args.block_tokens, peers)
        rows = measure(cases, args.rounds, quiet_s=args.quiet_s, warm=2)
    report.add(f"A prompt of {args.tokens} tokens in blocks of {args.block_tokens}", rows)
    rows = measure(filling.cases(), min(args.rounds, 5), quiet_s=args.quiet_s)
    report.add(
        f"A directory of {args.blocks} blocks of {SOURCES} sources, {EVENT_BLOCKS} an event",
        [*rows, Row.figure("memory a block", each, "B")],
    )
    report.save()


if __name__ == "__main__":
    main()
