"""A real folder: space that is set aside, and used again."""

import errno
import mmap
import os

import numpy as np
import pytest

from kvpool.core.ssd.format import PAGE_BYTES
from kvpool.tiers.ssd import files as files_module
from kvpool.tiers.ssd.files import SPARE, DiskFiles


def page(value):
    data = np.frombuffer(mmap.mmap(-1, PAGE_BYTES), np.uint8)
    data[:] = value
    return data


def first_byte(file):
    data = page(0)
    assert file.read([data.data], 0) == PAGE_BYTES
    return int(data[0])


def written(files, name, value):
    file = files.create(name, 2 * PAGE_BYTES)
    file.write([page(value).data], 0)
    file.close()


def test_space_is_used_again_once_its_name_is_durably_gone(tmp_path):
    files = DiskFiles(tmp_path)
    written(files, "a", 7)
    files.set_aside("a")
    assert "a" not in files.names()
    assert first_byte(files.create("b", 2 * PAGE_BYTES)) == 0, "its name might be back after a crash"
    files.sync_names()
    assert first_byte(files.create("c", PAGE_BYTES)) == 0, "of another size"
    assert first_byte(files.create("d", 2 * PAGE_BYTES)) == 7
    assert first_byte(files.create("e", 2 * PAGE_BYTES)) == 0, "there was one"
    files.close()


def test_a_name_that_is_not_durably_gone_keeps_its_space(tmp_path, monkeypatch):
    files = DiskFiles(tmp_path)
    written(files, "a", 7)
    files.set_aside("a")

    def refuse(_):
        raise OSError(errno.EIO, "injected")

    with monkeypatch.context() as patched:
        patched.setattr(files_module.os, "fsync", refuse)
        with pytest.raises(OSError, match="injected"):
            files.sync_names()
    assert first_byte(files.create("b", 2 * PAGE_BYTES)) == 0
    # As the store does, which tries to be rid of it again: of a name that is gone already.
    files.set_aside("a")
    files.sync_names()
    assert first_byte(files.create("c", 2 * PAGE_BYTES)) == 7
    files.close()


def test_only_one_is_kept(tmp_path):
    files = DiskFiles(tmp_path)
    for name, value in (("a", 7), ("b", 8)):
        written(files, name, value)
        files.set_aside(name)
        files.sync_names()
    assert [name for name in files.names() if name != "owner"] == [SPARE]
    assert first_byte(files.create("c", 2 * PAGE_BYTES)) == 8
    assert SPARE not in files.names()
    files.close()


@pytest.mark.parametrize("how", ["closed", "killed"])
def test_what_another_life_set_aside_is_discarded(tmp_path, how):
    """It may hold what was written under a number that this life gives away again."""
    files = DiskFiles(tmp_path)
    written(files, "a", 7)
    files.set_aside("a")
    files.sync_names()
    if how == "closed":
        files.close()
    else:
        os.close(files._lock)
    assert (SPARE in os.listdir(tmp_path)) == (how == "killed")  # noqa: PTH208 - names, not paths
    again = DiskFiles(tmp_path)
    assert SPARE not in again.names()
    again.sync_names()
    assert first_byte(again.create("b", 2 * PAGE_BYTES)) == 0
    again.close()
