"""A linear model of a few samples that wrong ones among them hardly move. Pure arithmetic: + - * / in a fixed order."""

from __future__ import annotations

from dataclasses import dataclass, field

from scheduler.core.fit import solve_non_negative

#: Samples kept, the last ones.
KEPT = 48
#: Share of its weight that a sample keeps when the next one comes.
KEEPS = 0.97
#: A sample's weight is 1 / (1 + (error / (this * usual error))^2), Cauchy's: 95 % as efficient as least squares where
#: errors are normal, and the further off a sample is the less it moves the fit.
#: Source: Holland, Welsch, Robust regression using iteratively reweighted least-squares, 1977.
CAUCHY = 2.385
#: Of a normal distribution: standard deviation over the median of absolute errors.
DEVIATION_OF_MEDIAN = 1.4826
#: The usual error is taken to be this large at least, relative to the prediction.
ERROR_MIN = 0.05
#: So many rounds of weights for each new sample while there are few; later one is enough, as little changes.
ROUNDS_FIRST, FEW = 4, 8
#: Once all places are taken, so many new samples are taken in at a time: it is the costly part.
TAKEN_IN = 4


@dataclass(slots=True)
class RobustFit:
    """y = sum of c[i] * x[i], all c >= 0, by an M-estimator of relative errors over the last samples.

    Weighted least squares, again and again: each sample is weighed by how far it is from the fit of the round before,
    against the median distance. So one that is far off hardly counts, whatever it says; and when more than half of
    them say otherwise, the median grows, and the fit follows.

    Fields:
        centre: what the coefficients are drawn to, each > 0.
        pull: by how strongly, in samples of which that term is all of y.
        samples: (x, y), the oldest first, all y > 0.
    """

    centre: tuple[float, ...]
    pull: tuple[float, ...]
    coefficients: tuple[float, ...]
    samples: list[tuple[tuple[float, ...], float]] = field(default_factory=list)
    waiting: int = 0  # samples not yet taken in

    @classmethod
    def start(cls, centre: tuple[float, ...], pull: tuple[float, ...]) -> RobustFit:
        assert all(c > 0 for c in centre) and all(p > 0 for p in pull) and len(centre) == len(pull)
        return cls(centre, pull, centre)

    def observe(self, x: tuple[float, ...], y: float) -> None:
        """Takes one sample; those with y <= 0, or with features that are negative or all zero, are left out."""
        if not y > 0 or any(not f >= 0 for f in x) or not any(x):
            return
        self.samples.append((x, y))
        if len(self.samples) > KEPT:
            del self.samples[0]
        self.waiting += 1
        # Here, not when somebody asks: what comes out must not depend on who asked when.
        if self.waiting >= (TAKEN_IN if len(self.samples) == KEPT else 1):
            self.waiting = 0
            for _ in range(ROUNDS_FIRST if len(self.samples) <= FEW else 1):
                self._weigh_and_solve()

    def drawn_to(self, centre: tuple[float, ...]) -> None:
        """Changes what the coefficients are drawn to. Coefficients of zero draw to a thousandth of what was."""
        self.centre = tuple(max(c, before / 1000) for c, before in zip(centre, self.centre, strict=True))

    def _weigh_and_solve(self) -> None:
        expected = self._expected()
        # By what factor too long or too short: ten times too short is as far off as ten times too long.
        errors = [(y / p if y > p else p / y) - 1.0 for (_, y), p in zip(self.samples, expected, strict=True)]
        usual = max(DEVIATION_OF_MEDIAN * _median(errors), ERROR_MIN)
        n, centre = len(self.centre), self.centre
        gram, moment, age = [0.0] * (n * n), [0.0] * n, 1.0
        for number in range(len(self.samples) - 1, -1, -1):
            (x, y), p, off = self.samples[number], expected[number], errors[number] / (CAUCHY * usual)
            weight = age / (1.0 + off * off)
            age *= KEEPS
            z = [c * f / p for c, f in zip(centre, x, strict=True)]
            target = weight * (y / p)
            for i in range(n):
                zi = z[i]
                moment[i] += zi * target
                zi *= weight
                for j in range(i, n):
                    gram[i * n + j] += zi * z[j]
        for i in range(n):
            for j in range(i):
                gram[i * n + j] = gram[j * n + i]
            gram[i * n + i] += self.pull[i]
            moment[i] += self.pull[i]
        found = solve_non_negative(gram, moment, n)
        if found is not None:
            self.coefficients = tuple(s * c for s, c in zip(found, centre, strict=True))

    def _expected(self) -> list[float]:
        """Of each sample, as fitted; a thousandth of it at least, since errors are relative to this."""
        expected = []
        for x, y in self.samples:
            p = 0.0
            for c, f in zip(self.coefficients, x, strict=True):
                p += c * f
            expected.append(max(p, y / 1000))
        return expected


def _median(values: list[float]) -> float:
    """The upper one of an even number."""
    return sorted(values)[len(values) // 2]
