"""Peers of this project, each in a process of its own under its own Python: their pins disagree.

Our side: starts a script of this folder, one a peer, and has it do things.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

#: Peer: its script, and the module that must be there for it.
PEERS = {
    "mooncake": ("mooncake.py", "mooncake"),
    "nixl": ("nixl.py", "nixl_cu12"),
    "redis": ("redis_store.py", "redis"),
    "lmcache": ("lmcache.py", "lmcache"),
    "dynamo": ("dynamo_tree.py", "dynamo"),
}
#: Those that store blocks.
STORES = ("mooncake", "nixl", "redis", "lmcache")
BLOCK_BYTES_DEFAULT = 2 << 20
#: Bytes of the blocks of a run.
TOTAL_BYTES = 128 << 20


class Peer:
    """One peer, started."""

    def __init__(self, name: str, python: str, block_bytes: int, count: int | None = None) -> None:
        """`count` blocks a run; by default as many as TOTAL_BYTES has, at most 1024."""
        self.name = name
        if count is None:
            count = max(1, min(1024, TOTAL_BYTES // block_bytes))
        self.total_bytes = count * block_bytes
        # An `import` that fails in the peer's Python must not find ours.
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        script = Path(__file__).with_name(PEERS[name][0])
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - until `close`
        self._process = subprocess.Popen(
            [python, str(script), str(block_bytes), str(count)], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
        )  # fmt: skip
        #: Which methods it has, of those that `serving.serve` names.
        self.does: list[str] = self._answer()["does"]

    def run(self, method: str) -> float:
        """Does it once. Returns seconds."""
        assert self._process.stdin is not None
        self._process.stdin.write(method + "\n")
        self._process.stdin.flush()
        return float(self._answer()["seconds"])

    def _answer(self) -> dict[str, Any]:
        """The next line that is ours: peers print what they like."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("@bench "):
                answer: dict[str, Any] = json.loads(line.removeprefix("@bench "))
                return answer
        self._process.wait(30)
        self._log.seek(0)
        raise RuntimeError(f"{self.name} has ended: {self._log.read().decode(errors='replace')[-2000:]}")

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        self._process.stdout.close()
        self._log.close()


def add_peer_arguments(parser: argparse.ArgumentParser, names: Sequence[str] = STORES) -> None:
    parser.add_argument("--peers", nargs="?", const=",".join(names), default="", metavar="NAMES",
                        help="also measure peers that are installed: all, or some of " + ", ".join(names))  # fmt: skip
    parser.add_argument("--peer-python", action="append", default=[], metavar="NAME=PYTHON",
                        help="the Python that has a peer; else this one")  # fmt: skip


@contextmanager
def peers_wanted(
    args: argparse.Namespace, block_bytes: int = BLOCK_BYTES_DEFAULT, count: int | None = None
) -> Iterator[list[Peer]]:
    """The peers that were asked for and can be run."""
    pythons = dict(word.split("=", 1) for word in args.peer_python)
    with ExitStack() as stack:
        peers: list[Peer] = []
        for name in [word for word in args.peers.split(",") if word]:
            if name not in pythons and importlib.util.find_spec(PEERS[name][1]) is None:
                print(f"{name}: not installed here; --peer-python {name}=PYTHON names one that has it", file=sys.stderr)
                continue
            peer = Peer(name, pythons.get(name, sys.executable), block_bytes, count)
            stack.callback(peer.close)
            peers.append(peer)
        yield peers
