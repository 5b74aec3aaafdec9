"""The core's state as plain data and back, so that a journal file can begin in the middle of a run. Pure.

The ledger is left out: nothing is decided by it.
"""

from __future__ import annotations

from typing import Any

from kvpool.core.ids import Fidelity, pack_keys
from scheduler.core.core import SchedulerCore
from scheduler.core.membership import source_record

#: Attributes of the core that decisions depend on, besides the directory.
_ATTRIBUTES = (
    "cluster", "costs", "book", "expiries", "room", "pending", "promises", "arrivals", "calibrations", "corrections",
    "roles", "policies", "outputs", "counts", "now_us",
)  # fmt: skip


def unsynced_streams(core: SchedulerCore) -> list[int]:
    """Life lines of sources whose snapshot is still to come: a checkpoint can't hold what they are half through."""
    return [s.attached.stream for s in core.cluster.sources.values() if s.awaits_snapshot]


def state_of(core: SchedulerCore) -> dict[str, Any]:
    """Everything that decisions depend on, with no source half through a snapshot. Shares its parts with the core."""
    assert not unsynced_streams(core)
    state: dict[str, Any] = {"config": core.config}
    for name in _ATTRIBUTES:
        state[name] = getattr(core, name)
    state["directory"] = tuple(_source_state(core, source_id) for source_id in sorted(core.cluster.sources))
    return state


def _source_state(core: SchedulerCore, source_id: str) -> tuple[str, int, tuple[tuple[Fidelity, bytes], ...]]:
    """Source, last batch applied, and its keys by fidelity."""
    keys, fidelities = core.directory.held(source_id)
    parts = tuple((f, pack_keys(keys[fidelities == f])) for f in Fidelity if (fidelities == f).any())
    return source_id, core.directory.synced(source_id)[0], parts


def core_of(state: dict[str, Any]) -> SchedulerCore:
    """A core that goes on where the state was taken. Takes the state's parts over."""
    core = SchedulerCore(state["config"])
    for name in _ATTRIBUTES:
        if name in state:  # checkpoints of older versions lack what they did not know
            setattr(core, name, state[name])
    for source_id, seq, parts in state["directory"]:
        attached = core.cluster.sources[source_id].attached
        core.directory.attach(source_record(attached), core.now_us)
        for number, (fidelity, keys) in enumerate(parts or ((Fidelity.EXACT, b""),)):
            last = number + 1 >= len(parts)
            core.directory.apply_snapshot_part(
                source_id, attached.epoch, seq, number, last, keys, fidelity, core.now_us
            )
    return core
