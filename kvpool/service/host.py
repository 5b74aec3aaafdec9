"""Which host this is: processes with one host id can share memory."""

from __future__ import annotations

import socket
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def host_id() -> str:
    """The kernel's boot id with the device of /dev/shm: containers that do not share memory differ."""
    try:
        boot = _BOOT_ID.read_text().strip()
    except OSError:
        return socket.gethostname()
    try:
        return f"{boot}/{Path('/dev/shm').stat().st_dev}"
    except OSError:
        return boot
