"""The commands of `kvctl`, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from kvpool.cli import output
from kvpool.cli.kvctl import (
    advise,
    bench,
    blocks,
    holds,
    looking,
    moving,
    overview,
    plan,
    replay,
    requests,
    settings,
    simulate,
    top,
    trace,
)
from kvpool.cli.kvctl.access import with_access_options

app = typer.Typer(
    name="kvctl",
    help="Look into a running kvpool cluster, and work on it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _root(
    version: Annotated[bool, output.version_option("kvctl")] = False,
) -> None:
    """Look into a running kvpool cluster, and work on it."""


_COMMANDS: dict[str, dict[str, Callable[..., None]]] = {
    "the cluster": {
        "status": overview.status,
        "nodes": overview.nodes,
        "workers": overview.workers,
        "top": top.top,
        "links": settings.links,
        "explain": requests.explain,
    },
    "blocks": {
        "ls": blocks.ls,
        "inspect": looking.inspect,
        "rm": blocks.rm,
        "evict": blocks.evict,
        "pin": holds.pin,
        "unpin": holds.unpin,
        "pins": holds.pins,
    },
    "nodes": {
        "copy": moving.copy,
        "move": moving.move,
        "drain": moving.drain,
        "verify": moving.verify,
        "quota": settings.quota,
        "namespaces": settings.namespaces,
        "bench": bench.bench,
    },
    "planning": {
        "plan": plan.plan,
        "role": plan.role,
        "replay": replay.replay,
        "simulate": simulate.simulate,
        "advise": advise.advise,
    },
}
for _panel, _commands in _COMMANDS.items():
    for _name, _command in _commands.items():
        app.command(_name, rich_help_panel=_panel)(with_access_options(_command))
app.add_typer(trace.app, name="trace", rich_help_panel="planning")
# Its name until `ls` came.
app.command("blocks", hidden=True)(with_access_options(blocks.ls))


def main() -> None:
    app()
