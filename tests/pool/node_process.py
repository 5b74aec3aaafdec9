"""Real node processes, and namespaces and blocks to fill them with."""

from __future__ import annotations

import json
import random
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpool.core.namespace import GroupKind, GroupSpec, NamespaceSpec
from kvpool.v1 import block_source_pb2

START_TIMEOUT_S, END_TIMEOUT_S = 100.0, 60.0
BLOCK_BYTES = 32 << 10
SECTIONS = 4
HELD = ("sessions", "leases", "pins", "reservations", "quarantined", "waiters", "blocks_writing")


class NodeProcess:
    """`python -m kvpool.service.node` with a small segment."""

    def __init__(self, folder: Path, *, flags: Sequence[str] = (), **options: object) -> None:
        settings = {"listen": "127.0.0.1:0", "memory_bytes": 32 << 20, "segment_dir": str(folder), **options}
        words = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]
        self._log = (folder / "node.log").open("ab")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kvpool.service.node", *words, *flags], stdout=subprocess.PIPE, stderr=self._log
        )
        assert self.process.stdout is not None
        ready = select.select([self.process.stdout], [], [], START_TIMEOUT_S)[0]
        line = self.process.stdout.readline() if ready else b""
        assert line, f"the node did not start: {(folder / 'node.log').read_text()}"
        self.facts: dict[str, Any] = json.loads(line)

    @property
    def address(self) -> str:
        return str(self.facts["address"])

    @property
    def segment(self) -> Path:
        return Path(self.facts["segment"])

    def send(self, number: signal.Signals) -> None:
        """SIGSTOP has taken effect on return."""
        if number is signal.SIGSTOP:
            stand_still(self.process)
        else:
            self.process.send_signal(number)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.terminate()
        return self._ended()

    def kill(self) -> None:
        self.process.kill()
        self._ended()

    def _ended(self) -> int:
        code = self.process.wait(END_TIMEOUT_S)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._log.close()
        return code


def namespace_spec(model: str = "test", block_bytes: int = BLOCK_BYTES) -> NamespaceSpec:
    group = GroupSpec(0, GroupKind.FULL, (0, 1, 2, 3), 16, 2, SECTIONS, block_bytes)
    return NamespaceSpec(model, "", "float32", "test", "lkthd", "xxh3_128/1", (group,))


def random_blocks(
    count: int, seed: Sequence[int], block_bytes: int = BLOCK_BYTES
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Keys and blocks. Equal keys would be the same block, also in another namespace: put its id into the seed."""
    rng = np.random.default_rng(seed)
    keys = rng.integers(0, 256, (count, 16), dtype=np.uint8)
    return keys, rng.integers(0, 256, (count, block_bytes), dtype=np.uint8)


def stand_still(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    """Stops a process, and returns once none of its threads does anything any more: a signal alone is only a word."""
    process.send_signal(signal.SIGSTOP)
    tasks = Path(f"/proc/{process.pid}/task")

    def stopped() -> bool:
        try:
            # The state comes after the name, which may hold anything but ends with the last bracket.
            states = [(task / "stat").read_text().rpartition(")")[2].split()[0] for task in tasks.iterdir()]
        except (FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            return False
        return all(state == "T" for state in states)

    assert eventually(stopped)


def free_port() -> int:
    """One for a server that is to come back at it: the kernel hands it out to nobody in between."""
    first_of_kernel = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.SystemRandom().randrange(10_000, max(first_of_kernel, 20_000))
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def eventually(holds: Callable[[], bool], timeout_s: float = 60.0) -> bool:
    """Whether `holds` comes true in time: far more than it takes, since how fast this machine is proves nothing."""
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        if holds():
            return True
        time.sleep(0.01)
    return holds()


def held(stats: block_source_pb2.SourceStats) -> dict[str, int]:
    """What is held for somebody, where it is not nothing."""
    return {name: getattr(stats, name) for name in HELD if getattr(stats, name)}
