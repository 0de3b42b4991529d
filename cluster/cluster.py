#!/usr/bin/env python3
"""The server of ../server.py on many processes and machines.

Redis keeps the images, so any process serves any of them. A channel of Redis tells every process
of a new image.
"""

import asyncio
import contextlib
import itertools
import json
import logging
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from aiohttp import web
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

sys.path.insert(0, str(Path(__file__).parent.parent))

import server
from server import BadPhoto, Config, Detector, Image, Server, WrongFormat

KEEP_SECONDS = 3600  # the default
PROMISE = 2  # seconds until the photos of a process that died are given up
REFUSAL = 60  # seconds to keep what is wrong with a photo
TIMEOUT = 3  # seconds for an answer of Redis
POLL = 0.1  # seconds between looks at a photo that another process works on
RETRY = 0.5  # seconds between attempts to subscribe
NEWEST = "newest"  # the key of a list: the news of the last images
LISTED = 100  # images in that list

# It does everything by ARGV[1], or nothing: a Redis that was paused would do it later, though the
# poster was told that it failed.
KEEP = """
    local now = redis.call('TIME')
    if now[1] + now[2] / 1e6 > tonumber(ARGV[1]) then return redis.error_reply('too late') end
    redis.call('SET', KEYS[1], ARGV[2], 'EX', ARGV[3])
    redis.call('LPUSH', KEYS[2], ARGV[4])
    redis.call('LTRIM', KEYS[2], 0, ARGV[5] - 1)
    redis.call('PUBLISH', ARGV[6], ARGV[4])
"""

log = logging.getLogger("faces.cluster")


class RedisAway(Exception):
    """Redis did not keep an image."""


@contextlib.contextmanager
def redis_needed() -> Iterator[None]:
    """Answer 503 if Redis does not do what it is asked for."""
    try:
        yield
    except RedisError as error:
        log.warning("Redis is away: %s", error)
        raise web.HTTPServiceUnavailable(text="Redis is away (--redis-url).") from None


class ClusterServer(Server):
    """The server, with its images in Redis.

    The key of a photo holds its Image or what is wrong with it; b"" while a process works on it.
    """

    def __init__(
        self, config: Config, detector: Detector | None, redis_url: str, keep_seconds: int
    ) -> None:
        super().__init__(config, detector)
        pool = BlockingConnectionPool.from_url(
            redis_url,
            timeout=TIMEOUT,
            socket_timeout=TIMEOUT,
            socket_connect_timeout=TIMEOUT,
            retry=Retry(NoBackoff(), 0),  # Redis may have done what it did not answer
            protocol=2,  # with 3, redis-py 8.1 reuses connections that Redis has closed
        )
        self.redis = Redis.from_pool(pool)
        self.keep_seconds = keep_seconds
        self.process = str(uuid.uuid4()).encode()
        self.channel = f"faces:{pool.connection_kwargs.get('db', 0)}"  # all databases share them
        self.subscribed = asyncio.Event()

    async def start_job(self, id: str, photo: bytes, name: str | None, keep: bool) -> None:
        """Start to annotate a photo, and promise all processes that something will come of it."""
        if keep:
            with redis_needed():
                await self.redis.set(key_of(id), b"", px=PROMISE * 1000)
        await super().start_job(id, photo, name, keep)

    async def run_job(self, id: str, photo: bytes, name: str | None, keep: bool) -> Any:
        """Annotate a photo, and tell all processes if nothing comes of it."""
        renewal = asyncio.create_task(self.renew(id))
        try:
            outcome = await super().run_job(id, photo, name, keep)
        except RedisAway as error:
            return RedisAway(*error.args)  # a copy, since the traceback keeps the photo
        finally:
            renewal.cancel()
        if keep and isinstance(outcome, Exception):
            with contextlib.suppress(RedisError):
                await self.redis.set(key_of(id), encode(outcome), ex=REFUSAL)
        return outcome

    async def renew(self, id: str) -> None:
        """Have a promise last as long as this process."""
        while True:
            await asyncio.sleep(PROMISE / 4)
            with contextlib.suppress(RedisError):  # gt, as the image may be there by now
                await self.redis.pexpire(key_of(id), PROMISE * 1000, gt=True)

    async def put(self, id: str, image: Image) -> None:
        """Keep an image, and tell the other processes."""
        key, value = key_of(id), encode(image)
        news = self.process + b" " + value.partition(b"\n")[0]
        try:
            seconds, microseconds = await self.redis.time()
            deadline = f"{seconds + TIMEOUT}.{microseconds:06}"
            await self.redis.eval(
                KEEP, 2, key, NEWEST, deadline, value, self.keep_seconds, news, LISTED, self.channel
            )
        except RedisError as error:
            log.warning("Redis is away: %s", error)
            raise RedisAway("Redis is away (--redis-url).") from None

    async def get(self, id: str) -> Any:
        """Return what became of a photo, as soon as it is known."""
        if id in self.jobs:
            return await super().get(id)
        with redis_needed():
            value: Any = await self.redis.get(key_of(id))
            while value == b"":
                await asyncio.sleep(POLL)
                value = await self.redis.get(key_of(id))
        if value is None:
            raise web.HTTPNotFound(text="There is no such image (any more: --keep-seconds).")
        return decode(value)

    async def newest_first(self) -> list[Image]:
        """Return the last images, without their JPEGs, and without those that Redis dropped."""
        with redis_needed():
            listed: Any = await self.redis.lrange(NEWEST, 0, -1)
            images = [from_news(news) for news in listed]
            pipeline = self.redis.pipeline(transaction=False)
            for image in images:
                pipeline.exists(key_of(image.meta["id"]))
            return list(itertools.compress(images, await pipeline.execute()))

    async def relay(self) -> None:
        """Announce what other processes publish. If Redis goes away, retry until it is back."""
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
                        news = message["data"] if message["type"] == "message" else self.process
                        if not news.startswith(self.process):
                            await self.announce(from_news(news))
            except Exception as error:
                if self.subscribed.is_set():
                    log.warning("The subscription is lost: %r", error)
            self.subscribed.clear()
            await asyncio.sleep(RETRY)

    async def stay_subscribed(self, app: web.Application) -> AsyncIterator[None]:
        """Subscribe before the first request, and until after the last."""
        relay = asyncio.create_task(self.relay())
        try:
            await asyncio.wait_for(self.subscribed.wait(), TIMEOUT)
        except TimeoutError:
            log.warning("Redis is away (--redis-url); photos are refused until it is there")
        yield
        relay.cancel()
        await asyncio.wait([relay])
        await self.redis.aclose()

    async def get_images(self, request: web.Request) -> web.Response:
        base = self.base_url(request)
        return server.reply([image.meta_at(base) for image in await self.newest_first()])

    async def get_health(self, request: web.Request) -> web.Response:
        with redis_needed():
            if not self.subscribed.is_set():
                raise RedisError("not subscribed")
            keys, memory = await self.redis.dbsize(), await self.redis.info("memory")
        held = {"images": keys, "bytes": memory["used_memory"], "queued": len(self.jobs)}
        return server.reply({"status": "ok", "clients": len(self.watchers)} | held)


def key_of(id: str) -> str:
    """Return the key of a photo in Redis."""
    return f"faces:{id}"


def encode(outcome: Image | Exception) -> bytes:
    """Return an image as a line of JSON and its JPEG, or an exception as JSON."""
    if isinstance(outcome, Exception):
        return json.dumps({"error": type(outcome).__name__, "text": str(outcome)}).encode()
    return json.dumps(outcome.meta).encode() + b"\n" + outcome.jpeg


def decode(value: bytes) -> Image | Exception:
    """Return what was encoded."""
    line, _, jpeg = value.partition(b"\n")
    known = json.loads(line)
    for error in (BadPhoto, WrongFormat, MemoryError, server.cv2.error):
        if known.get("error") == error.__name__:
            return error(known["text"])
    return Image(0, jpeg, known)


def from_news(news: bytes) -> Image:
    """Return the image that a process told of, without its JPEG."""
    return Image(0, b"", json.loads(news.partition(b" ")[2]))


def create_app(
    config: Config,
    redis_url: str,
    keep_seconds: int = KEEP_SECONDS,
    detector: Detector | None = None,
) -> web.Application:
    """Return the server, with its images in Redis. Raises ValueError if the URL is invalid."""
    app = web.Application()
    faces = ClusterServer(config, detector, redis_url, keep_seconds)
    faces.set_up(app)
    app.cleanup_ctx.append(faces.stay_subscribed)
    return app


def app(*arguments: str) -> web.Application:
    """Return the server with the options of a command line, as gunicorn needs it."""
    parser = server.make_parser()
    parser.description = "--keep and --keep-mb have no effect, since Redis keeps the images."
    parser.add_argument("--redis-url", help="Redis, with a database of its own")
    parser.add_argument("--keep-seconds", type=int, help="seconds to keep an image")
    parser.set_defaults(redis_url="redis://localhost:6379/0", keep_seconds=KEEP_SECONDS)
    options = vars(parser.parse_args(arguments))
    redis_url, keep_seconds = options.pop("redis_url"), options.pop("keep_seconds")
    return create_app(Config(**options), redis_url, keep_seconds)


def main() -> None:
    """Run one process with the options of the command line."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        faces = app(*sys.argv[1:])
    except (OSError, ValueError) as error:
        sys.exit(f"The model or the URL is invalid (--model, --redis-url): {error}")
    server.serve(faces)


if __name__ == "__main__":
    main()
