"""Repeats histories: python -m tests.simulation --seed N [--steps M] [--count C] [--ssd] [--trace]"""

from __future__ import annotations

import argparse
import time

from tests.simulation.world import Plan, World


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--steps", type=int, default=Plan().steps)
    parser.add_argument("--count", type=int, default=1, help="so many seeds from this one on")
    parser.add_argument("--check-every", type=int, default=None)
    parser.add_argument("--ssd", action="store_true", help="every node has one (otherwise the seed says)")
    parser.add_argument("--trace", action="store_true", help="say what happens")
    parser.add_argument("--raise", dest="raise_it", action="store_true", help="show the traceback of the first failure")
    args = parser.parse_args()
    check_every = args.check_every if args.check_every is not None else (1 if args.count == 1 else Plan().check_every)
    failed, begin_s = 0, time.process_time()
    totals: dict[str, int] = {}
    for seed in range(args.seed, args.seed + args.count):
        world = World(seed, Plan(args.steps, check_every, args.trace, ssd=args.ssd or None))
        try:
            world.run()
        except BaseException as error:
            if args.raise_it or isinstance(error, KeyboardInterrupt):
                print("\n".join(world.story))
                raise
            failed += 1
            print(f"seed {seed}: {type(error).__name__}: {str(error)[:300]}")
        if args.trace:
            print("\n".join(world.story))
        for what, number in world.counts.items():
            totals[what] = totals.get(what, 0) + number
        totals["crashes"] = totals.get("crashes", 0) + sum(node.crashes for node in world.nodes)
        totals["hits"] = totals.get("hits", 0) + world.auditor.hits
    took_s = time.process_time() - begin_s
    print(f"{args.count} histories, {failed} failed, {took_s:.1f} s, {took_s / args.count * 1000:.1f} ms each")
    print(", ".join(f"{what} {number}" for what, number in sorted(totals.items())))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
