"""TLS for the tcp channel: contexts from files, handshakes within a deadline, failures that say what to do.

Both ends are kvpool, so only TLS 1.3 is spoken. A source always proves who it is; clients too where it demands that.
"""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

from kvpool.channels.base import ChannelError
from kvpool.core.errors import BadArgument, Reason

#: First byte of a TLS handshake; a plain greeting begins with a letter.
HANDSHAKE_BYTE = 0x16
#: A fatal alert, handshake_failure: tells a TLS client at once that nobody here speaks TLS.
PLAIN_ALERT = bytes([0x15, 3, 1, 0, 2, 2, 40])


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """Where one side finds its keys and whom it trusts. Files are PEM.

    cert, key: what this side proves itself with; a source needs both, a client only where `verify_clients` is set.
    ca: whom this side trusts; without it a client trusts what the system trusts.
    verify_clients: a source lets only clients in whose certificates `ca` signed.
    server_name: name that a client expects in the source's certificate; empty = the address it connects to.
    """

    cert: Path | None = None
    key: Path | None = None
    ca: Path | None = None
    verify_clients: bool = False
    server_name: str = ""

    @classmethod
    def of_files(cls, cert: str, key: str, ca: str) -> TlsConfig | None:
        """Settings of a process from its flags, for what it serves and what it calls; None without any of them.

        With an authority, what it serves takes clients with a certificate of that authority only.

        Raises: BadArgument if one flag lacks another.
        """
        if not (cert or key or ca):
            return None
        if bool(cert) != bool(key):
            given, lacking = ("--tls-cert", "--tls-key") if cert else ("--tls-key", "--tls-cert")
            raise BadArgument(f"{given} needs {lacking}", hint="a certificate goes with its key: give both PEM files")
        own = (Path(cert), Path(key)) if cert else (None, None)
        return cls(*own, Path(ca) if ca else None, verify_clients=bool(cert and ca))

    def server_context(self) -> ssl.SSLContext:
        """Raises: BadArgument if the files don't make one."""
        if self.cert is None or self.key is None:
            raise BadArgument(
                "a process that serves TLS needs a certificate and its key", hint="give --tls-cert and --tls-key too"
            )
        if self.verify_clients and self.ca is None:
            raise BadArgument("nobody is named whose client certificates count", hint="give ca, or no verify_clients")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._fill(context)
        if self.verify_clients:
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def client_context(self) -> ssl.SSLContext:
        """Raises: BadArgument if the files don't make one."""
        if (self.cert is None) != (self.key is None):
            raise BadArgument("a certificate goes with its key", hint="give both cert and key, or neither")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._fill(context)
        if self.ca is None:
            context.load_default_certs()
        return context

    def _fill(self, context: ssl.SSLContext) -> None:
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        try:
            if self.ca is not None:
                context.load_verify_locations(self.ca)
            if self.cert is not None and self.key is not None:
                context.load_cert_chain(self.cert, self.key, password=_no_password)
        except OSError as error:  # an SSLError is one too
            files = ", ".join(str(path) for path in (self.ca, self.cert, self.key) if path is not None)
            raise BadArgument(
                f"TLS can't be set up from {files}: {error}",
                hint="are they PEM, readable, and do they belong together?",
            ) from error


def wrap(sock: socket.socket, context: ssl.SSLContext, server_name: str | None = None) -> ssl.SSLSocket:
    """A socket that will speak TLS; `sock` may not be used afterwards.

    Args: server_name: what the source's certificate has to name; None on the source's side.
    """
    return context.wrap_socket(
        sock, server_side=server_name is None, server_hostname=server_name, do_handshake_on_connect=False
    )


def handshake(sock: ssl.SSLSocket, timeout_s: float) -> None:
    """Raises: ChannelError."""
    try:
        sock.settimeout(timeout_s)
        sock.do_handshake()
    except TimeoutError as error:
        raise ChannelError("tcp: no TLS handshake by the deadline", reason=Reason.DEADLINE) from error
    except OSError as error:
        name = sock.server_hostname
        hint = f"is {name} in the source's certificate, did our ca sign it, does the source speak TLS?" if name else ""
        raise ChannelError(
            f"tcp: the TLS handshake failed: {error}", hint=hint, reason=Reason.UNAUTHENTICATED
        ) from error


def _no_password() -> str:
    """Asked for when a key is encrypted: the library would read one from the terminal."""
    raise OSError("the key is encrypted")
