"""Server-sent events out of a byte stream. Pure.

Source: WHATWG HTML, server-sent events; only `data` lines matter here.
"""

from __future__ import annotations

from kvpool.core.errors import Overloaded

#: One event's bytes; more is not what an inference server sends.
EVENT_BYTES_MAX = 64 << 20


class SseReader:
    """Feed it bytes as they come, however they are cut; it gives the data of each event that is complete.

    Lines end with a line feed, or carriage return and line feed: a carriage return alone is none here.
    """

    def __init__(self) -> None:
        self._rest: list[bytes] = []
        self._data: list[bytes] = []
        self._bytes = 0

    def feed(self, piece: bytes) -> list[bytes]:
        """Raises: Overloaded for an event without end."""
        self._bytes += len(piece)
        if self._bytes > EVENT_BYTES_MAX:
            raise Overloaded("an event of the server has no end")
        if b"\n" not in piece:
            self._rest.append(piece)
            return []
        lines = (b"".join(self._rest) + piece).split(b"\n")
        self._rest = [lines.pop()]
        events: list[bytes] = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
                self._bytes = len(self._rest[0])
        return events
