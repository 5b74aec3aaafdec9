"""The thread that computes, and what connects it with streams and I/O.

All of the engine's state belongs to this thread. Others post what they want done to its inbox; after each step it hands
out events (one batch a stream), pulls, exports and changes of the prefix cache.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from engines.torch import wire
from engines.torch.counters import Counters
from engines.torch.engine import Engine, monotonic_us
from engines.torch.exposure import ExposureMeter
from engines.torch.holds import HoldSweeper
from engines.torch.links import Links
from engines.torch.publishing import Handoff, Publisher, PublishJob
from engines.torch.pulling import Puller, PullJob
from engines.torch.record import Record
from engines.torch.request import BlockSet, Finish, Load, Phase, Samples, StepEvent
from engines.torch.service import Stream
from kvpool.core.errors import KvpoolError, Overloaded, UnknownRequest
from kvpool.tiers.hbm import BlockMemory
from kvpool.v1 import engine_pb2

log = logging.getLogger(__name__)

#: Submits that wait for the computing thread; one more is refused.
INBOX_MAX = 4096
#: The computing thread looks at deadlines at least this often.
IDLE_WAIT_S = 1.0
STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class DispatchConfig:
    """See WorkerConfig."""

    node: str
    handoff_grace_s: float
    pull_s_max: float
    publish_jobs_max: int


class Dispatcher:
    """Runs an engine.

    Args:
        on_changes: changes of the prefix cache, in order; called in the computing thread.
        on_news: something worth a report has happened; called in the computing thread.
    """

    def __init__(
        self,
        engine: Engine,
        memory: BlockMemory,
        links: Links,
        counters: Counters,
        config: DispatchConfig,
        *,
        on_changes: Callable[[list[tuple[bool, bytes]]], None],
        on_news: Callable[[], None],
    ) -> None:
        self._engine, self._links, self._counters, self._config = engine, links, counters, config
        self._on_changes, self._on_news = on_changes, on_news
        self._sweeper = HoldSweeper(links)
        self._puller = Puller(
            memory,
            links,
            counters,
            on_arrived=lambda job, count, size: self._post(lambda: engine.blocks_arrived(job.pull, count, size)),
            on_read=lambda job, keys: self._sweeper.free(job.handoff, job.hold, keys, after_s=0.0),
            on_ended=lambda job: self._post(lambda: self._pull_ended(job)),
            # An aborted request's job may linger beside its successor's.
            jobs_max=2 * engine.config.batch_max,
            grace_s=config.handoff_grace_s,
        )
        self._publisher = Publisher(
            memory,
            links,
            counters,
            on_ended=lambda job, count: self._post(lambda: self._export_ended(job, count)),
            jobs_max=config.publish_jobs_max,
        )
        self.exposures = ExposureMeter()
        self._records: dict[str, Record] = {}
        self._lent: dict[PublishJob, Record] = {}
        self._pulling = self._lent_to_readers = 0
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._outgoing: dict[Stream, list[engine_pb2.RequestEvent]] = {}
        self._load = engine.load()
        self._busy = False
        self._samples = Samples()
        self._samples_lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)

    # ------------------------------------------------------------ any thread

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Aborts everything, waits for I/O under way, ends the threads."""
        self._post(self._abort_all)
        self._puller.close()
        self._publisher.close()
        self._sweeper.close()
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(STOP_TIMEOUT_S)

    def submit(self, stream: Stream, submit: engine_pb2.Submit) -> None:
        if len(self._inbox) >= INBOX_MAX:
            self._counters.add("requests_refused")
            stream.send([wire.failure(submit.request_id, "too many requests wait at this worker")])
            return
        self._post(lambda: self._submit(stream, submit))

    def first_token(self, stream: Stream, first: engine_pb2.FirstToken) -> None:
        known_s = time.monotonic()  # here, not when the step under way is over
        self._post(lambda: self._first_token(stream, first, known_s))

    def abort(self, stream: Stream, request_id: str) -> None:
        self._post(lambda: self._abort(stream, request_id))

    def stream_ended(self, stream: Stream) -> None:
        self._post(lambda: self._stream_ended(stream))

    def lend_cached(self, keys: list[bytes], deliver: Callable[[BlockSet], None]) -> None:
        """Holds those blocks of the prefix cache that are there; `deliver` is called in the computing thread.

        Raises: Overloaded.
        """
        if len(self._inbox) >= INBOX_MAX:
            raise Overloaded("the computing thread has too much to do", hint="try again later")
        self._post(lambda: self._lend_cached(keys, deliver))

    def give_back(self, lent: BlockSet) -> None:
        """Ends what `lend_cached` began."""
        self._post(lambda: self._give_back(lent))

    def load(self) -> Load:
        return self._load

    def idle(self) -> bool:
        with self._wake:
            return not self._busy and not self._inbox

    def take_samples(self) -> Samples:
        with self._samples_lock:
            samples, self._samples = self._samples, Samples()
        return samples

    def _post(self, action: Callable[[], None]) -> None:
        with self._wake:
            self._inbox.append(action)
            self._wake.notify()

    # ------------------------------------------------------------ the computing thread

    def _run(self) -> None:
        while True:
            with self._wake:
                self._busy = bool(self._records or self._lent or self._pulling or self._lent_to_readers)
                while not (self._inbox or self._stopping or self._engine.has_work()):
                    if not self._wake.wait(self._patience_s()):
                        break
                if self._stopping:
                    return
                actions = list(self._inbox)
                self._inbox.clear()
                self._busy = True
            for action in actions:
                self._guarded(action)
            self._guarded(self._step)

    def _guarded(self, action: Callable[[], None]) -> None:
        """A bug or a lack of memory must not end the thread: all requests end with an error, and it goes on."""
        try:
            action()
        except Exception as error:
            log.exception("computing failed: %d requests end with an error", len(self._records))
            why = f"the engine failed: {type(error).__name__}: {error}"
            for request_id, record in list(self._records.items()):
                if self._engine.abort(request_id, Finish.ERROR, why) or record.last is not None:
                    continue  # it ends with the engine's word, or when its exports are back
                self._send(record.stream, wire.failure(request_id, why))
                self._forget(request_id, record)

    def _patience_s(self) -> float:
        deadline_us = self._engine.next_deadline_us()
        if deadline_us is None:
            return IDLE_WAIT_S
        return min(IDLE_WAIT_S, max(0.0, (deadline_us - monotonic_us()) / 1e6))

    def _step(self) -> None:
        engine = self._engine
        events = engine.step()
        # Before the events: a request that is handed off ends only when its exports are back.
        for pull in engine.take_pulls():
            self._begin_pull(pull)
        for export in engine.take_exports():
            self._begin_export(export)
        for event in events:
            self._deliver(event)
        changes = engine.take_changes()
        if changes:
            self._on_changes(changes)
        self._load = engine.load()
        self.keep_samples(engine.take_samples())
        for stream, batch in self._outgoing.items():
            stream.send(batch)
        self._outgoing.clear()

    def keep_samples(self, new: Samples) -> None:
        if not (new.prefill or new.decode or new.finished_prefills):
            return
        with self._samples_lock:
            self._samples.extend(new)
        if new.finished_prefills:
            self._on_news()

    # ------------------------------------------------------------ commands

    def _submit(self, stream: Stream, submit: engine_pb2.Submit) -> None:
        self._counters.add("requests")
        if stream.closed:
            return
        try:
            spec, pool = self._engine.namespace, bool(self._target(submit))
            request = wire.request(submit, spec, now_us=monotonic_us(), pool=pool)
            self._engine.submit(request)
        except KvpoolError as error:
            self._counters.add("requests_refused" if isinstance(error, Overloaded) else "requests_failed")
            self._send(stream, wire.failure(submit.request_id, str(error)))
            return
        old = self._records.get(submit.request_id)
        if old is not None:
            # Its computing is over, its name is taken: nothing more is said about it.
            old.last = None
        self._records[submit.request_id] = Record(stream, submit, wire.origins(submit), handoff=self._handoff(submit))

    def _handoff(self, submit: engine_pb2.Submit) -> Handoff | None:
        hold = wire.handoff_hold(submit)
        return None if hold is None else Handoff(self._target(submit), hold)

    def _target(self, submit: engine_pb2.Submit) -> str:
        """Address to publish to."""
        return submit.publish_to if ":" in submit.publish_to else self._config.node

    def _first_token(self, stream: Stream, first: engine_pb2.FirstToken, known_s: float) -> None:
        record = self._records.get(first.request_id)
        if record is None or record.stream is not stream:
            return
        try:
            self._engine.first_token(first.request_id, first.token_id)
        except UnknownRequest:
            return
        except KvpoolError as error:
            self._engine.abort(first.request_id, Finish.ERROR, str(error))
            return
        if not record.first_token_s:
            record.first_token_s = known_s
            if record.pull is not None:
                record.pull.first_token_s = known_s
            self._measure_exposure(record)
            self._sweep(record)

    def _abort(self, stream: Stream, request_id: str) -> None:
        record = self._records.get(request_id)
        if record is None or record.stream is not stream:
            return
        if record.handoff is not None:
            record.handoff.cancelled.set()  # what it hands off nobody will read
        if not self._engine.abort(request_id):
            self._forget(request_id, record)

    def _stream_ended(self, stream: Stream) -> None:
        names = [name for name, record in self._records.items() if record.stream is stream]
        if names:
            log.info("a gateway's stream has ended: %d requests are aborted", len(names))
            self._counters.add("streams_lost")
        for name in names:
            self._abort(stream, name)

    def _abort_all(self) -> None:
        for name, record in list(self._records.items()):
            self._abort(record.stream, name)

    # ------------------------------------------------------------ events

    def _deliver(self, event: StepEvent) -> None:
        record = self._records.get(event.request_id)
        if record is None:
            return
        self._counters.add("tokens_generated", len(event.tokens))
        if event.finish is Finish.HANDED_OFF and record.exports:
            record.last = StepEvent(event.request_id, (), event.finish, times=event.times)
            event = replace(event, finish=Finish.NONE)
        if event.finish is not Finish.NONE:
            if event.times is not None:
                record.complete(event.times)
            self._count_end(event)
            self._forget(event.request_id, record)
        self._send(record.stream, wire.event(event))

    def _count_end(self, event: StepEvent) -> None:
        if event.times is not None:
            self._counters.add("tokens_computed", event.times.computed_tokens)
        if event.finish is Finish.ABORT:
            self._counters.add("requests_aborted")
        elif event.finish is Finish.ERROR:
            self._counters.add("requests_failed")
        elif event.finish is Finish.HANDED_OFF:
            self._counters.add("requests_handed_off")
            self._counters.add("handoff_publish_us", event.times.publish_us if event.times is not None else 0)

    def _forget(self, request_id: str, record: Record) -> None:
        """Nothing more is said about a request. What it publishes goes on, unless it was aborted."""
        if self._records.get(request_id) is record:
            del self._records[request_id]
        record.last = None
        if record.pull is not None:
            record.pull.cancelled.set()
        if record.handoff is not None:
            self._publisher.end(record.handoff)
        self._sweep(record)

    def _send(self, stream: Stream, event: engine_pb2.RequestEvent) -> None:
        self._outgoing.setdefault(stream, []).append(event)

    # ------------------------------------------------------------ blocks in and out

    def _begin_pull(self, pull: BlockSet) -> None:
        record = self._records[pull.request_id]
        submit = record.submit
        handed = submit.phase == Phase.DECODE
        job = PullJob(
            pull,
            record.origins,
            handoff=submit.handoff_source if handed else "",
            hold=submit.handoff.request_id if handed else "",
            deadline_s=time.monotonic() + self._config.pull_s_max,
            first_token_s=record.first_token_s,
        )
        record.pull = job
        self._pulling += 1
        self._puller.submit(job)

    def _pull_ended(self, job: PullJob) -> None:
        self._pulling -= 1
        self._engine.pull_ended(job.pull)
        record = self._records.get(job.pull.request_id)
        if record is not None and record.pull is job:
            self._measure_exposure(record)

    def _measure_exposure(self, record: Record) -> None:
        exposed = record.measure_exposure()
        if exposed is not None:
            self.exposures.add(exposed)
            self._counters.add("handoff_read_us", exposed.read_us)
            self._counters.add("handoff_exposed_us", exposed.exposed_us)

    def _sweep(self, record: Record) -> None:
        """Arranges that the hand-off's holds are freed, once by when its blocks are all published, or never will be."""
        submit = record.submit
        if submit.phase == Phase.DECODE and submit.handoff_source and submit.handoff.request_id and not record.swept:
            record.swept = True
            config = self._engine.config
            keys = wire.prompt_keys(submit, config.block_tokens, config.block_hash)
            self._sweeper.free(
                submit.handoff_source, submit.handoff.request_id, keys, after_s=self._config.handoff_grace_s
            )

    def _begin_export(self, export: BlockSet) -> None:
        record = self._records[export.request_id]
        if record.handoff is not None and not len(export.following):
            record.handoff.prefill_over = True
        job = PublishJob(export, self._target(record.submit), record.handoff)
        record.exports += 1
        self._lent[job] = record
        self._publisher.submit(job)

    def _lend_cached(self, keys: list[bytes], deliver: Callable[[BlockSet], None]) -> None:
        lent = self._engine.lend_cached(keys)
        self._lent_to_readers += 1
        deliver(lent)

    def _give_back(self, lent: BlockSet) -> None:
        self._lent_to_readers -= 1
        self._engine.export_ended(lent)

    def _export_ended(self, job: PublishJob, count: int) -> None:
        self._engine.export_ended(job.export)
        record = self._lent.pop(job)
        record.exports -= 1
        record.published += count
        last = record.last
        if last is not None and not record.exports:
            record.last = None
            self._deliver(last)
