"""The journal: every (event, time) that enters the core and what came of it, as JSON lines that replay alone.

A file begins with a checkpoint of the core, so that each file can be replayed without those before it. A line is
written before its event enters the core: whatever the core did, the cause is on record.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from kvpool import __version__
from scheduler.core import checkpoint
from scheduler.core.commands import Command
from scheduler.core.core import SchedulerCore
from scheduler.core.events import Event
from scheduler.service import codec

log = logging.getLogger(__name__)

FORMAT = 1
#: Files that the bound on all of them is divided into.
FILES = 4


class Journal:
    """Appends to `scheduler-NNNNNN.jsonl` in one folder; `scheduler.replay` reads them.

    At `bytes_max` / FILES a file is closed and the next begun with a checkpoint; the oldest files are deleted so that
    all together stay below `bytes_max`, of which the current file and the checkpoint it needs are never deleted.
    A disk that refuses to be written to ends the journal, not the scheduler: `error` says why.
    """

    def __init__(self, folder: Path, bytes_max: int) -> None:
        self._folder = folder
        self._bytes_max = bytes_max
        self._file: IO[bytes] | None = None
        self._checkpoint_bytes = 0
        self._bytes = 0
        self._bytes_old = 0
        self.path = ""
        self.error = ""

    def begin(self, core: SchedulerCore) -> None:
        """Starts the first file of this process."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._give_up(error)
            return
        self.next_file(core)

    @property
    def bytes_total(self) -> int:
        """Of all files."""
        return self._bytes_old + self._bytes

    def event(self, event: Event, now_us: int) -> None:
        self._write(f'{{"at":{now_us},"event":{codec.dumps(event)}}}\n')

    def commands(self, commands: Sequence[Command]) -> None:
        if commands:
            self._write(f'{{"commands":{codec.dumps(tuple(commands))}}}\n')

    def rotation_due(self) -> bool:
        """Whether this file has its share. A large checkpoint is followed by half a share of events at least."""
        return self._file is not None and self._bytes > self._share()

    def rotation_overdue(self) -> bool:
        """Whether this file can't wait any longer for a moment that suits a checkpoint."""
        return self._file is not None and self._bytes > 2 * self._share()

    def _share(self) -> int:
        share = self._bytes_max // FILES
        return max(share, self._checkpoint_bytes + share // 2)

    def flush(self) -> None:
        if self._file is not None:
            try:
                self._file.flush()
            except OSError as error:
                self._give_up(error)

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError as error:
                self.error = str(error)

    def _write(self, line: str) -> None:
        if self._file is None:
            return
        data = line.encode()
        try:
            self._file.write(data)
        except OSError as error:
            self._give_up(error)
            return
        self._bytes += len(data)

    def _give_up(self, error: OSError) -> None:
        log.error("the journal ends: %s", error)
        self.close()
        self.error = str(error)

    def next_file(self, core: SchedulerCore) -> SchedulerCore:
        """Closes the file and begins the next with a checkpoint; to be called between events only.

        Returns: the core as the checkpoint describes it. Whoever goes on with this one can't differ from a replay.
        """
        state = codec.to_json(checkpoint.state_of(core))
        restored = checkpoint.core_of(codec.from_json(state))
        restored.ledger = core.ledger
        self._begin_file(state)
        return restored

    def _begin_file(self, state: Any) -> None:
        self.close()
        old = files(self._folder)
        number = int(old[-1].stem.rpartition("-")[2]) + 1 if old else 1
        path = self._folder / f"scheduler-{number:06d}.jsonl"
        header = {
            "journal": FORMAT,
            "version": __version__,
            "wall_time_s": round(time.time(), 3),
            "checkpoint": state,
        }
        try:
            self._file = path.open("wb", buffering=1 << 16)
        except OSError as error:
            self._give_up(error)
            return
        self.path, self._bytes = str(path), 0
        self._write(json.dumps(header, separators=(",", ":"), allow_nan=False, ensure_ascii=False) + "\n")
        self.flush()
        self._checkpoint_bytes = self._bytes
        self._drop_oldest(old)

    def _drop_oldest(self, old: list[Path]) -> None:
        sizes = [(path, path.stat().st_size) for path in old]
        total = sum(size for _, size in sizes)
        keep_bytes = max(self._bytes_max - self._bytes_max // FILES - self._checkpoint_bytes, 0)
        for path, size in sizes:
            if total <= keep_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size
        self._bytes_old = total


def files(folder: Path) -> list[Path]:
    """Journal files of a folder, oldest first."""
    return sorted(folder.glob("scheduler-[0-9]*.jsonl"))
