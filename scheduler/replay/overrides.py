"""Another configuration for the core of a journal: a file that names what differs. Nothing is decided here."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from kvpool.core.errors import BadArgument
from scheduler.core.config import SchedulerConfig
from scheduler.core.policies import POLICIES
from scheduler.core.policy_parameters import PolicyParameters

FILE_BYTES_MAX = 1 << 20


def read_overrides(path: Path) -> dict[str, Any]:
    """Fields of `SchedulerConfig` from a .toml or .json file; those of the baselines in a table `baselines`.

    Raises: BadArgument for a file that can't be read, for unknown fields, and for values that do not fit them.
    """
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise BadArgument(f"{path} is no configuration: larger than {FILE_BYTES_MAX} bytes")
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise BadArgument(f"{path} can't be read as TOML or JSON: {error}") from error
    if not isinstance(data, dict):
        raise BadArgument(f"{path}: a table of settings is expected", hint="an example: harm_weight = 0.5")
    return check(data, str(path))


def check(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The same settings, checked. Raises: BadArgument."""
    checked = _checked(SchedulerConfig(), data, where)
    policy = checked.get("policy", "kvpool")
    if policy not in POLICIES:
        raise BadArgument(f"{where}: policy {policy!r} is not one of {', '.join(POLICIES)}")
    return checked


def _checked(default: Any, data: Mapping[str, Any], where: str) -> dict[str, Any]:
    known = {f.name: getattr(default, f.name) for f in fields(default)}
    out: dict[str, Any] = {}
    for name, value in data.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 3)
            raise BadArgument(
                f"{where}: no setting {name!r}", hint=f"is it {' or '.join(near)}?" if near else "see SchedulerConfig"
            )
        if is_dataclass(known[name]):
            if not isinstance(value, Mapping):
                raise BadArgument(f"{where}: {name} is a table of settings")
            out[name] = _checked(known[name], value, f"{where}: {name}")
        else:
            out[name] = _fitting(known[name], value, f"{where}: {name}")
    return out


def _fitting(default: Any, value: Any, where: str) -> Any:
    """A value of the kind that a default has. Raises: BadArgument."""
    kind = type(default)
    if kind is tuple:
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return value  # a bare list is a tuple, in a journal
        raise BadArgument(f"{where} must be a list of names, not {value!r}")
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise BadArgument(f"{where} must be {_NAMES[kind]}, not {value!r}")
    if kind in (int, float) and not 0 <= value < 1e18:
        raise BadArgument(f"{where} must be 0 to 1e18, not {value!r}")
    return value


_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def applied(checkpoint: Any, overrides: Mapping[str, Any]) -> Any:
    """A checkpoint, as JSON, with settings of its own wherever it holds the configuration."""
    if isinstance(checkpoint, list):
        return [applied(item, overrides) for item in checkpoint]
    if not isinstance(checkpoint, dict):
        return checkpoint
    copy = {name: applied(item, overrides) for name, item in checkpoint.items()}
    if copy.get("$") == "SchedulerConfig":
        baselines = {"$": PolicyParameters.__name__, **copy.get("baselines", {}), **overrides.get("baselines", {})}
        copy |= {**overrides, "baselines": baselines}
    return copy
