"""One vLLM without a server: `python -m tests.vllm_real.offline JOB`, where JOB is JSON; the answer is the last line.

Asks prompts in rounds; between rounds vLLM's own prefix cache is emptied, so that what hits comes from the pool. A
round after the first is asked again, for some minutes, until all full blocks of its prompts were cached.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

WAIT_S = 300.0


def main(job: dict[str, Any]) -> None:
    from vllm import LLM, SamplingParams

    engine = LLM(**job["engine"])
    sampling = SamplingParams(max_tokens=job.get("max_tokens", 8), temperature=0, ignore_eos=True)
    block_tokens = job["engine"]["block_size"]

    def asked(prompts: list[list[int]]) -> dict[str, Any]:
        answers = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        return {
            "tokens": [list(answer.outputs[0].token_ids) for answer in answers],
            "cached": [answer.num_cached_tokens or 0 for answer in answers],
        }

    def forget() -> None:
        deadline_s = time.monotonic() + WAIT_S
        while not engine.reset_prefix_cache():  # stores under way hold blocks; a step finds out that they are through
            assert time.monotonic() < deadline_s
            engine.generate([{"prompt_token_ids": [7]}], SamplingParams(max_tokens=1), use_tqdm=False)

    rounds = []
    for number, prompts in enumerate(job["rounds"]):
        deadline_s = time.monotonic() + WAIT_S
        full = [(len(prompt) - 1) // block_tokens * block_tokens for prompt in prompts]
        while True:
            rounds[number:] = [asked(prompts)]
            forget()
            if number == 0 or rounds[number]["cached"] == full or time.monotonic() > deadline_s:
                break
    print(json.dumps(rounds), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    main(json.loads(sys.argv[1]))
