"""The int8 codec: speed on one core, bytes saved, links that it pays on, and what it does to a model's answers.

python tools/bench/int8.py [--json FILE] [--model FOLDER] [--texts N] [--rounds N]

Answers: KV of a prefix of held-out text goes through the codec (blocks that break the bound stay exact), then the text
goes on from it. Compared with the exact prefix: KL divergence of each next token, and how often the first choice is the
same. Held out are the sources of the standard library that tools/train_tiny_model.py does not train on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sysconfig
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from engines.torch.attention import Chunk
from engines.torch.model import LoadedModel, load_model
from kvpool.codecs.int8 import Int8, mixed_bytes_max, stored_bytes
from kvpool.codecs.layout import KvLayout

MODEL = Path(__file__).parents[2] / "tests" / "models" / "tiny-llama"
#: Blocks as of an 8-billion-parameter Llama in one of 8 shards of layers: 2 MiB in 16 bits.
SHAPES = {"16 tokens": (16, 32), "64 tokens": (64, 8)}
PREFIX_TOKENS, NEXT_TOKENS, BLOCK_TOKENS = 1024, 256, 16


# ------------------------------------------------------------ speed


def gigabytes_per_s(run: Callable[[], object], size_bytes: int, rounds: int) -> tuple[float, float]:
    """Median and best of CPU time, so that a busy machine shows less; the first run compiles and warms up."""
    run()
    times = []
    for _ in range(rounds):
        begin_s = time.thread_time()
        run()
        times.append(time.thread_time() - begin_s)
    return size_bytes / statistics.median(times) / 1e9, size_bytes / min(times) / 1e9


def made_blocks(layout: KvLayout, count: int) -> np.ndarray:
    values = np.random.default_rng(0).normal(size=count * layout.block_bytes // 4).astype(np.float32)
    if layout.dtype == "float32":
        return values.view(np.uint8).reshape(count, -1)
    values = np.concatenate([values, values[::-1]])
    if layout.dtype == "float16":
        return values.astype(np.float16).view(np.uint8).reshape(count, -1)
    return np.ascontiguousarray(values.view(np.uint16)[1::2]).view(np.uint8).reshape(count, -1)


def speed(dtype: str, tokens: int, layers: int, rounds: int) -> dict[str, float]:
    """GB of input blocks per second on one core, and the links on which that pays, in GB/s.

    A link of bandwidth B moves a raw block in bytes / B. One after the other, int8 takes bytes / encode + ratio x bytes
    / B + bytes / decode, which is less where B < (1 - ratio) / (1 / encode + 1 / decode). In a pipeline the slowest
    of the three counts, which is less where B < min(encode, decode).
    """
    layout = KvLayout(dtype, layers, tokens, 8, 128, 8)
    blocks, codec = made_blocks(layout, 8), Int8()
    out = np.zeros((8, stored_bytes(layout)), dtype=np.uint8)
    back = np.zeros_like(blocks)
    assert codec.encode(blocks, out, layout).ok.all()
    encode, encode_best = gigabytes_per_s(lambda: codec.encode(blocks, out, layout), blocks.nbytes, rounds)
    decode, decode_best = gigabytes_per_s(lambda: codec.decode(out, back, layout), blocks.nbytes, rounds)
    ratio = out.nbytes / blocks.nbytes
    return {
        "encode": encode, "encode best": encode_best, "decode": decode, "decode best": decode_best,
        "copy": gigabytes_per_s(lambda: np.copyto(back, blocks), blocks.nbytes, rounds)[0],
        "ratio": ratio, "pays below, in turn": (1 - ratio) / (1 / encode + 1 / decode),
        "pays below, pipelined": min(encode, decode),
    }  # fmt: skip


# ------------------------------------------------------------ answers


def held_out_tokens(model: Path, count: int, each: int) -> list[list[int]]:
    """Beginnings of held-out files, `each` tokens long."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for path in sorted(root.glob("*.py")):
        if zlib.crc32(path.name.encode()) % 20 == 0 and len(texts) < count:
            ids = tokenizer.encode(f"<|bos|># {path.stem}.py\n{path.read_text(errors='ignore')}")
            if len(ids) >= each:
                texts.append(ids[:each])
    return texts


def through_the_codec(cache: torch.Tensor, layout: KvLayout, blocks: int, codec: Int8) -> tuple[torch.Tensor, Any, int]:
    """A copy of the cache whose first blocks were encoded and decoded; the result, and bytes that were stored."""
    changed = cache.clone()
    rows = changed.view(torch.uint8).view(changed.shape[0], -1).numpy()
    stored = np.zeros((blocks, stored_bytes(layout)), dtype=np.uint8)
    result = codec.encode(rows, stored, layout, rows=np.arange(blocks))
    good = np.flatnonzero(result.ok)
    codec.decode(stored, rows, layout, rows=good, out_rows=good)
    stored_total = int(result.sizes.sum()) + int((~result.ok).sum()) * layout.block_bytes
    return changed, result, stored_total


def next_log_probabilities(model: LoadedModel, cache: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    table = range(-(-len(tokens) // BLOCK_TOKENS))
    chunk = Chunk(PREFIX_TOKENS, NEXT_TOKENS, table)
    logits = model.forward(cache, [chunk], tokens[PREFIX_TOKENS:], range(NEXT_TOKENS), exact=False)
    return torch.log_softmax(logits[:NEXT_TOKENS].double(), dim=-1)


def answers(dtype: str, model_path: Path, texts: int, error_max: float) -> dict[str, float]:
    torch.set_num_threads(1)
    model = load_model(model_path, dtype=dtype)
    spec = model.namespace(BLOCK_TOKENS, exact=False)
    layout, codec = KvLayout.of(spec, spec.groups[0]), Int8(error_max)
    blocks = PREFIX_TOKENS // BLOCK_TOKENS
    divergences, same, errors, stored, mixed, fell_back = [], [], [], 0, 0, 0
    for tokens in held_out_tokens(model_path, texts, PREFIX_TOKENS + NEXT_TOKENS):
        cache = model.new_cache(len(tokens) // BLOCK_TOKENS, BLOCK_TOKENS)
        table = range(blocks)
        model.forward(cache, [Chunk(0, PREFIX_TOKENS, table)], tokens[:PREFIX_TOKENS], [0], exact=False)
        lossy, result, size = through_the_codec(cache, layout, blocks, codec)
        room = np.zeros((blocks, mixed_bytes_max(layout)), dtype=np.uint8)
        rows = cache.view(torch.uint8).view(cache.shape[0], -1).numpy()
        mixed += int(codec.encode_mixed(rows, room, layout, rows=np.arange(blocks)).sizes.sum())
        exact, other = next_log_probabilities(model, cache, tokens), next_log_probabilities(model, lossy, tokens)
        divergences += (exact.exp() * (exact - other)).sum(-1).tolist()
        same += (exact.argmax(-1) == other.argmax(-1)).tolist()
        errors.append(result.error)
        stored += size
        fell_back += int((~result.ok).sum())
    everything = len(errors) * blocks
    error = np.concatenate(errors)
    return {
        "texts": len(errors), "next tokens": len(same), "error bound": error_max,
        "worst section error": float(error.max()), "mean section error": float(error.mean()),
        "blocks beyond the bound": fell_back / everything,
        "sections beyond the bound": float((error > error_max).mean()),
        "bytes ratio in slots": stored / (everything * layout.block_bytes),
        "bytes ratio on channels": mixed / (everything * layout.block_bytes),
        "KL mean, nats": statistics.fmean(divergences), "KL worst, nats": max(divergences),
        "top-1 agreement": statistics.fmean(same),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    args = parser.parse_args()
    document: dict[str, dict[str, dict[str, float]]] = {"speed": {}, "answers": {}}
    print("GB/s of blocks on one core, medians of CPU time")
    for dtype in ("float32", "float16", "bfloat16"):
        for name, (tokens, layers) in SHAPES.items():
            document["speed"][f"{dtype}, {name}"] = speed(dtype, tokens, layers, args.rounds)
    for dtype in ("float32", "float16", "bfloat16"):
        # The second bound is one that some sections break.
        for error_max in (0.01, 0.0055):
            key = f"{dtype}, bound {error_max:.2%}"
            document["answers"][key] = answers(dtype, args.model, args.texts, error_max)
    for part in document.values():
        for name, figures in part.items():
            print(f"\n{name}")
            for what, value in figures.items():
                print(f"  {what:28}{value:12.5g}")
    if args.json:
        args.json.write_text(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
