"""Baseline policies: their published formulas on cases computed by hand, blocks of 64 tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import scheduler_events as made

from kvpool.core.ids import Role, Tier
from scheduler.core import checkpoint, events
from scheduler.core.commands import Placed, Refused
from scheduler.core.config import SchedulerConfig
from scheduler.core.core import SchedulerCore
from scheduler.core.options import Appraiser, Option
from scheduler.core.policies import POLICIES
from scheduler.core.policies.dynamo import Dynamo
from scheduler.core.policies.llmd import LlmD
from scheduler.core.policies.local import OwnBlocks, active_requests, own_blocks
from scheduler.core.policies.mooncake import MooncakeAlgorithm1
from scheduler.core.policies.sglang import SglangCacheAware
from scheduler.core.policy_parameters import PolicyParameters
from scheduler.service import codec

KV_TOKENS = 100_000


class Cluster:
    """A core with instances `w0`, `w1`, ..., each on a node `n0`, `n1`, ... of its own that has an SSD."""

    def __init__(self, roles: Sequence[Role] = (Role.BOTH,) * 3, **over: Any) -> None:
        baselines = {name: over.pop(name) for name in list(over) if hasattr(PolicyParameters(), name)}
        self.core = SchedulerCore(replace(SchedulerConfig(**over), baselines=PolicyParameters(**baselines)))
        self.streams: dict[str, int] = {}
        self.open(events.GatewayOpened, "gateway_id", "gw")
        for n, role in enumerate(roles):
            host: dict[str, object] = {"host_id": f"h{n}", "instance_id": ""}
            self.attach(f"n{n}", **host)
            self.attach(f"n{n}.ssd", **host, tier=Tier.SSD)
            self.attach(f"w{n}-hbm", tier=Tier.HBM, host_id=f"h{n}", address="", instance_id=f"w{n}")
            where = {"host_id": f"h{n}", "node_source_id": f"n{n}", "node_address": f"n{n}:1"}
            stream = self.stream(f"w{n}")
            sizes = {"kv_tokens_total": KV_TOKENS, "context_tokens_max": KV_TOKENS, "batch_max": 256}
            self.handle(made.joined(stream, f"w{n}", role=role, **where, **sizes))

    def stream(self, name: str) -> int:
        return self.streams.setdefault(name, len(self.streams) + 1)

    def open(self, kind: Any, field: str, name: str) -> None:
        self.handle(kind(stream=self.stream(name), **{field: name}))

    def attach(self, name: str, **over: object) -> None:
        self.handle(made.attached(self.stream(name), name, **over))
        self.hold(name, "")

    def hold(self, source: str, blocks: str) -> None:
        self.handle(made.snapshot(self.stream(source), 0, blocks))

    def handle(self, event: Any) -> list[Any]:
        return self.core.handle(event, self.core.now_us)

    def place(self, policy: str, request_id: str = "r", **over: Any) -> Placed | Refused:
        (answer,) = self.handle(made.place(request_id, policy=policy, **over))
        return answer

    def load(self, instance: str, count: int = 1, prefilled: bool = True, **over: Any) -> None:
        """Gives an instance requests that decode there, or whose prefill is still to come."""
        others = tuple(i for i in self.core.cluster.instances if i != instance)
        for n in range(count):
            name = f"load-{instance}-{len(self.core.book.placements)}-{n}"
            answer = self.place("least_loaded", name, exclude_instances=others, **over)
            assert isinstance(answer, Placed), answer
            if prefilled:
                self.handle(made.outcome(self.stream("gw"), name, first_token=True))

    def appraiser(self, **over: Any) -> Appraiser:
        return self.core.appraiser(made.place("asked", **over), made.BLOCK_TOKENS)

    def instance(self, name: str) -> Any:
        return self.core.cluster.instances[name]

    def ranked(self, policy: Any, **over: Any) -> list[Option]:
        instances = [self.core.cluster.instances[i] for i in sorted(self.core.cluster.instances)]
        return list(policy.rank(self.appraiser(**over), instances))


def where(placed: Placed | Refused) -> tuple[str, str]:
    assert isinstance(placed, Placed), placed
    return placed.prefill.instance_id, placed.decode.instance_id


def test_own_blocks_are_counted_where_they_are_nearest() -> None:
    c = Cluster()
    c.hold("w0-hbm", "a0..a3")
    c.hold("n0", "a0..a5")
    c.hold("n0.ssd", "a0..a9")
    c.hold("n1", "a0..a9")
    request = {"blocks": "a0..a14", "prompt_tokens": 15 * 64}
    assert own_blocks(c.appraiser(**request), c.instance("w0")) == OwnBlocks(4, 2, 4)
    assert own_blocks(c.appraiser(**request), c.instance("w1")) == OwnBlocks(0, 10, 0)
    assert own_blocks(c.appraiser(**request), c.instance("w2")) == OwnBlocks(0, 0, 0)
    assert own_blocks(c.appraiser(**request, use_pool=False), c.instance("w0")) == OwnBlocks(4, 0, 0)


def test_own_tiers_may_hold_only_what_follows() -> None:
    """What is evicted from one tier goes to the next: each has a piece in the middle."""
    c = Cluster((Role.BOTH,))
    c.hold("w0-hbm", "a0..a3")
    c.hold("n0", "a3..a6")
    c.hold("n0.ssd", "a6..a8,a10")
    assert own_blocks(c.appraiser(blocks="a0..a14", prompt_tokens=960), c.instance("w0")) == OwnBlocks(4, 3, 2)
    placed = c.place("least_loaded", blocks="a0..a14", prompt_tokens=960)
    assert isinstance(placed, Placed) and placed.cached_tokens == 9 * 64


def test_requests_are_counted_once_whether_they_decode_or_wait() -> None:
    c = Cluster((Role.PREFILL, Role.BOTH))
    c.load("w1", 2)
    c.load("w1", 1, prefilled=False)
    assert where(c.place("always_split", "s")) == ("w0", "w1")
    assert active_requests(c.appraiser(), c.instance("w1")) == 4
    assert active_requests(c.appraiser(), c.instance("w0")) == 1  # to be prefilled there


@pytest.mark.parametrize("policy", ["random", "least_loaded", "dynamo", "sglang_cache_aware", "llmd"])
def test_nothing_is_pulled_from_elsewhere(policy: str) -> None:
    c = Cluster((Role.BOTH, Role.BOTH))
    c.hold("n1", "a0..a29")
    for n in range(6):
        placed = c.place(policy, f"r{n}", blocks="a0..a30", prompt_tokens=31 * 64)
        assert isinstance(placed, Placed)
        assert {run.source_id for run in placed.pull} <= {"n1"} if where(placed)[0] == "w1" else not placed.pull


def test_what_a_node_has_itself_is_loaded_from_there_although_others_have_more() -> None:
    c = Cluster((Role.BOTH,) * 12)
    c.hold("w0-hbm", "a0..a1")
    c.hold("n0", "a0..a4")
    c.hold("n0.ssd", "a0..a6")
    for n in range(1, 12):
        c.hold(f"n{n}", f"a0..a{10 + n}")
    others = tuple(f"w{n}" for n in range(1, 12))
    placed = c.place("random", blocks="a0..a29", prompt_tokens=30 * 64, exclude_instances=others)
    assert isinstance(placed, Placed)
    assert [(r.source_id, r.first, r.count) for r in placed.pull] == [("n0", 2, 3), ("n0.ssd", 5, 2)]
    assert placed.cached_tokens == 7 * 64


# ---------------------------------------------------------------- Dynamo


def test_dynamo_cost_by_hand() -> None:
    c = Cluster(dynamo_request_weight=3.0)
    policy = c.core.policies["dynamo"]
    assert isinstance(policy, Dynamo)
    c.hold("w0-hbm", "a0..a3")  # 4 blocks
    c.hold("n0", "a0..a5")  # 2 more
    c.hold("n0.ssd", "a0..a9")  # 4 more
    request = {"blocks": "a0..a14", "prompt_tokens": 15 * 64}
    # credit 4 + 0.75 * 2 + 0.25 * 4 = 6.5 blocks of 64 tokens = 416 tokens
    assert policy.cost_milli(c.appraiser(**request), c.instance("w0")) == (960 - 416) * 1000 // 16
    assert policy.cost_milli(c.appraiser(**request), c.instance("w1")) == 960 * 1000 // 16
    # One that computes 320 tokens: 320 active, its context to decode, and one active request.
    c.place("dynamo", "b", prompt_tokens=320, max_tokens=100, exclude_instances=("w0", "w2"))
    context_tokens = 320 + 50 // 2
    expected = (320 + 960 + context_tokens) * 1000 / 16 + 3 * 1000
    assert policy.cost_milli(c.appraiser(**request), c.instance("w1")) == int(expected)
    # Its prefill over, the active tokens are gone.
    c.handle(made.outcome(c.stream("gw"), "b", first_token=True))
    assert policy.cost_milli(c.appraiser(**request), c.instance("w1")) == int(expected - 320 * 1000 / 16)


def test_dynamo_credit_can_cover_no_more_than_all() -> None:
    c = Cluster(dynamo_device_credit=5.0)
    policy = c.core.policies["dynamo"]
    assert isinstance(policy, Dynamo)
    c.hold("w0-hbm", "a0..a9")
    assert policy.cost_milli(c.appraiser(blocks="a0..a14", prompt_tokens=960), c.instance("w0")) == 0


def test_dynamo_takes_the_least_cost() -> None:
    c = Cluster()
    c.hold("w1-hbm", "a0..a14")
    assert where(c.place("dynamo", blocks="a0..a15", prompt_tokens=1000)) == ("w1", "w1")
    c.load("w1", 2, prompt_tokens=1000)  # 2 * 1050 tokens to decode outweigh 960 cached
    assert where(c.place("dynamo", "r2", blocks="a0..a15", prompt_tokens=1000)) == ("w0", "w0")


@pytest.mark.parametrize(
    ("prompt_tokens", "cached_blocks", "splits"),
    [
        (4096, 0, True),
        (2048, 0, True),  # not fewer than 2048
        (1920, 0, True),  # few, but all of the prompt
        (6400, 70, False),  # 1920 left, 30 %
        (2000, 10, False),  # 1360 left, 68 %
        (2000, 9, True),  # 1424 left, 71 %
        (64_000, 100, True),
    ],
)
def test_dynamo_splits_unless_little_is_left(prompt_tokens: int, cached_blocks: int, splits: bool) -> None:
    c = Cluster((Role.PREFILL, Role.PREFILL, Role.DECODE))
    if cached_blocks:
        c.hold("w2-hbm", f"a0..a{cached_blocks - 1}")
        c.hold("n1", "a0..a3")
    placed = c.place("dynamo", blocks="a0..a999", prompt_tokens=prompt_tokens)
    expected = ("w2", "w2") if not splits else ("w1", "w2") if cached_blocks else ("w0", "w2")
    assert where(placed) == expected


# ---------------------------------------------------------------- SGLang


def test_sglang_follows_the_cache_while_loads_are_balanced() -> None:
    c = Cluster(sglang_balance_abs=2)
    c.hold("w2-hbm", "a0..a4")
    request = {"blocks": "a0..a15", "prompt_tokens": 1000}
    assert where(c.place("sglang_cache_aware", "r0", **request))[1] == "w2"  # 320 of 1000 tokens: more than 0.3
    assert where(c.place("sglang_cache_aware", "r1", blocks="a0..a15", prompt_tokens=1067))[1] == "w0"  # 0.2999
    c.load("w1", 1)
    assert where(c.place("sglang_cache_aware", "r2", **request))[1] == "w2"  # 1, 1, 1
    # 1, 1, 2 -> 1, 1, 3: they differ by two, which is not more than two.
    assert where(c.place("sglang_cache_aware", "r3", **request))[1] == "w2"
    assert where(c.place("sglang_cache_aware", "r4", **request))[1] == "w2"
    # 1, 1, 4: more than two, and more than 1.5 times: least load.
    assert where(c.place("sglang_cache_aware", "r5", **request))[1] == "w0"


def test_sglang_needs_both_differences() -> None:
    c = Cluster(sglang_balance_abs=2, sglang_balance_rel=4.0)
    c.hold("w2-hbm", "a0..a14")
    c.load("w0", 1)
    c.load("w1", 1)
    c.load("w2", 4)  # 1, 1, 4: more than two apart, but not more than 4 times
    assert where(c.place("sglang_cache_aware", blocks="a0..a15"))[1] == "w2"
    assert where(c.place("sglang_cache_aware", "r1", blocks="a0..a15"))[1] == "w0"  # 1, 1, 5


def test_sglang_splits_everything_where_roles_are_split() -> None:
    c = Cluster((Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE))
    c.hold("w1-hbm", "a0..a9")
    c.load("w2", 1, prompt_tokens=64)
    assert where(c.place("sglang_cache_aware", blocks="a0..a15")) == ("w1", "w3")


# ---------------------------------------------------------------- llm-d


def test_llmd_scores_by_hand() -> None:
    c = Cluster()
    policy = c.core.policies["llmd"]
    assert isinstance(policy, LlmD)
    c.hold("w0-hbm", "a0..a3")
    c.hold("n0", "a0..a7")
    c.load("w1", 1, prompt_tokens=4900, max_tokens=92)  # holds 4992 tokens of 100 000; not prefilling
    c.load("w2", 2, prefilled=False, prompt_tokens=64, max_tokens=64)  # holds 256, two in the queue
    c.load("w1", 1, prefilled=False, prompt_tokens=64, max_tokens=64)  # one in the queue
    appraiser = c.appraiser(blocks="a0..a15", prompt_tokens=1024)
    scores = policy.scores_micro(appraiser, [c.instance(i) for i in ("w0", "w1", "w2")])
    assert scores["w0"] == pytest.approx(1e6 * (3 * (4 + 0.8 * 4) / 16 + 2 * 1.0 + 2 * 1.0), abs=2)
    assert scores["w1"] == pytest.approx(1e6 * (0 + 2 * (1 - 0.0512) + 2 * 0.5), abs=2)
    assert scores["w2"] == pytest.approx(1e6 * (0 + 2 * (1 - 0.00256) + 0.0), abs=2)


def test_llmd_picks_the_highest_sum() -> None:
    c = Cluster(llmd_prefix_weight=1.0, llmd_kv_weight=0.0, llmd_queue_weight=1.0)
    c.hold("w1-hbm", "a0..a8")
    request = {"blocks": "a0..a15", "prompt_tokens": 1024}
    assert where(c.place("llmd", "r0", **request))[1] == "w1"  # 9/16 + 1 against 1
    assert where(c.place("llmd", "r1", **request))[1] == "w0"  # its queue is the longest: 9/16 + 0 against 1


def test_llmd_splits_from_a_threshold_on() -> None:
    c = Cluster((Role.PREFILL, Role.PREFILL, Role.DECODE))
    c.hold("n1", "a0..a9")
    c.hold("w2-hbm", "a0..a1")
    assert where(c.place("llmd", "r0", blocks="a0..a99", prompt_tokens=2048 + 128)) == ("w1", "w2")
    assert where(c.place("llmd", "r1", blocks="a0..a99", prompt_tokens=2047 + 128)) == ("w2", "w2")


# ---------------------------------------------------------------- Mooncake


def test_mooncake_pulls_and_so_replicates_beyond_the_threshold() -> None:
    c = Cluster((Role.PREFILL, Role.PREFILL, Role.PREFILL, Role.DECODE), mooncake_threshold=2.0)
    c.hold("n0", "a0..a19")
    c.hold("n1", "a0..a9")  # 20 / 10 is not above the threshold
    c.hold("n2", "a0..a8")
    policy = c.core.policies["mooncake_algorithm1"]
    options = {o.prefill.id: o for o in c.ranked(policy, blocks="a0..a29", prompt_tokens=30 * 64)}
    assert {i: o.cached_tokens // 64 for i, o in options.items()} == {"w0": 20, "w1": 10, "w2": 20}
    assert [run.source_id for run in c.appraiser(blocks="a0..a29").prefix.runs(options["w1"].pull)] == ["n1"]
    assert all(o.split and o.decode.id == "w3" for o in options.values())


def test_mooncake_minimises_transfer_queue_and_prefill() -> None:
    c = Cluster((Role.PREFILL, Role.PREFILL, Role.DECODE))
    c.hold("n0", "a0..a19")
    options = c.ranked(c.core.policies["mooncake_algorithm1"], blocks="a0..a29", prompt_tokens=30 * 64)
    sums = [o.pull_us + o.queue_us + o.prefill_us for o in options]
    assert sums == sorted(sums)
    assert where(c.place("mooncake_algorithm1", "r0", blocks="a0..a29", prompt_tokens=30 * 64))[0] == "w0"
    # A queue there of that length, and the other one is better although it has to pull.
    assert where(c.place("mooncake_algorithm1", "r1", blocks="a0..a29", prompt_tokens=30 * 64))[0] == "w1"


def test_mooncake_decodes_where_the_step_is_shortest() -> None:
    c = Cluster((Role.PREFILL, Role.DECODE, Role.DECODE))
    c.load("w1", 3)
    assert where(c.place("mooncake_algorithm1")) == ("w0", "w2")


def test_mooncake_refuses_what_it_predicts_to_be_late() -> None:
    c = Cluster((Role.PREFILL, Role.DECODE))
    late = c.place("mooncake_algorithm1", "r0", prompt_tokens=4000, ttft_slo_us=1000)
    assert isinstance(late, Refused) and "TTFT" in late.message
    slow = c.place("mooncake_algorithm1", "r1", tpot_slo_us=1)
    assert isinstance(slow, Refused) and "TPOT" in slow.message
    assert isinstance(c.place("mooncake_algorithm1", "r2", ttft_slo_us=10_000_000, tpot_slo_us=10_000_000), Placed)


@pytest.mark.parametrize("predicts", [True, False])
def test_mooncake_judges_load_on_arrival_or_as_predicted(predicts: bool) -> None:
    """Those that decode will have ended before the prompt is computed: only who predicts knows."""
    c = Cluster((Role.PREFILL, Role.DECODE), mooncake_predicts_load=predicts)
    alone_us = c.ranked(MooncakeAlgorithm1(c.core.config), prompt_tokens=90_000)[0].step_us
    c.load("w1", 4, prompt_tokens=2000, max_tokens=4)
    answer = c.place("mooncake_algorithm1", prompt_tokens=90_000, tpot_slo_us=alone_us + 50)
    assert isinstance(answer, Placed if predicts else Refused), answer


# ---------------------------------------------------------------- all


def test_always_colocate_never_splits_and_always_split_does() -> None:
    c = Cluster((Role.PREFILL, Role.DECODE, Role.BOTH))
    c.load("w1", 6, prefilled=False, prompt_tokens=4000)
    c.load("w2", 6, prefilled=False, prompt_tokens=4000)
    assert where(c.place("always_colocate", "r0")) in (("w1", "w1"), ("w2", "w2"))
    assert where(c.place("always_split", "r1"))[0] == "w0"
    assert not any(o.split for o in c.ranked(c.core.policies["always_colocate"]))


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - {"kvpool"}))
@pytest.mark.parametrize("roles", [(Role.BOTH,) * 4, (Role.PREFILL, Role.PREFILL, Role.DECODE, Role.BOTH)])
def test_each_ranks_feasible_ways_and_leaves_nothing_behind(policy: str, roles: Sequence[Role]) -> None:
    c = Cluster(roles, policy=policy)
    c.hold("n0", "a0..a19")
    c.hold("w3-hbm", "a0..a9")
    for n in range(40):
        placed = c.place("", f"r{n}", blocks="a0..a29", prompt_tokens=500 + 50 * n, max_tokens=50)
        assert isinstance(placed, Placed), placed
        c.core.check_invariants()
    for n in range(40):
        c.handle(made.outcome(c.stream("gw"), f"r{n}", first_token=True))
        c.handle(made.outcome(c.stream("gw"), f"r{n}"))
    c.core.check_invariants()
    assert not c.core.book.placements


def test_dynamo_remembers_a_bounded_number() -> None:
    c = Cluster(placements_max=10)
    for n in range(30):
        c.place("dynamo", f"r{n}")
        c.handle(made.outcome(c.stream("gw"), f"r{n}"))
    policy = c.core.policies["dynamo"]
    assert isinstance(policy, Dynamo)
    assert len(policy.computing) == 10


def test_sglang_and_llmd_keep_nothing() -> None:
    assert SglangCacheAware(SchedulerConfig()) == SglangCacheAware(SchedulerConfig())


def test_a_checkpoint_keeps_what_dynamo_remembers() -> None:
    c = Cluster(policy="dynamo", llmd_kv_weight=7.0)
    c.place("", "r0", prompt_tokens=777)
    state = codec.loads(codec.dumps(checkpoint.state_of(c.core)))
    restored = checkpoint.core_of(state)
    assert restored.policies == c.core.policies
    assert restored.config.baselines.llmd_kv_weight == 7.0
    again = made.place("r1", prompt_tokens=500)
    assert restored.handle(again, 5) == c.core.handle(again, 5)
