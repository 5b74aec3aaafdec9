"""`kvpool serve`: a whole cluster on this machine, watched and restarted."""

from __future__ import annotations

import errno
import logging
import socket
import threading
from pathlib import Path
from typing import Annotated

import typer

from kvpool.cli import output
from kvpool.cli.flags import Credential, TlsCa, TlsCert, TlsKey, tls_of
from kvpool.cli.local import LocalCluster, LocalOptions, metrics_ports
from kvpool.cli.processes import Interrupted, ProcessFailed, announce_ready, die_with_parent, stop_event

PORT_MAX = 65_535


def serve(
    model: Annotated[str, typer.Option("--model", help="Hugging Face folder or hub id.")],
    prefill: Annotated[int, typer.Option("--prefill", min=0, max=64, help="Prefill workers.")] = 1,
    decode: Annotated[int, typer.Option("--decode", min=0, max=64, help="Decode workers.")] = 1,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port of the OpenAI HTTP API.")] = 8000,
    scheduler_port: Annotated[int, typer.Option("--scheduler-port", min=0, max=65535, help="For kvctl.")] = 7700,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    served_name: Annotated[
        str, typer.Option("--served-name", help="Model name for clients; empty = the folder's.")
    ] = "",
    memory: Annotated[str, typer.Option("--memory", help="DRAM for blocks.")] = "1GiB",
    segment_dir: Annotated[Path, typer.Option("--segment-dir", help="Folder for the shared memory.")] = Path(
        "/dev/shm"
    ),
    ssd_dir: Annotated[
        str, typer.Option("--ssd-dir", help="Folder on a fast disk for blocks that memory can't hold; empty = none.")
    ] = "",
    ssd_size: Annotated[str, typer.Option("--ssd-size", help="Bytes of that disk to use, e.g. 500GiB.")] = "10GiB",
    hbm_staging: Annotated[
        str, typer.Option("--hbm-staging", help="Memory of each worker through which others pull from its cache.")
    ] = "0",
    metrics_port: Annotated[
        int,
        typer.Option(
            "--metrics-port",
            min=0,
            max=65535,
            help="/metrics of the scheduler; of node and workers on the ports that follow. 0 = none.",
        ),
    ] = 0,
    kv_tokens: Annotated[int, typer.Option("--kv-tokens", min=256, help="KV cache of each worker, in tokens.")] = 32768,
    threads: Annotated[int, typer.Option("--threads", min=0, help="CPU threads a worker.")] = 1,
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    deterministic: Annotated[bool, typer.Option("--deterministic", help="Same tokens whatever the batching.")] = False,
    journal: Annotated[str, typer.Option("--journal", help="Folder for the scheduler's journal.")] = "",
    logs: Annotated[Path, typer.Option("--logs", help="Folder for the logs of all processes.")] = Path("build/logs"),
    credential: Credential = "",
    tls_cert: TlsCert = "",
    tls_key: TlsKey = "",
    tls_ca: TlsCa = "",
) -> None:
    """Run everything on this machine: node, scheduler, gateway, workers."""
    die_with_parent()
    if decode == 0:
        output.fail("nothing would decode", hint="give at least --decode 1", code=output.EXIT_USAGE)
    if Path(model).is_absolute() or model.startswith("."):
        check_model_folder(Path(model))
    for flag, number in (("--port", port), ("--scheduler-port", scheduler_port)):
        check_port(host, number, flag)
    options = LocalOptions(
        model=model, served_name=served_name, prefill=prefill, decode=decode, host=host,
        port=port, scheduler_port=scheduler_port, memory_bytes=output.parse_size(memory), segment_dir=str(segment_dir),
        kv_tokens=kv_tokens, threads=threads, dtype=dtype, device=device, deterministic=deterministic, journal=journal,
        credential=credential, tls=tls_of(tls_cert, tls_key, tls_ca, serves=True), ssd_dir=ssd_dir,
        ssd_bytes=output.parse_size(ssd_size) if ssd_dir else 0,
        hbm_staging_bytes=0 if hbm_staging == "0" else output.parse_size(hbm_staging), metrics_port=metrics_port,
    )  # fmt: skip
    for number in metrics_ports(options):
        check_port(host, number, "--metrics-port")
    stop = stop_event()
    cluster = LocalCluster(options, logs)
    try:
        cluster.start(lambda what: output.console.print(f"[dim]{what}[/]"), stop)
        output.facts("serving; Ctrl-C ends it", addresses(cluster))
        announce_ready({"address": cluster.address("gateway"), "scheduler": cluster.scheduler_address})
        watch(cluster, stop)
    except Interrupted:
        raise typer.Exit(130) from None
    except ProcessFailed as error:
        output.fail(str(error))
    finally:
        output.console.print("[dim]stopping all processes[/]")
        cluster.stop()


def check_port(host: str, port: int, flag: str) -> None:
    """Before anything is started: a port that is taken is found now, and named by its flag."""
    if port > PORT_MAX:
        output.fail(f"there is no port {port}", hint=f"choose a lower one with {flag}: the next ones are used too")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            hint = f"choose another port with {flag}" if error.errno == errno.EADDRINUSE else "check --host"
            output.fail(f"can't listen on {host}:{port}: {error.strerror}", hint=hint)


def check_model_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        output.fail(
            f"no model in {folder}", hint="name a Hugging Face folder, with config.json and weights, or a hub id"
        )


def addresses(cluster: LocalCluster) -> dict[str, str]:
    return {
        "OpenAI API": f"{cluster.gateway_url}/v1",
        "metrics": f"{cluster.gateway_url}/metrics",
        "look inside": f"kvctl status --scheduler {cluster.scheduler_address}",
        "logs": str(cluster.supervisor.log_folder),
    }


def watch(cluster: LocalCluster, stop: threading.Event) -> None:
    """Until `stop`: starts again what ended, and says so."""
    log = logging.getLogger("kvpool.serve")
    while not stop.wait(0.5):
        for process in cluster.supervisor.ended():
            log.warning("%s ended with code %s; starting it again", process.name, process.popen.returncode)
            cluster.restart(process.name)
