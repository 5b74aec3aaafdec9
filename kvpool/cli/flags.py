"""Flags that many commands of `kvpool` and `kvctl` have: the credential, and the files of TLS."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvpool.channels.tls import TlsConfig
from kvpool.cli import output
from kvpool.core.errors import BadArgument

Credential = Annotated[
    str, typer.Option("--credential", envvar="KVPOOL_CREDENTIAL", help="Shared secret that every call must carry.")
]
TlsCert = Annotated[
    str, typer.Option("--tls-cert", envvar="KVPOOL_TLS_CERT", help="PEM file: TLS, with this certificate.")
]
TlsKey = Annotated[str, typer.Option("--tls-key", envvar="KVPOOL_TLS_KEY", help="PEM file: the certificate's key.")]
TlsCa = Annotated[
    str, typer.Option("--tls-ca", envvar="KVPOOL_TLS_CA", help="PEM file: TLS, with peers of this authority only.")
]


def tls_of(cert: str, key: str, ca: str, *, serves: bool = False) -> TlsConfig | None:
    """Settings from the three flags, None without any. Ends the command where they don't make any.

    Args: serves: whether the process is called by others, and has to prove itself to them.
    """
    try:
        tls = TlsConfig.of_files(cert, key, ca)
        if tls is not None:
            # Before anything is started: what is wrong with the files is found now.
            tls.client_context()
            if serves:
                tls.server_context()
    except BadArgument as error:
        output.fail(str(error), hint=error.hint, code=output.EXIT_USAGE)
    return tls


def tls_environment(tls: TlsConfig | None) -> dict[str, str]:
    """Variables that give a child process the same settings."""
    if tls is None:
        return {}
    files = {"CERT": tls.cert, "KEY": tls.key, "CA": tls.ca}
    return {f"KVPOOL_TLS_{name}": str(Path(file).absolute()) for name, file in files.items() if file is not None}
