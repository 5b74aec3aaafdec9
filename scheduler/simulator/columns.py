"""Requests of a trace in columns: a million of them fit into memory, and each is an object only while it is looked at.

Pure. No files here: see `traces`.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import overload

import numpy as np
from numpy.typing import NDArray

Int64Array = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace.

    Fields:
        arrival_us: microseconds after the first request of the trace.
        output_tokens: generated, the first token counted.
        hash_ids: blocks of the prompt in order, equal ids for equal prefixes up to the block's end. Prompts of some
            traces end in the id of a partial block, so there are `prompt_tokens / block_tokens` of them, rounded up or
            down.
        session, tenant: empty where the trace does not tell.
        priority: higher goes first.
    """

    arrival_us: int
    prompt_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...]
    block_tokens: int
    session: str = ""
    tenant: str = ""
    priority: int = 0


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that was left out: its number, counted from 1, and what is wrong with it."""

    line: int
    problem: str


@dataclass(frozen=True, eq=False)
class Trace(Sequence[TraceRequest]):
    """Requests in order of arrival.

    Fields:
        kind: "mooncake", "azure", "journal", "kvpool" or "generated".
        block_tokens: tokens that one hash id stands for.
        arrival_us, prompt_tokens, output_tokens, priority: int64 (requests,).
        offsets: int64 (requests + 1,); request i has the ids `hash_ids[offsets[i] : offsets[i + 1]]`.
        hash_ids: int64 (references,).
        session, tenant: int64 (requests,), places in `names`.
        bad_lines: how many lines were left out; the first of them in `bad_examples`.
        notes: what whoever draws conclusions should know of this trace.
    """

    kind: str
    block_tokens: int
    arrival_us: Int64Array
    prompt_tokens: Int64Array
    output_tokens: Int64Array
    priority: Int64Array
    offsets: Int64Array
    hash_ids: Int64Array
    session: Int64Array
    tenant: Int64Array
    names: tuple[str, ...]
    bad_lines: int = 0
    bad_examples: tuple[BadLine, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.arrival_us)

    @overload
    def __getitem__(self, index: int) -> TraceRequest: ...
    @overload
    def __getitem__(self, index: slice) -> Trace: ...
    def __getitem__(self, index: int | slice) -> TraceRequest | Trace:
        """One request; of a slice, a trace of its own whose times are as they were."""
        if isinstance(index, slice):
            return self._chosen(np.arange(len(self), dtype=np.int64)[index])
        at = range(len(self))[index]
        return TraceRequest(
            arrival_us=int(self.arrival_us[at]),
            prompt_tokens=int(self.prompt_tokens[at]),
            output_tokens=int(self.output_tokens[at]),
            hash_ids=tuple(self.hash_ids[self.offsets[at] : self.offsets[at + 1]].tolist()),
            block_tokens=self.block_tokens,
            session=self.names[self.session[at]],
            tenant=self.names[self.tenant[at]],
            priority=int(self.priority[at]),
        )

    def __iter__(self) -> Iterator[TraceRequest]:
        for at in range(len(self)):
            yield self[at]

    @property
    def duration_us(self) -> int:
        """From the first arrival to the last."""
        return int(self.arrival_us[-1] - self.arrival_us[0]) if len(self) else 0

    def sped_up(self, factor: float) -> Trace:
        """The same requests, `factor` times as many of them a second."""
        assert factor > 0
        return replace(self, arrival_us=(self.arrival_us / factor).astype(np.int64))

    def between(self, begin_us: int, end_us: int) -> Trace:
        """Requests that arrive from `begin_us` to before `end_us`, with the clock set to zero at `begin_us`."""
        first, end = np.searchsorted(self.arrival_us, [begin_us, end_us])
        part = self[int(first) : int(end)]
        return replace(part, arrival_us=part.arrival_us - begin_us)

    def _chosen(self, rows: Int64Array) -> Trace:
        """Some of the requests, in the order of `rows`."""
        counts = self.offsets[rows + 1] - self.offsets[rows]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        # Place of each reference: its place in its own request, added to where that request begins.
        places = np.arange(int(offsets[-1]), dtype=np.int64)
        places += np.repeat(self.offsets[rows] - offsets[:-1], counts)
        columns = ("arrival_us", "prompt_tokens", "output_tokens", "priority", "session", "tenant")
        chosen = {name: getattr(self, name)[rows] for name in columns}
        return replace(self, offsets=offsets, hash_ids=self.hash_ids[places], **chosen)


class TraceBuilder:
    """Takes requests one after another, in any order of time, and makes a trace of them."""

    def __init__(self, kind: str, block_tokens: int) -> None:
        assert block_tokens > 0
        self.kind, self.block_tokens = kind, block_tokens
        self._columns: dict[str, array[int]] = {
            name: array("q")
            for name in ("arrival_us", "prompt_tokens", "output_tokens", "priority", "session", "tenant")
        }
        self._ends, self._hash_ids = array("q"), array("q")
        self._names: dict[str, int] = {"": 0}
        self.bad_lines = 0
        self.bad_examples: list[BadLine] = []
        self.notes: list[str] = []

    def __len__(self) -> int:
        return len(self._ends)

    def add(
        self,
        arrival_us: int,
        prompt_tokens: int,
        output_tokens: int,
        hash_ids: Sequence[int],
        session: str = "",
        tenant: str = "",
        priority: int = 0,
    ) -> int:
        """Takes one request; whatever is wrong with its numbers leaves no trace of it.

        Returns: its row, for `set_output_tokens`.
        Raises: TypeError, OverflowError for numbers that are not 64-bit integers.
        """
        ids = array("q", hash_ids)
        row = array("q", (arrival_us, prompt_tokens, output_tokens, priority, self._name(session), self._name(tenant)))
        self._hash_ids.extend(ids)
        self._ends.append(len(self._hash_ids))
        for column, value in zip(self._columns.values(), row, strict=True):
            column.append(value)
        return len(self._ends) - 1

    def set_output_tokens(self, row: int, output_tokens: int) -> None:
        self._columns["output_tokens"][row] = output_tokens

    def _name(self, name: str) -> int:
        return self._names.setdefault(name, len(self._names))

    def build(self) -> Trace:
        """Everything taken, sorted by arrival (equal times in the order of `add`), the first at time zero."""
        columns = {name: np.array(column, dtype=np.int64) for name, column in self._columns.items()}
        offsets = np.concatenate([np.zeros(1, np.int64), np.array(self._ends, dtype=np.int64)])
        trace = Trace(
            self.kind,
            self.block_tokens,
            offsets=offsets,
            hash_ids=np.array(self._hash_ids, dtype=np.int64),
            names=tuple(self._names),
            bad_lines=self.bad_lines,
            bad_examples=tuple(self.bad_examples),
            notes=tuple(self.notes),
            **columns,
        )
        if not len(trace):
            return trace
        arrival_us = columns["arrival_us"]
        if (arrival_us[1:] < arrival_us[:-1]).any():
            trace = trace._chosen(np.argsort(arrival_us, kind="stable"))
        return replace(trace, arrival_us=trace.arrival_us - trace.arrival_us[0])
