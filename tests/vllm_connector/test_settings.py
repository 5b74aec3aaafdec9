"""Settings of the connector."""

from __future__ import annotations

from typing import Any

import pytest

from engines.attached.options import NODE_DEFAULT
from engines.vllm.settings import ConnectorSettings
from kvpool.core.errors import BadArgument


def test_defaults_and_environment() -> None:
    assert ConnectorSettings.of({}, {}).node == NODE_DEFAULT
    assert ConnectorSettings.of({}, {"KVPOOL_NODE": "h:1", "KVPOOL_CREDENTIAL": "c"}).credential == "c"
    given = ConnectorSettings.of({"node": "n:2", "load_timeout_s": 3, "save": False}, {"KVPOOL_NODE": "h:1"})
    assert (given.node, given.load_timeout_s, given.save) == ("n:2", 3.0, False)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"nod": "h:1"}, "unknown settings: nod"),
        ({"node": 7701}, "node must be of type str"),
        ({"save": "yes"}, "save must be of type bool"),
        ({"lookup_timeout_ms": True}, "lookup_timeout_ms must be of type int"),
        ({"load_timeout_s": True}, "load_timeout_s must be of type float"),
        ({"load_timeout_s": 0}, "load_timeout_s must be above 0"),
        ({"node": "nowhere"}, "node must be host:port"),
        ({"node": ":7701"}, "node must be host:port"),
    ],
)
def test_wrong_settings(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(BadArgument, match=message):
        ConnectorSettings.of(extra, {})
