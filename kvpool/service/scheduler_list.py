"""Addresses of one or of several schedulers that know the same, written with commas: "a:7700,b:7700,c:7700"."""

from __future__ import annotations

import ipaddress
import socket

from kvpool.core.errors import BadArgument

#: More are taken to be a mistake.
SCHEDULERS_MAX = 16
#: How long an address is tried before the next one.
CONNECT_TIMEOUT_S = 1.0


def split(text: str) -> tuple[str, ...]:
    """The addresses, in order, each once.

    Raises: BadArgument if there is none, or too many.
    """
    addresses = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not 0 < len(addresses) <= SCHEDULERS_MAX:
        raise BadArgument(
            f"{text!r} names {len(addresses)} schedulers", hint=f"write 1 to {SCHEDULERS_MAX} of host:port, with commas"
        )
    return addresses


def target(text: str, *, by_name: bool = False) -> str:
    """What gRPC connects to: the first of the addresses that answers, and another one when that is lost.

    For callers that ask now and then; whoever must know with whom it speaks goes through the list itself.

    Args: by_name: for TLS, which checks the name that is connected to, and would take a whole list for one name: the
        first address that answers now, and no other one later.
    Raises: BadArgument as `split`, or if the name of one of several can't be resolved.
    """
    addresses = split(text)
    if len(addresses) == 1:
        return addresses[0]
    if by_name:
        return next((address for address in addresses if _answers(address)), addresses[0])
    families: dict[str, list[str]] = {}
    for address in addresses:
        host, _, port = address.rpartition(":")
        for found in _resolved(host.strip("[]"), address):
            if found.version == 4:
                families.setdefault("ipv4", []).append(f"{found}:{port}")
            else:
                families.setdefault("ipv6", []).append(f"[{found}]:{port}")
    # A target has one family: IPv4 if each scheduler has such an address.
    family = "ipv4" if len(families.get("ipv4", ())) >= len(addresses) or "ipv6" not in families else "ipv6"
    return f"{family}:{','.join(dict.fromkeys(families[family]))}"


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, UnicodeError, ValueError, OverflowError):
        return False
    return True


def _resolved(host: str, address: str) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    try:
        infos = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise BadArgument(f"scheduler {address!r}: {error}", hint="write host:port") from error
    return [ipaddress.ip_address(str(info[4][0]).partition("%")[0]) for info in infos]


class Rotation:
    """One address at a time, the next one after each loss."""

    def __init__(self, text: str) -> None:
        self._addresses = split(text)
        self._at = 0

    @property
    def address(self) -> str:
        return self._addresses[self._at]

    def __len__(self) -> int:
        return len(self._addresses)

    def next(self) -> bool:
        """Goes on to the next address. True when all have been tried: time to wait a little."""
        self._at = (self._at + 1) % len(self._addresses)
        return self._at == 0 or len(self._addresses) == 1
