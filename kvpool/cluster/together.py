"""Calls to several nodes at the same time, each judged by how it went."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from kvpool.cluster.members import GivenUp, Member
from kvpool.core.errors import BadArgument, Draining, KvpoolError, ProtocolMismatch, Unauthenticated, Unavailable

#: Calls at a time; more of them wait for their turn, within their deadline.
CALLS_MAX = 32
#: A node that did not answer for less than this is not to blame: the caller was in a hurry.
BLAME_S_MIN = 0.5
#: How long a node that is being drained is not asked to store anything.
DRAINING_S = 5.0
#: What no other node would answer otherwise.
_FINAL = (BadArgument, Unauthenticated, ProtocolMismatch)

Call = tuple[Member, Callable[[], None]]


class Together:
    """A bounded number of threads for calls to nodes."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(max_workers=CALLS_MAX, thread_name_prefix="cluster-client")

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def run(self, calls: Sequence[Call], end_s: float) -> None:
        """Runs the calls, and returns when all have ended or the time (monotonic seconds) is over.

        A node that fails, or does not answer in time, is left alone for a while. What a late call still does is the
        caller's affair.

        Raises: what no other node would answer otherwise; Unavailable after `close`.
        """
        begin_s = time.monotonic()
        try:
            futures = {self._threads.submit(call): member for member, call in calls}
        except RuntimeError:
            raise Unavailable("this client is closed") from None
        done, late = wait(futures, timeout=max(end_s - begin_s, 0.0))
        for future in late:
            begun = not future.cancel()
            if begun and time.monotonic() - begin_s >= BLAME_S_MIN:
                futures[future].failed(Unavailable("no answer in time"))
        for future in done:
            _judge(futures[future], future)


def _judge(member: Member, future: Future[None]) -> None:
    error = future.exception()
    if error is None:
        member.worked()
    elif isinstance(error, Draining):
        member.draining_until_s = time.monotonic() + DRAINING_S
    elif not isinstance(error, KvpoolError) or isinstance(error, _FINAL):
        raise error
    elif not isinstance(error, GivenUp):
        member.failed(error)
