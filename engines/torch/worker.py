"""`EngineWorker`: an engine with its I/O, its service and its life lines, embeddable in any process."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import torch

from engines.torch.counters import Counters
from engines.torch.dispatch import DispatchConfig, Dispatcher
from engines.torch.engine import Engine
from engines.torch.exposure import Histogram
from engines.torch.hbm import block_memory
from engines.torch.hbm_source import HbmSource, StagingConfig
from engines.torch.limits import EngineConfig
from engines.torch.links import Links
from engines.torch.metrics import serve_metrics
from engines.torch.model import LoadedModel, load_model
from engines.torch.reports import HbmAnnouncements, NodeWatch, SchedulerLink
from engines.torch.service import EngineServer, Stream
from engines.torch.warming import warm_up
from engines.torch.wire import report
from kvpool import __version__
from kvpool.channels.tls import TlsConfig
from kvpool.core.errors import BadArgument
from kvpool.core.ids import Role, Tier
from kvpool.core.namespace import HASHES
from kvpool.service.announcer import SourceFacts
from kvpool.service.host import host_id
from kvpool.service.wire import namespace_to_proto
from kvpool.tiers.hbm import BlockMemory
from kvpool.v1 import engine_pb2, scheduler_pb2

log = logging.getLogger(__name__)

ROLES = {"prefill": Role.PREFILL, "decode": Role.DECODE, "both": Role.BOTH}
#: How long the first connection to the scheduler waits to be able to name the node.
_NODE_WAIT_S = 2.0


@dataclass(frozen=True)
class WorkerConfig:
    """Everything about a worker."""

    model: str = ""  # Hugging Face folder or hub id; not used where a loaded model is given
    scheduler: str = ""  # host:port; empty = none, the worker serves whoever connects
    node: str = ""  # host:port of the host's node; empty = no pool
    listen: str = "127.0.0.1:0"  # of the Engine service
    instance_id: str = "worker-0"  # unique in the cluster
    role: str = "both"  # "prefill", "decode", "both"
    served_name: str = ""  # model name for clients; empty = the folder's
    kv_tokens: int = 32768  # capacity of the KV cache
    block_tokens: int = 64
    chunk_tokens: int = 512  # prompt tokens a step at most
    batch_max: int = 32  # requests admitted at a time
    waiting_max: int = 256  # requests that wait for admission; one more is refused
    threads: int = 1  # CPU threads of a step; 0 = torch's choice
    dtype: str = "auto"  # of weights and KV; auto = float32 on the CPU, bfloat16 on CUDA
    device: str = "auto"  # auto = cuda where there is one
    deterministic: bool = False
    block_hash: str = HASHES[0]  # "sha256/1" where several tenants share a cluster: it resists made-up collisions
    warm_up: bool = True  # compute made-up prompts before serving: no first request waits for compilers
    credential: str = ""
    tls: TlsConfig | None = None  # of all that it serves and calls
    handoff_grace_s: float = 1.0  # DECODE: how long blocks may still appear after the first token
    pull_s_max: float = 300.0  # DECODE: how long to wait for blocks at most; then they are computed
    publish_jobs_max: int = 1024  # batches of blocks that wait to be published; more are given up
    hbm_staging_bytes: int = 0  # of host memory, through which others pull blocks of this HBM; 0 = they can't
    metrics_port: int = 0  # of Prometheus metrics over HTTP; 0 = none
    gpu: str = ""  # hardware, for plans and costs; empty = not said
    tp: int = 1  # GPUs that serve this copy of the model
    price_per_hour: float = 0.0  # of all of them, for plans
    role_changeable: bool = False  # the scheduler may give it another role
    segment_dir: str = "/dev/shm"  # where that memory lies; where there is no room the HBM is no source

    def engine(self) -> EngineConfig:
        return EngineConfig(
            block_tokens=self.block_tokens,
            kv_tokens=self.kv_tokens,
            chunk_tokens=self.chunk_tokens,
            batch_max=self.batch_max,
            waiting_max=self.waiting_max,
            deterministic=self.deterministic,
            block_hash=self.block_hash,
        )


class EngineWorker:
    """A worker. Use as a context manager, or call `start` and `stop` once each.

    Args:
        model: a model that is loaded already, in place of `config.model`.
        memory: makes what brings blocks out of and into the cache, from the cache tensor.
    """

    def __init__(
        self,
        config: WorkerConfig,
        *,
        model: LoadedModel | None = None,
        memory: Callable[[torch.Tensor], BlockMemory] = block_memory,
    ) -> None:
        if config.role not in ROLES:
            raise BadArgument(f"role {config.role!r} is not one of {', '.join(ROLES)}")
        if config.threads:
            torch.set_num_threads(config.threads)
        self.config = config
        self.model = model or _load(config)
        self.epoch = time.time_ns()
        #: What it announces: new requests come by it. Requests of another phase that were placed before are served.
        self.role = ROLES[config.role]
        self.engine = Engine(self.model, config.engine())
        self._memory = memory(self.engine.cache)
        self._counters = Counters()
        self._links = Links(
            self.engine.namespace, client=config.instance_id, credential=config.credential, tls=config.tls
        )
        self._dispatcher = Dispatcher(
            self.engine,
            self._memory,
            self._links,
            self._counters,
            DispatchConfig(
                node=config.node,
                handoff_grace_s=config.handoff_grace_s,
                pull_s_max=config.pull_s_max,
                publish_jobs_max=config.publish_jobs_max,
            ),
            on_changes=self._on_changes,
            on_news=self._on_news,
        )
        self._source = self._make_source() if config.hbm_staging_bytes else None
        self._server = EngineServer(
            self, config.listen, credential=config.credential, companion=self._source, tls=config.tls
        )
        self._watch: NodeWatch | None = None
        self._link: SchedulerLink | None = None
        self._hbm: HbmAnnouncements | None = None
        self._stop_metrics: Callable[[], None] | None = None
        self._draining = threading.Event()

    # ------------------------------------------------------------ life

    def start(self) -> None:
        """Serves from its return on. Raises: Unavailable if an address can't be bound."""
        if self.config.warm_up:
            self._dispatcher.keep_samples(warm_up(self.engine))
        self._server.start()
        self._dispatcher.start()
        if self.config.metrics_port:
            _, self._stop_metrics = serve_metrics(
                self.config.metrics_port, self.config.instance_id, self.counters, self.exposures
            )
        if self.config.node:
            self._watch = NodeWatch(self._ask_node, self._on_node_found)
            self._watch.start()
            self._watch.wait(_NODE_WAIT_S)
        if self.config.scheduler:
            self._hbm = HbmAnnouncements(
                self.config.scheduler,
                self._source_facts(self.address if self._source is not None and self._source.serving else ""),
                block_bytes=self._memory.block_bytes,
                credential=self.config.credential,
                tls=self.config.tls,
            )
            self._hbm.start()
            self._link = SchedulerLink(
                self.config.scheduler, info=self.info, report=self._report, on_role=self._on_role,
                credential=self.config.credential, tls=self.config.tls,
            )  # fmt: skip
            self._link.start()
        log.info("%s serves %s on %s", self.config.instance_id, self.model.name, self.address)

    def stop(self) -> None:
        """Ends the life lines, then the streams (their requests are aborted), then the I/O."""
        self._draining.set()
        for line in (self._link, self._hbm, self._watch):
            if line is not None:
                line.close()
        if self._stop_metrics is not None:
            self._stop_metrics()
        self._server.close()
        self._dispatcher.close()
        self._links.close()

    def __enter__(self) -> EngineWorker:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def wait_joined(self, timeout_s: float) -> bool:
        """Whether the scheduler knows instance and HBM within the time."""
        if self._link is None or self._hbm is None:
            return False
        end = time.monotonic() + timeout_s
        return self._link.wait_joined(timeout_s) and self._hbm.wait_attached(max(0.0, end - time.monotonic()))

    # ------------------------------------------------------------ facts

    @property
    def address(self) -> str:
        """Where the Engine service is reached."""
        return f"{self._public_host}:{self._server.port}"

    @property
    def _public_host(self) -> str:
        host = self.config.listen.rpartition(":")[0]
        return socket.gethostname() if host in ("", "0.0.0.0", "[::]") else host

    def counters(self) -> dict[str, int]:
        return self._counters.snapshot()

    def exposures(self) -> dict[str, Histogram]:
        """How much of the hand-offs that it decoded it had to wait for, since the start; by metric name."""
        return self._dispatcher.exposures.histograms()

    def idle(self) -> bool:
        """Whether nothing is under way: no request, no block lent to I/O."""
        return self._dispatcher.idle()

    def info(self) -> engine_pb2.EngineInfo:
        config = self.config
        return engine_pb2.EngineInfo(
            instance_id=config.instance_id,
            epoch=self.epoch,
            role=int(self.role),  # type: ignore[arg-type]
            model=config.served_name or self.model.name,
            namespace=namespace_to_proto(self.engine.namespace),
            context_tokens_max=self.model.context_tokens_max,
            kv_tokens_total=self.engine.load().kv_tokens_total,
            batch_max=config.batch_max,
            address=self.address,
            host_id=host_id(),
            hbm_source_id=self._hbm_source_id,
            node_source_id=self._watch.source_id if self._watch is not None else "",
            node_address=config.node,
            tokenizer=self.model.path or config.model,
            eos_token_ids=self.model.eos_token_ids,
            chunk_tokens=config.chunk_tokens,
            deterministic=config.deterministic,
            version=__version__,
            gpu=config.gpu,
            tp=config.tp,
            price_per_hour=config.price_per_hour,
            role_changeable=config.role_changeable,
        )

    @property
    def _hbm_source_id(self) -> str:
        return f"{self.config.instance_id}/hbm"

    def _make_source(self) -> HbmSource:
        config = self.config
        host = config.listen.rpartition(":")[0]
        return HbmSource(
            self.engine.namespace,
            self._source_facts(),
            StagingConfig(config.hbm_staging_bytes, config.segment_dir, host, self._public_host, config.tls),
            cached=self._dispatcher,
            memory=self._memory,
            counters=self._counters,
        )

    def _source_facts(self, address: str = "") -> SourceFacts:
        return SourceFacts(
            source_id=self._hbm_source_id,
            epoch=self.epoch,
            tier=Tier.HBM,
            address=address,
            host_id=host_id(),
            instance_id=self.config.instance_id,
            bytes_total=self._memory.block_count * self._memory.block_bytes,
        )

    def _report(self) -> scheduler_pb2.InstanceReport:
        load = self._dispatcher.load()
        return report(
            self._dispatcher.take_samples(),
            self._links.take_samples(),
            running=load.running,
            waiting=load.waiting,
            kv_tokens_free=load.kv_tokens_free,
            draining=self._draining.is_set(),
            role=self.role,
        )

    def _on_role(self, role: Role) -> None:
        """The scheduler wants another role. Nothing that runs is touched: the role says what is placed here next."""
        if not self.config.role_changeable:
            log.warning("%s keeps its role: it was not started with --role-changeable", self.config.instance_id)
            return
        if role is not self.role:
            log.info("%s takes role %s, and had %s", self.config.instance_id, role.name.lower(), self.role.name.lower())
            self.role = role
        self._on_news()

    # ------------------------------------------------------------ what the service asks for

    def submit(self, stream: Stream, submit: engine_pb2.Submit) -> None:
        self._dispatcher.submit(stream, submit)

    def first_token(self, stream: Stream, first: engine_pb2.FirstToken) -> None:
        self._dispatcher.first_token(stream, first)

    def abort(self, stream: Stream, request_id: str) -> None:
        self._dispatcher.abort(stream, request_id)

    def stream_ended(self, stream: Stream) -> None:
        self._dispatcher.stream_ended(stream)

    # ------------------------------------------------------------ news from below

    def _ask_node(self) -> str:
        with self._links.client(self.config.node) as client:
            return client.source_id

    def _on_node_found(self) -> None:
        if self._link is not None:
            self._link.rejoin()

    def _on_changes(self, changes: list[tuple[bool, bytes]]) -> None:
        # What is announced can be pulled.
        if self._source is not None:
            self._source.changed(changes)
        if self._hbm is not None:
            self._hbm.publish(changes)

    def _on_news(self) -> None:
        if self._link is not None:
            self._link.wake()


def _load(config: WorkerConfig) -> LoadedModel:
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = config.dtype
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    return load_model(config.model, name=config.served_name, dtype=dtype, device=device)
