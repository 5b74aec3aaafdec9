"""The int8 codec on the KV of a trained model: bytes saved with everything counted, and what its answers become."""

from __future__ import annotations

import sysconfig
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from engines.torch.attention import Chunk
from engines.torch.model import load_model
from kvpool.codecs.int8 import Int8, mixed_bytes_max
from kvpool.codecs.layout import KvLayout

MODEL = Path(__file__).parents[1] / "models" / "tiny-llama"
BLOCK_TOKENS, PREFIX, REST = 16, 512, 128
BLOCKS = PREFIX // BLOCK_TOKENS


def held_out_text():
    """The longest source of the standard library among those that the model was not trained on."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in sorted(root.glob("*.py")) if zlib.crc32(path.name.encode()) % 20 == 0]
    path = max(paths, key=lambda path: path.stat().st_size)
    return f"<|bos|># {path.stem}.py\n{path.read_text(errors='ignore')[:8000]}"


@pytest.fixture(scope="module", params=["float32", "float16", "bfloat16"])
def case(request):
    """Model, tokens, their layout, and the cache after the prefix."""
    torch.set_num_threads(1)
    model = load_model(MODEL, dtype=request.param)
    tokens = AutoTokenizer.from_pretrained(MODEL).encode(held_out_text())[: PREFIX + REST]
    assert len(tokens) == PREFIX + REST
    cache = model.new_cache((PREFIX + REST) // BLOCK_TOKENS, BLOCK_TOKENS)
    model.forward(cache, [Chunk(0, PREFIX, range(BLOCKS))], tokens[:PREFIX], [0], exact=False)
    spec = model.namespace(BLOCK_TOKENS, exact=False)
    return model, tokens, KvLayout.of(spec, spec.groups[0]), cache


def rows_of(cache):
    return cache.view(torch.uint8).view(cache.shape[0], -1).numpy()


def through_the_codec(codec, layout, cache):
    """A copy of the cache that travelled over a channel, and what became of its blocks."""
    copy, encoded = cache.clone(), np.zeros((BLOCKS, mixed_bytes_max(layout)), dtype=np.uint8)
    result = codec.encode_mixed(rows_of(cache), encoded, layout, rows=np.arange(BLOCKS))
    codec.decode(encoded, rows_of(copy), layout, rows=np.arange(BLOCKS), sizes=result.sizes)
    return copy, result


def log_probabilities(model, tokens, cache):
    table = range((PREFIX + REST) // BLOCK_TOKENS)
    logits = model.forward(cache.clone(), [Chunk(PREFIX, REST, table)], tokens[PREFIX:], range(REST), exact=False)
    return torch.log_softmax(logits[:REST].double(), dim=-1)


def test_answers_stay_what_they_were(case):
    model, tokens, layout, cache = case
    lossy, result = through_the_codec(Int8(), layout, cache)
    assert not torch.equal(lossy, cache), "nothing was lost: the test tests nothing"
    ratio = result.sizes.sum() / (BLOCKS * layout.block_bytes)
    assert ratio < (0.3 if layout.dtype == "float32" else 0.58), "headers, scales and padding counted"
    exact, other = log_probabilities(model, tokens, cache), log_probabilities(model, tokens, lossy)
    divergence = (exact.exp() * (exact - other)).sum(-1)
    agreement = (exact.argmax(-1) == other.argmax(-1)).double().mean()
    assert divergence.mean() < 0.002 and divergence.max() < 0.1, f"KL {divergence.mean()}, {divergence.max()}"
    assert agreement > 0.95


def test_real_tiles_are_within_their_bound(case):
    """Also under a bound that about half of them break."""
    _, _, layout, cache = case
    _, loose = through_the_codec(Int8(0.5), layout, cache)
    bound = float(np.median(loose.error))
    copy, result = through_the_codec(Int8(bound), layout, cache)
    assert 0.2 < result.fell_back.mean() < 0.8
    for block in range(BLOCKS):
        for layer in range(layout.layers):
            section = layer // layout.section_layers
            before, after = cache[block, layer].double(), copy[block, layer].double()
            if result.fell_back[block, section]:
                assert torch.equal(before, after)
                continue
            for kind in range(2):
                error = (before[kind] - after[kind]).square().mean().sqrt() / before[kind].square().mean().sqrt()
                assert error <= bound * 1.00001
