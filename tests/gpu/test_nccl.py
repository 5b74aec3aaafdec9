"""The collective channel over NCCL, between two processes with a GPU each: one GPU cannot hold both ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.gpu.device import DEVICE, missing

pytestmark = pytest.mark.processes
BACKEND = "nccl" if DEVICE == "cuda" else "gloo"
TIME_S = 90.0


class Peer:
    """`nccl_peer.py` on one device."""

    def __init__(self, device: int, *arguments: str) -> None:
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(device), "TORCH_NCCL_ASYNC_ERROR_HANDLING": "2"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.nccl_peer", *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    def ask(self) -> bool:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return bool(json.loads(self.line()))

    def line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the peer has ended"
        return line

    def close(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=TIME_S)


@pytest.fixture
def server() -> Iterator[tuple[Peer, str]]:
    if reason := missing(2):
        pytest.skip(reason)
    peer = Peer(0, "serve", BACKEND)
    yield peer, peer.line()
    peer.close()


def used(offer: str) -> bool:
    peer = Peer(1, "use", offer)
    try:
        out, _ = peer.process.communicate(timeout=TIME_S)
        return bool(json.loads(out.splitlines()[-1]))
    finally:
        peer.close()


def test_blocks_go_both_ways_bit_for_bit(server: tuple[Peer, str]) -> None:
    peer, offer = server
    assert used(offer) and peer.ask()


def test_a_reader_that_is_killed_leaves_the_server_as_it_was(server: tuple[Peer, str]) -> None:
    peer, offer = server
    for _ in range(2):
        reader = Peer(1, "use", offer)
        assert reader.line() == "open\n"
        reader.close()
    assert used(offer) and peer.ask()
