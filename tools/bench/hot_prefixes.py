"""Prefixes that become hot at once: what the scheduler makes of them, and what copies ahead of demand could gain.

python tools/bench/hot_prefixes.py [--seeds 1] [--json]

Simulated. `free` is the bound: each node has every prefix as soon as one of them has it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scheduler.simulator.driver import simulate
from scheduler.simulator.hot_prefixes import HotPrefix, hot_prefixes, hot_records, imbalance, networks


def measured(story: HotPrefix, network: str) -> dict[str, Any]:
    """One row: requests with the prefix only."""
    prefills: Counter[str] = Counter()

    def note(line: str) -> None:
        if '"what":"placed"' in line:
            placed = json.loads(line)
            if placed["us"] >= story.hot_us:
                prefills[placed["prefill"]] += 1

    result = simulate(story.trace, story.config, note)
    hot = hot_records(story, result)
    ttfts = sorted(r.ttft_us for r in hot if r.ttft_us is not None)
    first = [r.ttft_us for r in hot if r.ttft_us is not None and r.arrival_us < story.hot_us + 5_000_000]
    return {
        "story": story.name, "network": network, "seed": story.config.seed, "hot": len(hot),
        "in_time": sum(result.good(r) for r in hot) / max(len(hot), 1),
        "ttft_s": sum(ttfts) / max(len(ttfts), 1) / 1e6,
        "ttft_p95_s": ttfts[int(0.95 * len(ttfts))] / 1e6 if ttfts else 0.0,
        "ttft_first_s": sum(first) / max(len(first), 1) / 1e6,
        "cached": sum(r.cached_tokens for r in hot) / max(sum(r.prompt_tokens for r in hot), 1),
        "imbalance": imbalance([prefills[i.instance_id] for i in result.instances]),
        "goodput": result.figures()["goodput"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = []
    for seed in range(args.seeds):
        for network, hardware in networks().items():
            for story in hot_prefixes(hardware, seed):
                rows.append(measured(story, network))
                print(".", end="", file=sys.stderr, flush=True)
    if args.json:
        print(json.dumps({"rows": rows}))
        return
    print(f"\n{'prefix':20} {'network':10} seed  in time  TTFT mean   p95  first 5 s  cached  busiest/mean  all good")
    for row in sorted(rows, key=lambda r: str(r["story"])):
        print(
            f"{row['story']:20} {row['network']:10} {row['seed']:4}  {row['in_time']:6.1%}  {row['ttft_s']:8.2f}"
            f"  {row['ttft_p95_s']:5.2f}  {row['ttft_first_s']:9.2f}  {row['cached']:5.1%}  {row['imbalance']:12.2f}"
            f"  {row['goodput']:8.1%}"
        )


if __name__ == "__main__":
    main()
