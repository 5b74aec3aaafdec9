"""Who shares pages: engines that are equal in all that changes the bytes, and nobody else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.pool.node_process import NodeProcess
from tests.sglang.made_pools import hashes
from tests.sglang.real_pools import HEADS, LAYERS, TOKENS, fill, flats, mha_pool, mla_pool, places

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("sglang")]


def test_only_equal_engines_share(node: NodeProcess, backend_on: Callable[..., Any]) -> None:
    """Every pair of engines that differ in one thing: the one finds nothing of the other's."""
    made = {
        "plain": (mha_pool("page_first"), {}),
        "layout": (mha_pool("page_first_direct"), {}),
        "layer first": (mha_pool("layer_first"), {}),
        "dtype": (mha_pool("page_first", dtype=torch.float16), {}),
        "page size": (mha_pool("page_first", tokens=2 * TOKENS), {}),
        "layers": (mha_pool("page_first", layers=LAYERS + 1), {}),
        "heads": (mha_pool("page_first", heads=2 * HEADS), {}),
        "model": (mha_pool("page_first"), {"extra": {"model_id": "made-up/2"}}),
        "tag": (mha_pool("page_first"), {"extra": {"extra_backend_tag": "staging"}}),
        "tp degree": (mha_pool("page_first"), {"tp_size": 2}),
        "tp rank": (mha_pool("page_first"), {"tp_size": 2, "tp_rank": 1}),
        "pp stage": (mha_pool("page_first"), {"pp_size": 2, "pp_rank": 1}),
        "mla": (mla_pool("page_first"), {"mla": True}),
    }
    backends = {name: backend_on(node.address, pool, **others) for name, (pool, others) in made.items()}
    keys = hashes(2, "shared")
    for seed, (name, (pool, _)) in enumerate(made.items()):
        fill(pool, seed)
        assert backends[name].batch_exists(keys) == 0, f"{name} finds what others stored"
        assert backends[name].batch_set_v1(keys, places(pool, 0, 1)) == [True] * 2
    for name, (pool, _) in made.items():
        wanted = flats(pool, range(2))
        assert backends[name].batch_get_v1(keys, places(pool, 4, 5)) == [True] * 2
        assert flats(pool, range(4, 6)) == wanted, name


def test_ranks_of_mla_share_one_copy(node: NodeProcess, backend_on: Callable[..., Any]) -> None:
    pools = [mla_pool("page_first") for _ in range(2)]
    first, second = (
        backend_on(node.address, pool, mla=True, tp_rank=rank, tp_size=2) for rank, pool in enumerate(pools)
    )
    fill(pools[0], 1)
    keys = hashes(2, "mla")
    assert first.batch_set_v1(keys, places(pools[0], 0, 1)) == [True] * 2
    assert second.batch_get_v1(keys, places(pools[1], 0, 1)) == [True] * 2
    assert flats(pools[1], range(2)) == flats(pools[0], range(2))


def test_weights_that_nothing_identifies_are_refused(
    node: NodeProcess, backend_on: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name that a model is served under is no identity, nor a path that the weights do not come from."""
    from sglang.srt.runtime_context import get_context

    from kvpool.core.errors import Unsupported

    with pytest.raises(Unsupported, match="which weights") as caught:
        backend_on(node.address, mha_pool("page_first"), extra={"model_id": ""})
    assert "model_id" in caught.value.hint
    for elsewhere in ({"load_format": "remote"}, {"checkpoint_engine_wait_weights_before_ready": True}):
        arguments = SimpleNamespace(model_path="org/model", **elsewhere)
        monkeypatch.setattr(get_context(), "_server_args", arguments)
        with pytest.raises(Unsupported, match="which weights"):
            backend_on(node.address, mha_pool("page_first"), extra={"model_id": ""})


def test_a_model_is_known_by_its_files(
    node: NodeProcess, backend_on: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two fine-tunes under one served name share nothing; a copy of one of them shares all."""
    from sglang.srt.runtime_context import get_context

    folders = [tmp_path / place / "llama" for place in ("one", "other", "copy")]
    for folder, content in zip(folders, (b"one", b"two", b"one"), strict=True):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(content * 1000)
    backends = []
    for folder in folders:
        monkeypatch.setattr(get_context(), "_server_args", SimpleNamespace(model_path=str(folder)))
        backends.append(backend_on(node.address, mha_pool("page_first"), extra={"model_id": ""}))
    one, other, copy = backends
    keys = hashes(2, "files")
    assert one.batch_set_v1(keys, places(one.mem_pool_host, 0, 1)) == [True] * 2
    assert (one.batch_exists(keys), other.batch_exists(keys), copy.batch_exists(keys)) == (2, 0, 2)


def test_what_changes_kv_is_among_sglangs_arguments() -> None:
    """A name that SGLang gives up would be told apart no more."""
    from sglang.srt.arg_groups.arg_utils import namespace_of
    from sglang.srt.server_args import ServerArgs

    from engines.sglang.identity import COMPUTING, computing

    others = {"model_path", "revision", "random_seed", "lora_paths", "weight_version"}
    others.add("checkpoint_engine_wait_weights_before_ready")
    assert set(COMPUTING) | others <= set(namespace_of(ServerArgs))
    digests = {computing(SimpleNamespace(**{name: "changed"})) for name in COMPUTING}
    assert len(digests | {computing(None)}) == len(COMPUTING) + 1
    made_up = [computing(SimpleNamespace(load_format="dummy", random_seed=seed)) for seed in (1, 2)]
    assert made_up[0] != made_up[1]


def test_adapters_are_known_by_their_files(tmp_path: Path) -> None:
    """SGLang names the pages of an adapter by its path, whatever is there."""
    from sglang.srt.lora.lora_registry import LoRARef

    from engines.sglang.identity import adapters, computing

    told = []
    for content in (b"one", b"two"):
        (tmp_path / "adapter_model.safetensors").write_bytes(content)
        path = str(tmp_path)
        forms = [[f"a={path}"], {"a": path}, [{"lora_name": "a", "lora_path": path}]]
        forms.append([LoRARef(lora_name="a", lora_path=path)])
        assert len({str(adapters(form)) for form in forms}) == 1
        told.append(computing(SimpleNamespace(lora_paths=forms[0])))
    assert told[0] != told[1] and computing(None) not in told
    assert adapters(None) == {} and adapters([str(tmp_path)]).keys() == {str(tmp_path)}


def test_after_an_update_of_the_weights_nothing_is_shared_until_attached_anew(
    node: NodeProcess, backend_on: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt import runtime_context

    from engines.sglang import identity
    from kvpool.core.errors import Unsupported

    version = "default"
    monkeypatch.setattr(identity, "get_serving", lambda: SimpleNamespace(weight_version=version))
    assert identity.get_serving is not runtime_context.get_serving
    pool = mha_pool("page_first")
    before = backend_on(node.address, pool)
    keys = hashes(2, "update")
    assert before.batch_set_v1(keys, places(pool, 0, 1)) == [True] * 2
    version = "after a step of training"
    assert before.batch_exists(keys) == 0
    assert before.batch_get_v1(keys, places(pool, 2, 3)) == [False] * 2
    assert before.batch_set_v1(hashes(1, "new"), places(pool, 0)) == [False]
    assert before.get(keys[0], pool.get_dummy_flat_data_page()) is None
    attached_anew = backend_on(node.address, pool)
    assert attached_anew.batch_exists(keys) == 0
    assert attached_anew.batch_set_v1(keys, places(pool, 0, 1)) == [True] * 2
    # Without a name for them, updated weights are not those of the model's files.
    monkeypatch.setattr(identity, "get_server_args", lambda: SimpleNamespace(model_path="m", weight_version="default"))
    with pytest.raises(Unsupported, match="updated in place"):
        backend_on(node.address, pool, extra={"model_id": ""})


def test_wrong_settings_are_refused_by_name(node: NodeProcess, backend_on: Callable[..., Any]) -> None:
    from kvpool.core.errors import BadArgument

    with pytest.raises(BadArgument, match="nodes"):
        backend_on(node.address, mha_pool("page_first"), extra={"nodes": "a:1"})
