"""Golden scripts: what goes into a scheduler core, line by line, and what comes out.

A script is blocks of input lines, a line `----`, the output, and an empty line. Lines that begin with `#` are for
people. Run the tests with KVPOOL_REWRITE=1 to write the output of today into the files; then read the difference.

    config NAME=VALUE ...              must come first
    wait 500ms                         lets time pass, deadline by deadline
    attach ID [epoch= tier= address= host=]   snapshot ID seq= blocks= [part= more]   stored|removed ID seq= blocks=
    heartbeat ID                       detach ID
    join ID [role= kv= batch= context= host= node= hbm= epoch= model=]    leave ID
    report ID [running= waiting= free= prefill=NEW/CACHED/US,.. decode=BATCH/TOKENS/US,.. links=ID/BYTES/US,..
               finished=R,.. draining]       a link's US may be `failed`
    gateway ID     beat ID     close ID
    place R [blocks= prompt= max= policy= pool=no ttft=MS tpot=MS sticky= exclude= gw= model= prio= tenant= weight=
             wait=MS]              cancel R [gw=]
    outcome R [gw= tokens= reason= first]
    show           what is held        explain R           the ledger's entry
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import scheduler_events as made

from kvpool.core.ids import Role, Tier
from scheduler.core import events
from scheduler.core.commands import (
    AcknowledgeSource,
    ChangeRole,
    CloseStream,
    Command,
    Placed,
    PlacementEnded,
    Refused,
    RoleChanged,
    RoleChangeEnded,
    RoleProposed,
    RoleRefused,
    StateChanged,
)
from scheduler.core.config import SchedulerConfig
from scheduler.core.core import SchedulerCore

_UNITS_US = {"us": 1, "ms": 1000, "s": 1_000_000}


def microseconds(text: str) -> int:
    number = text.rstrip("msu")
    return int(number) * _UNITS_US[text[len(number) :]]


def show_command(command: Command) -> str:
    match command:
        case Placed():
            where = command.prefill.instance_id
            if command.split:
                where += f" -> {command.decode.instance_id} through {command.handoff_source_id}"
            pull = "".join(f" pull={r.source_id}[{r.first}..{r.first + r.count - 1}]" for r in command.pull)
            return (
                f"placed {command.request_id} on {where} cached={command.cached_tokens}{pull}"
                f" ttft={command.predicted_ttft_us}us ttl={command.ttl_ms}ms"
                f"{f' waited={command.waited_us}us' if command.waited_us else ''}"
            )
        case Refused():
            return (
                f"refused {command.request_id} {command.reason.name} retry={command.retry_after_ms}ms: "
                f"{command.message}"
            )
        case PlacementEnded():
            return f"ended {command.request_id} ({command.why})"
        case AcknowledgeSource():
            return f"acknowledged seq={command.seq}{' want_snapshot' if command.want_snapshot else ''}"
        case CloseStream():
            return f"close stream {command.stream}: {command.reason}"
        case RoleProposed():
            return f"proposed {command.kind} {command.instance_id or '-'} {command.role.name}: {command.why}"
        case ChangeRole():
            return f"told {command.instance_id}: {command.role.name}"
        case RoleChanged():
            return f"{command.instance_id} is {command.role.name}, was {command.was.name}"
        case RoleChangeEnded():
            return f"change of {command.instance_id} to {command.role.name}: {command.how}"
        case RoleRefused():
            return f"{command.instance_id} stays: {command.why}"
        case StateChanged():
            return f"{command.kind} {command.id} is {command.state}"


class Script:
    """Runs input lines against one core; invariants are checked after each event."""

    def __init__(self) -> None:
        self.core = SchedulerCore(SchedulerConfig())
        self.now_us = 0
        self._streams: dict[str, int] = {}
        self._next_stream = 1

    def run(self, line: str) -> list[str]:
        verb, *words = line.split()
        options = {name: value for name, equals, value in (w.partition("=") for w in words) if equals}
        names = [w for w in words if "=" not in w]
        if verb == "config":
            values = {k: float(v) if "." in v else int(v) for k, v in options.items()}
            self.core = SchedulerCore(replace(SchedulerConfig(), **values))
            return []
        if verb == "wait":
            return self._wait(microseconds(names[0]))
        if verb == "show":
            return self._show()
        if verb == "explain":
            return self._explain(names[0])
        return self._submit(self._event(verb, names[0], names[1:], options))

    def _submit(self, event: events.Event) -> list[str]:
        commands = self.core.handle(event, self.now_us)
        self.core.check_invariants()
        return [show_command(command) for command in commands]

    def _wait(self, duration_us: int) -> list[str]:
        until_us = self.now_us + duration_us
        lines = []
        while (at_us := self.core.next_deadline_us()) is not None and at_us <= until_us:
            self.now_us = at_us
            lines += [f"{at_us / 1e6:g}s: {line}" for line in self._submit(events.TimePassed())]
        self.now_us = until_us
        return lines

    def _new_stream(self, member: str) -> int:
        self._streams[member] = self._next_stream
        self._next_stream += 1
        return self._streams[member]

    def _event(self, verb: str, name: str, flags: list[str], options: dict[str, str]) -> events.Event:
        if verb in ("attach", "join", "gateway"):
            return self._beginning(verb, name, self._new_stream(name), options)
        if verb == "place":
            return _place(name, options)
        if verb == "cancel":
            return events.PlaceCancelled(name, options.get("gw", "gw"))
        if verb == "outcome":
            stream = self._streams[options.get("gw", "gw")]
            return made.outcome(
                stream,
                name,
                first_token="first" in flags,
                tokens=int(options.get("tokens", "50")),
                finish_reason=options.get("reason", "stop"),
            )
        stream = self._streams[name]
        if verb == "report":
            return _report(stream, flags, options)
        seq, blocks = int(options.get("seq", "0")), options.get("blocks", "")
        return {
            "snapshot": lambda: made.snapshot(
                stream, seq, blocks, part=int(options.get("part", "0")), last="more" not in flags
            ),
            "stored": lambda: made.stored(stream, seq, blocks),
            "removed": lambda: made.removed(stream, seq, blocks),
            "heartbeat": lambda: events.SourceHeartbeat(stream, 0, 0),
            "detach": lambda: events.SourceDetached(stream),
            "leave": lambda: events.InstanceLeft(stream),
            "beat": lambda: events.GatewayHeartbeat(stream, 0),
            "close": lambda: events.GatewayClosed(stream),
        }[verb]()

    @staticmethod
    def _beginning(verb: str, name: str, stream: int, options: dict[str, str]) -> events.Event:
        epoch = int(options.get("epoch", "1"))
        if verb == "gateway":
            return events.GatewayOpened(stream, name)
        if verb == "attach":
            tier = Tier[options.get("tier", "dram").upper()]
            address = options.get("address", "" if tier is Tier.HBM else f"{name}:1")
            host = options.get("host", "host-0")
            return made.attached(stream, name, epoch=epoch, tier=tier, address=address, host_id=host)
        node = options.get("node", "node-0")
        return made.joined(
            stream,
            name,
            epoch=epoch,
            role=Role[options.get("role", "both").upper()],
            model=options.get("model", "tiny"),
            kv_tokens_total=int(options.get("kv", "8192")),
            context_tokens_max=int(options.get("context", "4096")),
            batch_max=int(options.get("batch", "16")),
            host_id=options.get("host", "host-0"),
            hbm_source_id=options.get("hbm", f"{name}-hbm"),
            node_source_id=node,
            node_address=f"{node}:1" if node else "",
        )

    # ------------------------------------------------------------ what there is

    def _show(self) -> list[str]:
        core, lines = self.core, []
        for instance_id in sorted(core.cluster.instances):
            instance, held = core.cluster.instances[instance_id], core.book.on(instance_id)
            lines.append(
                f"{instance_id} {instance.state.value} held={held.kv_tokens}"
                f" available={instance.kv_tokens_available(held.kv_tokens)} foreign={instance.kv_tokens_foreign}"
                f" decoding={len(held.decoding)} queue={held.queue_left_us(self.now_us)}us"
            )
        counts = core.directory.counts()
        lines.append(f"directory blocks={counts.blocks} replicas={counts.replicas}")
        for owner, waiting in sorted(core.room.entries.items(), key=lambda item: item[1].order):
            plan = waiting.plan
            awaits = f" for the blocks of {plan.awaits[1]}" if plan.awaits else ""
            lines.append(f"waiting {owner[1]}: {plan.prefill_id} -> {plan.decode_id} {plan.prefill_us}us{awaits}")
        lines.append(f"placements={len(core.book.placements)}")
        return lines

    def _explain(self, request_id: str) -> list[str]:
        entry = self.core.ledger.get(request_id)
        if entry is None:
            return ["unknown"]
        lines = [f"policy={entry.policy} attempt={entry.attempts} candidates={entry.candidates_total}"]
        for c in entry.candidates:
            where = f"{c.prefill_instance} -> {c.decode_instance}" if c.split else c.prefill_instance
            lines.append(
                f"  {where}: queue={c.queue_us} pull={c.pull_us} prefill={c.prefill_us} handoff={c.handoff_us}"
                f" harm={c.decode_harm_us} cost={c.cost_us} cached={c.cached_tokens}{' ' if c.reason else ''}{c.reason}"
            )
        if entry.outcome is not None:
            state = "first token" if entry.outcome.first_token else entry.outcome.finish_reason
            lines.append(f"outcome: {state} tokens={entry.outcome.tokens}")
        return lines


def _place(request_id: str, options: dict[str, str]) -> events.PlaceRequested:
    return made.place(
        request_id,
        blocks=options.get("blocks", ""),
        gateway_id=options.get("gw", "gw"),
        model=options.get("model", "tiny"),
        prompt_tokens=int(options.get("prompt", "1000")),
        max_tokens=int(options.get("max", "100")),
        ttft_slo_us=int(options.get("ttft", "0")) * 1000,
        tpot_slo_us=int(options.get("tpot", "0")) * 1000,
        policy=options.get("policy", ""),
        use_pool=options.get("pool", "yes") == "yes",
        sticky_key=options.get("sticky", ""),
        exclude_instances=tuple(filter(None, options.get("exclude", "").split(","))),
        priority=int(options.get("prio", "0")),
        tenant=options.get("tenant", ""),
        tenant_weight=float(options.get("weight", "1")),
        wait_us_max=int(options["wait"]) * 1000 if "wait" in options else None,
    )


def _report(stream: int, flags: list[str], options: dict[str, str]) -> events.InstanceReported:
    def rows(name: str) -> list[list[str]]:
        return [part.split("/") for part in options.get(name, "").split(",") if part]

    return made.reported(
        stream,
        running=int(options.get("running", "0")),
        waiting=int(options.get("waiting", "0")),
        kv_tokens_free=int(options.get("free", "8192")),
        prefill=tuple(events.PrefillSample(*map(int, row)) for row in rows("prefill")),
        decode=tuple(events.DecodeSample(*map(int, row)) for row in rows("decode")),
        links=tuple(
            events.LinkSample(source, int(size), 0 if us == "failed" else int(us), us == "failed", 1)
            for source, size, us in rows("links")
        ),
        finished_prefills=tuple(filter(None, options.get("finished", "").split(","))),
        draining="draining" in flags,
    )


def run_file(path: Path) -> tuple[str, str]:
    """What a script says and what the core does, as whole texts."""
    script, expected = Script(), path.read_text()
    actual: list[str] = []
    reading_output = False
    pending: list[str] = []
    for line in [*expected.splitlines(), ""]:
        if reading_output:
            reading_output = bool(line)
        elif line == "----":
            actual += [*pending, "----"]
            for command in pending:
                if not command.startswith("#"):
                    actual += script.run(command)
            actual.append("")
            pending, reading_output = [], True
        elif line:
            pending.append(line)
        else:
            actual += [*pending, ""] if pending else []
            pending = []
    text = "\n".join(actual).rstrip("\n") + "\n"
    if os.environ.get("KVPOOL_REWRITE"):
        path.write_text(text)
        return text, text
    return expected, text
