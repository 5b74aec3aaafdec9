"""Blocks of a node over the channels that leave the host's memory: tcp, nixl and collective, as far as installed.

Through `PoolClient`: lease, transfer, digests, release. Limits are raw Python sockets over loopback in the same run.

python tools/bench/remote.py [--json FILE] [--mib 128] [--peers nixl,mooncake --peer-python NAME=PYTHON]
"""

from __future__ import annotations

import os
import tempfile
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
from copies import Client
from harness import Case, Report, arguments, measure, size_name
from node import NodeProcess
from peers.running import Peer, add_peer_arguments, peers_wanted
from tcp import RawSockets, certificate, other_process

from kvpool.service.source_calls import AVAILABLE

SIZES = (64 << 10, 2 << 20, 64 << 20)
WRITING = ("tcp", "collective")


def cases_of(args: Namespace, addresses: dict[str, str], clients: dict[str, Client], peers: list[Peer]) -> list[Case]:
    some = next(iter(clients.values()))
    total, out = some.out.nbytes, np.zeros_like(some.out)
    limits = ("raw sockets, 1 stream", "raw sockets, 2 streams")
    cases = [
        Case(name, partial(RawSockets(addresses["raw"], "raw", streams).move, out, 0), total)
        for streams, name in enumerate(limits, 1)
    ]
    for kind, client in clients.items():
        cases.append(Case(f"get, {kind}", client.get, total, limits=limits, aim=0.9 if kind == "tcp" else None))
        if kind in WRITING:
            cases.append(Case(f"put, {kind}", client.put, total, limits=limits, prepare=client.remove_put))
    for peer in peers:
        cases += [
            Case(f"{peer.name}: {method}", partial(peer.run, method), peer.total_bytes, limits=(f"{method}, tcp",))
            for method in ("get", "put")
        ]
    return cases


def measure_size(args: Namespace, report: Report, node: NodeProcess, addresses: dict[str, str], size: int) -> None:
    count = max(1, (args.mib << 20) // size)
    kinds: list[str] = [kind for kind in ("tcp", "nixl", "collective") if AVAILABLE.get(kind, lambda: True)()]
    clients = {kind: Client(node.address, size, count, seed, kind) for seed, kind in enumerate(kinds)}
    with peers_wanted(args, size) as peers:
        cases = cases_of(args, addresses, clients, peers)
        report.add(f"Blocks of {size_name(size)}", measure(cases, args.rounds, quiet_s=args.quiet_s))
    for client in clients.values():
        client.check()
        client.remove_put()
        client.close()


def main() -> None:
    parser = arguments(__doc__, rounds=7)
    parser.add_argument("--mib", type=int, default=128, help="bytes a run, in MiB")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="bytes of a block")
    add_peer_arguments(parser)
    args = parser.parse_args()
    os.environ.setdefault("UCX_NET_DEVICES", "lo")
    report = Report("channels between hosts, on loopback", args.json)
    flags = [flag for kind, flags in (("nixl", ["--nixl"]), ("collective", ["--collective", "gloo"]))
             if AVAILABLE[kind]() for flag in flags]  # fmt: skip
    with (
        tempfile.TemporaryDirectory() as folder,
        other_process(args.mib << 20, certificate(Path(folder))) as addresses,
        NodeProcess(max(8 * args.mib, 1024) << 20, *flags) as node,
    ):
        for size in [int(word) for word in args.sizes.split(",")]:
            measure_size(args, report, node, addresses, size)
    report.save()


if __name__ == "__main__":
    main()
