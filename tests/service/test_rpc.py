"""The gRPC shell: credentials, protocol versions, deadlines and typed errors, on a real server."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kvpool.core.errors import (
    BadKeyLength,
    DeadlineExceeded,
    KvpoolError,
    Overloaded,
    ProtocolMismatch,
    Reason,
    Unauthenticated,
    Unavailable,
    UnknownSession,
    Unsupported,
)
from kvpool.service import rpc
from kvpool.v1 import common_pb2, directory_pb2, directory_pb2_grpc
from tests.pool.node_process import eventually

CREDENTIAL = "secret"


class Servicer(directory_pb2_grpc.DirectoryServicer):
    """Fails in the way that the number of key lists asks for."""

    async def Match(self, request: directory_pb2.MatchRequest, context: object) -> directory_pb2.MatchReply:
        if len(request.keys) == 1:
            raise BadKeyLength("15 bytes", hint="16 they must be")
        if len(request.keys) == 2:
            raise ValueError("a bug of ours")
        if len(request.keys) == 3:
            await asyncio.Event().wait()
        return directory_pb2.MatchReply(covered=7)

    async def Attach(
        self, requests: AsyncIterator[directory_pb2.SourceMessage], context: object
    ) -> AsyncIterator[directory_pb2.DirectoryMessage]:
        async for message in requests:
            if message.events.seq == 3:
                raise UnknownSession("gone")
            yield directory_pb2.DirectoryMessage(acknowledged_seq=message.events.seq)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving() as address:
        yield address


@contextmanager
def serving(**options: int) -> Iterator[str]:
    async def run(started: asyncio.Future[str], stop: asyncio.Event) -> None:
        def register(server: grpc.aio.Server) -> list[str]:
            directory_pb2_grpc.add_DirectoryServicer_to_server(Servicer(), server)
            return ["kvpool.v1.Directory"]

        server, port = await rpc.serve("127.0.0.1:0", register, credential=CREDENTIAL, **options)
        started.set_result(f"127.0.0.1:{port}")
        await stop.wait()
        await server.stop(0)

    loop = asyncio.new_event_loop()
    started: asyncio.Future[str] = loop.create_future()
    stop = asyncio.Event()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(loop.run_until_complete, run(started, stop))
        while not started.done():
            assert not running.done(), running.result()
        try:
            yield started.result()
        finally:
            loop.call_soon_threadsafe(stop.set)
            running.result(timeout=60)


def ask(address: str, lists: int = 0, *, credential: str = CREDENTIAL, timeout: float = 60.0, **keys: bytes) -> int:
    with rpc.make_channel(address, credential=credential) as channel:
        stub = directory_pb2_grpc.DirectoryStub(channel)
        request = directory_pb2.MatchRequest(keys=[common_pb2.KeyList(**keys)] * lists)
        try:
            return stub.Match(request, timeout=timeout).covered
        except grpc.RpcError as error:
            raise rpc.from_rpc_error(error, address) from error


def test_a_good_call(address: str) -> None:
    assert ask(address) == 7


def test_typed_errors_keep_reason_and_hint(address: str) -> None:
    with pytest.raises(BadKeyLength, match="15 bytes") as caught:
        ask(address, 1)
    assert caught.value.hint == "16 they must be" and caught.value.reason is Reason.BAD_KEY_LENGTH


def test_a_bug_is_internal_and_named(address: str) -> None:
    with pytest.raises(KvpoolError, match=r"INTERNAL.*a bug of ours"):
        ask(address, 2)


def test_the_callers_deadline_ends_the_call(address: str) -> None:
    with pytest.raises(DeadlineExceeded):
        ask(address, 3, timeout=0.2)


@pytest.mark.parametrize("credential", ["", "wrong"])
def test_without_the_credential_nothing_is_served(address: str, credential: str) -> None:
    with pytest.raises(Unauthenticated):
        ask(address, credential=credential)


def test_another_protocol_is_refused_with_both_versions(address: str) -> None:
    metadata = (("kvpool-protocol", "2"), ("authorization", f"Bearer {CREDENTIAL}"))
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
        directory_pb2_grpc.DirectoryStub(channel).Match(directory_pb2.MatchRequest(), metadata=metadata, timeout=60)
    error = rpc.from_rpc_error(caught.value)
    assert isinstance(error, ProtocolMismatch)
    assert "protocol 1" in str(error) and "speaks 2" in str(error) and error.hint


def test_a_huge_request_is_refused(address: str) -> None:
    with pytest.raises(Overloaded):
        ask(address, 1, keys=bytes(100 << 20))


def test_an_unserved_call_says_so(address: str) -> None:
    with rpc.make_channel(address, credential=CREDENTIAL) as channel, pytest.raises(grpc.RpcError) as caught:
        directory_pb2_grpc.DirectoryStub(channel).ListSources(directory_pb2.ListSourcesRequest())
    assert isinstance(rpc.from_rpc_error(caught.value), Unsupported)


def test_nobody_there(address: str) -> None:
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1") as caught:
        ask("127.0.0.1:1")
    assert "running" in caught.value.hint


def test_a_stream_ends_with_its_error(address: str) -> None:
    def messages() -> Iterator[directory_pb2.SourceMessage]:
        for seq in (1, 2, 3):
            yield directory_pb2.SourceMessage(events=directory_pb2.EventBatch(seq=seq))

    seen = []
    with rpc.make_channel(address, credential=CREDENTIAL) as channel, pytest.raises(grpc.RpcError) as caught:
        for reply in directory_pb2_grpc.DirectoryStub(channel).Attach(messages(), timeout=60):
            seen.append(reply.acknowledged_seq)  # noqa: PERF401 - what came before the error counts
    assert seen == [1, 2]
    assert isinstance(rpc.from_rpc_error(caught.value), UnknownSession)


def test_a_taken_port_is_named(address: str) -> None:
    with pytest.raises(Unavailable, match="can't listen"):
        asyncio.run(rpc.serve(address, lambda server: []))


def test_calls_at_a_time_are_bounded() -> None:
    """Streams count too; what is beyond is refused at once, and served again when one has ended."""
    with serving(rpcs_max=2) as address, rpc.make_channel(address, credential=CREDENTIAL) as channel:
        stub = directory_pb2_grpc.DirectoryStub(channel)
        ended = [threading.Event(), threading.Event()]

        def messages(end: threading.Event) -> Iterator[directory_pb2.SourceMessage]:
            yield directory_pb2.SourceMessage()
            end.wait(100)

        streams = [stub.Attach(messages(end)) for end in ended]
        for stream in streams:
            next(stream)
        with pytest.raises(Overloaded) as refused:
            ask(address)
        assert "at a time" in refused.value.hint

        def served() -> bool:
            try:
                return ask(address) == 7
            except Overloaded:
                return False

        ended[0].set()
        assert not list(streams[0])
        # The server has its place back a moment after the client has the end.
        assert eventually(served)
        ended[1].set()
        assert not list(streams[1])


def test_streams_of_health_and_reflection_need_the_credential() -> None:
    """They stay and count among the calls at a time: whoever has no credential could use all of them up."""
    watched = health_pb2.HealthCheckRequest()
    with serving() as address:
        with rpc.make_channel(address, credential="wrong") as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            reflected = reflection_pb2_grpc.ServerReflectionStub(channel)
            for stream in (
                stub.Watch(watched, timeout=60),
                reflected.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest()]), timeout=60),
            ):
                with pytest.raises(grpc.RpcError) as refused:
                    next(stream)
                assert isinstance(rpc.from_rpc_error(refused.value), Unauthenticated)
            assert stub.Check(watched, timeout=60).status == health_pb2.HealthCheckResponse.SERVING, "a probe may ask"
        with rpc.make_channel(address, credential=CREDENTIAL) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(watched, timeout=60)
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            listing = reflection_pb2.ServerReflectionRequest(list_services="")
            reply = next(reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([listing])))
            assert "kvpool.v1.Directory" in {service.name for service in reply.list_services_response.service}
            watch.cancel()


def test_a_busy_peer_has_time_to_answer_the_first_time() -> None:
    """Connecting is more than a packet: a loaded machine, or TLS over a long way, takes a while for it."""
    with serving() as address, slow_to_begin(address, 0.5) as relay:

        def answered() -> bool:
            try:
                return ask(relay) == 7
            except Unavailable:
                return False

        # More than once, should this machine be slower than that: with less time to connect it would never do.
        assert eventually(answered)


@contextmanager
def slow_to_begin(address: str, delay_s: float) -> Iterator[str]:
    """Passes each connection on, after a while."""
    host, _, port = address.rpartition(":")
    with ExitStack() as stack:
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

        def serve() -> None:
            with suppress(OSError):
                while True:
                    near, _ = listening.accept()
                    stack.callback(near.close)
                    threading.Event().wait(delay_s)
                    far = socket.create_connection((host, int(port)))
                    stack.callback(far.close)
                    for source, sink in ((near, far), (far, near)):
                        threading.Thread(target=passed_on, args=(source, sink), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        # Closing alone does not end a call of `accept`.
        stack.callback(listening.shutdown, socket.SHUT_RDWR)
        yield f"127.0.0.1:{listening.getsockname()[1]}"


def passed_on(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65_536):
            sink.sendall(data)
