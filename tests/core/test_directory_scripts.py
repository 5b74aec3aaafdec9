"""Golden scripts for the directory: commands, dashes, the expected answers. KVPOOL_REWRITE=1 writes them anew.

Keys are numbers; `1-3,7` are four of them. Times are seconds and start at 0.
"""

import os
from pathlib import Path

import numpy as np
import pytest

from kvpool.core.changes import BlockChange, ChangeKind
from kvpool.core.directory import Directory, SourceRecord
from kvpool.core.errors import KvpoolError
from kvpool.core.ids import Fidelity, Tier

SCRIPTS = sorted((Path(__file__).parent / "testdata").glob("directory*.txt"))


def numbers(text):
    result = []
    for piece in filter(None, text.split(",")):
        first, _, last = piece.partition("-")
        result += range(int(first), int(last or first) + 1)
    return result


def packed(text):
    return b"".join(n.to_bytes(16, "big") for n in numbers(text))


def change(text):
    """`+1-3`, `-2`, `clear`; `~4` is stored with loss."""
    if text == "clear":
        return BlockChange(ChangeKind.CLEARED, b"")
    kind = ChangeKind.REMOVED if text[0] == "-" else ChangeKind.STORED
    return BlockChange(kind, packed(text[1:]), Fidelity.INT8 if text[0] == "~" else Fidelity.EXACT)


class Runner:
    def __init__(self):
        self.directory = Directory()
        self.now_us = 0

    def run(self, line):
        name, *words = line.split()
        try:
            return getattr(self, name)(*words)
        except KvpoolError as error:
            return f"{type(error).__name__}: {error}"
        finally:
            self.directory.check_invariants()

    def at(self, seconds):
        self.now_us = int(float(seconds) * 1e6)
        return "ok"

    def attach(self, source, epoch, tier):
        self.directory.attach(SourceRecord(source, int(epoch), Tier[tier]), self.now_us)
        return "ok"

    def detach(self, source):
        self.directory.detach(source)
        return "ok"

    def _answer(self, applied):
        return f"acknowledged {applied.acknowledged}" + (", wants a snapshot" if applied.want_snapshot else "")

    def batch(self, source, epoch, seq, *changes):
        events = [change(text) for text in changes]
        return self._answer(self.directory.apply(source, int(epoch), int(seq), events, self.now_us))

    def part(self, source, epoch, seq, part, keys, *rest):
        lossy = "lossy" in rest
        applied = self.directory.apply_snapshot_part(
            source, int(epoch), int(seq), int(part), "last" in rest, packed("" if keys == "none" else keys),
            Fidelity.INT8 if lossy else Fidelity.EXACT, self.now_us,
        )  # fmt: skip
        return self._answer(applied)

    def match(self, keys):
        match = self.directory.match(np.frombuffer(packed(keys), np.uint8).reshape(-1, 16))
        runs = [f"  {r.source} {r.tier.name} {r.first}+{r.count} {r.fidelity.name}" for r in match.runs]
        return "\n".join([f"covered {match.covered}", *runs])

    def held(self, source):
        keys, fidelities = self.directory.held(source)
        texts = [
            f"{'~' if f == 2 else ''}{int.from_bytes(bytes(k), 'big')}" for k, f in zip(keys, fidelities, strict=True)
        ]
        seq, in_step = self.directory.synced(source)
        return f"{' '.join(texts) or 'nothing'} (batch {seq}{'' if in_step else ', out of step'})"

    def counts(self):
        counts = self.directory.counts()
        return f"{counts.blocks} blocks, {counts.replicas} replicas, {len(self.directory.sources())} sources"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_script(path):
    runner, written = Runner(), []
    for step in path.read_text().strip().split("\n\n"):
        commands, _, _ = step.partition("\n----")
        lines = commands.splitlines()
        answers = [runner.run(line) for line in lines if not line.startswith("#")]
        written.append("\n".join([commands, "----", *answers]) if answers else commands)
    text = "\n\n".join(written) + "\n"
    if os.environ.get("KVPOOL_REWRITE"):
        path.write_text(text)
    assert text == path.read_text()


def test_there_are_scripts():
    assert len(SCRIPTS) >= 3
