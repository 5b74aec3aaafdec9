"""How long answers are: what is expected before one begins. Pure."""

from __future__ import annotations

from dataclasses import dataclass

#: Share of the old mean that survives one more answer, once there have been many.
KEPT_MAX = 0.98
#: What is assumed before any has ended counts for so many answers.
PRIOR_COUNT = 2
#: The median's step: half of it at first, this share in the end.
STEP_MIN = 0.05
SHARE_MIN = 0.001


@dataclass(slots=True)
class OutputLengths:
    """Answers of one model, as they have ended. Plain arithmetic: the same everywhere.

    Fields:
        mean_share: of max_tokens that are generated.
        typical_tokens: as many answers are shorter as are longer; None before the first has ended.
        count: answers seen.
    """

    mean_share: float
    typical_tokens: float | None = None
    count: int = 0

    def ended(self, tokens: int, max_tokens: int) -> None:
        """One answer is over."""
        share = min(max(tokens / max_tokens, SHARE_MIN), 1.0)
        kept = min((self.count + PRIOR_COUNT) / (self.count + PRIOR_COUNT + 1), KEPT_MAX)
        self.mean_share = kept * self.mean_share + (1 - kept) * share
        typical = self.typical(max_tokens)
        step = 1.0 + max(1.0 / (self.count + PRIOR_COUNT), STEP_MIN)
        self.typical_tokens = typical * step if tokens > typical else max(typical / step, 1.0)
        self.count += 1

    def expected(self, max_tokens: int) -> int:
        """The mean: what decoding takes on average."""
        return max(int(max_tokens * self.mean_share), 1)

    def typical(self, max_tokens: int) -> float:
        """The median: what half of all answers are not longer than.

        Before any is known all magnitudes from one token to `max_tokens` are as likely: the root is in the middle.
        """
        known: float = max_tokens**0.5 if self.typical_tokens is None else self.typical_tokens
        return min(known, float(max_tokens))
