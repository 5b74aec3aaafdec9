"""Plain data to JSON and back, exactly: events, commands and the core's state, as the journal keeps them.

Only classes registered here are read back, so a journal from elsewhere can't make the reader run anything.
"""

from __future__ import annotations

import base64
import json
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

from kvpool.core import changes, ids, namespace
from kvpool.core.errors import BadArgument, Reason
from scheduler.core import (
    arrivals,
    calibration,
    cluster,
    commands,
    config,
    cost,
    deadlines,
    events,
    fit,
    outputs,
    pending,
    placements,
    policy_parameters,
    promises,
    robust,
    role_changes,
    roles,
    waiting,
)
from scheduler.core.policies import POLICIES

_MODULES = (
    namespace, changes, config, events, commands, deadlines, fit, cost, placements, cluster, arrivals, calibration,
    outputs, pending, policy_parameters, promises, robust, role_changes, roles, waiting,
)  # fmt: skip

CLASSES: dict[str, type] = {
    name: cls
    for module in _MODULES
    for name, cls in vars(module).items()
    if isinstance(cls, type) and is_dataclass(cls) and cls.__module__ == module.__name__
} | {cls.__name__: cls for cls in POLICIES.values() if isinstance(cls, type)}
ENUMS: dict[str, type[Enum]] = {
    cls.__name__: cls
    for cls in (changes.ChangeKind, ids.Tier, ids.Fidelity, ids.Role, namespace.GroupKind, Reason, cluster.State)
}
#: What is derived from other fields is derived again.
_FIELDS: dict[type, tuple[str, ...]] = {cls: tuple(f.name for f in fields(cls) if f.init) for cls in CLASSES.values()}
_PLAIN = (int, float, str, bool, type(None))


def to_json(value: Any) -> Any:
    """JSON for a value made of registered classes and plain data. Tuples are bare lists, so events stay readable."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is tuple:
        return [to_json(item) for item in value]
    if kind in _FIELDS:
        return {"$": kind.__name__, **{name: to_json(getattr(value, name)) for name in _FIELDS[kind]}}
    if kind is bytes:
        return {"$bytes": base64.b64encode(value).decode()}
    if isinstance(value, Enum):
        if kind.__name__ not in ENUMS:
            raise TypeError(f"{kind.__name__} is not registered")
        return {"$enum": kind.__name__, "name": value.name}
    if kind is list:
        return {"$list": [to_json(item) for item in value]}
    if kind is dict:
        return {"$dict": [[to_json(k), to_json(v)] for k, v in value.items()]}
    raise TypeError(f"{kind.__name__} can't be journalled")


def from_json(data: Any) -> Any:
    """The inverse of `to_json`.

    Raises: BadArgument for anything that `to_json` does not write.
    """
    if isinstance(data, list):
        return tuple(from_json(item) for item in data)
    if not isinstance(data, dict):
        return data
    try:
        if "$" in data:
            cls = CLASSES[data["$"]]
            return cls(**{name: from_json(item) for name, item in data.items() if name != "$"})
        if "$bytes" in data:
            return base64.b64decode(data["$bytes"], validate=True)
        if "$enum" in data:
            return ENUMS[data["$enum"]][data["name"]]
        if "$list" in data:
            return [from_json(item) for item in data["$list"]]
        if "$dict" in data:
            return {from_json(k): from_json(v) for k, v in data["$dict"]}
    except (KeyError, TypeError, ValueError) as error:
        raise BadArgument(f"not a journal value: {error}") from error
    raise BadArgument("not a journal value: an object without a kind")


def dumps(value: Any) -> str:
    """One line of JSON; infinities and NaN are refused."""
    return json.dumps(to_json(value), separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def loads(text: str) -> Any:
    """Raises: BadArgument if the text is not what `dumps` writes."""
    try:
        return from_json(json.loads(text))
    except json.JSONDecodeError as error:
        raise BadArgument(f"not a journal value: {error}") from error
