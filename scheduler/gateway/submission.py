"""What one request asks of the scheduler and of the workers, in the words of the contract."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from kvpool.v1 import common_pb2, engine_pb2, scheduler_pb2
from scheduler.gateway.config import GatewayConfig
from scheduler.gateway.events import Leg, Place, Submit
from scheduler.gateway.models import Model

#: Share of the time for a placement that a request may wait for one in the scheduler.
WAIT_SHARE = 0.8


@dataclass(frozen=True)
class GenerationSpec:
    """What was asked for: one prompt, one answer."""

    request_id: str
    model: Model
    prompt: NDArray[np.uint32]
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False
    policy: str = ""
    use_pool: bool = True
    sticky_key: str = ""
    salt: bytes = b""
    tenant: str = ""
    priority: int = 0
    #: Latency objectives; None = the gateway's own, 0 = none.
    ttft_slo_ms: int | None = None
    tpot_slo_ms: int | None = None

    @cached_property
    def stop_tokens(self) -> frozenset[int]:
        return frozenset(self.stop_token_ids) | (frozenset() if self.ignore_eos else self.model.eos_tokens)

    def attempt_id(self, attempt: int) -> str:
        """Name of one attempt at scheduler and workers: an event of an earlier one can't be taken for a later one's."""
        return self.request_id if attempt == 0 else f"{self.request_id}~{attempt}"


def place_request(
    spec: GenerationSpec,
    config: GatewayConfig,
    command: Place,
    tokens: NDArray[np.uint32],
    root_key: bytes,
    max_tokens: int,
) -> scheduler_pb2.PlaceRequest:
    """Asks for a place for `tokens`: the prompt and what earlier attempts emitted."""
    keys = spec.model.block_keys(root_key, tokens)
    return scheduler_pb2.PlaceRequest(
        request_id=spec.attempt_id(command.attempt),
        gateway_id=config.gateway_id,
        model=spec.model.name,
        keys=[common_pb2.KeyList(keys=keys.tobytes())],
        prompt_tokens=len(tokens),
        max_tokens=max_tokens,
        ttft_slo_ms=config.ttft_slo_ms if spec.ttft_slo_ms is None else spec.ttft_slo_ms,
        tpot_slo_ms=config.tpot_slo_ms if spec.tpot_slo_ms is None else spec.tpot_slo_ms,
        tenant=spec.tenant,
        priority=spec.priority,
        # The scheduler's answer, if only a refusal, must come before this gateway gives up on it.
        wait_ms_max=int(config.place_timeout_s * 1000 * WAIT_SHARE),
        policy=spec.policy or config.policy,
        use_pool=spec.use_pool,
        sticky_key=spec.sticky_key,
        exclude_instances=command.exclude,
        namespace_id=spec.model.namespace_id,
    )


def submission(
    spec: GenerationSpec,
    config: GatewayConfig,
    command: Submit,
    placement: scheduler_pb2.Placement,
    tokens: NDArray[np.uint32],
    root_key: bytes,
    deadline_s: float,
) -> engine_pb2.Submit:
    """What the worker of one leg gets. `deadline_s` is from now."""
    submit = engine_pb2.Submit(
        request_id=spec.attempt_id(command.attempt),
        token_ids=tokens.astype("<u4").tobytes(),
        phase=engine_pb2.PHASE_BOTH,
        sampling=engine_pb2.Sampling(
            max_tokens=command.max_tokens,
            temperature=spec.temperature,
            top_p=spec.top_p,
            seed=spec.seed,
            stop_token_ids=spec.stop_token_ids,
            ignore_eos=spec.ignore_eos,
            logprobs=int(spec.logprobs),
        ),
        root_key=root_key,
        namespace_id=spec.model.namespace_id,
        use_pool=spec.use_pool,
        deadline_ms=max(1, int(deadline_s * 1000)),
    )
    if not placement.split:
        submit.pull.extend(placement.pull)
        return submit
    submit.handoff.request_id = submit.request_id
    submit.handoff.ttl_ms = config.handoff_ttl_ms
    if command.leg is Leg.PREFILL:
        submit.phase = engine_pb2.PHASE_PREFILL
        submit.pull.extend(placement.pull)
        submit.publish_to = placement.handoff_source_id
    else:
        submit.phase = engine_pb2.PHASE_DECODE
        submit.handoff_source = placement.handoff_address
    return submit
