"""What `kvctl` shows to those it asks: one parameter of a command, four options of the command line."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvpool.channels.tls import TlsConfig
from kvpool.cli.flags import Credential, TlsCa, TlsCert, TlsKey, tls_of


@dataclass(frozen=True)
class Access:
    """A credential and TLS settings, for every process of a cluster."""

    credential: str = ""
    tls: TlsConfig | None = None


#: Access to a cluster that asks for nothing.
ANYBODY = Access()
#: The options that stand for an `Access`.
_OPTIONS: dict[str, Any] = {"credential": Credential, "tls_cert": TlsCert, "tls_key": TlsKey, "tls_ca": TlsCa}


def with_access_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer is to see it: with the options in place of its parameter `access`, if it has one."""
    parameters = dict(inspect.signature(command).parameters)
    if "access" not in parameters:
        return command
    hints = typing.get_type_hints(command, include_extras=True)
    shown = {
        name: parameter.replace(annotation=hints[name]) for name, parameter in parameters.items() if name != "access"
    }
    for name, kind in _OPTIONS.items():
        shown[name] = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default="", annotation=kind)

    @functools.wraps(command)
    def run(**values: Any) -> None:
        credential, *files = (values.pop(name) for name in _OPTIONS)
        command(**values, access=Access(credential, tls_of(*files)))

    del run.__wrapped__  # type: ignore[attr-defined]
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in shown.values()]
    )
    run.__annotations__ = {name: parameter.annotation for name, parameter in shown.items()}
    return run
