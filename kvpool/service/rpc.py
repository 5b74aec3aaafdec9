"""gRPC as kvpool uses it: servers and channels with protocol check, credentials, deadlines and typed errors.

Errors are translated here and nowhere else: a handler raises KvpoolError, the caller catches KvpoolError.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kvpool import __version__
from kvpool.channels.tls import TlsConfig
from kvpool.core.errors import (
    ERRORS,
    DeadlineExceeded,
    KvpoolError,
    Overloaded,
    ProtocolMismatch,
    Reason,
    Unauthenticated,
    Unavailable,
    Unsupported,
)
from kvpool.service.rpc_tls import channel_credentials, channel_options, server_credentials, trouble
from kvpool.v1 import common_pb2

log = logging.getLogger(__name__)

PROTOCOL = "1"
MESSAGE_BYTES_MAX = 64 << 20
#: Calls under way in one server, streams included; one more is refused with RESOURCE_EXHAUSTED.
RPCS_MAX = 8192
#: Deadline of a unary call whose caller names none.
UNARY_TIMEOUT_S = 10.0
_ERROR_KEY = "kvpool-error-bin"
#: Of an address where nothing answers.
REACH_HINT = "is it running, and is the address right?"

OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    # A restarted peer is found again within a second.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Despite its name the time that one attempt to connect has: TCP, TLS and a first answer of a busy peer.
    ("grpc.min_reconnect_backoff_ms", 2_000),
]

_STATUS: dict[Reason, grpc.StatusCode] = {
    Reason.BAD_KEY_LENGTH: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.BAD_ARGUMENT: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.CONTEXT_TOO_LONG: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.UNKNOWN_NAMESPACE: grpc.StatusCode.NOT_FOUND,
    Reason.UNKNOWN_SESSION: grpc.StatusCode.NOT_FOUND,
    Reason.UNKNOWN_RESERVATION: grpc.StatusCode.NOT_FOUND,
    Reason.UNKNOWN_LEASE: grpc.StatusCode.NOT_FOUND,
    Reason.UNKNOWN_MODEL: grpc.StatusCode.NOT_FOUND,
    Reason.UNKNOWN_REQUEST: grpc.StatusCode.NOT_FOUND,
    Reason.NAMESPACE_MISMATCH: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.RESERVATION_EXPIRED: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.ALREADY_COMMITTED: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.PROTOCOL_MISMATCH: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.NO_SPACE: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.OVERLOADED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.NO_CAPACITY: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.SLO_UNREACHABLE: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.NO_INSTANCE: grpc.StatusCode.UNAVAILABLE,
    Reason.UNAUTHENTICATED: grpc.StatusCode.UNAUTHENTICATED,
    Reason.UNSUPPORTED: grpc.StatusCode.UNIMPLEMENTED,
    Reason.DEADLINE: grpc.StatusCode.DEADLINE_EXCEEDED,
    Reason.QUOTA_EXCEEDED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.DRAINING: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.NO_SSD: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.UNREACHABLE: grpc.StatusCode.UNAVAILABLE,
}


class _PollerRace(logging.Filter):
    """Drops what asyncio logs when two event loops of one process wake for one gRPC event: the second finds nothing."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not (isinstance(error, BlockingIOError) and "PollerCompletionQueue" in record.getMessage())


logging.getLogger("asyncio").addFilter(_PollerRace())

# ---------------------------------------------------------------- errors


def to_status(error: KvpoolError) -> tuple[grpc.StatusCode, str, tuple[tuple[str, bytes], ...]]:
    """Status code, message and trailing metadata that carry `error` to the caller."""
    detail = common_pb2.ErrorDetail(reason=int(error.reason), hint=error.hint)  # type: ignore[arg-type]
    code = _STATUS.get(error.reason, grpc.StatusCode.UNKNOWN)
    return code, str(error), ((_ERROR_KEY, detail.SerializeToString()),)


def from_rpc_error(error: grpc.RpcError, address: str = "") -> KvpoolError:
    """The KvpoolError that a failed call stands for."""
    code = error.code() if hasattr(error, "code") else grpc.StatusCode.UNKNOWN
    message = (error.details() if hasattr(error, "details") else "") or str(code)
    for key, value in (error.trailing_metadata() if hasattr(error, "trailing_metadata") else None) or ():
        if key == _ERROR_KEY:
            try:
                detail = common_pb2.ErrorDetail.FromString(
                    value if isinstance(value, bytes) else value.encode("latin1")
                )
            except DecodeError:
                break
            reason = Reason(detail.reason) if detail.reason in Reason.__members__.values() else Reason.BAD_ARGUMENT
            return ERRORS.get(reason, KvpoolError)(message, hint=detail.hint, reason=reason)
    where = f" at {address}" if address else ""
    if code is grpc.StatusCode.UNAVAILABLE:
        if "failed to connect" in message and (tls := trouble(message)):
            return Unavailable(f"no connection with what is{where or ' there'}: {tls[0]}", hint=tls[1])
        return Unavailable(f"nothing answers{where}: {message}", hint=REACH_HINT)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(f"no answer in time{where}")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return Unsupported(
            f"the process{where} does not know this call", hint="is this the address of another kvpool role or version?"
        )
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        hint = "too many calls at a time, or one that is too large: try again shortly, and with fewer keys"
        return Overloaded(f"refused{where}: {message}", hint=hint)
    return KvpoolError(f"{code.name}{where}: {message}")


# ---------------------------------------------------------------- server


class _Guard(grpc.aio.ServerInterceptor):
    """Checks protocol and credential before each call; gives each error its status and each unary call an end."""

    def __init__(self, credential: str) -> None:
        self._credential = credential

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(details)
        if handler is None:
            return handler
        refusal = self._refusal(dict(details.invocation_metadata or ()))
        # Those of others may ask after our health once without a credential; streams, which stay and count, are for
        # those who have it.
        if not details.method.startswith("/kvpool.") and (not handler.response_streaming or refusal is None):
            return handler
        if handler.response_streaming:
            behavior = _stream_behavior(handler.unary_stream or handler.stream_stream, refusal)
            make = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
        else:
            behavior = _unary_behavior(handler.unary_unary or handler.stream_unary, refusal)
            make = (
                grpc.stream_unary_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_unary_rpc_method_handler
            )
        return make(behavior, handler.request_deserializer, handler.response_serializer)

    def _refusal(self, metadata: dict[str, Any]) -> KvpoolError | None:
        protocol = metadata.get("kvpool-protocol", "")
        if protocol and protocol != PROTOCOL:
            return ProtocolMismatch(
                f"this server (kvpool {__version__}) speaks protocol {PROTOCOL}, the caller speaks {protocol}",
                hint="run the same kvpool release on both sides",
            )
        if self._credential and not hmac.compare_digest(
            str(metadata.get("authorization", "")).encode(), f"Bearer {self._credential}".encode()
        ):
            return Unauthenticated("no valid credential", hint="pass --credential or set KVPOOL_CREDENTIAL")
        return None


async def _abort(context: grpc.aio.ServicerContext, error: Exception) -> None:
    if isinstance(error, NotImplementedError):
        error = Unsupported("this process does not serve this call")
    if not isinstance(error, KvpoolError):
        log.error("handler failed", exc_info=error)
        await context.abort(grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}")
    code, message, trailing = to_status(error)
    await context.abort(code, message, trailing)


def _unary_behavior(inner: Callable[..., Awaitable[Any]], refusal: KvpoolError | None) -> Callable[..., Awaitable[Any]]:
    async def behavior(request: Any, context: grpc.aio.ServicerContext) -> Any:
        if refusal is not None:
            await _abort(context, refusal)
        try:
            return await asyncio.wait_for(inner(request, context), context.time_remaining() or UNARY_TIMEOUT_S)
        except TimeoutError:
            await _abort(context, DeadlineExceeded("the call's deadline passed"))
        except (
            KvpoolError,
            ValueError,
            TypeError,
            LookupError,
            ArithmeticError,
            RuntimeError,
            AssertionError,
        ) as error:
            await _abort(context, error)

    return behavior


def _stream_behavior(inner: Callable[..., AsyncIterator[Any]], refusal: KvpoolError | None) -> Callable[..., Any]:
    async def behavior(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        if refusal is not None:
            await _abort(context, refusal)
        try:
            async for reply in inner(request, context):
                yield reply
        except (
            KvpoolError,
            ValueError,
            TypeError,
            LookupError,
            ArithmeticError,
            RuntimeError,
            AssertionError,
        ) as error:
            await _abort(context, error)

    return behavior


async def serve(
    address: str,
    register: Callable[[grpc.aio.Server], Sequence[str]],
    *,
    credential: str = "",
    tls: TlsConfig | None = None,
    rpcs_max: int = RPCS_MAX,
) -> tuple[grpc.aio.Server, int]:
    """Starts a server with health checking and reflection.

    Args:
        address: "host:port"; port 0 picks a free one.
        register: adds the servicers and returns their full names.
        credential: callers must present it; empty = none asked for.
        tls: serve TLS, and only that.
        rpcs_max: calls and streams at a time; one more is refused.
    Returns: the running server, and its port.
    Raises: Unavailable if the address can't be bound; BadArgument if the TLS files are no good.
    """
    guard = _Guard(credential)
    server = grpc.aio.server(interceptors=(guard,), options=OPTIONS, maximum_concurrent_rpcs=rpcs_max)
    names = list(register(server))
    checker = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checker, server)
    for name in ["", *names]:
        await checker.set(name, health_pb2.HealthCheckResponse.SERVING)
    reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    try:
        if tls is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, server_credentials(tls))
    except RuntimeError as error:
        raise Unavailable(
            # Without what gRPC advises to set.
            f"can't listen on {address}: {str(error).partition(';')[0]}",
            hint="is the port taken? choose another with --listen (--port of `kvpool serve`)",
        ) from error
    await server.start()
    return server, port


# ---------------------------------------------------------------- client


def _with_metadata(details: Any, extra: tuple[tuple[str, str], ...], *, unary: bool) -> Any:
    timeout = details.timeout if details.timeout is not None or not unary else UNARY_TIMEOUT_S
    metadata = [*(details.metadata or ()), *extra]
    if isinstance(details, grpc.aio.ClientCallDetails):
        return grpc.aio.ClientCallDetails(
            details.method, timeout, grpc.aio.Metadata(*metadata), details.credentials, details.wait_for_ready
        )
    return _CallDetails(details, timeout, metadata)


class _CallDetails(grpc.ClientCallDetails):
    def __init__(self, base: Any, timeout: float | None, metadata: list[tuple[str, str]]) -> None:
        self.method, self.timeout, self.metadata = base.method, timeout, metadata
        self.credentials, self.wait_for_ready, self.compression = (
            base.credentials,
            base.wait_for_ready,
            base.compression,
        )


class _SyncMetadata(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    def __init__(self, extra: tuple[tuple[str, str], ...]) -> None:
        self._extra = extra

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        return continuation(_with_metadata(details, self._extra, unary=True), request)

    def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:
        return continuation(_with_metadata(details, self._extra, unary=False), request)

    def intercept_stream_unary(self, continuation: Any, details: Any, requests: Any) -> Any:
        return continuation(_with_metadata(details, self._extra, unary=False), requests)

    def intercept_stream_stream(self, continuation: Any, details: Any, requests: Any) -> Any:
        return continuation(_with_metadata(details, self._extra, unary=False), requests)


class _AioUnary(grpc.aio.UnaryUnaryClientInterceptor):
    def __init__(self, extra: tuple[tuple[str, str], ...]) -> None:
        self._extra = extra

    async def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        return await continuation(_with_metadata(details, self._extra, unary=True), request)


class _AioUnaryStream(grpc.aio.UnaryStreamClientInterceptor):
    def __init__(self, extra: tuple[tuple[str, str], ...]) -> None:
        self._extra = extra

    async def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:
        return await continuation(_with_metadata(details, self._extra, unary=False), request)


class _AioStreamStream(grpc.aio.StreamStreamClientInterceptor):
    def __init__(self, extra: tuple[tuple[str, str], ...]) -> None:
        self._extra = extra

    async def intercept_stream_stream(self, continuation: Any, details: Any, requests: Any) -> Any:
        return await continuation(_with_metadata(details, self._extra, unary=False), requests)


def _metadata(credential: str) -> tuple[tuple[str, str], ...]:
    protocol = (("kvpool-protocol", PROTOCOL),)
    return (*protocol, ("authorization", f"Bearer {credential}")) if credential else protocol


def make_channel(address: str, *, credential: str = "", tls: TlsConfig | None = None) -> grpc.Channel:
    """A channel for threads. Connects lazily and again after a loss. Raises: BadArgument if the TLS files are bad."""
    # Without a pool of its own, two channels to one address share a connection, and its back-off.
    options = [*OPTIONS, ("grpc.use_local_subchannel_pool", 1), *channel_options(tls)]
    if tls is None:
        channel = grpc.insecure_channel(address, options=options)
    else:
        channel = grpc.secure_channel(address, channel_credentials(tls), options=options)
    return grpc.intercept_channel(channel, _SyncMetadata(_metadata(credential)))


def make_aio_channel(address: str, *, credential: str = "", tls: TlsConfig | None = None) -> grpc.aio.Channel:
    """A channel for asyncio. Connects lazily and again after a loss. Raises: BadArgument if the TLS files are bad."""
    extra = _metadata(credential)
    options = [*OPTIONS, ("grpc.use_local_subchannel_pool", 1), *channel_options(tls)]
    interceptors = [_AioUnary(extra), _AioUnaryStream(extra), _AioStreamStream(extra)]
    if tls is None:
        return grpc.aio.insecure_channel(address, options=options, interceptors=interceptors)
    return grpc.aio.secure_channel(address, channel_credentials(tls), options=options, interceptors=interceptors)
