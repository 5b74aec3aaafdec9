"""Tells a directory what a source holds: the life line `Directory.Attach`, for a node's DRAM as for a worker's HBM.

It has a thread and an event loop of its own, so that no data work or computing can starve its heartbeats. It connects
again by itself, with back-off; nothing that it does blocks the source.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc
import grpc.aio
import numpy as np

from kvpool.core.changes import BlockChange
from kvpool.core.ids import Fidelity, KeyArray, Tier
from kvpool.service.event_log import EventLog
from kvpool.service.rpc import make_aio_channel
from kvpool.service.wire import change_to_proto
from kvpool.v1 import common_pb2, directory_pb2, directory_pb2_grpc

log = logging.getLogger(__name__)

SNAPSHOT_PART_KEYS = 65_536
BATCH_KEYS_MAX = 16_384
#: Changes wait this long for company, so that a burst of commits is one message.
GATHER_S = 0.005
HEARTBEAT_DEFAULT_S = 1.0
CONNECT_TIMEOUT_S = 3.0
BACKOFF_MIN_S, BACKOFF_MAX_S = 0.1, 1.0


@dataclass(frozen=True)
class SourceFacts:
    """What a source says about itself when it attaches."""

    source_id: str
    epoch: int
    tier: Tier
    address: str = ""  # of its BlockSource service; empty where blocks can't be pulled from it
    host_id: str = ""
    instance_id: str = ""
    bytes_total: int = 0


class Announcer:
    """The life line of one source to one directory.

    Args:
        snapshot: all keys held and the number of the last `publish` that they include; called in another thread.
        usage: (bytes used, blocks); called in another thread, must be quick.
    """

    def __init__(
        self,
        address: str,
        facts: SourceFacts,
        *,
        snapshot: Callable[[], tuple[KeyArray, int]],
        usage: Callable[[], tuple[int, int]] = lambda: (0, 0),
        credential: str = "",
    ) -> None:
        self._address, self._facts, self._credential = address, facts, credential
        self._snapshot, self._usage = snapshot, usage
        self._log = EventLog()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake: asyncio.Event | None = None
        self._stop: asyncio.Event | None = None
        self._ready = threading.Event()
        self._attached = threading.Event()
        self._attachments = 0
        self._thread = threading.Thread(target=self._main, name="announcer", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._ready.wait(10.0)

    def publish(self, changes: Sequence[BlockChange]) -> int:
        """Queues changes, in order. Returns the number of this batch. Never blocks; from any thread."""
        number = self._log.append(changes)
        loop, wake = self._loop, self._wake
        if loop is not None and wake is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody is told any more
                loop.call_soon_threadsafe(wake.set)
        return number

    @property
    def last_number(self) -> int:
        """Number of the last batch published; 0 before the first."""
        return self._log.last_number

    @property
    def attached(self) -> bool:
        """Whether the directory knows this source and has its snapshot."""
        return self._attached.is_set()

    @property
    def attachments(self) -> int:
        """Times the source was attached since the start."""
        return self._attachments

    def wait_attached(self, timeout_s: float) -> bool:
        return self._attached.wait(timeout_s)

    def close(self, timeout_s: float = 2.0) -> None:
        """Ends the life line: the directory forgets the source at once."""
        if self._loop is not None and self._stop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(timeout_s)

    # ------------------------------------------------------------ the thread

    def _main(self) -> None:
        asyncio.run(self._run())

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._wake, self._stop = asyncio.Event(), asyncio.Event()
        self._ready.set()
        line = asyncio.create_task(self._keep_attached())
        await self._stop.wait()
        line.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await line

    async def _keep_attached(self) -> None:
        backoff_s = BACKOFF_MIN_S
        while True:
            try:
                async with make_aio_channel(self._address, credential=self._credential) as channel:
                    await self._attach(channel)
            except (grpc.RpcError, asyncio.InvalidStateError, TimeoutError, OSError) as error:
                code = error.code().name if isinstance(error, grpc.aio.AioRpcError) else type(error).__name__
                level = logging.INFO if self._attached.is_set() else logging.DEBUG
                log.log(level, "%s: life line to the directory at %s: %s", self._facts.source_id, self._address, code)
            except Exception:
                # A bug of ours must not end the life line for good: say so, and begin again.
                log.exception("%s: the life line failed", self._facts.source_id)
            if self._attached.is_set():
                self._attached.clear()
                backoff_s = BACKOFF_MIN_S
            await asyncio.sleep(backoff_s)
            backoff_s = min(backoff_s * 2, BACKOFF_MAX_S)

    async def _attach(self, channel: grpc.aio.Channel) -> None:
        await asyncio.wait_for(channel.channel_ready(), CONNECT_TIMEOUT_S)
        call = directory_pb2_grpc.DirectoryStub(channel).Attach()
        await call.write(directory_pb2.SourceMessage(hello=self._hello()))
        line = _Line(call, HEARTBEAT_DEFAULT_S)
        # The directory's first answer says how often to report; a source sends its snapshot then in any case.
        await line.receive(await asyncio.wait_for(call.read(), CONNECT_TIMEOUT_S))
        await self._send_snapshot(line)
        self._attached.set()
        self._attachments += 1
        log.info("%s: attached to the directory at %s", self._facts.source_id, self._address)
        tasks = [
            asyncio.create_task(c) for c in (self._read(line), self._send_changes(line), self._send_heartbeats(line))
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            call.cancel()

    def _hello(self) -> directory_pb2.SourceHello:
        f = self._facts
        return directory_pb2.SourceHello(
            source_id=f.source_id, epoch=f.epoch, tier=int(f.tier), address=f.address, host_id=f.host_id,
            instance_id=f.instance_id, bytes_total=f.bytes_total,
        )  # fmt: skip

    async def _read(self, line: _Line) -> None:
        assert self._wake is not None
        while True:
            # No deadline of its own: a directory that is gone or stuck is found by the channel's keepalive.
            await line.receive(await line.call.read())
            if line.snapshot_wanted:
                self._wake.set()

    async def _send_changes(self, line: _Line) -> None:
        assert self._wake is not None
        while True:
            self._wake.clear()
            changes = None if line.snapshot_wanted else self._log.take(BATCH_KEYS_MAX)
            if changes is None:
                await self._send_snapshot(line)
            elif changes:
                events = [change_to_proto(change) for change in changes]
                await line.send(
                    directory_pb2.SourceMessage(events=directory_pb2.EventBatch(seq=line.seq + 1, events=events))
                )
                line.seq += 1
            else:
                await self._wake.wait()
                await asyncio.sleep(GATHER_S)

    async def _send_snapshot(self, line: _Line) -> None:
        """All keys, in parts, as of the batches sent so far."""
        line.snapshot_wanted = False
        keys, number = await asyncio.get_running_loop().run_in_executor(None, self._snapshot)
        self._log.snapshot_taken(number)
        keys = np.ascontiguousarray(keys)
        part_count = max(1, -(-len(keys) // SNAPSHOT_PART_KEYS))
        for part in range(part_count):
            piece = keys[part * SNAPSHOT_PART_KEYS : (part + 1) * SNAPSHOT_PART_KEYS]
            snapshot = directory_pb2.Snapshot(
                seq=line.seq, part=part, last=part == part_count - 1,
                keys=common_pb2.KeyList(keys=piece.tobytes()), fidelity=int(Fidelity.EXACT),
            )  # fmt: skip
            await line.send(directory_pb2.SourceMessage(snapshot=snapshot))

    async def _send_heartbeats(self, line: _Line) -> None:
        while True:
            bytes_used, blocks = self._usage()
            beat = directory_pb2.SourceHeartbeat(bytes_used=bytes_used, blocks=blocks)
            await line.send(directory_pb2.SourceMessage(heartbeat=beat))
            await asyncio.sleep(line.heartbeat_s)


class _Line:
    """One attached stream: its numbers, and what the directory last said."""

    def __init__(self, call: grpc.aio.StreamStreamCall, heartbeat_s: float) -> None:
        self.call, self.heartbeat_s = call, heartbeat_s
        self.seq = 0
        self.snapshot_wanted = False
        self._sending = asyncio.Lock()

    async def send(self, message: directory_pb2.SourceMessage) -> None:
        # One write at a time: grpc.aio refuses a second one.
        async with self._sending:
            await self.call.write(message)

    async def receive(self, message: object) -> None:
        if message is grpc.aio.EOF:
            raise ConnectionResetError("the directory ended the stream")
        assert isinstance(message, directory_pb2.DirectoryMessage)
        self.snapshot_wanted |= message.want_snapshot
        if message.heartbeat_interval_ms:
            self.heartbeat_s = message.heartbeat_interval_ms / 1000
