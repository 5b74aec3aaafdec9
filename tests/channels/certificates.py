"""Throw-away certificates for one test run, made with the openssl command line tool."""

from __future__ import annotations

import functools
import subprocess
import tempfile
from pathlib import Path

from kvpool.channels.tls import TlsConfig

_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []  # live as long as the process


def _openssl(folder: Path, *arguments: str) -> None:
    done = subprocess.run(["openssl", *arguments], cwd=folder, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, f"openssl {' '.join(arguments)}: {done.stderr}"


@functools.cache
def authority(name: str) -> Path:
    """The folder of a certificate authority; ca.pem is its certificate."""
    _FOLDERS.append(tempfile.TemporaryDirectory(prefix=f"kvpool-{name}-"))
    folder = Path(_FOLDERS[-1].name)
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", "ca.key"]
    _openssl(folder, "req", "-x509", *key, "-out", "ca.pem", "-days", "2", "-subj", f"/CN={name}")
    return folder


@functools.cache
def certificate(ca: str, owner: str, names: str = "IP:127.0.0.1") -> tuple[Path, Path]:
    """(certificate, key) that an authority signed for an owner with these subjectAltNames."""
    folder = authority(ca)
    (folder / f"{owner}.ext").write_text(f"subjectAltName={names}\n")
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", f"{owner}.key"]
    _openssl(folder, "req", *key, "-out", f"{owner}.csr", "-subj", f"/CN={owner}")
    signing = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", f"{owner}.ext"]
    _openssl(folder, "x509", "-req", "-in", f"{owner}.csr", "-out", f"{owner}.pem", *signing)
    return folder / f"{owner}.pem", folder / f"{owner}.key"


def server_tls(*, verify_clients: bool = False, ca: str = "ours", names: str = "IP:127.0.0.1") -> TlsConfig:
    cert, key = certificate(ca, f"source-{names.replace(':', '-')}", names)
    return TlsConfig(cert, key, authority(ca) / "ca.pem", verify_clients=verify_clients)


def client_tls(*, ca: str = "ours", own: str | None = None, server_name: str = "") -> TlsConfig:
    """Trusts `ca`; `own`: with a certificate of this authority."""
    cert, key = certificate(own, "client") if own is not None else (None, None)
    return TlsConfig(cert, key, authority(ca) / "ca.pem", server_name=server_name)
