"""What a node offers its clients to move bytes with, best first: one small class for each kind of channel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from kvpool.channels.tcp_server import TcpDataServer
from kvpool.service.sessions import Session
from kvpool.tiers.dram import Segment


@dataclass(frozen=True)
class ShmOffer:
    """The node's own memory, for processes of its host."""

    segment: Segment
    kind: str = "shm"

    def offer(self, session: Session, token: bytes, *, same_host: bool) -> Mapping[str, str] | None:
        if not same_host:
            return None
        return {
            "path": str(self.segment.path),
            "uuid": self.segment.uuid.hex(),
            # Without proof of a writer's end its slots could never be freed safely.
            "writable": "1" if session.proof is not None else "0",
        }


@dataclass(frozen=True)
class TcpOffer:
    """The data port, at an address that others can reach."""

    server: TcpDataServer
    address: str
    kind: str = "tcp"

    def offer(self, session: Session, token: bytes, *, same_host: bool) -> Mapping[str, str] | None:
        return {**self.server.offer_parameters, "address": self.address, "token": token.hex()}


class SessionServer(Protocol):
    """A data server that makes an offer for each session; None: not now."""

    def offer(self, session: int, token: bytes) -> Mapping[str, str] | None: ...


@dataclass(frozen=True)
class ServerOffer:
    """A channel whose server says itself what a client needs: nixl, collective."""

    server: SessionServer
    kind: str

    def offer(self, session: Session, token: bytes, *, same_host: bool) -> Mapping[str, str] | None:
        return self.server.offer(session.id, token)
