"""SGLang's own cache controller on the backend: backup, query, prefetch, by its own threads."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engines.attached.options import NODE_DEFAULT
from tests.pool.node_process import NodeProcess, eventually
from tests.sglang.made_pools import hashes
from tests.sglang.real_pools import EXTRA, LAYERS, TOKENS, fill, flats, mha_pool, places, pool_of

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("sglang")]


class DevicePool:
    """What the controller asks of the engine's own cache when only storage is used."""

    device, layer_num = "cpu", LAYERS

    def register_layer_transfer_counter(self, counter: object) -> None:
        pass

    def get_kvcache(self) -> DevicePool:
        return self


@pytest.fixture
def controller_on(sglang: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """SGLang's own HiCacheController with its threads; no CUDA events and streams, which only copies to a GPU need."""
    import sglang.srt.managers.cache_controller as controllers
    from sglang.srt.runtime_context import get_parallel

    class NoEvent:
        def query(self) -> bool:
            return True

    monkeypatch.setattr(controllers.device_module, "Event", NoEvent, raising=False)
    monkeypatch.setattr(controllers, "L2TransferEngine", lambda io_backend: None)
    monkeypatch.setattr(controllers.HiCacheController, "_create_sync_groups", lambda self: [])
    made: list[Any] = []

    def make(node: str, pool: Any, **extra: Any) -> Any:
        controller = controllers.HiCacheController(
            DevicePool(), pool, pool.page_size, None, None, io_backend="direct", storage_backend="dynamic",
            prefetch_threshold=0, model_name="served", enable_storage_metrics=True,
            storage_backend_extra_config=json.loads(json.dumps({**EXTRA, "node": node, **extra})),
        )  # fmt: skip
        made.append(controller)
        assert eventually(lambda: controller.storage_backend._line.is_up)
        return controller

    ranks = {"tp_rank": 0, "tp_size": 1, "pp_rank": 0, "pp_size": 1, "attn_dcp_size": 1, "attn_dcp_rank": 0}
    with get_parallel().override(**ranks):
        yield make
        for controller in made:
            controller.detach_storage_backend()


def drained(queue: Any, done: Callable[[Any], bool]) -> list[Any]:
    """Everything of a queue of the controller's up to what is `done`."""
    seen = []
    while not (seen and done(seen[-1])):
        seen.append(queue.get(timeout=60))
    return seen


@pytest.mark.parametrize("interface_v1", [0, 1])
@pytest.mark.parametrize(("kind", "layout"), [("mha", "page_first"), ("mha", "layer_first"), ("mla", "page_first")])
def test_sglangs_controller_backs_up_and_prefetches(
    node: NodeProcess, controller_on: Callable[..., Any], kind: str, layout: str, interface_v1: int
) -> None:
    """Two engines: one backs pages up, the other finds and prefetches them; then a prompt that is half known."""
    from sglang.srt.mem_cache.utils import get_storage_hash_str

    pools = [pool_of(kind, layout) for _ in range(2)]
    one, other = (controller_on(node.address, pool, interface_v1=interface_v1) for pool in pools)
    fill(pools[0], 1)
    tokens = list(range(1000, 1000 + 4 * TOKENS))
    names = get_storage_hash_str(tokens, None, page_size=TOKENS)
    one.write_storage(places(pools[0], 0, 1, 2, 3), tokens, hash_value=names)
    backed_up = one.ack_backup_queue.get(timeout=60)
    assert backed_up.completed_tokens == len(tokens)

    for prompt, known in ((tokens, 4), ([*tokens[: 2 * TOKENS], *range(5000, 5000 + 2 * TOKENS)], 2)):
        operation = other.prefetch("request", prompt)
        assert other.prefetch_hit_queue.get(timeout=60) is operation
        assert operation.storage_hit_count == known * TOKENS
        operation.host_indices = pools[1].alloc(known * TOKENS)
        other.prefetch_buffer.put(operation)
        acks = drained(other.ack_prefetch_queue, lambda ack: ack.completed_req)
        assert acks[0].completed_tokens == known * TOKENS
        first = int(operation.host_indices[0]) // TOKENS
        assert flats(pools[1], range(first, first + known)) == flats(pools[0], range(known))
        pools[1].free(operation.host_indices)


def test_a_prefetch_while_the_node_dies_ends(
    start_node: Callable[..., NodeProcess], controller_on: Callable[..., Any]
) -> None:
    from sglang.srt.mem_cache.utils import get_storage_hash_str

    node = start_node()
    pool = mha_pool("page_first")
    controller = controller_on(node.address, pool, interface_v1=1, load_timeout_s=1.0, lookup_timeout_ms=500)
    fill(pool, 1)
    tokens = list(range(4 * TOKENS))
    names = get_storage_hash_str(tokens, None, page_size=TOKENS)
    controller.write_storage(places(pool, 0, 1, 2, 3), tokens, hash_value=names)
    controller.ack_backup_queue.get(timeout=60)
    operation = controller.prefetch("request", tokens)
    controller.prefetch_hit_queue.get(timeout=60)
    node.kill()
    operation.host_indices = pool.alloc(4 * TOKENS)
    wanted = flats(pool, range(4))
    controller.prefetch_buffer.put(operation)
    acks = drained(controller.ack_prefetch_queue, lambda ack: ack.completed_req)
    got = acks[0].completed_tokens // TOKENS
    assert flats(pool, range(got)) == wanted[:got]
    # Later requests are told at once that there is nothing.
    backend = controller.storage_backend
    assert eventually(lambda: not backend.batch_exists(hashes(1, "x")) and not backend._line.is_up)
    controller.prefetch("next", list(range(900, 900 + 4 * TOKENS)))
    assert controller.prefetch_hit_queue.get(timeout=60).storage_hit_count == 0


def test_the_documented_settings_are_what_sglang_and_the_backend_take(
    node: NodeProcess, controller_on: Callable[..., Any]
) -> None:
    """Those of docs/sglang.md, read as SGLang reads its command line."""
    from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController

    from engines.sglang.backend import KVPoolHiCacheStorage

    text = (Path(__file__).parents[2] / "docs" / "sglang.md").read_text(encoding="utf-8")
    (given,) = re.findall(r"--hicache-storage-backend-extra-config '(\{.*?\})'", text, re.DOTALL)
    extra, *_ = HybridCacheController.parse_storage_backend_extra_config(given)
    assert extra.pop("node") == NODE_DEFAULT
    controller = controller_on(node.address, mha_pool("page_first"), **extra)
    assert type(controller.storage_backend) is KVPoolHiCacheStorage
    assert controller.page_get_func == controller._page_get_zero_copy


def test_prefixes_of_earlier_calls_are_named(node: NodeProcess, controller_on: Callable[..., Any]) -> None:
    """With `hicache_storage_pass_prefix_keys` SGLang names the pages before a call's first one."""
    from sglang.srt.mem_cache.utils import get_storage_hash_str

    pool = mha_pool("page_first")
    controller = controller_on(node.address, pool, interface_v1=1)
    tokens = list(range(7000, 7000 + 4 * TOKENS))
    names = get_storage_hash_str(tokens, None, page_size=TOKENS)
    for first in (0, 2):
        mine = slice(first * TOKENS, (first + 2) * TOKENS)
        controller.write_storage(
            places(pool, first, first + 1), tokens[mine], hash_value=names[first : first + 2],
            prefix_keys=names[:first],
        )  # fmt: skip
        assert controller.ack_backup_queue.get(timeout=60).completed_tokens == 2 * TOKENS
    assert controller.storage_backend.batch_exists(names) == 4
