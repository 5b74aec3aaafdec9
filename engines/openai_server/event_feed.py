"""An engine's event sockets: subscribes, asks for what was missed, hands messages on. The thread does nothing else."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from engines.openai_server.event_order import Action, AskFrom, EventOrder, Forget, Take
from engines.openai_server.kv_events import Message, message_of
from kvpool.core.errors import BadArgument, Unsupported

log = logging.getLogger(__name__)

_POLL_S = 0.2
#: What has not been sent again by then is taken for lost.
REPLAY_S = 5.0
#: Messages in the subscriber's own queue; beyond it the publisher drops, which shows as a gap.
_HIGH_WATER = 100_000
_END = (1 << 64) - 1


def libraries() -> tuple[Any, Any]:
    """ZMQ and msgpack. Raises: Unsupported where they are not installed."""
    try:
        import msgspec
        import zmq
    except ImportError as error:
        raise Unsupported(
            f"reading an engine's KV events needs {error.name!r}", hint="pip install 'kvpool[events]'"
        ) from error
    return zmq, msgspec.msgpack


class EventFeed:
    """Reads one engine's events until it is closed.

    Args:
        endpoint: where the engine publishes, e.g. tcp://127.0.0.1:5557.
        replay_endpoint: where it sends again what was missed; empty = nowhere.
        topic: what the engine publishes under; empty = everything.
        take: called in this thread with each message, in order.
        forget: called in this thread when what was known is void.
    Raises: Unsupported without the libraries.
    """

    def __init__(
        self,
        endpoint: str,
        replay_endpoint: str,
        *,
        topic: str = "",
        take: Callable[[Message], None],
        forget: Callable[[], None],
    ) -> None:
        self._zmq, self._msgpack = libraries()
        self._endpoint, self._replay_endpoint, self._topic = endpoint, replay_endpoint, topic
        self._take, self._forget = take, forget
        self._order = EventOrder(replays=bool(replay_endpoint))
        self._replay_until_s = 0.0
        self._replay: Any = None
        self.bad_messages = 0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kv-events", daemon=True)

    @property
    def gaps(self) -> int:
        """Times that messages were missing."""
        return self._order.gaps

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(5.0)

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        context = self._zmq.Context()
        try:
            self._read(context)
        except Exception:
            # A bug of ours costs what is known of this cache, and nothing else.
            log.exception("reading the events of %s failed", self._endpoint)
            self._forget()
        finally:
            context.destroy(linger=0)

    def _read(self, context: Any) -> None:
        zmq = self._zmq
        live = context.socket(zmq.SUB)
        live.set_hwm(_HIGH_WATER)
        live.connect(self._endpoint)
        live.setsockopt_string(zmq.SUBSCRIBE, self._topic)
        poller = zmq.Poller()
        poller.register(live, zmq.POLLIN)
        if self._replay_endpoint:
            self._replay = context.socket(zmq.DEALER)
            self._replay.connect(self._replay_endpoint)
            poller.register(self._replay, zmq.POLLIN)
        self._do(self._order.start())
        while not self._closing.is_set():
            for socket, _ in poller.poll(int(_POLL_S * 1000)):
                frames = socket.recv_multipart()
                self._do(self._heard_live(frames) if socket is live else self._heard_again(frames))
            if self._order.replaying and time.monotonic() > self._replay_until_s:
                log.info("%s: what was missed did not come again", self._endpoint)
                self._do(self._order.replay_ended())

    def _do(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Take(message):
                    self._take(message)
                case Forget():
                    self._forget()
                case AskFrom(number):
                    self._replay_until_s = time.monotonic() + REPLAY_S
                    self._replay.send_multipart([b"", number.to_bytes(8, "big")])

    def _heard_live(self, frames: list[bytes]) -> list[Action]:
        """[topic, number, message]"""
        if len(frames) != 3:
            self.bad_messages += 1
            return []
        message = self._message(frames[2])
        return [] if message is None else self._order.live(int.from_bytes(frames[1], "big"), message)

    def _heard_again(self, frames: list[bytes]) -> list[Action]:
        """[empty, topic, number, message], by some without the topic; a last one has the number -1."""
        if len(frames) not in (3, 4):
            self.bad_messages += 1
            return []
        number = int.from_bytes(frames[-2], "big")
        if number == _END:
            return self._order.replay_ended()
        message = self._message(frames[-1])
        return [] if message is None else self._order.replayed(number, message)

    def _message(self, payload: bytes) -> Message | None:
        """None, and counted, for what makes no sense: its number is then missing, and asked for or given up."""
        try:
            return message_of(self._msgpack.decode(payload))
        except (BadArgument, ValueError, RecursionError) as error:  # what msgspec raises is a ValueError
            self.bad_messages += 1
            if self.bad_messages == 1:
                log.warning("%s: a message that is not understood: %s", self._endpoint, error)
            return None
