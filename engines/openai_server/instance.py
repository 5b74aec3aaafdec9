"""One server as an instance of the cluster: it joins while the server answers, and leaves when it does not.

The scheduler sees what it sees of any worker: facts, a report twice a second, blocks in HBM. Its own thread looks at
the server; the life lines have threads of their own, so that a server that hangs can't hold up a heartbeat for long.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from engines.openai_server.cache_mirror import CacheMirror, Change
from engines.openai_server.event_feed import EventFeed
from engines.openai_server.kv_events import Cleared, Message
from engines.openai_server.server_page import Refused, ServerFacts, ServerPage
from engines.openai_server.settings import ServerSettings
from engines.openai_server.vllm_metrics import STARTED, Load, LoadTracker, PrefillSample, StepSample
from engines.torch.reports import HbmAnnouncements, NodeWatch, SchedulerLink
from kvpool.channels.tls import TlsConfig
from kvpool.client import PoolClient
from kvpool.core.engine_keys import EngineNaming
from kvpool.core.errors import KvpoolError, Unavailable
from kvpool.core.ids import Role, Tier
from kvpool.core.namespace import GroupKind, GroupSpec, NamespaceSpec
from kvpool.service.announcer import SourceFacts
from kvpool.service.host import host_id
from kvpool.service.wire import namespace_to_proto
from kvpool.v1 import engine_pb2, scheduler_pb2

log = logging.getLogger(__name__)

_ROLES = {"prefill": Role.PREFILL, "decode": Role.DECODE, "both": Role.BOTH}
#: The server renders its page anew for each look, which costs it some milliseconds.
LOOK_S = 1.0
#: A server that does not answer for so long has left; one that refuses connections has left at once.
LOST_S = 10.0
#: Between attempts to learn a connector's mask, and for each but the first, which must not hold up a join.
_MASK_RETRY_S, _MASK_FIRST_S, _MASK_S = 10.0, 5.0, 60.0
RETRY_S = 1.0
#: Samples between two reports; beyond it the oldest go.
_SAMPLES_MAX = 64
_NODE_WAIT_S = 2.0


@dataclass(frozen=True)
class AgentContext:
    """What all servers of an agent have in common."""

    scheduler: str
    credential: str = ""
    api_key: str = ""
    tls: TlsConfig | None = None


class CacheAnnouncer:
    """What the server's cache holds, from its events to the directory. `keys_held` of the mirror."""

    def __init__(
        self, settings: ServerSettings, naming: EngineNaming, namespace: bytes, lines: HbmAnnouncements
    ) -> None:
        self._mirror = CacheMirror(naming, namespace)
        self._lines = lines
        self._reported = self._cleared = False
        self._feed = EventFeed(
            settings.events, settings.replay, topic=settings.topic, take=self._take, forget=self._forget
        )

    def start(self) -> None:
        self._feed.start()

    def close(self) -> None:
        self._feed.close()

    @property
    def blocks(self) -> int:
        return len(self._mirror)

    def take_cleared(self) -> bool:
        """Whether the engine has emptied its cache since this was asked last."""
        cleared, self._cleared = self._cleared, False
        return cleared

    def _take(self, message: Message) -> None:
        self._cleared = self._cleared or any(isinstance(event, Cleared) for event in message.events)
        self._publish(self._mirror.apply(message))
        if self._mirror.counts.other_hash and not self._reported:
            self._reported = True
            log.warning(
                "the engine's block hashes are others than computed here, so its cache is not seen: "
                "if PYTHONHASHSEED is set for it, say so with hash_seed"
            )

    def _forget(self) -> None:
        self._publish(self._mirror.clear())

    def _publish(self, changes: list[Change]) -> None:
        self._lines.publish(changes)


class ServerInstance:
    """One server, from `start` to `stop`."""

    def __init__(self, settings: ServerSettings, context: AgentContext) -> None:
        self.settings = settings
        self._context = context
        self._page = ServerPage(settings.address, context.api_key)
        self._facts: ServerFacts | None = None
        self._epoch, self._mask, self._mask_due_s = 0, b"", float("inf")
        self._load = Load()
        self._tracker = LoadTracker(0)
        self._prefill: deque[PrefillSample] = deque(maxlen=_SAMPLES_MAX)
        self._steps: deque[StepSample] = deque(maxlen=_SAMPLES_MAX)
        self._samples_lock = threading.Lock()
        self._link: SchedulerLink | None = None
        self._hbm: HbmAnnouncements | None = None
        self._side: HbmAnnouncements | None = None
        self._cache: CacheAnnouncer | None = None
        self._watch: NodeWatch | None = None
        #: A server that is busy answers late: its load is looked at meanwhile.
        self._asking = ThreadPoolExecutor(1, thread_name_prefix="server-mask")
        self._asked: Future[bytes] | None = None
        self._role = _ROLES[settings.role]
        self._joined = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"server-{settings.instance_id}", daemon=True)

    # ------------------------------------------------------------ life

    def start(self) -> None:
        if self.settings.node:
            self._watch = NodeWatch(self._ask_node, self._node_found)
            self._watch.start()
        self._thread.start()

    def begin_stop(self) -> None:
        """Begins to leave; `stop` waits for the end."""
        self._closing.set()

    def stop(self) -> None:
        self.begin_stop()
        self._thread.join(10.0)
        if self._watch is not None:
            self._watch.close()
        self._asking.shutdown(wait=False, cancel_futures=True)
        self._page.close()

    def wait_joined(self, timeout_s: float) -> bool:
        """Whether the server answered and the scheduler knows it, within the time."""
        until_s = time.monotonic() + timeout_s
        if not self._joined.wait(timeout_s):
            return False
        link = self._link
        return link is not None and link.wait_joined(max(0.0, until_s - time.monotonic()))

    @property
    def blocks(self) -> int:
        """Blocks of its cache that are known."""
        cache = self._cache
        return cache.blocks if cache is not None else 0

    def _run(self) -> None:
        silent_since_s, told = time.monotonic(), ""
        while not self._closing.is_set():
            try:
                self._look()
                silent_since_s, told = time.monotonic(), ""
            except KvpoolError as error:
                gone = isinstance(error, Refused) or time.monotonic() - silent_since_s > LOST_S
                if self._facts is not None and (gone or not isinstance(error, Unavailable)):
                    log.warning("%s has left: %s", self.settings.instance_id, error)
                    self._leave()
                elif self._facts is None and type(error).__name__ != told:
                    told = type(error).__name__
                    log.info("%s is not there yet: %s%s", self.settings.instance_id, error, _hint(error))
            except Exception:
                # Without its thread an instance would stay as it was last seen.
                log.exception("looking at %s failed", self.settings.instance_id)
                self._leave()
            self._closing.wait(LOOK_S if self._facts is not None else RETRY_S)
        self._leave()

    def _look(self) -> None:
        """Raises: KvpoolError."""
        if self._facts is None:
            try:
                self._join(self._page.facts())
            except Exception:
                self._leave()  # or it would be there by half
                raise
            return
        if self._mask_is_due():
            self._mask_due_s = time.monotonic() + _MASK_S + _MASK_RETRY_S
            self._asked = self._asking.submit(self._page.pool_mask, self._facts.model, _MASK_S)
        if self._asked is not None and self._asked.done():
            if self._mask_has_changed(self._asked):
                log.info("%s names its blocks in the pool otherwise now", self.settings.instance_id)
                self._leave()  # and joins with that
                return
            self._asked = None
        page = self._page.metrics()
        if page.value(STARTED) != self._facts.started:
            self._leave()
            return
        load = self._tracker.look(page)
        with self._samples_lock:
            self._load = load
            self._prefill.extend(load.prefill)
            self._steps.extend(load.steps)

    def _mask_is_due(self) -> bool:
        """Whether the mask is not known yet, or may be another: with the caches outside, that of names is reset too."""
        cleared = self._cache is not None and self._cache.take_cleared()
        return bool(self.settings.node) and (cleared or time.monotonic() > self._mask_due_s)

    def _learns_mask(self, model: str, timeout_s: float) -> bool:
        """Asks for it. A request waits behind others of the server: what is not told in time is asked for later."""
        try:
            self._mask = self._page.pool_mask(model, timeout_s)
        except Refused:
            raise
        except Unavailable:
            return False
        return True

    def _mask_has_changed(self, asked: Future[bytes]) -> bool:
        try:
            mask = asked.result()
        except KvpoolError:
            return False  # asked again when it is due
        before, self._mask, self._mask_due_s = self._mask, mask, float("inf")
        return mask != before

    def _join(self, facts: ServerFacts) -> None:
        settings, context = self.settings, self._context
        self._epoch = time.time_ns()
        self._mask_due_s = float("inf")
        if settings.node and not self._learns_mask(facts.model, _MASK_FIRST_S):
            self._mask_due_s = time.monotonic() + _MASK_RETRY_S
        self._tracker = LoadTracker(facts.cache.kv_tokens)
        self._load = self._tracker.look(self._page.metrics())
        self._facts = facts
        log.info(
            "%s serves %s (vLLM %s, %d KV tokens)", settings.instance_id, facts.model, facts.version,
            facts.cache.kv_tokens,
        )  # fmt: skip
        if self._watch is not None:
            self._watch.wait(_NODE_WAIT_S)
        if settings.events:
            self._hbm = self._source("hbm")
            self._cache = CacheAnnouncer(settings, self._naming(facts), self._namespace(facts).id(), self._hbm)
            self._cache.start()
        if settings.handoff == "nixl":
            # An empty source stands for the server's side channel: to the scheduler a hand-off is a way from a server
            # to a node to a server, and this is the node of one that hands over by itself. Nothing is pulled from it.
            self._side = self._source("nixl", address=settings.address)
        self._link = SchedulerLink(
            context.scheduler, info=self._info, report=self._report, on_role=self._on_role,
            credential=context.credential, tls=context.tls,
        )  # fmt: skip
        self._link.start()
        self._joined.set()

    def _leave(self) -> None:
        self._joined.clear()
        self._asked = None
        parts: list[SchedulerLink | HbmAnnouncements | CacheAnnouncer | None] = [
            self._link, self._cache, self._hbm, self._side,
        ]  # fmt: skip
        self._link = self._cache = self._hbm = self._side = None
        for part in parts:
            if part is not None:
                part.close()
        self._facts = None  # last: the life lines ask for them

    def _source(self, name: str, address: str = "") -> HbmAnnouncements:
        assert self._facts is not None
        cache, context = self._facts.cache, self._context
        source = HbmAnnouncements(
            context.scheduler,
            SourceFacts(
                source_id=f"{self.settings.instance_id}/{name}",
                epoch=self._epoch,
                tier=Tier.HBM,
                address=address,
                host_id=self._host_id,
                instance_id=self.settings.instance_id,
                bytes_total=cache.kv_tokens // cache.block_tokens * self.settings.block_bytes,
            ),
            block_bytes=self.settings.block_bytes,
            credential=context.credential,
            tls=context.tls,
        )
        source.start()
        return source

    # ------------------------------------------------------------ what it says

    @property
    def _host_id(self) -> str:
        return self.settings.host_id or host_id()

    def _naming(self, facts: ServerFacts) -> EngineNaming:
        cache = facts.cache
        return EngineNaming.of_engine(cache.algorithm, cache.hash_tokens, self.settings.hash_seed, self._mask)

    def _namespace(self, facts: ServerFacts) -> NamespaceSpec:
        """Tells the scheduler which instances can hand over to each other, and the gateway how blocks are named.

        It is not the namespace of the connector's blocks, which only the engine knows.
        """
        cache, naming = facts.cache, self._naming(facts)
        group = GroupSpec(0, GroupKind.FULL, (0,), cache.block_tokens, 1, 1, self.settings.block_bytes)
        hash_name = "xxh3_128/1" if naming.own else "sha256/1"
        return NamespaceSpec(
            facts.model, "", cache.dtype, f"vllm {facts.version}", naming.layout, hash_name, (group,)
        )  # fmt: skip

    def _node_source_id(self) -> str:
        if self.settings.handoff == "nixl":
            return f"{self.settings.instance_id}/nixl"
        if self.settings.handoff == "pool" and self._watch is not None:
            return self._watch.source_id
        return ""

    def _info(self) -> engine_pb2.EngineInfo:
        facts, settings = self._facts, self.settings
        assert facts is not None
        return engine_pb2.EngineInfo(
            instance_id=settings.instance_id,
            epoch=self._epoch,
            role=int(self._role),  # type: ignore[arg-type]
            role_changeable=settings.role_changeable,
            model=facts.model,
            namespace=namespace_to_proto(self._namespace(facts)),
            context_tokens_max=facts.context_tokens,
            kv_tokens_total=facts.cache.kv_tokens,
            batch_max=settings.batch_max,
            address=settings.address,
            host_id=self._host_id,
            hbm_source_id=f"{settings.instance_id}/hbm" if settings.events else "",
            node_source_id=self._node_source_id(),
            node_address=settings.node,
            tokenizer=settings.tokenizer or facts.tokenizer,
            version=f"vllm {facts.version}",
            protocol="openai",
        )

    def _report(self) -> scheduler_pb2.InstanceReport:
        with self._samples_lock:
            load = self._load
            prefill, steps = list(self._prefill), list(self._steps)
            self._prefill.clear()
            self._steps.clear()
        return scheduler_pb2.InstanceReport(
            running=load.running,
            waiting=load.waiting,
            kv_tokens_free=load.kv_tokens_free,
            prefill=[
                scheduler_pb2.PrefillSample(
                    new_tokens=s.new_tokens, cached_tokens=s.cached_tokens, duration_us=s.duration_us
                )
                for s in prefill
            ],
            decode=[
                scheduler_pb2.DecodeSample(batch=s.batch, kv_tokens=s.kv_tokens, duration_us=s.duration_us)
                for s in steps
            ],
            role=int(self._role),  # type: ignore[arg-type]
        )

    def _on_role(self, role: Role) -> None:
        """What runs on the server goes on: the role says what is placed there next."""
        if not self.settings.role_changeable:
            log.warning("%s keeps its role: role_changeable is not set", self.settings.instance_id)
            return
        self._role = role
        if self._link is not None:
            self._link.wake()

    # ------------------------------------------------------------ the node

    def _ask_node(self) -> str:
        context = self._context
        with PoolClient(
            self.settings.node, client=self.settings.instance_id, credential=context.credential, tls=context.tls
        ) as client:
            return client.source_id

    def _node_found(self) -> None:
        link = self._link
        if link is not None:
            link.rejoin()


def _hint(error: KvpoolError) -> str:
    return f" ({error.hint})" if error.hint else ""
