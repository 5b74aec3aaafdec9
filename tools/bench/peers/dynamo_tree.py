"""Dynamo's hashing and its radix tree (Rust) from Python: a prompt as a list of ints, matched in a tree that holds it.

pip install ai-dynamo-runtime==1.6.1 numpy
"""

import json

import numpy as np
from dynamo._core import RadixTree, compute_block_hash_for_seq
from serving import PROMPT_CALLS, serve, settings

EVENT_BLOCKS = 64


class Dynamo:
    def __init__(self, block_tokens, count):
        self.block_tokens = block_tokens
        self.tokens = np.random.default_rng(0).integers(0, 128_000, count * block_tokens, dtype=np.uint32).tolist()
        self.hashes = compute_block_hash_for_seq(self.tokens, block_tokens)
        self.tree = RadixTree()
        # Names of blocks in a sequence; only that they differ matters here.
        names = np.random.default_rng(1).integers(1, 1 << 62, count).tolist()
        for at in range(0, count, EVENT_BLOCKS):
            blocks = zip(names[at : at + EVENT_BLOCKS], self.hashes[at : at + EVENT_BLOCKS], strict=True)
            stored = {
                "parent_hash": names[at - 1] if at else None,
                "blocks": [{"block_hash": name, "tokens_hash": tokens_hash} for name, tokens_hash in blocks],
            }
            event = {"event_id": at, "dp_rank": 0, "data": {"stored": stored}}
            self.tree.apply_event(0, json.dumps(event).encode())
        assert list(self.tree.find_matches(self.hashes).scores.values()) == [count]

    def hash(self):
        for _ in range(PROMPT_CALLS):
            compute_block_hash_for_seq(self.tokens, self.block_tokens)

    def match(self):
        for _ in range(PROMPT_CALLS):
            assert self.tree.find_matches(self.hashes).scores

    def hash_match(self):
        for _ in range(PROMPT_CALLS):
            assert self.tree.find_matches(compute_block_hash_for_seq(self.tokens, self.block_tokens)).scores


serve(Dynamo(*settings()))
