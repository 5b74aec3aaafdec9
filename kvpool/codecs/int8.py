"""The int8 codec: K with a scale per layer, head and channel, V with one per layer, head and token.

K has channels that are large in every token, V has tokens that are large: each gets the scale that follows it. A stored
section describes itself, little-endian, padded with zeros to multiples of 64 bytes:

    header        64 bytes, `HEADER`
    K scales      bfloat16 (layers, kv_heads, head_dim)
    V scales      bfloat16 (layers, block_tokens, kv_heads), then padding
    values        int8 (layers, 2, block_tokens, kv_heads, head_dim), then padding

An element is value times scale. Scales are rounded up to bfloat16: half the bytes of float32 (with blocks of 16 tokens
they would be a fifth of the whole), its full range, and products that are exact in float32. A raw section has the
element bytes of the block behind its header instead.

The error of a section is the worst of its tiles, a tile being the K or the V of one layer: rms(x - decoded) / rms(x),
with the rounding of what is decoded to its own dtype. So V can't hide behind a K that is ten times as large. A section
with a larger error than `error_max`, or with a value that is not finite, breaks the bound. What then happens depends on
where the bytes go:

 * into slots (`encode`): a stored block has one size, known before it is encoded. A block with a section that breaks
   the bound is not encoded: `ok` is False, and it is stored as exact bytes under another reservation.
 * onto channels (`encode_mixed`): such a section travels raw and the others as int8; sizes differ from block to block.

Bytes must be verified before they are decoded: a digest covers the stored bytes. Headers are checked all the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvpool.codecs.errors import CorruptBlock
from kvpool.codecs.layout import ELEMENT_BYTES, KvLayout, Memory, check_writable, row_addresses
from kvpool.core.errors import BadArgument
from kvpool.core.ids import Fidelity
from kvpool.core.kernels import int8 as kernels
from kvpool.core.kernels.int8 import ALIGN_BYTES, HEADER_BYTES, SCALE_BYTES
from kvpool.core.namespace import GroupSpec

ERROR_MAX_DEFAULT = 0.01

MAGIC = 0x3849564B  # "KVI8"
VERSION = 1
FORM_INT8, FORM_RAW = 0, 1
DTYPE_CODES = {"float32": kernels.FLOAT32, "float16": kernels.FLOAT16, "bfloat16": kernels.BFLOAT16}

HEADER = np.dtype(
    {
        "names": [
            "magic", "version", "form", "dtype", "layers", "block_tokens", "kv_heads", "head_dim", "error_max", "error",
        ],
        "formats": ["<u4", "u1", "u1", "u1", "<u4", "<u4", "<u4", "<u4", "<f4", "<f4"],
        "offsets": [0, 4, 5, 6, 8, 12, 16, 20, 24, 28],
        "itemsize": HEADER_BYTES,
    }
)  # fmt: skip


_FORM_AT, _ERRORS_AT = 5, 24


@dataclass(frozen=True, slots=True)
class EncodeResult:
    """What became of blocks, in the order given."""

    ok: NDArray[np.bool_]  # (n,): False = `out` holds nothing useful, keep the block exact
    error: NDArray[np.float32]  # (n, sections): of int8; infinite where a value is not finite
    fell_back: NDArray[np.bool_]  # (n, sections): sections that break the bound
    sizes: NDArray[np.int64]  # (n,): bytes of each stored block; 0 where not ok


class Int8:
    """Stores blocks as int8 within a bound. Stateless; calls release the GIL and may run side by side."""

    fidelity = Fidelity.INT8

    def __init__(self, error_max: float = ERROR_MAX_DEFAULT) -> None:
        """Args: error_max: largest relative RMS error of a section, 0 < error_max < 1. Raises: BadArgument."""
        if not 0 < error_max < 1:
            raise BadArgument(f"error_max must be between 0 and 1, not {error_max}", hint="0.01 is one per cent")
        self.error_max = error_max

    def stored_bytes(self, group: GroupSpec) -> int:
        """Bytes of one stored block of `group` if no section breaks the bound: what to reserve.

        Raises: Unsupported if its elements can't be told apart.
        """
        return stored_bytes(_layout_by_size(group))

    def encode(
        self,
        blocks: Memory,
        out: Memory,
        layout: KvLayout,
        rows: NDArray[np.int64] | None = None,
        out_rows: NDArray[np.int64] | None = None,
    ) -> EncodeResult:
        """Encodes blocks to rows of `stored_bytes` bytes.

        Args:
            blocks: rows of `layout.block_bytes` bytes; nobody writes them meanwhile.
            out: rows of at least `stored_bytes(layout)` bytes; bytes beyond stay as they are.
            rows, out_rows: int64 (n,): which row of each for block i; None = 0, 1, 2, ...
        Raises: BadArgument for memory that does not fit.
        """
        return self._encode(blocks, out, layout, rows, out_rows, stored_bytes(layout), mixed=False)

    def encode_mixed(
        self,
        blocks: Memory,
        out: Memory,
        layout: KvLayout,
        rows: NDArray[np.int64] | None = None,
        out_rows: NDArray[np.int64] | None = None,
    ) -> EncodeResult:
        """As `encode`, but sections that break the bound stand raw between the others, and every block is ok.

        Args: out: rows of at least `mixed_bytes_max(layout)` bytes, of which `sizes` say how many are used.
        """
        return self._encode(blocks, out, layout, rows, out_rows, mixed_bytes_max(layout), mixed=True)

    def decode(
        self,
        encoded: Memory,
        out: Memory,
        layout: KvLayout,
        rows: NDArray[np.int64] | None = None,
        out_rows: NDArray[np.int64] | None = None,
        sizes: NDArray[np.int64] | None = None,
    ) -> None:
        """Decodes blocks of either form.

        Args:
            encoded: rows of verified bytes.
            out: rows of at least `layout.block_bytes` bytes.
            sizes: int64 (n,): bytes of each stored block; None = `stored_bytes(layout)` each.
        Raises: CorruptBlock if a header is not that of such a block: nothing was written then. BadArgument for memory
            that does not fit.
        """
        rows, out_rows = _both_rows(encoded, rows, out_rows)
        if sizes is None:
            sizes = np.full(len(rows), stored_bytes(layout), dtype=np.int64)
        if len(sizes) != len(rows):
            raise BadArgument(f"{len(sizes)} sizes for {len(rows)} blocks")
        check_writable(out, "out")
        raw, offsets = read_headers(encoded, rows, sizes, layout)
        kernels.decode_blocks(
            row_addresses(encoded, rows, 0, "encoded"), row_addresses(out, out_rows, layout.block_bytes, "out"),
            _shape(layout), raw, offsets,
        )  # fmt: skip

    def _encode(
        self,
        blocks: Memory,
        out: Memory,
        layout: KvLayout,
        rows: NDArray[np.int64] | None,
        out_rows: NDArray[np.int64] | None,
        row_bytes: int,
        *,
        mixed: bool,
    ) -> EncodeResult:
        rows, out_rows = _both_rows(blocks, rows, out_rows)
        check_writable(out, "out")
        sources = row_addresses(blocks, rows, layout.block_bytes, "blocks")
        targets = row_addresses(out, out_rows, row_bytes, "out")
        shape = (len(rows), layout.section_count)
        error, raw = np.empty(shape, dtype=np.float32), np.empty(shape, dtype=np.bool_)
        offsets = np.empty(shape, dtype=np.int64)
        kernels.encode_blocks(sources, targets, _shape(layout), self.error_max, mixed, error, raw, offsets)
        self._write_headers(out, out_rows, layout, error, raw, offsets)
        if mixed:
            sizes = np.where(raw, _raw_bytes(layout), _section_bytes(layout)).sum(axis=1, dtype=np.int64)
            return EncodeResult(np.ones(len(rows), dtype=np.bool_), error, raw, sizes)
        ok: NDArray[np.bool_] = np.asarray(~raw.any(axis=1))
        return EncodeResult(ok, error, raw, np.where(ok, stored_bytes(layout), 0).astype(np.int64))

    def _write_headers(
        self,
        out: Memory,
        rows: NDArray[np.int64],
        layout: KvLayout,
        error: NDArray[np.float32],
        raw: NDArray[np.bool_],
        offsets: NDArray[np.int64],
    ) -> None:
        # As bytes: numpy copies fields alone, and would leave what lies between them to chance.
        content = np.zeros((*raw.shape, HEADER_BYTES), dtype=np.uint8)
        content[...] = np.frombuffer(_header_of(layout).tobytes(), dtype=np.uint8)
        headers = content.view(HEADER)[..., 0]
        headers["form"] = np.where(raw, FORM_RAW, FORM_INT8)
        headers["error_max"] = self.error_max
        headers["error"] = np.where(raw, np.float32(0), error)
        for i, row in enumerate(rows.tolist()):
            for section, offset in enumerate(offsets[i].tolist()):
                out[row][offset : offset + HEADER_BYTES] = content[i, section]


def read_headers(
    encoded: Memory, rows: NDArray[np.int64], sizes: NDArray[np.int64], layout: KvLayout
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Form (True = raw) and first byte of each section; bool and int64 (n, sections).

    Raises: CorruptBlock if a header or a size is not that of a stored block of this layout, BadArgument if a row is
        shorter than its size.
    """
    shape = (len(rows), layout.section_count)
    raw, offsets = np.empty(shape, dtype=np.bool_), np.empty(shape, dtype=np.int64)
    expected = _header_of(layout)
    before, after = expected.tobytes()[:_FORM_AT], expected.tobytes()[_FORM_AT + 1 : _ERRORS_AT]
    for i, (row, size) in enumerate(zip(rows.tolist(), sizes.tolist(), strict=True)):
        row_addresses(encoded, rows[i : i + 1], size, "encoded")
        stored, at = encoded[row], 0
        for section in range(layout.section_count):
            if at + HEADER_BYTES > size:
                raise _corrupt(i, section, f"the block ends at byte {size}")
            header = stored[at : at + HEADER_BYTES].tobytes()
            form = header[_FORM_AT]
            if header[:_FORM_AT] != before or header[_FORM_AT + 1 : _ERRORS_AT] != after:
                raise _corrupt(i, section, _difference(np.frombuffer(header, dtype=HEADER)[0], expected))
            if form not in (FORM_INT8, FORM_RAW):
                raise _corrupt(i, section, f"form {form} is not known")
            raw[i, section], offsets[i, section] = form == FORM_RAW, at
            at += _raw_bytes(layout) if form == FORM_RAW else _section_bytes(layout)
        if at != size:
            raise _corrupt(i, layout.section_count - 1, f"its sections take {at} bytes, not {size}")
    return raw, offsets


def stored_bytes(layout: KvLayout) -> int:
    """Bytes of a stored block all of whose sections are int8: a multiple of 64 for each section."""
    return layout.section_count * _section_bytes(layout)


def mixed_bytes_max(layout: KvLayout) -> int:
    """Most bytes that `encode_mixed` writes for a block."""
    return layout.section_count * max(_section_bytes(layout), _raw_bytes(layout))


def _layout_by_size(group: GroupSpec) -> KvLayout:
    """The layout with the dtype that fits the size of a block: float16 and bfloat16 are stored in the same size."""
    wide = 2 * len(group.layers) * group.block_tokens * group.kv_heads * group.head_dim * ELEMENT_BYTES["float32"]
    return KvLayout.of_group(group, "float32" if group.block_bytes == wide else "bfloat16")


def _section_bytes(layout: KvLayout) -> int:
    scales = layout.kv_heads * (layout.head_dim + layout.block_tokens) * layout.section_layers * SCALE_BYTES
    values = 2 * layout.section_layers * layout.block_tokens * layout.kv_heads * layout.head_dim
    return _padded(HEADER_BYTES + scales) + _padded(values)


def _raw_bytes(layout: KvLayout) -> int:
    return _padded(HEADER_BYTES + layout.section_bytes)


def _padded(size_bytes: int) -> int:
    return -(-size_bytes // ALIGN_BYTES) * ALIGN_BYTES


def _shape(layout: KvLayout) -> NDArray[np.int64]:
    return np.array(
        [
            layout.section_count, layout.section_layers, layout.block_tokens, layout.kv_heads, layout.head_dim,
            DTYPE_CODES[layout.dtype], _section_bytes(layout),
        ],
        dtype=np.int64,
    )  # fmt: skip


def _header_of(layout: KvLayout) -> NDArray[np.void]:
    """The header of an int8 section, without its errors."""
    header = np.zeros((), dtype=HEADER)
    header["magic"], header["version"], header["form"] = MAGIC, VERSION, FORM_INT8
    header["dtype"], header["layers"] = DTYPE_CODES[layout.dtype], layout.section_layers
    header["block_tokens"], header["kv_heads"] = layout.block_tokens, layout.kv_heads
    header["head_dim"] = layout.head_dim
    return header


def _difference(header: np.void, expected: NDArray[np.void]) -> str:
    """Which field of a header is wrong."""
    for name in ("magic", "version", "dtype", "layers", "block_tokens", "kv_heads", "head_dim"):
        if header[name] != expected[name]:
            return f"{name} is {header[name]}, not {expected[name]}"
    return "unused bytes of its header are not zero"


def _both_rows(
    sources: Memory, rows: NDArray[np.int64] | None, out_rows: NDArray[np.int64] | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    rows = np.arange(len(sources), dtype=np.int64) if rows is None else np.asarray(rows, dtype=np.int64)
    out_rows = np.arange(len(rows), dtype=np.int64) if out_rows is None else np.asarray(out_rows, dtype=np.int64)
    if len(rows) != len(out_rows):
        raise BadArgument(f"{len(rows)} rows to read, {len(out_rows)} to write")
    return rows, out_rows


def _corrupt(block: int, section: int, why: str) -> CorruptBlock:
    return CorruptBlock(
        f"block {block}, section {section} is not int8 of this layout: {why}",
        hint="treat it as a miss; were its digest and its namespace checked?",
    )
