"""The inner loops of XXH3's long input, in vector code: each 64-byte stripe is loaded once, hashed, and stored.

Written as LLVM IR, since the value that is hashed must be the value that is stored (a volatile load is never repeated),
and since accumulators must stay in registers. LLVM makes of a vector of 8 what the CPU has: one AVX-512 register, two
of AVX2, four of SSE2 or NEON. Every intrinsic takes addresses (uint64); nothing is checked here.
Source: Yann Collet, xxHash 0.8, xxhash.h.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

STRIPE_BYTES = 64
BLOCK_STRIPES = 16
BLOCK_BYTES = STRIPE_BYTES * BLOCK_STRIPES
#: Pages that are copied side by side, and how much of one at a time.
_PAGE_BYTES, _TURN_BYTES = 4096, 4 * STRIPE_BYTES
GROUP_BYTES = 4 * _PAGE_BYTES
#: How far ahead of loads and of plain stores memory is asked for: the CPU's own prefetching stops at each page, and
#: does not fetch what is about to be stored to.
LOAD_AHEAD_BYTES, STORE_AHEAD_BYTES = 2048, 1024

_P32_1 = 0x9E3779B1
_I64 = ir.IntType(64)
_LANES = ir.VectorType(_I64, 8)
_SWAPPED = ir.Constant(ir.VectorType(ir.IntType(32), 8), [1, 0, 3, 2, 5, 4, 7, 6])

#: What becomes of a stripe besides being hashed: nothing, a store, or a store that bypasses the caches.
Store = Literal["none", "plain", "streaming"]


class _VolatileLoad(ir.instructions.LoadInstr):  # type: ignore[misc]
    """A load that LLVM neither repeats nor drops. llvmlite's builder has none."""

    def descr(self, buf: list[str]) -> None:
        pointer = self.operands[0]
        buf.append(f"load volatile {self.type}, {pointer.type} {pointer.get_reference()}, align {self.align}\n")


def _splat(value: int) -> ir.Constant:
    return ir.Constant(_LANES, [value] * 8)


def _offset(builder: Any, address: Any, count: int) -> Any:
    return builder.add(address, ir.Constant(_I64, count)) if count else address


def _lanes_at(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _LANES.as_pointer())


def _load_shared(builder: Any, address: Any) -> Any:
    load = _VolatileLoad(builder.block, _lanes_at(builder, address), typ=_LANES)
    load.align = 1
    builder._insert(load)
    return load


def _load(builder: Any, address: Any) -> Any:
    return builder.load(_lanes_at(builder, address), align=1, typ=_LANES)


def _store(builder: Any, value: Any, address: Any, store: Store) -> None:
    if store == "none":
        return
    instruction = builder.store(value, _lanes_at(builder, address), align=64 if store == "streaming" else 1)
    if store == "streaming":
        instruction.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))


def _prefetch(builder: Any, address: Any, *, to_store: bool = False) -> None:
    byte = ir.IntType(8).as_pointer()
    numbers = [ir.IntType(32)] * 3
    signature = ir.FunctionType(ir.VoidType(), [byte, *numbers])
    function = builder.module.declare_intrinsic("llvm.prefetch", [byte], signature)
    access, keep, data = (ir.Constant(ir.IntType(32), value) for value in (int(to_store), 3, 1))
    builder.call(function, [builder.inttoptr(address, byte), access, keep, data])


def _accumulate(builder: Any, accumulators: Any, data: Any, secret: Any) -> Any:
    keyed = builder.xor(data, secret)
    product = builder.mul(builder.and_(keyed, _splat(0xFFFFFFFF)), builder.lshr(keyed, _splat(32)))
    swapped = builder.shuffle_vector(data, data, _SWAPPED)
    # The sum of the two first: one addition less between a stripe's accumulators and the next one's.
    return builder.add(accumulators, builder.add(product, swapped))


def _scramble(builder: Any, accumulators: Any, secret: Any) -> Any:
    mixed = builder.xor(builder.xor(accumulators, builder.lshr(accumulators, _splat(47))), secret)
    # By halves of 32 bits: there is no fast product of 64.
    low = builder.mul(builder.and_(mixed, _splat(0xFFFFFFFF)), _splat(_P32_1))
    high = builder.mul(builder.lshr(mixed, _splat(32)), _splat(_P32_1))
    return builder.add(low, builder.shl(high, _splat(32)))


_SIGNATURE = types.void(types.uint64, types.uint64, types.uint64, types.uint64, types.uint64)


def _hash_blocks(store: Store) -> Callable[..., Any]:
    """(source, target, blocks, accumulators, secret): moves and hashes whole blocks of 16 stripes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, target, count, state, secret = arguments
        accumulators = cgutils.alloca_once_value(builder, _load(builder, state))
        with cgutils.for_range(builder, count, intp=_I64) as loop:
            at = builder.mul(loop.index, ir.Constant(_I64, BLOCK_BYTES))
            begin, end = builder.add(source, at), builder.add(target, at)
            value = builder.load(accumulators)
            for stripe in range(BLOCK_STRIPES):
                _prefetch(builder, _offset(builder, begin, STRIPE_BYTES * stripe + LOAD_AHEAD_BYTES))
                if store == "plain":
                    _prefetch(builder, _offset(builder, end, STRIPE_BYTES * stripe + STORE_AHEAD_BYTES), to_store=True)
                data = _load_shared(builder, _offset(builder, begin, STRIPE_BYTES * stripe))
                value = _accumulate(builder, value, data, _load(builder, _offset(builder, secret, 8 * stripe)))
                _store(builder, data, _offset(builder, end, STRIPE_BYTES * stripe), store)
            value = _scramble(builder, value, _load(builder, _offset(builder, secret, 8 * BLOCK_STRIPES)))
            builder.store(value, accumulators)
        builder.store(builder.load(accumulators), _lanes_at(builder, state), align=1)
        return context.get_dummy_value()

    def typed(typing_context: Any, source: Any, target: Any, count: Any, state: Any, secret: Any) -> Any:
        return _SIGNATURE, generate

    return intrinsic(typed)


def _hash_stripes(store: Store) -> Callable[..., Any]:
    """(source, target, stripes, accumulators, secret): moves and hashes single stripes; `secret` moves on by 8 each."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, target, count, state, secret = arguments
        accumulators = cgutils.alloca_once_value(builder, _load(builder, state))
        with cgutils.for_range(builder, count, intp=_I64) as loop:
            at = builder.mul(loop.index, ir.Constant(_I64, STRIPE_BYTES))
            key = _load(builder, builder.add(secret, builder.mul(loop.index, ir.Constant(_I64, 8))))
            data = _load_shared(builder, builder.add(source, at))
            builder.store(_accumulate(builder, builder.load(accumulators), data, key), accumulators)
            _store(builder, data, builder.add(target, at), store)
        builder.store(builder.load(accumulators), _lanes_at(builder, state), align=1)
        return context.get_dummy_value()

    def typed(typing_context: Any, source: Any, target: Any, count: Any, state: Any, secret: Any) -> Any:
        return _SIGNATURE, generate

    return intrinsic(typed)


hash_blocks = _hash_blocks("none")
hash_blocks_storing = _hash_blocks("plain")
hash_blocks_streaming = _hash_blocks("streaming")
hash_stripes = _hash_stripes("none")
hash_stripes_storing = _hash_stripes("plain")
hash_stripes_streaming = _hash_stripes("streaming")


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def stream_blocks(typing_context: Any, source: Any, target: Any, count: Any) -> Any:
    """Copies blocks of 1024 bytes with stores that bypass the caches; `target` is a multiple of 64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        with cgutils.for_range(builder, arguments[2], intp=_I64) as loop:
            at = builder.mul(loop.index, ir.Constant(_I64, BLOCK_BYTES))
            begin, end = builder.add(arguments[0], at), builder.add(arguments[1], at)
            for stripe in range(BLOCK_STRIPES):
                _prefetch(builder, _offset(builder, begin, STRIPE_BYTES * stripe + LOAD_AHEAD_BYTES))
                data = _load_shared(builder, _offset(builder, begin, STRIPE_BYTES * stripe))
                _store(builder, data, _offset(builder, end, STRIPE_BYTES * stripe), "streaming")
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64, types.uint64), generate


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def stream_groups(typing_context: Any, source: Any, target: Any, count: Any) -> Any:
    """Copies groups of GROUP_BYTES with stores that bypass the caches; `target` is a multiple of 64.

    A few stripes of each of a group's pages in turn: the CPU then fetches ahead in all of them, and memory has more of
    its banks open. About a tenth quicker than page after page.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        with cgutils.for_range(builder, arguments[2], intp=_I64) as group:
            first = builder.mul(group.index, ir.Constant(_I64, GROUP_BYTES))
            with cgutils.for_range(builder, ir.Constant(_I64, _PAGE_BYTES // _TURN_BYTES), intp=_I64) as turn:
                at = builder.add(first, builder.mul(turn.index, ir.Constant(_I64, _TURN_BYTES)))
                begin, end = builder.add(arguments[0], at), builder.add(arguments[1], at)
                for page in range(0, GROUP_BYTES, _PAGE_BYTES):
                    places = range(page, page + _TURN_BYTES, STRIPE_BYTES)
                    stripes = [_load_shared(builder, _offset(builder, begin, place)) for place in places]
                    for place, data in zip(places, stripes, strict=True):
                        _store(builder, data, _offset(builder, end, place), "streaming")
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64, types.uint64), generate


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def move_bytes(typing_context: Any, source: Any, target: Any, count: Any) -> Any:
    """memcpy of memory that does not overlap."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        begin, end = builder.inttoptr(arguments[0], byte), builder.inttoptr(arguments[1], byte)
        function = builder.module.declare_intrinsic("llvm.memcpy", [byte, byte, _I64])
        # Volatile, so that what is read from the copy is never read from the shared original instead.
        builder.call(function, [end, begin, arguments[2], ir.Constant(ir.IntType(1), 1)])
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64, types.uint64), generate


def _load_number(bits: int) -> Callable[..., Any]:
    """The little-endian number of so many bits at an address, of any alignment."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = ir.IntType(bits)
        value = builder.load(builder.inttoptr(arguments[0], number.as_pointer()), align=1, typ=number)
        return value if bits == 64 else builder.zext(value, _I64)

    def typed(typing_context: Any, address: Any) -> Any:
        return types.uint64(types.uint64), generate

    return intrinsic(typed)


load_8, load_32, load_64 = _load_number(8), _load_number(32), _load_number(64)
