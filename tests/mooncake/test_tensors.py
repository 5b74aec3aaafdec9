"""Tensors: the layout of what is stored, which is Mooncake's own, and what comes back."""

from __future__ import annotations

import numpy as np
import pytest

from engines.mooncake.codes import Code
from engines.mooncake.memory import memory_at
from engines.mooncake.tensors import DTYPES, HEADER_BYTES, Shard, TensorHeader, shards_of, tensor_of
from tests.mooncake.stores import At, Ours, Theirs, mooncake_folder, running_mooncake

torch = pytest.importorskip("torch")


def made(dtype: str, *shape: int) -> torch.Tensor:
    count = int(np.prod(shape, dtype=np.int64))
    return torch.arange(count).reshape(shape).to(getattr(torch, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_of_every_dtype_come_back(ours: Ours, dtype: str) -> None:
    tensor = made(dtype, 2, 3, 5)
    assert ours.store.put_tensor("t", tensor) == 0
    back = ours.store.get_tensor("t")
    assert back is not None and back.dtype == tensor.dtype and back.shape == tensor.shape
    assert torch.equal(back.view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (7,), (1, 2, 1, 1, 3, 1, 1, 2)])
def test_tensors_of_any_shape_come_back(ours: Ours, shape: tuple[int, ...]) -> None:
    tensor = made("float32", *shape)
    assert ours.store.put_tensor("t", tensor) == 0
    back = ours.store.get_tensor("t")
    assert back is not None and torch.equal(back, tensor)


def test_a_tensor_that_is_not_contiguous_is_stored_in_the_order_of_its_elements(ours: Ours) -> None:
    tensor = made("bfloat16", 6, 4)
    assert ours.store.put_tensor("t", tensor.t()) == 0
    back = ours.store.get_tensor("t")
    assert back is not None and torch.equal(back, tensor.t())


def test_what_is_no_tensor_is_refused(ours: Ours) -> None:
    store = ours.store
    assert store.batch_put_tensor(["a", "b", "c", "d"], [made("int8", 4), 5, made("complex64", 2), None]) == [
        0, Code.INVALID_PARAMS, Code.INVALID_PARAMS, Code.INVALID_PARAMS,
    ]  # fmt: skip
    assert store.put_tensor("e", torch.zeros([1] * 9)) == Code.INVALID_PARAMS
    assert store.batch_put_tensor(["a"], []) == [Code.INVALID_PARAMS]
    assert store.put("raw", b"x" * 1000) == 0
    assert store.batch_get_tensor(["raw", "none", "b"]) == [None, None, None]


def test_a_description_that_lies_is_no_tensor() -> None:
    header = TensorHeader(0, (2, 3), (2, 3), 24)
    good = np.frombuffer(header.encode() + bytes(24), dtype=np.uint8)
    assert tensor_of(good) is not None and tensor_of(good[:-1]) is None
    for wrong in (
        TensorHeader(0, (2, 4), (2, 4), 24), TensorHeader(len(DTYPES), (2, 3), (2, 3), 24),
        TensorHeader(0, (2, -3), (2, 3), 24), TensorHeader(0, (1 << 62, 4), (1, 1), 24),
    ):  # fmt: skip
        assert tensor_of(np.frombuffer(wrong.encode() + bytes(24), dtype=np.uint8)) is None


def test_parts_for_ranks(ours: Ours) -> None:
    store, tensor = ours.store, made("float32", 4, 6)
    assert store.put_tensor_with_tp("t", tensor, 0, 2, 1) == 0
    assert store.batch_is_exist(["t", "t_tp_0", "t_tp_1"]) == [0, 1, 1]
    parts = [store.get_tensor_with_tp("t", rank, 2) for rank in (0, 1)]
    assert torch.equal(torch.cat([part for part in parts if part is not None], 1), tensor)
    for size, dim in ((5, 1), (2, 2), (2, -1)):
        assert store.put_tensor_with_tp("u", tensor, 0, size, dim) == Code.INVALID_PARAMS
    assert store.put_tensor_with_tp("u", tensor) == 0 and store.is_exist("u") == 1
    assert shards_of(tensor, 3, 1) is not None


def test_tensors_in_registered_memory(ours: Ours) -> None:
    store, tensor = ours.store, made("bfloat16", 3, 5)
    assert store.put_tensor("t", tensor) == 0
    into = ours.call("batch_get_tensor_into", ["t", "none"], [At(1000), At(5000)], [4000, 4000])
    assert torch.equal(into[0], tensor) and into[1] is None
    memory = memory_at(into[0].data_ptr(), 30)
    memory[:] = 0
    assert not into[0].any()  # it lies in the caller's memory
    into[0].copy_(tensor)
    size = HEADER_BYTES + 30
    assert ours.call("batch_put_tensor_from", ["u", "v", "w"], [At(1000), At(1000), At(0)], [size, size + 1, size]) == [
        0, Code.INVALID_PARAMS, Code.INVALID_PARAMS,
    ]  # fmt: skip
    back = store.get_tensor("u")
    assert back is not None and torch.equal(back, tensor)
    assert ours.call("put_tensor_with_tp_from", "x", At(1000), size, 0, 3, 0) == 0
    part = store.get_tensor_with_tp("x", 2, 3)
    assert part is not None and torch.equal(part, tensor[2:])


def test_an_upsert_replaces_a_tensor(ours: Ours) -> None:
    assert ours.store.put_tensor("t", made("int32", 3)) == 0
    assert ours.store.upsert_tensor("t", made("int64", 2)) == 0
    back = ours.store.get_tensor("t")
    assert back is not None and torch.equal(back, made("int64", 2))


def test_a_header_survives_its_own_layout() -> None:
    header = TensorHeader(12, (3, 2), (3, 4), 12, Shard(1, 2, 1))
    assert TensorHeader.decode(header.encode()) == header and len(header.encode()) == HEADER_BYTES == 304


@pytest.mark.skipif(not mooncake_folder(), reason="no Mooncake to compare with: set MOONCAKE_FOLDER")
def test_the_stored_bytes_are_those_that_mooncake_stores(ours: Ours, tmp_path_factory: pytest.TempPathFactory) -> None:
    tensors = [made(dtype, 4, 6, 2) for dtype in DTYPES] + [made("float32", 2, 1, 3, 1, 1, 1), made("int8", 5)]
    with running_mooncake(mooncake_folder(), tmp_path_factory.mktemp("mooncake")) as theirs:
        for number, tensor in enumerate(tensors):
            same_bytes(ours, theirs, f"t{number}", "put_tensor", tensor)
        for ranks, dim in ((2, 0), (4, 0), (3, 1), (2, 2)):
            name = f"s{ranks}{dim}"
            for store in (ours, theirs):
                assert store.call("put_tensor_with_tp", name, tensors[0], 0, ranks, dim) == 0
            for rank in range(ranks):
                key = f"{name}_tp_{rank}"
                assert ours.call("get", key) == theirs.call("get", key), key


def same_bytes(ours: Ours, theirs: Theirs, key: str, call: str, tensor: torch.Tensor) -> None:
    assert ours.call(call, key, tensor) == theirs.call(call, key, tensor) == 0
    assert ours.call("get", key) == theirs.call("get", key), (key, tensor.dtype, tensor.shape)
