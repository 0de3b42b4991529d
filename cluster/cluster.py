#!/usr/bin/env python3
"""The server of ../server.py on many processes and machines.

Redis keeps the images, so that any process serves any of them, and one channel tells every process of a new one.
"""

import asyncio
import contextlib
import json
import logging
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

sys.path.insert(0, str(Path(__file__).parent.parent))

import server
from server import Annotated, Config, Face, Image, Problem, Store, option

PROMISE = 2000  # ms until the promise of a process that died is gone
TIMEOUT = 3  # s for an answer of Redis
POLL = 0.1  # s between looks at a promise
RETRY = 0.5  # s between attempts to subscribe
KEEP = """  -- all of it by the time ARGV[1], or nothing: a paused Redis would do it when nobody waits for it any more
    local now = redis.call('TIME')
    if now[1] + now[2] / 1e6 > tonumber(ARGV[1]) then return redis.error_reply('it came too late') end
    redis.call('SET', KEYS[1], ARGV[2], 'EX', ARGV[3])
    if ARGV[5] ~= '' then redis.call('PUBLISH', ARGV[4], ARGV[5]) end
"""

log = logging.getLogger("faces.cluster")


@dataclass(frozen=True)
class ClusterConfig(Config):
    """What can be set: all that server.py has, and Redis."""

    keep: int = option(100, "without effect, since Redis keeps the images")
    keep_mb: int = option(128, "without effect, since Redis keeps the images")
    redis_url: str = option("redis://localhost:6379/0", "Redis, with a database of its own")
    keep_seconds: int = option(3600, "seconds to keep an image, where Redis has room for so long")


@contextlib.contextmanager
def redis_needed() -> Iterator[None]:
    """Answer 503 where Redis does not do what it is asked for."""
    try:
        yield
    except RedisError as error:
        log.warning("Redis is away: %s", error)
        raise Problem(503, "The images are out of reach: Redis is away (--redis-url).") from None


class RedisStore(Store):
    """What became of each photo, in Redis, and the channel for what is new.

    The key of an id holds its Image or its Problem, or b"" as long as it is promised.
    """

    def __init__(self, config: ClusterConfig) -> None:
        pool = BlockingConnectionPool.from_url(
            config.redis_url,
            timeout=TIMEOUT,
            socket_timeout=TIMEOUT,
            socket_connect_timeout=TIMEOUT,
            retry=Retry(NoBackoff(), 0),  # Redis may have done what it did not answer: once is enough
            protocol=2,  # with 3, redis-py 8.1 takes a connection that Redis has closed for a good one
        )
        self.redis = Redis.from_pool(pool)
        self.keep_seconds = config.keep_seconds
        self.renewals: dict[str, asyncio.Task[None]] = {}  # a task for each promise
        self.process = str(uuid.uuid4()).encode()
        self.channel = f"faces:{pool.connection_kwargs.get('db', 0)}"  # channels are common to all databases
        self.subscribed = asyncio.Event()

    async def promise(self, id: str) -> None:
        with redis_needed():
            await self.redis.set(f"faces:{id}", b"", px=PROMISE)
        self.renewals[id] = asyncio.create_task(self.renew(id))

    async def renew(self, id: str) -> None:
        """Have a promise last as long as this process."""
        while True:
            await asyncio.sleep(PROMISE / 1000 / 4)
            with contextlib.suppress(RedisError):
                await self.redis.pexpire(f"faces:{id}", PROMISE, gt=True)  # gt: put() may have been faster

    async def put(self, id: str, outcome: Image | Problem) -> None:
        """Keep an outcome, and tell the other processes of an image, whose own watchers the server tells next."""
        if id in self.renewals:
            self.renewals.pop(id).cancel()
        value = encode(outcome)
        news = self.process + b" " + value.partition(b"\n")[0] if isinstance(outcome, Image) else b""
        try:
            with redis_needed():
                seconds, microseconds = await self.redis.time()
                deadline = f"{seconds + TIMEOUT}.{microseconds:06}"
                await self.redis.eval(KEEP, 1, f"faces:{id}", deadline, value, self.keep_seconds, self.channel, news)
        except Problem:
            if isinstance(outcome, Image):  # otherwise, the promise soon lapses
                raise

    async def get(self, id: str) -> Image | Problem:
        with redis_needed():
            value = await self.redis.get(f"faces:{id}")
            while value == b"":
                await asyncio.sleep(POLL)
                value = await self.redis.get(f"faces:{id}")
        if value is None:
            raise Problem(404, "There is no such image; Redis lets go of the old and the unused (--keep-seconds).")
        return decode(value)

    async def health(self) -> dict[str, Any]:
        try:
            await self.check()
            images, memory = await self.redis.dbsize() - len(self.renewals), await self.redis.info("memory")
            return {"images": images, "bytes": memory["used_memory"]}
        except (Problem, RedisError):
            return {"status": "no Redis", "images": None, "bytes": None}

    async def check(self) -> None:
        """Raise Problem where Redis is away."""
        with redis_needed():
            if not self.subscribed.is_set():
                raise RedisError("not subscribed")
            await self.redis.ping()

    @web.middleware
    async def check_first(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Take no photo that could not be kept."""
        if handler is server.post_image:
            await self.check()
        return await handler(request)

    async def relay(self, app: web.Application) -> None:
        """Announce what the other processes publish. When Redis goes away, begin again until it is back."""
        while True:
            try:
                async with self.redis.pubsub() as channel:
                    await channel.subscribe(self.channel)
                    while True:
                        message = await channel.get_message(timeout=TIMEOUT)
                        if not message:  # nothing is new, or Redis is gone without a goodbye
                            await channel.ping()
                            message = await channel.get_message(timeout=TIMEOUT)
                        if not message:
                            raise RedisError("it does not answer")
                        if message["type"] == "subscribe":
                            self.subscribed.set()
                        if message["type"] == "message" and not message["data"].startswith(self.process):
                            image = decode(message["data"].partition(b" ")[2])
                            assert isinstance(image, Image)
                            await server.announce(app, image)
            except Exception as error:
                if self.subscribed.is_set():
                    log.warning("The subscription is lost: %r", error)
            self.subscribed.clear()
            await asyncio.sleep(RETRY)

    async def stay_subscribed(self, app: web.Application) -> AsyncIterator[None]:
        """Subscribe before the first request, and until after the last."""
        relay = asyncio.create_task(self.relay(app))
        try:
            await asyncio.wait_for(self.subscribed.wait(), TIMEOUT)
        except TimeoutError:
            log.warning("Redis is away (--redis-url); photos are refused until it is there")
        yield
        relay.cancel()
        await asyncio.wait([relay])
        await self.redis.aclose()


def encode(outcome: Image | Problem) -> bytes:
    """An outcome as a line of JSON, with the JPEG after it."""
    if isinstance(outcome, Problem):
        return json.dumps({"status": outcome.status, "detail": outcome.detail}).encode()
    return json.dumps(outcome.meta("")).encode() + b"\n" + outcome.annotated.jpeg


def decode(value: bytes) -> Image | Problem:
    """The outcome that was encoded."""
    line, _, jpeg = value.partition(b"\n")
    known = json.loads(line)
    if "status" in known:
        return Problem(known["status"], known["detail"])
    faces = [Face(**box) for box in known["faces"]]
    return Image(
        known["id"], known["filename"], known["took_ms"], Annotated(jpeg, known["width"], known["height"], faces)
    )


def create_app(config: ClusterConfig) -> web.Application:
    """The server, with its images in Redis."""
    try:
        store = RedisStore(config)
    except ValueError as error:
        sys.exit(f"{error} (--redis-url)")
    app = server.create_app(config)
    app[server.STORE] = store
    app.middlewares.append(store.check_first)
    app.cleanup_ctx.append(store.stay_subscribed)
    return app


def app(*options: str) -> web.Application:
    """The server for gunicorn, with its options in brackets: 'cluster:app("--keep-seconds=60")'."""
    config = server.parse_config(list(options), ClusterConfig)
    assert isinstance(config, ClusterConfig)
    return create_app(config)


if __name__ == "__main__":
    server.main(create_app, ClusterConfig)
