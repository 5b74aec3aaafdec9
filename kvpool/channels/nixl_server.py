"""The nixl channel, source side: starts the process that offers a segment, and another one when that ends.

One-sided: once a session has the offer, the source takes no part in its reads and cannot take the right back. Readers
hold leases and check digests. Nobody writes this way: see `NixlServer`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path

from kvpool.channels.nixl_agent import available
from kvpool.core.errors import Unavailable, Unsupported

log = logging.getLogger(__name__)

START_TIMEOUT_S = 20.0
#: Between the end of a process and the next one; longer each time, until one has lived for a while.
BACKOFF_MIN_S, BACKOFF_MAX_S = 0.5, 60.0


class NixlServer:
    """Offers one segment until `close`.

    Reading only. A write could not be taken back: a source cannot prove that a remote writer has stopped before it
    gives the slot to somebody else, except by ending all connections of all clients.
    """

    kind = "nixl"

    def __init__(self, path: Path, uuid: bytes) -> None:
        """Offers the segment of this file. Takes about a second.

        Raises: Unsupported where NIXL is not installed; Unavailable if it does not start.
        """
        if not available():
            raise Unsupported("nixl: NIXL is not installed", hint="pip install 'kvpool[nixl]'")
        self._command = [sys.executable, "-m", "kvpool.channels.nixl_process", "offer", str(path), uuid.hex()]
        self._changed = threading.Condition()
        self._sessions: set[int] = set()
        self._parameters: dict[str, str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._closing = False
        self.processes_started = 0
        process, parameters = self._start()
        self._thread = threading.Thread(target=self._run, args=(process, parameters), name="nixl-process", daemon=True)
        self._thread.start()

    def offer(self, session: int, token: bytes) -> dict[str, str] | None:
        """Parameters with which a client of the session opens the channel; None while there is no process.

        The token is not needed: who has the parameters can read.
        """
        with self._changed:
            first = not self._sessions
            self._sessions.add(session)
            if first:
                self._tell()
            return None if self._parameters is None else dict(self._parameters)

    def close_session(self, session: int) -> None:
        with self._changed:
            last = self._sessions == {session}
            self._sessions.discard(session)
            if last:
                self._tell()

    @property
    def session_count(self) -> int:
        return len(self._sessions)

    def close(self, timeout_s: float = 5.0) -> bool:
        """Ends all connections; reads under way fail. False if the process had to be killed."""
        with self._changed:
            self._closing = True
            process = self._process
            self._changed.notify_all()
        ended = True
        if process is not None:
            _hang_up(process)
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                ended = False
                process.kill()
        self._thread.join(timeout_s)
        return ended and not self._thread.is_alive()

    # ------------------------------------------------------------ the process

    def _start(self) -> tuple[subprocess.Popen[bytes], dict[str, str]]:
        """Raises: Unavailable."""
        # In a session of its own: what a terminal sends to the node's group is not meant for it.
        process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        self.processes_started += 1
        try:
            assert process.stdout is not None
            poller = select.poll()
            poller.register(process.stdout, select.POLLIN)
            line = process.stdout.readline() if poller.poll(START_TIMEOUT_S * 1000) else b""
            process.stdout.close()
            assert process.stdin is not None
            os.set_blocking(process.stdin.fileno(), False)
            if not line:
                raise Unavailable("nixl: its process says nothing", hint="the node's error output says more")
            answer: dict[str, str] = json.loads(line)
            if "error" in answer:
                raise Unavailable(answer["error"], hint=answer["hint"])
        except BaseException:
            process.kill()
            process.wait()
            _hang_up(process)
            raise
        return process, answer

    def _run(self, process: subprocess.Popen[bytes], parameters: dict[str, str]) -> None:
        backoff_s = BACKOFF_MIN_S
        while True:
            begun_s = time.monotonic()
            with self._changed:
                self._process, self._parameters = process, parameters
                self._tell()
                self._changed.notify_all()
                if self._closing:
                    _hang_up(process)
            # Ends by itself, or because `close` hangs up or kills it.
            process.wait()
            with self._changed:
                self._process, self._parameters = None, None
                self._changed.notify_all()
                _hang_up(process)
            lived_s = time.monotonic() - begun_s
            backoff_s = BACKOFF_MIN_S if lived_s > BACKOFF_MAX_S else min(2 * backoff_s, BACKOFF_MAX_S)
            again = self._again(f"its process ended ({process.returncode})", backoff_s)
            if again is None:
                return
            process, parameters = again

    def _again(self, why: str, backoff_s: float) -> tuple[subprocess.Popen[bytes], dict[str, str]] | None:
        """Another process, or None when closing."""
        while True:
            with self._changed:
                if not self._closing:
                    log.warning("nixl: %s; another one in %.1f s", why, backoff_s)
                if self._changed.wait_for(lambda: self._closing, backoff_s):
                    return None
            try:
                return self._start()
            except (Unavailable, OSError) as error:
                why, backoff_s = str(error), min(2 * backoff_s, BACKOFF_MAX_S)

    def _tell(self) -> None:
        """Lets the process sleep while there are no sessions."""
        if self._process is not None:
            assert self._process.stdin is not None
            # Written without waiting: to a process that does not read, or has ended, nothing needs to be told.
            with contextlib.suppress(OSError, ValueError):
                os.write(self._process.stdin.fileno(), b"1" if self._sessions else b"0")


def _hang_up(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()
