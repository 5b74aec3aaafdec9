"""One vLLM without a server: `python -m tests.vllm_real.offline JOB`, where JOB is JSON; the answer is the last line.

Asks prompts in rounds; between rounds vLLM's own prefix cache is emptied, so that what hits comes from the pool.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

RESET_S = 30.0


def main(job: dict[str, Any]) -> None:
    from vllm import LLM, SamplingParams

    engine = LLM(**job["engine"])
    sampling = SamplingParams(max_tokens=job.get("max_tokens", 8), temperature=0, ignore_eos=True)
    rounds = []
    for prompts in job["rounds"]:
        answers = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        rounds.append(
            {
                "tokens": [list(answer.outputs[0].token_ids) for answer in answers],
                "cached": [answer.num_cached_tokens or 0 for answer in answers],
            }
        )
        deadline_s = time.monotonic() + RESET_S
        while not engine.reset_prefix_cache():  # stores under way hold blocks; a step finds out that they are through
            assert time.monotonic() < deadline_s
            engine.generate([{"prompt_token_ids": [7]}], SamplingParams(max_tokens=1), use_tqdm=False)
    print(json.dumps(rounds), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    main(json.loads(sys.argv[1]))
