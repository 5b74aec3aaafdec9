"""The sockets: a publisher that speaks vLLM's protocol over real ZMQ, and loses what a test wants lost."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import zmq

from engines.openai_server.cache_mirror import CacheMirror
from engines.openai_server.event_feed import EventFeed
from kvpool.core.engine_keys import EngineNaming
from tests.engine_bridge.recorded import BLOCK_TOKENS, frames

NAMESPACE = bytes(16)
WAIT_S = 60.0


class Publisher:
    """PUB and ROUTER on free ports. Answers replays in a thread; publishes when told."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self._pub, self._router = self._context.socket(zmq.XPUB), self._context.socket(zmq.ROUTER)
        self.endpoint = f"tcp://127.0.0.1:{self._pub.bind_to_random_port('tcp://127.0.0.1')}"
        self.replay_endpoint = f"tcp://127.0.0.1:{self._router.bind_to_random_port('tcp://127.0.0.1')}"
        self.kept: list[tuple[bytes, int, bytes]] = []
        self.asked: queue.Queue[int] = queue.Queue()
        self.answers = True
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def wait_subscribed(self) -> None:
        assert self._pub.poll(int(WAIT_S * 1000)), "nobody subscribed"
        assert self._pub.recv()[:1] == b"\x01"

    def publish(self, topic: bytes, number: int, payload: bytes, *, lost: bool = False) -> None:
        self.kept.append((topic, number, payload))
        if not lost:
            self._pub.send_multipart([topic, number.to_bytes(8, "big"), payload])

    def send(self, *frames_: bytes) -> None:
        self._pub.send_multipart(frames_)

    def _serve(self) -> None:
        while not self._closing.is_set():
            if not self._router.poll(50):
                continue
            client, _, start = self._router.recv_multipart()
            self.asked.put(int.from_bytes(start, "big"))
            if not self.answers:
                continue
            # What is published meanwhile is no part of the answer.
            for topic, number, payload in list(self.kept):
                if number >= int.from_bytes(start, "big"):
                    self._router.send_multipart([client, b"", topic, number.to_bytes(8, "big"), payload])
            self._router.send_multipart([client, b"", b"", b"\xff" * 8, b""])

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
        self._context.destroy(linger=0)


class Follower:
    """A feed into a mirror, and a way to wait for what it says."""

    def __init__(self, publisher: Publisher, *, replay: bool) -> None:
        self.mirror = CacheMirror(EngineNaming("sha256", BLOCK_TOKENS), NAMESPACE)
        self.sizes: queue.Queue[int] = queue.Queue()
        self.feed = EventFeed(
            publisher.endpoint, publisher.replay_endpoint if replay else "", take=self._take, forget=self._forget
        )
        self.feed.start()

    def _take(self, message: Any) -> None:
        self.mirror.apply(message)
        self.sizes.put(len(self.mirror))

    def _forget(self) -> None:
        self.mirror.clear()
        self.sizes.put(-1)

    def next(self) -> int:
        return self.sizes.get(timeout=WAIT_S)


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    made = Publisher()
    yield made
    made.close()


def test_recorded_messages_over_the_wire(publisher: Publisher) -> None:
    follower = Follower(publisher, replay=False)
    publisher.wait_subscribed()
    for topic, number, payload in frames():
        publisher.publish(topic, number, payload)
    assert [follower.next() for _ in range(4)] == [3, 4, 7, 1]
    follower.feed.close()


def test_what_was_before_is_asked_for(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.openai_server.event_feed.REPLAY_S", WAIT_S)
    listed = frames()
    for topic, number, payload in listed[:2]:
        publisher.publish(topic, number, payload)
    follower = Follower(publisher, replay=True)
    assert publisher.asked.get(timeout=WAIT_S) == 0
    assert [follower.next() for _ in range(2)] == [3, 4]
    publisher.wait_subscribed()
    publisher.publish(*listed[2], lost=True)
    publisher.publish(*listed[3])
    assert publisher.asked.get(timeout=WAIT_S) == 2 and follower.feed.gaps == 1
    assert [follower.next() for _ in range(2)] == [7, 1]
    follower.feed.close()


def test_what_is_not_sent_again_is_forgotten(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.openai_server.event_feed.REPLAY_S", 0.1)
    publisher.answers = False
    follower = Follower(publisher, replay=True)
    publisher.wait_subscribed()
    assert publisher.asked.get(timeout=WAIT_S) == 0
    publisher.publish(*frames()[1])
    assert [follower.next() for _ in range(2)] == [-1, 0]  # its parent is not known
    follower.feed.close()


def test_messages_that_make_no_sense_are_passed_over(publisher: Publisher) -> None:
    follower = Follower(publisher, replay=False)
    publisher.wait_subscribed()
    topic, number, payload = frames()[0]
    for bad in (b"", b"\xff\xff", msgspec.msgpack.encode({"a": 1}), payload[:-3]):
        publisher.send(topic, number.to_bytes(8, "big"), bad)
    publisher.send(b"alone")
    publisher.publish(topic, number, payload)
    assert follower.next() == 3 and follower.feed.bad_messages == 5
    follower.feed.close()
