"""The Scheduler service on the wire: life lines of instances and gateways, placements, and why they are as they are."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from kvpool import __version__
from kvpool.core.errors import BadArgument, UnknownRequest, Unsupported
from kvpool.core.ids import Role
from kvpool.core.namespace import HASHES
from kvpool.v1 import engine_pb2, scheduler_pb2, scheduler_pb2_grpc
from scheduler.core import role_changes
from scheduler.core.cluster import Instance, State
from scheduler.core.commands import Placed, RoleRefused
from scheduler.core.events import Event, GatewayClosed, InstanceLeft
from scheduler.service import answers, wire
from scheduler.service.eventlog.shared_log import SharedLog
from scheduler.service.shell import Shell
from scheduler.service.streams import serve_life_line


class SchedulerServicer(scheduler_pb2_grpc.SchedulerServicer):
    def __init__(self, shell: Shell, event_log: SharedLog | None = None) -> None:
        self._shell, self._event_log = shell, event_log

    # ------------------------------------------------------------ life lines

    def _greeting(self) -> scheduler_pb2.SchedulerMessage:
        config = self._shell.core.config
        return scheduler_pb2.SchedulerMessage(
            report_interval_ms=config.report_interval_us // 1000, scheduler_id=config.scheduler_id
        )

    def _beat(self, seq: int) -> scheduler_pb2.SchedulerMessage:
        return scheduler_pb2.SchedulerMessage(scheduler_id=self._shell.core.config.scheduler_id)

    async def Join(
        self, messages: AsyncIterator[scheduler_pb2.InstanceMessage], context: Any
    ) -> AsyncIterator[scheduler_pb2.SchedulerMessage]:
        async for reply in serve_life_line(
            self._shell,
            messages,
            begin=lambda first, stream: wire.instance_joined(_info_of(first), stream),
            read=_instance_message,
            end=InstanceLeft,
            greeting=self._greeting(),
            answer=lambda seq, want_snapshot: self._greeting(),
            beat=self._beat,
            order=self._order,
        ):
            yield reply

    def _order(self, role: Role) -> scheduler_pb2.SchedulerMessage:
        message = self._greeting()
        message.role = int(role)  # type: ignore[assignment]
        return message

    async def OpenGateway(
        self, messages: AsyncIterator[scheduler_pb2.GatewayMessage], context: Any
    ) -> AsyncIterator[scheduler_pb2.SchedulerMessage]:
        async for reply in serve_life_line(
            self._shell,
            messages,
            begin=lambda first, stream: wire.gateway_opened(_hello_of(first), stream),
            read=wire.gateway_message,
            end=GatewayClosed,
            greeting=self._greeting(),
            answer=lambda seq, want_snapshot: self._greeting(),
            beat=self._beat,
        ):
            yield reply

    # ------------------------------------------------------------ placements

    async def Place(self, request: scheduler_pb2.PlaceRequest, context: Any) -> scheduler_pb2.PlaceReply:
        """Answers when the request is placed or refused: until then it waits in the core."""
        return answers.place_reply(await self._shell.place(wire.place_requested(request)))

    async def Explain(self, request: scheduler_pb2.ExplainRequest, context: Any) -> scheduler_pb2.Explanation:
        core, now_us = self._shell.core, self._shell.now_us()
        entry = core.ledger.get(request.request_id)
        waiting = core.room.named(request.request_id)
        if waiting is not None:
            return answers.waiting_explanation(waiting, core.config.policy, now_us)
        if entry is None:
            raise UnknownRequest(
                f"request {request.request_id!r} was never placed here, or too long ago",
                hint="the scheduler remembers a bounded number of requests; older ones are in its journal",
            )
        where = entry.choice.prefill.instance_id if isinstance(entry.choice, Placed) else ""
        return answers.explanation(entry, now_us, core.calibrations.get(where))

    async def GetPlan(self, request: scheduler_pb2.GetPlanRequest, context: Any) -> scheduler_pb2.Plan:
        core = self._shell.core
        return answers.plan_message(core, self._shell.now_us())

    async def SetRole(self, request: scheduler_pb2.SetRoleRequest, context: Any) -> scheduler_pb2.SetRoleReply:
        event = wire.role_ordered(request)
        if event.instance_id not in self._shell.core.cluster.instances:
            raise BadArgument(f"there is no instance {event.instance_id!r}", hint="kvctl workers lists them")
        for command in self._shell.submit(event):
            if isinstance(command, RoleRefused) and command.instance_id == event.instance_id:
                role = event.role.name.lower()
                raise Unsupported(
                    f"{event.instance_id} can't be given role {role}: {command.why}", hint="see kvctl workers and plan"
                )
        return scheduler_pb2.SetRoleReply()

    # ------------------------------------------------------------ lists

    async def ListModels(self, request: scheduler_pb2.ListModelsRequest, context: Any) -> scheduler_pb2.ListModelsReply:
        """Each model as the first of its instances describes it; the context is the longest that one of them takes."""
        cluster = self._shell.core.cluster
        reply = scheduler_pb2.ListModelsReply()
        for model in sorted(cluster.by_model):
            instances = [cluster.instances[i] for i in cluster.by_model[model]]
            info = instances[0].info
            reply.models.add(
                model=model,
                namespace=answers.namespace_message(info.namespace),
                tokenizer=info.tokenizer,
                context_tokens_max=max(i.info.context_tokens_max for i in instances),
                instances=len(instances),
                eos_token_ids=info.eos_token_ids,
                protocol=info.protocol,
            )
        return reply

    async def ListInstances(
        self, request: scheduler_pb2.ListInstancesRequest, context: Any
    ) -> scheduler_pb2.ListInstancesReply:
        instances = self._shell.core.cluster.instances
        return scheduler_pb2.ListInstancesReply(
            instances=[self._instance_status(instances[i]) for i in sorted(instances)]
        )

    def _instance_status(self, instance: Instance) -> scheduler_pb2.InstanceStatus:
        core, now_us = self._shell.core, self._shell.now_us()
        holdings = core.book.on(instance.id)
        prefill, decode = core.costs.prefill[instance.id].current(), core.costs.decode[instance.id].current()
        hbm_source_id, known = instance.info.hbm_source_id, core.calibrations.get(instance.id)
        overhead_us, _, factor = known.factors(self._shell.now_us()) if known is not None else (0.0, 1.0, 1.0)
        return scheduler_pb2.InstanceStatus(
            info=answers.engine_info(instance.info),
            state="draining" if instance.draining and instance.state is State.ALIVE else instance.state.value,
            running=instance.running,
            waiting=instance.waiting,
            kv_tokens_free=instance.kv_tokens_free,
            kv_tokens_reserved=holdings.kv_tokens,
            queue_us=holdings.queue_left_us(now_us),
            report_age_ms=(now_us - instance.seen_us) // 1000,
            hbm_blocks=core.directory.held_count(hbm_source_id) if hbm_source_id in core.cluster.sources else 0,
            prefill_base_us=prefill[0],
            prefill_per_token_us=prefill[1],
            prefill_attention_us=prefill[2],
            decode_base_us=decode[0],
            decode_per_sequence_us=decode[1],
            decode_per_kv_token_us=decode[2],
            prediction_errors=answers.prediction_errors(known),
            ttft_overhead_us=overhead_us,
            ttft_factor=factor,
            requests_waiting=core.room.planned_on(instance.info.model, instance.id),
            role_ordered=answers.role_ordered(core.roles, instance.id),
            role_drains=role_changes.drains(core, instance),
        )

    async def GetStatus(self, request: scheduler_pb2.GetStatusRequest, context: Any) -> scheduler_pb2.ClusterStatus:
        core, journal = self._shell.core, self._shell.journal
        cluster, blocks = core.cluster, core.directory.counts()
        instances, sources = cluster.instances.values(), cluster.sources.values()
        return scheduler_pb2.ClusterStatus(
            scheduler_id=core.config.scheduler_id,
            version=__version__,
            uptime_ms=(self._shell.now_us() - self._shell.started_us) // 1000,
            instances_alive=sum(i.state is State.ALIVE for i in instances),
            instances_suspect=sum(i.state is State.SUSPECT for i in instances),
            sources_alive=sum(s.state is State.ALIVE for s in sources),
            sources_suspect=sum(s.state is State.SUSPECT for s in sources),
            directory_blocks=blocks.blocks,
            directory_replicas=blocks.replicas,
            placements=core.counts["placements"],
            refusals=core.counts["refusals"],
            splits=core.counts["splits"],
            active_requests=len(core.book.placements),
            kv_tokens_reserved=core.book.kv_tokens_total(),
            gateways=len(cluster.gateways),
            policies=sorted(core.policies, key=lambda name: (name != core.config.policy, name)),
            journal=journal.path if journal is not None and not journal.error else "",
            journal_bytes=journal.bytes_total if journal is not None else 0,
            hashes=HASHES,
            waiting_requests=len(core.room.entries),
            event_log=None if self._event_log is None else self._event_log.status(),
        )


def _info_of(message: scheduler_pb2.InstanceMessage) -> engine_pb2.EngineInfo:
    if message.WhichOneof("message") != "info":
        raise BadArgument("the first message of an instance must be its info")
    return message.info


def _instance_message(message: scheduler_pb2.InstanceMessage, stream: int) -> Event:
    if message.WhichOneof("message") != "report":
        raise BadArgument("expected a report")
    return wire.instance_reported(message.report, stream)


def _hello_of(message: scheduler_pb2.GatewayMessage) -> scheduler_pb2.GatewayHello:
    if message.WhichOneof("message") != "hello":
        raise BadArgument("the first message of a gateway must be its hello")
    return message.hello
