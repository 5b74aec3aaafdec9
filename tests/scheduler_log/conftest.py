"""Schedulers that share a real Redis, in one event loop, with raw life lines to each."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# The clients and made events of the scheduler's own tests.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scheduler"))

from tests.scheduler_log.redis_process import REDIS, RedisProcess

pytest.importorskip("redis", reason="the redis package is not installed")


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisProcess]:
    if REDIS is None:
        pytest.skip("redis-server is not installed")
    process = RedisProcess(tmp_path)
    try:
        process.start()
        yield process
    finally:
        process.kill()
