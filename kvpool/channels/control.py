"""A socket for small messages between two sides of a channel, every operation of which has a deadline."""

from __future__ import annotations

import contextlib
import select
import socket
import time

from kvpool.channels.base import ChannelError
from kvpool.core.errors import Reason


class Control:
    """Owns a connected stream socket. One thread at a time sends and receives; any may interrupt."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        """Args: name: begins the text of errors."""
        self._sock, self._name = sock, name
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @property
    def local_host(self) -> str:
        """The address of this end, which the other end reaches."""
        return str(self._sock.getsockname()[0])

    def send(self, data: bytes, end_s: float) -> None:
        """Args: end_s: monotonic seconds. Raises: ChannelError."""
        self._arm(end_s)
        try:
            self._sock.sendall(data)
        except TimeoutError as error:
            raise self._too_late() from error
        except OSError as error:
            raise self._gone() from error

    def receive(self, count: int, end_s: float) -> bytes:
        """Exactly `count` bytes. Raises: ChannelError."""
        received = bytearray()
        while len(received) < count:
            self._arm(end_s)
            try:
                part = self._sock.recv(count - len(received))
            except TimeoutError as error:
                raise self._too_late() from error
            except OSError as error:
                raise self._gone() from error
            if not part:
                raise self._gone()
            received += part
        return bytes(received)

    def lost(self) -> bool:
        """Whether the other side has ended already; to be asked while it has nothing to say."""
        poller = select.poll()  # any file descriptor, however large
        try:
            poller.register(self._sock, select.POLLIN)
        except ValueError:
            return True
        return bool(poller.poll(0))

    def interrupt(self) -> None:
        """Ends the calls under way, and all later ones, with an error."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._sock.close()

    def _arm(self, end_s: float) -> None:
        left_s = end_s - time.monotonic()
        if left_s <= 0:
            raise self._too_late()
        try:
            self._sock.settimeout(left_s)
        except OSError as error:
            raise self._gone() from error

    def _too_late(self) -> ChannelError:
        return ChannelError(f"{self._name}: the deadline passed", reason=Reason.DEADLINE)

    def _gone(self) -> ChannelError:
        return ChannelError(f"{self._name}: the other side has ended", hint="is the source still there?")
