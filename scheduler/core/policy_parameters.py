"""Parameters of the baseline policies, so that a comparison can tune them as it tunes ours. Plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PolicyParameters:
    """Defaults are those published or shipped. A policy reads the fields that begin with its name and no others."""

    #: Whether decode load is judged as predicted for the time when prefill ends; otherwise as it is on arrival.
    mooncake_predicts_load: bool = True

    #: Tokens of one block, the unit of Dynamo's cost.
    dynamo_block_tokens: int = 16
    #: Weight of prefill blocks against decode blocks.
    dynamo_prefill_scale: float = 1.0
    #: Decode blocks that one active request counts as.
    dynamo_request_weight: float = 0.0
    #: Blocks that a cached block is worth, by where it is: on the instance, in its node's memory, on its node's SSD.
    dynamo_device_credit: float = 1.0
    dynamo_host_credit: float = 0.75
    dynamo_disk_credit: float = 0.25
    #: A prompt is not split if fewer tokens than this are to be computed, and they are less than this share of it.
    dynamo_split_tokens_min: int = 2048
    dynamo_split_share_min: float = 0.7

    #: Loads are unbalanced if they differ by more than so many requests and by more than the factor.
    sglang_balance_abs: int = 64
    sglang_balance_rel: float = 1.5
    #: Share of the prompt that must be cached, at least, for an instance to be chosen for it.
    sglang_match_min: float = 0.3

    llmd_prefix_weight: float = 3.0
    llmd_kv_weight: float = 2.0
    llmd_queue_weight: float = 2.0
    #: What a cached block counts as, by where it is: on the instance, in its node's memory or on its SSD.
    llmd_device_score: float = 1.0
    llmd_host_score: float = 0.8
    #: Tokens to be computed from which on a prompt is split, where there are instances that only prefill.
    llmd_split_tokens_min: int = 2048
