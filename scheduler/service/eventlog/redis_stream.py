"""One Redis stream, written and read by tasks of their own: connects again by itself and never blocks its owner."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from kvpool.core.errors import BadArgument
from scheduler.service.eventlog.messages import VERSION

log = logging.getLogger(__name__)

#: A command that takes longer means that Redis is down.
COMMAND_TIMEOUT_S = 2.0
CANCEL_AGAIN_S = 1.0
READ_BLOCK_MS = 500
READ_ENTRIES = 32
WRITE_ENTRIES = 32
GATHER_S = 0.003
BACKOFF_S_MIN, BACKOFF_S_MAX = 0.1, 1.0
FIELD_VERSION, FIELD_DATA = b"v", b"d"


def redacted(url: str) -> str:
    """A Redis URL without what may be secret."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{host}{port}{parts.path}"


class RedisStream:
    """The stream `name` at `url`. All callbacks come from the event loop's thread.

    Args:
        entries_max: Redis trims the stream to about this many entries.
        take: asked for up to so many entries to append; empty = nothing to say.
        received: (version, data) of each entry, in order.
        changed: whether the stream can be written and read, at each change.
    Raises: BadArgument for a wrong URL, or if the `redis` package is not there.
    """

    def __init__(
        self,
        url: str,
        name: str,
        entries_max: int,
        *,
        take: Callable[[int], Sequence[bytes]],
        received: Callable[[bytes | None, bytes | None], None],
        changed: Callable[[bool], None],
    ) -> None:
        self._url, self._name, self._entries_max = url, name, entries_max
        self._take, self._received, self._changed = take, received, changed
        self._check()
        self.up = False
        self.error = "not connected yet"
        self.entries_written = 0
        self._ups = {"writer": False, "reader": False}
        self._position: bytes | None = None
        self._work = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._tasks: list[asyncio.Task[None]] = []

    def _check(self) -> None:
        try:
            import redis  # noqa: F401
        except ImportError:
            raise BadArgument(
                "the event log needs the redis package", hint="pip install 'kvpool[redis]', or leave --redis out"
            ) from None
        try:
            parts = urlsplit(self._url)
            valid = parts.scheme in ("redis", "rediss", "unix") and bool(parts.hostname or parts.path)
            parts.port  # noqa: B018  (raises for a port that is none)
        except ValueError:
            valid = False
        if not valid:
            raise BadArgument(
                "the URL of the event log is not one of Redis",
                hint="write redis://[[user]:password@]host:port[/db], or rediss:// for TLS",
            )

    def start(self) -> None:
        self._tasks = [
            asyncio.create_task(self._keep("writer", self._write)),
            asyncio.create_task(self._keep("reader", self._read)),
        ]

    async def stop(self, flush_timeout_s: float = 0.5) -> None:
        """Writes what is waiting if that is quick, and ends."""
        if self.up:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), flush_timeout_s)
        left = set(self._tasks)
        while left:
            for task in left:
                task.cancel()
            # One that meets a timeout in the library is lost with it: said again until it is heard.
            _, left = await asyncio.wait(left, timeout=CANCEL_AGAIN_S)
        self._tasks = []

    def wake(self) -> None:
        """There is something to write."""
        self._idle.clear()
        self._work.set()

    # ------------------------------------------------------------ connections

    def _client(self) -> Any:
        from redis.asyncio import Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        # A command that was sent twice would be an entry that is there twice: no retries here.
        return Redis.from_url(
            self._url, socket_timeout=COMMAND_TIMEOUT_S, socket_connect_timeout=COMMAND_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0), single_connection_client=True, protocol=2, max_connections=2,
        )  # fmt: skip

    async def _keep(self, name: str, run: Callable[[Any], Awaitable[None]]) -> None:
        from redis.exceptions import RedisError

        backoff_s = BACKOFF_S_MIN
        while True:
            client = None
            try:
                client = self._client()
                await run(client)
            except (RedisError, OSError, TimeoutError) as error:
                why = f"{type(error).__name__}: {self._without_secrets(str(error))}"
            except Exception as error:
                # A bug of ours must not end the log for good: say so, and begin again.
                log.exception("the event log's %s failed", name)
                why = type(error).__name__
            finally:
                if client is not None:
                    with contextlib.suppress(Exception):
                        await client.aclose()
            if self._ups[name]:
                backoff_s = BACKOFF_S_MIN
            self._set_up(name, False, why)
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, BACKOFF_S_MAX)

    def _without_secrets(self, text: str) -> str:
        password = urlsplit(self._url).password
        return text.replace(password, "***") if password else text

    def _set_up(self, name: str, up: bool, why: str = "") -> None:
        self._ups[name] = up
        now_up = all(self._ups.values())
        if why:
            self.error = why
        if now_up == self.up:
            return
        self.up = now_up
        if now_up:
            self.error = ""
            log.info("the event log at %s is up", redacted(self._url))
        else:
            log.warning("the event log at %s is down: %s", redacted(self._url), why)
        self._changed(now_up)

    # ------------------------------------------------------------ writing

    async def _write(self, client: Any) -> None:
        await client.ping()
        self._set_up("writer", True)
        while True:
            try:
                await asyncio.wait_for(self._work.wait(), READ_BLOCK_MS / 1000)
            except TimeoutError:
                # So that an idle writer notices too.
                await client.ping()
                continue
            # News come in bursts: a moment of patience makes one entry of them.
            await asyncio.sleep(GATHER_S)
            if not self.up:
                self._work.clear()
                continue
            await self._append_all(client)

    async def _append_all(self, client: Any) -> None:
        while entries := self._take(WRITE_ENTRIES):
            pipeline = client.pipeline(transaction=False)
            for data in entries:
                pipeline.xadd(
                    self._name, {FIELD_VERSION: VERSION, FIELD_DATA: data}, maxlen=self._entries_max, approximate=True
                )
            await asyncio.wait_for(pipeline.execute(), COMMAND_TIMEOUT_S)
            self.entries_written += len(entries)
        self._work.clear()
        self._idle.set()

    # ------------------------------------------------------------ reading

    async def _read(self, client: Any) -> None:
        self._position = await self._begin_at(client)
        self._set_up("reader", True)
        while True:
            reply = await client.xread({self._name: self._position}, count=READ_ENTRIES, block=READ_BLOCK_MS)
            for _, entries in reply or ():
                for entry_id, fields in entries:
                    self._position = entry_id
                    self._received(fields.get(FIELD_VERSION), fields.get(FIELD_DATA))
                    # One entry may hold a large snapshot: others get their turn after each.
                    await asyncio.sleep(0)

    async def _begin_at(self, client: Any) -> bytes:
        """Where to go on: after what was read, or at the end for the first time, or from the start of a new stream."""
        newest = await client.xrevrange(self._name, count=1)
        last: bytes = newest[0][0] if newest else b"0-0"
        if self._position is None:
            return last
        if _order(last) < _order(self._position):
            log.warning("the event log has lost its data")
            return b"0-0"
        return self._position


def _order(entry_id: bytes) -> tuple[int, int]:
    milliseconds, _, number = entry_id.partition(b"-")
    return int(milliseconds), int(number or 0)
