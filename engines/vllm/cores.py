"""Which processor cores the connector's own threads may use: those that vLLM has not given to its kernels.

vLLM binds OpenMP to cores by environment variables and leaves one a worker for its KV connector. Threads inherit the
cores of whoever starts them, so without this they would take time from a kernel that waits for its slowest thread.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping

#: The variables in which vLLM names the cores of its kernels, by OpenMP library.
_BOUND = ("OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
_CORE = re.compile(r"(?<![=\w])\d+")


def spare_cores(environment: Mapping[str, str], core_count: int) -> set[int]:
    """Cores that no kernel is bound to, or all if none is left; empty if nothing is bound.

    With none left all are better than what is inherited: the one core of the thread that leads the kernels, where
    several engines of a host may well spin at the same time.
    """
    bound: set[int] = set()
    for name in _BOUND:
        text = environment.get(name, "")
        if name == "KMP_AFFINITY":
            text = text.partition("proclist=")[2].partition("]")[0]
        bound.update(int(core) for core in _CORE.findall(text))
    everything = set(range(core_count))
    return (everything - bound or everything) if bound else set()


def leave_kernel_cores() -> None:
    """Moves the calling thread, and those that it starts from now on, off the cores of kernels if there are others."""
    cores = spare_cores(os.environ, os.cpu_count() or 1)
    if cores:
        with contextlib.suppress(OSError):  # not ours to use, in a container
            os.sched_setaffinity(0, cores)
