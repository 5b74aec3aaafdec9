"""One history of the whole pool: a seed draws nodes, clients, what they do, what goes wrong, and in which order.

Everything runs in one thread under simulated time. Nodes are the real ones, from the servicer down; the network, the
memory, the disk and the threads are simulated. `Auditor` judges what was read; at the end all faults stop, and whatever
is held, awaited or promised must come to its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvpool.core.catalog import Catalog
from kvpool.core.directory import Directory
from kvpool.core.namespace import NamespaceSpec
from kvpool.service import sessions, source_driver, ssd_demotion, ssd_promotion, ssd_tier
from tests.simulation import disk
from tests.simulation.auditor import Auditor, Violation
from tests.simulation.chaos import Chaos
from tests.simulation.client import Client
from tests.simulation.epilogue import epilogue
from tests.simulation.loop import LIFE, Killed, Life, SimulatedLoop
from tests.simulation.memory import Locks, Proof
from tests.simulation.node import Node

#: Every hold, reservation and wait ends within this.
TTL_S_MAX = 3.0
#: How long what was begun may take to end once nothing goes wrong any more.
CALM_S = 40.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What a seed may not decide. steps: actions of all clients and operators together. check_every: turns of a core
    between two checks of its invariants; 0 = never."""

    steps: int = 40
    check_every: int = 100
    trace: bool = False
    ssd: bool | None = None


class World:
    """See the module's head."""

    def __init__(self, seed: int, plan: Plan) -> None:
        self.seed, self.plan = seed, plan
        self.rng = random.Random(seed)
        self.numbers = np.random.default_rng(seed)
        self.loop = SimulatedLoop()
        self.auditor, self.directory, self.locks = Auditor(), Directory(), Locks()
        self.faults, self.check_every = True, plan.check_every
        self.turns = self.version = 0
        self.steps_left = plan.steps
        self.failure: BaseException | None = None
        self.story: list[str] = []
        self.counts: dict[str, int] = {}
        self.cut: dict[tuple[str, str], int] = {}
        self.clients: list[Client] = []
        self.chaos: Chaos
        self.nodes = [self._new_node(i) for i in range(self.rng.choice((1, 1, 1, 2, 2, 3)))]

    def _new_node(self, i: int) -> Node:
        rng = self.rng
        ssd = rng.random() < 0.3 if self.plan.ssd is None else self.plan.ssd
        return Node(
            self, f"n{i}", pages=rng.choice((10, 16, 30)), entries=rng.choice((10, 18, 48)),
            eviction=rng.choice(("prefix", "prefix", "lru", "lfu", "s3fifo")),
            ssd_segments=rng.choice((5, 8)) if ssd else 0,
        )  # fmt: skip

    # ------------------------------------------------------------ what actors use

    def note(self, text: str) -> None:
        if self.plan.trace:
            self.story.append(f"{self.loop.time() - 1000:8.3f} {text}")

    def count(self, what: str, number: int = 1) -> None:
        self.counts[what] = self.counts.get(what, 0) + number

    def next_version(self) -> int:
        self.version += 1
        return self.version

    async def pause(self, seconds: float = 0.05) -> None:
        """Lets others go on, or not."""
        if self.rng.random() < 0.6:
            await asyncio.sleep(self.rng.random() * seconds)

    def later(self, seconds: float, act: Callable[[], Any]) -> None:
        """Does something within so many seconds, whoever may have died by then."""
        context = contextvars.Context()
        self.loop.call_later(self.rng.random() * seconds, act, context=context)

    def node_died(self, node: Node, life: Life) -> None:
        """Its clients notice one after the other."""
        for client in self.clients:
            for link in client.links.values():
                if link.life is life:
                    self.later(0.6, link.lose)

    def is_cut(self, client: str, node: str) -> bool:
        return self.cut.get((client, node), 0) > 0

    def fail(self, error: BaseException) -> None:
        """The first failure ends the history."""
        if self.failure is None:
            self.failure = error

    def spawn(self, coroutine: Any, context: Any = None) -> asyncio.Task[Any]:
        """A task whose failure is the history's."""

        def ended(task: asyncio.Task[Any]) -> None:
            error = None if task.cancelled() else task.exception()
            if error is not None and not isinstance(error, Killed):
                self.fail(error)

        task: asyncio.Task[Any] = self.loop.create_task(coroutine, context=context)
        task.add_done_callback(ended)
        return task

    # ------------------------------------------------------------ the history

    def run(self) -> None:
        """Raises: Violation, or whatever else failed."""
        with in_place(self):
            self.loop.run_until_complete(self._play())

    async def _play(self) -> None:
        self.begin()
        for _ in range(self.rng.randint(2, 4)):
            self.new_client()
        chaos = Chaos(self)
        self.spawn(chaos.run())
        end_s = self.loop.time() + 600
        while self.steps_left > 0 and self.failure is None:
            await asyncio.sleep(0.25)
            if self.loop.time() > end_s:
                raise Violation("the clients do not get on")
        await self.end(chaos)

    def begin(self) -> None:
        """In the loop: all nodes start."""
        self.loop.set_exception_handler(self._lost)
        for node in self.nodes:
            node.start()

    async def end(self, chaos: Chaos) -> None:
        """Raises: Violation, or what failed before."""
        self.check()
        await epilogue(self, chaos)
        self.check()

    def _lost(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception") or Violation(str(context))
        if not isinstance(error, Killed):
            self.fail(error)

    def check(self) -> None:
        if self.failure is not None:
            raise self.failure

    def new_client(self, *, acts: bool = True) -> Client:
        """Args: acts: by itself, as long as there are steps left."""
        home = self.rng.choice([*self.nodes, None])
        client = Client(self, f"c{len(self.clients)}", home)
        self.clients.append(client)
        if acts:
            client.begin()
        return client


# ---------------------------------------------------------------- the real modules in this world

_world: World | None = None


def here() -> World:
    assert _world is not None
    return _world


async def _in_thread(call: Callable[..., Any], *args: object, threads: object = None) -> Any:
    """For the SSD tier: the call takes time before and after, and the process may die in the middle of it."""
    world = here()
    life = LIFE.get()
    if isinstance(life.owner if life is not None else None, Node) and life.owner.starting:  # type: ignore[union-attr]
        return call(*args)
    await world.pause(0.1)
    try:
        return call(*args)
    finally:
        node = life.owner if life is not None else None
        if isinstance(node, Node) and life is not None and not life.dead:
            _after_disk(world, node)
        await world.pause(0.1)


def _after_disk(world: World, node: Node) -> None:
    """Raises: Killed where the power went while the disk was written."""
    if node.files.steps == 0:
        if world.rng.random() < 0.5:
            node.reboot()
        else:
            node.kill("in the middle of a write to its disk")
        raise Killed
    if node.store is not None and world.rng.random() < 0.2:
        disk.idle(node.store)


async def _to_thread(call: Callable[..., Any], *args: object) -> Any:
    await here().pause()
    result = call(*args)
    return await result if asyncio.iscoroutine(result) else result


class _Proofs:
    @staticmethod
    def open(path: str) -> Proof | None:
        lock = here().locks._locks.get(path)
        return None if lock is None or lock.gone else Proof(lock)


_REPLACED: tuple[tuple[Any, str, Any], ...] = (
    (asyncio, "to_thread", _to_thread),
    *((module, "in_thread", _in_thread) for module in (ssd_tier, ssd_promotion, ssd_demotion)),
    (source_driver, "now_us", lambda: here().loop.now_us()),
    (sessions, "WriterProof", _Proofs),
    # What looks around when there is nothing to do does so less often: it is most of what would happen.
    (sessions, "PROOF_INTERVAL_S", 1.0),
    (ssd_demotion, "IDLE_S", 0.5),
    # The same answers, a thousand times a history.
    (NamespaceSpec, "canonical", functools.cache(NamespaceSpec.canonical)),
    (Catalog, "to_bytes", functools.cache(Catalog.to_bytes)),
    *disk.REPLACED,
)


class _Watch(logging.Handler):
    """A shell that logs a traceback has met a bug that it survives: not here."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None:
            self._world.fail(record.exc_info[1])


@contextlib.contextmanager
def in_place(world: World) -> Iterator[None]:
    """Puts the simulated parts into the real modules for one history."""
    global _world
    before = [(module, name, getattr(module, name)) for module, name, _ in _REPLACED]
    _world = world
    for module, name, value in _REPLACED:
        setattr(module, name, value)
    watch = _Watch(world)
    logger = logging.getLogger("kvpool")
    level, logger.propagate = logger.level, False
    logger.addHandler(watch)
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        world.loop.unwind()
        world.loop.close()
        logger.removeHandler(watch)
        logger.propagate = True
        logger.setLevel(level)
        for module, name, value in before:
            setattr(module, name, value)


def run_history(seed: int, plan: Plan = Plan()) -> World:
    """Plays one history. Raises: Violation, with how to repeat it."""
    world = World(seed, plan)
    try:
        world.run()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        ssd = " --ssd" if plan.ssd else ""
        command = f"python -m tests.simulation --seed {seed} --steps {plan.steps}{ssd} --trace"
        raise Violation(f"seed {seed}: {type(error).__name__}: {error}\n  repeat: {command}") from error
    return world
