"""What machines can do: the ground truth of the simulator, each number with its source. Pure but for `read_hardware`.

The scheduler never sees these numbers: it has its own cost model, and learns from what engines report.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from kvpool.core.errors import BadArgument

GB = 1e9
GIB = 1 << 30
FILE_BYTES_MAX = 1 << 20


@dataclass(frozen=True, slots=True)
class Hardware:
    """One kind of node and the model on it. An instance is one copy of the model.

    A step that computes chunks of prompts and one token for each of `batch` sequences takes
    max(step_us, prefill_token_us * new tokens) + prefill_pair_us * pairs + decode_sequence_us * batch
    + decode_token_us * KV tokens of the batch, where a chunk of n tokens after c has n * (c + n / 2) pairs: weights are
    read once a step, and reading them hides behind computing or the other way round.
    """

    name: str
    gpu: str
    gpus_per_instance: int
    instances_per_node: int
    price_gpu_hour: float  # currency units, for cost per million tokens
    kv_token_bytes: int
    kv_tokens: int  # that fit into an instance's HBM beside the weights
    context_tokens_max: int
    batch_max: int
    prefill_token_us: float
    prefill_pair_us: float
    step_us: float
    decode_sequence_us: float
    decode_token_us: float
    chunk_tokens: int  # of prompts in one step where others decode; 0 = whole prompts, others stand still
    prefill_chunk_tokens: int  # the same on instances that only prefill
    dram_bytes: int  # of the pool, a node
    ssd_bytes: int
    local_bytes_s: float  # between a node's memory and one instance on it
    local_latency_us: float
    ssd_bytes_s: float  # reading, a node
    ssd_latency_us: float
    nic_bytes_s: float  # each direction, a node
    nic_latency_us: float
    pull_bytes_s: float  # that one instance can take from other nodes at most
    domain_nodes: int = 0  # consecutive nodes that share a faster fabric; 0 = none
    domain_bytes_s: float = 0.0  # each direction, a node, within a domain
    #: Field -> where its number is from.
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)

    def step_duration_us(self, chunks: Sequence[tuple[int, int]], batch: int, kv_tokens: int) -> float:
        """One step. Args: chunks: (new tokens, tokens before them) of each prompt; batch, kv_tokens: of the decodes."""
        new_tokens, pairs = 0, 0.0
        for new, before in chunks:
            new_tokens += new
            pairs += new * (before + new / 2)
        linear_us = max(self.step_us, self.prefill_token_us * new_tokens)
        return (
            linear_us
            + self.prefill_pair_us * pairs
            + self.decode_sequence_us * batch
            + self.decode_token_us * kv_tokens
        )

    def prefill_us(self, new_tokens: int, cached_tokens: int) -> float:
        """A prompt computed alone, in chunks that are not small."""
        return self.step_duration_us([(new_tokens, cached_tokens)], 0, 0)

    def decode_step_us(self, batch: int, kv_tokens: int) -> float:
        return self.step_duration_us([], batch, kv_tokens)

    @property
    def price_instance_hour(self) -> float:
        return self.price_gpu_hour * self.gpus_per_instance

    def check(self) -> None:
        """Raises: BadArgument with the field that no machine could have."""
        for name in POSITIVE:
            if not getattr(self, name) > 0:
                raise BadArgument(f"hardware {self.name!r}: {name} must be above zero")
        for name in NOT_NEGATIVE:
            if not getattr(self, name) >= 0:
                raise BadArgument(f"hardware {self.name!r}: {name} must not be negative")
        for name in RATES:
            if getattr(self, name) > 1e15:
                raise BadArgument(
                    f"hardware {self.name!r}: {name} is more than a petabyte a second", hint="bytes, not bits"
                )
        if self.kv_tokens < 2:
            raise BadArgument(f"hardware {self.name!r}: kv_tokens has no room for one request")
        if self.domain_nodes and not self.domain_bytes_s > 0:
            raise BadArgument(f"hardware {self.name!r}: domain_nodes without domain_bytes_s")


POSITIVE = (
    "gpus_per_instance", "instances_per_node", "kv_token_bytes", "kv_tokens", "context_tokens_max", "batch_max",
    "prefill_token_us", "step_us", "local_bytes_s", "ssd_bytes_s", "nic_bytes_s", "pull_bytes_s",
)  # fmt: skip
NOT_NEGATIVE = (
    "price_gpu_hour", "prefill_pair_us", "decode_sequence_us", "decode_token_us", "chunk_tokens",
    "prefill_chunk_tokens",
    "dram_bytes", "ssd_bytes", "local_latency_us", "ssd_latency_us", "nic_latency_us", "domain_nodes", "domain_bytes_s",
)  # fmt: skip
RATES = ("local_bytes_s", "ssd_bytes_s", "nic_bytes_s", "pull_bytes_s", "domain_bytes_s")

_FIG14 = "FAST'25 Fig. 14: T = 0.1165 n + 0.00077 n^2 s, n in thousands of tokens, no cache"
_A800 = Hardware(
    name="a800x8-llama3-70b",
    gpu="A800-80GB",
    gpus_per_instance=8,
    instances_per_node=1,
    price_gpu_hour=1.5,
    kv_token_bytes=320 << 10,
    kv_tokens=1_300_000,
    context_tokens_max=131_072,
    batch_max=256,
    prefill_token_us=116.5,
    prefill_pair_us=0.00154,
    step_us=26_400.0,
    decode_sequence_us=60.0,
    decode_token_us=0.0326,
    chunk_tokens=2048,
    prefill_chunk_tokens=8192,
    dram_bytes=3_000_000 * (320 << 10),
    ssd_bytes=0,
    local_bytes_s=156 * GB,
    local_latency_us=80_000.0,
    ssd_bytes_s=12 * GB,
    ssd_latency_us=500.0,
    nic_bytes_s=100 * GB,
    nic_latency_us=2_000.0,
    pull_bytes_s=100 * GB,
    sources={
        "price_gpu_hour": "assumed",
        "kv_token_bytes": "2 x 80 layers x 8 heads x 128 x 2 bytes",
        "kv_tokens": "8 x 80 GB x 0.9 less 141 GB of weights, less activations",
        "batch_max": "vLLM's default",
        "prefill_token_us": _FIG14,
        "prefill_pair_us": _FIG14,
        "step_us": "FAST'25 Fig. 14: 128 tokens decoded in 3.4 s at 8k of context",
        "decode_token_us": "FAST'25 Fig. 14: 3.9 s at 128k instead of 3.4 s at 8k; 62 % of HBM bandwidth",
        "decode_sequence_us": "assumed; small beside KV reads",
        "chunk_tokens": "vLLM's default",
        "prefill_chunk_tokens": "assumed",
        "dram_bytes": "FAST'25 section 5.3: 3M tokens a node",
        "local_bytes_s": "FAST'25 Fig. 14: what 95 % cached prompts take beyond their new tokens, slope",
        "local_latency_us": "the same, intercept",
        "ssd_bytes_s": "assumed: four PCIe 4 drives",
        "ssd_latency_us": "assumed",
        "nic_bytes_s": "FAST'25 section 5.1: 4 x 200 Gbps",
        "nic_latency_us": "assumed",
        "pull_bytes_s": "as nic_bytes_s",
    },
)
_SCALED = "a800x8-llama3-70b scaled by data sheets: 3.2 x dense bf16 at 0.87 of its utilisation"
_H100 = replace(
    _A800,
    name="h100x8-llama3-70b",
    gpu="H100-80GB",
    price_gpu_hour=3.0,
    prefill_token_us=42.5,
    prefill_pair_us=0.00055,
    step_us=14_000.0,
    decode_sequence_us=30.0,
    decode_token_us=0.0199,
    chunk_tokens=4096,
    dram_bytes=1536 * GIB,
    local_bytes_s=300 * GB,
    local_latency_us=40_000.0,
    nic_bytes_s=400 * GB,
    pull_bytes_s=400 * GB,
    sources={
        **_A800.sources,
        "prefill_token_us": _SCALED,
        "prefill_pair_us": _SCALED,
        "step_us": "a800x8-llama3-70b scaled by HBM bandwidth, 3.35 against 2.04 TB/s, and faster launches",
        "decode_token_us": "a800x8-llama3-70b scaled by HBM bandwidth",
        "dram_bytes": "assumed: 2 TB a node, three quarters of it for the pool",
        "local_bytes_s": "assumed: PCIe 5 instead of 4",
        "local_latency_us": "assumed",
        "nic_bytes_s": "data sheet: 8 x 400 Gbps",
    },
)
_P2P = "llm-d P2P study, H200, gpt-oss-120b: recompute 250, 510, 1173 ms at 8k, 16k, 32k (2k and 48k held out)"
_P2P_PULL = "llm-d P2P study: pull 57 and 165 ms at 8k and 32k (2k, 16k, 48k held out)"
_H200 = Hardware(
    name="h200-gpt-oss-120b",
    gpu="H200-141GB",
    gpus_per_instance=1,
    instances_per_node=8,
    price_gpu_hour=3.5,
    kv_token_bytes=73_728,
    kv_tokens=800_000,
    context_tokens_max=131_072,
    batch_max=256,
    prefill_token_us=26.2,
    prefill_pair_us=0.00059,
    step_us=9_000.0,
    decode_sequence_us=20.0,
    decode_token_us=0.0192,
    chunk_tokens=8192,
    prefill_chunk_tokens=16_384,
    dram_bytes=1536 * GIB,
    ssd_bytes=0,
    local_bytes_s=45 * GB,
    local_latency_us=3_000.0,
    ssd_bytes_s=20 * GB,
    ssd_latency_us=500.0,
    nic_bytes_s=400 * GB,
    nic_latency_us=21_000.0,
    pull_bytes_s=16.4 * GB,
    sources={
        "price_gpu_hour": "assumed",
        "kv_token_bytes": "2 x 36 layers x 8 heads x 64 x 2 bytes; windows are stored whole",
        "kv_tokens": "141 GB x 0.9 less 65 GB of weights",
        "prefill_token_us": _P2P,
        "prefill_pair_us": _P2P,
        "step_us": "assumed: most experts are read once the batch is not small",
        "decode_sequence_us": "assumed",
        "decode_token_us": "data sheet: 4.8 TB/s at 80 %",
        "chunk_tokens": "vLLM's default",
        "dram_bytes": "assumed: 2 TB a node, three quarters of it for the pool",
        "local_bytes_s": "assumed: PCIe 5 x16",
        "ssd_bytes_s": "assumed: four PCIe 5 drives, half used",
        "nic_bytes_s": "data sheet: 8 x 400 Gbps",
        "nic_latency_us": _P2P_PULL,
        "pull_bytes_s": _P2P_PULL,
    },
)
_GB200 = replace(
    _A800,
    name="gb200-nvl72",
    gpu="GB200",
    gpus_per_instance=4,
    price_gpu_hour=6.0,
    kv_tokens=1_600_000,
    prefill_token_us=35.0,
    prefill_pair_us=0.00046,
    step_us=9_000.0,
    decode_sequence_us=25.0,
    decode_token_us=0.0150,
    chunk_tokens=4096,
    dram_bytes=768 * GIB,
    local_bytes_s=700 * GB,
    local_latency_us=20_000.0,
    nic_bytes_s=200 * GB,
    pull_bytes_s=1800 * GB,
    domain_nodes=18,
    domain_bytes_s=1800 * GB,
    sources={
        **_A800.sources,
        "prefill_token_us": "data sheet: 4 x 2.5 PFLOP/s dense bf16 at 40 %",
        "prefill_pair_us": "as prefill_token_us",
        "step_us": "assumed: 141 GB over 4 x 8 TB/s, and launches",
        "decode_token_us": "data sheet: 4 x 8 TB/s at 68 %",
        "kv_tokens": "4 x 186 GB x 0.9 less 141 GB of weights",
        "dram_bytes": "data sheet: 2 x 480 GB a tray, most of it for the pool",
        "local_bytes_s": "data sheet: NVLink-C2C 900 GB/s each way for two chips, part of it",
        "local_latency_us": "assumed",
        "nic_bytes_s": "data sheet: 4 x 400 Gbps",
        "domain_bytes_s": "data sheet: 4 x 900 GB/s NVLink each way, half of it",
        "domain_nodes": "data sheet: 18 compute trays",
    },
)

PROFILES: dict[str, Hardware] = {h.name: h for h in (_A800, _H100, _H200, _GB200)}


def read_hardware(name_or_path: str) -> Hardware:
    """A profile by name, or one from a .json or .toml file, which may say `base` and only what differs.

    Raises: BadArgument with the field that is wrong.
    """
    if name_or_path in PROFILES:
        return PROFILES[name_or_path]
    path = Path(name_or_path)
    if path.suffix not in (".json", ".toml"):
        known = ", ".join(PROFILES)
        raise BadArgument(f"hardware {name_or_path!r} is not one of {known}", hint="or name a .json or .toml file")
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise BadArgument(f"{path} is not a hardware file: larger than {FILE_BYTES_MAX} bytes")
        text = path.read_text()
        data = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise BadArgument(f"{path} can't be read as a hardware file: {error}") from error
    return hardware_of(data, path.stem)


def hardware_of(data: Any, name: str) -> Hardware:
    """A profile from plain data. Raises: BadArgument."""
    if not isinstance(data, dict):
        raise BadArgument(f"hardware {name!r}: a table of fields is expected")
    values = dict(data)
    base_name = values.pop("base", None)
    if base_name is not None and base_name not in PROFILES:
        raise BadArgument(f"hardware {name!r}: base {base_name!r} is not one of {', '.join(PROFILES)}")
    values.setdefault("name", name)
    kinds = {f.name: str(f.type) for f in fields(Hardware)}
    for key, value in values.items():
        if key not in kinds:
            raise BadArgument(f"hardware {name!r}: there is no field {key!r}", hint=f"fields: {', '.join(kinds)}")
        values[key] = _checked(name, key, kinds[key], value)
    if base_name is not None:
        hardware = replace(PROFILES[base_name], **values)
    else:
        needed = [f.name for f in fields(Hardware) if f.name not in ("domain_nodes", "domain_bytes_s", "sources")]
        missing = [key for key in needed if key not in values]
        if missing:
            raise BadArgument(
                f"hardware {name!r}: {', '.join(missing)} missing", hint="or say which profile is its base"
            )
        hardware = Hardware(**values)
    hardware.check()
    return hardware


def _checked(name: str, key: str, kind: str, value: Any) -> Any:
    if key == "sources":
        if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
            raise BadArgument(f"hardware {name!r}: sources must be a table of texts")
        return value
    if kind == "str":
        if not isinstance(value, str):
            raise BadArgument(f"hardware {name!r}: {key} must be a text")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or abs(value) == float("inf"):
        raise BadArgument(f"hardware {name!r}: {key} must be a number")
    if kind == "int" and value != int(value):
        raise BadArgument(f"hardware {name!r}: {key} must be a whole number")
    return int(value) if kind == "int" else float(value)
