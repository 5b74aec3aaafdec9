"""Shared links: nothing above its bandwidth, nothing lost, everything ends."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.simulator.clock import EventQueue
from scheduler.simulator.links import STALLED_US, Fabric, Transfer

PORTS = ("a", "b", "c", "d")


class World:
    def __init__(self, bytes_s: float = 1e9) -> None:
        self.queue = EventQueue()
        self.fabric = Fabric(self.queue)
        for port in PORTS:
            self.fabric.add(port, bytes_s)
        self.ended: dict[int, tuple[int, bool]] = {}

    def start(self, size_bytes: int, ports: tuple[str, ...], latency_us: float = 0) -> Transfer:
        return self.fabric.start(size_bytes, ports, latency_us, self._end)

    def _end(self, transfer: Transfer, failed: bool) -> None:
        assert transfer.number not in self.ended, "ended twice"
        self.ended[transfer.number] = (self.queue.now_us, failed)

    def run(self) -> None:
        while self.queue.step():
            self.fabric.check_invariants()


def test_a_transfer_alone_has_all_of_it() -> None:
    world = World()
    transfer = world.start(1_000_000, ("a", "b"), latency_us=500)
    world.run()
    assert world.ended[transfer.number] == (1500, False)


def test_two_through_one_port_have_half_each_while_both_are_there() -> None:
    world = World()
    first, second = world.start(1_000_000, ("a", "b")), world.start(500_000, ("a", "c"))
    world.run()
    assert world.ended[second.number] == (1000, False)
    assert world.ended[first.number] == (1500, False)


def test_a_slow_link_is_slow_for_as_long_as_it_is_slow() -> None:
    world = World()
    transfer = world.start(1_000_000, ("a",))
    world.queue.at(500, world.fabric.set_factor, "a", 0.1)
    world.queue.at(2500, world.fabric.set_factor, "a", 1.0)
    world.run()
    assert world.ended[transfer.number] == (2800, False)


def test_a_link_that_stays_down_fails_its_transfers_and_one_that_comes_back_does_not() -> None:
    world = World()
    lost, kept = world.start(1_000_000, ("a",)), world.start(1_000_000, ("b",))
    world.queue.at(100, world.fabric.set_factor, "a", 0.0)
    world.queue.at(100, world.fabric.set_factor, "b", 0.0)
    world.queue.at(100 + STALLED_US // 2, world.fabric.set_factor, "b", 1.0)
    world.run()
    assert world.ended[lost.number] == (100 + STALLED_US, True)
    assert world.ended[kept.number] == (1000 + STALLED_US // 2, False)
    assert world.fabric.transfers_failed == 1


def test_whoever_cancels_hears_nothing_and_frees_the_way() -> None:
    world = World()
    gone, stays = world.start(1_000_000, ("a",)), world.start(1_000_000, ("a",))
    world.queue.at(1000, world.fabric.cancel, gone)
    world.run()
    assert gone.moved_bytes == 500_000
    assert world.ended == {stays.number: (1500, False)}


TRANSFERS = st.lists(
    st.tuples(
        st.integers(0, 20_000),
        st.integers(1, 20_000_000),
        st.lists(st.sampled_from(PORTS), min_size=1, max_size=3, unique=True),
        st.integers(0, 3_000),
    ),
    min_size=1,
    max_size=25,
)
CHANGES = st.lists(
    st.tuples(st.integers(0, 40_000), st.sampled_from(PORTS), st.sampled_from([0.0, 0.2, 1.0])), max_size=8
)


@settings(max_examples=80, deadline=None)
@given(transfers=TRANSFERS, changes=CHANGES)
def test_bytes_are_conserved_whatever_happens(
    transfers: list[tuple[int, int, list[str], int]], changes: list[tuple[int, str, float]]
) -> None:
    world = World()
    begun: list[Transfer] = []
    for at_us, size_bytes, ports, latency_us in transfers:
        world.queue.at(at_us, lambda s=size_bytes, p=tuple(ports), d=latency_us: begun.append(world.start(s, p, d)))
    for at_us, port, factor in changes:
        world.queue.at(at_us, world.fabric.set_factor, port, factor)
    for port in PORTS:
        world.queue.at(60_000, world.fabric.set_factor, port, 1.0)
    world.run()
    assert len(world.ended) == len(transfers)
    for port in PORTS:
        through = sum(t.moved_bytes for t in begun if any(r.name == port for r in t.resources))
        assert abs(world.fabric.resources[port].bytes_moved - through) <= 1 + 1e-6 * through
    for transfer in begun:
        ended_us, failed = world.ended[transfer.number]
        assert failed or transfer.moved_bytes == transfer.size_bytes
        if not failed:  # never faster than the narrowest of its ports
            assert ended_us - transfer.begun_us >= transfer.size_bytes / 1000 - 1
