"""TLS for gRPC, from the same settings as that of the data channels: credentials of servers and of channels.

Files are read when a server or a channel is made: a process keeps the certificates that it began with.
"""

from __future__ import annotations

import ssl
from pathlib import Path

import grpc

from kvpool.channels.tls import TlsConfig
from kvpool.core.errors import BadArgument


def server_credentials(tls: TlsConfig) -> grpc.ServerCredentials:
    """Raises: BadArgument if the files don't make any."""
    tls.server_context()  # says what is wrong with the files; gRPC would not
    assert tls.cert is not None and tls.key is not None
    pair = (_read(tls.key), _read(tls.cert))
    trusted = _read(tls.ca) if tls.verify_clients and tls.ca is not None else None
    return grpc.ssl_server_credentials([pair], trusted, require_client_auth=tls.verify_clients)


def channel_credentials(tls: TlsConfig) -> grpc.ChannelCredentials:
    """Raises: BadArgument if the files don't make any."""
    tls.client_context()
    own = (_read(tls.key), _read(tls.cert)) if tls.cert is not None and tls.key is not None else (None, None)
    return grpc.ssl_channel_credentials(_trusted(tls), *own)


def channel_options(tls: TlsConfig | None) -> list[tuple[str, str]]:
    """Where the certificates of servers name something else than their addresses."""
    return [("grpc.ssl_target_name_override", tls.server_name)] if tls is not None and tls.server_name else []


def _trusted(tls: TlsConfig) -> bytes | None:
    """Whom a client trusts; as on the data channel that is the system's authorities unless one is named."""
    if tls.ca is not None:
        return _read(tls.ca)
    system = ssl.get_default_verify_paths().cafile
    return _read(Path(system)) if system else None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadArgument(f"can't read {path}: {error.strerror}", hint="is it a PEM file that may be read?") from error


#: What gRPC says of a handshake that failed, what that means, and what to do.
_TROUBLES = (
    ("CERTIFICATE_VERIFY_FAILED", "its certificate is of no authority that is trusted here", "is --tls-ca its own?"),
    ("not in peer certificate", "its certificate does not name this address", "connect to a name that it has"),
    ("WRONG_VERSION_NUMBER", "it does not speak TLS", "give both sides the --tls flags, or neither"),
    ("Ssl handshake failed", "the handshake failed", "are the certificates of both sides as they should be?"),
    (
        "Socket closed", "it ended the connection",
        "if it speaks TLS: --tls-ca, and where it asks for certificates of clients --tls-cert and --tls-key",
    ),
)  # fmt: skip


def trouble(details: str) -> tuple[str, str] | None:
    """(what went wrong, hint) where the details of a failed call say that it was TLS, or look like it."""
    return next(((what, hint) for mark, what, hint in _TROUBLES if mark in details), None)
