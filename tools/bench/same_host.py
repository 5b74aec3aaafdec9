"""Blocks and objects between processes of one host, beside what the machine's own copies do in the same run.

A node process holds the blocks; clients get and put whole batches through `PoolClient`. Limits are copies of blocks of
the same size in private memory: plain, with glibc's threshold lowered so that blocks are copied past the cache, and
with two threads; and the same followed by the xxhash library's digest of each section.

python tools/bench/same_host.py [--json FILE] [--mib 256] [--clients 1,2,4,8,16] [--peers --peer-python NAME=PYTHON]
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from functools import partial

import numpy as np
from copies import Client, Memcpy, Process, run_together
from harness import Case, Report, Row, arguments, measure, size_name
from node import NodeProcess
from peers.running import Peer, add_peer_arguments, peers_wanted

from kvpool.client import PoolClient
from kvpool.core.ids import NamespaceId

SIZES = (4 << 10, 64 << 10, 2 << 20, 64 << 20)
OBJECT_SIZES = (1, 1 << 10, 64 << 10, 1 << 20, 64 << 20)
CLIENT_BLOCK_BYTES = 2 << 20
#: Calls of a run that are timed one after the other.
SINGLES = 20
COPIES = ("memcpy, in one piece", "memcpy, block by block", "memcpy, block by block, tuned",
          "memcpy, block by block, 2 threads, tuned")  # fmt: skip
HASHED = ("memcpy, then xxhash", "memcpy, then xxhash, tuned", "memcpy, then xxhash, 2 threads, tuned")


def leased(client: Client) -> Client:
    """The same client without a view of the node's index: each read asks for a lease, as it would from afar."""
    session = client.client._session()  # no public way: nobody else wants the slower one
    session.shared = None
    return client


def measure_size(args: Namespace, address: str, block_bytes: int, peers: list[Peer]) -> list[Row]:
    count = max(1, (args.mib << 20) // block_bytes)
    total = count * block_bytes
    mine = Memcpy(block_bytes, count)
    tuned = Process({"role": "memcpy", "block_bytes": block_bytes, "count": count}, tuned=True)
    tuned.ended()
    client, slow = Client(address, block_bytes, count, 1), leased(Client(address, block_bytes, count, 2))
    cases = [
        Case(COPIES[0], mine.whole, total),
        Case(COPIES[1], mine.blocks, total),
        Case(COPIES[2], lambda: tuned.run("blocks"), total),
        Case(COPIES[3], lambda: tuned.run("blocks_two"), total),
        Case(HASHED[0], mine.hashed, total),
        Case(HASHED[1], lambda: tuned.run("hashed"), total),
        Case(HASHED[2], lambda: tuned.run("hashed_two"), total),
        Case("get, unverified", client.get_unverified, total, limits=COPIES[1:], aim=0.9),
        Case("get", client.get, total, limits=HASHED, aim=0.9),
        Case("get under a lease, unverified", slow.get_unverified, total, limits=COPIES[1:]),
        Case("get under a lease", slow.get, total, limits=HASHED),
        Case("put", client.put, total, limits=HASHED, prepare=client.remove_put),
    ]
    for peer in peers:
        cases += [
            Case(f"{peer.name}: get", lambda p=peer: p.run("get"), peer.total_bytes, limits=("get",)),  # type: ignore[misc]
            Case(f"{peer.name}: put", lambda p=peer: p.run("put"), peer.total_bytes, limits=("put",)),  # type: ignore[misc]
        ]
    rows = measure(cases, args.rounds, quiet_s=args.quiet_s)
    client.check()
    slow.check()
    assert client.client.counters.hits_shared > 0 and slow.client.counters.hits_shared == 0
    client.remove_put()
    for opened in (client, slow):
        opened.close()
    tuned.close()
    return rows


def measure_clients(args: Namespace, address: str, most: int) -> list[Row]:
    """Several processes at once, each with blocks of its own."""
    count = max(1, (args.client_mib << 20) // CLIENT_BLOCK_BYTES)
    settings = {"role": "client", "address": address, "block_bytes": CLIENT_BLOCK_BYTES, "count": count}
    processes: list[Process] = []
    for number in range(most):  # one after the other: starting takes all of a core
        processes.append(Process({**settings, "seed": 100 + number}))
        processes[-1].ended()
    total = most * count * CLIENT_BLOCK_BYTES

    def all_of(name: str) -> float:
        return run_together(processes, name)

    rows = measure(
        [
            Case(f"{most} clients: memcpy, block by block", lambda: all_of("memcpy"), total),
            Case(f"{most} clients: get", lambda: all_of("get"), total,
                 limits=(f"{most} clients: memcpy, block by block",)),
            Case(f"{most} clients: put", lambda: all_of("put"), total, prepare=lambda: all_of("remove_put"),
                 limits=(f"{most} clients: memcpy, block by block",)),
        ],
        args.rounds, quiet_s=args.quiet_s,
    )  # fmt: skip
    for process in processes:
        process.run("check")
        process.run("remove_put")
        process.close()
    return rows


def measure_objects(args: Namespace, address: str) -> list[Row]:
    """Objects of one size: one at a time, and in batches of at most 64 MiB and 1024 objects."""
    rng, cases = np.random.default_rng(3), []
    with PoolClient(address, channels=("shm",), timeout_s=60) as client:
        domain = client.register_objects("bench")
        for size in OBJECT_SIZES:
            count = max(1, min(1024, (64 << 20) // size))
            names = [f"{size}/{index}" for index in range(count)]
            values = [rng.integers(0, 256, size, dtype=np.uint8) for _ in range(min(count, 16))]
            batch = [values[index % len(values)] for index in range(count)]
            out = [np.zeros(size, dtype=np.uint8) for _ in range(count)]
            cases += _object_cases(client, domain, size, names, batch, out)
        rows = measure(cases, args.rounds, quiet_s=args.quiet_s)
        client.remove_all(domain)
    return rows


def _object_cases(
    client: PoolClient, domain: NamespaceId, size: int, names: list[str], batch: list[np.ndarray], out: list[np.ndarray]
) -> list[Case]:
    label, total = size_name(size), size * len(names)
    singles = [f"one/{size}/{index}" for index in range(SINGLES if size <= 1 << 20 else 1)]

    def put(chosen: list[str]) -> None:
        assert client.put_objects(domain, chosen, batch[: len(chosen)]).stored.all()

    def get(chosen: list[str]) -> None:
        got = client.get_objects(domain, chosen, out[: len(chosen)])
        assert all(value is not None for value in got.values)

    def each(call: Callable[[list[str]], None]) -> None:
        for name in singles:
            call([name])

    def remove(chosen: list[str]) -> None:
        client.remove_objects(domain, chosen)

    cases = [
        Case(f"{label}: put one", partial(each, put), len(singles), "us", prepare=partial(remove, singles)),
        Case(f"{label}: get one", partial(each, get), len(singles), "us"),
    ]
    if len(names) > 1:
        unit, amount = ("GB/s", total) if size >= 64 << 10 else ("k/s", len(names))
        cases += [
            Case(f"{label}: put {len(names)}", lambda: put(names), amount, unit,
                 prepare=lambda: client.remove_objects(domain, names)),
            Case(f"{label}: get {len(names)}", lambda: get(names), amount, unit),
        ]  # fmt: skip
    return cases


def main() -> None:
    parser = arguments(__doc__, rounds=7)
    parser.add_argument("--mib", type=int, default=256, help="bytes a run, in MiB")
    parser.add_argument("--client-mib", type=int, default=64, help="bytes a run and client, where there are several")
    parser.add_argument("--clients", default="1,2,4,8,16", help="numbers of clients at once; empty = none")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="bytes of a block; empty = none")
    parser.add_argument("--no-objects", action="store_true")
    add_peer_arguments(parser)
    args = parser.parse_args()
    clients = [int(word) for word in args.clients.split(",") if word]
    memory = max(6 * args.mib, 3 * args.client_mib * max(clients, default=0), 1024) << 20
    report = Report("same host", args.json)
    with NodeProcess(memory, entry_bytes_min=4096) as node:
        for size in [int(word) for word in args.sizes.split(",") if word]:
            with peers_wanted(args, size) as peers:
                report.add(f"Blocks of {size_name(size)}", measure_size(args, node.address, size, peers))
        rows = [row for most in clients for row in measure_clients(args, node.address, most)]
        if rows:
            report.add(f"Several clients, blocks of {size_name(CLIENT_BLOCK_BYTES)}", rows)
        if not args.no_objects:
            report.add("Objects", measure_objects(args, node.address))
    report.save()


if __name__ == "__main__":
    main()
