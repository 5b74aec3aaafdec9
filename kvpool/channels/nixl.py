"""The nixl channel, client side: one-sided reads of a source's segment through NVIDIA's NIXL (RDMA, NVLink, UCX).

NIXL runs in a process of its own (`nixl_process`) and reads in chunks into memory shared with it; they are copied from
there into the caller's rows and checked. A read that is given up cannot be called back: NIXL may still deliver it later
(seen over tcp, from a source that was stopped and went on). Were the caller's memory its target, late bytes could fall
into rows that hold others by then. So a link that failed is killed, and its memory goes with it.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import mmap
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvpool.channels.base import Capabilities, ChannelError, Memory, Rows, addresses, check_memory, row_numbers
from kvpool.channels.control import Control
from kvpool.channels.nixl_agent import available
from kvpool.channels.nixl_process import HELLO, REPLY, REQUEST
from kvpool.channels.pieces import Chunk, Digested, cut
from kvpool.core.arrays import Descriptors
from kvpool.core.errors import BadArgument, Reason, Unsupported

__all__ = ["NixlChannel", "available"]

CHUNK_BYTES = 8 << 20
CHUNK_BYTES_MIN = 4096
#: One chunk is on its way while another one is copied out.
CHUNKS = 2
#: With the start of a process.
OPEN_TIMEOUT_S = 15.0
CLOSE_TIMEOUT_S = 5.0
_MESSAGE_BYTES_MAX = 4096


@dataclass(frozen=True, slots=True)
class NixlOffer:
    """What a source tells about itself."""

    base: int
    data_bytes: int
    parameters: Mapping[str, str]

    @classmethod
    def parse(cls, parameters: Mapping[str, str]) -> NixlOffer:
        """Raises: BadArgument."""
        try:
            base64.b64decode(parameters["agent"], validate=True)
            mark = bytes.fromhex(parameters["mark"])
            places = [int(parameters[name]) for name in ("base", "bytes", "mark_base")]
        except (KeyError, ValueError, binascii.Error) as error:
            raise BadArgument(f"a bad nixl offer: {error}") from error
        if not 0 < len(mark) <= CHUNK_BYTES_MIN or not all(0 < place < 1 << 63 for place in places):
            raise BadArgument("a bad nixl offer: it names no memory")
        names = ("agent", "mark", "mark_base")
        return cls(places[0], places[1], {name: parameters[name] for name in names})


class _Link:
    """The process that is connected to the source, and the chunks that it fills."""

    def __init__(self, offer: NixlOffer, chunk_bytes: int, end_s: float) -> None:
        """Starts the process; `finish` the chunk 0 to know that it is connected."""
        self._offer = offer
        size = CHUNKS * max(chunk_bytes, CHUNK_BYTES_MIN)
        memory = os.memfd_create("kvpool-nixl", os.MFD_CLOEXEC)
        ours, theirs = socket.socketpair()
        self._control = Control(ours, "nixl")
        try:
            os.ftruncate(memory, size)
            self._chunks = np.frombuffer(mmap.mmap(memory, size), dtype=np.uint8).reshape(CHUNKS, -1)
            command = [sys.executable, "-m", "kvpool.channels.nixl_process", "read"]
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno()), str(memory)], pass_fds=(theirs.fileno(), memory),
                stdin=subprocess.DEVNULL, stdout=2, start_new_session=True,
            )  # fmt: skip
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            os.close(memory)
        text = json.dumps(dict(offer.parameters)).encode()
        try:
            self._control.send(HELLO.pack(len(text), self._chunks.shape[1], CHUNKS) + text, end_s)
        except BaseException:
            self.close()
            raise

    def begin(self, number: int, chunk: Chunk, offsets: NDArray[np.int64], end_s: float) -> None:
        """Begins to read a chunk of blocks at these offsets of the segment. Raises: ChannelError."""
        starts = offsets[chunk.blocks] + chunk.starts
        # What lies one behind the other in the segment is one piece: it does so in the chunk anyway.
        first = np.concatenate([[True], starts[1:] != starts[:-1] + chunk.sizes[:-1]])
        remote = np.empty((int(first.sum()), 2), dtype=np.uint64)
        remote[:, 0] = starts[first] + self._offer.base
        remote[:, 1] = np.add.reduceat(chunk.sizes, np.flatnonzero(first))
        self._begin(number, remote, end_s)

    def probe(self, end_s: float) -> None:
        """Reads the source's mark. Raises: ChannelError if it can't be read, or is another's."""
        mark = bytes.fromhex(self._offer.parameters["mark"])
        place = [int(self._offer.parameters["mark_base"]), len(mark)]
        self._begin(0, np.array([place], dtype=np.uint64), end_s)
        self.finish(0, end_s)
        if self._chunks[0, : len(mark)].tobytes() != mark:
            raise ChannelError("nixl: another process answers in the source's place")

    def _begin(self, number: int, remote: NDArray[np.uint64], end_s: float) -> None:
        self._control.send(REQUEST.pack(number, len(remote)) + remote.tobytes(), end_s)

    def finish(self, number: int, end_s: float) -> None:
        """Returns when the chunk is there. Raises: ChannelError."""
        replied, message_bytes = REPLY.unpack(self._control.receive(REPLY.size, end_s))
        if message_bytes:
            message = self._control.receive(min(message_bytes, _MESSAGE_BYTES_MAX), end_s)
            raise ChannelError(message.decode(errors="replace"))
        assert replied == number, "chunks are filled in order"

    def address(self, number: int) -> int:
        return int(self._chunks.ctypes.data + number * self._chunks.strides[0])

    def interrupt(self) -> None:
        """Ends a call under way in another thread."""
        self._control.interrupt()

    def close(self) -> None:
        self._control.close()
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_TIMEOUT_S)


class NixlChannel:
    """Reads from one source; one call at a time, others wait for it within their deadlines.

    Digests are always checked, also where `verify` is false: nobody else vouches for bytes that the source does not
    know to be read. After an error the next call connects anew.
    """

    kind = "nixl"
    capabilities = Capabilities(same_host=False, through_source=False, threads_useful=1, writes=False)

    def __init__(self, offer: NixlOffer, *, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._offer, self._chunk_bytes = offer, chunk_bytes
        self._turn = threading.Lock()
        self._closed = False
        self._link: _Link | None = None

    @classmethod
    def open(cls, parameters: Mapping[str, str]) -> NixlChannel:
        """Opens what a source offered, and sees that it works. Raises: ChannelError, BadArgument, Unsupported."""
        if not available():
            raise Unsupported("nixl: NIXL is not installed", hint="pip install 'kvpool[nixl]'")
        channel = cls(NixlOffer.parse(parameters))
        with channel._my_turn(time.monotonic() + OPEN_TIMEOUT_S):
            pass
        return channel

    def read(
        self,
        lease: int,
        blocks: Descriptors,
        out: Memory,
        rows: Rows | None = None,
        *,
        deadline_s: float,
        verify: bool = True,
    ) -> NDArray[np.bool_]:
        rows = row_numbers(rows, len(blocks), len(out))
        check_memory(out, rows, blocks.sizes, to_write=True)
        offsets = self._inside(blocks)
        received = Digested(blocks, addresses(out, rows))
        end_s = time.monotonic() + deadline_s
        with self._my_turn(end_s) as link:
            before: tuple[int, Chunk] | None = None
            for number, chunk in enumerate(cut(blocks.sizes, self._chunk_bytes)):
                link.begin(number % CHUNKS, chunk, offsets, end_s)
                self._take(link, before, received, end_s)
                before = number % CHUNKS, chunk
            self._take(link, before, received, end_s)
        return received.good

    def write(
        self, reservation: int, slots: Descriptors, data: Memory, rows: Rows | None = None, *, deadline_s: float
    ) -> NDArray[np.uint64]:
        """Raises: ChannelError, unless there is nothing to write: this channel only reads."""
        rows = row_numbers(rows, len(slots), len(data))
        check_memory(data, rows, slots.sizes)
        if len(rows) == 0:
            return np.zeros(slots.digests.shape, dtype=np.uint64)
        raise ChannelError("nixl: this channel only reads", hint="write over shm or tcp", reason=Reason.UNSUPPORTED)

    def probe(self, *, deadline_s: float) -> None:
        """Sees that the source can be read. Raises: ChannelError."""
        end_s = time.monotonic() + deadline_s
        with self._my_turn(end_s) as link:
            link.probe(end_s)

    def close(self) -> None:
        self._closed = True
        link = self._link
        if link is not None:
            link.interrupt()
        # A call under way fails now, and then disconnects by itself.
        if self._turn.acquire(timeout=CLOSE_TIMEOUT_S):
            self._disconnect()
            self._turn.release()

    @contextlib.contextmanager
    def _my_turn(self, end_s: float) -> Iterator[_Link]:
        """The link, for one call; it does not outlive an error. Raises: ChannelError."""
        if not self._turn.acquire(timeout=max(end_s - time.monotonic(), 0)):
            raise ChannelError("nixl: another call took all the time", reason=Reason.DEADLINE)
        try:
            try:
                if end_s <= time.monotonic():
                    raise ChannelError("nixl: the deadline passed", reason=Reason.DEADLINE)
                yield self._connected(end_s)
            except BaseException as error:
                self._disconnect()
                if self._closed and isinstance(error, ChannelError):
                    raise ChannelError("nixl: the channel is closed") from error
                raise
        finally:
            self._turn.release()

    def _connected(self, end_s: float) -> _Link:
        if self._closed:
            raise ChannelError("nixl: the channel is closed")
        if self._link is None:
            self._link = _Link(self._offer, self._chunk_bytes, end_s)
            if self._closed:
                raise ChannelError("nixl: the channel is closed")
            self._link.finish(0, end_s)
        return self._link

    def _disconnect(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close()

    def _take(self, link: _Link, filled: tuple[int, Chunk] | None, received: Digested, end_s: float) -> None:
        if filled is not None:
            number, chunk = filled
            link.finish(number, end_s)
            received.receive(chunk, link.address(number))

    def _inside(self, blocks: Descriptors) -> NDArray[np.int64]:
        """Offsets, checked against the segment. Raises: ChannelError."""
        offsets, sizes = blocks.offsets.astype(np.uint64), blocks.sizes.astype(np.uint64)
        room = np.uint64(self._offer.data_bytes)
        if np.any(sizes > room) or np.any(offsets > room - np.minimum(sizes, room)):
            raise ChannelError("nixl: the source described blocks outside its segment")
        return offsets.astype(np.int64)
