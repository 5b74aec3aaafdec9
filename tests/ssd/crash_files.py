"""Files in memory that know what is durable, can lose power at any call, and come back as any state a disk may keep."""

import errno
import threading

import numpy as np

from kvpool.tiers.ssd.files import SPARE

SECTOR_BYTES = 512


class Inode:
    def __init__(self, size):
        self.durable = bytearray(size)
        self.current = bytearray(size)
        #: Since the last sync: (offset, bytes) or (size, None) for a truncation.
        self.pending = []

    def copy(self):
        other = Inode(0)
        other.durable, other.current = bytearray(self.durable), bytearray(self.current)
        other.pending = list(self.pending)
        return other


class CrashFile:
    def __init__(self, files, inode):
        self._files, self._inode = files, inode

    def read(self, buffers, offset):
        self._files.wait("read")
        with self._files.lock:
            self._files.fault("read")
            done = 0
            for buffer in buffers:
                part = self._inode.current[offset + done : offset + done + len(buffer)]
                buffer[: len(part)] = part
                done += len(part)
                if len(part) < len(buffer):
                    break
            return done

    def write(self, buffers, offset):
        data = b"".join(buffers)
        if self._files.direct:
            assert offset % 4096 == 0
            assert all(len(buffer) % 4096 == 0 for buffer in buffers)
            assert all(np.frombuffer(buffer, np.uint8).ctypes.data % 4096 == 0 for buffer in buffers)
        self._files.wait("write")
        with self._files.lock:
            self._files.step("write")
            self._inode.pending.append((offset, data))
            apply_write(self._inode.current, offset, data)

    def sync(self):
        with self._files.lock:
            self._files.step("sync")
            self._inode.durable = bytearray(self._inode.current)
            self._inode.pending.clear()

    def truncate(self, size_bytes):
        with self._files.lock:
            self._files.step("truncate")
            self._inode.pending.append((size_bytes, None))
            del self._inode.current[size_bytes:]

    def size(self):
        return len(self._inode.current)

    def close(self):
        pass


def apply_write(data, offset, written):
    if len(data) < offset + len(written):
        data.extend(bytes(offset + len(written) - len(data)))
    data[offset : offset + len(written)] = written


class CrashFiles:
    """`steps`: calls that change something until the power goes; None: never. Afterwards every call fails."""

    def __init__(self, *, direct=True, steps=None, capacity_bytes=None):
        self.direct, self.steps = direct, steps
        self.lock = threading.RLock()
        self.capacity_bytes = capacity_bytes
        self.inodes, self.durable_inodes = {}, {}
        #: Calls that fail with an errno: {kind: [errno or None, ...]}, used up one a call.
        self.faults = {}
        #: Calls that hang: {kind: event that they wait for}. `waiting` is set when one does.
        self.hanging, self.waiting = {}, threading.Event()
        #: Kinds of calls that changed something, in order.
        self.calls = []
        #: Whether there is a spare of this life (each has files of its own), and whether its name is durable.
        self.set_aside_once = self.spare_durable = False
        self.reused = 0

    def wait(self, kind):
        if kind in self.hanging:
            self.waiting.set()
            self.hanging[kind].wait()

    def step(self, kind):
        self.fault(kind)
        if self.steps is not None:
            if self.steps == 0:
                raise OSError(errno.EIO, "power lost")
            self.steps -= 1
        self.calls.append(kind)

    def fault(self, kind):
        if self.steps == 0:
            raise OSError(errno.EIO, "power lost")
        waiting = self.faults.get(kind)
        if waiting and (code := waiting.pop(0)):
            raise OSError(code, "injected")

    def names(self):
        return sorted(self.inodes)

    def create(self, name, size_bytes):
        with self.lock:
            self.step("create")
            if self.spare_durable and len(self.inodes[SPARE].current) == size_bytes:
                self.spare_durable = False
                self.reused += 1
                self.inodes[name] = self.inodes.pop(SPARE)
                return CrashFile(self, self.inodes[name])
            used = sum(len(inode.current) for inode in self.inodes.values())
            if self.capacity_bytes is not None and used + size_bytes > self.capacity_bytes:
                raise OSError(errno.ENOSPC, "no space")
            self.inodes[name] = Inode(size_bytes)
            return CrashFile(self, self.inodes[name])

    def open(self, name):
        self.fault("open")
        return CrashFile(self, self.inodes[name])

    def remove(self, name):
        with self.lock:
            self.step("remove")
            self.inodes.pop(name, None)

    def set_aside(self, name):
        """As `DiskFiles`: the inode gets another name, and then a third one, with all that it holds."""
        with self.lock:
            self.step("remove")
            if name in self.inodes:
                self.set_aside_once, self.spare_durable = True, False
                self.inodes[SPARE] = self.inodes.pop(name)

    def sync_names(self):
        with self.lock:
            self.step("sync_names")
            self.durable_inodes = dict(self.inodes)
            self.spare_durable = self.set_aside_once and SPARE in self.inodes

    def close(self):
        self.set_aside_once = self.spare_durable = False

    # ------------------------------------------------------------ the crash

    def after_crash(self, rng, *, steps=None):
        """A disk that kept what was synced, and of the rest whatever chance wants, down to torn sectors."""
        files = CrashFiles(direct=self.direct, steps=steps, capacity_bytes=self.capacity_bytes)
        with self.lock:
            for name in sorted({*self.inodes, *self.durable_inodes}):
                old, new = self.durable_inodes.get(name), self.inodes.get(name)
                inode = old if old is new else (old, new)[rng.integers(2)]
                if inode is not None:
                    files.add(name, bytes(surviving(inode, rng)))
        return files

    def add(self, name, data):
        inode = Inode(0)
        inode.durable, inode.current = bytearray(data), bytearray(data)
        self.inodes[name] = self.durable_inodes[name] = inode

    def after_kill(self):
        """What a killed process leaves: all that it wrote, of which the host may still lose what was not synced."""
        files = CrashFiles(direct=self.direct, capacity_bytes=self.capacity_bytes)
        made = {}
        with self.lock:
            for mine, kept in ((files.inodes, self.inodes), (files.durable_inodes, self.durable_inodes)):
                for name, inode in kept.items():
                    if id(inode) not in made:
                        made[id(inode)] = inode.copy()
                    mine[name] = made[id(inode)]
        return files

    def copy(self):
        """As it stands between two calls, and all of it durable."""
        files = CrashFiles(direct=self.direct)
        with self.lock:
            for name, inode in self.inodes.items():
                files.add(name, bytes(inode.current))
        return files


def surviving(inode, rng):
    data = bytearray(inode.durable)
    for offset, written in inode.pending:
        if written is None:
            if rng.integers(2):
                del data[offset:]
            continue
        fate = rng.integers(4)
        if fate == 0:
            continue
        if fate == 1:
            apply_write(data, offset, written)
        elif fate == 2:
            apply_write(data, offset, written[: rng.integers(len(written) + 1)])
        else:
            for at in range(0, len(written), SECTOR_BYTES):
                if rng.integers(2):
                    apply_write(data, offset + at, written[at : at + SECTOR_BYTES])
    return data
