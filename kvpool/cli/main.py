"""`kvpool`: starts each role of the system. One option has one spelling: flag, KVPOOL_<ROLE>_<OPTION>, config file."""

from __future__ import annotations

import os

# gRPC's own log lines would stand between ours.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import importlib.util
import inspect
import logging
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from kvpool.cli import output
from kvpool.cli.engine_agent import EngineApiKey, engine_agent
from kvpool.cli.flags import Credential, TlsCa, TlsCert, TlsKey, tls_of
from kvpool.cli.processes import Interrupted, ProcessFailed, announce_ready, die_with_parent, stop_event
from kvpool.cli.serving import serve
from kvpool.core.errors import KvpoolError
from kvpool.core.kernels.compiling import compile_kernels

app = typer.Typer(
    name="kvpool",
    add_completion=False,
    help="The KV cache of LLM serving as a resource of the whole cluster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"auto_envvar_prefix": "KVPOOL", "help_option_names": ["-h", "--help"]},
)

LOG_FORMAT = "%(asctime)s %(levelname).1s %(name)s %(message)s"
SchedulerAddress = Annotated[
    str,
    typer.Option("--scheduler", envvar="KVPOOL_SCHEDULER", help="Address of the scheduler; of several, with commas."),
]
MetricsPort = Annotated[int, typer.Option("--metrics-port", min=0, max=65535, help="HTTP port of /metrics; 0 = none.")]


@app.callback()
def _root(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Option("--config", exists=True, dir_okay=False, help="TOML file: a table for each role.")
    ] = None,
    log_level: Annotated[str, typer.Option("--log-level", help="debug, info, warning or error.")] = "info",
    version: Annotated[bool, output.version_option("kvpool")] = False,
) -> None:
    level = getattr(logging, log_level.upper(), None)
    if not isinstance(level, int):
        output.fail(f"no log level {log_level!r}", hint="debug, info, warning or error", code=output.EXIT_USAGE)
    logging.basicConfig(level=level, format=LOG_FORMAT, stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    _check_packages()
    if config is not None:
        context.default_map = _read_config(config)


def _read_config(path: Path) -> dict[str, dict[str, Any]]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        output.fail(f"can't read {path}: {error}", code=output.EXIT_USAGE)
    known = {
        c.name or c.callback.__name__: set(inspect.signature(c.callback).parameters)
        for c in app.registered_commands
        if c.callback
    }
    defaults: dict[str, dict[str, Any]] = {}
    for name, values in tables.items():
        if name not in known or not isinstance(values, dict):
            output.fail(f"{path}: no role [{name}]", hint=f"tables: {', '.join(sorted(known))}", code=output.EXIT_USAGE)
        defaults[name] = {option.replace("-", "_"): value for option, value in values.items()}
        for option in sorted(defaults[name].keys() - known[name]):
            options = ", ".join(sorted(known[name]))
            output.fail(
                f"{path}: [{name}] has no option {option!r}", hint=f"options: {options}", code=output.EXIT_USAGE
            )
    return defaults


def _check_packages() -> None:
    """`scheduler` and `engines` are common names: says what shadows ours, if something does."""
    ours = Path(__file__).resolve().parents[2]
    for name in ("scheduler", "engines"):
        spec = importlib.util.find_spec(name)
        places = [Path(p).resolve() for p in (spec.submodule_search_locations or [])] if spec else []
        if ours / name not in places:
            found = ", ".join(str(p) for p in places) or "nothing"
            output.fail(
                f"the package {name!r} resolves to {found}, not to kvpool's at {ours / name}",
                hint="start kvpool from another folder, or remove that package from PYTHONPATH",
            )


def _ready(role: str, facts: dict[str, Any]) -> None:
    logging.getLogger("kvpool").info("%s ready %s", role, " ".join(f"{k}={v}" for k, v in facts.items()))
    announce_ready(facts)


@app.command()
def node(
    scheduler: SchedulerAddress = "127.0.0.1:7700",
    listen: Annotated[str, typer.Option("--listen", help="host:port of the BlockSource service.")] = "127.0.0.1:7701",
    data_listen: Annotated[str, typer.Option("--data-listen", help="host:port of the tcp channel.")] = "127.0.0.1:0",
    id: Annotated[str, typer.Option("--id", help="Name of this node; unique in the cluster.")] = "node-0",
    memory: Annotated[str, typer.Option("--memory", help="Bytes of DRAM for blocks, e.g. 4GiB.")] = "1GiB",
    segment_dir: Annotated[
        Path, typer.Option("--segment-dir", help="tmpfs or hugetlbfs folder for the shared memory.")
    ] = Path("/dev/shm"),
    keep_memory: Annotated[
        bool, typer.Option("--keep-memory", help="When told to stop, leave all blocks for the next start.")
    ] = False,
    eviction: Annotated[str, typer.Option("--eviction", help="prefix, lru, lfu or s3fifo.")] = "prefix",
    ssd_dir: Annotated[
        str, typer.Option("--ssd-dir", help="Folder on a fast disk for blocks that memory can't hold; empty = none.")
    ] = "",
    ssd_size: Annotated[str, typer.Option("--ssd-size", help="Bytes of that disk to use, e.g. 500GiB.")] = "10GiB",
    nixl: Annotated[bool, typer.Option("--nixl", help="Offer the nixl channel (RDMA, NVLink) too.")] = False,
    collective: Annotated[str, typer.Option("--collective", help="Offer the collective channel: gloo or nccl.")] = "",
    collective_listen: Annotated[str, typer.Option("--collective-listen", help="host:port of it.")] = "127.0.0.1:0",
    metrics_port: MetricsPort = 0,
    credential: Credential = "",
    tls_cert: TlsCert = "",
    tls_key: TlsKey = "",
    tls_ca: TlsCa = "",
) -> None:
    """Hold blocks in shared memory and serve them (one a host)."""
    from kvpool.service.node import NodeConfig, run_node

    config = NodeConfig(
        source_id=id, listen=listen, data_listen=data_listen, scheduler=scheduler,
        memory_bytes=output.parse_size(memory), segment_dir=str(segment_dir), metrics_port=metrics_port,
        credential=credential, keep_memory=keep_memory, eviction=eviction, ssd_dir=ssd_dir,
        ssd_bytes=output.parse_size(ssd_size) if ssd_dir else 0, nixl=nixl, collective=collective,
        collective_listen=collective_listen, tls=tls_of(tls_cert, tls_key, tls_ca, serves=True),
    )  # fmt: skip
    _run("node", lambda ready: run_node(config, on_ready=ready))


@app.command()
def scheduler(
    listen: Annotated[str, typer.Option("--listen", help="host:port of the Directory and Scheduler services.")] = (
        "127.0.0.1:7700"
    ),
    id: Annotated[str, typer.Option("--id", help="Name of this scheduler.")] = "scheduler-0",
    policy: Annotated[str, typer.Option("--policy", help="Placement policy.")] = "kvpool",
    journal: Annotated[str, typer.Option("--journal", help="Folder for the journal; empty = none.")] = "",
    redis: Annotated[
        str,
        typer.Option(
            "--redis", envvar="KVPOOL_REDIS", help="URL of the log that several schedulers share; empty = alone."
        ),
    ] = "",
    redis_stream: Annotated[str, typer.Option("--redis-stream", help="Key of that log in Redis.")] = "kvpool:events",
    execute_roles: Annotated[
        bool,
        typer.Option(help="Carry out plans that change roles of workers with --role-changeable, or only propose them."),
    ] = True,
    metrics_port: MetricsPort = 0,
    credential: Credential = "",
    tls_cert: TlsCert = "",
    tls_key: TlsKey = "",
    tls_ca: TlsCa = "",
) -> None:
    """Know who holds which block, and place requests."""
    from scheduler.core.config import SchedulerConfig
    from scheduler.service.server import SchedulerServerConfig, run_scheduler

    metrics_listen = f"{listen.rpartition(':')[0]}:{metrics_port}" if metrics_port else ""
    config = SchedulerServerConfig(
        scheduler_id=id, listen=listen, policy=policy, journal_dir=journal, credential=credential,
        metrics_listen=metrics_listen, tls=tls_of(tls_cert, tls_key, tls_ca, serves=True),
        redis=redis, redis_stream=redis_stream, core=SchedulerConfig(execute_roles=execute_roles),
    )  # fmt: skip
    _run("scheduler", lambda ready: run_scheduler(config, on_ready=ready))


@app.command()
def gateway(
    scheduler: SchedulerAddress = "127.0.0.1:7700",
    listen: Annotated[str, typer.Option("--listen", help="host:port of the OpenAI HTTP API.")] = "127.0.0.1:8000",
    id: Annotated[str, typer.Option("--id", help="Name of this gateway.")] = "gateway-0",
    policy: Annotated[str, typer.Option("--policy", help="Placement policy; empty = the scheduler's own.")] = "",
    drain: Annotated[
        float, typer.Option("--drain", min=0, help="Seconds for running requests when told to stop.")
    ] = 30.0,
    api_keys: Annotated[str, typer.Option("--api-keys", help="File of `name:key` lines that clients must use.")] = "",
    handoff: Annotated[
        str, typer.Option("--handoff", help="How KV gets from one vLLM server to another: pool or nixl.")
    ] = "pool",
    engine_api_key: EngineApiKey = "",
    credential: Credential = "",
    tls_cert: TlsCert = "",
    tls_key: TlsKey = "",
    tls_ca: TlsCa = "",
) -> None:
    """Serve the OpenAI HTTP API (as many as needed)."""
    from scheduler.gateway.server import GatewayConfig, run_gateway

    config = GatewayConfig(
        gateway_id=id,
        listen=listen,
        scheduler=scheduler,
        policy=policy,
        api_keys=api_keys,
        credential=credential,
        handoff=handoff,
        engine_api_key=engine_api_key,
        drain_timeout_s=drain,
        tls=tls_of(tls_cert, tls_key, tls_ca),
    )
    _run("gateway", lambda ready: run_gateway(config, on_ready=ready))


@app.command()
def worker(
    model: Annotated[str, typer.Option("--model", help="Hugging Face folder or hub id.")],
    scheduler: SchedulerAddress = "127.0.0.1:7700",
    node: Annotated[
        str, typer.Option("--node", help="Address of this host's node; empty = no pool.")
    ] = "127.0.0.1:7701",
    listen: Annotated[str, typer.Option("--listen", help="host:port of the Engine service.")] = "127.0.0.1:0",
    id: Annotated[str, typer.Option("--id", help="Name of this worker; unique in the cluster.")] = "worker-0",
    role: Annotated[str, typer.Option("--role", help="prefill, decode or both.")] = "both",
    served_name: Annotated[
        str, typer.Option("--served-name", help="Model name for clients; empty = the folder's.")
    ] = "",
    kv_tokens: Annotated[int, typer.Option("--kv-tokens", min=256, help="Tokens that the KV cache holds.")] = 32768,
    block_tokens: Annotated[int, typer.Option("--block-tokens", min=16, help="Tokens a block.")] = 64,
    chunk_tokens: Annotated[int, typer.Option("--chunk-tokens", min=16, help="Prompt tokens a step at most.")] = 512,
    batch_max: Annotated[int, typer.Option("--batch-max", min=1, help="Sequences that decode together.")] = 32,
    threads: Annotated[int, typer.Option("--threads", min=0, help="CPU threads; 0 = torch's choice.")] = 0,
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Same tokens whatever the batching and the placement.")
    ] = False,
    hbm_staging: Annotated[
        str, typer.Option("--hbm-staging", help="Memory through which others pull from this worker's cache; 0 = none.")
    ] = "0",
    segment_dir: Annotated[Path, typer.Option("--segment-dir", help="Folder for that memory.")] = Path("/dev/shm"),
    metrics_port: MetricsPort = 0,
    gpu: Annotated[str, typer.Option("--gpu", help="Hardware, for plans and costs; empty = not said.")] = "",
    tp: Annotated[int, typer.Option("--tp", min=1, help="GPUs that serve this copy of the model, for plans.")] = 1,
    price_per_hour: Annotated[
        float, typer.Option("--price-per-hour", min=0, help="Of all of them, for plans and costs.")
    ] = 0.0,
    role_changeable: Annotated[
        bool, typer.Option("--role-changeable", help="The scheduler may give it another role.")
    ] = False,
    block_hash: Annotated[
        str, typer.Option("--block-hash", help="xxh3_128/1, or sha256/1 where several tenants share the cluster.")
    ] = "xxh3_128/1",
    credential: Credential = "",
    tls_cert: TlsCert = "",
    tls_key: TlsKey = "",
    tls_ca: TlsCa = "",
) -> None:
    """Compute: prefill prompts, decode tokens, share KV through the pool (one a device)."""
    from engines.torch.worker import EngineWorker, WorkerConfig

    config = WorkerConfig(
        model=model, scheduler=scheduler, node=node, listen=listen, instance_id=id, role=role, served_name=served_name,
        kv_tokens=kv_tokens, block_tokens=block_tokens, chunk_tokens=chunk_tokens, batch_max=batch_max, threads=threads,
        dtype=dtype, device=device, deterministic=deterministic, block_hash=block_hash, credential=credential,
        hbm_staging_bytes=0 if hbm_staging == "0" else output.parse_size(hbm_staging), segment_dir=str(segment_dir),
        metrics_port=metrics_port, tls=tls_of(tls_cert, tls_key, tls_ca, serves=True), gpu=gpu, tp=tp,
        price_per_hour=price_per_hour, role_changeable=role_changeable,
    )  # fmt: skip

    def run(ready: Any) -> None:
        stop = stop_event()
        with EngineWorker(config) as engine:
            ready({"address": engine.address, "instance": id})
            stop.wait()

    _run("worker", run)


def _run(role: str, body: Any) -> None:
    die_with_parent()
    compile_kernels()
    try:
        body(lambda facts: _ready(role, facts))
    except KvpoolError as error:
        output.fail(str(error), hint=error.hint)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


app.command()(serve)
app.command("engine-agent")(engine_agent)


@app.command()
def demo(
    model: Annotated[str, typer.Option("--model", help="Model folder; empty = the tiny model of the repository.")] = "",
    passes: Annotated[int, typer.Option("--passes", min=1, max=9, help="Passes of each kind, interleaved.")] = 2,
    conversations: Annotated[int, typer.Option("--conversations", min=1, max=64)] = 9,
    turns: Annotated[int, typer.Option("--turns", min=1, max=16)] = 4,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the cluster running and print its addresses.")] = False,
    out: Annotated[Path, typer.Option("--out", help="Where the report goes.")] = Path("build/demo-report.json"),
) -> None:
    """Play multi-turn conversations through a real cluster, with the pool and without."""
    from kvpool.cli.demo.run import DemoFailed, run_demo

    stop = stop_event()
    try:
        good = run_demo(model, passes, conversations, turns, keep, out, stop)
    except Interrupted:
        raise typer.Exit(130) from None
    except (ProcessFailed, DemoFailed) as error:
        output.fail(str(error))
    raise typer.Exit(0 if good else output.EXIT_FAILED)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
