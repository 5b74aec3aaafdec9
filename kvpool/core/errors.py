"""Errors that a caller can act on. The service maps each reason to a gRPC status, the client maps it back."""

from __future__ import annotations

from enum import IntEnum


class Reason(IntEnum):
    """Why a call failed; numbers as in ErrorDetail.Reason on the wire."""

    BAD_KEY_LENGTH = 1
    BAD_ARGUMENT = 2
    UNKNOWN_NAMESPACE = 3
    NAMESPACE_MISMATCH = 4
    UNKNOWN_SESSION = 5
    UNKNOWN_RESERVATION = 6
    RESERVATION_EXPIRED = 7
    UNKNOWN_LEASE = 8
    NO_SPACE = 9
    OVERLOADED = 10
    PROTOCOL_MISMATCH = 11
    UNAUTHENTICATED = 12
    UNKNOWN_MODEL = 13
    NO_INSTANCE = 14
    CONTEXT_TOO_LONG = 15
    UNKNOWN_REQUEST = 16
    ALREADY_COMMITTED = 17
    UNSUPPORTED = 18
    SLO_UNREACHABLE = 19
    NO_CAPACITY = 20
    DEADLINE = 21
    QUOTA_EXCEEDED = 22
    DRAINING = 23
    NO_SSD = 24
    UNREACHABLE = 25


class KvpoolError(Exception):
    """An error with a reason for programs, a message for people, and where known a hint on what to do."""

    reason: Reason = Reason.BAD_ARGUMENT

    def __init__(self, message: str, *, hint: str = "", reason: Reason | None = None) -> None:
        super().__init__(message)
        self.hint = hint
        if reason is not None:
            self.reason = reason


class BadArgument(KvpoolError):
    reason = Reason.BAD_ARGUMENT


class BadKeyLength(BadArgument):
    reason = Reason.BAD_KEY_LENGTH


class UnknownNamespace(KvpoolError):
    reason = Reason.UNKNOWN_NAMESPACE


class NamespaceMismatch(KvpoolError):
    reason = Reason.NAMESPACE_MISMATCH


class UnknownSession(KvpoolError):
    reason = Reason.UNKNOWN_SESSION


class UnknownReservation(KvpoolError):
    reason = Reason.UNKNOWN_RESERVATION


class ReservationExpired(KvpoolError):
    reason = Reason.RESERVATION_EXPIRED


class AlreadyCommitted(KvpoolError):
    reason = Reason.ALREADY_COMMITTED


class UnknownLease(KvpoolError):
    reason = Reason.UNKNOWN_LEASE


class NoSpace(KvpoolError):
    reason = Reason.NO_SPACE


class QuotaExceeded(NoSpace):
    reason = Reason.QUOTA_EXCEEDED


class Draining(KvpoolError):
    reason = Reason.DRAINING


class NoSsd(KvpoolError):
    reason = Reason.NO_SSD


class Overloaded(KvpoolError):
    reason = Reason.OVERLOADED


class ProtocolMismatch(KvpoolError):
    reason = Reason.PROTOCOL_MISMATCH


class Unauthenticated(KvpoolError):
    reason = Reason.UNAUTHENTICATED


class UnknownRequest(KvpoolError):
    reason = Reason.UNKNOWN_REQUEST


class Unsupported(KvpoolError):
    reason = Reason.UNSUPPORTED


class DeadlineExceeded(KvpoolError):
    reason = Reason.DEADLINE


class Unavailable(KvpoolError):
    """The other side can't be reached."""

    reason = Reason.UNREACHABLE


#: Error class by reason, for clients; reasons without a class of their own come as KvpoolError.
ERRORS: dict[Reason, type[KvpoolError]] = {
    cls.reason: cls
    for cls in (
        BadArgument, BadKeyLength, UnknownNamespace, NamespaceMismatch, UnknownSession, UnknownReservation,
        ReservationExpired, AlreadyCommitted, UnknownLease, NoSpace, Overloaded, ProtocolMismatch, Unauthenticated,
        UnknownRequest, Unsupported, DeadlineExceeded, QuotaExceeded, Draining, NoSsd, Unavailable,
    )
}  # fmt: skip
