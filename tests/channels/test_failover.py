"""Several links to one source: left when they fail, found again when they are back, and never two writers at once."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from kvpool.channels import failover
from kvpool.channels.base import Channel, ChannelError, Offer
from kvpool.channels.failover import FailoverChannel
from kvpool.channels.links import Links
from kvpool.channels.shm import ShmChannel
from kvpool.channels.tcp import TcpChannel
from kvpool.core.errors import BadArgument, Reason, Unavailable
from kvpool.core.links import LinkConfig, LinkState
from tests.channels.source_made import HarmfulProxy, MadeSource

DEADLINE_S = 60.0
QUICK = LinkConfig(
    backoff_us_min=10_000, backoff_us_max=50_000, restore_us=5_000, probe_timeout_us=60_000_000, idle_us=50_000,
    explore_us_min=100_000, explore_us_max=400_000,
)  # fmt: skip
NEVER = LinkConfig(idle_us=1 << 60, backoff_us_min=1 << 40, backoff_us_max=1 << 41)


class Two:
    """Two links to one source, `near` and `far`, each through a proxy of its own."""

    def __init__(self, source: MadeSource, config: LinkConfig) -> None:
        self.source, self.links = source, Links(config)
        self.proxies = {"near": HarmfulProxy(source.server.address), "far": HarmfulProxy(source.server.address)}
        self.opened: list[str] = []
        self.broken: set[str] = set()  # these do not open
        self.channel = FailoverChannel.open("node", self.offers(), self.openers(), self.links)

    def offers(self) -> list[Offer]:
        token = self.source.token.hex()
        return [Offer(kind, {"address": proxy.address, "token": token}) for kind, proxy in self.proxies.items()]

    def openers(self) -> dict[str, Callable[[Mapping[str, str]], Channel]]:
        def opener(kind: str) -> Callable[[Mapping[str, str]], Channel]:
            def open_one(parameters: Mapping[str, str]) -> Channel:
                self.opened.append(kind)
                if kind in self.broken:
                    raise ChannelError(f"{kind} is not to be opened now")
                return TcpChannel.open(parameters)

            return open_one

        return {kind: opener(kind) for kind in self.proxies}

    def state(self, kind: str) -> LinkState:
        with self.links.now() as (meter, _):
            return meter.state("node", kind)

    def read(self, count: int = 8, deadline_s: float = DEADLINE_S) -> None:
        """Stores blocks, reads them, and compares."""
        keys, data = self.source.store(count)
        lease, blocks = self.source.lease(keys)
        out = np.zeros_like(data)
        assert self.channel.read(lease, blocks, out, deadline_s=deadline_s).all()
        assert np.array_equal(out, data)
        self.source.drop(lease, keys)

    def read_until(self, what: Callable[[], bool]) -> None:
        end_s = time.monotonic() + DEADLINE_S
        while not what():
            assert time.monotonic() < end_s, f"{self.links.snapshot()}"
            self.read(1)

    def cut(self, kind: str) -> None:
        """From now on connections over a link break as soon as the source answers."""
        self.proxies[kind].cut_at = 0

    def mend(self, kind: str) -> None:
        self.proxies[kind].cut_at = None

    def close(self) -> None:
        self.channel.close()
        for proxy in self.proxies.values():
            proxy.close()


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No link is left because this machine was slow for a second; tests of links that stall say otherwise."""
    monkeypatch.setattr(failover, "STALL_S_MIN", DEADLINE_S)


@pytest.fixture
def two(source: MadeSource) -> Iterator[Two]:
    with contextlib.closing(Two(source, QUICK)) as made:
        yield made


@pytest.fixture
def unprobed(source: MadeSource) -> Iterator[Two]:
    with contextlib.closing(Two(source, NEVER)) as made:
        yield made


def test_the_first_offer_is_taken_and_others_wait(unprobed: Two) -> None:
    unprobed.read()
    assert (unprobed.channel.kind, unprobed.channel.write_kind) == ("near", "near")
    assert unprobed.opened == ["near"]
    (near, far) = sorted(unprobed.links.snapshot(), key=lambda link: link.channel, reverse=True)
    assert (near.channel, near.samples, near.bytes_total) == ("near", 1, 8 * (64 << 10))
    assert (far.channel, far.samples) == ("far", 0)


def test_offers_that_do_not_open(two: Two) -> None:
    two.broken = {"near"}
    with contextlib.closing(FailoverChannel.open("node", two.offers(), two.openers(), two.links)) as channel:
        assert channel.kind == "far"
    two.broken = {"near", "far"}
    with pytest.raises(Unavailable, match=r"near.*far") as caught:
        FailoverChannel.open("node", two.offers(), two.openers(), two.links)
    assert caught.value.hint
    with pytest.raises(Unavailable, match="none of those asked for is offered"):
        FailoverChannel.open("node", [Offer("pigeon", {})], two.openers(), two.links)


def test_a_call_goes_on_over_another_link(unprobed: Two) -> None:
    unprobed.proxies["near"].cut_at = 3 * (64 << 10)
    unprobed.read(16)
    assert unprobed.channel.kind == "far"
    assert unprobed.state("near") is LinkState.DEGRADED


def test_only_what_is_left_is_moved_again(unprobed: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failover, "SLICE_BYTES", 4 * (64 << 10))
    unprobed.proxies["near"].cut_at = unprobed.proxies["near"].passed + 10 * (64 << 10)
    unprobed.read(32)
    far = unprobed.proxies["far"].passed
    assert 16 * (64 << 10) < far < 26 * (64 << 10)


def test_a_link_comes_back(two: Two) -> None:
    two.read()
    two.cut("near")
    two.read_until(lambda: two.state("near") in (LinkState.DOWN, LinkState.PROBING))
    two.read(1)  # it may have been a probe that noticed it
    assert two.channel.kind == "far"
    two.mend("near")
    two.read_until(lambda: two.state("near") is LinkState.UP)
    two.read_until(lambda: two.channel.kind == "near")


def test_an_idle_link_that_breaks_is_noticed_before_it_is_needed(two: Two) -> None:
    two.read()
    two.cut("near")
    _wait_until(lambda: two.state("near") is not LinkState.UP)
    failures = sum(link.errors for link in two.links.snapshot())
    two.read()
    assert two.channel.kind == "far" and failures
    two.mend("near")
    _wait_until(lambda: two.state("near") is LinkState.UP)


def test_a_link_that_stalls_is_left_in_time(unprobed: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(5):
        unprobed.read(16)
    assert unprobed.channel.kind == "near"
    monkeypatch.setattr(failover, "STALL_S_MIN", 0.2)
    near = unprobed.proxies["near"]
    near.stall_at = near.passed + 4 * (64 << 10)
    unprobed.read(16, deadline_s=DEADLINE_S)
    assert unprobed.channel.kind == "far"


def test_without_any_link_calls_fail_at_once_and_say_why(unprobed: Two) -> None:
    keys, data = unprobed.source.store(4)
    lease, blocks = unprobed.source.lease(keys)
    for kind in ("near", "far"):
        unprobed.cut(kind)
    for _ in range(3):
        with pytest.raises(ChannelError, match=r"near.*far"):
            unprobed.channel.read(lease, blocks, np.zeros_like(data), deadline_s=DEADLINE_S)
    for kind in ("near", "far"):
        assert unprobed.state(kind) is LinkState.DOWN
        unprobed.mend(kind)
    begin_s = time.monotonic()
    with pytest.raises(ChannelError, match="no link is up") as caught:
        unprobed.channel.read(lease, blocks, np.zeros_like(data), deadline_s=DEADLINE_S)
    assert caught.value.hint and time.monotonic() - begin_s < DEADLINE_S / 2


def test_both_links_come_back(two: Two) -> None:
    keys, data = two.source.store(4)
    lease, blocks = two.source.lease(keys)
    for kind in ("near", "far"):
        two.cut(kind)
    for _ in range(3):
        with pytest.raises(ChannelError):
            two.channel.read(lease, blocks, np.zeros_like(data), deadline_s=DEADLINE_S)
    for kind in ("near", "far"):
        two.mend(kind)
    _wait_until(lambda: all(two.state(kind) is LinkState.UP for kind in ("near", "far")))
    two.read()


def test_refusals_are_no_fault_of_a_link(unprobed: Two) -> None:
    keys, data = unprobed.source.store(4)
    lease, blocks = unprobed.source.lease(keys)
    for _ in range(5):
        with pytest.raises(ChannelError) as caught:
            unprobed.channel.read(lease + 1000, blocks, np.zeros_like(data), deadline_s=DEADLINE_S)
        assert caught.value.reason is Reason.UNKNOWN_LEASE
        with pytest.raises(ChannelError) as caught:
            unprobed.channel.write(lease + 1000, blocks, data, deadline_s=DEADLINE_S)
        assert caught.value.reason is Reason.UNKNOWN_RESERVATION
        with pytest.raises(BadArgument):
            unprobed.channel.read(lease, blocks, np.zeros((4, 10), np.uint8), deadline_s=DEADLINE_S)
    assert unprobed.opened == ["near"] and unprobed.state("near") is LinkState.UP
    assert all(link.errors == 0 for link in unprobed.links.snapshot())


def test_kinds_that_only_read_are_not_written_to(source: MadeSource) -> None:
    links = Links(NEVER)
    shm = {"path": str(source.segment.path), "uuid": source.segment.uuid.hex(), "writable": "0"}
    tcp = {"address": source.server.address, "token": source.token.hex()}
    openers: dict[str, Callable[[Mapping[str, str]], Channel]] = {"shm": ShmChannel.open, "tcp": TcpChannel.open}
    offers = [Offer("shm", shm), Offer("tcp", tcp)]
    with contextlib.closing(FailoverChannel.open("node", offers, openers, links)) as channel:
        keys, data = source.random_blocks(5)
        reservation, slots = source.reserve(keys)
        assert source.commit(reservation, channel.write(reservation, slots, data, deadline_s=DEADLINE_S)) == 5
        lease, blocks = source.lease(keys)
        out = np.zeros_like(data)
        assert channel.read(lease, blocks, out, deadline_s=DEADLINE_S).all()
        assert np.array_equal(out, data)
        assert (channel.kind, channel.write_kind) == ("shm", "tcp")
        assert channel.capabilities.same_host


# ------------------------------------------------------------ writes


def _written(two: Two, monkeypatch: pytest.MonkeyPatch, deadline_s: float) -> tuple[int, np.ndarray, np.ndarray]:
    """Writes while the near link carries only the beginning. Returns the reservation, the keys and the data."""
    two.channel.write(*_reserved(two.source)[:3], deadline_s=DEADLINE_S)  # now it is known how fast the link is
    monkeypatch.setattr(failover, "STALL_S_MIN", 0.3)
    reservation, slots, data = _reserved(two.source)
    near = two.proxies["near"]
    near.hold_at = data.nbytes // 4
    digests = two.channel.write(reservation, slots, data, deadline_s=deadline_s)
    assert two.channel.write_kind == "far"
    assert two.source.commit(reservation, digests) == len(data)
    return reservation, slots.keys, data


def _reserved(source: MadeSource) -> tuple:
    keys, data = source.random_blocks(16)
    return *source.reserve(keys), data


def test_a_write_goes_on_over_another_link_once_the_first_is_over(
    unprobed: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    unprobed.proxies["near"].hold_connections_max = 1
    reservation, keys, data = _written(unprobed, monkeypatch, DEADLINE_S)
    # Committed: the slots may be given to others from now on, so nothing of the first write may arrive any more.
    assert not unprobed.source.grants.busy([reservation])
    unprobed.proxies["near"].let_go()
    lease, blocks = unprobed.source.lease(keys)
    out = np.zeros_like(data)
    assert unprobed.channel.read(lease, blocks, out, deadline_s=DEADLINE_S).all()
    assert np.array_equal(out, data)


def test_a_write_that_may_still_arrive_is_not_done_again(unprobed: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    """The near link is silent altogether: nobody can tell the source to give the first write up."""
    with pytest.raises(ChannelError, match="not certain") as caught:
        _written(unprobed, monkeypatch, 3.0)
    assert caught.value.hint
    assert unprobed.proxies["far"].passed == 0, "two writers of the same slots"


# ------------------------------------------------------------ many threads, ends


@pytest.mark.parametrize("seed", [1, 2])
def test_readers_do_not_notice_as_long_as_one_link_is_up(two: Two, seed: int) -> None:
    keys, data = two.source.store(48)
    lease, blocks = two.source.lease(keys)
    rng = random.Random(seed)
    stop, reads = threading.Event(), [0] * 3

    def read(number: int) -> None:
        own = np.random.default_rng([seed, number])
        while not (stop.is_set() and reads[number]):
            picked = own.permutation(48)[:12]
            out = np.zeros((12, data.shape[1]), np.uint8)
            some = blocks.take(picked)
            assert two.channel.read(lease, some, out, deadline_s=DEADLINE_S).all()
            assert np.array_equal(out, data[picked]), f"seed {seed}"
            reads[number] += 1

    def sound(before: list[int]) -> bool:
        """Whether both links are up, also for calls that began while one was cut: these have ended."""
        went_on = all(now > then for now, then in zip(reads, before, strict=True))
        return went_on and all(two.state(kind) is LinkState.UP for kind in ("near", "far"))

    with ThreadPoolExecutor(3) as threads:
        readers = [threads.submit(read, number) for number in range(3)]
        try:
            for _ in range(6):
                kind = rng.choice(["near", "far"])
                two.cut(kind)
                two.read(2)
                two.mend(kind)
                mended = list(reads)
                _wait_until(lambda mended=mended: sound(mended) or _failed(readers))  # type: ignore[misc]
        finally:
            stop.set()
        for reader in readers:
            reader.result(DEADLINE_S)


def test_close_ends_calls_and_probes(source: MadeSource) -> None:
    two = Two(source, QUICK)
    with contextlib.closing(two), ThreadPoolExecutor(1) as thread:
        two.read()
        keys, data = source.store(32)
        lease, blocks = source.lease(keys)
        for proxy in two.proxies.values():
            proxy.stall_at = proxy.passed + 3 * (64 << 10)
        reading = thread.submit(two.channel.read, lease, blocks, np.zeros_like(data), deadline_s=10 * DEADLINE_S)
        assert two.proxies["near"].stalled.wait(DEADLINE_S)
        two.channel.close()
        two.channel.close()
        with pytest.raises(ChannelError):
            reading.result(DEADLINE_S)
        with pytest.raises(ChannelError, match="closed"):
            two.channel.read(lease, blocks, data, deadline_s=DEADLINE_S)
        _wait_until(lambda: not two.links.probing)
    opened = len(two.opened)
    with contextlib.closing(FailoverChannel("node", two.offers(), two.openers(), two.links)):
        pass
    assert len(two.opened) == opened


def test_a_probe_with_a_bug_does_not_end_the_others(caplog: pytest.LogCaptureFixture) -> None:
    class Odd:
        """Due once in a while; the first one fails each time."""

        def __init__(self, broken: bool) -> None:
            self.broken, self.probed = broken, 0

        def next_probe_us(self) -> int:
            return 0

        def probe_due(self) -> None:
            self.probed += 1
            if self.broken:
                raise RuntimeError("a bug")

    links, channels = Links(), [Odd(True), Odd(False)]
    for channel in channels:
        links.watch(channel)
    _wait_until(lambda: channels[1].probed > 3)
    for channel in channels:
        links.unwatch(channel)
    _wait_until(lambda: not links.probing)
    assert "a probe failed" in caplog.text


def _failed(futures: list) -> bool:
    return any(future.done() and future.exception() for future in futures)


def _wait_until(what: Callable[[], bool]) -> None:
    """Waits for what another thread brings about."""
    end_s = time.monotonic() + DEADLINE_S
    pause = threading.Event()
    while not what():
        assert time.monotonic() < end_s
        pause.wait(0.005)
