"""The pool as a library: blocks of a prompt and an object, put and read again: python examples/use_pool.py [NODE].

Start a node first: kvpool node --memory 64MiB --scheduler "". It need not be the same host; there, reads take no call.
"""

import sys

import numpy as np

from kvpool.client import PoolClient
from kvpool.core.hashing import block_keys, root_key
from kvpool.core.namespace import GroupKind, GroupSpec, NamespaceSpec

LAYERS, BLOCK_TOKENS, KV_HEADS, HEAD_DIM = 24, 16, 2, 64
BLOCK_BYTES = LAYERS * 2 * BLOCK_TOKENS * KV_HEADS * HEAD_DIM * 2  # bfloat16


def main(node: str = "127.0.0.1:7701") -> None:
    layers = GroupSpec(
        id=0, kind=GroupKind.FULL, layers=tuple(range(LAYERS)), block_tokens=BLOCK_TOKENS, shard_count=1,
        section_count=4, block_bytes=BLOCK_BYTES, kv_heads=KV_HEADS, head_dim=HEAD_DIM,
    )  # fmt: skip
    spec = NamespaceSpec("my-model", "r1", "bfloat16", "my-engine", "lkthd", "xxh3_128/1", (layers,))
    with PoolClient(node, client="example") as pool:
        namespace = pool.register(spec)
        keys = block_keys(root_key(namespace), list(range(160)), BLOCK_TOKENS)  # 10 full blocks of a prompt
        blocks = np.random.default_rng(0).integers(0, 256, (len(keys), BLOCK_BYTES), dtype=np.uint8)

        put = pool.put(namespace, keys, blocks)
        print(f"stored {put.stored.sum()}, were there {put.existed.sum()}, over {put.channel}")
        out = np.empty_like(blocks)
        got = pool.get(namespace, keys, out)
        print(f"found {got.found.sum()} of {len(keys)}, right: {bool((out == blocks).all())}")

        files = pool.register_objects("checkpoints")
        pool.put_objects(files, ["step-100/optimizer"], [b"any bytes"])
        value = pool.get_objects(files, ["step-100/optimizer"]).values[0]
        print("object:", "absent" if value is None else value.tobytes())
        print("read without a call:", pool.counters.hits_shared, "of", pool.counters.hits)


if __name__ == "__main__":
    main(*sys.argv[1:])
