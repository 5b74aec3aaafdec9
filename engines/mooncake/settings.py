"""Where the pool is, by what the caller of `setup` and its environment say."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass

from engines.mooncake.pool import ClusterPool, NodePool, ObjectPool
from kvpool.channels.tls import TlsConfig
from kvpool.client import PoolClient
from kvpool.cluster import ClusterClient
from kvpool.core.errors import BadArgument, KvpoolError

log = logging.getLogger(__name__)

#: Deadline of a call that moves no bytes.
CALL_S = 5.0
TENANT_DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """One store's way to the pool.

    node, scheduler: host:port; at most one is used, the scheduler first. Neither: `fallback` decides.
    fallback: what the caller gave as its master's address: a node, or else a scheduler.
    tenant: whose objects these are. Tenants do not see each other's.
    """

    node: str = ""
    scheduler: str = ""
    fallback: str = ""
    tenant: str = TENANT_DEFAULT
    credential: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    tls_ca: str = ""

    @classmethod
    def of(cls, master: str, tenant: str, environment: Mapping[str, str] = os.environ) -> PoolSettings:
        """KVPOOL_NODE or KVPOOL_SCHEDULER say where the pool is; without them, the master's address does.

        Raises: BadArgument if nothing says it.
        """
        names = ("node", "scheduler", "credential", "tls_cert", "tls_key", "tls_ca")
        given = {name: environment.get(f"KVPOOL_{name.upper()}", "") for name in names}
        settings = cls(**given, fallback=master, tenant=tenant.strip() or TENANT_DEFAULT)
        if not (settings.node or settings.scheduler or settings.fallback):
            raise BadArgument(
                "nothing says where the pool is", hint="set KVPOOL_NODE, or give master_server_addr as host:port"
            )
        return settings

    @property
    def domain(self) -> str:
        """The domain of the tenant's objects."""
        return f"mooncake/{self.tenant}"

    @property
    def quota_tenant(self) -> str:
        return "" if self.tenant == TENANT_DEFAULT else self.tenant

    def connect(self, client_name: str) -> ObjectPool:
        """Raises: KvpoolError if what was named can't be reached."""
        if self.scheduler:
            return self._cluster(self.scheduler, client_name)
        if self.node:
            return self._node(self.node, client_name)
        try:
            return self._node(self.fallback, client_name)
        except KvpoolError as node_error:
            try:
                return self._cluster(self.fallback, client_name)
            except KvpoolError:
                raise node_error from None

    def _node(self, address: str, client_name: str) -> ObjectPool:
        client = PoolClient(
            address, client=client_name, credential=self.credential, timeout_s=CALL_S, tls=self._tls()
        )  # fmt: skip
        try:
            pool = NodePool(client, self.domain, self.quota_tenant)
        except BaseException:
            client.close()
            raise
        log.info("objects of tenant %r are kept on the kvpool node at %s", self.tenant, address)
        return pool

    def _cluster(self, address: str, client_name: str) -> ObjectPool:
        client = ClusterClient(
            address, client=client_name, credential=self.credential, timeout_s=CALL_S, tls=self._tls()
        )  # fmt: skip
        try:
            pool = ClusterPool(client, self.domain, self.quota_tenant)
        except BaseException:
            client.close()
            raise
        log.info("objects of tenant %r are kept on the nodes of the kvpool scheduler at %s", self.tenant, address)
        return pool

    def _tls(self) -> TlsConfig | None:
        return TlsConfig.of_files(self.tls_cert, self.tls_key, self.tls_ca)
