"""Codes of errors: each is one after which vLLM takes its memory back."""

from __future__ import annotations

import pytest

from engines.mooncake.codes import NAMES, Code, code_of
from kvpool.core.errors import ERRORS, DeadlineExceeded, KvpoolError, NoSpace, QuotaExceeded

#: What vLLM 0.32.0 calls safe for a put, and for a get (mooncake_store_embedding/store_client.py).
SAFE_FOR_BOTH = {-200, -703, -704, -705, -900, -901}
SAFE = SAFE_FOR_BOTH | {-1700, -600}


@pytest.mark.parametrize("kind", [*ERRORS.values(), KvpoolError], ids=lambda kind: kind.__name__)
def test_every_error_of_the_pool_has_a_safe_code(kind: type[KvpoolError]) -> None:
    code = code_of(kind("made up"))
    assert code in SAFE and code in NAMES and type(code) is int


def test_the_nearest_class_decides() -> None:
    assert code_of(QuotaExceeded("")) == Code.TENANT_QUOTA_EXCEEDED
    assert code_of(NoSpace("")) == Code.NO_AVAILABLE_HANDLE
    assert code_of(DeadlineExceeded("")) == Code.RPC_TIMEOUT
