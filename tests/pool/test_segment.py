"""The DRAM tier: who owns a segment, who may map it, what a full file system says."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from kvpool.core.errors import BadArgument, NoSpace, Overloaded, Unavailable
from kvpool.service.writer_lock import PREFIX, WriterLock, WriterProof, WriterTable, remove_orphans
from kvpool.tiers.dram import DATA_ALIGNMENT_BYTES, WRITERS_MAX, Segment

MIB = 1 << 20


def create(folder: Path, name: str = "n") -> Segment:
    return Segment.create(folder, name, data_bytes=3 * MIB, index_bytes=1000)


def test_what_the_owner_writes_others_read(tmp_path: Path) -> None:
    owner = create(tmp_path)
    owner.prefault()
    assert owner.wait_prefaulted(60)
    assert len(owner.index) == 1000 and len(owner.data) == 3 * MIB
    assert owner.layout.data_offset % DATA_ALIGNMENT_BYTES == 0
    assert not owner.data.any(), "fresh memory is zero"
    owner.data[5] = 7
    owner.index[0] = 8
    reader = Segment.attach(owner.path, uuid=owner.uuid)
    device = Segment.attach(owner.path, uuid=owner.uuid, mode="device")
    assert reader.data[5] == 7 and reader.index[0] == 8
    with pytest.raises(ValueError):
        reader.data[5] = 1
    device.data[6] = 9
    assert owner.data[6] == reader.data[6] == 9
    view = reader.data[:10]
    for segment in (reader, device, owner):
        segment.close()
    assert view[5] == 7, "a view outlives the segment that it came from"
    assert not owner.path.exists()


def test_attach_refuses(tmp_path: Path) -> None:
    owner = create(tmp_path)
    with pytest.raises(Unavailable, match="another process"):
        Segment.attach(owner.path, uuid=bytes(16))
    with pytest.raises(Unavailable, match="opened"):
        Segment.attach(tmp_path / "missing", uuid=owner.uuid)
    for content in (b"", b"x" * 100, b"KVPOOLSG" + b"\xff" * 100):
        other = tmp_path / "other"
        other.write_bytes(content)
        with pytest.raises(Unavailable, match="segment"):
            Segment.attach(other, uuid=owner.uuid)
    whole = owner.path.read_bytes()
    cut = tmp_path / "cut"
    cut.write_bytes(whole[: MIB * 2])
    with pytest.raises(Unavailable, match="shorter"):
        Segment.attach(cut, uuid=owner.uuid)
    orphan = tmp_path / "orphan"
    orphan.write_bytes(whole)
    with pytest.raises(Unavailable, match="ended"):
        Segment.attach(orphan, uuid=owner.uuid)
    owner.close()


def test_one_owner_a_name(tmp_path: Path) -> None:
    owner = create(tmp_path)
    with pytest.raises(Unavailable, match="live process"):
        create(tmp_path)
    other = create(tmp_path, "n-1")
    other.close()
    owner.close()
    create(tmp_path).close()


def test_orphans_are_removed(tmp_path: Path) -> None:
    orphan = tmp_path / f"kvpool-n-{'ab' * 16}.segment"
    orphan.write_bytes(b"left behind")
    foreign = tmp_path / "kvpool-n-something.segment"
    foreign.write_bytes(b"not ours")
    create(tmp_path).close()
    assert not orphan.exists() and foreign.exists()


def test_no_space(tmp_path: Path) -> None:
    with pytest.raises(NoSpace) as raised:
        Segment.create(tmp_path, "n", data_bytes=1 << 60, index_bytes=0)
    assert "--memory" in raised.value.hint and "--segment-dir" in raised.value.hint
    for name in ("", "a/b"):
        with pytest.raises(BadArgument):
            create(tmp_path, name)
    assert list(tmp_path.iterdir()) == []


def test_writer_lock_proves_its_end(tmp_path: Path) -> None:
    lock = WriterLock(tmp_path)
    proof = WriterProof.open(str(lock.path))
    assert proof is not None and not proof.gone()
    assert lock.enter()
    lock.retire()
    assert not lock.enter(), "nothing may be written any more"
    assert not proof.gone(), "a write is under way"
    lock.leave()
    assert proof.gone() and proof.gone()
    assert list(tmp_path.iterdir()) == []
    lock.retire()


def test_what_proves_nothing(tmp_path: Path) -> None:
    free = tmp_path / "kvpool-writer-free.lock"
    free.touch()
    assert WriterProof.open(str(free)) is None, "nobody holds it"
    held = tmp_path / "other.lock"
    held.touch()
    fd = os.open(held, os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    assert WriterProof.open(str(held)) is None, "not a writer lock"
    link = tmp_path / "kvpool-writer-link.lock"
    link.symlink_to(held)
    assert WriterProof.open(str(link)) is None
    os.close(fd)
    assert free.exists()


def test_locks_of_dead_clients_are_removed(tmp_path: Path) -> None:
    (tmp_path / f"{PREFIX}dead.lock").touch()
    (tmp_path / "another.lock").touch()
    lock = WriterLock(tmp_path)
    remove_orphans(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {lock.path.name, "another.lock"}
    lock.retire()


def test_numpy_view_is_writable_for_the_owner(tmp_path: Path) -> None:
    owner = create(tmp_path)
    owner.data[:] = np.arange(len(owner.data), dtype=np.uint8)
    assert owner.data[257] == 1
    owner.close()


def test_a_writer_is_gone_though_its_lock_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = WriterLock(tmp_path)
    proof = WriterProof.open(str(lock.path))
    assert proof is not None and not proof.gone()

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(f"{path} can't be removed")

    os.close(lock._fd)  # as if its process had died
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        assert proof.gone()


# ---------------------------------------------------------------- taking over


def taking_over(folder: Path, *, data_bytes: int = 3 * MIB) -> Segment:
    return Segment.create(folder, "n", data_bytes=data_bytes, index_bytes=1000, touch_bytes=100, adopt=True)


def test_a_segment_is_taken_over_with_all_that_is_in_it(tmp_path: Path) -> None:
    first = taking_over(tmp_path)
    assert not first.adopted and first.read_catalog() == b""
    first.data[9], first.index[3], first.touches[99] = 7, 8, 1
    first.write_catalog(b"numbers")
    first.note_writer(5, "/dev/shm/kvpool-writer-x.lock")
    first.close(keep=True)
    second = taking_over(tmp_path)
    assert second.adopted and second.path == first.path and second.uuid == first.uuid
    assert (second.data[9], second.index[3], second.touches[99]) == (7, 8, 1)
    assert second.read_catalog() == b"numbers" and second.writers() == {5: "/dev/shm/kvpool-writer-x.lock"}
    second.note_writer(5, "")
    assert second.writers() == {}
    with pytest.raises(Unavailable, match="live process"):
        taking_over(tmp_path)
    second.close()
    assert list(tmp_path.iterdir()) == []


def test_only_what_fits_is_taken_over(tmp_path: Path) -> None:
    taking_over(tmp_path).close(keep=True)
    other_size = taking_over(tmp_path, data_bytes=4 * MIB)
    assert not other_size.adopted, "made for another size: removed"
    other_size.close(keep=True)
    content = bytearray(other_size.path.read_bytes())
    content[8] ^= 0xFF  # version
    other_size.path.write_bytes(content)
    fresh = taking_over(tmp_path, data_bytes=4 * MIB)
    assert not fresh.adopted
    fresh.close(keep=True)
    taking_over(tmp_path, data_bytes=4 * MIB).close(keep=True)
    young = create(tmp_path)
    assert not young.adopted, "adoption is asked for"
    young.close()
    assert list(tmp_path.iterdir()) == []


def test_a_catalog_that_was_being_written_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    owner = taking_over(tmp_path)
    owner.write_catalog(b"old" * 100)
    main, spare = owner._catalog_places()
    whole = bytes(owner._map[main : main + 400])
    for torn in (main, spare):
        for at in range(0, 312, 7):
            owner._map[torn + at] ^= 0x55
            assert owner.read_catalog() == b"old" * 100
            owner._map[torn : torn + 400] = whole
    owner.write_catalog(b"new")
    assert owner.read_catalog() == b"new"
    with pytest.raises(Overloaded):
        owner.write_catalog(bytes(1 << 20))
    assert owner.read_catalog() == b"new"
    owner.close()


def test_readers_write_touches_and_nothing_else(tmp_path: Path) -> None:
    owner = taking_over(tmp_path)
    reader = Segment.attach(owner.path, uuid=owner.uuid)
    reader.touches[42] = 1
    assert owner.touches[42] == 1 and owner.touches.sum() == 1
    with pytest.raises(ValueError):
        reader.index[0] = 1
    reader.close()
    owner.close()


def test_writers_of_the_process_before_are_waited_for(tmp_path: Path) -> None:
    first = taking_over(tmp_path)
    living, leaving = WriterLock(tmp_path), WriterLock(tmp_path)
    table = WriterTable(first, WRITERS_MAX)
    assert table.all_inherited_gone(), "there was no process before"
    assert {table.note(str(lock.path)) for lock in (living, leaving)} == {0, 1}
    assert table.note("/" + "x" * 300) is None, "too long to be written down"
    first.close(keep=True)
    leaving.retire()
    second = taking_over(tmp_path)
    inherited = WriterTable(second, WRITERS_MAX)
    assert not inherited.all_inherited_gone()
    assert list(second.writers().values()) == [str(living.path)]
    living.retire()
    assert inherited.all_inherited_gone() and second.writers() == {}
    second.close()


def test_the_table_of_writers_is_bounded(tmp_path: Path) -> None:
    owner = taking_over(tmp_path)
    table = WriterTable(owner, 2)
    first = table.note("/a")
    assert first is not None and table.note("/b") is not None and table.note("/c") is None
    table.strike(first)
    assert table.note("/c") == first
    owner.close()


def test_a_reader_that_looks_for_the_owner_does_not_keep_the_next_one_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the lock for a moment to see whether anybody has it."""
    first = Segment.create(tmp_path, "node", data_bytes=1 << 20, index_bytes=4096)
    first.close(keep=True)
    reader = os.open(first.path, os.O_RDWR)
    fcntl.flock(reader, fcntl.LOCK_SH)
    rests: list[float] = []

    def rest(seconds: float) -> None:
        rests.append(seconds)
        if len(rests) == 2:
            fcntl.flock(reader, fcntl.LOCK_UN)

    monkeypatch.setattr("kvpool.tiers.dram.time", SimpleNamespace(sleep=rest))
    second = Segment.create(tmp_path, "node", data_bytes=1 << 20, index_bytes=4096, adopt=True)
    assert second.adopted and len(rests) == 2
    os.close(reader)
    second.close()


@pytest.mark.parametrize("call", ["open", "gone"])
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Nothing is proven there, and nothing is left open."""
    lock = WriterLock(tmp_path)
    proof = WriterProof.open(str(lock.path))
    assert proof is not None

    def opened() -> int:
        links = []
        for descriptor in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # of another thread, closed meanwhile
                links.append(descriptor.readlink())
        return links.count(lock.path.resolve())

    before = opened()

    def flock(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    with monkeypatch.context() as patched:
        patched.setattr("kvpool.service.writer_lock.fcntl.flock", flock)
        if call == "open":
            assert WriterProof.open(str(lock.path)) is None
        else:
            assert not proof.gone()
    assert opened() == before == 2
    lock.retire()
    assert proof.gone()
