"""Mooncake Store's return codes, and which of them an error of the pool is.

Numbers as its `ErrorCode` has them (mooncake-store/include/types.h, 0.3.13); only those that a caller may meet.
Whatever fails here has stopped touching the caller's memory when it returns, so each is one that vLLM calls safe.
"""

from __future__ import annotations

from typing import Final

from kvpool.core.errors import (
    BadArgument,
    DeadlineExceeded,
    Draining,
    KvpoolError,
    NoSpace,
    QuotaExceeded,
    ReservationExpired,
    UnknownReservation,
)


class Code:
    """0 is success, everything else is negative. Plain integers: callers look at the type too."""

    OK: Final = 0
    INTERNAL_ERROR: Final = -1
    NO_AVAILABLE_HANDLE: Final = -200  # no room
    INVALID_PARAMS: Final = -600
    INVALID_WRITE: Final = -700
    REPLICA_IS_NOT_READY: Final = -703  # being written
    OBJECT_NOT_FOUND: Final = -704
    OBJECT_ALREADY_EXISTS: Final = -705
    TRANSFER_FAIL: Final = -800
    RPC_FAIL: Final = -900
    RPC_TIMEOUT: Final = -901
    TENANT_QUOTA_EXCEEDED: Final = -1700


#: Names of the codes, for the log.
NAMES: Final = {code: name for name, code in vars(Code).items() if isinstance(code, int)}

#: The first class that an error is an instance of decides; any other error means that the pool was not reached.
_CODES: tuple[tuple[type[KvpoolError], int], ...] = (
    (QuotaExceeded, Code.TENANT_QUOTA_EXCEEDED),
    (NoSpace, Code.NO_AVAILABLE_HANDLE),
    (Draining, Code.NO_AVAILABLE_HANDLE),
    (DeadlineExceeded, Code.RPC_TIMEOUT),
    (ReservationExpired, Code.RPC_TIMEOUT),
    (UnknownReservation, Code.RPC_TIMEOUT),
    (BadArgument, Code.INVALID_PARAMS),
)


def code_of(error: KvpoolError) -> int:
    """The code that stands for an error of the pool."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    return Code.RPC_FAIL
