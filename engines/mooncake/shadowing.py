"""Whether our `mooncake` stands before a real one, and words for saying so."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterable
from pathlib import Path

#: The folder that holds our package `mooncake`, to be put first on the import path.
SHIM = Path(__file__).parent / "shim"


def real_package(path: Iterable[str] | None = None) -> Path | None:
    """The folder of a real `mooncake` with a store on the import path, or None."""
    for entry in sys.path if path is None else path:
        folder = Path(entry or ".") / "mooncake"
        if folder.parent.resolve() != SHIM.resolve() and any(folder.glob("store*.so")):
            return folder
    return None


def distribution_of(folder: Path) -> str:
    """Name and version of what a package was installed by, as far as that is known."""
    for distribution in importlib.metadata.distributions(path=[str(folder.parent)]):
        name = distribution.metadata["Name"] or ""
        if name.startswith("mooncake-transfer-engine"):
            return f"{name} {distribution.version}"
    return "a Mooncake of unknown version"


def shadowed() -> str:
    """What our package stands before, as a sentence; empty if it stands before nothing."""
    folder = real_package()
    if folder is None:
        return ""
    return f"mooncake.store is kvpool's here: {distribution_of(folder)} in {folder} is shadowed by it"
