from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from engines.mooncake.store import MooncakeDistributedStore
from tests.mooncake.stores import Ours
from tests.pool.node_process import NodeProcess


@pytest.fixture
def ours(node: NodeProcess) -> Iterator[Ours]:
    """A store on a node that is empty."""
    store = Ours(node.address)
    assert store.store.remove_all(True) >= 0
    yield store
    store.close()


@pytest.fixture
def connected() -> Iterator[Callable[..., MooncakeDistributedStore]]:
    """Makes stores; all are closed with the test."""
    stores: list[MooncakeDistributedStore] = []

    def make(address: str, **options: object) -> MooncakeDistributedStore:
        store = MooncakeDistributedStore()
        assert store.setup("here", "P2PHANDSHAKE", 0, 1 << 20, "tcp", "", address, **options) == 0
        stores.append(store)
        return store

    yield make
    for store in stores:
        store.close()
