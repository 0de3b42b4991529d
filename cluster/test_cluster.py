"""What the cluster promises, against a real Redis, real processes, and the compose file with real containers."""

import asyncio
import contextlib
import io
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import aiohttp
import cv2
import numpy as np
import pytest
import yarl

import server

pytest.importorskip("redis", reason="redis is missing: pip install -r cluster/requirements.txt")
if not shutil.which("redis-server"):
    pytest.skip("redis-server is missing: apt-get install redis-server", allow_module_level=True)

CLUSTER = Path(__file__).parent
ROOT = CLUSTER.parent
ASTRONAUT = (ROOT / "samples/astronaut.jpg").read_bytes()
TILES = np.tile(cv2.imdecode(np.frombuffer(ASTRONAUT, np.uint8), cv2.IMREAD_COLOR), (8, 10, 1))
SLOW = cv2.imencode(".jpg", TILES)[1].tobytes()  # 21 megapixels, to see what happens meanwhile
PLAIN = cv2.imencode(".jpg", np.full((6000, 8000), 128, np.uint8))[1].tobytes()  # as slow, and annotated under 1 MB
TIMEOUT = 30  # s, for every wait
SECONDS = 8  # s, where the promise is "within seconds"
PROMISE = 2  # s, as in cluster.py
ASYNC = {"Prefer": "respond-async"}


# --- Processes ---


class Program:
    """A process that has said that it is ready."""

    def __init__(self, process: asyncio.subprocess.Process, said: re.Match[str]) -> None:
        self.process, self.url = process, said[1]

    async def end(self, number: signal.Signals = signal.SIGKILL) -> int:
        """Send it a signal, and return its exit code."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        await asyncio.wait_for(self.process.communicate(), TIMEOUT)
        assert self.process.returncode is not None
        return self.process.returncode


async def run(*command: str | Path, ready: str) -> Program:
    """Start a program, and wait for the line that says it is ready."""
    process = await asyncio.create_subprocess_exec(*command, stdout=PIPE, cwd=ROOT)
    assert process.stdout is not None
    async with asyncio.timeout(TIMEOUT):
        async for line in process.stdout:
            if said := re.search(ready, line.decode()):
                return Program(process, said)
    raise AssertionError(f"{command} ended")


Start = Callable[..., Awaitable[list[Program]]]


class Redis:
    """A Redis that can be stopped, and started again at the same port, empty."""

    def __init__(self, memory: str) -> None:
        self.memory = memory
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"

    async def start(self) -> None:
        options = f"--port {self.port} --maxmemory {self.memory} --maxmemory-policy allkeys-lru"
        command = ["redis-server", *options.split(), "--save", ""]
        self.program = await run(*command, ready="(Ready) to accept connections")


@pytest.fixture
def memory() -> str:
    """How much a Redis may take; tests can set another."""
    return "64mb"


@pytest.fixture
async def redis(memory: str) -> AsyncIterator[Redis]:
    redis = Redis(memory)
    await redis.start()
    yield redis
    await redis.program.end()


@pytest.fixture
async def start(redis: Redis) -> AsyncIterator[Start]:
    """Starts processes of the cluster, and ends them after the test."""
    programs: list[Program] = []

    async def start(count: int, *options: str, redis_url: str = redis.url) -> list[Program]:
        command = [sys.executable, CLUSTER / "cluster.py", "--redis-url", redis_url, "--port", "0", *options]
        started = await asyncio.gather(*(run(*command, ready=r"curl (http://\S+)/health") for _ in range(count)))
        programs.extend(started)
        return started

    yield start
    await asyncio.gather(*(each.end() for each in programs))


@pytest.fixture
async def three(start: Start) -> list[str]:
    """The URLs of three processes."""
    return [each.url for each in await start(3)]


# --- Clients ---


class Client:
    """What a user does."""

    def __init__(self, session: aiohttp.ClientSession, stack: contextlib.AsyncExitStack) -> None:
        self.session, self.stack = session, stack

    async def post(self, url: str, photo: bytes = ASTRONAUT, **headers: str) -> dict:
        """Post a photo, which must be accepted; the JSON of the answer."""
        async with self.session.post(f"{url}/image", data=io.BytesIO(photo), headers=headers) as answer:
            assert answer.status in (201, 202), await answer.text()
            return await answer.json()

    async def refused(self, url: str, photo: bytes = ASTRONAUT) -> None:
        """Post a photo, which must be refused for now."""
        async with self.session.post(f"{url}/image", data=io.BytesIO(photo)) as answer:
            assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
            assert "Redis is away" in (await answer.json(content_type="application/problem+json"))["detail"]

    async def get(self, url: str) -> tuple[int, bytes]:
        async with self.session.get(url) as answer:
            return answer.status, await answer.read()

    async def health(self, url: str) -> dict:
        async with self.session.get(f"{url}/health") as answer:
            health = await answer.json()
            assert answer.status == (200 if health["status"] == "ok" else 503)
            return health

    async def until(self, url: str, name: str, value: object, seconds: float = TIMEOUT) -> None:
        """Wait until /health says so."""
        async with asyncio.timeout(seconds):
            while (await self.health(url))[name] != value:
                pass

    async def watch(self, url: str, **headers: str) -> Callable[[], Awaitable[str]]:
        """Connect a watcher; what is returned waits for its next message."""
        watcher = await self.stack.enter_async_context(self.session.ws_connect(url, headers=headers))
        return lambda: watcher.receive_str(timeout=TIMEOUT)


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    timeout = aiohttp.ClientTimeout(TIMEOUT)
    async with aiohttp.ClientSession(timeout=timeout) as session, contextlib.AsyncExitStack() as stack:
        yield Client(session, stack)


# --- Many processes are one server ---


async def test_any_process_serves_an_image(three: list[str], client: Client) -> None:
    posted = await client.post(three[0])
    for url in three:
        assert await client.get(f"{url}/image/{posted['id']}") == (200, server.annotate(ASTRONAUT).jpeg)
        async with client.session.get(f"{url}/image/{posted['id']}/meta") as meta:
            assert await meta.json() == posted | {"url": f"{url}/image/{posted['id']}"}


async def test_the_watchers_of_all_get_each_image_once_and_in_order(three: list[str], client: Client) -> None:
    watchers = {url: await client.watch(f"{url}/faces") for url in three for _ in range(2)}
    ids = [(await client.post(three[0]))["id"] for _ in range(3)]
    for url, next_message in watchers.items():
        assert [await next_message() for _ in ids] == [f"{url}/image/{id}" for id in ids]


async def test_each_watcher_gets_the_address_that_it_used(three: list[str], client: Client) -> None:
    by_name = await client.watch(f"{three[0]}/faces", Host="faces.local")
    by_address = await client.watch(f"{three[1]}/faces", Host="192.168.1.5:8282")
    posted = await client.post(three[2], Host="evil.example")
    assert posted["url"] == f"http://evil.example/image/{posted['id']}"
    assert await by_name() == f"http://faces.local/image/{posted['id']}"
    assert await by_address() == f"http://192.168.1.5:8282/image/{posted['id']}"


async def test_a_watcher_elsewhere_can_get_the_json(three: list[str], client: Client) -> None:
    async with client.session.ws_connect(f"{three[1]}/faces?format=json") as watcher:
        posted = await client.post(three[0])
        assert await watcher.receive_json(timeout=TIMEOUT) == posted | {"url": f"{three[1]}/image/{posted['id']}"}


async def test_the_databases_of_one_redis_are_apart(start: Start, redis: Redis, client: Client) -> None:
    (here,), (there,) = await start(1), await start(1, redis_url=redis.url[:-1] + "1")
    next_message = await client.watch(f"{there.url}/faces")
    posted = await client.post(here.url)
    assert (await client.get(f"{there.url}/image/{posted['id']}"))[0] == 404
    posted = await client.post(there.url)
    assert await next_message() == posted["url"]


async def test_the_own_watchers_and_the_others_get_what_was_under_way_at_the_end(start: Start, client: Client) -> None:
    stopping, other = await start(2)
    watchers = {each.url: await client.watch(f"{each.url}/faces") for each in (stopping, other)}
    id = (await client.post(stopping.url, SLOW, **ASYNC))["id"]
    assert await stopping.end(signal.SIGTERM) == 0
    for url, next_message in watchers.items():
        assert await next_message() == f"{url}/image/{id}"


def test_an_address_that_is_none_of_redis_ends_the_start_with_one_line() -> None:
    command = [sys.executable, CLUSTER / "cluster.py", "--redis-url", "localhost"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "(--redis-url)" in done.stderr


async def test_the_tests_of_server_py_pass(redis: Redis) -> None:
    """All but those of its own store, which Redis replaces."""
    of_the_store = [
        "test_the_least_recently_used_image_goes_first",
        "test_images_are_kept_up_to_a_size",
        "test_health_counts",
    ]
    command = [sys.executable, "-m", "pytest", "-q", "test_server.py"]
    command += [f"--deselect=test_server.py::{name}" for name in of_the_store]
    with_no_images = "import redis, runpy, sys; redis.Redis.from_url(sys.argv[2]).flushdb()"
    start = f"{with_no_images}; runpy.run_path('cluster/cluster.py', run_name='__main__')"
    environment = os.environ | {"FACES_SERVER": shlex.join(["-c", start, "--redis-url", redis.url])}
    tests = await asyncio.create_subprocess_exec(*command, cwd=ROOT, env=environment, stdout=PIPE)
    said, _ = await asyncio.wait_for(tests.communicate(), 600)
    assert tests.returncode == 0, said.decode()
    assert b"3 deselected" in said


# --- Answering later ---


async def test_another_process_waits_for_an_image_under_way(three: list[str], client: Client) -> None:
    id = (await client.post(three[0], SLOW, **ASYNC))["id"]
    images = await asyncio.gather(*(client.get(f"{url}/image/{id}") for url in three))
    assert [status for status, _ in images] == [200] * 3
    assert len({jpeg for _, jpeg in images}) == 1


@pytest.mark.parametrize(("photo", "status"), [(b"no photo", 415), (SLOW[:-9000], 422)])
async def test_the_error_of_a_bad_photo_crosses(three: list[str], client: Client, photo: bytes, status: int) -> None:
    id = (await client.post(three[0], photo, **ASYNC))["id"]
    answers = [await client.get(f"{url}/image/{id}") for url in three]
    assert [answer[0] for answer in answers] == [status] * 3
    assert len({detail for _, detail in answers}) == 1


async def test_a_photo_that_takes_longer_than_a_promise_lasts_is_waited_for(three: list[str], client: Client) -> None:
    began = time.monotonic()
    ids = [(await client.post(three[0], SLOW, **ASYNC))["id"] for _ in range(8 * server.usable_cpus())]
    assert (await client.get(f"{three[1]}/image/{ids[-1]}"))[0] == 200
    assert time.monotonic() - began > PROMISE


async def test_nobody_waits_for_a_process_that_was_killed(start: Start, client: Client) -> None:
    killed, other = await start(2)
    next_message = await client.watch(f"{other.url}/faces")
    id = (await client.post(killed.url, SLOW, **ASYNC))["id"]
    waiting = asyncio.create_task(client.get(f"{other.url}/image/{id}"))
    await client.until(killed.url, "queued", 1)
    await killed.end(signal.SIGKILL)
    began = time.monotonic()
    assert (await waiting)[0] == 404
    assert time.monotonic() - began < SECONDS
    posted = await client.post(other.url)
    assert await next_message() == posted["url"]


# --- Letting go of images ---


async def test_an_image_is_kept_for_the_time_set(start: Start, client: Client) -> None:
    (short,) = await start(1, "--keep-seconds", "1")
    url = (await client.post(short.url))["url"]
    assert (await client.get(url))[0] == 200
    async with asyncio.timeout(SECONDS):
        while (await client.get(url))[0] == 200:
            pass
    status, detail = await client.get(url)
    assert (status, b"--keep-seconds" in detail) == (404, True)


@pytest.mark.parametrize("memory", ["8mb"])
async def test_a_full_redis_lets_go_of_old_images(three: list[str], client: Client) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (400, 4000, 3), np.uint8)
    photo = cv2.imencode(".jpg", noise)[1].tobytes()  # 1.6 MB
    urls = [(await client.post(three[0], photo))["url"] for _ in range(8)]
    statuses = [(await client.get(url))[0] for url in urls]
    assert (statuses[-1], statuses.count(404) > 2) == (200, True)


# --- Redis away ---


async def back(client: Client, urls: list[str]) -> None:
    """Wait until all processes have Redis back."""
    for url in urls:
        await client.until(url, "status", "ok", SECONDS)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_a_restart_of_redis_is_survived(
    three: list[str], redis: Redis, client: Client, number: signal.Signals
) -> None:
    watchers = {url: await client.watch(f"{url}/faces") for url in three}
    old = (await client.post(three[0]))["id"]
    many = [f"{url}/image/{old}" for url in three] * 8  # at once, so that each process has several connections to Redis
    assert {status for status, _ in await asyncio.gather(*map(client.get, many))} == {200}
    await redis.program.end(number)
    for url in three:
        await client.refused(url, b"no photo")  # it is not even looked at
        assert (await client.health(url))["status"] == "no Redis"
        assert (await client.get(f"{url}/image/{old}"))[0] == 503
    await redis.start()
    await back(client, three)
    assert {status for status, _ in await asyncio.gather(*map(client.get, many))} == {404}
    new = [(await client.post(url))["id"] for url in three]
    for url, next_message in watchers.items():  # the same connections as before
        assert [await next_message() for _ in range(4)] == [f"{url}/image/{id}" for id in [old, *new]]


async def test_a_process_that_starts_without_redis_waits_for_it(start: Start, redis: Redis, client: Client) -> None:
    await redis.program.end()
    (early,) = await start(1)
    await client.refused(early.url)
    await redis.start()
    await back(client, [early.url])
    await client.post(early.url)


@pytest.mark.parametrize("photo", [SLOW, PLAIN], ids=["slow", "plain"])  # the latter fits what a socket holds
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_photo_under_way_when_redis_goes_away_is_refused_as_a_whole(
    three: list[str], redis: Redis, client: Client, number: signal.Signals, photo: bytes
) -> None:
    watchers = {url: await client.watch(f"{url}/faces") for url in three}
    refused = asyncio.create_task(client.refused(three[0], photo))
    promised = (await client.post(three[1], photo, **ASYNC))["id"]  # at the same time: neither may be done too early
    await client.until(three[0], "queued", 1)
    redis.program.process.send_signal(number)
    await refused
    await client.until(three[1], "queued", 0)
    if number == signal.SIGKILL:
        await redis.program.end()
        await redis.start()
    redis.program.process.send_signal(signal.SIGCONT)
    await back(client, three)
    assert {(await client.get(f"{url}/image/{promised}"))[0] for url in three} <= {404, 503}
    ids = [(await client.post(url))["id"] for url in three]
    for url, next_message in watchers.items():
        assert [await next_message() for _ in ids] == [f"{url}/image/{id}" for id in ids]


async def test_a_paused_redis_is_noticed_and_resumed(three: list[str], redis: Redis, client: Client) -> None:
    watchers = {url: await client.watch(f"{url}/faces") for url in three}
    redis.program.process.send_signal(signal.SIGSTOP)
    await asyncio.gather(*(client.refused(url) for url in three))
    assert [(await client.health(url))["status"] for url in three] == ["no Redis"] * 3
    redis.program.process.send_signal(signal.SIGCONT)
    await back(client, three)
    ids = [(await client.post(url))["id"] for url in three]
    for url, next_message in watchers.items():
        assert [await next_message() for _ in ids] == [f"{url}/image/{id}" for id in ids]


# --- gunicorn ---


async def test_gunicorn_runs_it(redis: Redis, client: Client) -> None:
    options = "--chdir cluster -k aiohttp.GunicornWebWorker -w 4 -b 127.0.0.1:0 --log-file /dev/stdout"
    gunicorn = [sys.executable, "-m", "gunicorn", *options.split(), "--no-control-socket"]
    gunicorn.append(f'cluster:app("--redis-url={redis.url}")')
    four = await run(*gunicorn, ready=r"Listening at: (http://\S+)")
    try:
        watchers = []
        async with asyncio.timeout(TIMEOUT):
            while (await client.health(four.url))["clients"] == len(watchers):  # until another worker has one
                watchers.append(await client.watch(f"{four.url}/faces"))
        ids = [(await client.post(four.url))["id"] for _ in range(4)]
        for next_message in watchers:
            assert {await next_message() for _ in ids} == {f"{four.url}/image/{id}" for id in ids}
        assert await four.end(signal.SIGTERM) == 0
    finally:
        await four.end()


# --- compose.yaml ---


def compose(*arguments: str) -> str:
    command = ["docker-compose", "-p", "faces-test", "-f", CLUSTER / "compose.yaml", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PORT": "0"}, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def composed() -> Iterator[str]:
    """The URL of three servers behind nginx."""
    for command in ("docker", "docker-compose"):
        if not shutil.which(command):
            pytest.skip(f"{command} is missing")
    if subprocess.run(["docker", "info"], capture_output=True, timeout=TIMEOUT).returncode:
        pytest.skip("a Docker engine is missing")
    try:
        compose("up", "-d", "--build", "--scale", "server=3")
        yield f"http://127.0.0.1:{compose('port', 'nginx', '80').rpartition(':')[2]}"
    finally:
        compose("down", "-v", "--rmi", "local")


@pytest.fixture
async def three_composed(composed: str, client: Client) -> str:
    """The same, once nginx answers for three servers that have Redis, which each count their watchers."""
    async with asyncio.timeout(TIMEOUT), contextlib.AsyncExitStack() as stack:
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                await stack.enter_async_context(client.session.ws_connect(f"{composed}/faces"))
                seen = [await client.health(composed) for _ in range(9)]
                if all(each["status"] == "ok" and each["clients"] for each in seen):
                    return composed


async def test_compose_runs_three_servers_as_one(three_composed: str, client: Client) -> None:
    url = three_composed
    watchers = [await client.watch(f"{url}/faces") for _ in range(9)]
    for _ in range(9):
        posted = await client.post(url)
        assert posted["url"] == f"{url}/image/{posted['id']}"
        assert await client.get(posted["url"]) == (200, server.annotate(ASTRONAUT).jpeg)
        assert {await next_message() for next_message in watchers} == {posted["url"]}
    assert (await client.health(url))["clients"] < 9  # the others are at the other servers


async def test_a_waiting_get_and_a_large_upload_pass_through_nginx(three_composed: str, client: Client) -> None:
    promised = await client.post(three_composed, SLOW, **ASYNC)
    assert (await client.get(promised["url"]))[0] == 200
    reader, writer = await asyncio.open_connection("127.0.0.1", yarl.URL(three_composed).port)
    async with asyncio.timeout(TIMEOUT):
        writer.write(b"POST /image HTTP/1.1\r\nHost: large\r\nContent-Length: 21000000\r\n\r\n")
        answer = await reader.readuntil(b"}\n")
        writer.close()
        await writer.wait_closed()
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"The body is over 20 MiB (--max-mb)." in answer


async def test_compose_survives_its_redis(three_composed: str, client: Client) -> None:
    next_message = await client.watch(f"{three_composed}/faces")
    await asyncio.to_thread(compose, "stop", "redis")
    await client.refused(three_composed)
    assert (await client.health(three_composed))["status"] == "no Redis"
    await asyncio.to_thread(compose, "start", "redis")
    for _ in range(9):
        await client.until(three_composed, "status", "ok", SECONDS)
    posted = await client.post(three_composed)
    assert await next_message() == posted["url"]


async def test_compose_survives_a_server(three_composed: str, client: Client) -> None:
    await asyncio.to_thread(subprocess.run, ["docker", "kill", "faces-test_server_2"], check=True, timeout=TIMEOUT)
    for _ in range(6):
        assert (await client.get((await client.post(three_composed))["url"]))[0] == 200
