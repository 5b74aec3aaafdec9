"""Which device the tests of this folder run on.

CUDA, unless the environment's KVPOOL_TEST_DEVICE says `cpu`: then the same tests run on the CPU, which says nothing of
a GPU but that the tests themselves are right.
"""

from __future__ import annotations

import os

import torch

DEVICE = os.environ.get("KVPOOL_TEST_DEVICE", "cuda")


def missing(count: int = 1) -> str:
    """Why tests that need so many devices can't run here; empty if they can."""
    if DEVICE == "cpu":
        return ""
    if not torch.cuda.is_available():
        return "no CUDA device here (or a build of torch without CUDA)"
    found = torch.cuda.device_count()
    return "" if found >= count else f"{found} CUDA device here, {count} are needed"


if __name__ == "__main__":
    print(missing())
