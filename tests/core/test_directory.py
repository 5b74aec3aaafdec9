"""The directory against sources that know what they hold, behind a line that loses, repeats and delays messages."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvpool.core import replicas
from kvpool.core.changes import BlockChange, ChangeKind
from kvpool.core.directory import ASK_AGAIN_US, Applied, Directory, DirectoryConfig, SourceRecord
from kvpool.core.errors import BadArgument, BadKeyLength, Overloaded
from kvpool.core.ids import Fidelity, Tier
from kvpool.core.kernels import directory as directory_kernels
from kvpool.core.replicas import ReplicaTable

EXACT, INT8 = Fidelity.EXACT, Fidelity.INT8
UNIVERSE = 12


def key(number):
    """Small numbers, most of them far from hashes."""
    return number.to_bytes(8, "little") + (number % 3).to_bytes(8, "little")


def keys_array(packed):
    return np.frombuffer(b"".join(packed), dtype=np.uint8).reshape(-1, 16)


def stored(*numbers, fidelity=EXACT):
    return BlockChange(ChangeKind.STORED, b"".join(key(n) for n in numbers), fidelity)


def removed(*numbers):
    return BlockChange(ChangeKind.REMOVED, b"".join(key(n) for n in numbers))


CLEARED = BlockChange(ChangeKind.CLEARED, b"")


def record(name, epoch=1, tier=Tier.DRAM):
    return SourceRecord(name, epoch, tier, f"{name}:1", "host", "", 1 << 30)


def held(directory, name):
    keys, fidelities = directory.held(name)
    return {bytes(k): int(f) for k, f in zip(keys, fidelities, strict=True)}


def runs_oracle(holders, keys):
    """Match by definition. `holders`: source -> {key: fidelity}."""
    covered = 0
    while covered < len(keys) and any(keys[covered] in holding for holding in holders.values()):
        covered += 1
    runs = []
    for name in sorted(holders):
        last = None
        for i in range(covered):
            fidelity = holders[name].get(keys[i])
            if fidelity is None:
                last = None
            elif last is not None and last[3] == fidelity:
                last[2] += 1
            else:
                last = [name, i, 1, fidelity]
                runs.append(last)
    return covered, [tuple(run) for run in runs]


def found(match):
    return match.covered, [(r.source, r.first, r.count, int(r.fidelity)) for r in match.runs]


@dataclass
class TrueSource:
    """What a source really holds after each of its batches, and what it has sent."""

    epoch: int
    states: list[dict] = field(default_factory=lambda: [{}])
    batches: list[list] = field(default_factory=lambda: [[]])

    def change(self, changes):
        state = dict(self.states[-1])
        for change in changes:
            keys = [change.keys[i : i + 16] for i in range(0, len(change.keys), 16)]
            if change.kind is ChangeKind.STORED:
                state.update(dict.fromkeys(keys, int(change.fidelity)))
            elif change.kind is ChangeKind.REMOVED:
                for k in keys:
                    state.pop(k, None)
            else:
                state.clear()
        self.states.append(state)
        self.batches.append(changes)

    def snapshot(self, seq, part_keys):
        """Parts as (part, last, keys, fidelity); at least one."""
        parts = []
        for fidelity in (EXACT, INT8):
            keys = [k for k, f in self.states[seq].items() if f == fidelity]
            parts += [(keys[i : i + part_keys], fidelity) for i in range(0, len(keys), part_keys)]
        parts = parts or [([], EXACT)]
        return [(i, i == len(parts) - 1, b"".join(keys), fid) for i, (keys, fid) in enumerate(parts)]


NUMBERS = st.lists(st.integers(0, UNIVERSE - 1), min_size=1, max_size=6)
CHANGES = st.lists(
    st.one_of(
        st.builds(lambda n, f: stored(*n, fidelity=f), NUMBERS, st.sampled_from([EXACT, INT8])),
        st.builds(lambda n: removed(*n), NUMBERS),
        st.just(CLEARED),
    ),
    max_size=3,
)
NAMES = st.sampled_from(["a", "b", "c"])


class DirectoryMachine(RuleBasedStateMachine):
    """A directory that says it is in step with a source must know exactly what the source held then."""

    def __init__(self):
        super().__init__()
        self.directory = Directory(DirectoryConfig(sources_max=3, late_keys_max=8))
        self.sources = {}
        self.epoch = 0
        self.now_us = 0
        self.parts = []  # a snapshot under way: (name, epoch, seq, parts left)

    @rule(name=NAMES)
    def attach(self, name):
        self.epoch += 1
        self.sources[name] = TrueSource(self.epoch)
        self.directory.attach(record(name, self.epoch), self.now_us)
        assert held(self.directory, name) == {}

    @rule(name=NAMES)
    def detach(self, name):
        self.sources.pop(name, None)
        self.directory.detach(name)

    @precondition(lambda self: self.sources)
    @rule(data=st.data(), changes=CHANGES, delivered=st.booleans())
    def change(self, data, changes, delivered):
        name = data.draw(st.sampled_from(sorted(self.sources)))
        source = self.sources[name]
        source.change(changes)
        if delivered:
            self.deliver(name, len(source.batches) - 1)

    @precondition(lambda self: self.sources)
    @rule(data=st.data())
    def repeat(self, data):
        name = data.draw(st.sampled_from(sorted(self.sources)))
        count = len(self.sources[name].batches)
        if count > 1:
            self.deliver(name, data.draw(st.integers(1, count - 1)))

    def deliver(self, name, seq):
        source = self.sources[name]
        before = self.directory.synced(name)
        applied = self.directory.apply(name, source.epoch, seq, source.batches[seq], self.now_us)
        after = self.directory.synced(name)
        assert applied.acknowledged == after[0]
        assert after[1] or after[0] == before[0], "nothing is applied while a snapshot is missing"
        if before[1] and not after[1]:
            assert applied.want_snapshot, "a gap is told at once"

    @precondition(lambda self: self.sources)
    @rule(data=st.data(), part_keys=st.integers(1, 5), back=st.integers(0, 2))
    def begin_snapshot(self, data, part_keys, back):
        name = data.draw(st.sampled_from(sorted(self.sources)))
        source = self.sources[name]
        seq = max(len(source.states) - 1 - back, 0)
        self.parts.append((name, source.epoch, seq, source.snapshot(seq, part_keys)))

    @precondition(lambda self: self.parts)
    @rule(which=st.integers(0, 10), lost=st.integers(0, 5))
    def send_part(self, which, lost):
        name, epoch, seq, left = self.parts[which % len(self.parts)]
        part, last, keys, fidelity = left.pop(0)
        if not left:
            self.parts.pop(which % len(self.parts))
        if lost:
            before = held(self.directory, name)
            self.directory.apply_snapshot_part(name, epoch, seq, part, last, keys, fidelity, self.now_us)
            assert last or held(self.directory, name) == before, "all at once"

    @rule(name=NAMES, changes=CHANGES)
    def speak_from_the_grave(self, name, changes):
        before = held(self.directory, name)
        assert self.directory.apply(name, 0, 1, changes, self.now_us) == Applied(0, True)
        part = self.directory.apply_snapshot_part(name, 0, 99, 0, True, key(1), EXACT, self.now_us)
        assert part == Applied(0, True)
        assert held(self.directory, name) == before

    @rule(gap_us=st.integers(0, 2 * ASK_AGAIN_US))
    def time_passes(self, gap_us):
        self.now_us += gap_us

    @rule(numbers=st.lists(st.integers(0, UNIVERSE), max_size=UNIVERSE))
    def match(self, numbers):
        packed = [key(n) for n in numbers]
        holders = {name: held(self.directory, name) for name in self.sources}
        covered, runs = runs_oracle(holders, packed)
        assert found(self.directory.match(keys_array(packed))) == (covered, runs)
        # The same as rows, by number of source.
        by_number = {self.directory.number_of(name): name for name in self.sources}
        assert len(by_number) == len(self.sources) and all(number >= 0 for number in by_number)
        covered_rows, rows = self.directory.match_rows(keys_array(packed))
        assert (rows.dtype, rows.shape[1]) == (np.int32, 4)
        assert (covered_rows, sorted((by_number[n], *run) for n, *run in rows.tolist())) == (covered, runs)

    @invariant()
    def in_step_means_equal(self):
        self.directory.check_invariants()
        assert [str(r.source_id) for r in self.directory.sources()] == sorted(self.sources)
        replicas, distinct = 0, {}
        for name, source in self.sources.items():
            seq, in_step = self.directory.synced(name)
            known = held(self.directory, name)
            if in_step:
                assert known == source.states[seq]
            assert len(known) == self.directory.held_count(name)
            replicas += len(known)
            distinct.update(known)
        counts = self.directory.counts()
        assert (counts.blocks, counts.replicas, counts.refused) == (len(distinct), replicas, 0)

    def teardown(self):
        # Whatever was lost: one whole snapshot, and the directory knows all.
        for name, source in self.sources.items():
            seq = len(source.states) - 1
            for part, last, keys, fidelity in source.snapshot(seq, 4):
                applied = self.directory.apply_snapshot_part(
                    name, source.epoch, seq, part, last, keys, fidelity, self.now_us
                )
            assert applied == Applied(seq, False)
            assert held(self.directory, name) == source.states[-1]
        for name in sorted(self.sources):
            self.directory.detach(name)
        self.directory.check_invariants()
        assert self.directory.counts().replicas == self.directory.counts().blocks == 0


DirectoryMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestDirectoryMachine = DirectoryMachine.TestCase


# ---------------------------------------------------------------- the table

HOLDERS = 70  # more than are read without being remembered
INSERTED, REMOVED, FORGOTTEN = "inserted", "removed", "forgotten"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("iiirc"), st.integers(0, 39), st.lists(st.integers(0, 60), max_size=30)), max_size=40
    )
)
def test_table_against_a_dict_of_sets(steps):
    table, oracle = ReplicaTable(1 << 20), {}
    for kind, source, numbers in steps:
        keys = keys_array([key(n) for n in numbers])
        if kind == "i":
            assert table.insert(keys, source, 1) == 0
            for n in numbers:
                oracle.setdefault(key(n), set()).add(source)
        elif kind == "r":
            count = sum(source in oracle.get(key(n), ()) for n in dict.fromkeys(numbers))
            assert table.remove(keys, source) == count
            for n in numbers:
                oracle.get(key(n), set()).discard(source)
        else:
            assert table.clear(source) == sum(source in s for s in oracle.values())
            for s in oracle.values():
                s.discard(source)
        table.check_invariants()
        assert table.replicas == sum(len(s) for s in oracle.values())
        assert table.distinct == sum(bool(s) for s in oracle.values())
        for holder in range(40):
            kept = sorted(k for k, s in oracle.items() if holder in s)
            assert sorted(bytes(k) for k in table.collect(holder)[0]) == kept


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([INSERTED, INSERTED, REMOVED, FORGOTTEN]),
            st.integers(0, HOLDERS - 1), st.integers(1, HOLDERS), st.integers(0, 11), st.integers(1, 12),
            st.sampled_from([EXACT, EXACT, INT8]),
        ),
        min_size=1, max_size=25,
    )
)  # fmt: skip
def test_runs_of_many_holders_by_definition(steps):
    """Crowds of sources gain and lose the same stretches of a prompt; what was read of them before misleads nobody."""
    table, holders = ReplicaTable(1 << 20), {source: {} for source in range(HOLDERS)}
    packed = [key(n) for n in range(12)]
    for kind, source, crowd, first, count, fidelity in steps:
        keys = packed[first : first + count]
        for number in range(source, min(source + crowd, HOLDERS)):
            if kind == INSERTED:
                table.insert(keys_array(keys), number, fidelity)
                holders[number].update(dict.fromkeys(keys, int(fidelity)))
            elif kind == REMOVED:
                table.remove(keys_array(keys), number)
                for k in keys:
                    holders[number].pop(k, None)
            else:
                table.clear(number)
                holders[number].clear()
        table.check_invariants()
        for asked in (packed, packed[first:]):
            covered, rows = table.match(keys_array(asked))
            assert (covered, sorted(map(tuple, rows.tolist()))) == runs_oracle(holders, asked)


def test_more_sets_of_holders_than_are_remembered():
    """Each of a few hundred sets is another one: two that share a place are told apart."""
    table, packed = ReplicaTable(1 << 20), key(1)
    held = dict.fromkeys(range(HOLDERS))
    for source in held:
        table.insert(keys_array([packed]), source, EXACT)
    rng = np.random.default_rng(7)
    for source in rng.integers(0, HOLDERS, 6 * replicas.RECENT_SETS).tolist():
        if source in held:
            del held[source]
            table.remove(keys_array([packed]), source)
        else:
            held[source] = None
            table.insert(keys_array([packed]), source, EXACT)
        covered, rows = table.match(keys_array([packed]))
        assert (covered, sorted(rows[:, 0].tolist())) == (1, sorted(held))


def test_after_warming_up_nothing_is_compiled():
    """The first placement waits for no compiler."""
    replicas.warm_up()
    kernels = [f for f in vars(directory_kernels).values() if hasattr(f, "signatures")]
    before = {f: len(f.signatures) for f in kernels}
    table, keys = ReplicaTable(1 << 20), np.random.default_rng(0).integers(0, 256, (5000, 16), dtype=np.uint8)
    table.insert(keys, 3, EXACT)
    table.insert(keys[:64], 4, EXACT)
    table.match(keys[:64])
    table.collect(3)
    table.remove(keys[:64], 3)
    table.clear(3)
    assert {f: len(f.signatures) for f in kernels} == before


@pytest.mark.parametrize("sources", [1, 3])
def test_table_grows_within_64_bytes_a_replica(sources):
    table, rng = ReplicaTable(1 << 20), np.random.default_rng(sources)
    keys = rng.integers(0, 256, (40_000, 16), dtype=np.uint8)
    for begin in range(0, len(keys), 1000):
        for source in range(sources):
            assert table.insert(keys[begin : begin + 1000], source, 1) == 0
        if begin >= 4000:
            assert table.bytes_allocated <= 64 * table.replicas
    table.check_invariants()
    allocated = table.bytes_allocated
    assert table.match(keys)[0] == len(keys)
    for source in range(sources):
        assert table.remove(keys[::2], source) == len(keys) // 2
    table.check_invariants()
    assert table.match(keys[1::2])[0] == len(keys) // 2
    for source in range(sources):
        assert table.insert(keys[::2], source, 1) == 0
    assert table.bytes_allocated == allocated, "freed rows are used again"
    assert sum(table.clear(source) for source in range(sources)) == sources * len(keys)
    table.check_invariants()


def test_many_short_runs():
    directory = Directory()
    numbers = range(2000)
    for name in ("a", "b"):
        directory.attach(record(name), 0)
    directory.apply("a", 1, 1, [stored(*numbers)], 0)
    directory.apply("b", 1, 1, [stored(*numbers[::2])], 0)
    packed = [key(n) for n in numbers]
    holders = {name: held(directory, name) for name in ("a", "b")}
    assert found(directory.match(keys_array(packed))) == runs_oracle(holders, packed)


# ---------------------------------------------------------------- bounds and bad input


def test_sources_are_bounded():
    directory = Directory(DirectoryConfig(sources_max=2))
    directory.attach(record("a"), 0)
    directory.attach(record("b"), 0)
    with pytest.raises(Overloaded):
        directory.attach(record("c"), 0)
    directory.attach(record("a", epoch=2), 0)
    directory.detach("b")
    directory.attach(record("c"), 0)
    directory.check_invariants()


def test_replicas_are_bounded_and_refusals_counted():
    directory = Directory(DirectoryConfig(replicas_max=10))
    directory.attach(record("a"), 0)
    directory.apply("a", 1, 1, [stored(*range(15))], 0)
    counts = directory.counts()
    assert (counts.replicas, counts.refused) == (10, 5)
    directory.apply("a", 1, 2, [removed(0, 1), stored(20, 21)], 0)
    assert directory.counts().replicas == 10
    directory.apply_snapshot_part("a", 1, 2, 0, True, b"".join(key(n) for n in range(12)), EXACT, 0)
    assert (directory.counts().replicas, directory.counts().refused) == (10, 7)
    directory.check_invariants()


def test_bad_messages_change_nothing():
    directory = Directory()
    directory.attach(record("a"), 0)
    directory.apply("a", 1, 1, [stored(1)], 0)
    with pytest.raises(BadKeyLength):
        directory.apply("a", 1, 2, [stored(2), BlockChange(ChangeKind.STORED, b"short")], 0)
    with pytest.raises(BadArgument):
        directory.apply("a", 1, 2, [stored(2), BlockChange(9, key(3))], 0)
    with pytest.raises(BadArgument):
        directory.apply("a", 1, 2, [stored(2, fidelity=0)], 0)
    with pytest.raises(BadKeyLength):
        directory.apply_snapshot_part("a", 1, 1, 0, True, b"short", EXACT, 0)
    with pytest.raises(BadArgument):
        directory.apply_snapshot_part("a", 1, 1, 0, True, key(2), 7, 0)
    assert held(directory, "a") == {key(1): 1}
    assert directory.synced("a") == (1, True)
    assert directory.apply("a", 1, 2, [stored(2)], 0) == Applied(2, False)


def test_questions_about_strangers():
    directory = Directory()
    directory.detach("nobody")
    assert directory.held_by("nobody").shape == (0, 16)
    assert directory.held_count("nobody") == 0
    assert directory.synced("nobody") == (0, False)
    assert directory.match(np.empty((0, 16), np.uint8)).covered == 0
    assert directory.match(keys_array([key(1)])).runs == ()
    assert directory.number_of("nobody") is None
    covered, rows = directory.match_rows(keys_array([key(1)]))
    assert (covered, rows.shape) == (0, (0, 4))
