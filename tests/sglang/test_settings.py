from __future__ import annotations

import pytest

from engines.sglang.settings import OF_SGLANG, settings_of
from kvpool.core.errors import BadArgument


def test_defaults_and_environment() -> None:
    assert settings_of(None, {}).node == "127.0.0.1:7701"
    told = settings_of({}, {"KVPOOL_NODE": "other:1", "KVPOOL_CREDENTIAL": "secret"})
    assert (told.node, told.credential) == ("other:1", "secret")
    assert settings_of({"node": "mine:2"}, {"KVPOOL_NODE": "other:1"}).node == "mine:2"


def test_what_is_sglangs_own_is_left_alone() -> None:
    own = dict.fromkeys(OF_SGLANG, "anything")
    assert settings_of({**own, "load_timeout_s": 3}, {}).load_timeout_s == 3.0


@pytest.mark.parametrize(
    "given",
    [
        {"nodes": "a:1"},
        {"node": "nowhere"},
        {"node": 7},
        {"lookup_timeout_ms": 0},
        {"lookup_timeout_ms": "100"},
        {"load_timeout_s": -1.0},
        {"store_timeout_s": True},
    ],
)
def test_says_what_is_wrong(given: dict[str, object]) -> None:
    with pytest.raises(BadArgument) as caught:
        settings_of(given, {})
    assert next(iter(given)) in str(caught.value)
