"""The demo's conversations: several users who share a system prompt and each read another source file, turn by turn.

The text is the standard library of the Python that runs the demo, so every machine has it.
"""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SYSTEM_FILE = "heapq.py"
FILES = (
    "textwrap.py", "fnmatch.py", "bisect.py", "shlex.py", "string.py", "queue.py", "stat.py", "token.py", "sched.py",
    "glob.py", "colorsys.py", "netrc.py", "contextvars.py", "graphlib.py", "hmac.py", "linecache.py", "copy.py",
)  # fmt: skip
QUESTIONS = (
    "What does this code do?",
    "Which errors can it raise, and when?",
    "How would you test the part below?",
    "Explain how the following belongs to what you saw before.",
    "Now write a short docstring for this part.",
    "What would you change here?",
)


@dataclass(frozen=True)
class Conversation:
    """One user: what is said in each turn, and how long the user thinks before it."""

    name: str
    system: str
    turns: tuple[str, ...]
    think_s: tuple[float, ...]


@dataclass(frozen=True)
class WorkloadShape:
    """Sizes in tokens of the model at hand."""

    conversations: int = 9
    turns: int = 4
    system_tokens: int = 600
    first_turn_tokens: int = 1500
    later_turn_tokens: int = 200
    answer_tokens: int = 40
    think_s_max: float = 1.0
    seed: int = 7


def build(shape: WorkloadShape, count_tokens: Callable[[str], int]) -> list[Conversation]:
    """Conversations of the given sizes; the same for the same shape, tokenizer and Python."""
    library = Path(sysconfig.get_paths()["stdlib"])
    rng = random.Random(shape.seed)
    system = "You explain the Python standard library.\n" + _cut(
        (library / SYSTEM_FILE).read_text(encoding="utf-8"), 0, shape.system_tokens, count_tokens
    )
    conversations = []
    for index in range(shape.conversations):
        # Two files in a row: long enough for every turn.
        texts = [(library / FILES[(2 * index + i) % len(FILES)]).read_text(encoding="utf-8") for i in range(4)]
        text, at, turns = "\n".join(texts), 0, []
        for turn in range(shape.turns):
            size = (
                shape.first_turn_tokens
                if turn == 0
                else rng.randint(shape.later_turn_tokens // 2, shape.later_turn_tokens)
            )
            piece = _cut(text, at, size, count_tokens)
            at += len(piece)
            turns.append(f"{QUESTIONS[turn % len(QUESTIONS)]}\n\n{piece}")
        think = tuple(rng.uniform(0, shape.think_s_max) for _ in range(shape.turns))
        conversations.append(Conversation(f"user-{index}", system, tuple(turns), think))
    return conversations


def _cut(text: str, start: int, tokens: int, count_tokens: Callable[[str], int]) -> str:
    """The longest run of whole lines from `start` that is at most `tokens` long (at least one line)."""
    lines = text[start:].splitlines(keepends=True)
    low, high = 1, len(lines)
    while low < high:
        middle = (low + high + 1) // 2
        if count_tokens("".join(lines[:middle])) <= tokens:
            low = middle
        else:
            high = middle - 1
    return "".join(lines[:low])
