"""Fixtures of the tests of the cluster."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest

with contextlib.suppress(pytest.skip.Exception):  # the modules of the tests are skipped by it too
    import testing


@pytest.fixture(scope="module")
def one_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[testing.Redis]:
    redis = testing.Redis(tmp_path_factory.mktemp("redis"))
    yield redis
    redis.client.close()
    redis.program.end(signal.SIGKILL)


@pytest.fixture
def redis(one_redis: testing.Redis) -> testing.Redis:
    one_redis.recover()
    return one_redis


@pytest.fixture
def cluster(redis: testing.Redis, tmp_path: Path) -> Iterator[testing.Cluster]:
    cluster = testing.Cluster(redis, tmp_path)
    yield cluster
    for program in cluster.programs:
        program.signal_all()
        program.process.wait(testing.TIMEOUT)
    for log in tmp_path.glob("web*.log"):
        assert "Traceback" not in log.read_text(), log.read_text()


@pytest.fixture
async def client() -> AsyncIterator[testing.Client]:
    session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(testing.LATEST))
    async with session, contextlib.AsyncExitStack() as stack:
        yield testing.Client(session, stack)
