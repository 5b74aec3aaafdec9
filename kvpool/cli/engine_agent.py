"""`kvpool engine-agent`: inference servers that run by themselves join the cluster."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Annotated

import typer

from kvpool.cli import output
from kvpool.cli.flags import Credential, TlsCa, TlsCert, TlsKey, tls_of
from kvpool.cli.processes import announce_ready, die_with_parent, stop_event
from kvpool.core.errors import KvpoolError

log = logging.getLogger("kvpool")

EngineApiKey = Annotated[
    str, typer.Option("--engine-api-key", envvar="KVPOOL_ENGINE_API_KEY", help="What the servers ask for (--api-key).")
]


def engine_agent(
    server: Annotated[
        list[str] | None,
        typer.Option(
            "--server",
            help="http://host:port[,name=value]... of a vLLM server; many times. Names: id, role, node, events, "
            "replay, topic, handoff (pool, nixl, none), hash_seed, batch_max, block_bytes, tokenizer, host_id, "
            "role_changeable (true, false).",
        ),
    ] = None,
    servers: Annotated[
        Path | None,
        typer.Option("--servers", exists=True, dir_okay=False, help="TOML file: an array of tables called server."),
    ] = None,
    scheduler: Annotated[
        str, typer.Option("--scheduler", envvar="KVPOOL_SCHEDULER", help="Address of the scheduler.")
    ] = "127.0.0.1:7700",
    engine_api_key: EngineApiKey = "",
    credential: Credential = "",
    tls_cert: TlsCert = "",
    tls_key: TlsKey = "",
    tls_ca: TlsCa = "",
) -> None:
    """Attach running vLLM servers: they are placed on, and their caches and load are known (one or more servers)."""
    from engines.openai_server.event_feed import libraries
    from engines.openai_server.instance import AgentContext, ServerInstance
    from engines.openai_server.settings import checked, server_of_flag, servers_of_file

    die_with_parent()
    context = AgentContext(scheduler, credential, engine_api_key, tls_of(tls_cert, tls_key, tls_ca))
    stop = stop_event()
    try:
        listed = [server_of_flag(text) for text in server or []]
        if servers is not None:
            listed += servers_of_file(servers)
        if any(settings.events for settings in listed):
            libraries()
        instances = [ServerInstance(settings, context) for settings in checked(listed)]
    except KvpoolError as error:
        output.fail(str(error), hint=error.hint, code=output.EXIT_USAGE)
    with contextlib.ExitStack() as stack:
        for instance in instances:
            instance.start()
            stack.callback(instance.stop)
        announce_ready({"instances": [instance.settings.instance_id for instance in instances]})
        names = ", ".join(instance.settings.instance_id for instance in instances)
        log.info("engine-agent ready servers=%s", names)
        stop.wait()
        for instance in instances:  # all at the same time
            instance.begin_stop()
