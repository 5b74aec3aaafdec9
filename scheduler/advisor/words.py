"""An advice in plain words and as plain data. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from scheduler.advisor.advice import GAIN_MIN, Advice, Answer, Range, Storage, cost_per_million
from scheduler.advisor.demand import Demand
from scheduler.advisor.measured import Links
from scheduler.advisor.model import Design, Kind
from scheduler.advisor.sizing import Sized

GB = 1e9


def sentences(advice: Advice) -> Iterator[str]:
    """The answer first, then what it rests on and where it would change."""
    yield _headline(advice)
    yield from _reasons(advice)
    if advice.links is not None and advice.links.broken:
        yield _broken(advice, advice.links)
    if advice.answer is not Answer.NEITHER:
        yield _bandwidth(advice)
        yield _counts(advice)
    for storage in advice.storage:
        yield _stored(storage)
    yield from advice.notes


def _headline(advice: Advice) -> str:
    broken = advice.links is not None and bool(advice.links.broken)
    if advice.answer is Answer.NEITHER or advice.chosen is None:
        return "Neither works: " + _why_neither(advice)
    named = advice.chosen.design.named()
    if advice.answer is Answer.SPLIT:
        repair = " And repair the broken link." if broken else ""
        return f"Split prefill from decode: {named}.{repair}"
    if broken:
        return f"Stay co-located, fix the link first: {named}."
    return f"Stay co-located: {named}."


def _why_neither(advice: Advice) -> str:
    for one in (advice.colocated, advice.split):
        if one is not None and one.evaluation.obstacle:
            return f"{one.evaluation.obstacle}, at any rate that matters."
    return "no design keeps the limits, however few requests there are. Loosen them, or take faster hardware."


def _reasons(advice: Advice) -> Iterator[str]:
    if advice.designs:
        if advice.colocated is None:
            yield "No number of instances that stay together keeps the limits."
        elif advice.split is None:
            yield "No split keeps the limits, whatever the numbers."
        else:
            yield (
                f"The cheapest that stays together is {advice.colocated.design.named()} at "
                f"{_price(advice.colocated)}, the cheapest split {advice.split.design.named()} at "
                f"{_price(advice.split)}; a split is worth it from {GAIN_MIN:.0%} less on."
            )
    elif advice.colocated is not None and advice.split is not None:
        yield (
            f"With the same GPUs, together they carry {advice.colocated.capacity_per_s:.2f} requests/s inside the "
            f"limits, split at best {advice.split.capacity_per_s:.2f} ({_gain(advice.gain)}); a split is worth it from "
            f"{GAIN_MIN:.0%} more on."
        )
    elif advice.split is None:
        yield "One instance can't be split."
    if advice.unchanged is not None and advice.chosen is not None:
        yield _chunks(advice, advice.chosen, advice.unchanged)
    if advice.chosen is not None and not advice.carries:
        yield (
            f"It does not carry the trace: {advice.demand.rate_per_s:.2f} requests/s come. "
            "Add GPUs, or refuse the excess early."
        )


def _chunks(advice: Advice, chosen: Sized, unchanged: Sized) -> str:
    text = (
        f"That is with prompts cut into chunks of {chosen.evaluation.chunk_tokens} tokens. With "
        f"{unchanged.evaluation.chunk_tokens or unchanged.design.chunk_tokens} as the engines have it they carry "
        f"{unchanged.capacity_per_s:.2f} requests/s"
    )
    apart = advice.split
    if advice.designs or apart is None or apart.capacity_per_s < (1 + GAIN_MIN) * unchanged.capacity_per_s:
        return f"{text}."
    return f"{text}, and if that can't be changed a split is worth it: {apart.design.named()}."


def _broken(advice: Advice, links: Links) -> str:
    named = ", ".join(
        f"{link.begin} to {link.end} " + (f"is {link.state}" if link.bytes_s is None or link.state == "down" else
        f"carries {link.bytes_s / GB:.1f} GB/s")
        for link in links.broken[:4]
    )  # fmt: skip
    more = f" and {len(links.broken) - 4} more" if len(links.broken) > 4 else ""
    text = f"Broken: {named}{more}; the others carry {links.healthy_bytes_s / GB:.1f} GB/s."
    design = advice.chosen.design if advice.chosen is not None else None
    if design is not None and max(design.prefill.gpus_per_instance, design.decode.gpus_per_instance) > 1:
        text += " Put no instance across a broken one: its GPUs talk to each other for every token."
    if advice.healed_gain is None:
        return text
    verdict = (
        "a split would be worth it then" if advice.healed_gain >= GAIN_MIN else "a split is not worth it then either"
    )
    return f"{text} Repaired, a split would carry {_gain(advice.healed_gain)}: {verdict}."


def _bandwidth(advice: Advice) -> str:
    now = f"{advice.link_bytes_s / GB:.1f} GB/s are planned with"
    if advice.bytes_s_turns is None:
        return f"No link bandwidth makes a split worth it here ({now})."
    return f"A split is worth it from {advice.bytes_s_turns / GB:.2g} GB/s between instances on ({now})."


def _counts(advice: Advice) -> str:
    if len(advice.by_gpus) == 1:
        only = advice.by_gpus[0]
        return f"With {only.gpus_min} to {only.gpus_max} GPUs of this kind the answer is the same."
    parts = ", ".join(_range(part) for part in advice.by_gpus)
    return f"By the number of GPUs, each with as much to do as it can: {parts}."


def _range(part: Range) -> str:
    count = f"{part.gpus_min}" if part.gpus_min == part.gpus_max else f"{part.gpus_min}-{part.gpus_max}"
    return f"{count} {part.answer.value}"


def _stored(storage: Storage) -> str:
    verdict = "fetch" if storage.pays else "recompute"
    turn = "never pays" if storage.tokens_min is None else f"pays from {storage.tokens_min:,} tokens on"
    times = f"{storage.pull_us / 1e3:,.0f} ms to fetch, {storage.recompute_us / 1e3:,.0f} ms to compute"
    return f"A prefix of {storage.tokens:,} tokens in the {storage.place}: {verdict} ({times}; fetching {turn})."


def _price(one: Sized) -> str:
    return f"{one.design.price_hour:.2f} an hour" if one.design.price_hour else f"{one.design.gpus} GPUs"


def _gain(gain: float) -> str:
    if math.isinf(gain):
        return "all, the other nothing"
    return f"{abs(gain):.0%} {'more' if gain >= 0 else 'less'}"


# ---------------------------------------------------------------- plain data


def to_json(advice: Advice) -> dict[str, Any]:
    """Everything, with units in the names; what is unlimited or unknown is None."""
    return {
        "answer": advice.answer.value,
        "text": list(sentences(advice)),
        "demand": _demand(advice.demand),
        "objectives": {
            "ttft_ms": advice.objectives.ttft_us / 1e3,
            "tbt_ms": advice.objectives.tbt_us / 1e3,
            "share": advice.objectives.share_min,
        },
        "chosen": _sized(advice.chosen, advice.demand),
        "colocated": _sized(advice.colocated, advice.demand),
        "split": _sized(advice.split, advice.demand),
        "colocated_with_chunks_as_they_are": _sized(advice.unchanged, advice.demand),
        "gain": _finite(advice.gain),
        "carries_the_trace": advice.carries,
        "designs": [_sized(one, advice.demand) for one in advice.designs],
        "broken_links": [
            {"from": link.begin, "to": link.end, "state": link.state, "bytes_per_s": link.bytes_s}
            for link in (advice.links.broken if advice.links is not None else ())
        ],
        "gain_with_links_repaired": _finite(advice.healed_gain),
        "link_bytes_per_s": advice.link_bytes_s,
        "split_pays_from_bytes_per_s": advice.bytes_s_turns,
        "by_gpus": [
            {"gpus_min": part.gpus_min, "gpus_max": part.gpus_max, "answer": part.answer.value}
            for part in advice.by_gpus
        ],
        "storage": [
            {
                "place": one.place,
                "tokens": one.tokens,
                "fetch_ms": one.pull_us / 1e3,
                "recompute_ms": one.recompute_us / 1e3,
                "verdict": "fetch" if one.pays else "recompute",
                "fetching_pays_from_tokens": one.tokens_min,
            }
            for one in advice.storage
        ],
        "cost_per_million_tokens": advice.cost_per_million,
    }


def _demand(demand: Demand) -> dict[str, Any]:
    return {
        "requests_per_s": demand.rate_per_s,
        "prompt_tokens_mean": float(demand.prompt_tokens.mean()),
        "output_tokens_mean": float(demand.output_tokens.mean()),
        "cached_share": demand.cached_share,
        "cache_blocks": demand.capacity_blocks,
        "unevenness": demand.unevenness,
    }


def _sized(one: Sized | None, demand: Demand) -> dict[str, Any] | None:
    if one is None:
        return None
    e = one.evaluation
    return {
        **_design(one.design),
        "carries_requests_per_s": one.capacity_per_s,
        "good_share": e.good_share,
        "ttft_ms_mean": _finite(e.ttft_us / 1e3),
        "tbt_ms_mean": _finite(e.tbt_us / 1e3),
        "prefill_busy": e.prefill_busy,
        "decode_kv_share": e.decode_kv_share,
        "decode_batch": e.batch,
        "network_busy": e.network_busy,
        "exposed_handoff_ms": e.exposed_us / 1e3,
        "chunk_tokens": e.chunk_tokens,
        "obstacle": e.obstacle,
        "price_per_hour": one.design.price_hour,
        "cost_per_million_tokens": cost_per_million(one, demand),
    }


def _design(design: Design) -> dict[str, Any]:
    roles = {"decode": design.decode} if design.kind is Kind.COLOCATED else {
        "prefill": design.prefill, "decode": design.decode
    }  # fmt: skip
    counts = {"prefill": design.prefills, "decode": design.decodes}
    return {
        "kind": design.kind.value,
        "gpus": design.gpus,
        "roles": {
            ("both" if design.kind is Kind.COLOCATED else name): {
                "hardware": hardware.name,
                "gpu": hardware.gpu,
                "tp": hardware.gpus_per_instance,
                "instances": counts[name],
            }
            for name, hardware in roles.items()
        },
    }


def _finite(value: float | None) -> float | None:
    return None if value is None or math.isinf(value) else value
