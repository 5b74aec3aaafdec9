"""What one scheduler hears, all know: members, blocks, placements and their ends; and the journals replay."""

from __future__ import annotations

import asyncio
from pathlib import Path

import scheduler_clients as clients

from kvpool.cli.kvctl import Cluster
from kvpool.core.ids import Role
from scheduler.core import events
from scheduler.core.commands import RoleRefused
from scheduler.replay.exact import replay_file
from tests.scheduler_log.redis_process import RedisProcess
from tests.scheduler_log.schedulers_made import Several, eventually, run, schedulers, view


def blocks_of(several: Several, number: int, source_id: str) -> int:
    return several.servers[number].shell.core.directory.held_count(source_id)


def test_members_and_blocks_are_known_everywhere(redis: RedisProcess) -> None:
    async def test() -> None:
        async with schedulers(redis.url, 3) as several:
            node = await several.clients[0].attach("node-0", "a0..a9")
            worker = await several.clients[1].join("w0")
            await several.agree("a node and a worker")
            await eventually(lambda: all(view(s)["instances"] == ["w0"] for s in several.servers), "the worker")
            await eventually(lambda: all(blocks_of(several, n, "node-0") == 10 for n in range(3)), "ten blocks")
            await node.say(clients.stored(1, "b0..b4"))
            await eventually(lambda: all(blocks_of(several, n, "node-0") == 15 for n in range(3)), "fifteen blocks")
            await several.agree("changes")
            # Any of them can place on what another one hears.
            for client in several.clients:
                assert (await client.place(f"r-{id(client)}", "a0..a9")).HasField("placement")
            await node.finish()
            await worker.finish()
            await eventually(
                lambda: not any(view(s)["sources"] or view(s)["instances"] for s in several.servers), "gone"
            )
            await several.agree("ends")

    run(test())


def test_placements_of_others_count(redis: RedisProcess) -> None:
    async def test() -> None:
        async with schedulers(redis.url, 3) as several:
            await several.clients[0].join("w0")
            await eventually(lambda: all(view(s)["instances"] for s in several.servers), "the worker is known")
            gateways = [await client.gateway() for client in several.clients]
            cores = [s.shell.core for s in several.servers]
            assert (await several.clients[1].place("r1")).HasField("placement")
            held = cores[1].book.on("w0").kv_tokens
            assert held > 0
            await eventually(lambda: all(c.book.on("w0").kv_tokens == held for c in cores), "the placement counts")
            assert cores[0].book.placements["gw", "r1"].peer.startswith("s1#")
            # The outcome may come to another one than placed it: that one may be gone.
            await gateways[2].say(clients.outcome("r1"))
            await eventually(lambda: not any(c.book.placements for c in cores), "its end is known")
            await several.agree("after the end")
            assert cores[1].counts["ended_outcome"] == 1

    run(test())


def test_a_request_placed_again_elsewhere_counts_once(redis: RedisProcess) -> None:
    async def test() -> None:
        async with schedulers(redis.url, 2) as several:
            await several.clients[0].join("w0")
            await eventually(lambda: all(view(s)["instances"] for s in several.servers), "the worker is known")
            cores = [s.shell.core for s in several.servers]
            await several.clients[0].place("r1")
            await eventually(lambda: len(cores[1].book.placements) == 1, "the first placement is known")
            await several.clients[1].place("r1")
            await eventually(
                lambda: cores[0].book.placements["gw", "r1"].peer.startswith("s1#"), "the later placement counts"
            )
            assert cores[1].book.placements["gw", "r1"].peer == ""
            # Where neither knew of the other's, the order of the log decides, for both alike.
            await several.clients[0].place("r2")
            await several.clients[1].place("r2")

            def decided() -> bool:
                peers = [c.book.placements["gw", "r2"].peer for c in cores]
                return sorted(bool(peer) for peer in peers) == [False, True]

            await eventually(decided, "one of the two placements counts")
            assert [len(c.book.placements) for c in cores] == [2, 2]
            await several.agree("placed again")

    run(test())


def test_a_gateway_that_leaves_frees_what_it_held_everywhere(redis: RedisProcess) -> None:
    async def test() -> None:
        async with schedulers(redis.url, 2) as several:
            await several.clients[0].join("w0")
            await eventually(lambda: all(view(s)["instances"] for s in several.servers), "the worker is known")
            gateway = await several.clients[0].gateway()
            await several.clients[0].place("r1")
            cores = [s.shell.core for s in several.servers]
            await eventually(lambda: len(cores[1].book.placements) == 1, "the placement is known")
            await gateway.finish()
            await eventually(lambda: not any(c.book.placements for c in cores), "nothing is held")

    run(test())


def test_a_worker_that_comes_by_another_scheduler_keeps_its_requests(redis: RedisProcess) -> None:
    async def test() -> None:
        async with schedulers(redis.url, 2) as several:
            await several.clients[0].join("w0")
            await eventually(lambda: all(view(s)["instances"] for s in several.servers), "the worker is known")
            await several.clients[0].place("r1")
            cores = [s.shell.core for s in several.servers]
            await eventually(lambda: len(cores[1].book.placements) == 1, "the placement is known")
            await several.clients[1].join("w0")
            await eventually(lambda: cores[0].cluster.instances["w0"].peer == "s1", "it has moved")
            assert cores[1].cluster.instances["w0"].peer == ""
            assert [len(c.book.placements) for c in cores] == [1, 1]
            await several.agree("moved")

    run(test())


def test_reports_and_heartbeats_keep_remote_members_alive(redis: RedisProcess) -> None:
    async def test() -> None:
        async with schedulers(redis.url, 2) as several:
            worker = await several.clients[0].join("w0")
            await several.clients[0].attach("node-0", "a0..a3")
            await eventually(lambda: view(several.servers[1])["instances"], "the worker is known")
            cluster = several.servers[1].shell.core.cluster
            await worker.say(clients.report(running=3, kv_tokens_free=1234, draining=True))
            await eventually(lambda: cluster.instances["w0"].kv_tokens_free == 1234, "the report")
            assert cluster.instances["w0"].running == 3 and cluster.instances["w0"].draining
            await eventually(lambda: "node-0" in cluster.sources, "the node is known")
            seen_us = cluster.sources["node-0"].seen_us
            await eventually(lambda: cluster.sources["node-0"].seen_us > seen_us, "a heartbeat")

    run(test())


def test_a_role_is_ordered_where_the_life_line_is_and_known_everywhere(redis: RedisProcess) -> None:
    async def test() -> None:
        async with schedulers(redis.url, 2) as several:
            worker = await several.clients[0].join("w0", role=Role.PREFILL, role_changeable=True)
            for name in ("w1", "w2"):
                await several.clients[1].join(name, role=Role.PREFILL if name == "w1" else Role.DECODE)
            await eventually(lambda: all(len(view(s)["instances"]) == 3 for s in several.servers), "all are known")
            refused = several.servers[1].shell.submit(events.RoleOrdered("w0", Role.DECODE))
            assert [c.why for c in refused if isinstance(c, RoleRefused)] == ["its life line is at scheduler s0"]
            # Whichever scheduler an operator names first, the one that can do it is found.
            addresses = ",".join(server.address for server in reversed(several.servers))
            await asyncio.to_thread(Cluster(addresses).set_role, "w0", "decode")
            assert (await worker.hear()).role == Role.DECODE
            await worker.say(clients.report(role=Role.DECODE))
            instances = [s.shell.core.cluster.instances for s in several.servers]
            await eventually(lambda: all(i["w0"].info.role is Role.DECODE for i in instances), "the role is known")
            await several.agree("a role changed")

    run(test())


def test_journals_with_remote_events_replay(redis: RedisProcess, tmp_path: Path) -> None:
    async def test() -> list[str]:
        async with schedulers(redis.url, 2, journal=str(tmp_path / "journals")) as several:
            node = await several.clients[0].attach("node-0", "a0..a9")
            await several.clients[0].join("w0")
            await eventually(lambda: blocks_of(several, 1, "node-0") == 10, "the blocks are known")
            await eventually(lambda: view(several.servers[1])["instances"], "the worker is known")
            for n in range(6):
                await several.clients[n % 2].place(f"r{n}", "a0..a9")
                await node.say(clients.stored(n + 1, f"b{n}"))
            await eventually(lambda: blocks_of(several, 1, "node-0") == 16, "all changes")
            cores = [s.shell.core for s in several.servers]
            await eventually(lambda: all(c.counts["peer_placements"] == 3 for c in cores), "the other's placements")
            return [s.facts()["journal"] for s in several.servers]

    paths: list[str] = []

    async def kept() -> None:
        paths.extend(await test())

    run(kept())
    for path in paths:
        replay = replay_file(path)
        assert replay.identical and len(replay.decisions) == 3
        assert replay.core.counts["peer_placements"] == 3
