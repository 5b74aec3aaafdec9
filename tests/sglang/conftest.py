from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.pool.node_process import eventually
from tests.sglang import real_sglang
from tests.sglang.real_pools import config


@pytest.fixture(scope="session")
def sglang(kernels: None) -> None:
    """Skips a test where the real SGLang is not installed."""
    if missing := real_sglang.why_not():
        pytest.skip(missing)
    real_sglang.prepare()


@pytest.fixture
def backend_on(sglang: None) -> Iterator[Callable[..., Any]]:
    """Backends as SGLang's factory makes them, with a host pool. There: their node is, and is waited for."""
    from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory

    backends: list[Any] = []

    def make(node: str, pool: Any, *, there: bool = True, **others: Any) -> Any:
        backend = StorageBackendFactory.create_backend("dynamic", config(node, **others), pool)
        backends.append(backend)
        backend.register_mem_pool_host(pool)
        backend.on_host_pools_registered()
        assert not there or eventually(lambda: backend._line.is_up)
        return backend

    yield make
    for backend in backends:
        backend.close()
