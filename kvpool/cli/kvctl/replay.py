"""`kvctl replay`: a scheduler's journal once more, exactly or with other settings. No cluster is asked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpool import __version__
from kvpool.cli import output
from kvpool.cli.kvctl import tables, trace
from kvpool.cli.kvctl.options import Json
from kvpool.core.errors import KvpoolError

if TYPE_CHECKING:
    from scheduler.replay.exact import Replay

JournalPath = Annotated[Path, typer.Argument(metavar="JOURNAL", help="A journal's folder, or one file of it.")]


def replay(
    journal: JournalPath,
    policy: Annotated[str, typer.Option("--policy", help="What if every request had been placed by this one?")] = "",
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="What if? A .toml or .json file of scheduler settings."),
    ] = None,
    skip_bad: trace.SkipBad = False,
    limit: Annotated[int, typer.Option("--limit", min=0, help="Differences, or changed requests, to show.")] = 10,
    json: Json = False,
) -> None:
    """Decides again what a scheduler decided: the same, or what another policy or configuration would have done.

    Ends with 0 if everything comes out as recorded, with 1 if not. A what-if ends with 0.
    """
    from scheduler.replay.overrides import check, read_overrides

    try:
        overrides = read_overrides(config) if config is not None else {}
        if policy:
            overrides = check({**overrides, "policy": policy}, "--policy")
    except KvpoolError as error:
        output.fail(str(error), hint=error.hint, code=output.EXIT_USAGE)
    try:
        if policy or config is not None:
            _what_if(journal, overrides, skip_bad, limit, json)
        else:
            _exactly(journal, skip_bad, limit, json)
    except KvpoolError as error:
        output.fail(str(error), hint=error.hint)


# ---------------------------------------------------------------- exactly


def _exactly(path: Path, skip_bad: bool, limit: int, json: bool) -> None:
    from scheduler.replay.exact import replay
    from scheduler.replay.reading import files_of, open_journal

    replays = [replay(open_journal(file, skip_bad)) for file in files_of(path)]
    identical = all(r.identical for r in replays)
    if json:
        output.print_json({"identical": identical, "version": __version__,
                           "files": [_told(r, limit) for r in replays]})  # fmt: skip
    else:
        _print(replays, limit)
    if not identical:
        output.fail(
            f"{sum(r.difference_count for r in replays)} of {sum(r.events for r in replays)} events come out otherwise",
            hint="other code, or a file that was changed; --policy and --config say what else would change",
        )


def _told(replay: Replay, limit: int) -> dict[str, Any]:
    from scheduler.replay.exact import told

    return {
        "file": replay.path,
        "version": replay.version,
        "identical": replay.identical,
        "events": replay.events,
        "decisions": len(replay.decisions),
        "torn": replay.torn,
        "bad_lines": replay.bad_lines,
        "decisions_sha256": replay.decisions_sha256,
        "state_sha256": replay.state_sha256,
        "difference_count": replay.difference_count,
        "differences": [told(d) for d in replay.differences[:limit]],
    }


def _print(replays: list[Replay], limit: int) -> None:
    from scheduler.replay.exact import told

    rows = [
        (Path(r.path).name, r.events, len(r.decisions), "identical" if r.identical else f"{r.difference_count} differ",
         r.decisions_sha256[:16], _note(r))
        for r in replays
    ]  # fmt: skip
    tables.table("replayed", ("file", "events:", "decisions:", "result", "sha256 of decisions", "note"), rows)
    for replay in replays:
        for number, difference in enumerate(replay.differences[:limit]):
            data = told(difference)
            request = f" of {data['request']}" if data["request"] else ""
            title = f"{Path(replay.path).name}:{data['line']}: {data['event']}{request}, at {data['at_us']} us"
            facts = {f"{n}": change for n, change in enumerate(data["changed"], 1)}
            tables.facts(f"first difference: {title}" if not number else title, facts)


def _note(replay: Replay) -> str:
    notes = [f"by kvpool {replay.version}; this is {__version__}"] if replay.version != __version__ else []
    notes += ["last line cut off"] if replay.torn else []
    notes += [f"{replay.bad_lines} bad lines left out"] if replay.bad_lines else []
    return "; ".join(notes) or "-"


# ---------------------------------------------------------------- what if


def _what_if(path: Path, overrides: dict[str, Any], skip_bad: bool, limit: int, json: bool) -> None:
    from scheduler.replay.cases import report
    from scheduler.replay.reading import files_of, open_journal
    from scheduler.replay.whatif import what_if

    cases = []
    bad_lines = 0
    for file in files_of(path):
        journal = open_journal(file, skip_bad)
        cases += what_if(journal, overrides)
        bad_lines += journal.bad_lines
    data = {"settings": overrides, "bad_lines": bad_lines, **report(cases)}
    if json:
        output.print_json(data)
    else:
        _print_what_if(data, limit)


def _print_what_if(data: dict[str, Any], limit: int) -> None:
    then, now = data["then"], data["now"]
    rows = [(name, _number(then[key]), _number(now[key])) for name, key in _TOTALS]
    rows.append(("refused because", _reasons(then), _reasons(now)))
    title = f"what if {_settings(data['settings'])}: {data['changed']} of {data['requests']} requests change"
    tables.table(title, ("", "then:", "now:"), rows)
    both = data["of_both"]
    tables.facts(
        "",
        {
            "placed elsewhere": data["placements_changed"],
            "placed instead of refused": data["placed_instead_of_refused"],
            "refused instead of placed": data["refused_instead_of_placed"],
            f"predicted TTFT of the {both['requests']} placed both times": f"p50 "
            f"{both['predicted_ttft_ms_p50_then']:.1f} then, {both['predicted_ttft_ms_p50_now']:.1f} ms now; p95 "
            f"{both['predicted_ttft_ms_p95_then']:.1f} then, {both['predicted_ttft_ms_p95_now']:.1f} ms now",
            "measured TTFT then": f"p50 {then['measured_ttft_ms_p50']:.1f}, p95 {then['measured_ttft_ms_p95']:.1f} ms",
        },
    )
    changed = [case for case in data["cases"] if case["changed"]]
    shown = [(c["request_id"], c["prompt_tokens"], _answer(c["then"]), _answer(c["now"])) for c in changed[:limit]]
    if shown:
        tables.table(f"changed ({len(shown)} of {len(changed)})", ("request", "prompt:", "then", "now"), shown)


_TOTALS = (
    ("placed", "placed"), ("split", "split"), ("refused", "refused"), ("no answer", "unanswered"),
    ("predicted TTFT p50, ms", "predicted_ttft_ms_p50"), ("predicted TTFT p95, ms", "predicted_ttft_ms_p95"),
    ("mean wait for a place, ms", "waited_ms_mean"), ("prompt tokens from caches", "cached_tokens"),
    ("placements that pull", "pulls"),
)  # fmt: skip


def _number(value: float) -> str:
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"


def _reasons(totals: dict[str, Any]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in totals["refused_by_reason"].items()) or "-"


def _settings(overrides: dict[str, Any]) -> str:
    flat = {**overrides, **overrides.get("baselines", {})}
    return ", ".join(f"{name} = {value}" for name, value in flat.items() if name != "baselines") or "nothing changes"


def _answer(answer: dict[str, Any] | None) -> str:
    if answer is None:
        return "no answer"
    if "refused" in answer:
        return f"refused: {answer['refused']}"
    where = f"{answer['prefill']} to {answer['decode']}" if answer["split"] else answer["decode"]
    pulled = f", {len(answer['pulled_from'])} sources" if answer["pulled_from"] else ""
    return f"{where}, {answer['cached_tokens']} cached{pulled}, {answer['predicted_ttft_us'] / 1000:.1f} ms"
