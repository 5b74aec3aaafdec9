"""Our store takes the arguments that Mooncake's own takes: names, order and defaults of each call that we have.

`mooncake_calls.json` was read off the docstrings of mooncake-transfer-engine-non-cuda 0.3.13.post1: of each call its
parameters and their defaults, as its binding prints them.
"""

from __future__ import annotations

import ast
import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from engines.mooncake.configuration import DEFAULT_CONFIG
from engines.mooncake.store import MooncakeDistributedStore

CALLS: dict[str, list[list[str | None]]] = json.loads(
    Path(__file__).with_name("mooncake_calls.json").read_text()
)["MooncakeDistributedStore"]  # fmt: skip

#: What docs/migrating-from-mooncake.md says is not there.
LEFT_OUT = {
    "allocate_and_mount_segment", "mount_segment", "unmount_and_free_segment", "unmount_local_disk_segment",
    "unmount_segment", "create_copy_task", "create_move_task", "query_task", "batch_replica_clear",
    "get_offload_rpc_read_count", "init_all", "load_tensor_from_safetensor", "save_tensor_to_safetensor",
    *(name for name in CALLS if "parallelism" in name or name.endswith("_cuda")),
}  # fmt: skip
HERE = sorted(set(CALLS) - LEFT_OUT)


def default_of(text: str | None) -> Any:
    if text is None:
        return inspect.Parameter.empty
    return DEFAULT_CONFIG if text == "ReplicateConfig()" else ast.literal_eval(text)


@pytest.mark.parametrize("name", HERE)
def test_a_call_takes_the_same_arguments(name: str) -> None:
    ours = getattr(MooncakeDistributedStore, "_setup" if name == "setup" else name)
    mine = [p for p in list(inspect.signature(ours).parameters.values())[1:] if p.kind is not p.VAR_POSITIONAL]
    theirs = [(text, default) for text, default in CALLS[name] if not str(text).startswith("*")]
    assert len(mine) == len(theirs)
    for parameter, (text, default) in zip(mine, theirs, strict=True):
        assert parameter.default == default_of(default), parameter
        if not str(text).startswith("arg"):  # a parameter without a name
            assert parameter.name == text


def test_what_is_left_out_is_not_there() -> None:
    assert [name for name in LEFT_OUT if hasattr(MooncakeDistributedStore, name)] == []
