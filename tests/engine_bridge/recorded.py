"""Messages of a real vLLM 0.32.0 (block size 32, hash algorithm sha256), as they came over its socket.

In order: a prompt of 100 tokens (10, 11, ...) with 40 generated, the same prompt under the cache_salt "s", and after a
reset of the cache the first 50 tokens of that prompt.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from engines.openai_server.kv_events import Message, message_of

BLOCK_TOKENS = 32
PROMPT = list(range(10, 110))

#: Order of the fields of events that are arrays.
FIELDS = {
    "BlockStored": (
        "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name", "extra_keys",
        "group_idx",
    ),
    "BlockRemoved": ("block_hashes", "medium", "group_idx"),
    "AllBlocksCleared": (),
}  # fmt: skip


def frames() -> list[tuple[bytes, int, bytes]]:
    """(topic, number, payload)"""
    listed = json.loads((Path(__file__).parent / "vllm_0_32_messages.json").read_text())
    parts = [[bytes.fromhex(part) for part in frame] for frame in listed]
    return [(topic, int.from_bytes(number, "big"), payload) for topic, number, payload in parts]


def payloads() -> list[Any]:
    return [msgspec.msgpack.decode(payload) for _, _, payload in frames()]


def as_arrays(payload: Any) -> Any:
    """The same message with events as arrays, as vLLM before 2026 and SGLang write them."""
    time_s, events, rank = payload
    return [time_s, [[event["type"], *(event.get(name) for name in FIELDS[event["type"]])] for event in events], rank]


def messages() -> list[Message]:
    return [message_of(payload) for payload in payloads()]
