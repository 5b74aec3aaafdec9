"""A node process of its own for a benchmark, and namespaces of made-up blocks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from kvpool.core.namespace import GroupKind, GroupSpec, NamespaceSpec

SECTION_COUNT = 4
#: A node counts on blocks of 16 KiB on average; a benchmark of small ones says so.
_LAUNCHER = """
import sys
from kvpool.service import node
node.ENTRY_BYTES_MIN = int(sys.argv[1])
sys.exit(node.main(sys.argv[2:]))
"""


class NodeProcess:
    """A node, from its start to `close`."""

    def __init__(
        self, memory_bytes: int, *flags: str, entry_bytes_min: int = 16 << 10, folder: str = "/dev/shm"
    ) -> None:
        command = [sys.executable, "-c", _LAUNCHER, str(entry_bytes_min), "--id", f"bench-{os.getpid()}"]
        command += ["--listen", "127.0.0.1:0", "--memory-bytes", str(memory_bytes), "--segment-dir", folder, *flags]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - until `close`
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._log)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError(f"the node did not start: {self._log.read().decode()[-2000:]}")
        self.facts: dict[str, Any] = json.loads(line)

    @property
    def address(self) -> str:
        return str(self.facts["address"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(20)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._log.close()


def block_namespace(block_bytes: int, section_count: int = SECTION_COUNT) -> NamespaceSpec:
    group = GroupSpec(0, GroupKind.FULL, tuple(range(section_count)), 16, 1, section_count, block_bytes)
    return NamespaceSpec(f"bench-{block_bytes}", "", "uint8", "", "", "xxh3_128/1", (group,))


def made_keys(rng: np.random.Generator, count: int) -> NDArray[np.uint8]:
    return rng.integers(0, 256, (count, 16), dtype=np.uint8)


def aligned_rows(count: int, size_bytes: int) -> NDArray[np.uint8]:
    """Zeros of whole pages, touched; uint8 (count, size_bytes)."""
    memory = np.zeros(count * size_bytes + 4096, dtype=np.uint8)
    start = -memory.ctypes.data % 4096
    rows = memory[start : start + count * size_bytes].reshape(count, size_bytes)
    rows[:] = 0
    return rows


def fill(rng: np.random.Generator, rows: NDArray[np.uint8]) -> None:
    """Content that differs from row to row and is quickly made."""
    pattern = rng.integers(0, 256, rows.shape[1] + 8 * len(rows), dtype=np.uint8)
    for index, row in enumerate(rows):
        row[:] = pattern[8 * index : 8 * index + rows.shape[1]]
