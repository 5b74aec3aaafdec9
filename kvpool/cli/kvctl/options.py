"""Options that several commands of `kvctl` have, and what they stand for."""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
import typer

from kvpool.cli import output
from kvpool.cli.kvctl.access import ANYBODY, Access
from kvpool.core import hashing
from kvpool.core.ids import KEY_BYTES, KeyArray
from kvpool.core.namespace import NamespaceSpec

Scheduler = Annotated[
    str, typer.Option("--scheduler", "-s", envvar="KVPOOL_SCHEDULER", help="Address of the scheduler.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
OneNode = Annotated[
    str, typer.Option("--node", "-n", help="Only this node: its id, or HOST:PORT to ask it without a scheduler.")
]
Objects = Annotated[
    str, typer.Option("--objects", metavar="DOMAIN", help="Names are of objects of this domain, not keys of blocks.")
]
Namespace = Annotated[str, typer.Option("--namespace", metavar="HEX", help="Only this namespace (its id).")]
Names = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY|NAME]...", help="Keys of blocks in hex; with --objects, names of objects."),
]
DEFAULT_SCHEDULER = "127.0.0.1:7700"
__all__ = [
    "ANYBODY", "DEFAULT_SCHEDULER", "Access", "Json", "Names", "Namespace", "Objects", "OneNode", "Scheduler",
    "parse_keys", "parse_namespace", "parse_seconds",
]  # fmt: skip

_UNITS_S = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86_400}


def parse_keys(names: list[str], objects: str) -> KeyArray:
    """Keys in hex, or the names of objects of a domain, as uint8 (names, 16). Ends the command if one is bad."""
    if objects:
        namespace = NamespaceSpec.objects(objects).id()
        packed = b"".join(hashing.object_key(namespace, name) for name in names)
        return np.frombuffer(packed, dtype=np.uint8).reshape(-1, KEY_BYTES)
    raw = [_hex(name, KEY_BYTES, "key of a block", "name objects with --objects DOMAIN") for name in names]
    return np.frombuffer(b"".join(raw), dtype=np.uint8).reshape(-1, KEY_BYTES)


def parse_namespace(text: str, objects: str = "") -> bytes:
    """The id of a namespace, or of a domain's; empty if neither is named. Ends the command if bad."""
    if objects:
        if text:
            output.fail("--objects names a namespace already", code=output.EXIT_USAGE)
        return bytes(NamespaceSpec.objects(objects).id())
    return _hex(text, 16, "namespace id", "`kvctl namespaces` lists them") if text else b""


def parse_seconds(text: str) -> float:
    """Seconds of "90", "500ms", "10m", "1.5h", "7d". Raises: typer.BadParameter."""
    digits = text.strip().rstrip("abcdefghijklmnopqrstuvwxyz ")
    unit = text.strip()[len(digits) :].strip() or "s"
    try:
        seconds = float(digits) * _UNITS_S[unit]
    except (ValueError, KeyError):
        raise typer.BadParameter(f"{text!r} is not a duration; write for example 90s, 10m, 1.5h or 7d") from None
    if not math.isfinite(seconds) or seconds < 0:
        raise typer.BadParameter(f"{text!r} is out of range")
    return seconds


def _hex(text: str, size: int, what: str, hint: str) -> bytes:
    try:
        raw = bytes.fromhex(text)
    except ValueError:
        raw = b""
    if len(raw) != size:
        output.fail(f"{text!r} is no {what}: that has {2 * size} hex digits", hint=hint, code=output.EXIT_USAGE)
    return raw
