"""Settings that each policy may be tuned in, and random draws of them: the same number of tries for everybody. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

Draw = Callable[[Random], Any]


def _between(low: float, high: float) -> Draw:
    return lambda random: round(random.uniform(low, high), 4)


def _log_between(low: float, high: float) -> Draw:
    return lambda random: round(math.exp(random.uniform(math.log(low), math.log(high))), 4)


def _whole_log_between(low: float, high: float) -> Draw:
    return lambda random: round(math.exp(random.uniform(math.log(low), math.log(high))))


def _one_of(*values: Any) -> Draw:
    return lambda random: random.choice(values)


#: Of our costs: what the three policies made of them share.
_COSTS: dict[str, Draw] = {
    "harm_weight": _log_between(0.05, 2.0),
    "broken_us": _whole_log_between(2e6, 3e8),
    "stall_margin": _between(0.3, 1.5),
    "delay_weight": _log_between(0.2, 4.0),
}
#: Policy -> setting -> how it is drawn. Those that are not here have nothing to tune.
SPACES: dict[str, dict[str, Draw]] = {
    "kvpool": {**_COSTS, "horizon_slo_share": _between(0.1, 0.9)},
    "always_split": _COSTS,
    "always_colocate": _COSTS,
    "mooncake_algorithm1": {
        "mooncake_threshold": _log_between(1.0, 8.0),
        "mooncake_predicts_load": _one_of(True, False),
    },
    "dynamo": {
        "dynamo_prefill_scale": _log_between(0.25, 8.0),
        "dynamo_request_weight": _between(0.0, 64.0),
        "dynamo_host_credit": _between(0.25, 1.0),
        "dynamo_split_tokens_min": _one_of(0, 512, 2048, 8192),
        "dynamo_split_share_min": _between(0.0, 0.9),
    },
    "sglang_cache_aware": {
        "sglang_balance_abs": _one_of(1, 2, 4, 8, 16, 32, 64),
        "sglang_balance_rel": _between(1.05, 3.0),
        "sglang_match_min": _between(0.05, 0.7),
    },
    "llmd": {
        "llmd_prefix_weight": _log_between(0.5, 8.0),
        "llmd_kv_weight": _log_between(0.5, 8.0),
        "llmd_queue_weight": _log_between(0.5, 8.0),
        "llmd_split_tokens_min": _one_of(0, 512, 2048, 8192),
    },
}


def draw(policy: str, workload: str, number: int) -> dict[str, Any]:
    """The settings of one try; the first are the defaults. The same names give the same settings."""
    space = SPACES.get(policy, {})
    if number == 0 or not space:
        return {}
    random = Random(f"{policy}/{workload}/{number}")
    return {name: space[name](random) for name in sorted(space)}


def chosen(tried: Mapping[int, Sequence[float]]) -> int:
    """The try to keep: the best on average, if it beats the defaults by more than luck; else the defaults.

    Luck is one standard error of the difference, paired by window. Of equal ones the earliest is best.

    Args:
        tried: of each try its goodputs, on the same windows in the same order; with those of the defaults, try 0.
    """
    means = {number: sum(goodputs) / len(goodputs) for number, goodputs in tried.items()}
    best = max(means, key=lambda number: (means[number], -number))
    gains = [ours - default for ours, default in zip(tried[best], tried[0], strict=True)]
    mean = sum(gains) / len(gains)
    squares = sum((gain - mean) ** 2 for gain in gains)
    error = math.sqrt(squares / (len(gains) - 1) / len(gains)) if len(gains) > 1 else 0.0
    return best if mean > error else 0
