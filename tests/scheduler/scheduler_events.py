"""Events for tests, with defaults for whatever a test does not care about."""

from __future__ import annotations

import xxhash

from kvpool.core.changes import BlockChange, ChangeKind
from kvpool.core.ids import Fidelity, Role, Tier
from kvpool.core.namespace import GroupKind, GroupSpec, NamespaceSpec
from scheduler.core import events

BLOCK_TOKENS = 64
NAMESPACE = NamespaceSpec(
    model="tiny",
    revision="1",
    dtype="float32",
    backend="test",
    layout="lkthd",
    hash="xxh3_128/1",
    groups=(GroupSpec(0, GroupKind.FULL, (0, 1), BLOCK_TOKENS, 1, 1, 65_536, 2, 32),),
)


def block_key(name: str) -> bytes:
    return xxhash.xxh3_128_digest(name.encode())


def keys_of(blocks: str) -> bytes:
    """Packed keys of "a0..a7" (a0 to a7 inclusive) or of several such ranges joined by commas."""
    names: list[str] = []
    for part in filter(None, blocks.split(",")):
        first, _, last = part.partition("..")
        if last:
            stem = first.rstrip("0123456789")
            names += [f"{stem}{i}" for i in range(int(first[len(stem) :]), int(last[len(stem) :]) + 1)]
        else:
            names.append(first)
    return b"".join(block_key(name) for name in names)


def attached(stream: int, source_id: str = "node-0", **over: object) -> events.SourceAttached:
    fields: dict[str, object] = {
        "epoch": 1,
        "tier": Tier.DRAM,
        "address": f"{source_id}:1",
        "host_id": "host-0",
        "instance_id": "",
        "bytes_total": 1 << 30,
    }
    return events.SourceAttached(stream=stream, source_id=source_id, **{**fields, **over})  # type: ignore[arg-type]


def stored(stream: int, seq: int, blocks: str, fidelity: Fidelity = Fidelity.EXACT) -> events.BlocksChanged:
    return events.BlocksChanged(stream, seq, (BlockChange(ChangeKind.STORED, keys_of(blocks), fidelity),))


def removed(stream: int, seq: int, blocks: str) -> events.BlocksChanged:
    return events.BlocksChanged(stream, seq, (BlockChange(ChangeKind.REMOVED, keys_of(blocks)),))


def snapshot(stream: int, seq: int, blocks: str, part: int = 0, last: bool = True) -> events.SnapshotReceived:
    return events.SnapshotReceived(stream, seq, part, last, keys_of(blocks), Fidelity.EXACT)


def joined(stream: int, instance_id: str = "w0", **over: object) -> events.InstanceJoined:
    fields: dict[str, object] = {
        "epoch": 1,
        "role": Role.BOTH,
        "model": "tiny",
        "namespace": NAMESPACE,
        "context_tokens_max": 4096,
        "kv_tokens_total": 8192,
        "batch_max": 16,
        "address": f"{instance_id}:1",
        "host_id": "host-0",
        "hbm_source_id": f"{instance_id}-hbm",
        "node_source_id": "node-0",
        "node_address": "node-0:1",
    }
    info = events.InstanceInfo(instance_id=instance_id, **{**fields, **over})  # type: ignore[arg-type]
    return events.InstanceJoined(stream, info)


def reported(stream: int, **over: object) -> events.InstanceReported:
    fields: dict[str, object] = {
        "running": 0,
        "waiting": 0,
        "kv_tokens_free": 8192,
        "prefill": (),
        "decode": (),
        "links": (),
        "finished_prefills": (),
        "draining": False,
    }
    return events.InstanceReported(stream=stream, **{**fields, **over})  # type: ignore[arg-type]


def place(request_id: str, **over: object) -> events.PlaceRequested:
    """A request; `blocks` names the full blocks of its prompt."""
    blocks = str(over.pop("blocks", ""))
    fields: dict[str, object] = {
        "gateway_id": "gw",
        "model": "tiny",
        "keys": (events.KeyBatch(0, 0, keys_of(blocks)),),
        "prompt_tokens": 1000,
        "max_tokens": 100,
        "ttft_slo_us": 0,
        "tpot_slo_us": 0,
        "policy": "",
        "use_pool": True,
        "sticky_key": "",
        "exclude_instances": (),
        "fidelity_min": Fidelity.EXACT,
    }
    return events.PlaceRequested(request_id=request_id, **{**fields, **over})  # type: ignore[arg-type]


def outcome(stream: int, request_id: str, **over: object) -> events.OutcomeReported:
    fields: dict[str, object] = {
        "first_token": False,
        "ttft_us": 100_000,
        "duration_us": 1_000_000,
        "tokens": 50,
        "finish_reason": "stop",
        "error": "",
        "prefill": events.RequestTimes(),
        "decode": events.RequestTimes(),
    }
    return events.OutcomeReported(stream=stream, request_id=request_id, **{**fields, **over})  # type: ignore[arg-type]
