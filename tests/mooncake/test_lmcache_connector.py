"""LMCache's own mooncake connector, with its own host memory, on kvpool's `mooncake.store`."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest

from engines.mooncake.shadowing import SHIM
from tests.pool.node_process import NodeProcess

torch = pytest.importorskip("torch")
if importlib.util.find_spec("lmcache") is None:
    pytest.skip("LMCache is not installed here", allow_module_level=True)

LAYERS, CHUNK_TOKENS, HEADS, HEAD_DIM = 4, 16, 2, 32


class Connection:
    """A connector with its backend; `run` waits for what it does."""

    def __init__(self, node: NodeProcess, save_chunk_meta: bool) -> None:
        from lmcache.v1.config import LMCacheEngineConfig
        from lmcache.v1.metadata import LMCacheMetadata
        from lmcache.v1.storage_backend.connector.mooncakestore_connector import MooncakestoreConnector
        from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend

        config = LMCacheEngineConfig.from_defaults(
            chunk_size=CHUNK_TOKENS, max_local_cpu_size=0.05,
            extra_config={
                "local_hostname": "localhost", "metadata_server": "P2PHANDSHAKE", "save_chunk_meta": save_chunk_meta,
                "master_server_address": node.address, "transfer_timeout": 60,
            },
        )  # fmt: skip
        shape = (LAYERS, 2, CHUNK_TOKENS, HEADS, HEAD_DIM)
        metadata = LMCacheMetadata("made/model", 1, 1, 0, 0, torch.bfloat16, shape, chunk_size=CHUNK_TOKENS)
        self.backend = LocalCPUBackend(config, metadata, "cpu")
        self.connector = MooncakestoreConnector(asyncio.new_event_loop(), self.backend, config)
        assert type(self.connector.store).__module__ == "engines.mooncake.store"

    def run(self, call: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run(call)

    def chunk(self, seed: int) -> Any:
        """Memory of one chunk, filled."""
        made = self.backend.allocate(self.connector.meta_shapes, self.connector.meta_dtypes, self.connector.meta_fmt)
        assert made is not None
        made.tensor.copy_(torch.randn(made.tensor.shape, generator=torch.Generator().manual_seed(seed)))
        return made


@pytest.fixture
def lmcache(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(SHIM))
    monkeypatch.delenv("MOONCAKE_CONFIG_PATH", raising=False)
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "mooncake"}
    for name in before:
        del sys.modules[name]
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "mooncake"]:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.mark.parametrize("save_chunk_meta", [False, True])
def test_chunks_come_back_to_another_engine(lmcache: None, node: NodeProcess, save_chunk_meta: bool) -> None:
    from lmcache.utils import CacheEngineKey

    keys = [CacheEngineKey("made/model", 1, 0, 1000 * save_chunk_meta + i, torch.bfloat16) for i in range(6)]
    writer = Connection(node, save_chunk_meta)
    chunks = [writer.chunk(number) for number in range(5)]
    writer.run(writer.connector.batched_put(keys[:4], chunks[:4]))
    writer.run(writer.connector.put(keys[4], chunks[4]))
    reader = Connection(node, save_chunk_meta)
    assert reader.run(reader.connector.exists(keys[0])) and not reader.connector.exists_sync(keys[5])
    assert reader.run(reader.connector.batched_async_contains("lookup", keys)) == 5
    got = reader.run(reader.connector.batched_get(keys))
    assert [one is not None for one in got] == [True] * 5 + [False]
    for chunk, one in zip(chunks, got[:5], strict=True):
        assert one.tensor.data_ptr() != chunk.tensor.data_ptr()
        assert torch.equal(one.tensor.view(torch.uint8), chunk.tensor.view(torch.uint8))
    for connection in (writer, reader):
        connection.run(connection.connector.close())
