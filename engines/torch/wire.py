"""Between the messages of the Engine service and the engine's own types."""

from __future__ import annotations

import numpy as np

from engines.torch.links import LinkSample
from engines.torch.pulling import Origin
from engines.torch.request import Finish, Phase, Request, Samples, Sampling, StepEvent, Times
from kvpool.client import Hold
from kvpool.core.errors import BadArgument, NamespaceMismatch
from kvpool.core.hashing import block_keys, tail_key
from kvpool.core.ids import KeyArray, Role
from kvpool.core.namespace import NamespaceSpec
from kvpool.v1 import engine_pb2, scheduler_pb2


def origins(submit: engine_pb2.Submit) -> tuple[Origin, ...]:
    """Where the scheduler says blocks of the prompt can be read."""
    return tuple(
        Origin(run.address, run.first, run.first + run.count)
        for run in submit.pull
        if run.address and run.count and not run.group and not run.shard
    )


def prompt_keys(submit: engine_pb2.Submit, block_tokens: int, hash_name: str) -> KeyArray:
    """Keys of all blocks of a prompt as a hand-off stores them: full ones, then the tail's."""
    tokens = np.frombuffer(submit.token_ids, dtype="<u4").astype(np.uint32)
    keys = block_keys(submit.root_key, tokens, block_tokens, hash_name)
    tail = tokens[len(keys) * block_tokens :]
    if not len(tail):
        return keys
    parent = keys[-1].tobytes() if len(keys) else submit.root_key
    return np.concatenate([keys, np.frombuffer(tail_key(parent, tail, hash_name), dtype=np.uint8)[None]])


def handoff_hold(submit: engine_pb2.Submit) -> Hold | None:
    """What a PREFILL request puts on the blocks that it publishes."""
    asked = submit.handoff
    if submit.phase != Phase.PREFILL or not (asked.request_id and asked.ttl_ms):
        return None
    return Hold(asked.request_id, asked.ttl_ms / 1000)


def request(submit: engine_pb2.Submit, namespace: NamespaceSpec, *, now_us: int, pool: bool) -> Request:
    """The request of a Submit.

    Args:
        now_us: of the engine's clock.
        pool: whether there is a node to publish to.
    Raises: BadArgument, NamespaceMismatch.
    """
    if submit.namespace_id != namespace.id():
        raise NamespaceMismatch(
            "the request's KV namespace is not this engine's", hint="were all workers started with the same options?"
        )
    if len(submit.token_ids) % 4:
        raise BadArgument(f"token_ids has {len(submit.token_ids)} bytes, not a multiple of 4")
    if submit.phase not in Phase.__members__.values():
        raise BadArgument(f"phase {submit.phase} is unknown")
    prompt = np.frombuffer(submit.token_ids, dtype="<u4").astype(np.uint32)
    phase = Phase(submit.phase)
    sampling = submit.sampling
    pull_tokens = 0
    if submit.use_pool:
        if phase is Phase.DECODE:
            pull_tokens = len(prompt) if submit.handoff_source else 0
        else:
            block_tokens = namespace.groups[0].block_tokens
            pull_tokens = max((origin.end for origin in origins(submit)), default=0) * block_tokens
    return Request(
        id=submit.request_id,
        prompt=prompt,
        sampling=Sampling(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p or 1.0,
            seed=sampling.seed,
            stop_token_ids=tuple(sampling.stop_token_ids),
            ignore_eos=sampling.ignore_eos,
            logprobs=sampling.logprobs > 0,
        ),
        root=submit.root_key,
        phase=phase,
        pull_tokens=min(pull_tokens, len(prompt)),
        publish=submit.use_pool and pool,
        deadline_us=now_us + submit.deadline_ms * 1000 if submit.deadline_ms else 0,
    )


def times(value: Times) -> engine_pb2.RequestTimes:
    return engine_pb2.RequestTimes(
        queue_us=value.queue_us,
        pull_us=value.pull_us,
        prefill_us=value.prefill_us,
        cached_tokens_hbm=value.cached_tokens_hbm,
        cached_tokens_pool=value.cached_tokens_pool,
        bytes_pulled=value.bytes_pulled,
        computed_tokens=value.computed_tokens,
        blocks_published=value.blocks_published,
        pull_failures=value.pull_failures,
        read_us=value.read_us,
        exposed_us=value.exposed_us,
        publish_us=value.publish_us,
    )


def event(value: StepEvent) -> engine_pb2.RequestEvent:
    return engine_pb2.RequestEvent(
        request_id=value.request_id,
        token_ids=value.tokens,
        finish_reason=int(value.finish),  # type: ignore[arg-type]
        error=value.error,
        times=times(value.times) if value.times is not None else None,
        logprobs=value.logprobs,
        top2_gaps=value.top2_gaps,
    )


def failure(request_id: str, message: str) -> engine_pb2.RequestEvent:
    return event(StepEvent(request_id, (), Finish.ERROR, message))


def report(
    samples: Samples,
    links: list[LinkSample],
    *,
    running: int,
    waiting: int,
    kv_tokens_free: int,
    draining: bool,
    role: Role | None = None,
) -> scheduler_pb2.InstanceReport:
    return scheduler_pb2.InstanceReport(
        running=running,
        waiting=waiting,
        kv_tokens_free=kv_tokens_free,
        prefill=[
            scheduler_pb2.PrefillSample(
                new_tokens=s.new_tokens, cached_tokens=s.cached_tokens, duration_us=s.duration_us
            )
            for s in samples.prefill
        ],
        decode=[
            scheduler_pb2.DecodeSample(batch=s.batch, kv_tokens=s.kv_tokens, duration_us=s.duration_us)
            for s in samples.decode
        ],
        links=[
            scheduler_pb2.LinkSample(
                source_id=s.source_id,
                bytes=s.bytes,
                duration_us=s.duration_us,
                failed=s.failed,
                channel_count=s.concurrent,
            )
            for s in links
        ],
        finished_prefills=samples.finished_prefills,
        draining=draining,
        role=None if role is None else int(role),  # type: ignore[arg-type]
    )
