"""Workloads of published experiments that are not files here, modelled from what is known of them. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from random import Random

from scheduler.simulator.columns import Trace, TraceBuilder
from scheduler.simulator.workloads import Lognormal


@dataclass(frozen=True, slots=True)
class Mixture:
    """FAST'25's synthetic workload: turns of chats, and questions about long documents, in random order.

    Of it are known 3993 requests in 1022 s (3.9 a second, Poisson), 15 325 prompt and 149 generated tokens a request
    and about 66 % of the prompts in earlier ones (Table 2), 43 924 different blocks of 512 tokens (the published file,
    synthetic_trace.jsonl), and that it mixes ShareGPT, L-Eval and LooGLE. Lengths are drawn here, so that these means
    come out; the order of questions about one document is random, which disperses hits.

    Fields:
        documents: how many of them `requests` requests ask about; of fewer requests as many fewer.
        chat_share: of the requests that are turns of chats, ShareGPT's part.
        short_share: of the answers about documents that are a few words (L-Eval's).
    """

    requests: int = 3993
    per_s: float = 3.9
    documents: int = 890
    chat_share: float = 1 / 3
    chat_turns_mean: float = 3.0
    short_share: float = 0.5
    document_tokens: Lognormal = field(default=Lognormal(19_500, 0.55, 2_000, 66_000))
    question_tokens: Lognormal = field(default=Lognormal(60, 0.8, 5, 1_000))
    message_tokens: Lognormal = field(default=Lognormal(45, 1.2, 5, 3_000))
    chat_answer_tokens: Lognormal = field(default=Lognormal(220, 0.6, 2, 1_000))
    short_answer_tokens: Lognormal = field(default=Lognormal(8, 0.8, 2, 60))
    long_answer_tokens: Lognormal = field(default=Lognormal(170, 0.5, 10, 700))


def synthetic(requests: int, seed: int, block_tokens: int = 512, mixture: Mixture | None = None) -> Trace:
    """The first `requests` requests of a mixture."""
    assert requests > 0
    mixture = mixture or Mixture()
    rng, fresh = Random(seed), count()
    builder = TraceBuilder("generated", block_tokens)
    library = list(_library(requests, mixture, rng, fresh, block_tokens))
    chats: list[_Text] = []
    at_s = 0.0
    for _ in range(requests):
        if rng.random() < mixture.chat_share:
            text, answer = _turn(chats, mixture, rng)
        else:
            document = library[rng.randrange(len(library))]
            text = _Text(document.tokens + int(mixture.question_tokens.draw(rng)), list(document.ids))
            short = rng.random() < mixture.short_share
            answer = int((mixture.short_answer_tokens if short else mixture.long_answer_tokens).draw(rng))
        builder.add(round(at_s * 1e6), text.tokens, answer, text.prompt_ids(block_tokens, fresh))
        text.tokens += answer
        at_s -= math.log(1 - rng.random()) / mixture.per_s
    return builder.build()


@dataclass(slots=True)
class _Text:
    """So many tokens, and ids of full blocks of them."""

    tokens: int
    ids: list[int] = field(default_factory=list)

    def prompt_ids(self, block_tokens: int, fresh: Iterator[int]) -> list[int]:
        """Ids of all blocks: full ones keep theirs, a partial last one has another each time."""
        self.ids += [next(fresh) for _ in range(self.tokens // block_tokens - len(self.ids))]
        return [*self.ids, next(fresh)] if self.tokens % block_tokens else list(self.ids)


def _library(requests: int, mixture: Mixture, rng: Random, fresh: Iterator[int], block_tokens: int) -> Iterator[_Text]:
    """Documents with ids for their full blocks."""
    for _ in range(max(round(mixture.documents * requests / mixture.requests), 1)):
        tokens = int(mixture.document_tokens.draw(rng))
        yield _Text(tokens, [next(fresh) for _ in range(tokens // block_tokens)])


def _turn(chats: list[_Text], mixture: Mixture, rng: Random) -> tuple[_Text, int]:
    """The next turn of one of the chats, or the first of a new one."""
    if not chats or rng.random() < 1 / mixture.chat_turns_mean:
        chats.append(_Text(0))
        chat = chats[-1]
    else:
        chat = chats[rng.randrange(len(chats))]
    chat.tokens += int(mixture.message_tokens.draw(rng))
    return chat, int(mixture.chat_answer_tokens.draw(rng))
