"""The yardstick for tokens: one engine without a pool, and teacher forcing where two logits are nearly equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvpool.cli.demo.play import Turn
from kvpool.cli.local import LocalOptions

#: A difference is excused only where the reference's two best logits are closer than this.
NEAR_TIE = 1e-3


class Reference:
    """A single engine in this process, with the workers' settings and no pool."""

    def __init__(self, folder: Path, options: LocalOptions) -> None:
        from scheduler.gateway.text import load_tokenizer

        self._folder, self._options = folder, options
        self._tokenizer = load_tokenizer(str(folder))

    def count_tokens(self, text: str) -> int:
        return len(self._tokenizer.encode(text))

    def check(self, turns: Sequence[Turn], on_turn: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """Compares the output of each turn with the reference's for the same prompt.

        Returns: `tokens_identical`, `near_ties` (outputs excused), and `differences` (the first ten that are not).
        """
        import torch
        from transformers.utils import logging as transformers_logging

        from engines.torch.engine import Engine
        from engines.torch.generate import generate
        from engines.torch.limits import EngineConfig
        from engines.torch.model import load_model
        from engines.torch.request import Sampling

        transformers_logging.disable_progress_bar()  # ours is on the screen
        o = self._options
        torch.set_num_threads(max(1, o.threads))
        model = load_model(self._folder)
        config = EngineConfig(
            block_tokens=o.block_tokens, kv_tokens=o.kv_tokens, chunk_tokens=o.chunk_tokens, batch_max=o.batch_max,
            deterministic=o.deterministic,
        )  # fmt: skip
        engine = Engine(model, config)
        expected: dict[tuple[int, ...], tuple[int, ...]] = {}
        near_ties, differences = 0, []
        for turn in turns:
            prompt = tuple(turn.prompt_ids)
            key = (len(turn.output_ids), *prompt)
            if key not in expected:
                sampling = Sampling(max_tokens=len(turn.output_ids), ignore_eos=True)
                expected[key] = generate(engine, [prompt], sampling)[0].tokens
            if expected[key] != tuple(turn.output_ids):
                if self._excused(model, turn, expected[key]):
                    near_ties += 1
                else:
                    differences.append(
                        {"request_id": turn.request_id, "conversation": turn.conversation, "turn": turn.turn}
                    )
            on_turn()
        return {"tokens_identical": not differences, "near_ties": near_ties, "differences": differences[:10]}

    @staticmethod
    def _excused(model: Any, turn: Turn, expected: tuple[int, ...]) -> bool:
        """Whether each token is the best one, or nearly, given the tokens before it (teacher forcing)."""
        import torch

        prompt, output = turn.prompt_ids, turn.output_ids
        if len(expected) != len(output):
            return False
        model.module.set_attn_implementation("sdpa")
        with torch.inference_mode():
            ids = torch.tensor([prompt + output[:-1]], device=model.device)
            logits = model.module(ids, use_cache=False, logits_to_keep=len(output)).logits[0].float()
        best = logits.max(dim=-1).values
        chosen = logits[torch.arange(len(output)), torch.tensor(output)]
        return bool((best - chosen < NEAR_TIE).all())
