"""Designs run through the simulator: what the closed forms leave out, measured. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from scheduler.advisor.advice import Advice
from scheduler.advisor.demand import demand_of
from scheduler.advisor.model import Kind, Objectives, evaluate
from scheduler.advisor.sizing import Sized
from scheduler.simulator.driver import simulate
from scheduler.simulator.hardware import Hardware
from scheduler.simulator.settings import SimulationConfig
from scheduler.simulator.traces import Trace

#: By how much more requests must be good for one design to be better.
CLEARLY = 0.03
POLICIES = {Kind.COLOCATED: "always_colocate", Kind.SPLIT: "always_split"}


@dataclass(frozen=True, slots=True)
class Check:
    """What the simulation says of a design, beside what was predicted."""

    design: str
    predicted_good_share: float
    simulated_good_share: float
    predicted_ttft_us: float
    simulated_ttft_us: float
    simulated_tbt_us: float

    def to_json(self) -> dict[str, Any]:
        return {
            "design": self.design,
            "predicted_good_share": self.predicted_good_share,
            "simulated_good_share": self.simulated_good_share,
            "predicted_ttft_ms": None if math.isinf(self.predicted_ttft_us) else self.predicted_ttft_us / 1e3,
            "simulated_ttft_ms": self.simulated_ttft_us / 1e3,
            "simulated_tbt_ms": self.simulated_tbt_us / 1e3,
        }


def check(
    one: Sized, trace: Trace, capacity_blocks: int, objectives: Objectives, speed: float, seed: int
) -> Check | None:
    """Simulates a design under a trace, and predicts what it makes of just that one.

    Returns: None for a design of two kinds of hardware, which the simulator does not know.
    """
    design = one.design
    if design.kind is Kind.SPLIT and design.prefill != design.decode:
        return None
    hardware, nodes = _on_nodes(design.decode, design.prefills + design.decodes)
    if design.kind is Kind.COLOCATED and one.evaluation.chunk_tokens:
        hardware = replace(hardware, chunk_tokens=one.evaluation.chunk_tokens)
    if design.link_bytes_s is not None:
        hardware = replace(hardware, nic_bytes_s=design.link_bytes_s, pull_bytes_s=design.link_bytes_s)
    config = SimulationConfig(
        hardware=hardware,
        nodes=nodes,
        split=(design.prefills, design.decodes) if design.kind is Kind.SPLIT else None,
        policy=POLICIES[design.kind],
        seed=seed,
        speed=speed,
        ttft_slo_us=int(objectives.ttft_us),
        tbt_slo_us=int(objectives.tbt_us),
        refuses=False,
    )
    figures = simulate(trace, config).figures()
    predicted = evaluate(design, demand_of(trace, capacity_blocks, speed), objectives)
    return Check(
        design=design.named(),
        predicted_good_share=predicted.good_share,
        simulated_good_share=figures["goodput"],
        predicted_ttft_us=predicted.ttft_us,
        simulated_ttft_us=figures["ttft_ms"] * 1e3,
        simulated_tbt_us=figures["tbt_ms"] * 1e3,
    )


def _on_nodes(hardware: Hardware, instances: int) -> tuple[Hardware, int]:
    """The same instances on whole nodes: fewer on each where they would not fill the last."""
    on_each = math.gcd(instances, hardware.instances_per_node)
    if instances <= hardware.instances_per_node:
        on_each = instances
    share = on_each / hardware.instances_per_node
    return replace(
        hardware,
        instances_per_node=on_each,
        dram_bytes=int(hardware.dram_bytes * share),
        ssd_bytes=int(hardware.ssd_bytes * share),
        nic_bytes_s=hardware.nic_bytes_s * share,
    ), instances // on_each


def disagreement(advice: Advice, checks: Sequence[Check]) -> str:
    """What to say if the simulation prefers the other design; empty if it does not."""
    if len(checks) < 2 or advice.chosen is None:
        return ""
    chosen = next((c for c in checks if c.design == advice.chosen.design.named()), None)
    other = next((c for c in checks if c is not chosen), None)
    if chosen is None or other is None or other.simulated_good_share <= chosen.simulated_good_share + CLEARLY:
        return ""
    return (
        f"The simulation disagrees: {other.design} keeps {other.simulated_good_share:.0%} inside the limits, "
        f"{chosen.design} {chosen.simulated_good_share:.0%}. Believe it rather than the closed forms."
    )
