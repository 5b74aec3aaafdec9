"""Connections of `kvctl`: to a cluster's scheduler, and to single nodes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from kvpool.cli import output
from kvpool.cli.kvctl.access import ANYBODY, Access
from kvpool.service import rpc
from kvpool.service.host import host_id
from kvpool.service.scheduler_list import split, target
from kvpool.v1 import (
    block_source_pb2,
    block_source_pb2_grpc,
    common_pb2,
    directory_pb2,
    directory_pb2_grpc,
    scheduler_pb2,
    scheduler_pb2_grpc,
    source_admin_pb2,
    source_admin_pb2_grpc,
)

PAGE = 1000
#: What clients hold on a node.
HELD = ("leases", "pins", "reservations", "quarantined")


class Cluster:
    """Stubs of one cluster's scheduler process; every answer is plain data."""

    def __init__(self, address: str, access: Access = ANYBODY) -> None:
        self.address, self.access = address, access
        # Of several schedulers whichever answers: they know the same.
        by_name = access.tls is not None and not access.tls.server_name
        self._channel = rpc.make_channel(target(address, by_name=by_name), credential=access.credential, tls=access.tls)
        self._scheduler: Any = scheduler_pb2_grpc.SchedulerStub(self._channel)
        self._directory: Any = directory_pb2_grpc.DirectoryStub(self._channel)

    def status(self) -> dict[str, Any]:
        return output.to_dict(self._scheduler.GetStatus(scheduler_pb2.GetStatusRequest()))

    def instances(self) -> list[dict[str, Any]]:
        reply = self._scheduler.ListInstances(scheduler_pb2.ListInstancesRequest())
        return [output.to_dict(i) for i in reply.instances]

    def sources(self) -> list[dict[str, Any]]:
        reply = self._directory.ListSources(directory_pb2.ListSourcesRequest())
        return [output.to_dict(s) for s in reply.sources]

    def models(self) -> list[scheduler_pb2.ModelInfo]:
        return list(self._scheduler.ListModels(scheduler_pb2.ListModelsRequest()).models)

    def plan(self) -> dict[str, Any]:
        return output.to_dict(self._scheduler.GetPlan(scheduler_pb2.GetPlanRequest()))

    def set_role(self, instance_id: str, role: str) -> None:
        """Of several schedulers the one that has the instance's life line can: each is asked."""
        request = scheduler_pb2.SetRoleRequest(instance_id=instance_id, role=f"ROLE_{role.upper()}")  # type: ignore[arg-type]
        error: grpc.RpcError | None = None
        for address in split(self.address):
            with rpc.make_channel(address, credential=self.access.credential, tls=self.access.tls) as channel:
                try:
                    scheduler_pb2_grpc.SchedulerStub(channel).SetRole(request)
                    return
                except grpc.RpcError as failed:
                    # One that is away says less than one that gives a reason.
                    if error is None or error.code() is grpc.StatusCode.UNAVAILABLE:
                        error = failed
        assert error is not None
        raise error

    def match(self, keys: bytes) -> dict[str, Any]:
        request = directory_pb2.MatchRequest(keys=[common_pb2.KeyList(keys=keys)])
        return output.to_dict(self._directory.Match(request))

    def explain(self, request_id: str) -> dict[str, Any]:
        """Of several schedulers the one that placed a request knows: each is asked."""
        request, error = scheduler_pb2.ExplainRequest(request_id=request_id), None
        for address in split(self.address):
            with rpc.make_channel(address, credential=self.access.credential, tls=self.access.tls) as channel:
                try:
                    return output.to_dict(scheduler_pb2_grpc.SchedulerStub(channel).Explain(request))
                except grpc.RpcError as failed:
                    # One that is away says less than one that does not know it.
                    if error is None or failed.code() is grpc.StatusCode.NOT_FOUND:
                        error = failed
        assert error is not None
        raise error

    def source_stats(self, address: str) -> dict[str, Any]:
        with Node(address, self.access) as node:
            return output.to_dict(node.stats())

    def nodes(self) -> list[dict[str, Any]]:
        """Sources that can be read from, each with its own counts; `stats` is missing where it does not answer."""
        found = []
        for source in self.sources():
            if not source["source"]["address"]:
                continue
            with_stats = dict(source)
            try:
                with_stats["stats"] = self.source_stats(source["source"]["address"])
            except grpc.RpcError as error:
                with_stats["error"] = str(rpc.from_rpc_error(error, source["source"]["address"]))
            found.append(with_stats)
        return found

    def held(self) -> dict[str, int]:
        """What clients hold, over all nodes: all zero when nobody does anything."""
        return held_on(self.nodes())


def held_on(nodes: list[dict[str, Any]]) -> dict[str, int]:
    """What clients hold on nodes, as `Cluster.nodes` lists them."""
    # A node with an SSD is two sources at one address.
    counted = {node["source"]["address"]: node for node in nodes}
    return {n: sum(node.get("stats", {}).get(n, 0) for node in counted.values()) for n in HELD}


class Node:
    """Stubs of one node. Every call has a deadline: that of `rpc` where none is given."""

    def __init__(self, address: str, access: Access = ANYBODY, *, source_id: str = "") -> None:
        self.address, self._source_id = address, source_id
        self._channel = rpc.make_channel(address, credential=access.credential, tls=access.tls)
        self.blocks: Any = block_source_pb2_grpc.BlockSourceStub(self._channel)
        self.admin: Any = source_admin_pb2_grpc.SourceAdminStub(self._channel)

    def __enter__(self) -> Node:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    @property
    def source_id(self) -> str:
        if not self._source_id:
            self._source_id = self.blocks.GetSourceInfo(block_source_pb2.GetSourceInfoRequest()).source_id
        return self._source_id

    def stats(self) -> block_source_pb2.SourceStats:
        return self.blocks.GetSourceStats(block_source_pb2.GetSourceStatsRequest())

    def records(
        self, limit: int, *, namespace_id: bytes = b"", name_prefix: str = ""
    ) -> Iterator[block_source_pb2.BlockInfo]:
        """At most `limit` blocks: those in memory, then those on the SSD alone."""
        for below in (False, True):
            # Of a namespace that it does not know a node has nothing in memory, and says so with an error.
            cursor, more = 0, below or not namespace_id or self.knows(namespace_id)
            while more and limit > 0:
                request = block_source_pb2.ListBlocksRequest(
                    cursor=cursor, limit=min(PAGE, limit), namespace_id=namespace_id, name_prefix=name_prefix,
                    below=below,
                )  # fmt: skip
                reply = self.blocks.ListBlocks(request)
                yield from reply.blocks
                limit -= len(reply.blocks)
                cursor = reply.next_cursor
                more = bool(cursor)

    def find(self, keys: bytes, namespace_id: bytes = b"", *, below: bool = False) -> list[block_source_pb2.BlockInfo]:
        """Records of packed keys, whichever namespace (or only one) they are of.

        Args: below: those on the SSD alone; else those in memory.
        """
        reply = self.blocks.ListBlocks(block_source_pb2.ListBlocksRequest(keys=keys, below=below))
        return [block for block in reply.blocks if namespace_id in (b"", block.namespace_id)]

    def knows(self, namespace_id: bytes) -> bool:
        return any(info.namespace_id == namespace_id for info in self.namespaces())

    def namespaces(self) -> list[source_admin_pb2.NamespaceInfo]:
        return list(self.admin.ListNamespaces(source_admin_pb2.ListNamespacesRequest()).namespaces)

    @contextmanager
    def session(self) -> Iterator[int]:
        """A session for calls that need one; it ends here, and with it whatever it holds."""
        ended = threading.Event()

        def pings() -> Iterator[block_source_pb2.SessionPing]:
            hello = block_source_pb2.SessionPing.Hello(client="kvctl", host_id=host_id())
            yield block_source_pb2.SessionPing(hello=hello)
            while not ended.wait(1.0):
                yield block_source_pb2.SessionPing()

        call = self.blocks.OpenSession(pings())
        try:
            yield next(call).session_id
        finally:
            ended.set()
            call.cancel()


@contextmanager
def chosen_nodes(scheduler: str, node: str, access: Access) -> Iterator[list[Node]]:
    """The node that is named, or all of the cluster, by id. Ends the command if there is none.

    Args: node: id, or HOST:PORT, which needs no scheduler; empty = all.
    """
    if ":" in node:
        found = [Node(node, access)]
    else:
        with output.reported_errors(scheduler, "scheduler"):
            found = _nodes_of(Cluster(scheduler, access), node)
    try:
        for one in found:
            with output.reported_errors(one.address, "node"):
                _ = one.source_id
        yield found
    finally:
        for one in found:
            one.__exit__()


def _nodes_of(cluster: Cluster, node: str) -> list[Node]:
    sources = [s["source"] for s in cluster.sources() if s["source"]["address"]]
    # The SSD of a node is a source of its own in the directory, at the same address; a worker's HBM is no node.
    known = {s["address"]: s["source_id"] for s in sources if s["tier"] == "dram"}
    chosen = {address: name for address, name in known.items() if node in ("", name)}
    if not chosen:
        names = ", ".join(sorted(known.values())) or "none"
        output.fail(f"no node {node!r}" if node else "no node has joined", hint=f"nodes of this cluster: {names}")
    return [
        Node(address, cluster.access, source_id=name)
        for address, name in sorted(chosen.items(), key=lambda item: (item[1], item[0]))
    ]
