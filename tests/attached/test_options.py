"""Settings that every connector has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from engines.attached.options import NODE_DEFAULT, NodeOptions
from kvpool.core.errors import BadArgument


@dataclass(frozen=True, slots=True)
class Made(NodeOptions):
    WRITTEN_IN: ClassVar[str] = "the made settings"

    loads: bool = True
    wait_ms: int = 3
    wait_s: float = 0.5


def test_a_connectors_own_settings_stand_beside_those_of_all() -> None:
    assert Made.of({}, {}) == Made(node=NODE_DEFAULT)
    given = Made.of(
        {"node": "[::1]:7", "loads": False, "wait_s": 2, "wait_ms": 1, "model_id": "m"}, {"KVPOOL_NODE": "a:1"}
    )
    assert given == Made(node="[::1]:7", model_id="m", loads=False, wait_ms=1, wait_s=2.0)
    assert type(given.wait_s) is float
    assert Made.of({}, {"KVPOOL_NODE": "a:1", "KVPOOL_CREDENTIAL": "c"}) == Made(node="a:1", credential="c")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"nod": "a:1", "x": 2}, "the made settings has unknown settings: nod, x"),
        ({"WRITTEN_IN": "a"}, "unknown settings"),
        ({"loads": 1}, "loads must be of type bool"),
        ({"wait_ms": 1.0}, "wait_ms must be of type int"),
        ({"wait_ms": True}, "wait_ms must be of type int"),
        ({"wait_s": "1"}, "wait_s must be of type float"),
        ({"wait_s": float("nan")}, "wait_s must be above 0"),
        ({"wait_ms": 0}, "wait_ms must be above 0"),
        ({"node": "host"}, "node must be host:port"),
        ({"node": "host:"}, "node must be host:port"),
        ({"credential": None}, "credential must be of type str"),
    ],
)
def test_what_is_wrong_is_said(given: dict[str, Any], message: str) -> None:
    with pytest.raises(BadArgument, match=message):
        Made.of(given, {})


def test_an_unknown_name_is_answered_with_those_that_are_known() -> None:
    with pytest.raises(BadArgument) as caught:
        Made.of({"nod": "a:1"}, {})
    assert caught.value.hint is not None
    assert {"node", "model_id", "wait_ms"} <= set(caught.value.hint.removeprefix("known are ").split(", "))
