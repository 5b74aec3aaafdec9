"""Lines of trace files, by format: each reader takes lines and fills a `TraceBuilder`. No files here."""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from kvpool.core.errors import BadArgument
from scheduler.simulator.columns import BadLine, TraceBuilder

#: Tokens a block of Mooncake's traces has, and of traces that do not say.
BLOCK_TOKENS = 512
TOKENS_MAX = 1 << 26
#: Twenty years: more is a wrong unit.
ARRIVAL_US_MAX = 20 * 365 * 86_400 * 1_000_000
BAD_EXAMPLES_MAX = 8
FORMAT, JOURNAL_FORMAT = 1, 1
KEY_BYTES = 16
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class _Bad(Exception):
    """What is wrong with one line."""


@dataclass(slots=True)
class Lines:
    """Numbered lines of one file, and what to do with a bad one."""

    path: str
    lines: Iterator[tuple[int, str]]
    skip_bad: bool

    def bad(self, builder: TraceBuilder, number: int, problem: str) -> None:
        """Counts a line that is left out. Raises: BadArgument unless bad lines are to be skipped."""
        if not self.skip_bad:
            raise BadArgument(f"{self.path}:{number}: {problem}", hint="--skip-bad leaves such lines out")
        builder.bad_lines += 1
        if len(builder.bad_examples) < BAD_EXAMPLES_MAX:
            builder.bad_examples.append(BadLine(number, problem))


def _tokens(value: Any, name: str) -> int:
    if type(value) is not int or not 1 <= value <= TOKENS_MAX:
        raise _Bad(f"{name} is {value!r:.40}: a whole number from 1 to {TOKENS_MAX} is needed")
    return value


def _arrival_us(value: Any, name: str, unit_us: int) -> int:
    if type(value) not in (int, float) or value != value or not 0 <= value <= ARRIVAL_US_MAX // unit_us:
        raise _Bad(f"{name} is {value!r:.40}: a time from 0 to {ARRIVAL_US_MAX // unit_us} is needed")
    arrival_us: int = round(value * unit_us)
    return arrival_us


def _text(value: Any, name: str) -> str:
    if type(value) is not str:
        raise _Bad(f"{name} is {value!r}: text is needed")
    return value


def _hash_ids(value: Any, prompt_tokens: int, block_tokens: int) -> list[int]:
    if type(value) is not list:
        raise _Bad(f"hash_ids is {value!r:.40}: a list of whole numbers is needed")
    fewest, most = prompt_tokens // block_tokens, -(-prompt_tokens // block_tokens)
    if not fewest <= len(value) <= most:
        raise _Bad(
            f"{len(value)} hash_ids for {prompt_tokens} tokens: {most} are needed, one for each {block_tokens} tokens"
        )
    return value


def _json_object(text: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _Bad(f"not JSON: {error}") from error
    if not isinstance(data, dict):
        raise _Bad(f"not a JSON object: {text[:40]!r}")
    return data


def _field(data: dict[str, Any], name: str) -> Any:
    if name not in data:
        raise _Bad(f"field {name!r} is missing")
    return data[name]


def _each(lines: Lines, builder: TraceBuilder, take: Callable[[str], None]) -> TraceBuilder:
    for number, text in lines.lines:
        if text.strip():
            try:
                take(text)
            except _Bad as error:
                lines.bad(builder, number, str(error))
            except (TypeError, OverflowError):
                lines.bad(builder, number, "hash_ids has something that is no 64-bit whole number")
    return builder


# ---------------------------------------------------------------- Mooncake


def read_mooncake(lines: Lines) -> TraceBuilder:
    """`{"timestamp": ms, "input_length", "output_length", "hash_ids"}` a line.

    Source: the traces published with Qin et al., Mooncake, FAST'25.
    """
    builder = TraceBuilder("mooncake", BLOCK_TOKENS)

    def take(text: str) -> None:
        data = _json_object(text)
        prompt_tokens = _tokens(_field(data, "input_length"), "input_length")
        builder.add(
            _arrival_us(_field(data, "timestamp"), "timestamp", 1000),
            prompt_tokens,
            _tokens(_field(data, "output_length"), "output_length"),
            _hash_ids(_field(data, "hash_ids"), prompt_tokens, BLOCK_TOKENS),
        )

    return _each(lines, builder, take)


# ---------------------------------------------------------------- kvpool's own


def header(block_tokens: int, about: dict[str, Any]) -> str:
    """The first line of a trace of our own; `about` says where it is from, for people."""
    return json.dumps({"kvpool_trace": FORMAT, "block_tokens": block_tokens, **about}, separators=(",", ":"))


def read_kvpool(lines: Lines) -> TraceBuilder:
    """A header, then `{"arrival_us", "prompt_tokens", "output_tokens", "hash_ids", ...}` a line."""
    number, text = next(lines.lines)
    try:
        data = _json_object(text)
        if data.get("kvpool_trace") != FORMAT:
            raise _Bad(f"kvpool_trace is {data.get('kvpool_trace')!r}: format {FORMAT} is what is known here")
        block_tokens = _tokens(_field(data, "block_tokens"), "block_tokens")
    except _Bad as error:
        raise BadArgument(f"{lines.path}:{number}: {error}") from error
    builder = TraceBuilder("kvpool", block_tokens)

    def take(text: str) -> None:
        data = _json_object(text)
        prompt_tokens = _tokens(_field(data, "prompt_tokens"), "prompt_tokens")
        priority = data.get("priority", 0)
        if type(priority) is not int or abs(priority) > 1 << 31:
            raise _Bad(f"priority is {priority!r}: a whole number is needed")
        builder.add(
            _arrival_us(_field(data, "arrival_us"), "arrival_us", 1),
            prompt_tokens,
            _tokens(_field(data, "output_tokens"), "output_tokens"),
            _hash_ids(_field(data, "hash_ids"), prompt_tokens, block_tokens),
            _text(data.get("session", ""), "session"),
            _text(data.get("tenant", ""), "tenant"),
            priority,
        )

    return _each(lines, builder, take)


# ---------------------------------------------------------------- Azure

_AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def read_azure(lines: Lines) -> TraceBuilder:
    """CSV with TIMESTAMP, ContextTokens, GeneratedTokens. Nothing is known of prefixes: no two requests share a block.

    Source: the Azure LLM inference traces of 2023 and 2024.
    """
    number, text = next(lines.lines)
    columns = text.strip().split(",")
    places = [columns.index(name) if name in columns else -1 for name in _AZURE_COLUMNS]
    if min(places) < 0:
        raise BadArgument(f"{lines.path}:{number}: the columns {', '.join(_AZURE_COLUMNS)} are needed")
    builder = TraceBuilder("azure", BLOCK_TOKENS)
    builder.notes.append("the trace has no hashes: no two requests share a block")
    blocks = 0

    def take(text: str) -> None:
        nonlocal blocks
        cells = _cells(text)
        if len(cells) <= max(places):
            raise _Bad(f"{len(cells)} cells, {len(columns)} are needed")
        prompt_tokens = _tokens(_whole(cells[places[1]]), _AZURE_COLUMNS[1])
        count = -(-prompt_tokens // BLOCK_TOKENS)
        builder.add(
            _timestamp_us(cells[places[0]]),
            prompt_tokens,
            _tokens(_whole(cells[places[2]]), _AZURE_COLUMNS[2]),
            range(blocks, blocks + count),
        )
        blocks += count

    return _each(lines, builder, take)


def _cells(text: str) -> list[str]:
    try:
        return next(csv.reader([text]))
    except csv.Error as error:
        raise _Bad(f"not CSV: {error}") from error


def _whole(text: str) -> int | str:
    try:
        return int(text)
    except ValueError:
        return text


def _timestamp_us(text: str) -> int:
    """Microseconds since 1970 of a time of day in ISO format; without an offset it is taken for UTC."""
    try:
        at = datetime.fromisoformat(text.strip())
    except ValueError:
        raise _Bad(f"TIMESTAMP is {text!r}: a time like 2023-11-16 18:17:03.97 is needed") from None
    return ((at if at.tzinfo else at.replace(tzinfo=UTC)) - _EPOCH) // _MICROSECOND


# ---------------------------------------------------------------- the scheduler's journal


@dataclass(slots=True)
class _JournalRows:
    """What a journal has told so far. Of a request placed again only the first time counts."""

    builder: TraceBuilder
    row_of: dict[str, int] = field(default_factory=dict)
    max_tokens: list[int] = field(default_factory=list)
    ended: dict[int, int] = field(default_factory=dict)  # row -> generated tokens
    id_of_key: dict[bytes, int] = field(default_factory=dict)

    def take(self, line: dict[str, Any]) -> None:
        event = line.get("event")
        if not isinstance(event, dict):
            return
        try:
            if event.get("$") == "PlaceRequested" and event["request_id"] not in self.row_of:
                self._request(event, line["at"])
            elif event.get("$") == "OutcomeReported" and not event["first_token"] and event["tokens"] > 0:
                row = self.row_of.get(event["request_id"])
                if row is not None and not event["error"]:
                    self.ended[row] = min(event["tokens"], self.max_tokens[row])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise _Bad(f"not an event of a journal: {error!r}") from error

    def _request(self, event: dict[str, Any], at_us: int) -> None:
        prompt_tokens = _tokens(event["prompt_tokens"], "prompt_tokens")
        max_tokens = _tokens(event["max_tokens"], "max_tokens")
        row = self.builder.add(
            _arrival_us(at_us, "at", 1),
            prompt_tokens,
            max_tokens,
            self._ids(event["keys"][:1], prompt_tokens // self.builder.block_tokens),
            event.get("sticky_key", ""),
            event.get("tenant", ""),
            event.get("priority", 0),
        )
        self.row_of[event["request_id"]] = row
        self.max_tokens.append(max_tokens)

    def _ids(self, batches: list[dict[str, Any]], count: int) -> list[int]:
        """Ids of the first key list, in the order in which keys were first seen; new ones where there are no keys."""
        packed = base64.b64decode(batches[0]["keys"]["$bytes"], validate=True) if batches else b""
        ids = []
        for place in range(count):
            key = packed[place * KEY_BYTES : (place + 1) * KEY_BYTES] or f"{len(self.row_of)}/{place}".encode()
            ids.append(self.id_of_key.setdefault(key, len(self.id_of_key)))
        return ids

    def finish(self) -> None:
        """Gives requests that were not seen ending the mean length of those that were, as far as they may."""
        rows = len(self.builder)
        unknown = [row for row in range(rows) if row not in self.ended]
        mean_tokens = max(sum(self.ended.values()) // max(len(self.ended), 1), 1)
        for row, tokens in self.ended.items():
            self.builder.set_output_tokens(row, tokens)
        for row in unknown:
            self.builder.set_output_tokens(row, min(mean_tokens, self.max_tokens[row]))
        if unknown:
            self.builder.notes.append(
                f"{len(unknown)} of {rows} requests were not seen ending: "
                f"{mean_tokens} generated tokens are assumed, the mean of the others"
            )


def read_journal(lines: Lines) -> TraceBuilder:
    """Requests of a scheduler's journal file with the tokens that they were seen to generate.

    A last line that was cut off, as by a crash, is left out. Keys are those of full blocks.
    """
    number, text = next(lines.lines)
    try:
        data = _json_object(text)
    except _Bad as error:
        raise BadArgument(f"{lines.path}:{number}: {error}") from error
    if data.get("journal") != JOURNAL_FORMAT:
        raise BadArgument(f"{lines.path}: a journal of format {data.get('journal')!r}; {JOURNAL_FORMAT} is known here")
    held: list[tuple[int, dict[str, Any]]] = []
    sizes = _block_tokens_in(data)
    builder = TraceBuilder("journal", BLOCK_TOKENS)
    for number, text in lines.lines:
        try:
            line = _json_object(text)
        except _Bad as error:
            if text.endswith("\n"):
                lines.bad(builder, number, str(error))
            continue
        event = line.get("event")
        kind = event.get("$") if isinstance(event, dict) else ""
        if kind == "InstanceJoined":
            sizes += [size for size in _block_tokens_in(event) if size not in sizes]
        elif kind in ("PlaceRequested", "OutcomeReported"):
            held.append((number, line))
    if len(sizes) > 1:
        raise BadArgument(f"{lines.path}: instances with blocks of {', '.join(map(str, sizes))} tokens in one journal")
    if sizes:
        builder.block_tokens = sizes[0]
    rows = _JournalRows(builder)
    for number, line in held:
        try:
            rows.take(line)
        except _Bad as error:
            lines.bad(builder, number, str(error))
    rows.finish()
    return builder


def _block_tokens_in(data: Any) -> list[int]:
    """Tokens a block of the instances found anywhere in journalled data, each once."""
    found: dict[int, None] = {}
    pending = [data]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            if item.get("$") == "InstanceInfo":
                groups = item.get("namespace", {}).get("groups", [])
                found.update((g["block_tokens"], None) for g in groups[:1] if type(g.get("block_tokens")) is int)
            else:
                pending += item.values()
        elif isinstance(item, list):
            pending += item
    return list(found)
