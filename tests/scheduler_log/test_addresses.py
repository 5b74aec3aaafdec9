"""Lists of schedulers: how they are written, and that sources and workers go on to the next."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from kvpool.core.errors import BadArgument
from kvpool.core.ids import Fidelity, Tier
from kvpool.service.announcer import Announcer, SourceFacts
from kvpool.service.scheduler_list import Rotation, split, target
from scheduler.service.server import SchedulerServer, SchedulerServerConfig
from tests.scheduler_log.schedulers_made import eventually, run


def test_lists_are_split_and_checked() -> None:
    assert split(" a:1, b:2 ,a:1,") == ("a:1", "b:2")
    for wrong in ("", " , ", ",".join(f"a:{n}" for n in range(17))):
        with pytest.raises(BadArgument):
            split(wrong)


def test_targets_of_several() -> None:
    assert target("some-host:7700") == "some-host:7700"
    assert target("127.0.0.1:1,127.0.0.2:2") == "ipv4:127.0.0.1:1,127.0.0.2:2"
    assert target("[::1]:1,[::2]:2") == "ipv6:[::1]:1,[::2]:2"
    with pytest.raises(BadArgument):
        target("127.0.0.1:1,no such host:2")


def test_rotation_says_when_all_were_tried() -> None:
    three = Rotation("a:1,b:2,c:3")
    assert [(three.next(), three.address) for _ in range(4)] == [
        (False, "b:2"),
        (False, "c:3"),
        (True, "a:1"),
        (False, "b:2"),
    ]
    assert Rotation("a:1").next()


def test_a_source_goes_on_to_the_next_scheduler() -> None:
    keys = np.arange(160, dtype=np.uint8).reshape(10, 16)

    def has_it(server: SchedulerServer) -> bool:
        return server.shell.core.directory.held_count("node-0") == 10

    async def test() -> None:
        servers = [SchedulerServer(SchedulerServerConfig(listen="127.0.0.1:0")) for _ in range(2)]
        for server in servers:
            await server.startup()
        announcer = Announcer(
            ",".join(server.address for server in servers),
            SourceFacts("node-0", 1, Tier.DRAM),
            snapshot=lambda: ([(keys, Fidelity.EXACT)], announcer.last_number),
        )
        announcer.start()
        try:
            # The first of them, unless that one was too slow to answer.
            left = list(servers)
            while left:
                await eventually(lambda: any(has_it(server) for server in left), "it has attached")
                server = next(server for server in left if has_it(server))
                left.remove(server)
                await server.shutdown()
        finally:
            closing = threading.Thread(target=announcer.close)
            closing.start()
            await asyncio.to_thread(closing.join)

    run(test())
