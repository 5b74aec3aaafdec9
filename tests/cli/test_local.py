"""Segments that nobody will come back for are removed; those of the living are not."""

from __future__ import annotations

import fcntl
from pathlib import Path

from kvpool.cli.local import remove_orphans


def test_only_segments_without_an_owner_are_removed(tmp_path: Path) -> None:
    orphan, owned = tmp_path / "kvpool-node-local-1-a.segment", tmp_path / "kvpool-node-local-2-b.segment"
    others = [tmp_path / "kvpool-node-0-c.segment", tmp_path / "something.else"]
    for path in (orphan, owned, *others):
        path.write_bytes(b"x")
    with owned.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        remove_orphans(tmp_path)
        assert not orphan.exists()
        assert owned.exists() and all(path.exists() for path in others)
    remove_orphans(tmp_path / "missing")
