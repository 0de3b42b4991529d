#!/usr/bin/env python3
"""A web process of the cluster: the handlers and watchers of server.py, with workers behind them.

python cluster/web.py --redis-url redis://localhost:6379/0 --port 8282
"""

import asyncio
import json
import logging
import os
import re
import sys
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import suppress

import jobs  # isort: skip (it finds server.py)
from aiohttp import web
from aiohttp.typedefs import Handler
from redis.asyncio import BlockingConnectionPool, Redis
from redis.exceptions import OutOfMemoryError, RedisError

import server
from server import BadPhoto, Config, Image

LONGEST_WAIT = 70  # seconds for a photo; nginx waits for 75
LISTED = 100  # images at GET /image
SHARE = 0.5  # of the memory of Redis that photos in work may fill
NEWS_TIMEOUT = 1000  # ms after which Redis says that there are none
PAUSE = 0.5  # seconds until Redis is tried again
BAD = {"BadPhoto": BadPhoto, "WrongFormat": server.WrongFormat}
Outcome = tuple[str, Image | BadPhoto | None]  # with the id of the photo
News = asyncio.Future[Image | BadPhoto | None]  # None means: look again


class Cluster(server.ImageStore):
    """The images in Redis; those that were asked for are in memory too, as no image changes."""

    def __init__(self, config: Config, redis_url: str, keep_seconds: int) -> None:
        super().__init__(config.keep, config.keep_mb)
        # Nothing is tried twice, since Redis may have done what it did not answer.
        options = {**jobs.CONNECTION, "timeout": jobs.TIMEOUT, "retry": None}
        self.redis = Redis.from_pool(BlockingConnectionPool.from_url(redis_url, **options))
        self.database = self.redis.get_connection_kwargs().get("db", 0)
        self.keep_seconds, self.queue = keep_seconds, config.queue
        self.threads = 0  # of all workers
        self.ahead = 0.0  # seconds by which the clock of Redis is
        self.has_news = False  # whether Redis tells what comes of photos
        self.news: dict[str, News] = {}  # what will come of photos, by id

    async def get(self, image_id: str) -> Image | None:
        """Return an image as soon as it is done. Raises BadPhoto, TimeoutError or RedisError."""
        image, key = await super().get(image_id), jobs.IMAGE + image_id
        if image and await self.redis.touch(key):  # this is a use of it for Redis too
            return image
        news = self.news_of(image_id)  # from here on, none is missed
        lookup = self.redis.pipeline().hmget(key, "json", "jpeg").zscore(jobs.JOBS, image_id)
        (line, jpeg), in_work = await lookup.execute()
        if in_work is not None and not line:
            await wait_for(news)
            return await self.get(image_id)
        _, outcome = read(line, jpeg) if line else ("", None)
        self.tell(image_id, outcome)
        if isinstance(outcome, BadPhoto):
            raise outcome
        if outcome:
            await self.put(outcome)
        return outcome

    async def newest(self) -> list[Image]:
        """Return the newest images, without their JPEGs."""
        lines = await jobs.run(self.redis, "newest", jobs.IMAGES, jobs.IMAGE, LISTED)
        return [image for _, image in map(read, lines) if isinstance(image, Image)]

    async def count(self) -> server.Json:
        """Return how many images Redis has, its memory, and all photos in work, for /health."""
        held, queued = await self.redis.info(), await self.redis.zcard(jobs.JOBS)
        if not self.has_news:
            raise RedisError("There are no news.")
        keys = held.get(f"db{self.database}", {"expires": 0})
        return {"images": keys["expires"], "bytes": held["used_memory"], "queued": queued}

    async def accept(self, filename: str | None, photo: bytes) -> tuple[str, News]:
        """Keep a photo in Redis, from where it cannot get lost, and send it to a worker."""
        photo_id, now = str(uuid.uuid4()), time.time() + self.ahead
        posted = {"filename": filename, "at": now, "keep_seconds": self.keep_seconds}
        most_jobs = max(1, self.threads) * (1 + self.queue)
        limits = len(photo), now + jobs.TIMEOUT, most_jobs, jobs.OVERDUE, SHARE
        key, values = jobs.PHOTO + photo_id, {"json": json.dumps(posted), "photo": photo}
        steps = self.redis.pipeline().hset(key, mapping=values)
        _, refusal = await jobs.run(steps, "accept", photo_id, key, *limits).execute()
        if refusal:
            raise web.HTTPServiceUnavailable(text=refusal.decode())
        news = self.news_of(photo_id)  # before there can be any
        await asyncio.to_thread(jobs.send, photo_id)
        return photo_id, news

    def news_of(self, photo_id: str) -> News:
        """Return what will come of a photo."""
        if photo_id not in self.news:
            self.news[photo_id] = asyncio.get_running_loop().create_future()
        return self.news[photo_id]

    def tell(self, photo_id: str, outcome: Image | BadPhoto | None) -> None:
        """Tell those who wait for a photo what came of it."""
        if photo_id in self.news:
            self.news.pop(photo_id).set_result(outcome)


CLUSTER = web.AppKey("CLUSTER", Cluster)


async def wait_for(news: News) -> Image | None:
    """Wait for what comes of a photo. Raises BadPhoto or TimeoutError."""
    outcome = await asyncio.wait_for(asyncio.shield(news), LONGEST_WAIT)
    if isinstance(outcome, BadPhoto):
        raise outcome
    return outcome


def read(line: bytes, jpeg: bytes = b"") -> Outcome:
    """Return what came of a photo; nothing, but a line in the log, for what a stranger wrote."""
    try:
        known = json.loads(line)
        photo_id, filename = str(known.pop("id")), known.pop("filename", None)
        if "error" in known:
            return photo_id, BAD[known["error"]](known["text"])
        known["faces"] = list(known["faces"])
        return photo_id, Image(photo_id, filename, jpeg, known, created=0)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        jobs.log.warning("Skipped what a stranger wrote to Redis: %.99r: %r", line, error)
        return "", None


async def annotate(app: web.Application, filename: str | None, photo: bytes) -> Image:
    """Have a worker annotate a photo, which then keeps the image and tells all web processes."""
    app[server.JOBS].discard(asyncio.current_task())  # it takes no thread of this process
    photo_id, news = await app[CLUSTER].accept(filename, photo)
    image = await wait_for(news) or await app[CLUSTER].get(photo_id)
    if image is None:
        raise web.HTTPServiceUnavailable(text="Redis has lost the photo; post it again.")
    faces, took_ms = image.found["faces"], image.found["took_ms"]
    jobs.log.info("%r: %d faces in %d ms", filename, len(faces), took_ms)
    return image


async def post_later(request: web.Request) -> web.Response:
    """Accept a photo and answer at once; its URL has the image as soon as it is done."""
    photo_id, _ = await request.app[CLUSTER].accept(*await server.read_photo(request))
    url = f"{server.base_url(request)}image/{photo_id}"
    headers = {"Location": url, "Preference-Applied": "respond-async"}
    return server.reply({"id": photo_id, "url": url}, status=202, headers=headers)


@web.middleware
async def use_redis(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer at once whoever prefers that (RFC 7240), and 503 if Redis fails."""
    preferences = re.split("[ ,;]+", request.headers.get("Prefer", "").lower())
    if "respond-async" in preferences and request.match_info.handler is server.post_image:
        handler = post_later
    try:
        return await handler(request)
    except TimeoutError:
        text = "The photo waits for a worker; try its URL later."
    except OutOfMemoryError:
        text = "Redis is full (--maxmemory)."
    except RedisError as error:
        jobs.log.warning("Redis is away: %r", error)
        text = "Redis is away (--redis-url)."
    raise web.HTTPServiceUnavailable(text=text)


async def read_news(app: web.Application) -> None:
    """Tell what comes of photos, to watchers and to whoever waits; go on when Redis is back."""
    cluster, last = app[CLUSTER], {}
    while True:
        try:
            if not last:
                now, _ = await cluster.redis.time()
                last = dict.fromkeys([jobs.IMAGES, jobs.ERRORS], f"{now}000-0")
            timeout = NEWS_TIMEOUT if cluster.has_news else None
            for stream, entries in await cluster.redis.xread(last, count=100, block=timeout):
                for entry_id, entry in entries:
                    last[stream.decode()] = entry_id
                    photo_id, outcome = read(entry.get(b"json", b""))
                    cluster.tell(photo_id, outcome)
                    if isinstance(outcome, Image):
                        await server.announce(app, outcome)
            if not cluster.has_news:  # what is waited for may be lost
                for photo_id in list(cluster.news):
                    cluster.tell(photo_id, None)
            cluster.has_news = True
        except RedisError as error:
            jobs.log.warning("There are no news from Redis: %r", error)
            cluster.has_news = False
            await asyncio.sleep(PAUSE)


async def look_after_jobs(app: web.Application) -> None:
    """Each second, count the processes of all workers, and send again what is overdue."""
    cluster, redis = app[CLUSTER], app[CLUSTER].redis
    worker = {"name": jobs.WORKER, "db": str(cluster.database)}
    while True:
        with suppress(RedisError):  # read_news() says so
            seconds, microseconds = await redis.time()
            cluster.ahead = seconds + microseconds / 1e6 - time.time()
            clients = await redis.client_list()
            cluster.threads = sum(worker.items() <= client.items() for client in clients)
            for photo_id in await jobs.run(redis, "overdue", jobs.OVERDUE):
                jobs.log.warning("%s is overdue, so it is sent again", photo_id.decode())
                await asyncio.to_thread(jobs.send, photo_id.decode())
        await asyncio.sleep(1)


async def run_background(app: web.Application) -> AsyncIterator[None]:
    """Do both before the first request, and until after the last."""
    tasks = [asyncio.create_task(each(app)) for each in (read_news, look_after_jobs)]
    yield
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    await app[CLUSTER].redis.aclose()


async def answer_waiting(app: web.Application) -> None:
    """Wait for those photos for which somebody waits here."""
    if news := app[CLUSTER].news.values():
        await asyncio.wait(news, timeout=server.LONGEST_STOP)


def create_app(config: Config, redis_url: str, keep_seconds: int) -> web.Application:
    """Return a web process as an application. Raises OSError or ValueError for bad settings."""
    app, jobs.app.conf.broker_url = server.create_app(config), redis_url
    app[CLUSTER] = app[server.IMAGES] = Cluster(config, redis_url, keep_seconds)
    app[server.ANNOTATE] = annotate
    app.middlewares.append(use_redis)
    app.cleanup_ctx.append(run_background)
    app.on_shutdown.insert(0, answer_waiting)
    return app


def main() -> None:
    """Run a web process with the options of the command line."""
    parser = server.make_parser()
    parser.description = "--threads is for /detect; --keep and --keep-mb are for copies in memory."
    parser.add_argument("--redis-url", default=jobs.app.conf.broker_url, help="Redis")
    parser.add_argument("--keep-seconds", type=int, default=3600, help="for which Redis has images")
    options = vars(parser.parse_args())
    redis_url, keep_seconds = options.pop("redis_url"), options.pop("keep_seconds")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        server.serve(create_app(Config(**options), redis_url, keep_seconds))
    except (OSError, OverflowError, ValueError) as error:
        sys.exit(f"It cannot start (--host, --port, --model, --redis-url): {error}")
    os._exit(0)  # Python would wait for threads whose photos take minutes


if __name__ == "__main__":
    main()
