"""What a running cluster measured of itself, as the advisor needs it: links, and instances as hardware. Pure.

Input is plain data as `kvctl links --json` and `kvctl workers --json` print it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvpool.core.errors import BadArgument
from scheduler.simulator.hardware import Hardware

#: A link below this share of the median of all is broken: none of the differences that models know explain it.
BROKEN_SHARE = 0.5
#: What a link carries that is down: nothing that anybody would plan with.
DOWN_BYTES_S = 1e6
USABLE = ("up", "degraded")


@dataclass(frozen=True, slots=True)
class Link:
    """One direction between two ends. `bytes_s` is None where nothing was measured."""

    begin: str
    end: str
    state: str
    bytes_s: float | None

    @property
    def planned_bytes_s(self) -> float | None:
        return self.bytes_s if self.state in USABLE else DOWN_BYTES_S


@dataclass(frozen=True, slots=True)
class Links:
    """All links of a cluster, and what a plan can count on.

    Fields:
        slowest_bytes_s: any two instances may have to hand blocks over, so a plan counts on the slowest link.
        healthy_bytes_s: median of the links that are not broken.
        broken: down, or much slower than the others.
    """

    slowest_bytes_s: float
    healthy_bytes_s: float
    broken: tuple[Link, ...]


def links_of(data: Any) -> Links:
    """Reads `{"links": [{"from", "to", "state", "bytes_per_s", ...}]}`, or the list alone.

    Of several channels between two ends the one in use counts (`active`), else the fastest. Shared memory is no link
    between instances and is left out where there are others.
    Raises: BadArgument with what is wrong.
    """
    items = data.get("links") if isinstance(data, Mapping) else data
    if not isinstance(items, list):
        raise BadArgument("no links: a list is expected", hint="`kvctl links --json` prints one")
    best: dict[tuple[str, str], tuple[tuple[bool, bool, float], Link]] = {}
    networked = any(isinstance(item, Mapping) and item.get("kind", "") != "shm" for item in items)
    for number, item in enumerate(items, 1):
        link, active, kind = _link(item, number)
        if networked and kind == "shm":
            continue
        rank = (active, link.state in USABLE, link.bytes_s or 0.0)
        known = best.get((link.begin, link.end))
        if known is None or known[0] < rank:
            best[link.begin, link.end] = rank, link
    found = [link for _, link in best.values() if link.planned_bytes_s is not None]
    if not found:
        raise BadArgument("no link was ever measured", hint="links are measured when blocks move over them")
    return _judged(found)


def _judged(links: Sequence[Link]) -> Links:
    speeds = sorted(link.planned_bytes_s or DOWN_BYTES_S for link in links)
    # Of an even number the faster of the two: with one good and one bad link, the bad one is broken.
    median = speeds[len(speeds) // 2]
    broken = [
        link
        for link in links
        if link.state not in USABLE or (link.planned_bytes_s or DOWN_BYTES_S) < BROKEN_SHARE * median
    ]
    healthy = sorted(link.planned_bytes_s or DOWN_BYTES_S for link in links if link not in broken)
    healthy_bytes_s = healthy[len(healthy) // 2] if healthy else median
    return Links(speeds[0], healthy_bytes_s, tuple(sorted(broken, key=lambda link: (link.begin, link.end))))


def _link(item: Any, number: int) -> tuple[Link, bool, str]:
    if not isinstance(item, Mapping):
        raise BadArgument(f"link {number}: an object is expected, not {item!r:.40}")
    for name in ("from", "to"):
        if not isinstance(item.get(name), str) or not item[name]:
            raise BadArgument(f"link {number}: {name!r} must name one end")
    state = item.get("state", "up")
    if state not in (*USABLE, "down", "probing"):
        raise BadArgument(f"link {number}: state {state!r} is not one of up, degraded, down, probing")
    speed = item.get("bytes_per_s")
    if speed is not None and (isinstance(speed, bool) or not isinstance(speed, int | float) or not 0 < speed < 1e15):
        raise BadArgument(f"link {number}: bytes_per_s is {speed!r}: a number above zero is needed")
    link = Link(item["from"], item["to"], state, None if speed is None else float(speed))
    return link, bool(item.get("active", False)), str(item.get("kind", ""))


# ---------------------------------------------------------------- instances


def hardware_of_instances(
    instances: Sequence[Mapping[str, Any]], base: Hardware, links: Links | None, pool_bytes: int = 0
) -> Hardware:
    """The instances of a cluster as one kind of hardware: what schedulers fitted, medians over the living ones.

    Args:
        instances: as `kvctl workers --json` prints them.
        base: for what nobody says, above all how fast memory and SSDs of nodes are.
        pool_bytes: memory and SSDs of all nodes; 0 = unknown.
    Raises: BadArgument if nobody is alive, or instances of several kinds are.
    """
    alive = [i for i in instances if i.get("state") in ("alive", "draining")]
    if not alive:
        raise BadArgument("no instance is alive", hint="--hardware describes one that is to be")
    infos = [i["info"] for i in alive]
    kinds = sorted({(info.get("model", ""), info.get("gpu", ""), info.get("tp", 0) or 1) for info in infos})
    if len(kinds) > 1:
        shown = "; ".join(f"{model} on {gpu or 'unnamed GPUs'}, TP{tp}" for model, gpu, tp in kinds)
        raise BadArgument(f"instances of several kinds: {shown}", hint="--hardware describes one of them")
    groups = infos[0]["namespace"]["groups"]
    per_block = sum(group["block_bytes"] * max(group.get("shard_count", 1), 1) for group in groups)
    hosts = {info.get("host_id", "") for info in infos}
    gpus = kinds[0][2]
    fitted = {
        "prefill_token_us": "prefill_per_token_us",
        "prefill_pair_us": "prefill_attention_us",
        "step_us": "decode_base_us",
        "decode_sequence_us": "decode_per_sequence_us",
        "decode_token_us": "decode_per_kv_token_us",
    }
    values: dict[str, Any] = {name: _median([i.get(field, 0.0) for i in alive]) for name, field in fitted.items()}
    values["step_us"] = max(values["step_us"], 1.0)
    values["prefill_token_us"] = max(values["prefill_token_us"], 1e-3)
    price = _median([info.get("price_per_hour", 0.0) for info in infos])
    if price:
        values["price_gpu_hour"] = price / gpus
    if pool_bytes:
        values |= {"dram_bytes": pool_bytes // max(len(hosts), 1), "ssd_bytes": 0}
    if links is not None:
        values["nic_bytes_s"] = values["pull_bytes_s"] = links.healthy_bytes_s
    return replace(
        base,
        name="this cluster",
        gpu=kinds[0][1] or "GPU",
        gpus_per_instance=gpus,
        instances_per_node=max(len(alive) // max(len(hosts), 1), 1),
        kv_token_bytes=max(per_block // max(groups[0]["block_tokens"], 1), 1),
        kv_tokens=int(_median([info["kv_tokens_total"] for info in infos])),
        context_tokens_max=int(_median([info["context_tokens_max"] for info in infos])),
        batch_max=int(_median([info["batch_max"] for info in infos])),
        chunk_tokens=int(_median([info.get("chunk_tokens", 0) for info in infos])),
        prefill_chunk_tokens=int(_median([info.get("chunk_tokens", 0) for info in infos])),
        sources={**base.sources, **dict.fromkeys(fitted, "fitted by the scheduler of this cluster")},
        **values,
    )


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]
