"""The processes in which NIXL runs, on either side: `python -m kvpool.channels.nixl_process offer|read ...`.

Processes of their own because UCX ends a process when it finds no way out: seen in a source whose client had gone while
connecting, and in a client whose source had died. Neither a node nor an engine may end for that. Besides, a process
that is killed is the one proof, over every transport, that a read which was given up delivers nothing any more.

Nothing here is more than addresses and bytes: who may read what, and digests, are the business of those who start it.

 * `offer PATH UUID` registers the data of a segment. It prints one line of JSON: the parameters of the offer, or what
   went wrong. Then it reads single bytes: `1`, there are sessions that may read; `0`, there are none.
 * `read SOCKET MEMORY` reads for one channel; both are file descriptors. See `REQUEST` and `REPLY`.

Each ends with its standard input or its socket, so never later than whoever started it.
"""

from __future__ import annotations

import base64
import contextlib
import json
import mmap
import os
import secrets
import select
import socket
import struct
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvpool.channels.base import ChannelError
from kvpool.channels.nixl_agent import Agent, State
from kvpool.core.errors import KvpoolError
from kvpool.tiers.dram import Segment

#: The first request: bytes of the offer (JSON), bytes of a chunk; and how many chunks the memory has.
HELLO = struct.Struct("<IQI")
#: Each other request: number of the chunk to fill, pieces. Addresses and sizes follow: u64 (pieces, 2).
REQUEST = struct.Struct("<II")
#: The first reply says that the link works; each other one that a chunk is full. With a message, neither is so, and
#: the process ends. Number of the chunk, bytes of the message.
REPLY = struct.Struct("<II")

#: What a client reads first, to see that it has reached this source and not what runs in its place.
MARK_BYTES = 32
#: Connections begin, and transports that are not truly one-sided (tcp) answer, when this side looks after them.
ACTIVE_NAP_S = 0.0001
IDLE_NAP_S = 0.002
#: A client says that it begins, and then after each chunk; one that has been silent for longer is idle.
ACTIVE_S = 0.1
_ERROR_NAP_S = 0.1
#: Between looks at a read, which are what moves it on: short at first, then rarely enough to leave the CPU alone.
READ_NAP_MIN_S, READ_NAP_MAX_S = 0.00002, 0.001
_MESSAGE = b"read"


class Offering:
    """An agent with the memory that it offers."""

    def __init__(self, data: NDArray[np.uint8]) -> None:
        """Args: data: uint8 (bytes), mapped until `close`. Raises: Unsupported, ChannelError."""
        self._mark = np.frombuffer(secrets.token_bytes(MARK_BYTES), dtype=np.uint8).copy()
        self._agent = Agent("source")
        self._agent.register(data)
        self._agent.register(self._mark)
        self.parameters = {
            "agent": base64.b64encode(self._agent.metadata()).decode(),
            "base": str(data.ctypes.data),
            "bytes": str(data.nbytes),
            "mark": self._mark.tobytes().hex(),
            "mark_base": str(self._mark.ctypes.data),
            "writable": "0",
        }
        self._active_until_s = 0.0
        self._failing = False

    def step(self) -> float:
        """Does what readers wait for; returns how many seconds may pass until the next step."""
        try:
            if self._agent.progress():
                self._active_until_s = time.monotonic() + ACTIVE_S
        except ChannelError as error:
            if not self._failing:
                print(error, file=sys.stderr, flush=True)
            self._failing = True
            return _ERROR_NAP_S
        self._failing = False
        return ACTIVE_NAP_S if time.monotonic() < self._active_until_s else IDLE_NAP_S


def serve_offer(offering: Offering, commands: int) -> None:
    """Returns at the end of the file descriptor `commands`."""
    nap_s: float | None = None
    awake = False
    while True:
        if select.select([commands], [], [], nap_s)[0]:
            command = os.read(commands, 64)
            if not command:
                return
            awake = command.endswith(b"1")
        nap_s = offering.step() if awake else None


class Reading:
    """An agent that reads from one source into chunks of memory."""

    def __init__(self, offer: Mapping[str, str], chunks: NDArray[np.uint8]) -> None:
        """Args: chunks: uint8 (chunks, bytes). Raises: Unsupported, ChannelError."""
        self._chunks = chunks
        self._agent = Agent("client")
        self._agent.register(chunks.reshape(-1))
        self._peer = self._agent.connect(base64.b64decode(offer["agent"]))
        self._under_way: list[int] = []

    def begin(self, chunk: int, remote: NDArray[np.uint64]) -> None:
        """Begins to fill a chunk from remote pieces uint64 (pieces, 2), addresses and bytes. Raises: ChannelError."""
        if not self._under_way:
            self._agent.notify(self._peer, _MESSAGE)
        sizes = remote[:, 1]
        local = np.empty_like(remote)
        local[:, 0] = np.uint64(self._chunks[chunk].ctypes.data) + np.cumsum(sizes) - sizes
        local[:, 1] = sizes
        self._agent.begin_read(chunk, self._peer, local, remote, _MESSAGE)
        self._under_way.append(chunk)

    def step(self) -> list[int]:
        """The chunks that are full now, in the order of their beginning. Raises: ChannelError if a read failed."""
        done = []
        while self._under_way:
            state = self._agent.state(self._under_way[0])
            if state is State.FAILED:
                raise ChannelError("nixl: the read failed", hint="is the source still there?")
            if state is State.RUNNING:
                break
            done.append(self._under_way.pop(0))
        return done

    @property
    def idle(self) -> bool:
        return not self._under_way


def serve_reads(sock: socket.socket, memory: int) -> None:
    """Returns when the other side hangs up."""
    size, chunk_bytes, chunk_count = HELLO.unpack(_exactly(sock, HELLO.size))
    offer = json.loads(_exactly(sock, size))
    mapped = mmap.mmap(memory, chunk_bytes * chunk_count)
    chunks = np.frombuffer(mapped, dtype=np.uint8).reshape(chunk_count, chunk_bytes)
    try:
        reading = Reading(offer, chunks)
        mark = bytes.fromhex(offer["mark"])
        reading.begin(0, np.array([[int(offer["mark_base"]), len(mark)]], dtype=np.uint64))
        recognised = False
        nap_s: float | None = READ_NAP_MIN_S
        while True:
            if select.select([sock], [], [], nap_s)[0]:
                chunk, pieces = REQUEST.unpack(_exactly(sock, REQUEST.size))
                packed = _exactly(sock, 16 * pieces)
                reading.begin(chunk, np.frombuffer(packed, dtype=np.uint64).reshape(pieces, 2))
                nap_s = 0.0
            done = reading.step()
            if done and not recognised:
                if chunks[0, : len(mark)].tobytes() != mark:
                    raise ChannelError("nixl: another process answers in the source's place")
                recognised = True
            for chunk in done:
                sock.sendall(REPLY.pack(chunk, 0))
            if reading.idle:
                nap_s = None
            else:
                nap_s = READ_NAP_MIN_S if done or not nap_s else min(nap_s * 1.5, READ_NAP_MAX_S)
    except KvpoolError as error:
        message = str(error).encode()
        sock.sendall(REPLY.pack(0, len(message)) + message)


def _exactly(sock: socket.socket, count: int) -> bytes:
    """Raises: EOFError when the other side hangs up."""
    received = sock.recv(count, socket.MSG_WAITALL) if count else b""
    if len(received) < count:
        raise EOFError
    return received


def main() -> None:
    # UCX writes to standard output, which is where an answer belongs.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if sys.argv[1] == "read":
        with socket.socket(fileno=int(sys.argv[2])) as sock, contextlib.suppress(EOFError, OSError):
            serve_reads(sock, int(sys.argv[3]))
    else:
        try:
            # Writable, for network cards: they register no memory that is read-only.
            segment = Segment.attach(Path(sys.argv[2]), uuid=bytes.fromhex(sys.argv[3]), mode="device")
            offering = Offering(segment.data)
        except KvpoolError as error:
            print(json.dumps({"error": str(error), "hint": error.hint}), file=answers, flush=True)
            sys.exit(1)
        print(json.dumps(offering.parameters), file=answers, flush=True)
        serve_offer(offering, 0)
    # Not through the ends of the libraries, where NIXL has been seen to fail: nothing is left to be done.
    os._exit(0)


if __name__ == "__main__":
    main()
