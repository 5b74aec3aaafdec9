"""The KV events bridge against vLLM's own publisher and vLLM's own hashes, in one process."""

from __future__ import annotations

import queue
import random
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

kv_events = pytest.importorskip("vllm.distributed.kv_events")

from vllm.utils.hashing import get_hash_fn_by_name  # noqa: E402
from vllm.v1.core import kv_cache_utils  # noqa: E402

from engines.openai_server.cache_mirror import CacheMirror  # noqa: E402
from engines.openai_server.event_feed import EventFeed  # noqa: E402
from engines.openai_server.kv_events import Message  # noqa: E402
from kvpool.core.engine_keys import EngineNaming  # noqa: E402
from tests.vllm_real.serving import free_port  # noqa: E402

BLOCK_TOKENS = 16
NAMESPACE = bytes(16)
WAIT_S = 120.0


class Engine:
    """vLLM's hashing and vLLM's publisher, over chains of tokens of a test's own."""

    def __init__(self, algorithm: str, ports: tuple[int, int], first: int = 0) -> None:
        self._hash = get_hash_fn_by_name(algorithm)
        kv_cache_utils.init_none_hash(self._hash)
        self.publisher = kv_events.ZmqEventPublisher(
            0, endpoint=f"tcp://*:{ports[0]}", replay_endpoint=f"tcp://*:{ports[1]}", buffer_steps=1000
        )
        self.time_s = float(first)

    def hashes(self, tokens: list[int], salt: str = "") -> list[bytes]:
        parent, hashes = None, []
        for first in range(0, len(tokens) // BLOCK_TOKENS * BLOCK_TOKENS, BLOCK_TOKENS):
            extras = (("cache_salt", salt),) if salt and not first else None
            piece = tokens[first : first + BLOCK_TOKENS]
            parent = kv_cache_utils.hash_block_tokens(self._hash, parent, piece, extras)
            hashes.append(parent)
        return hashes

    def stored(self, tokens: list[int], begin: int = 0, salt: str = "") -> Any:
        """An event of all full blocks from number `begin` on."""
        told = [kv_cache_utils.maybe_convert_block_hash(h) for h in self.hashes(tokens, salt)]
        extras = [(salt,) if salt and not number else None for number in range(begin, len(told))]
        return kv_events.BlockStored(
            block_hashes=told[begin:], parent_block_hash=told[begin - 1] if begin else None,
            token_ids=tokens[begin * BLOCK_TOKENS : len(told) * BLOCK_TOKENS], block_size=BLOCK_TOKENS, lora_id=None,
            medium="GPU", lora_name=None, extra_keys=extras if salt else None, group_idx=0,
            kv_cache_spec_kind="full_attention",
        )  # fmt: skip

    def removed(self, tokens: list[int], salt: str = "") -> Any:
        """An event of the last full block."""
        told = kv_cache_utils.maybe_convert_block_hash(self.hashes(tokens, salt)[-1])
        return kv_events.BlockRemoved(block_hashes=[told], medium="GPU", group_idx=0)

    def publish(self, *events: Any) -> None:
        self.time_s += 1.0
        self.publisher.publish(kv_events.KVEventBatch(ts=self.time_s, events=list(events)))


@pytest.fixture
def ports() -> tuple[int, int]:
    return free_port(), free_port()


@pytest.fixture(params=["sha256", "sha256_cbor"])
def engine(request: pytest.FixtureRequest, ports: tuple[int, int]) -> Iterator[Engine]:
    made = Engine(request.param, ports)
    made.algorithm = request.param  # type: ignore[attr-defined]
    yield made
    made.publisher.shutdown()


@pytest.fixture(params=["1", "0"], ids=["numbers", "bytes"])
def encoding(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES", request.param)


@pytest.mark.usefixtures("encoding")
def test_vllms_events_become_the_keys_of_its_connector(engine: Engine, ports: tuple[int, int]) -> None:
    naming = EngineNaming(engine.algorithm, BLOCK_TOKENS)  # type: ignore[attr-defined]
    mirror, sizes = CacheMirror(naming, NAMESPACE), queue.Queue[int]()

    def take(message: Message) -> None:
        mirror.apply(message)
        sizes.put(len(mirror))

    draw = random.Random(1)
    talk = [draw.randrange(150_000) for _ in range(5 * BLOCK_TOKENS + 3)]
    engine.publish(engine.stored(talk[: 2 * BLOCK_TOKENS]))  # before anybody listens
    feed = EventFeed(
        f"tcp://127.0.0.1:{ports[0]}",
        f"tcp://127.0.0.1:{ports[1]}",
        take=take,
        forget=lambda: sizes.put(-len(mirror.clear()) - 1),
    )
    feed.start()

    def after(before: int) -> int:
        """The next size that is another one."""
        while (size := sizes.get(timeout=WAIT_S)) == before:
            pass
        return size

    try:
        assert sizes.get(timeout=WAIT_S) == 2
        # What is published before the subscription has got through is not heard, and missed with the next one only.
        deadline_s = time.monotonic() + WAIT_S
        while sizes.empty():
            assert time.monotonic() < deadline_s
            engine.publish()
            time.sleep(0.1)
        engine.publish(engine.stored(talk, 2), engine.stored(talk, salt="mine"))
        assert after(2) == 10
        keys = [h[:16] for h in engine.hashes(talk) + engine.hashes(talk, "mine")]
        assert mirror.keys == keys and mirror.counts.other_hash == 0
        told = naming.keys(NAMESPACE, np.asarray(talk, dtype=np.uint32), BLOCK_TOKENS)
        assert told.tobytes() == b"".join(keys[:5])
        engine.publish(engine.removed(talk))
        assert sizes.get(timeout=WAIT_S) == 9
        engine.publish(kv_events.AllBlocksCleared(), engine.stored(talk[:BLOCK_TOKENS]))
        assert sizes.get(timeout=WAIT_S) == 1
        mirror.check_invariants()
    finally:
        feed.close()
