"""What the grid says: means, paired differences with their intervals, and the cells that are lost. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scheduler.simulator.cells import OURS, Cell, names_in

#: Two-sided 95 % quantiles of Student's t by degrees of freedom; beyond the last, the normal one.
T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
#: What is promised: nowhere more below the best baseline, no decile of length more, this share of the bound.
BELOW_BEST_MAX, DECILE_EXCESS_MAX, BOUND_SHARE_MIN = 0.01, 0.05, 0.85
#: Where the best baseline serves this share in time there is nothing to gain: such a cell is not saturated.
SERVES_ALL = 0.98


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its 95 % interval; without one where there is a single value."""

    mean: float
    low: float
    high: float
    count: int


def interval(values: Sequence[float]) -> Interval:
    """By Student's t over independent values."""
    count = len(values)
    assert count
    mean = sum(values) / count
    if count == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    reach = (T_95[count - 2] if count - 2 < len(T_95) else 1.96) * math.sqrt(variance / count)
    return Interval(mean, mean - reach, mean + reach, count)


@dataclass(frozen=True, slots=True)
class Verdict:
    """One cell.

    Fields:
        best: the baseline with the highest mean goodput over the seeds; the difference is paired with it by seed.
        decile: of prompt length, counted from 1, in which ours is furthest behind.
        decile_excess: requests of it not served in time, ours less the best's, paired by seed.
        refused_excess: the same of requests refused, in the decile where that is most.
        bound: mean of the clairvoyant bound.
    """

    cell: Cell
    seeds: int
    goodput: dict[str, float]
    token_goodput: dict[str, float]
    best: str
    difference: Interval
    token_difference: Interval
    decile: int
    decile_excess: Interval
    refused_excess: Interval
    bound: float

    @property
    def bound_share(self) -> float:
        return self.goodput[OURS] / self.bound if self.bound else 1.0

    @property
    def best_bound_share(self) -> float:
        return self.goodput[self.best] / self.bound if self.bound else 1.0

    @property
    def saturated(self) -> bool:
        """Whether more comes than the best baseline serves."""
        return self.cell.saturated and self.goodput[self.best] < SERVES_ALL

    @property
    def problems(self) -> list[str]:
        """Which promises this cell breaks."""
        out = []
        if self.difference.mean < -BELOW_BEST_MAX:
            out.append(f"{-100 * self.difference.mean:.1f} points below {self.best}")
        if self.saturated and not self.difference.low > 0:
            out.append("saturated, and the interval is not above zero")
        if self.decile_excess.mean > DECILE_EXCESS_MAX:
            out.append(f"decile {self.decile} of lengths is {100 * self.decile_excess.mean:.1f} points worse")
        if self.bound_share < BOUND_SHARE_MIN:
            out.append(f"{100 * self.bound_share:.0f} % of the bound")
        return out


Row = Mapping[str, Any]


def verdicts(rows: Iterable[Row]) -> list[Verdict]:
    """Of each cell with ours and a baseline; only seeds for which all policies are there that the rows have."""
    cells: dict[Cell, dict[int, dict[str, Row]]] = {}
    policies: dict[str, None] = {}
    for row in rows:
        policies[row["policy"]] = None
        cell = Cell(row["workload"], row["cluster"], row["load"])
        cells.setdefault(cell, {}).setdefault(row["seed"], {})[row["policy"]] = row
    out = []
    for cell, by_seed in cells.items():
        whole = [found for _, found in sorted(by_seed.items()) if len(found) == len(policies)]
        if whole and OURS in policies and len(policies) > 1:
            out.append(_verdict(cell, sorted(policies), whole))
    return sorted(out, key=lambda v: (v.cell.workload, v.cell.cluster, v.cell.load))


def _verdict(cell: Cell, policies: Sequence[str], seeds: Sequence[Mapping[str, Row]]) -> Verdict:
    def mean(policy: str, figure: str) -> float:
        return float(sum(found[policy][figure] for found in seeds) / len(seeds))

    goodput = {policy: mean(policy, "goodput") for policy in policies}
    best = names_in(goodput)[0]
    decile, excess = _worst_decile(seeds, "good_by_length", best, OURS)
    _, refused_excess = _worst_decile(seeds, "refused_by_length", OURS, best)
    return Verdict(
        cell=cell,
        seeds=len(seeds),
        goodput=goodput,
        token_goodput={policy: mean(policy, "token_goodput") for policy in policies},
        best=best,
        difference=interval([found[OURS]["goodput"] - found[best]["goodput"] for found in seeds]),
        token_difference=interval([found[OURS]["token_goodput"] - found[best]["token_goodput"] for found in seeds]),
        decile=decile + 1,
        decile_excess=excess,
        refused_excess=refused_excess,
        bound=mean(OURS, "bound"),
    )


def _worst_decile(seeds: Sequence[Mapping[str, Row]], figure: str, more: str, less: str) -> tuple[int, Interval]:
    """The decile, counted from 0, in which one policy's figure is furthest above another's on average; by how much."""
    intervals = [
        interval([found[more][figure][decile] - found[less][figure][decile] for found in seeds])
        for decile in range(len(seeds[0][more][figure]))
    ]
    worst = max(range(len(intervals)), key=lambda decile: intervals[decile].mean)
    return worst, intervals[worst]


def table(found: Sequence[Verdict]) -> list[list[str]]:
    """Rows of the report: what each cell says, for people. Differences are ours less the best baseline's, in points."""
    return [
        [
            v.cell.workload,
            v.cell.cluster,
            f"{v.cell.load:g}",
            f"{100 * v.goodput[OURS]:.1f}",
            f"{v.best} {100 * v.goodput[v.best]:.1f}",
            _points(v.difference),
            f"{100 * v.token_difference.mean:+.1f}",
            f"{v.decile}: {_points(v.decile_excess)}",
            f"{100 * v.refused_excess.mean:+.1f}",
            f"{100 * v.bound:.1f}",
            f"{100 * v.bound_share:.0f} / {100 * v.best_bound_share:.0f}",
            "; ".join(v.problems) or "-",
        ]
        for v in found
    ]


def _points(found: Interval) -> str:
    low, high = (f"{100 * x:+.1f}" if math.isfinite(x) else "?" for x in (found.low, found.high))
    return f"{100 * found.mean:+.1f} ({low} to {high})"


COLUMNS = (
    "workload", "cluster", "load", "ours %", "best baseline %", "difference (95 %)", "tokens",
    "worst decile: not in time (95 %)", "worst decile, refused", "bound %", "share of bound %, ours / best",
    "broken promises",
)  # fmt: skip


def summary(found: Sequence[Verdict]) -> dict[str, Any]:
    """Counts over the grid: how many cells keep each promise."""
    saturated = [v for v in found if v.saturated]
    return {
        "cells": len(found),
        "seeds_min": min((v.seeds for v in found), default=0),
        "within_one_point": sum(v.difference.mean >= -BELOW_BEST_MAX for v in found),
        "ahead": sum(v.difference.mean > 0 for v in found),
        "saturated": len(saturated),
        "saturated_interval_above_zero": sum(v.difference.low > 0 for v in saturated),
        "deciles_kept": sum(v.decile_excess.mean <= DECILE_EXCESS_MAX for v in found),
        "bound_share_kept": sum(v.bound_share >= BOUND_SHARE_MIN for v in found),
        "worst_difference": min((v.difference.mean for v in found), default=0.0),
        "mean_difference": sum(v.difference.mean for v in found) / max(len(found), 1),
    }
