"""A real node process, workers in this process, and a gateway's side of the Engine service, for tests."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import grpc
import numpy as np

from engines.torch.batching import Plan
from engines.torch.engine import Engine
from engines.torch.generate import generate
from engines.torch.hbm import block_memory
from engines.torch.model import LoadedModel
from engines.torch.request import Sampling
from engines.torch.sequence import Sequence as Running
from engines.torch.worker import EngineWorker, WorkerConfig
from kvpool.client import PoolClient
from kvpool.service.rpc import make_channel
from kvpool.v1 import directory_pb2, engine_pb2, engine_pb2_grpc

from .conftest import EXACT

HOLD_TTL_S = 60.0
#: Of each step of a test: what does not come at all, not what comes late on a busy machine. A hold that is put after
#: the last round of those who free it stays until it expires, and no longer.
PATIENCE_S = HOLD_TTL_S + 30.0


def eventually(check: Callable[[], bool], what: str) -> None:
    """Polls, since what is awaited happens in other threads and processes."""
    end_s = time.monotonic() + PATIENCE_S
    while not check():
        assert time.monotonic() < end_s, f"not within {PATIENCE_S:.0f} s: {what}"
        threading.Event().wait(0.02)


class Node:
    """A node process."""

    def __init__(self, name: str, folder: Path, memory_bytes: int = 64 << 20) -> None:
        # The segment in `folder`: a killed node leaves it behind.
        command = [sys.executable, "-m", "kvpool.service.node", "--id", name, "--listen", "127.0.0.1:0"]
        command += ["--segment-dir", str(folder), "--memory-bytes", str(memory_bytes)]
        with (folder / "log").open("wb") as errors:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, (folder / "log").read_text()
        self.address: str = json.loads(line)["address"]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_S)

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def held(self) -> dict[str, int]:
        with PoolClient(self.address, client="auditor", timeout_s=PATIENCE_S) as client:
            stats = client.stats()
        names = ("leases", "pins", "reservations", "quarantined", "waiters", "blocks_writing")
        return {name: getattr(stats, name) for name in names}

    def nothing_held(self) -> bool:
        return not any(self.held().values())


class Gateway:
    """One Connect stream, and what came back on it."""

    def __init__(self, worker: EngineWorker) -> None:
        self._worker = worker
        self._commands: queue.Queue[engine_pb2.EngineCommand | None] = queue.Queue()
        self._channel = make_channel(worker.address)
        self._events: dict[str, list[engine_pb2.RequestEvent]] = defaultdict(list)
        self._news = threading.Condition()
        self._commands.put(engine_pb2.EngineCommand(hello="test-gateway"))
        self._call = engine_pb2_grpc.EngineStub(self._channel).Connect(self._outgoing())
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def submit(
        self,
        name: str,
        prompt: np.ndarray,
        phase: int = engine_pb2.PHASE_BOTH,
        *,
        max_tokens: int = 12,
        pull: list[directory_pb2.Run] | None = None,
        handoff: str = "",
        deadline_ms: int = 240_000,
        use_pool: bool = True,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> engine_pb2.Submit:
        namespace = self._worker.engine.namespace.id()
        submit = engine_pb2.Submit(
            request_id=name,
            token_ids=prompt.astype("<u4").tobytes(),
            phase=phase,  # type: ignore[arg-type]
            sampling=engine_pb2.Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed, ignore_eos=True),
            root_key=namespace,
            namespace_id=namespace,
            pull=pull or [],
            use_pool=use_pool,
            deadline_ms=deadline_ms,
            handoff_source=handoff,
        )
        if phase != engine_pb2.PHASE_BOTH:
            submit.handoff.request_id, submit.handoff.ttl_ms = name, int(HOLD_TTL_S * 1000)
        self.send(submit)
        return submit

    def send(self, submit: engine_pb2.Submit) -> None:
        self._commands.put(engine_pb2.EngineCommand(submit=submit))

    def first_token(self, name: str, token: int) -> None:
        first = engine_pb2.FirstToken(request_id=name, token_id=token)
        self._commands.put(engine_pb2.EngineCommand(first_token=first))

    def abort(self, name: str) -> None:
        self._commands.put(engine_pb2.EngineCommand(abort=engine_pb2.Abort(request_id=name)))

    def first(self, name: str) -> int:
        """The first token, as soon as it is there."""
        return self._wait(name, lambda events: [t for e in events for t in e.token_ids])[0]

    def end(self, name: str) -> engine_pb2.RequestEvent:
        """The event that ends a request."""
        return self._wait(name, lambda events: [e for e in events if e.finish_reason])[0]

    def tokens(self, name: str) -> list[int]:
        """All tokens, after the end."""
        end = self.end(name)
        assert end.finish_reason in (1, 2, 5), end.error
        return [t for e in self._events[name] for t in e.token_ids]

    def events(self, name: str) -> list[engine_pb2.RequestEvent]:
        """What came for a request so far."""
        with self._news:
            return list(self._events[name])

    def close(self) -> None:
        self._call.cancel()
        self._commands.put(None)
        self._channel.close()
        self._thread.join(PATIENCE_S)

    def __enter__(self) -> Gateway:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait(self, name: str, pick: Callable[[list[engine_pb2.RequestEvent]], list]) -> list:  # type: ignore[type-arg]
        with self._news:
            assert self._news.wait_for(lambda: bool(pick(self._events[name])), PATIENCE_S), f"no event for {name}"
            return pick(self._events[name])

    def _outgoing(self) -> Iterator[engine_pb2.EngineCommand]:
        while (command := self._commands.get()) is not None:
            yield command

    def _read(self) -> None:
        try:
            for batch in self._call:
                with self._news:
                    for event in batch.events:
                        self._events[event.request_id].append(event)
                    self._news.notify_all()
        except grpc.RpcError:
            return  # closed, or the worker is gone: `_wait` says what is missing


class Still:
    """A worker computes so many batches, and then none until `go` is set, though it goes on with all else.

    So a request stays under way for as long as a test wants it to, however fast the machine.
    """

    def __init__(self, own: EngineWorker, batches: int) -> None:
        self.go = threading.Event()
        self._batches = threading.Semaphore(batches)
        compute = own.engine._compute

        def held(running: Sequence[Running], plan: Plan) -> None:
            if self.go.is_set() or self._batches.acquire(timeout=0.005):
                compute(running, plan)

        own.engine._compute = held  # type: ignore[method-assign]

    def more(self, batches: int) -> None:
        self._batches.release(batches)


def worker(
    model: LoadedModel, name: str = "w", node: str = "", *, pull_grace_s: float | None = None, **changes: object
) -> EngineWorker:
    """Args: pull_grace_s: how long its pulls wait for blocks after a first token; None = as long as `handoff_grace_s`,
    which is also when it frees holds. Tests that want every block to be pulled are patient: a machine that stands still
    for that moment is no lost prefill.
    """
    config = {
        "instance_id": name, "node": node, "kv_tokens": 4096, "block_tokens": 16, "chunk_tokens": 64, "batch_max": 8,
        "waiting_max": 32, "deterministic": True, "handoff_grace_s": 0.5, "warm_up": False,
        "hbm_staging_bytes": 0,
    }  # fmt: skip
    memory = changes.pop("memory", block_memory)
    made = EngineWorker(WorkerConfig(**(config | changes)), model=model, memory=memory)  # type: ignore[arg-type]
    if pull_grace_s is not None:
        made._dispatcher._puller._grace_s = pull_grace_s
    return made


def expected(model: LoadedModel, tokens: np.ndarray, count: int, **sampling: float) -> list[int]:
    wanted = Sampling(count, ignore_eos=True, **sampling)  # type: ignore[arg-type]
    return list(generate(Engine(model, EXACT), [tokens.tolist()], wanted)[0].tokens)


def split(prefill: Gateway, decode: Gateway, node: Node, name: str, tokens: np.ndarray, **more: object) -> list[int]:
    """What a gateway does with a split request."""
    decode.submit(name, tokens, engine_pb2.PHASE_DECODE, handoff=node.address, **more)  # type: ignore[arg-type]
    prefill.submit(name, tokens, engine_pb2.PHASE_PREFILL, **more)  # type: ignore[arg-type]
    first = prefill.first(name)
    decode.first_token(name, first)
    return [first, *decode.tokens(name)]


def all_free(worker: EngineWorker) -> bool:
    load = worker.engine.load()
    return worker.idle() and load.kv_tokens_free == load.kv_tokens_total
