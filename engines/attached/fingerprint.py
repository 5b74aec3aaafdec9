"""Which weights a model folder holds, told without reading all of them."""

from __future__ import annotations

import hashlib
from pathlib import Path

#: What makes a model compute what it computes.
PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.gguf", "*.py", "config.json", "adapter_config.json")
#: Bytes read at the beginning, the middle and the end of each file.
SAMPLE_BYTES = 1 << 16


def folder_digest(folder: Path) -> str:
    """sha256 in hex over names, sizes and three samples of each weight file and the configurations of a folder.

    Two folders with the same files have the same digest on any host. A change within a large file that keeps its
    size and misses all samples is not seen: name such variants by the setting `model_id`.
    Args: folder: or a single file.
    Returns: empty if there is no such folder or nothing of a model in it.
    """
    if folder.is_file():
        paths = [folder]
    else:
        paths = sorted({path for pattern in PATTERNS for path in folder.glob(pattern)}, key=lambda path: path.name)
    if not paths:
        return ""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            for at in (0, max(size // 2 - SAMPLE_BYTES // 2, 0), max(size - SAMPLE_BYTES, 0)):
                file.seek(at)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
