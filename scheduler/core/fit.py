"""Linear models with non-negative coefficients, fitted online. Pure arithmetic: + - * / in a fixed order."""

from __future__ import annotations

from dataclasses import dataclass

#: Weight of the prior's shape against one sample.
RIDGE = 0.001
#: A sample further from the prediction than this factor counts as if it were at it; a lasting change still gets there.
CLIP = 4.0
CLIP_FROM_SAMPLES = 8
#: How far the weight of a sample may follow what has been learned, against the prior's shape.
WEIGHT_RANGE = 16.0


@dataclass(slots=True)
class LinearFit:
    """y = sum of c[i] * x[i], all c >= 0, by least squares of the relative error, old samples forgotten exponentially.

    This is recursive least squares in information form (the sums are kept, not the inverse), which makes the
    constraint exact and costs one small solve when a prediction is asked for after new samples. The prior gives the
    shape, the samples the scale: with samples of one kind only, the prior's coefficients are scaled to fit them.
    Errors are relative to what was expected, not to what was measured: a change for the worse counts fully.

    Fields:
        prior: coefficients before any sample, each > 0.
        forgetting: share of its weight that a sample keeps when the next one comes.
        gram, moment: weighted sums of z z^T and z * y / q, z[i] = prior[i] * x[i] / q, row by row, q the expectation
            in units of the prior.
        ratio, weight: weighted sums of y / p and of 1, p the prior's prediction.
    """

    prior: tuple[float, ...]
    forgetting: float
    gram: list[float]
    moment: list[float]
    ratio: float
    weight: float
    samples: int
    coefficients: tuple[float, ...]
    stale: bool

    @classmethod
    def start(cls, prior: tuple[float, ...], forgetting: float) -> LinearFit:
        assert all(c > 0 for c in prior) and 0 < forgetting < 1
        n = len(prior)
        return cls(prior, forgetting, [0.0] * (n * n), [0.0] * n, 0.0, 0.0, 0, prior, False)

    def observe(self, x: tuple[float, ...], y: float) -> None:
        """Takes one sample; those with y <= 0 or negative features say nothing and are left out."""
        if not y > 0 or any(not f >= 0 for f in x):
            return
        p = 0.0
        for c, f in zip(self.prior, x, strict=True):
            p += c * f
        if not p > 0:
            return
        q = p
        if self.samples:
            expected = self.predict(x)
            if self.samples >= CLIP_FROM_SAMPLES and expected > 0:
                y = min(max(y, expected / CLIP), expected * CLIP)
            q = min(max(expected * self.weight / self.ratio, p / WEIGHT_RANGE), p * WEIGHT_RANGE)
        n, keep = len(self.prior), self.forgetting
        z = [self.prior[i] * x[i] / q for i in range(n)]
        for i in range(n):
            self.moment[i] = keep * self.moment[i] + z[i] * (y / q)
            for j in range(n):
                self.gram[i * n + j] = keep * self.gram[i * n + j] + z[i] * z[j]
        self.ratio = keep * self.ratio + y / p
        self.weight = keep * self.weight + 1.0
        self.samples += 1
        self.stale = True

    def forget(self, keep: float) -> None:
        """Lets all samples so far count for a share of what they did."""
        self.gram = [keep * g for g in self.gram]
        self.moment = [keep * m for m in self.moment]
        self.ratio, self.weight = keep * self.ratio, keep * self.weight
        self.stale = self.samples > 0

    def predict(self, x: tuple[float, ...]) -> float:
        if self.stale:
            self._solve()
        total = 0.0
        for c, f in zip(self.coefficients, x, strict=True):
            total += c * f
        return total

    def current(self) -> tuple[float, ...]:
        """The coefficients as fitted from all samples so far."""
        if self.stale:
            self._solve()
        return self.coefficients

    def _solve(self) -> None:
        n = len(self.prior)
        scale = self.ratio / self.weight
        gram = [self.gram[k] + (RIDGE if k % (n + 1) == 0 else 0.0) for k in range(n * n)]
        moment = [m + RIDGE * scale for m in self.moment]
        best = solve_non_negative(gram, moment, n)
        if best is not None:
            self.coefficients = tuple(c * p for c, p in zip(best, self.prior, strict=True))
        self.stale = False


def solve_non_negative(gram: list[float], moment: list[float], n: int) -> list[float] | None:
    """Least squares with no coefficient below zero; None if nothing can be solved.

    Each choice of zero coefficients is tried, unless the best of all needs none.

    Args:
        gram, moment: z z^T row by row, and z * y, summed up; n by n and n numbers.
    """
    best: list[float] | None = None
    best_gain = 0.0
    for chosen in range((1 << n) - 1, 0, -1):
        free = [i for i in range(n) if chosen >> i & 1]
        solution = _solve_symmetric(gram, moment, free, n)
        if solution is None or any(c < 0 for c in solution):
            continue
        gain = 0.0  # at a restricted minimum the objective is constant - gain
        for c, m in zip(solution, moment, strict=True):
            gain += c * m
        if best is None or gain > best_gain:
            best, best_gain = solution, gain
        if len(free) == n:
            break  # convex: nothing with fewer coefficients is better
    return best


def _solve_symmetric(gram: list[float], moment: list[float], free: list[int], n: int) -> list[float] | None:
    """Solves for the coefficients in `free`, the others zero; None if the system is singular."""
    size = len(free)
    rows = [[gram[i * n + j] for j in free] + [moment[i]] for i in free]
    for k in range(size):
        pivot = rows[k][k]
        if not pivot > 0:  # positive definite by the ridge; lost only to rounding
            return None
        for r in range(k + 1, size):
            factor = rows[r][k] / pivot
            for c in range(k, size + 1):
                rows[r][c] -= factor * rows[k][c]
    values = [0.0] * size
    for k in range(size - 1, -1, -1):
        total = rows[k][size]
        for c in range(k + 1, size):
            total -= rows[k][c] * values[c]
        values[k] = total / rows[k][k]
    solution = [0.0] * n
    for k in range(size):
        solution[free[k]] = values[k]
    return solution
