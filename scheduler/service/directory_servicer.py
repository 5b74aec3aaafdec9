"""The Directory service on the wire: life lines of sources, matches, lists."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from kvpool.core.ids import unpack_keys
from kvpool.v1 import directory_pb2, directory_pb2_grpc
from scheduler.core.events import SourceDetached
from scheduler.service import answers, wire
from scheduler.service.shell import Shell
from scheduler.service.streams import serve_life_line

KEY_LISTS_MAX = 256


class DirectoryServicer(directory_pb2_grpc.DirectoryServicer):
    def __init__(self, shell: Shell) -> None:
        self._shell = shell
        self._interval_ms = shell.core.config.heartbeat_interval_us // 1000

    async def Attach(
        self, messages: AsyncIterator[directory_pb2.SourceMessage], context: Any
    ) -> AsyncIterator[directory_pb2.DirectoryMessage]:
        lines = serve_life_line(
            self._shell,
            messages,
            begin=lambda first, stream: wire.source_attached(wire.hello_of(first), stream),
            read=wire.source_message,
            end=SourceDetached,
            greeting=None,
            answer=self._answer,
            beat=lambda seq: directory_pb2.DirectoryMessage(acknowledged_seq=seq),
        )
        async for reply in lines:
            if reply is not None:
                yield reply

    def _answer(self, seq: int, want_snapshot: bool) -> directory_pb2.DirectoryMessage:
        return directory_pb2.DirectoryMessage(
            acknowledged_seq=seq, want_snapshot=want_snapshot, heartbeat_interval_ms=self._interval_ms
        )

    async def Match(self, request: directory_pb2.MatchRequest, context: Any) -> directory_pb2.MatchReply:
        wire.at_most(len(request.keys), KEY_LISTS_MAX, "key lists")
        core = self._shell.core
        reply = directory_pb2.MatchReply()
        for number, key_list in enumerate(request.keys):
            match = core.directory.match(unpack_keys(wire.qualified(key_list)))
            if number == 0:
                reply.covered = match.covered
            for run in match.runs:
                source = core.cluster.sources[run.source]
                reply.runs.add(
                    source_id=run.source,
                    tier=int(run.tier),
                    first=run.first,
                    count=run.count,
                    group=key_list.group,
                    shard=key_list.shard,
                    fidelity=int(run.fidelity),
                    address=source.attached.address,
                )
        return reply

    async def ListSources(
        self, request: directory_pb2.ListSourcesRequest, context: Any
    ) -> directory_pb2.ListSourcesReply:
        core, now_us = self._shell.core, self._shell.now_us()
        reply = directory_pb2.ListSourcesReply()
        for source_id in sorted(core.cluster.sources):
            source = core.cluster.sources[source_id]
            reply.sources.add(
                source=answers.source_hello(source.attached),
                state=source.state.value,
                blocks=core.directory.held_count(source_id),
                bytes_used=source.bytes_used,
                seq=source.seq,
                heartbeat_age_ms=(now_us - source.seen_us) // 1000,
                gaps=source.gaps,
            )
        return reply
