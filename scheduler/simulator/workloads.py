"""Made-up traces: conversations, agents and questions about long documents, from documented distributions.

Pure and deterministic: the same kind, parameters and seed give the same trace. Every number is drawn from one
generator seeded with the seed, by inversion of uniform draws.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

from kvpool.core.errors import BadArgument
from scheduler.simulator.columns import Trace, TraceBuilder

#: (content, tokens): a run of text that is equal wherever the same content stands; part of a prompt.
Segment: TypeAlias = tuple[int, int]
#: How long an answer takes as seen by whoever waits for it: what follows cannot come earlier.
FIRST_TOKEN_S, TOKEN_S = 1.0, 0.03


@dataclass(frozen=True, slots=True)
class Lognormal:
    """Half of all draws are below `median`, the logarithm has the standard deviation `sigma`; cut to low..high."""

    median: float
    sigma: float
    low: float
    high: float

    def draw(self, rng: random.Random) -> float:
        # Box and Muller: uniform draws alone are promised to stay the same in later versions of Python.
        normal = math.sqrt(-2 * math.log(1 - rng.random())) * math.cos(2 * math.pi * rng.random())
        return min(max(self.median * math.exp(self.sigma * normal), self.low), self.high)


@dataclass(frozen=True, slots=True)
class MultiTurn:
    """Conversations. Each begins with a system prompt, and each turn's prompt is all that was said before.

    Fields:
        turns_mean: of a geometric distribution.
        system_prompts, system_zipf: how many there are; popularity of the k-th is 1 / k ** zipf.
        *_tokens_median: of lognormal distributions, sigma 1.0 for messages and 0.8 for answers.
        think_s_median: from the end of an answer to the next message; lognormal, sigma 1.0.
        context_tokens_max: a conversation that would become longer ends.
    """

    turns_mean: float = 4.0
    system_prompts: int = 16
    system_zipf: float = 1.0
    system_tokens_median: float = 1000.0
    message_tokens_median: float = 120.0
    answer_tokens_median: float = 250.0
    think_s_median: float = 15.0
    context_tokens_max: int = 32_768


@dataclass(frozen=True, slots=True)
class Agentic:
    """Tasks of agents: many short answers, each followed soon by a tool's output, on a context that only grows.

    Fields:
        steps_mean: of a task; geometric.
        agents, agents_zipf: kinds of agents, each with instructions and tools of its own; popularity as 1 / k ** zipf.
        instructions_tokens_median: sigma 0.3.
        tool_tokens_median, answer_tokens_median: sigma 1.2 and 0.8.
        tool_s_median: how long a tool takes; lognormal, sigma 1.0.
        fork_probability: with it a step starts `forks_min` to `forks_max` (uniform) sub-agents at once that share the
            whole context, each for `fork_steps_mean` steps. Sub-agents don't fork.
        context_tokens_max: a task that would become longer ends.
    """

    steps_mean: float = 12.0
    agents: int = 8
    agents_zipf: float = 1.0
    instructions_tokens_median: float = 8000.0
    tool_tokens_median: float = 600.0
    answer_tokens_median: float = 120.0
    tool_s_median: float = 2.0
    fork_probability: float = 0.05
    forks_min: int = 2
    forks_max: int = 8
    fork_steps_mean: float = 3.0
    context_tokens_max: int = 131_072


@dataclass(frozen=True, slots=True)
class LongDocument:
    """Questions about documents of a library. Answers are not part of what follows; the document is.

    Fields:
        documents, documents_zipf: size of the library; popularity of the k-th is 1 / k ** zipf.
        document_tokens_median, document_tokens_max: lognormal, sigma 0.6.
        questions_mean: of one reader about one document; geometric.
        question_tokens_median, answer_tokens_median: sigma 0.8.
        think_s_median: between questions; lognormal, sigma 1.0.
    """

    documents: int = 200
    documents_zipf: float = 0.9
    document_tokens_median: float = 32_000.0
    document_tokens_max: int = 131_072
    questions_mean: float = 3.0
    question_tokens_median: float = 60.0
    answer_tokens_median: float = 350.0
    think_s_median: float = 20.0


@dataclass(frozen=True, slots=True)
class _Step:
    """A request of a session as its kind makes it: when it may come, what it asks, and what it is answered."""

    at_s: float
    prompt: tuple[Segment, ...]
    output_tokens: int


class _Draws:
    """Draws of one trace. Contents are numbered, so that each new text is a text of its own."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self._contents = 0

    def text(self, median: float, sigma: float, high: float = 1 << 20) -> Segment:
        self._contents += 1
        return self._contents, int(Lognormal(median, sigma, 1, high).draw(self.rng))

    def seconds(self, median: float) -> float:
        return Lognormal(median, 1.0, 0.0, 3600.0).draw(self.rng)

    def geometric(self, mean: float) -> int:
        """1, 2, ... with this mean."""
        if mean <= 1:
            return 1
        return 1 + int(math.log(1 - self.rng.random()) / math.log(1 - 1 / mean))

    def zipf(self, weights: Sequence[float]) -> int:
        """A place in cumulated weights."""
        at = self.rng.random() * weights[-1]
        return next(i for i, weight in enumerate(weights) if at < weight or i + 1 == len(weights))


def _cumulated(count: int, zipf: float) -> list[float]:
    total, weights = 0.0, []
    for rank in range(1, count + 1):
        total += rank**-zipf
        weights.append(total)
    return weights


def _tokens(prompt: Sequence[Segment]) -> int:
    return sum(tokens for _, tokens in prompt)


def _answered_s(at_s: float, output_tokens: int) -> float:
    return at_s + FIRST_TOKEN_S + TOKEN_S * output_tokens


# ---------------------------------------------------------------- kinds

#: begin_s -> requests of the sessions that begin there, each session with times that grow.
_Sessions: TypeAlias = Callable[[float], list[list[_Step]]]


def _multi_turn(p: MultiTurn, draws: _Draws) -> _Sessions:
    systems = [draws.text(p.system_tokens_median, 0.5) for _ in range(p.system_prompts)]
    popularity = _cumulated(p.system_prompts, p.system_zipf)

    def begin(at_s: float) -> list[list[_Step]]:
        context: tuple[Segment, ...] = (systems[draws.zipf(popularity)],)
        steps: list[_Step] = []
        for _ in range(draws.geometric(p.turns_mean)):
            context += (draws.text(p.message_tokens_median, 1.0),)
            answer = draws.text(p.answer_tokens_median, 0.8)
            if steps and _tokens(context) + answer[1] > p.context_tokens_max:
                break
            steps.append(_Step(at_s, context, answer[1]))
            context += (answer,)
            at_s = _answered_s(at_s, answer[1]) + draws.seconds(p.think_s_median)
        return [steps]

    return begin


def _agentic(p: Agentic, draws: _Draws) -> _Sessions:
    instructions = [draws.text(p.instructions_tokens_median, 0.3) for _ in range(p.agents)]
    popularity = _cumulated(p.agents, p.agents_zipf)

    def run(at_s: float, context: tuple[Segment, ...], steps_mean: float, forks: bool) -> list[list[_Step]]:
        sessions: list[list[_Step]] = [[]]
        for _ in range(draws.geometric(steps_mean)):
            answer = draws.text(p.answer_tokens_median, 0.8)
            if sessions[0] and _tokens(context) + answer[1] > p.context_tokens_max:
                break
            sessions[0].append(_Step(at_s, context, answer[1]))
            context += (answer,)
            at_s = _answered_s(at_s, answer[1])
            if forks and draws.rng.random() < p.fork_probability:
                for _ in range(p.forks_min + int(draws.rng.random() * (p.forks_max - p.forks_min + 1))):
                    task = draws.text(p.tool_tokens_median, 1.2)
                    sessions += run(at_s, (*context, task), p.fork_steps_mean, False)
            context += (draws.text(p.tool_tokens_median, 1.2),)
            at_s += draws.seconds(p.tool_s_median)
        return sessions

    def begin(at_s: float) -> list[list[_Step]]:
        goal = draws.text(p.tool_tokens_median, 1.2)
        return run(at_s, (instructions[draws.zipf(popularity)], goal), p.steps_mean, True)

    return begin


def _long_document(p: LongDocument, draws: _Draws) -> _Sessions:
    library = [draws.text(p.document_tokens_median, 0.6, p.document_tokens_max) for _ in range(p.documents)]
    popularity = _cumulated(p.documents, p.documents_zipf)

    def begin(at_s: float) -> list[list[_Step]]:
        document = library[draws.zipf(popularity)]
        steps = []
        for _ in range(draws.geometric(p.questions_mean)):
            question, answer = draws.text(p.question_tokens_median, 0.8), draws.text(p.answer_tokens_median, 0.8)
            steps.append(_Step(at_s, (document, question), answer[1]))
            at_s = _answered_s(at_s, answer[1]) + draws.seconds(p.think_s_median)
        return [steps]

    return begin


KINDS: dict[str, tuple[type[Any], Callable[[Any, _Draws], _Sessions]]] = {
    "multi-turn": (MultiTurn, _multi_turn),
    "agentic": (Agentic, _agentic),
    "long-document": (LongDocument, _long_document),
}


def parameters_of(kind: str, over: dict[str, str]) -> Any:
    """The parameters of a kind, some of them set by name.

    Raises: BadArgument for an unknown kind or parameter, or a value that is out of range.
    """
    if kind not in KINDS:
        raise BadArgument(f"no kind of trace {kind!r}", hint=f"there are {', '.join(KINDS)}")
    cls: Any = KINDS[kind][0]
    defaults: dict[str, Any] = {f.name: f.default for f in fields(cls)}
    values: dict[str, float | int] = {}
    for name, text in over.items():
        if name not in defaults:
            raise BadArgument(f"{kind} has no parameter {name!r}", hint=f"it has {', '.join(defaults)}")
        try:
            values[name] = type(defaults[name])(text)
        except ValueError:
            raise BadArgument(f"{name}={text}: not a number", hint=f"the default is {defaults[name]}") from None
        high = 1 if name.endswith("_probability") else 1 << 26
        if not 0 <= values[name] <= high or (name.endswith(_POSITIVE) and values[name] <= 0):
            raise BadArgument(f"{name}={text} is out of range", hint=f"the default is {defaults[name]}")
    made = cls(**values)
    if isinstance(made, Agentic) and made.forks_max < made.forks_min:
        raise BadArgument(f"forks_max {made.forks_max} is less than forks_min {made.forks_min}")
    return made


_POSITIVE = ("_median", "_mean", "_max", "_prompts", "agents", "documents")


def generate(
    kind: str, requests: int, sessions_per_s: float, seed: int, block_tokens: int = 512, parameters: Any = None
) -> Trace:
    """Makes a trace of the first `requests` requests of sessions that begin as a Poisson process.

    Raises: BadArgument for an unknown kind.
    """
    assert requests > 0 and sessions_per_s > 0 and block_tokens > 0
    parameters = parameters or parameters_of(kind, {})
    draws = _Draws(seed)
    begin = KINDS[kind][1](parameters, draws)
    builder = TraceBuilder("generated", block_tokens)
    chain = _Chain(block_tokens)
    for step, session in _in_order(begin, draws, sessions_per_s, requests):
        ids = chain.ids(step.prompt)
        builder.add(round(step.at_s * 1e6), _tokens(step.prompt), step.output_tokens, ids, session=f"s{session}")
    return builder.build()


def _in_order(begin: _Sessions, draws: _Draws, sessions_per_s: float, requests: int) -> Iterator[tuple[_Step, int]]:
    """The first requests of all sessions, by time; a session's are made when it begins."""
    pending: list[tuple[float, int, int, list[_Step]]] = []
    begin_s, sessions, taken = 0.0, 0, 0
    while taken < requests:
        while not pending or pending[0][0] >= begin_s:
            for steps in begin(begin_s):
                heapq.heappush(pending, (steps[0].at_s, sessions, 0, steps))
                sessions += 1
            begin_s -= math.log(1 - draws.rng.random()) / sessions_per_s
        _, session, place, steps = heapq.heappop(pending)
        yield steps[place], session
        taken += 1
        if place + 1 < len(steps):
            heapq.heappush(pending, (steps[place + 1].at_s, session, place + 1, steps))


class _Chain:
    """Ids of blocks by content: equal exactly where everything up to the end of the block is equal."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        #: (id of the block before, what the block is made of) -> id.
        self._ids: dict[tuple[int, tuple[tuple[int, int, int], ...]], int] = {}

    def ids(self, prompt: Sequence[Segment]) -> list[int]:
        """Ids of a prompt's blocks; the last may be partial."""
        ids: list[int] = []
        pieces: list[tuple[int, int, int]] = []  # (content, first token, tokens)
        room = self._block_tokens
        for content, tokens in prompt:
            first = 0
            while first < tokens:
                count = min(room, tokens - first)
                pieces.append((content, first, count))
                first += count
                room -= count
                if not room:
                    self._close(ids, pieces)
                    room = self._block_tokens
        if pieces:
            self._close(ids, pieces)
        return ids

    def _close(self, ids: list[int], pieces: list[tuple[int, int, int]]) -> None:
        key = (ids[-1] if ids else -1, tuple(pieces))
        ids.append(self._ids.setdefault(key, len(self._ids)))
        pieces.clear()
