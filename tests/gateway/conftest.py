"""The made tokenizer, once for all tests of the gateway."""

from __future__ import annotations

import pytest

from tests.gateway.made_tokenizer import make_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of the tokenizer."""
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
