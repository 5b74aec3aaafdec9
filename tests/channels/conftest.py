from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.channels.source_made import HarmfulProxy, MadeSource


@pytest.fixture
def source(tmp_path: Path) -> Iterator[MadeSource]:
    made = MadeSource(tmp_path)
    yield made
    made.close()


@pytest.fixture
def proxy(source: MadeSource) -> Iterator[HarmfulProxy]:
    with contextlib.closing(HarmfulProxy(source.server.address)) as made:
        yield made


@pytest.fixture
def big_source(tmp_path: Path) -> Iterator[Callable[[int], MadeSource]]:
    """Makes sources with blocks of another size."""
    made: list[MadeSource] = []

    def make(block_bytes: int) -> MadeSource:
        made.append(MadeSource(tmp_path, block_bytes=block_bytes))
        return made[-1]

    yield make
    for one in made:
        one.close()
