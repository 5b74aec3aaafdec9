"""NIXL between two processes of this host: one-sided reads and writes of all blocks in one transfer.

pip install --no-deps nixl-cu12. UCX chooses the transport; UCX_TLS=tcp forces TCP. No progress thread: it spins, which
on a small machine halves everything.
"""

import subprocess
import sys
import time

import numpy as np
from nixl_cu12._api import nixl_agent, nixl_agent_config
from serving import memory, serve, settings, timed

POLL_S = 0.0005


def make(name):
    return nixl_agent(name, nixl_agent_config(enable_prog_thread=False, num_threads=0, backends=["UCX"]))


def described(agent, base, block_bytes, count):
    table = np.zeros((count, 3), dtype=np.uint64)
    table[:, 0] = np.uint64(base) + np.arange(count, dtype=np.uint64) * np.uint64(block_bytes)
    table[:, 1] = block_bytes
    return agent.get_xfer_descs(table, mem_type="DRAM")


def hold_blocks(block_bytes, count):
    """The other process: its memory is read and written."""
    agent, rows = make("holder"), memory(block_bytes, count, filled=True)
    agent.register_memory([(rows.ctypes.data, rows.nbytes, 0, "")], "DRAM")
    print("ready", agent.get_agent_metadata().hex(), rows.ctypes.data, flush=True)
    agent.add_remote_agent(bytes.fromhex(sys.stdin.readline().strip()))
    while True:  # until it is terminated; TCP moves on only while somebody looks
        agent.get_new_notifs()
        time.sleep(POLL_S)


class Nixl:
    def __init__(self, block_bytes, count, holder):
        self.agent, self.rows = make("reader"), memory(block_bytes, count, filled=False)
        self.agent.register_memory([(self.rows.ctypes.data, self.rows.nbytes, 0, "")], "DRAM")
        while not (line := holder.stdout.readline()).startswith("ready"):
            assert line, "the other process has ended"
        _, metadata, base = line.split()
        self.peer = self.agent.add_remote_agent(bytes.fromhex(metadata))
        holder.stdin.write(self.agent.get_agent_metadata().hex() + "\n")
        holder.stdin.flush()
        self.mine = described(self.agent, self.rows.ctypes.data, block_bytes, count)
        self.theirs = described(self.agent, int(base), block_bytes, count)
        self.get()
        assert (self.rows == memory(block_bytes, count, filled=True)).all(), "wrong bytes"

    def get(self):
        return self._transfer("READ")

    def put(self):
        return self._transfer("WRITE")

    def _transfer(self, operation):
        handle = self.agent.initialize_xfer(operation, self.mine, self.theirs, self.peer, b"")

        def run():
            state = self.agent.transfer(handle)
            while state == "PROC":
                state = self.agent.check_xfer_state(handle)
            assert state == "DONE", state

        took_s = timed(run)
        self.agent.release_xfer_handle(handle)
        return took_s


def main():
    if sys.argv[1] == "hold":
        hold_blocks(int(sys.argv[2]), int(sys.argv[3]))
        return
    holder = subprocess.Popen(
        [sys.executable, __file__, "hold", *sys.argv[1:3]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        serve(Nixl(*settings(), holder))
    finally:
        holder.terminate()
        holder.wait(10)


if __name__ == "__main__":
    main()
