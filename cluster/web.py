"""A web process of the cluster: the handlers and watchers of server.py, with workers behind."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import suppress
from weakref import WeakValueDictionary

import uvloop
from aiohttp import web
from aiohttp.typedefs import Handler
from redis.asyncio import BlockingConnectionPool, Redis
from redis.exceptions import OutOfMemoryError, RedisError

import worker  # isort: skip (it finds server.py)
import server

MAX_WAIT = 70  # seconds for a photo; nginx waits for 75
News = asyncio.Future[server.Image | None]  # without the JPEG; None: it must be looked up


class Cluster(server.ImageStore):
    """The images in Redis; those that were asked for are in memory too, as no image changes."""

    def __init__(self, config: worker.Config) -> None:
        super().__init__(config.keep, config.keep_mb)
        # With a pool of one's own, nothing is tried again: Redis may have done it.
        pool = BlockingConnectionPool.from_url(config.redis_url, **worker.CONNECTION)
        self.redis, self.queue = Redis.from_pool(pool), config.queue
        self.news = WeakValueDictionary[str, News]()  # by photo, while somebody waits for them
        self.processes = 0  # of all workers
        self.ahead = 0.0  # seconds, of Redis's clock
        self.places = asyncio.Semaphore(config.max_clients)  # for those who wait for an image

    async def get(self, image_id: str) -> server.Image | None:
        """Return an image as soon as it is done. Raises BadPhoto, TimeoutError or RedisError."""
        key, image = f"faces:image:{image_id}", await super().get(image_id)
        if image and await self.redis.touch(key):  # this is a use of it in Redis too
            return image
        news = self.news.setdefault(image_id, asyncio.Future())  # before they can come
        async with self.redis.pipeline() as step:
            step.hmget(key, "json", "jpeg")
            step.zscore("faces:jobs", image_id)
            (line, jpeg), overdue = await step.execute()
        if not line and overdue is not None:
            if self.places.locked():  # a client that leaves still waits here
                raise web.HTTPServiceUnavailable(text="Too many wait for images (--max-clients).")
            async with self.places:
                await asyncio.wait_for(asyncio.shield(news), MAX_WAIT)  # others want them too
            return await self.get(image_id)
        outcome = read(line, jpeg) if line else None
        if isinstance(outcome, server.BadPhoto):
            raise outcome
        if outcome:
            await self.put(outcome)
        return outcome

    async def newest(self) -> list[server.Image]:
        """Return the newest images that Redis still has, without their JPEGs."""
        async with self.redis.pipeline() as step:
            for image_id in await self.redis.lrange("faces:newest", 0, -1):
                step.hget(b"faces:image:" + image_id, "json")
            outcomes = [read(line) for line in await step.execute() if line]
        return [outcome for outcome in outcomes if isinstance(outcome, server.Image)]

    async def count(self) -> server.Json:
        """Return how many copies of images are here, and how many photos are in work anywhere."""
        return await super().count() | {"queued": await self.redis.zcard("faces:jobs")}

    async def accept(self, filename: str | None, photo: bytes) -> tuple[str, News]:
        """Set a photo in Redis and send it to a worker, in one step; then it cannot get lost."""
        photo_id, posted = str(uuid.uuid4()), time.time() + self.ahead
        most_jobs = max(1, self.processes) * (1 + self.queue)
        about = {"photo": photo, "filename": json.dumps(filename), "posted": posted}
        news = self.news[photo_id] = asyncio.Future()
        async with self.redis.pipeline() as step:
            step.hset(f"faces:photo:{photo_id}", mapping=about)
            step.eval(worker.SCRIPTS["accept"], 0, photo_id, posted, most_jobs, worker.OVERDUE)
            _, refusal = await step.execute()
        if refusal:
            raise web.HTTPServiceUnavailable(text=refusal.decode())
        return photo_id, news

    async def look_after_jobs(self) -> None:
        """Count the processes of all workers, and send again what is overdue."""
        seconds, microseconds = await self.redis.time()
        self.ahead = seconds + microseconds / 1e6 - time.time()
        self.processes = sum(each["name"] == worker.NAME for each in await self.redis.client_list())
        jobs = await self.redis.eval(worker.SCRIPTS["overdue"], 0, worker.OVERDUE)
        for photo_id in {*self.news} - {job.decode("latin-1") for job in jobs}:
            self.news.pop(photo_id).set_result(None)  # its news was missed, or Redis has lost it

    async def read_news(self, app: web.Application) -> None:
        """Tell what comes of photos, and look after jobs each second; go on when Redis is back."""
        last, looked = f"{int(time.time() + self.ahead)}000-0", 0.0
        while True:
            try:
                for _, entries in await self.redis.xread({"faces:news": last}, 100, block=1000):
                    for entry_id, entry in entries:
                        last, outcome = entry_id, read(entry.get(b"json", b""))
                        image = outcome if isinstance(outcome, server.Image) else None
                        if news := self.news.pop(entry.get(b"id", b"").decode("latin-1"), None):
                            news.set_result(image)
                        if image:
                            await server.announce(app, image)
                if time.monotonic() > looked + 1:
                    await self.look_after_jobs()
                    looked = time.monotonic()
            except RedisError as error:
                server.log.warning("There is no news from Redis: %s", error)
                await asyncio.sleep(0.5)


def read(line: bytes, jpeg: bytes = b"") -> server.Image | server.BadPhoto | None:
    """Return what came of a photo; None for what a stranger wrote."""
    try:
        known = json.loads(line)
        if "error" in known:
            return server.BadPhoto(known["error"], int(known["status"]))
        known["faces"] = list(known["faces"])
        return server.Image(known.pop("id"), known.pop("filename", None), jpeg, known, created=0)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        server.log.warning("Skipped what a stranger wrote to Redis: %.99r: %r", line, error)
        return None


async def post_image(request: web.Request) -> web.Response:
    """POST /image: have a worker annotate a photo, and answer then, or at once (RFC 7240)."""
    cluster, base = request.app[server.IMAGES], server.base_url(request)
    photo_id, news = await cluster.accept(*await server.read_photo(request))
    url = f"{base}image/{photo_id}"
    if "respond-async" in request.headers.get("Prefer", "").lower():
        return server.reply({"id": photo_id, "url": url}, status=202, headers={"Location": url})
    image = await asyncio.wait_for(asyncio.shield(news), MAX_WAIT) or await cluster.get(photo_id)
    if image is None:
        raise web.HTTPServiceUnavailable(text="Redis has lost the photo; post it again.")
    found = image.found
    server.log.info("%r: %d faces in %d ms", image.filename, len(found["faces"]), found["took_ms"])
    return server.reply(image.describe(base), status=201, headers={"Location": url})


@web.middleware
async def use_redis(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Send photos to the workers, and answer 503 if Redis fails."""
    is_post = request.match_info.handler is server.post_image
    try:
        return await (post_image(request) if is_post else handler(request))
    except TimeoutError:
        text = "The photo waits for a worker; try its URL later."
    except OutOfMemoryError:
        text = "Redis is full (--maxmemory)."
    except RedisError as error:
        server.log.warning("Redis is away: %s", error)
        text = "Redis is away (--redis-url)."
    raise web.HTTPServiceUnavailable(text=text)


async def run_background(app: web.Application) -> AsyncIterator[None]:
    """Read the news from before the first request until after the last."""
    cluster = app[server.IMAGES]
    with suppress(RedisError):  # without Redis it starts too, and answers 503
        await cluster.look_after_jobs()
    task = asyncio.create_task(cluster.read_news(app))
    yield
    task.cancel()
    await asyncio.wait([task], timeout=1)  # redis-py may miss that it is cancelled
    await cluster.redis.aclose()


async def answer_waiting(app: web.Application) -> None:
    """Wait for those photos for which somebody waits here."""
    if waiting := list(app[server.IMAGES].news.values()):
        await asyncio.wait(waiting, timeout=4)  # seconds


def create_app(config: worker.Config) -> web.Application:
    """Return a web process as an application. Raises OSError or ValueError for bad settings."""
    app = server.create_app(config)
    app[server.IMAGES] = Cluster(config)
    app.middlewares.append(use_redis)
    app.cleanup_ctx.append(run_background)
    app.on_shutdown.insert(0, answer_waiting)
    return app


if __name__ == "__main__":
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())  # it takes less time for each photo
    server.main(worker.Config, create_app)
