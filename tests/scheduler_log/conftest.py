"""Schedulers that share a real Redis, in one event loop, with raw life lines to each."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# The clients and made events of the scheduler's own tests.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scheduler"))

from scheduler.service.eventlog import redis_stream
from tests.scheduler_log.redis_process import REDIS, RedisProcess

#: A machine that stands still for a moment is no outage: only tests of outages have the log's own limit.
COMMAND_TIMEOUT_S = 30.0

pytest.importorskip("redis", reason="the redis package is not installed")


@pytest.fixture
def redis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RedisProcess]:
    if REDIS is None:
        pytest.skip("redis-server is not installed")
    monkeypatch.setattr(redis_stream, "COMMAND_TIMEOUT_S", COMMAND_TIMEOUT_S)
    process = RedisProcess(tmp_path)
    try:
        process.start()
        yield process
    finally:
        process.kill()
