"""Each RPC of a source, fed with garbage: a clear status, and nothing held afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import grpc
import pytest

from kvpool.client import PoolClient
from kvpool.core.errors import KvpoolError, Reason
from kvpool.service.rpc import MESSAGE_BYTES_MAX, from_rpc_error, make_channel
from kvpool.service.wire import KEYS_MAX, namespace_to_proto
from kvpool.v1 import block_source_pb2 as pb
from kvpool.v1 import block_source_pb2_grpc, common_pb2
from tests.pool.node_process import NodeProcess, eventually, held, namespace_spec

Code = grpc.StatusCode
NS = namespace_spec().id()
KEYS = common_pb2.KeyList(keys=bytes(range(32)))
ODD = common_pb2.KeyList(keys=bytes(17))
NO_GROUP = common_pb2.KeyList(group=7, keys=bytes(16))
NO_SHARD = common_pb2.KeyList(shard=0xFFFFFFFF, keys=bytes(16))
MANY = common_pb2.KeyList(keys=bytes(16 * (KEYS_MAX + 1)))
NEGATIVE = 0xFFFFFFFF  # what -1 becomes in an unsigned field
S = 1  # replaced by the live session
NO_S = 0xFFFFFFFFFFFFFFFF


def spec(**changes: object) -> common_pb2.NamespaceSpec:
    made = namespace_to_proto(namespace_spec())
    for name, value in changes.items():
        target = made.groups[0] if hasattr(made.groups[0], name) else made
        setattr(target, name, value)
    return made


def keyed(request: type, reason: Reason | None = None, **fields: object) -> list[tuple[object, Reason]]:
    """Requests of a call that takes a namespace and keys, each wrong in one way."""
    wrong = [
        ({"keys": ODD}, Reason.BAD_KEY_LENGTH),
        ({"keys": NO_GROUP}, Reason.BAD_ARGUMENT),
        ({"keys": NO_SHARD}, Reason.BAD_ARGUMENT),
        ({"keys": MANY}, Reason.BAD_ARGUMENT),
        ({"namespace_id": b"x" * 16}, Reason.UNKNOWN_NAMESPACE),
        ({"namespace_id": b""}, Reason.UNKNOWN_NAMESPACE),
        ({"namespace_id": bytes(1000)}, Reason.UNKNOWN_NAMESPACE),
    ]
    for name in ("session_id",) if "session_id" in fields else ():
        wrong += [({name: NO_S}, Reason.UNKNOWN_SESSION), ({name: 0}, Reason.UNKNOWN_SESSION)]
    for name in [f for f in fields if f.endswith("_ms")]:
        wrong += [({name: NEGATIVE}, Reason.BAD_ARGUMENT), ({name: 600_001}, Reason.BAD_ARGUMENT)]
        if request is not pb.PinRequest:
            wrong.append(({name: 0}, Reason.BAD_ARGUMENT))
    good = {"namespace_id": NS, "keys": KEYS, **fields}
    return [(request(**{**good, **one}), reason or why) for one, why in wrong]


def hold(**fields: object) -> pb.ReserveRequest:
    return pb.ReserveRequest(
        session_id=S, namespace_id=NS, keys=KEYS, ttl_ms=1000, hold=common_pb2.HandoffHold(**fields)
    )


TABLE: dict[str, list[tuple[object, Reason]]] = {
    "RegisterNamespace": [
        (pb.RegisterNamespaceRequest(), Reason.BAD_ARGUMENT),
        *[
            (pb.RegisterNamespaceRequest(namespace=spec(**wrong)), Reason.BAD_ARGUMENT)
            for wrong in (
                {"model": ""}, {"hash": "md5"}, {"block_bytes": 0}, {"block_bytes": 1 << 63}, {"kind": 9},
                {"block_tokens": NEGATIVE}, {"section_count": 3}, {"section_count": 0}, {"shard_count": 0}, {"id": 1},
                {"window_tokens": 5},
            )
        ],
    ],
    "OpenChannel": [(pb.OpenChannelRequest(session_id=NO_S), Reason.UNKNOWN_SESSION)],
    "Reserve": [
        *keyed(pb.ReserveRequest, session_id=S, ttl_ms=1000),
        (hold(request_id="", ttl_ms=1), Reason.BAD_ARGUMENT),
        (hold(request_id="r", ttl_ms=0), Reason.BAD_ARGUMENT),
        (hold(request_id="r", ttl_ms=NEGATIVE), Reason.BAD_ARGUMENT),
        (hold(request_id="r" * 10_000, ttl_ms=1), Reason.BAD_ARGUMENT),
        (
            pb.ReserveRequest(session_id=S, namespace_id=NS, keys=KEYS, ttl_ms=1, fidelity=2),  # type: ignore[arg-type]
            Reason.UNSUPPORTED,
        ),
        (
            pb.ReserveRequest(session_id=S, namespace_id=NS, keys=KEYS, ttl_ms=1, fidelity=77),  # type: ignore[arg-type]
            Reason.BAD_ARGUMENT,
        ),
    ],
    "Commit": [
        (pb.CommitRequest(session_id=NO_S), Reason.UNKNOWN_SESSION),
        (pb.CommitRequest(session_id=S, reservation_id=77), Reason.UNKNOWN_RESERVATION),
        (pb.CommitRequest(session_id=S, reservation_id=NO_S), Reason.UNKNOWN_RESERVATION),
        (pb.CommitRequest(session_id=S, reservation_id=1, indices=[1]), Reason.BAD_ARGUMENT),
        (pb.CommitRequest(session_id=S, indices=[1], sections=[1, 2], digests=[1]), Reason.BAD_ARGUMENT),
    ],
    "Abort": [
        (pb.AbortRequest(session_id=NO_S), Reason.UNKNOWN_SESSION),
        (pb.AbortRequest(session_id=S, reservation_id=77), Reason.UNKNOWN_RESERVATION),
    ],
    "Lease": [
        *keyed(pb.LeaseRequest, session_id=S, ttl_ms=1000),
        (
            pb.LeaseRequest(session_id=S, namespace_id=NS, keys=KEYS, ttl_ms=1, handoff_request_id="r" * 10_000),
            Reason.BAD_ARGUMENT,
        ),
    ],
    "Release": [
        (pb.ReleaseRequest(session_id=NO_S), Reason.UNKNOWN_SESSION),
        (pb.ReleaseRequest(session_id=S, lease_ids=[77]), Reason.UNKNOWN_LEASE),
        (pb.ReleaseRequest(session_id=S, lease_ids=[NO_S]), Reason.UNKNOWN_LEASE),
        (pb.ReleaseRequest(session_id=S, corrupt=ODD), Reason.BAD_KEY_LENGTH),
        (pb.ReleaseRequest(session_id=S, corrupt=KEYS), Reason.UNKNOWN_NAMESPACE),
    ],
    "Pin": keyed(pb.PinRequest, session_id=S, ttl_ms=1000),
    "Unpin": [
        (pb.UnpinRequest(session_id=NO_S), Reason.UNKNOWN_SESSION),
        (pb.UnpinRequest(session_id=S, pin_id=77), Reason.UNKNOWN_LEASE),
    ],
    "Await": keyed(pb.AwaitRequest, session_id=S, deadline_ms=1000),
    "Lookup": keyed(pb.LookupRequest),
    "Remove": [
        *keyed(pb.RemoveRequest),
        (pb.RemoveRequest(namespace_id=NS, keys=KEYS, digests=[1, 2, 3]), Reason.BAD_ARGUMENT),
        (pb.RemoveRequest(namespace_id=NS, all=True, digests=[1]), Reason.BAD_ARGUMENT),
    ],
    "ListBlocks": [
        (pb.ListBlocksRequest(limit=10_001), Reason.BAD_ARGUMENT),
        (pb.ListBlocksRequest(limit=NEGATIVE), Reason.BAD_ARGUMENT),
        (pb.ListBlocksRequest(cursor=NO_S), Reason.BAD_ARGUMENT),
    ],
}  # fmt: skip
CASES = [(name, i) for name, rows in TABLE.items() for i in range(len(rows))]


@pytest.fixture(scope="module")
def client(shared_node: NodeProcess) -> Iterator[PoolClient]:
    with PoolClient(shared_node.address, client="garbage", timeout_s=30.0) as made:
        made.register(namespace_spec())
        yield made


@pytest.fixture(scope="module")
def stub(shared_node: NodeProcess) -> Iterator[block_source_pb2_grpc.BlockSourceStub]:
    with make_channel(shared_node.address) as channel:
        yield block_source_pb2_grpc.BlockSourceStub(channel)


def answer(call: Callable[..., object], request: object) -> KvpoolError:
    """The error that a call ends with."""
    with pytest.raises(grpc.RpcError) as raised:
        result = call(request, timeout=60)
        if hasattr(result, "__next__"):
            list(result)  # type: ignore[call-overload]
    assert raised.value.code() in (
        Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.RESOURCE_EXHAUSTED, Code.UNIMPLEMENTED,
    )  # fmt: skip
    return from_rpc_error(raised.value)


@pytest.mark.parametrize(("name", "row"), CASES)
def test_garbage(client: PoolClient, stub: block_source_pb2_grpc.BlockSourceStub, name: str, row: int) -> None:
    template, reason = TABLE[name][row]
    request = type(template)()
    request.CopyFrom(template)  # type: ignore[attr-defined]
    if getattr(request, "session_id", None) == S:
        request.session_id = client._session().id  # type: ignore[attr-defined]
    error = answer(getattr(stub, name), request)
    assert error.reason is reason, error
    assert str(error)
    assert held(client.stats()) == {"sessions": 1}


def test_every_call_is_in_the_table() -> None:
    calls = {m.name for m in pb.DESCRIPTOR.services_by_name["BlockSource"].methods}
    streams = {"OpenSession"}
    assert calls - streams - {"GetSourceInfo", "GetSourceStats"} == set(TABLE)


@pytest.mark.parametrize(
    "messages",
    [[], [pb.SessionPing()], [pb.SessionPing(hello=pb.SessionPing.Hello(client="x" * 1000))]],
)
def test_sessions_begin_with_hello(
    client: PoolClient, stub: block_source_pb2_grpc.BlockSourceStub, messages: list[pb.SessionPing]
) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        list(stub.OpenSession(iter(messages), timeout=60))
    assert raised.value.code() is Code.INVALID_ARGUMENT
    assert held(client.stats()) == {"sessions": 1}


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "relative", "/dev/shm/kvpool-writer-none", "/" + "x" * 5000, "/dev/zero"]
)
def test_a_bad_writer_lock_only_costs_shm_writes(
    client: PoolClient, stub: block_source_pb2_grpc.BlockSourceStub, path: str
) -> None:
    hello = pb.SessionPing.Hello(client="odd", host_id=client.info().host_id, writer_lock=path)
    call = stub.OpenSession(iter([pb.SessionPing(hello=hello)]), timeout=60)
    session = next(call).session_id
    request = pb.OpenChannelRequest(session_id=session, host_id=client.info().host_id, channels=["shm", "pigeon"])
    try:
        offers = stub.OpenChannel(request, timeout=60).offers
        assert [(o.kind, o.parameters["writable"]) for o in offers] == [("shm", "0")]
    except grpc.RpcError as error:  # the stream of one message may have ended already
        assert error.code() is Code.NOT_FOUND
    call.cancel()
    assert eventually(lambda: held(client.stats()) == {"sessions": 1})


def test_a_request_of_100_mb(client: PoolClient, shared_node: NodeProcess) -> None:
    size = 100 << 20
    with grpc.insecure_channel(shared_node.address, options=[("grpc.max_send_message_length", 2 * size)]) as channel:
        call = channel.unary_unary("/kvpool.v1.BlockSource/Lookup")
        with pytest.raises(grpc.RpcError) as raised:
            call(bytes(size), timeout=100, metadata=[("kvpool-protocol", "1")])
    assert size > MESSAGE_BYTES_MAX and raised.value.code() is Code.RESOURCE_EXHAUSTED
    assert held(client.stats()) == {"sessions": 1}


def test_bytes_that_are_no_message(client: PoolClient, shared_node: NodeProcess) -> None:
    with grpc.insecure_channel(shared_node.address) as channel:
        call = channel.unary_unary("/kvpool.v1.BlockSource/Reserve")
        with pytest.raises(grpc.RpcError):
            call(b"\xff" * 100, timeout=60)
    assert held(client.stats()) == {"sessions": 1}


def test_another_protocol(shared_node: NodeProcess) -> None:
    with grpc.insecure_channel(shared_node.address) as channel:
        stub = block_source_pb2_grpc.BlockSourceStub(channel)
        with pytest.raises(grpc.RpcError) as raised:
            stub.GetSourceInfo(pb.GetSourceInfoRequest(), timeout=60, metadata=[("kvpool-protocol", "99")])
    assert raised.value.code() is Code.FAILED_PRECONDITION
    assert from_rpc_error(raised.value).reason is Reason.PROTOCOL_MISMATCH
