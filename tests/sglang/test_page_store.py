"""Pages in a real node: whole and bit for bit, or not at all."""

from __future__ import annotations

import logging
import multiprocessing
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engines.attached.line import NodeLine
from engines.sglang import page_store
from engines.sglang.page_store import PageStore
from kvpool.channels.base import ChannelError
from kvpool.client import PoolClient
from kvpool.core.errors import DeadlineExceeded
from tests.pool.node_process import NodeProcess, eventually, free_port
from tests.sglang import made_pools
from tests.sglang.made_pools import LAYOUTS, MadePool, all_numbers, hashes, made_spec

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("kernels")]

LAYERS, RUN_BYTES, PAGES = 6, 4096, 16
#: A crowded machine may take long; the test that measures it says how long.
TIME_S = 60.0


class Engine:
    """A process's own host pool, and its line to a node."""

    def __init__(self, address: str, layout: str = "page_first", model: str = "made", **others: object) -> None:
        shape = (int(others.pop("pages", PAGES)), int(others.pop("layers", LAYERS)), RUN_BYTES)  # type: ignore[call-overload]
        self.pool = MadePool.of(layout, *shape)
        others.setdefault("lookup_timeout_ms", 60_000)
        settings = made_pools.settings(address, **others)
        self.line = NodeLine(settings, "test", engine="SGLang", log=logging.getLogger("sglang.kvpool"))
        pages = self.pool.pages()
        self.store = PageStore(self.line, settings, self.line.use(made_spec(pages, model)), pages, 0)

    def flats(self, numbers: range) -> list[bytes]:
        return [self.pool.flat(number).tobytes() for number in numbers]


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four pages each, so that calls take several."""
    monkeypatch.setattr(page_store, "BATCH_BYTES", 4 * 2 * LAYERS * RUN_BYTES)
    monkeypatch.setattr(page_store, "STAGED_BATCH_BYTES", 4 * 2 * LAYERS * RUN_BYTES)


@pytest.fixture
def engine_on() -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def make(*arguments: object, there: bool = True, **named: object) -> Engine:
        """Args: there: the node is, and is waited for."""
        engines.append(Engine(*arguments, **named))  # type: ignore[arg-type]
        assert not there or eventually(lambda: engines[-1].line.is_up)
        return engines[-1]

    yield make
    for engine in engines:
        engine.line.close()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip_to_other_pages_of_another_engine(
    node: NodeProcess, engine_on: Callable[..., Engine], layout: str
) -> None:
    one, other = engine_on(node.address, layout), engine_on(node.address, layout)
    assert one.store.pages.direct == (layout == "page_first")
    one.pool.fill(1)
    names = hashes(PAGES, layout)
    assert not other.store.there(names).any()
    assert one.store.store(names, all_numbers(range(PAGES)), TIME_S).all()
    assert other.store.there(names).all()
    assert other.store.load(names, all_numbers(reversed(range(PAGES))), TIME_S).all()
    assert other.flats(range(PAGES)) == one.flats(range(PAGES))[::-1]
    stored = PoolClient(node.address).stats()
    assert one.store.store(names, all_numbers(range(PAGES)), TIME_S).all()  # there already: nothing is written
    assert PoolClient(node.address).stats().blocks == stored.blocks


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    layout=st.sampled_from(LAYOUTS),
    stored=st.lists(st.integers(0, 11), unique=True),
    wanted=st.lists(st.integers(0, 11), min_size=1, unique=True),
    seed=st.integers(0, 2**32),
)
def test_a_load_is_the_leading_run_and_touches_nothing_else(
    node: NodeProcess, engine_on: Callable[..., Engine], layout: str, stored: list[int], wanted: list[int], seed: int
) -> None:
    one, other = engine_on(node.address, layout, pages=12), engine_on(node.address, layout, pages=12)
    one.pool.fill(seed)
    other.pool.fill(seed + 1)
    before = other.flats(range(12))
    names = hashes(12, (layout, stored, wanted, seed))
    assert one.store.store([names[i] for i in stored], all_numbers(stored), TIME_S).all()
    # Page i of the one is wanted at page i of the other.
    done = other.store.load([names[i] for i in wanted], all_numbers(wanted), TIME_S)
    run = next((i for i, page in enumerate(wanted) if page not in stored), len(wanted))
    assert done.tolist() == [i < run for i in range(len(wanted))]
    for page in range(12):
        if page in wanted[:run]:
            assert other.pool.flat(page).tobytes() == one.pool.flat(page).tobytes()
        elif page not in wanted:
            assert other.pool.flat(page).tobytes() == before[page]
    there = other.store.there(names)
    assert np.flatnonzero(there).tolist() == sorted(stored)
    assert other.store.there(names, prefix_only=True).sum() == next((i for i in range(12) if i not in stored), 12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flat_pages_and_pages_in_place_are_the_same(
    node: NodeProcess, engine_on: Callable[..., Engine], layout: str
) -> None:
    one = engine_on(node.address, layout)
    one.pool.fill(2)
    in_place, flat = hashes(4, ("in place", layout)), hashes(4, ("flat", layout))
    assert one.store.store(in_place, all_numbers(range(4)), TIME_S).all()
    rows = [np.zeros(one.store.page_bytes, dtype=np.uint8) for _ in range(4)]
    assert one.store.load_flat(in_place, rows, TIME_S).all()
    assert [row.tobytes() for row in rows] == one.flats(range(4))
    assert one.store.store_flat(flat, rows, TIME_S).all()
    assert one.store.load(flat, all_numbers(range(4, 8)), TIME_S).all()
    assert one.flats(range(4, 8)) == one.flats(range(4))


def test_a_page_of_which_a_part_is_missing_is_not_there(node: NodeProcess, engine_on: Callable[..., Engine]) -> None:
    one = engine_on(node.address)
    one.pool.fill(3)
    names = hashes(4, "parts")
    assert one.store.store(names, all_numbers(range(4)), TIME_S).all()
    with PoolClient(node.address) as client:
        client.register(made_spec(one.store.pages))
        assert client.remove(one.store.namespace, one.store.keys(names[2:3]), group=1) == 1
    assert one.store.there(names).tolist() == [True, True, False, True]
    assert one.store.load(names, all_numbers(range(4)), TIME_S).tolist() == [True, True, False, False]
    assert one.store.store(names, all_numbers(range(4)), TIME_S).all()  # the part that is missing is stored again
    assert one.store.load(names, all_numbers(range(4)), TIME_S).all()


def test_models_and_layouts_do_not_push_each_other_out(node: NodeProcess, engine_on: Callable[..., Engine]) -> None:
    """The same hashes, since SGLang's say nothing of the model."""
    engines = [engine_on(node.address, layout, model) for layout in LAYOUTS for model in ("one", "other")]
    names = hashes(3, "shared")
    for seed, engine in enumerate(engines):
        engine.pool.fill(seed)
        assert not engine.store.there(names).any()
        assert engine.store.store(names, all_numbers(range(3)), TIME_S).all()
    for engine in engines:
        wanted = engine.flats(range(3))
        engine.pool.memory[...] = 0
        assert engine.store.load(names, all_numbers(range(3)), TIME_S).all()
        assert engine.flats(range(3)) == wanted


def test_a_full_pool_costs_pages_and_nothing_else(
    start_node: Callable[..., NodeProcess], engine_on: Callable[..., Engine]
) -> None:
    node = start_node(memory_bytes=4 << 20)
    one = engine_on(node.address, pages=256)  # 12 MiB
    one.pool.fill(4)
    names = hashes(256, "full")
    for first in range(0, 256, 16):
        one.store.store(names[first : first + 16], all_numbers(range(first, first + 16)), TIME_S)
    there = np.flatnonzero(one.store.there(names))
    assert 0 < len(there) < 256
    wanted = one.flats(range(256))
    one.pool.memory[...] = 0
    whole = [page for page in there.tolist() if one.store.load([names[page]], all_numbers([page]), TIME_S)[0]]
    assert whole
    assert all(one.pool.flat(page).tobytes() == wanted[page] for page in whole)


def test_a_page_that_another_engine_is_storing_counts(node: NodeProcess, engine_on: Callable[..., Engine]) -> None:
    one = engine_on(node.address)
    one.pool.fill(5)
    names = hashes(1, "two writers")
    with PoolClient(node.address) as client:
        client.register(made_spec(one.store.pages))
        kept = client.reserve(one.store.namespace, one.store.keys(names), group=0, ttl_s=600.0)
        assert not one.store.store(names, all_numbers([0]), TIME_S).any()  # not there in time: said so
        digests = client.write(kept, np.array([0]), one.store.pages.view(0, 0), np.array([0]))
        client.commit(kept, np.array([0]), digests)
    assert one.store.store(names, all_numbers([0]), TIME_S).all()


def test_a_node_that_is_away_costs_hits_and_no_time(
    start_node: Callable[..., NodeProcess], engine_on: Callable[..., Engine]
) -> None:
    node = start_node(listen=f"127.0.0.1:{free_port()}")
    one = engine_on(node.address)
    one.pool.fill(6)
    names = hashes(PAGES, "away")
    assert one.store.store(names, all_numbers(range(PAGES)), TIME_S).all()
    node.kill()
    # It is a call that notices.
    assert eventually(lambda: not one.store.there(names).any() and not one.line.is_up)
    for call in (
        lambda: one.store.there(names),
        lambda: one.store.load(names, all_numbers(range(PAGES)), TIME_S),
        lambda: one.store.store(names, all_numbers(range(PAGES)), TIME_S),
    ):
        assert not call().any()
    again = start_node(listen=node.address)
    assert again.address == node.address
    assert eventually(lambda: one.line.is_up)
    assert one.store.store(names, all_numbers(range(PAGES)), TIME_S).all()
    assert one.store.load(names, all_numbers(range(PAGES)), TIME_S).all()


def test_a_node_that_comes_later_is_used(
    start_node: Callable[..., NodeProcess], engine_on: Callable[..., Engine]
) -> None:
    first = start_node(listen=f"127.0.0.1:{free_port()}")
    address = first.address
    first.kill()
    one = engine_on(address, there=False)
    assert not one.line.is_up and not one.store.there(hashes(3, "late")).any()
    start_node(listen=address)
    assert eventually(lambda: one.line.is_up)
    one.pool.fill(7)
    assert one.store.store(hashes(3, "late"), all_numbers(range(3)), TIME_S).all()


def _stores_and_loads(address: str, seed: int, rounds: int, wrong: multiprocessing.Queue[str]) -> None:
    """In a process of its own: stores pages whose content is that of their hashes, and checks all that it finds."""
    engine = Engine(address, ("page_first", "layer_first")[seed % 2], pages=8)
    rng = np.random.default_rng(seed)
    try:
        for turn in range(rounds):
            number = int(rng.integers(0, 40))
            names = hashes(4, number)
            content = np.random.default_rng(number).integers(0, 256, engine.pool.memory.shape, dtype=np.uint8)
            engine.pool.memory[...] = 0
            done = engine.store.load(names, all_numbers(range(4)), TIME_S)
            loaded = engine.flats(range(4))
            engine.pool.memory[...] = content
            for page in np.flatnonzero(done).tolist():
                if loaded[page] != engine.pool.flat(page).tobytes():
                    wrong.put(f"seed {seed} turn {turn}: page {page} of {number} has other bytes")
            engine.store.store(names, all_numbers(range(4)), TIME_S)
    finally:
        engine.line.close()
    wrong.put("")


@pytest.mark.timeout(600)
def test_processes_at_the_same_time(start_node: Callable[..., NodeProcess]) -> None:
    """Two engines of each layout, on a pool too small for all pages: nothing wrong is ever read."""
    node = start_node(memory_bytes=6 << 20)
    context = multiprocessing.get_context("spawn")
    wrong: multiprocessing.Queue[str] = context.Queue()
    processes = [context.Process(target=_stores_and_loads, args=(node.address, seed, 60, wrong)) for seed in range(4)]
    for process in processes:
        process.start()
    told = [wrong.get(timeout=300) for _ in processes]
    for process in processes:
        process.join(60)
    assert told == [""] * len(processes)


def test_calls_end_in_time(node: NodeProcess, engine_on: Callable[..., Engine]) -> None:
    """A node that is stopped, not gone: the worst that a call may meet."""
    import signal

    one = engine_on(node.address, lookup_timeout_ms=200)
    one.pool.fill(8)
    begin_s = time.monotonic()
    node.send(signal.SIGSTOP)
    try:
        assert not one.store.there(hashes(8, "stopped")).any()
        assert not one.store.load(hashes(8, "stopped"), all_numbers(range(8)), 1.0).any()
        assert not one.store.store(hashes(8, "stopped"), all_numbers(range(8)), 1.0).any()
        # Far more than the sum of all bounds, far less than a call without one.
        assert time.monotonic() - begin_s < 30
    finally:
        node.send(signal.SIGCONT)

    def is_stored() -> bool:
        return bool(one.store.store(hashes(8, "stopped"), all_numbers(range(8)), TIME_S).all())

    assert eventually(is_stored)


def test_trouble_of_one_kind_silences_nothing_else(
    node: NodeProcess, engine_on: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store, or a channel, that is too slow is no node that is away; what nobody expects ends no thread."""
    one = engine_on(node.address)
    one.pool.fill(9)
    names = hashes(2, "one kind")
    assert one.store.store(names, all_numbers(range(2)), TIME_S).all()
    client = one.line._client

    def fails(error: Exception) -> Callable[..., None]:
        def call(*arguments: object, **named: object) -> None:
            raise error

        return call

    for error in (ChannelError("too slow"), DeadlineExceeded("too slow"), ValueError("unforeseen")):
        with monkeypatch.context() as patched:
            patched.setattr(client, "put", fails(error))
            assert not one.store.store(hashes(1, error), all_numbers([3]), TIME_S).any()
        assert one.line.is_up and one.store.there(names).all()
        assert one.store.load(names, all_numbers(range(4, 6)), TIME_S).all()
    with monkeypatch.context() as patched:
        patched.setattr(client, "register", fails(ValueError("unforeseen")))
        one.line.use(made_spec(one.store.pages, "another"))
    assert one.line._thread.is_alive()
