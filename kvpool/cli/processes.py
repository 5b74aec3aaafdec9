"""Runs the roles of one machine as child processes: start, wait until ready, restart by hand, stop in order."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

READY_FD = "KVPOOL_READY_FD"
_SUPERVISED = "KVPOOL_SUPERVISED"
_PR_SET_PDEATHSIG = 1
STOP_GRACE_S = 8.0


class ProcessFailed(RuntimeError):
    """A child ended, or was not ready in time. The message holds the end of its log."""


class Interrupted(RuntimeError):
    """Somebody asked to stop while children were being started."""


def announce_ready(facts: dict[str, Any]) -> None:
    """Tells the parent, if there is one that listens, that this process serves, and where."""
    fd = os.environ.pop(READY_FD, None)
    if fd is None:
        return
    with contextlib.suppress(OSError), os.fdopen(int(fd), "w") as pipe:
        pipe.write(json.dumps(facts) + "\n")


def die_with_parent() -> None:
    """A supervised process ends with its supervisor, however that ended."""
    supervisor = os.environ.pop(_SUPERVISED, "")
    if supervisor:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(supervisor):
            # It ended while this process was still loading: nobody will send that signal any more.
            signal.raise_signal(signal.SIGTERM)


def stop_event() -> threading.Event:
    """Set by SIGTERM or Ctrl-C."""
    event = threading.Event()

    def handle(_signum: int, _frame: FrameType | None) -> None:
        if event.is_set():
            # Asked twice: ends at once, and the children with it.
            os._exit(130)
        event.set()

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)
    return event


@dataclass
class Process:
    """One child: its name, what it said when it was ready, and where its log is."""

    name: str
    arguments: tuple[str, ...]
    log: Path
    popen: subprocess.Popen[bytes]
    ready_fd: int
    env: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def running(self) -> bool:
        return self.popen.poll() is None

    def wait_ready(self, timeout_s: float, stop: threading.Event | None = None) -> dict[str, Any]:
        """Facts of the ready process. Raises: ProcessFailed; Interrupted once `stop` is set."""
        if self.facts:
            return self.facts
        deadline = time.monotonic() + timeout_s
        text = b""
        while not text.endswith(b"\n"):
            left = deadline - time.monotonic()
            if stop is not None and stop.is_set():
                raise Interrupted
            if left <= 0:
                raise ProcessFailed(f"{self.name} was not ready after {timeout_s:.0f} s\n{self.log_tail()}")
            if select.select([self.ready_fd], [], [], min(left, 0.2))[0]:
                piece = os.read(self.ready_fd, 65536)
                if not piece:
                    self.popen.wait(timeout=STOP_GRACE_S)
                    raise ProcessFailed(f"{self.name} ended with code {self.popen.returncode}\n{self.log_tail()}")
                text += piece
        os.close(self.ready_fd)
        self.facts = json.loads(text)
        return self.facts

    def log_tail(self, lines: int = 15) -> str:
        try:
            text = self.log.read_text(errors="replace").splitlines()
        except OSError:
            return ""
        return "\n".join([f"  last lines of {self.log}:", *(f"  | {line}" for line in text[-lines:])])

    def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """SIGTERM, and SIGKILL after `grace_s`."""
        if self.running:
            self.popen.terminate()
            try:
                self.popen.wait(timeout=grace_s)
            except subprocess.TimeoutExpired:
                self.popen.kill()
                self.popen.wait(timeout=grace_s)

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait(timeout=STOP_GRACE_S)


class Supervisor:
    """Starts `kvpool <role> ...` children and stops them, last one first."""

    def __init__(self, log_folder: Path, env: dict[str, str] | None = None) -> None:
        log_folder.mkdir(parents=True, exist_ok=True)
        self.log_folder = log_folder
        self.processes: dict[str, Process] = {}
        self._env = env or {}

    def start(self, name: str, arguments: Sequence[str], env: dict[str, str] | None = None) -> Process:
        """Starts `kvpool <arguments>`; a process of that name that has ended is replaced."""
        old = self.processes.get(name)
        assert old is None or not old.running, f"{name} runs already"
        read_fd, write_fd = os.pipe()
        log = self.log_folder / f"{name}.log"
        extra = {**self._env, **(env or {})}
        # A new run begins a new log; a restart goes on with it.
        with log.open("ab" if old is not None else "wb") as sink:
            popen = subprocess.Popen(
                [sys.executable, "-m", "kvpool.cli.main", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                pass_fds=(write_fd,),
                # A group of its own: Ctrl-C reaches the supervisor alone, which then stops the children in order.
                start_new_session=True,
                env={**os.environ, **extra, READY_FD: str(write_fd), _SUPERVISED: str(os.getpid())},
            )
        os.close(write_fd)
        process = Process(name, tuple(arguments), log, popen, read_fd, env=extra)
        self.processes[name] = process
        return process

    def restart(self, name: str) -> Process:
        """Starts a process that has ended again, with the arguments it had."""
        process = self.processes[name]
        return self.start(name, process.arguments, process.env)

    def ended(self) -> list[Process]:
        return [p for p in self.processes.values() if not p.running]

    def stop(self, prefix: str = "") -> None:
        """Asks those whose name begins with `prefix` to end, all at once, and waits for them."""
        chosen = [p for name, p in self.processes.items() if name.startswith(prefix)]
        for process in chosen:
            if process.running:
                process.popen.terminate()
        for process in chosen:
            process.stop()

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
