"""How policies get over incidents, over time, and what they do where splitting or fetching lost; all modelled.

    python tools/bench/recovery.py [--out docs/results] [--only flapping_link ... losses]

The incidents are those of `scheduler/simulator/incidents.py`: a link that flaps, an instance that dies, 43 forks of one
prefix. Of each there is an SVG plot. The cases that others lost are in `scheduler/simulator/published/losses.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from scheduler.simulator.driver import simulate  # noqa: E402
from scheduler.simulator.incidents import Incident, incidents, mean_ttft_s, shares_of  # noqa: E402
from scheduler.simulator.metrics import Result  # noqa: E402
from scheduler.simulator.plots import Chart, page  # noqa: E402
from scheduler.simulator.published.losses import losses  # noqa: E402

POINTS = 24
#: Not an incident: all cases of `losses`.
LOSSES = "losses"
#: After the fault: how long its consequences are looked at.
AFTER_S = 20.0
COLUMNS = (
    "incident", "policy", "in time %", "TTFT before, s", "during", "20 s after", "later", "busiest prefill instance %",
)  # fmt: skip


def run(incident: Incident, policy: str) -> tuple[Result, dict[str, int]]:
    """A result, and how many requests each instance prefilled."""
    prefills: Counter[str] = Counter()

    def note(line: str) -> None:
        if '"what":"placed"' in line:
            prefills[json.loads(line)["prefill"]] += 1

    result = simulate(incident.trace, replace(incident.config, policy=policy), note)
    names = [instance.instance_id for instance in result.instances]
    return result, {name: prefills[name] for name in names}


def row(incident: Incident, policy: str, result: Result, prefills: dict[str, int]) -> list[str]:
    begin_s, until_s = incident.begin_s, incident.until_s
    if until_s:
        spans = [(0.0, begin_s), (begin_s, until_s), (until_s, until_s + AFTER_S), (until_s + AFTER_S, 1e9)]
    else:
        spans = [(0.0, 10.0), (10.0, 1e9)]
    ttfts = [f"{mean_ttft_s(result, *span):.2f}" for span in spans]
    busiest = max(shares_of(list(prefills.values())), default=0.0)
    return [
        incident.name, policy, f"{100 * result.figures()['goodput']:.1f}", *ttfts, *["-"] * (4 - len(ttfts)),
        f"{100 * busiest:.0f}",
    ]  # fmt: skip


def plotted(incident: Incident, found: dict[str, tuple[Result, dict[str, int]]]) -> str:
    lines = {
        policy: [(p["s"], p["ttft_ms"] / 1000) for p in result.series(POINTS) if p["requests"]]
        for policy, (result, _) in found.items()
    }
    good = {
        policy: [(p["s"], 100 * p["goodput"]) for p in result.series(POINTS) if p["requests"]]
        for policy, (result, _) in found.items()
    }
    charts = [
        Chart.lines("mean TTFT by time of arrival, s", lines, "s"),
        Chart.lines("requests in time, %, by time of arrival", good, "s"),
    ]
    if not incident.until_s:
        instances = next(iter(found.values()))[1]
        by_instance = {
            policy: [(float(place), float(prefills[name])) for place, name in enumerate(instances)]
            for policy, (_, prefills) in found.items()
        }
        charts.append(Chart.lines("requests prefilled, by instance", by_instance, "instance"))
    return page(f"{incident.title} (modelled)", charts)


def losses_table() -> Table:
    table = Table(title="where splitting or fetching lost (modelled)", title_justify="left")
    for column in ("case", "reported", "policy", "mean TTFT, s", "mean TBT, ms", "split %", "fetched %"):
        table.add_column(column)
    for case in losses().values():
        for policy, result in case.results().items():
            figures = result.figures()
            others = (figures["tbt_ms"], 100 * figures["split_ratio"], 100 * case.pulled(result))
            shown = (f"{case.ttft_s(result):.2f}", *(f"{value:.0f}" for value in others))
            table.add_row(case.title, case.reported, policy, *shown)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = {incident.name: incident for incident in incidents()}
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs" / "results")
    parser.add_argument("--only", nargs="+", choices=(*known, LOSSES), default=[*known, LOSSES])
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else 180)
    table = Table(title="modelled", title_justify="left")
    for column in COLUMNS:
        table.add_column(column)
    for name in arguments.only:
        if name == LOSSES:
            continue
        incident = known[name]
        found = {policy: run(incident, policy) for policy in incident.policies}
        for policy, (result, prefills) in found.items():
            table.add_row(*row(incident, policy, result, prefills))
        (arguments.out / f"{name}.svg").write_text(plotted(incident, found))
    if table.row_count:
        console.print(table)
    if LOSSES in arguments.only:
        console.print(losses_table())


if __name__ == "__main__":
    main()
