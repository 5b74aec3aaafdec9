"""Sections one by one: written and committed as they are computed, read as soon as they are committed.

For those who overlap computing, moving and reading of long blocks; whoever reads a section knows nothing of the others.
"""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from kvpool.channels.base import ChannelError, Memory, Rows, row_numbers
from kvpool.channels.sections import sections_as_blocks
from kvpool.core.errors import BadArgument
from kvpool.core.ids import NamespaceId, qualify
from kvpool.service import wire
from kvpool.service.client_reads import ReadingCalls, as_rows, lease_times
from kvpool.service.client_session import Session
from kvpool.service.client_types import Reservation, SectionsResult
from kvpool.service.client_writes import WritingCalls
from kvpool.service.source_calls import Keys, check_keys, key_list, left_s, ms
from kvpool.v1 import block_source_pb2 as pb
from kvpool.v1.common_pb2 import KeyList


class SectionCalls(ReadingCalls, WritingCalls):
    """What `PoolClient` does section by section."""

    def write_sections(
        self,
        reservation: Reservation,
        indices: NDArray[np.int64],
        sections: NDArray[np.int64],
        data: Memory,
        rows: Rows | None = None,
        *,
        deadline_s: float | None = None,
    ) -> NDArray[np.uint64]:
        """Moves single sections into reserved slots; readable after `commit_sections`, and not to be written again.

        Args:
            indices: which keys of the reservation; sections: which section of each; one element a section.
            data: uint8 (rows, >= section bytes), or one array a row; rows[i], or i, is the row of the i-th section.
        Returns: digests uint64 (sections,) for `commit_sections`.
        Raises: as `write`.
        """
        indices, sections = np.asarray(indices, dtype=np.int64), np.asarray(sections, dtype=np.int64)
        _check(sections, len(indices), reservation.slots.digests.shape[1])
        slots = sections_as_blocks(reservation.slots.take(indices), sections)
        chosen = None if rows is None else as_rows(rows, len(indices))
        return self._write(reservation, slots, data, chosen, deadline_s).ravel()

    def read_sections(
        self,
        namespace: NamespaceId,
        keys: Keys,
        sections: NDArray[np.int64],
        out: Memory,
        rows: Rows | None = None,
        *,
        group: int = 0,
        shard: int = 0,
        ttl_s: float = 30.0,
        promote_s: float = 5.0,
    ) -> SectionsResult:
        """Copies committed sections, of complete blocks or of those that are being written, each checked by its digest.

        `wait` tells of sections as they are committed. Exact blocks only.

        Args:
            keys: uint8 (n, 16); sections: int64 (n,); one row a section, a key as often as sections of it are wanted.
            out: uint8 (rows, >= section bytes), or one array a row; rows[i], or i, is the row for section i. Rows not
                found may hold anything.
            ttl_s: time within which the call has to be through.
            promote_s: as `get`.
        Raises: Unavailable, ChannelError: nothing was read. BadArgument.
        """
        begin_s = time.monotonic()
        check_keys(keys)
        sections = np.asarray(sections, dtype=np.int64)
        section_count = self._group(namespace, group).section_count
        _check(sections, len(keys), section_count)
        places = row_numbers(None if rows is None else as_rows(rows, len(keys)), len(keys), len(out))
        # Each block is asked for once, however many of its sections are.
        wanted, of_block = np.unique(keys, axis=0, return_inverse=True)
        of_block = of_block.reshape(-1)
        end_s = begin_s + ttl_s
        session, reply = self._lease_sections(namespace, key_list(wanted, group, shard), ttl_s, promote_s)
        found, corrupt = np.zeros(len(keys), dtype=np.bool_), np.zeros(len(keys), dtype=np.bool_)
        size = 0
        try:
            committed = np.zeros(len(keys), dtype=np.bool_)
            if reply.lease_id:
                committed = wire.array(reply.sections, np.int64)[of_block] >> sections & 1 == 1
            mine = np.flatnonzero(committed)
            if len(mine):
                blocks = wire.descriptors_from_proto(reply.blocks, qualify(wanted, group, shard), section_count)
                parts = sections_as_blocks(blocks.take(of_block[mine]), sections[mine])
                good = session.channel.read(reply.lease_id, parts, out, places[mine], deadline_s=left_s(end_s))
                found[mine] = good
                # A lease that ended meanwhile proves nothing bad.
                corrupt[mine] = ~good & (time.monotonic() < end_s)
                size = int(parts.sizes[good].sum(dtype=np.uint64))
        except ChannelError:
            self._count(channel_errors=1)
            raise
        finally:
            if reply.lease_id:
                release = pb.ReleaseRequest(session_id=session.id, lease_ids=[reply.lease_id])
                if corrupt.any():
                    release.namespace_id = namespace
                    release.corrupt.CopyFrom(key_list(np.unique(keys[corrupt], axis=0), group, shard))
                self._send_release(session, release, wait=bool(corrupt.any()), end_s=end_s)
        self._count(bytes_read=size, digest_errors=int(corrupt.sum()))
        return SectionsResult(found, corrupt, size, time.monotonic() - begin_s, session.channel.kind)

    def _lease_sections(
        self, namespace: NamespaceId, keys: KeyList, ttl_s: float, promote_s: float
    ) -> tuple[Session, pb.LeaseReply]:
        def lease(session: Session, time_s: float) -> tuple[Session, pb.LeaseReply]:
            timeout_s, promoting_s = lease_times(time_s, self._timeout_s, promote_s)
            request = pb.LeaseRequest(
                session_id=session.id, namespace_id=namespace, keys=keys, ttl_ms=ms(ttl_s),
                promote_ms=ms(promoting_s) if promoting_s else 0, incomplete=True,
            )  # fmt: skip
            return session, session.stub.Lease(request, timeout=timeout_s)

        return self._call(lease, timeout_s=ttl_s)


def _check(sections: NDArray[np.int64], count: int, section_count: int) -> None:
    """Raises: BadArgument."""
    if sections.shape != (count,):
        raise BadArgument(f"{sections.size} sections do not name one of each of {count} blocks")
    if count and not 0 <= int(sections.min()) <= int(sections.max()) < section_count:
        raise BadArgument(f"sections {sorted(set(sections.tolist()))[:8]} are not all below {section_count}")
