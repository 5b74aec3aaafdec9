"""The part of a store that is its connection: setup, close, registered memory, and errors as codes."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from engines.attached.quiet_log import QuietLog
from engines.attached.rest import Rest
from engines.mooncake.codes import NAMES, Code, code_of
from engines.mooncake.memory import HostMemory, RegisteredMemory
from engines.mooncake.pool import Codes, ObjectPool
from engines.mooncake.settings import TENANT_DEFAULT, PoolSettings
from kvpool.core.errors import DeadlineExceeded, KvpoolError

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")
Arguments = ParamSpec("Arguments")

#: Longest key in bytes of UTF-8: the pool keeps and compares all of it.
KEY_BYTES_MAX = 1024
#: The same trouble is logged once in so long.
COMPLAINT_S = 30.0
#: A pool that did not answer in time is not asked for so long: else each call would wait anew.
REST_S = 1.0


class NotSetUp(KvpoolError):
    """A call on a store that has no connection."""


class Resting(DeadlineExceeded):
    """A call that was not made, since another has waited in vain a moment ago."""


class StoreConnection:
    """A store's connection to the pool, and the memory that its caller registered. For any thread."""

    def __init__(self) -> None:
        self._pool: ObjectPool | None = None
        self._hostname = ""
        self._memory = RegisteredMemory()
        self._host_memory = HostMemory()
        self._quiet, self._rest = QuietLog(log, COMPLAINT_S), Rest(REST_S)
        self._lock = threading.Lock()

    # ------------------------------------------------------------ connecting

    def setup(self, *args: Any, **kwargs: Any) -> int:
        """Connects: with the arguments of `_setup`, or with one dict of them.

        Returns: 0; INVALID_PARAMS for a dict without what is required; RPC_FAIL if the pool can't be reached.
        """
        if len(args) == 1 and isinstance(args[0], Mapping) and not kwargs:
            config = dict(args[0])
            if not {"local_hostname", "metadata_server"} <= config.keys():
                return Code.INVALID_PARAMS
            # The second is what configuration files call it, and what LMCache passes on.
            master = config.get("master_server_addr") or config.get("master_server_address") or ""
            tenant = str(config.get("tenant_id", TENANT_DEFAULT))
            return self._connect(str(config["local_hostname"]), str(master), tenant)
        return self._setup(*args, **kwargs)

    def _setup(
        self,
        local_hostname: str,
        metadata_server: str,
        global_segment_size: int,
        local_buffer_size: int,
        protocol: str,
        rdma_devices: str,
        master_server_addr: str,
        engine: object = None,
        enable_ssd_offload: bool = False,
        ssd_offload_path: str = "",
        tenant_id: str = TENANT_DEFAULT,
        enable_client_http_server: bool = False,
        client_http_port: int = 9300,
    ) -> int:
        """Of these, `master_server_addr` (unless the environment says where the pool is), `tenant_id` and
        `local_hostname` (as this client's name) are used. Memory and SSD are the nodes' own, as is how bytes travel."""
        return self._connect(local_hostname, master_server_addr, tenant_id)

    def setup_dummy(self, mem_pool_size: int, local_buffer_size: int, server_address: str) -> int:
        """As `setup`, with the address of what Mooncake calls the real client."""
        return self._connect("", server_address, TENANT_DEFAULT)

    def _connect(self, hostname: str, master: str, tenant: str) -> int:
        try:
            settings = PoolSettings.of(master, tenant)
            pool = settings.connect(f"mooncake {hostname or '-'} {os.getpid()}")
        except KvpoolError as error:
            hint = f" ({error.hint})" if error.hint else ""
            log.error("mooncake.store on kvpool: no connection: %s%s", error, hint)
            return code_of(error)
        with self._lock:
            before, self._pool, self._hostname = self._pool, pool, hostname
        if before is not None:
            before.close()
        log.info("sizes of segments and buffers, protocol and devices that setup was given have no effect on kvpool")
        return Code.OK

    def close(self) -> int:
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()
        return Code.OK

    def get_hostname(self) -> str:
        """What `setup` was told."""
        return self._hostname

    def health_check(self) -> int:
        """0: it answers; 1: no `setup`; 2: it does not answer."""
        if self._pool is None:
            return 1

        def check(pool: ObjectPool) -> int:
            pool.check()
            return Code.OK

        return 0 if self._code(check) == Code.OK else 2

    # ------------------------------------------------------------ memory

    def register_buffer(self, buffer_ptr: int, size: int) -> int:
        """Makes memory known to the calls that take addresses.

        Returns: INVALID_PARAMS for what overlaps, and for memory that is not the host's.
        """
        code = self._memory.register(int(buffer_ptr), int(size))
        if code != Code.OK:
            log.warning(
                "memory at %#x of %d bytes was not registered: it is registered already, or is not host memory",
                buffer_ptr, size,
            )  # fmt: skip
        return code

    def unregister_buffer(self, buffer_ptr: int) -> int:
        return self._memory.unregister(int(buffer_ptr))

    def alloc_from_mem_pool(self, size: int) -> int:
        """Address of host memory that is this store's, or 0."""
        return self._host_memory.alloc(int(size))

    # ------------------------------------------------------------ errors as codes

    def _ask(self, call: Callable[[ObjectPool], Answer], otherwise: Answer | None) -> Answer | None:
        """What the pool answers, or `otherwise`; what was wrong is logged."""
        try:
            return call(self._need())
        except Exception as error:
            self._complain(error)
            return otherwise

    def _code(self, call: Callable[[ObjectPool], int]) -> int:
        """What the pool answers, or the code of its error."""
        try:
            return call(self._need())
        except Exception as error:
            return self._complain(error)

    def _codes(self, count: int, call: Callable[[ObjectPool], Codes]) -> Codes:
        """As `_code`, for `count` keys at once."""
        try:
            return call(self._need())
        except Exception as error:
            return np.full(count, self._complain(error), dtype=np.int64)

    def _need(self) -> ObjectPool:
        pool = self._pool
        if pool is None:
            raise NotSetUp("call setup first")
        if self._rest.now:
            raise Resting("the pool did not answer in time a moment ago")
        return pool

    def _complain(self, error: Exception) -> int:
        """The code of an error; callers of this interface do not expect exceptions, not even those of our mistakes."""
        code = Code.INTERNAL_ERROR
        if isinstance(error, KvpoolError):
            code = Code.INVALID_PARAMS if isinstance(error, NotSetUp) else code_of(error)
        if isinstance(error, DeadlineExceeded) and not isinstance(error, Resting):
            self._rest.begin()
        trace = error if code == Code.INTERNAL_ERROR else None
        self._quiet.warning(
            NAMES[code], "mooncake.store on kvpool: %s, returned as %d (%s)", error, code, NAMES[code], trace=trace
        )
        return code


def uses_memory(call: Callable[Arguments, Answer]) -> Callable[Arguments, Answer]:
    """For calls that touch registered memory: it is not unregistered meanwhile."""

    @wraps(call)
    def wrapped(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Answer:
        store = args[0]
        assert isinstance(store, StoreConnection)
        with store._memory.in_use():
            return call(*args, **kwargs)

    return wrapped


def texts(keys: Sequence[str | bytes]) -> list[str]:
    """Keys as text. Raises: TypeError for what are no keys, as Mooncake's binding does."""
    if isinstance(keys, str | bytes) or not isinstance(keys, Sequence | np.ndarray):
        raise TypeError("expected a list of keys")
    if set(map(type, keys)) == {str}:
        return list(keys)  # type: ignore[arg-type]
    return [text(key) for key in keys]


def text(key: str | bytes) -> str:
    """A key as text; bytes that are no UTF-8 become a text that `usable` refuses. Raises: TypeError."""
    if isinstance(key, str):
        return key
    if isinstance(key, bytes):
        return key.decode(errors="surrogateescape")
    raise TypeError(f"a key is a str, not {type(key).__name__}")


def usable(names: Sequence[str]) -> NDArray[np.bool_]:
    """Which names the pool can keep: 1 to KEY_BYTES_MAX bytes of UTF-8."""
    lengths = np.fromiter(map(len, names), dtype=np.int64, count=len(names))
    if "".join(names).isascii():
        return (lengths >= 1) & (lengths <= KEY_BYTES_MAX)
    return np.fromiter((_is_usable(name) for name in names), dtype=np.bool_, count=len(names))


def _is_usable(name: str) -> bool:
    if name.isascii():
        return 1 <= len(name) <= KEY_BYTES_MAX
    try:
        return len(name.encode()) <= KEY_BYTES_MAX
    except UnicodeEncodeError:
        return False
