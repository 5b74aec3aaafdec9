"""A load that shifts from prompts to answers and back, with roles that stay and roles that are changed. Simulated.

python tools/bench/roles.py [--scale 1] [--seeds 1] [--json]
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scheduler.simulator.driver import simulate
from scheduler.simulator.metrics import Result
from scheduler.simulator.shifts import cluster, good_by_stretch, prompts_answers_prompts, shifting_trace

#: Name -> split, and whether the scheduler may change roles.
CLUSTERS: dict[str, tuple[tuple[int, int] | None, bool]] = {
    "5 prefill, 2 decode": ((5, 2), False),
    "4 prefill, 3 decode": ((4, 3), False),
    "3 prefill, 4 decode": ((3, 4), False),
    "all do both": (None, False),
    "5 prefill, 2 decode, roles changed": ((5, 2), True),
}


def measured(scale: float, seed: int) -> list[dict[str, Any]]:
    """One row a cluster."""
    stretches = prompts_answers_prompts(scale)
    trace = shifting_trace(stretches, seed)
    rows = []
    for name, (split, changed) in CLUSTERS.items():
        result = simulate(trace, replace(cluster(seed), split=split, role_changeable=changed))
        rows.append({"cluster": name, "seed": seed, "requests": len(trace), **_figures(result, stretches)})
        print(".", end="", file=sys.stderr, flush=True)
    return rows


def _figures(result: Result, stretches: Any) -> dict[str, Any]:
    figures = result.figures()
    return {
        "goodput": figures["goodput"],
        "by_stretch": [round(share, 4) for share in good_by_stretch(result, stretches)],
        "changes": result.scheduler_counts.get("roles_changed", 0),
        "refused": figures["refused"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="of the stretches: 240, 480 and 480 s")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = [row for seed in range(args.seeds) for row in measured(args.scale, seed)]
    if args.json:
        print(json.dumps({"rows": rows}))
        return
    print(f"\n{'cluster':38} seed  in time  prompts  answers  prompts  changes")
    for row in rows:
        stretches = "  ".join(f"{100 * share:5.1f} %" for share in row["by_stretch"])
        print(f"{row['cluster']:38} {row['seed']:4}  {100 * row['goodput']:5.1f} %  {stretches}  {row['changes']}")


if __name__ == "__main__":
    main()
