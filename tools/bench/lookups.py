"""Look-ups of keys, in batches and one by one: on the same host, over gRPC, and in what others would use.

python tools/bench/lookups.py [--json FILE] [--peers redis,mooncake --peer-python NAME=PYTHON]
"""

from __future__ import annotations

import functools
from argparse import Namespace
from collections.abc import Callable

import numpy as np
from harness import Case, Report, Row, arguments, measure
from node import NodeProcess, block_namespace, made_keys
from numpy.typing import NDArray
from peers.running import Peer, add_peer_arguments, peers_wanted
from peers.serving import LOOKUP_KEYS

from kvpool.client import PoolClient
from kvpool.core.ids import qualify

BLOCK_BYTES = 4096
BATCHES = (1000, 16_384, 65_536)
SINGLES, SINGLES_OVER_GRPC = 1000, 100
PUT_KEYS = 16_384
DICT = "dict, a key at a time"

Keys = NDArray[np.uint8]


def fill(client: PoolClient, namespace: bytes, keys: Keys) -> None:
    data = np.zeros((PUT_KEYS, BLOCK_BYTES), dtype=np.uint8)
    for at in range(0, len(keys), PUT_KEYS):
        part = keys[at : at + PUT_KEYS]
        assert client.put(namespace, part, data[: len(part)], ttl_s=120).stored.all()


def batch_cases(near: PoolClient, far: PoolClient, namespace: bytes, keys: Keys, missing: Keys) -> list[Case]:
    """Batches of different sizes; the keys of each run are drawn from all of them, so that caches do not help."""
    rng = np.random.default_rng(1)
    session = near._session()
    assert session.shared is not None, "the node's index is not shared with this process"
    index, number = session.shared, session.numbers[namespace]
    table = dict.fromkeys(bytes(key) for key in keys)
    asked = [bytes(key) for key in keys[rng.permutation(len(keys))[: BATCHES[1]]]]

    def drawn(of: Keys, size: int) -> Keys:
        return np.ascontiguousarray(of[rng.integers(0, len(of), size)])

    def all_there(look: Callable[[Keys], NDArray[np.bool_]], batches: list[Keys]) -> None:
        for batch in batches:
            assert look(batch).all()

    def none_there(look: Callable[[Keys], NDArray[np.bool_]], of: Keys) -> None:
        assert not look(of).any()

    by_index = functools.partial(index.lookup, number)
    cases = [Case(DICT, lambda: _all_in(table, asked), len(asked), "M keys/s")]
    for size in BATCHES:
        batches = [drawn(keys, size) for _ in range(calls(size))]
        asks = {"same host": lambda k: near.lookup(namespace, k), "gRPC": lambda k: far.lookup(namespace, k)}
        cases += [
            Case(f"{name}, {size} a call", functools.partial(all_there, ask, batches), size * len(batches),
                 "M keys/s", limits=(DICT,))
            for name, ask in asks.items()
        ]  # fmt: skip
    there, absent = qualify(drawn(keys, BATCHES[1]), 0, 0), qualify(drawn(missing, BATCHES[1]), 0, 0)
    return [
        *cases,
        Case("the index alone, there", functools.partial(all_there, by_index, [there]), len(there), "M keys/s"),
        Case("the index alone, absent", functools.partial(none_there, by_index, absent), len(absent), "M keys/s"),
    ]


def calls(size: int) -> int:
    """Calls of a run: of small batches so many that the first one, which finds the caches cold, does not count."""
    return max(1, BATCHES[1] // size)


def _all_in(table: dict[bytes, None], asked: list[bytes]) -> None:
    found = [key in table for key in asked]  # a list: what all() takes from a generator costs more than the look-up
    assert len(found) == len(asked)


def single_cases(near: PoolClient, far: PoolClient, namespace: bytes, keys: Keys) -> list[Case]:
    session = near._session()
    assert session.shared is not None
    index, number = session.shared, session.numbers[namespace]
    rng = np.random.default_rng(2)
    chosen = [keys[row : row + 1] for row in rng.integers(0, len(keys), SINGLES).tolist()]
    stored = [qualify(key, 0, 0) for key in chosen]
    out = np.zeros((1, BLOCK_BYTES), dtype=np.uint8)

    def each(look: Callable[[Keys], object], some: list[Keys]) -> None:
        for key in some:
            look(key)

    few = chosen[:SINGLES_OVER_GRPC]
    return [
        Case("same host", lambda: each(lambda k: near.lookup(namespace, k), chosen), SINGLES, "us"),
        Case("the index alone", lambda: each(lambda k: index.lookup(number, k), stored), SINGLES, "us"),
        Case("gRPC", lambda: each(lambda k: far.lookup(namespace, k), few), len(few), "us"),
        Case("get of 4 KiB, same host", lambda: each(lambda k: near.get(namespace, k, out), chosen), SINGLES, "us"),
        Case("get of 4 KiB, tcp and gRPC", lambda: each(lambda k: far.get(namespace, k, out), few), len(few), "us"),
    ]


def peer_cases(peers: list[Peer]) -> tuple[list[Case], list[Case]]:
    """In batches, and one by one."""
    batches, singles = [], []
    for peer in peers:
        if "lookup" in peer.does:
            count = calls(LOOKUP_KEYS)
            run = functools.partial(repeated, peer, "lookup", count)
            name = f"{peer.name}, {LOOKUP_KEYS} a call"
            batches.append(Case(name, run, count * LOOKUP_KEYS, "M keys/s", limits=(DICT,)))
        if "lookup_one" in peer.does:
            run = functools.partial(repeated, peer, "lookup_one", SINGLES_OVER_GRPC)
            singles.append(Case(peer.name, run, SINGLES_OVER_GRPC, "us"))
    return batches, singles


def repeated(peer: Peer, method: str, count: int) -> float:
    """Seconds of all runs."""
    return sum(peer.run(method) for _ in range(count))


def run(args: Namespace, report: Report, address: str) -> list[Row]:
    rng = np.random.default_rng(0)
    keys, missing = made_keys(rng, args.keys), made_keys(rng, args.keys)
    with (
        PoolClient(address, channels=("shm",), timeout_s=60) as near,
        PoolClient(address, channels=("tcp",), timeout_s=60) as far,
        peers_wanted(args) as peers,
    ):
        for client in (near, far):
            namespace = client.register(block_namespace(BLOCK_BYTES, 1))
        fill(near, namespace, keys)
        batches, singles = peer_cases(peers)
        found = measure(batch_cases(near, far, namespace, keys, missing) + batches, args.rounds, quiet_s=args.quiet_s)
        report.add(f"Batches, {args.keys} blocks in the index", found)
        one_by_one = measure(single_cases(near, far, namespace, keys) + singles, args.rounds, quiet_s=args.quiet_s)
        report.add("One by one", one_by_one)
    return [*found, *one_by_one]


def main() -> None:
    parser = arguments(__doc__, rounds=9)
    parser.add_argument("--keys", type=int, default=131_072, help="blocks in the index")
    add_peer_arguments(parser)
    args = parser.parse_args()
    report = Report("look-ups", args.json)
    with NodeProcess(args.keys * BLOCK_BYTES * 5 // 4 + (64 << 20), entry_bytes_min=BLOCK_BYTES) as node:
        run(args, report, node.address)
    report.save()


if __name__ == "__main__":
    main()
