#!/usr/bin/env python3
"""A web process of the cluster: the handlers and watchers of server.py, with workers behind."""

import asyncio
import json
import logging
import os
import sys
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import suppress

import worker  # isort: skip (it finds server.py)
from aiohttp import web
from aiohttp.typedefs import Handler
from kombu.exceptions import OperationalError
from redis.asyncio import BlockingConnectionPool, Redis
from redis.exceptions import OutOfMemoryError, RedisError

import server
from server import BadPhoto, Config, Image

LONGEST_WAIT = 70  # seconds for a photo; nginx waits for 75
CLUSTER: web.AppKey["Cluster"] = web.AppKey("CLUSTER")
Outcome = Image | BadPhoto | None  # of a photo; None means: look again
News = asyncio.Future[Outcome]
log = logging.getLogger("faces.cluster")


class Cluster(server.ImageStore):
    """The images in Redis; those that were asked for are in memory too, as no image changes."""

    def __init__(self, config: Config, redis_url: str, keep_seconds: int) -> None:
        super().__init__(config.keep, config.keep_mb)
        # With a pool of one's own, nothing is tried again: Redis may have done it.
        pool = BlockingConnectionPool.from_url(redis_url, **worker.CONNECTION)
        self.redis, self.database = Redis.from_pool(pool), pool.connection_kwargs.get("db", 0)
        self.keep_seconds, self.queue = keep_seconds, config.queue
        self.threads = 0  # of all workers
        self.ahead = 0.0  # seconds by which the clock of Redis is
        self.has_news = asyncio.Event()  # set while Redis tells what comes of photos
        self.news = defaultdict[str, News](asyncio.Future)  # what will come of photos, by id

    async def get(self, image_id: str) -> Image | None:
        """Return an image as soon as it is done. Raises BadPhoto, TimeoutError or RedisError."""
        image, key = await super().get(image_id), f"faces:image:{image_id}"
        if image:
            (uses,) = await asyncio.gather(self.redis.touch(key), return_exceptions=True)
            if uses != 0:  # if it is an error, the copy serves; else Redis has dropped the image
                return image
        news = self.news[image_id]  # from here on, none is missed
        lookup = self.redis.pipeline().hmget(key, "json", "jpeg").zscore("faces:jobs", image_id)
        (line, jpeg), overdue = await lookup.execute()
        if overdue is not None and not line:
            await asyncio.wait_for(asyncio.shield(news), LONGEST_WAIT)
            return await self.get(image_id)
        outcome = read(line, jpeg)[1] if line else None
        self.tell(image_id, outcome)
        if isinstance(outcome, BadPhoto):
            raise outcome
        if outcome:
            await self.put(outcome)
        return outcome

    async def newest(self) -> list[Image]:
        """Return the newest images, without their JPEGs."""
        lines = await worker.run(self.redis, "newest")
        return [image for _, image in map(read, lines) if isinstance(image, Image)]

    async def count(self) -> server.Json:
        """Return how many images Redis has, its memory, and all photos in work, for /health."""
        held, queued = await self.redis.info(), await self.redis.zcard("faces:jobs")
        if not self.has_news.is_set():
            raise RedisError("There are no news.")
        images = held.get(f"db{self.database}", {}).get("expires", 0)
        return {"images": images, "bytes": held["used_memory"], "queued": queued}

    async def accept(self, filename: str | None, photo: bytes) -> tuple[str, News]:
        """Keep a photo in Redis, from where it cannot get lost, and send it to a worker."""
        photo_id, most_jobs = str(uuid.uuid4()), max(1, self.threads) * (1 + self.queue)
        name, now = json.dumps(filename), time.time() + self.ahead
        posted = photo, name, self.keep_seconds, now, most_jobs, worker.OVERDUE
        refusal = await worker.run(self.redis, "accept", photo_id, *posted)
        if refusal:
            raise web.HTTPServiceUnavailable(text=refusal.decode())
        news = self.news[photo_id]  # before there can be any
        await asyncio.to_thread(send, photo_id)
        return photo_id, news

    def tell(self, photo_id: str, outcome: Outcome) -> None:
        """Tell those who wait for a photo what came of it."""
        if photo_id in self.news:
            self.news.pop(photo_id).set_result(outcome)


def read(line: bytes, jpeg: bytes = b"") -> tuple[str, Outcome]:
    """Return the id of a photo and what came of it; None for what a stranger wrote."""
    try:
        known = json.loads(line)
        photo_id, filename = str(known.pop("id")), known.pop("filename", None)
        if "error" in known:
            return photo_id, BadPhoto(known["error"], known["status"])
        known["faces"] = list(known["faces"])
        return photo_id, Image(photo_id, filename, jpeg, known, created=0)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        log.warning("Skipped what a stranger wrote to Redis: %.99r: %r", line, error)
        return "", None


def send(photo_id: str) -> None:
    """Send a photo to the workers; if that fails, it is sent again once it is overdue."""
    try:
        worker.annotate.apply_async([photo_id], retry=False)
    except OperationalError as error:
        log.warning("%s is sent later: %s", photo_id, error)


async def annotate(app: web.Application, filename: str | None, photo: bytes) -> Image:
    """Have a worker annotate a photo, which then keeps the image and tells all web processes."""
    app[server.JOBS].discard(asyncio.current_task())  # it takes no thread of this process
    photo_id, news = await app[CLUSTER].accept(filename, photo)
    image = await asyncio.wait_for(asyncio.shield(news), LONGEST_WAIT)
    image = image or await app[CLUSTER].get(photo_id)
    if image is None:
        raise web.HTTPServiceUnavailable(text="Redis has lost the photo; post it again.")
    if isinstance(image, BadPhoto):
        raise image
    log.info("%r: %d faces in %d ms", filename, len(image.found["faces"]), image.found["took_ms"])
    return image


@web.middleware
async def use_redis(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer at once whoever prefers that (RFC 7240), and 503 if Redis fails."""
    is_later = "respond-async" in request.headers.get("Prefer", "").lower()
    try:
        if not is_later or request.match_info.handler != server.post_image:
            return await handler(request)
        photo_id, _ = await request.app[CLUSTER].accept(*await server.read_photo(request))
        url = f"{server.base_url(request)}image/{photo_id}"
        headers = {"Location": url, "Preference-Applied": "respond-async"}
        return server.reply({"id": photo_id, "url": url}, status=202, headers=headers)
    except TimeoutError:
        text = "The photo waits for a worker; try its URL later."
    except OutOfMemoryError:
        text = "Redis is full (--maxmemory)."
    except RedisError as error:
        log.warning("Redis is away: %r", error)
        text = "Redis is away (--redis-url)."
    raise web.HTTPServiceUnavailable(text=text)


async def read_news(app: web.Application) -> None:
    """Tell what comes of photos, to watchers and to whoever waits; go on when Redis is back."""
    cluster, last = app[CLUSTER], {}
    while True:
        try:
            if not last:
                now, _ = await cluster.redis.time()
                last = dict.fromkeys(["faces:images", "faces:errors"], f"{now}000-0")
            milliseconds = 1000 if cluster.has_news.is_set() else None
            for stream, entries in await cluster.redis.xread(last, count=100, block=milliseconds):
                for entry_id, entry in entries:
                    last[stream.decode()] = entry_id
                    photo_id, outcome = read(entry.get(b"json", b""))
                    cluster.tell(photo_id, outcome)
                    if isinstance(outcome, Image):
                        await server.announce(app, outcome)
            if not cluster.has_news.is_set():  # what is waited for may be lost
                for photo_id in list(cluster.news):
                    cluster.tell(photo_id, None)
            cluster.has_news.set()
        except RedisError as error:
            log.warning("There are no news from Redis: %r", error)
            cluster.has_news.clear()
            await asyncio.sleep(0.5)


async def look_after_jobs(app: web.Application) -> None:
    """Each second, count the processes of all workers, and send again what is overdue."""
    cluster, redis = app[CLUSTER], app[CLUSTER].redis
    process = {"name": worker.NAME, "db": str(cluster.database)}
    while True:
        with suppress(RedisError):  # read_news() says so
            seconds, microseconds = await redis.time()
            cluster.ahead = seconds + microseconds / 1e6 - time.time()
            clients = await redis.client_list()
            cluster.threads = sum(process.items() <= client.items() for client in clients)
            for photo_id in await worker.run(redis, "overdue", worker.OVERDUE):
                await asyncio.to_thread(send, photo_id.decode())
        await asyncio.sleep(1)


async def run_background(app: web.Application) -> AsyncIterator[None]:
    """Do both before the first request, and until after the last."""
    tasks = {asyncio.create_task(each(app)) for each in (read_news, look_after_jobs)}
    with suppress(TimeoutError):  # seconds; without Redis it starts too, and answers 503
        await asyncio.wait_for(app[CLUSTER].has_news.wait(), 3)
    yield
    while tasks:  # redis-py may miss that it is cancelled
        for task in tasks:
            task.cancel()
        _, tasks = await asyncio.wait(tasks, timeout=0.1)
    await app[CLUSTER].redis.aclose()


async def answer_waiting(app: web.Application) -> None:
    """Wait for those photos for which somebody waits here."""
    if app[CLUSTER].news:
        await asyncio.wait(app[CLUSTER].news.values(), timeout=server.LONGEST_STOP)


def create_app(config: Config, redis_url: str, keep_seconds: int) -> web.Application:
    """Return a web process as an application. Raises OSError or ValueError for bad settings."""
    app, worker.app.conf.broker_url = server.create_app(config), redis_url
    app[CLUSTER] = app[server.IMAGES] = Cluster(config, redis_url, keep_seconds)
    app[server.ANNOTATE] = annotate
    app.middlewares.append(use_redis)
    app.cleanup_ctx.append(run_background)
    app.on_shutdown.insert(0, answer_waiting)
    return app


def main() -> None:
    """Run a web process with the options of the command line."""
    parser = server.make_parser()
    parser.add_argument("--redis-url", default=worker.app.conf.broker_url, help="Redis")
    parser.add_argument("--keep-seconds", type=int, default=3600, help="for which Redis has images")
    options = vars(parser.parse_args())
    redis_options = options.pop("redis_url"), options.pop("keep_seconds")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        with suppress(web.GracefulExit, KeyboardInterrupt):  # a second Ctrl+C
            server.serve(create_app(Config(**options), *redis_options))
    except (OSError, OverflowError, ValueError) as error:
        sys.exit(f"It cannot start (--host, --port, --model, --redis-url): {error}")
    os._exit(0)  # Python would wait for threads whose photos take minutes


if __name__ == "__main__":
    main()
