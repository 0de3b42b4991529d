"""What the cluster promises: with a real Redis, real processes, and real containers by compose."""

import asyncio
import contextlib
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import cv2
import numpy as np
import pytest
import yarl
from aiohttp import web

pytest.importorskip("redis", reason="redis is missing: pip install -r cluster/requirements.txt")
if not shutil.which("redis-server"):
    pytest.skip("redis-server is missing: apt-get install redis-server", allow_module_level=True)

import cluster
from server import SERVER, BadPhoto, Image

CLUSTER = Path(__file__).parent
ASTRONAUT = (CLUSTER.parent / "samples/astronaut.jpg").read_bytes()
TILES = np.tile(cv2.imdecode(np.frombuffer(ASTRONAUT, np.uint8), cv2.IMREAD_COLOR), (8, 10, 1))
SLOW = cv2.imencode(".jpg", TILES)[1].tobytes()  # 21 megapixels, to see what happens meanwhile
TIMEOUT = 30  # seconds, for every wait
SOON = 8  # seconds, where the promise is "within seconds"
ASYNC = {"Prefer": "respond-async"}


# --- Processes ---
class Program:
    """A process. What it says when it is ready matches a pattern, and begins with its URL."""

    def __init__(self, *command: str | Path) -> None:
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def until_it_says(self, pattern: str) -> str:
        assert self.process.stdout
        for line in self.process.stdout:
            if said := re.search(pattern, line):
                return said[1]
        raise AssertionError(f"{self.process.args} ended")

    def end(self, number: signal.Signals = signal.SIGKILL) -> int:
        """Send it a signal, and return its exit code."""
        self.process.send_signal(number)
        self.process.communicate(timeout=TIMEOUT)
        return self.process.returncode


class Redis:
    """A Redis that can be paused or ended, and run again at the same port, empty."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = str(free.getsockname()[1])
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        options = "--save", "", "--maxmemory-policy", "volatile-lru"
        self.program = Program("redis-server", "--port", self.port, *options)
        self.program.until_it_says("(Ready) to accept connections")

    def signal(self, number: signal.Signals) -> None:
        self.program.process.send_signal(number)

    def recover(self) -> None:
        """Have it run, whatever was done to it."""
        self.signal(signal.SIGCONT)
        if self.program.process.poll() is not None:
            self.program.end()
            self.start()

    def ask(self, *command: str) -> None:
        subprocess.run(["redis-cli", "-p", self.port, *command], check=True, timeout=TIMEOUT)


Start = Callable[..., list[tuple[Program, str]]]


@contextlib.contextmanager
def starting(redis: Redis) -> Iterator[Start]:
    """Start processes of the cluster; yields a function that does, and ends them afterwards."""
    programs: list[Program] = []

    def start(count: int, redis_url: str = redis.url) -> list[tuple[Program, str]]:
        command = CLUSTER / "cluster.py", "--port", "0", "--redis-url", redis_url
        started = [Program(sys.executable, *command) for _ in range(count)]
        programs.extend(started)
        return [(each, each.until_it_says(r"open +(http://\S+)")) for each in started]

    yield start
    for each in programs:
        each.end()


@pytest.fixture(scope="module")
def one_redis() -> Iterator[Redis]:
    redis = Redis()
    yield redis
    redis.program.end()


@pytest.fixture
def redis(one_redis: Redis) -> Redis:
    """A Redis that runs, whatever the test before did, and is empty."""
    one_redis.recover()
    one_redis.ask("flushall")
    return one_redis


@pytest.fixture
def start(redis: Redis) -> Iterator[Start]:
    with starting(redis) as start:
        yield start


@pytest.fixture(scope="module")
def urls(one_redis: Redis) -> Iterator[list[str]]:
    with starting(one_redis) as start:
        yield [url for _, url in start(3)]


@pytest.fixture
async def three(urls: list[str], redis: Redis, client: "Client") -> list[str]:
    """The URLs of three processes that have Redis."""
    for url in urls:
        await client.until(url, status="ok", queued=0)
    return urls


@pytest.fixture
async def node(redis: Redis) -> AsyncIterator[cluster.ClusterServer]:
    """A server, not running, in which everything can be done to it."""
    node = cluster.app(f"--redis-url={redis.url}", "--keep-seconds=2")[SERVER]
    assert isinstance(node, cluster.ClusterServer)
    yield node
    await node.redis.aclose()


# --- Clients ---
class Client:
    """What a user does."""

    def __init__(self, session: aiohttp.ClientSession, stack: contextlib.AsyncExitStack) -> None:
        self.session, self.stack = session, stack

    async def post(self, url: str, photo: bytes = ASTRONAUT, **headers: str) -> dict[str, Any]:
        """Post a photo, which must be accepted; return the JSON of the answer."""
        body = io.BytesIO(photo)
        async with self.session.post(f"{url}/image", data=body, headers=headers) as answer:
            assert answer.status in (201, 202), await answer.text()
            return await answer.json()

    async def refused(self, url: str, photo: bytes = ASTRONAUT) -> None:
        """Post a photo, which must be refused for now."""
        async with self.session.post(f"{url}/image", data=io.BytesIO(photo)) as answer:
            assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
            assert "Redis is away" in await answer.text()

    async def get(self, url: str) -> tuple[int, bytes]:
        async with self.session.get(url) as answer:
            return answer.status, await answer.read()

    async def json(self, url: str) -> Any:
        async with self.session.get(url) as answer:
            return await answer.json(content_type=None)

    async def until(self, url: str, **expected: object) -> None:
        """Wait until /health says so."""
        async with asyncio.timeout(TIMEOUT):
            while not expected.items() <= (await self.json(f"{url}/health")).items():  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    async def watch(self, url: str, **headers: str) -> Callable[[], Awaitable[str]]:
        """Connect a watcher; what is returned waits for its next message."""
        connecting = self.session.ws_connect(f"{url}/faces", headers=headers)
        watcher = await self.stack.enter_async_context(connecting)
        return lambda: watcher.receive_str(timeout=TIMEOUT)


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(TIMEOUT))
    async with session, contextlib.AsyncExitStack() as stack:
        yield Client(session, stack)


# --- Many processes are one server ---
SERVER_TESTS = """
import sys

import pytest
import redis

import cluster
import server

url, *options = sys.argv[1:]
create_alone = server.create_app


def create_app(config=server.Config(), detector=None):
    redis.Redis.from_url(url).flushdb()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "create_app", create_alone)
        return cluster.create_app(config, url, detector=detector)


server.create_app = create_app
sys.exit(pytest.main(["-q", "test_server.py", *options]))
"""


def test_the_tests_of_server_py_pass(redis: Redis) -> None:
    """All but those of its own store, which Redis replaces."""
    own = [
        "test_the_image_that_was_not_used_for_longest_goes_first",
        "test_an_image_that_is_larger_than_the_room_is_kept_until_the_next",
        "test_health_counts",
    ]
    options = [f"--deselect=test_server.py::{name}" for name in own]
    environment = os.environ | {"PYTHONPATH": f"{CLUSTER}:{CLUSTER.parent}"}
    command = [sys.executable, "-c", SERVER_TESTS, redis.url, *options]
    done = subprocess.run(
        command, cwd=CLUSTER.parent, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 deselected" in done.stdout


async def test_any_process_serves_an_image(three: list[str], client: Client) -> None:
    posted = [await client.post(three[0]), await client.post(three[1])]
    images = [await client.get(posted[0]["url"]) for url in three]
    assert images[0][1].startswith(b"\xff\xd8")
    assert images == [(200, images[0][1])] * 3
    for url in three:
        there = [each | {"url": f"{url}/image/{each['id']}"} for each in posted]
        assert await client.json(f"{there[0]['url']}/meta") == there[0]
        assert await client.json(f"{url}/image") == there[::-1]


async def test_the_watchers_of_all_get_each_image_once_and_in_order(
    three: list[str], client: Client
) -> None:
    watchers = [(url, await client.watch(url)) for url in three for _ in range(2)]
    watchers.append(("http://10.0.0.5:80", await client.watch(three[1], Host="10.0.0.5:80")))
    async with client.session.ws_connect(f"{three[1]}/faces?format=json") as with_json:
        posted = [await client.post(three[0]) for _ in range(3)]
        urls = [f"{three[1]}/image/{each['id']}" for each in posted]
        assert [await with_json.receive_json() for _ in posted] == [
            each | {"url": url} for each, url in zip(posted, urls, strict=True)
        ]
    for url, next_message in watchers:
        assert [await next_message() for _ in posted] == [f"{url}/image/{p['id']}" for p in posted]


async def test_the_databases_of_one_redis_are_apart(
    three: list[str], start: Start, redis: Redis, client: Client
) -> None:
    ((_, apart),) = start(1, redis.url[:-1] + "1")
    next_message = await client.watch(apart)
    posted = await client.post(three[0])
    assert (await client.get(f"{apart}/image/{posted['id']}"))[0] == 404
    posted = await client.post(apart)
    assert await next_message() == posted["url"]


async def test_all_watchers_get_what_was_under_way_when_a_process_stops(
    three: list[str], start: Start, client: Client
) -> None:
    ((stopping, url),) = start(1)
    watchers = {each: await client.watch(each) for each in (url, three[0])}
    id = (await client.post(url, SLOW, **ASYNC))["id"]
    assert await asyncio.to_thread(stopping.end, signal.SIGTERM) == 0
    for each, next_message in watchers.items():
        assert await next_message() == f"{each}/image/{id}"


def test_a_url_that_is_none_of_redis_ends_the_start_with_one_line() -> None:
    command = [sys.executable, CLUSTER / "cluster.py", "--redis-url", "localhost"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "--redis-url" in done.stderr


# --- Answering later ---
async def test_any_process_waits_for_a_photo_under_way(three: list[str], client: Client) -> None:
    """Even for longer than a promise lasts."""
    began = time.monotonic()
    count = 8 * (os.cpu_count() or 1)
    ids = [(await client.post(three[0], SLOW, **ASYNC))["id"] for _ in range(count)]
    images = await asyncio.gather(*(client.get(f"{url}/image/{ids[-1]}") for url in three))
    assert images == [(200, images[0][1])] * 3
    assert time.monotonic() - began > cluster.PROMISE


@pytest.mark.parametrize(("photo", "status"), [(b"no photo", 415), (SLOW[:-9000], 422)])
async def test_the_error_of_a_bad_photo_crosses(
    three: list[str], client: Client, photo: bytes, status: int
) -> None:
    id = (await client.post(three[0], photo, **ASYNC))["id"]
    answers = [await client.get(f"{url}/image/{id}") for url in three]
    assert answers == [(status, answers[0][1])] * 3


async def test_nothing_is_kept_of_what_nobody_can_ask_for(node: cluster.ClusterServer) -> None:
    await node.start_job("detect", b"no photo", None, keep=False)
    assert isinstance(await node.get("detect"), BadPhoto)
    assert await node.redis.dbsize() == 0


async def test_nobody_waits_for_a_process_that_was_killed(
    three: list[str], start: Start, client: Client
) -> None:
    ((killed, url),) = start(1)
    next_message = await client.watch(three[0])
    id = (await client.post(url, SLOW, **ASYNC))["id"]
    waiting = asyncio.create_task(client.get(f"{three[0]}/image/{id}"))
    await asyncio.sleep(0.1)
    killed.end()
    began = time.monotonic()
    assert (await waiting)[0] == 404
    assert time.monotonic() - began < SOON
    posted = await client.post(three[0])
    assert await next_message() == posted["url"]


# --- Letting go of images ---
async def put(node: cluster.ClusterServer, id: str, size: int = 100) -> None:
    await node.put(id, Image(0, bytes(size), {"id": id}))


async def found(node: cluster.ClusterServer, ids: list[str]) -> list[str]:
    """Return those ids whose images are there."""
    there = []
    for id in ids:
        with contextlib.suppress(web.HTTPNotFound):
            image = await node.get(id)
            assert isinstance(image, Image) and image.jpeg
            there.append(id)
    return there


async def listed(node: cluster.ClusterServer) -> list[str]:
    return [image.meta["id"] for image in await node.newest_first()]


async def test_an_image_is_kept_for_the_time_set(node: cluster.ClusterServer) -> None:
    await put(node, "short")
    assert await found(node, ["short"]) == await listed(node) == ["short"]
    await asyncio.sleep(2.1)
    assert await found(node, ["short"]) == await listed(node) == []


async def test_a_full_redis_lets_go_of_old_images(
    node: cluster.ClusterServer, redis: Redis
) -> None:
    redis.ask("config", "set", "maxmemory", "8mb")
    ids = [str(number) for number in range(20)]
    for id in ids:
        await put(node, id, size=10**6)
    there = await found(node, ids)
    redis.ask("config", "set", "maxmemory", "0")
    assert there[-1] == ids[-1] and 3 < len(there) < 8
    assert await listed(node) == there[::-1]


async def test_the_newest_100_are_listed(node: cluster.ClusterServer) -> None:
    ids = [str(number) for number in range(102)]
    for id in ids:
        await put(node, id)
    assert await listed(node) == ids[:1:-1]


# --- Redis away ---
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_a_restart_of_redis_is_survived(
    three: list[str], redis: Redis, client: Client, number: signal.Signals
) -> None:
    watchers = {url: await client.watch(url) for url in three}
    old = (await client.post(three[0]))["id"]
    many = [f"{url}/image/{old}" for url in three] * 8  # so that each has several connections
    assert {status for status, _ in await asyncio.gather(*map(client.get, many))} == {200}
    redis.program.end(number)
    for url in three:
        await client.refused(url, b"no photo")  # it is not even looked at
        for path in ("/health", "/image", f"/image/{old}"):
            assert (await client.get(url + path))[0] == 503
        async with client.session.post(f"{url}/detect", data=ASTRONAUT) as answer:
            assert len((await answer.json())["faces"]) == 1  # this needs no Redis
    redis.recover()
    for url in three:
        await client.until(url, status="ok")
    assert {status for status, _ in await asyncio.gather(*map(client.get, many))} == {404}
    new = [(await client.post(url))["id"] for url in three]
    for url, next_message in watchers.items():  # the same connections as before
        ids = [old, *new]
        assert [await next_message() for _ in ids] == [f"{url}/image/{id}" for id in ids]


async def test_a_process_that_starts_without_redis_waits_for_it(
    start: Start, redis: Redis, client: Client
) -> None:
    redis.program.end()
    ((_, early),) = start(1)
    await client.refused(early)
    redis.recover()
    await client.until(early, status="ok")
    await client.post(early)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_photo_under_way_when_redis_goes_away_is_refused_as_a_whole(
    three: list[str], redis: Redis, client: Client, number: signal.Signals
) -> None:
    watchers = {url: await client.watch(url) for url in three}
    refused = asyncio.create_task(client.refused(three[0], SLOW))
    promised = (await client.post(three[1], SLOW, **ASYNC))["id"]
    await client.until(three[0], queued=1)
    redis.signal(number)
    await refused
    assert (await client.get(f"{three[1]}/image/{promised}"))[0] == 503
    answers = await asyncio.gather(*(client.get(f"{url}/health") for url in three))
    assert [status for status, _ in answers] == [503] * 3
    redis.recover()
    for url in three:
        await client.until(url, status="ok")
    assert (await client.get(f"{three[0]}/image/{promised}"))[0] == 404
    ids = [(await client.post(url))["id"] for url in three]
    for url, next_message in watchers.items():
        assert [await next_message() for _ in ids] == [f"{url}/image/{id}" for id in ids]


async def test_nothing_is_kept_once_the_poster_was_told_so(
    node: cluster.ClusterServer, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis is paused at the worst moment: it runs the script when it is resumed."""
    time_of_redis = node.redis.time

    async def pause() -> tuple[int, int]:
        now = await time_of_redis()
        redis.signal(signal.SIGSTOP)
        return now

    monkeypatch.setattr(node.redis, "time", pause)
    with pytest.raises(cluster.RedisAway):
        await node.put("late", Image(0, b"jpeg", {"id": "late"}))
    redis.recover()
    assert await found(node, ["late"]) == await listed(node) == []


# --- gunicorn ---
def two_workers(pid: int) -> list[int]:
    """Return the processes of gunicorn's workers, once there are two."""
    while len(children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split()) < 2:
        time.sleep(0.02)
    return list(map(int, children))


async def test_gunicorn_runs_it(redis: Redis, client: Client) -> None:
    options = "-k aiohttp.GunicornWebWorker -w 2 -b 127.0.0.1:0 --no-control-socket"
    app = "--chdir", CLUSTER, f'cluster:app("--redis-url={redis.url}")'
    log = "--log-file", "/dev/stdout"
    gunicorn = Program(sys.executable, "-m", "gunicorn", *options.split(), *log, *app)
    try:
        url = gunicorn.until_it_says(r"Listening at: (http://\S+)")
        watchers = []
        for worker in two_workers(gunicorn.process.pid):  # while it is paused, the other answers
            os.kill(worker, signal.SIGSTOP)
            watchers.append(await client.watch(url))
            os.kill(worker, signal.SIGCONT)
        ids = [(await client.post(url))["id"] for _ in range(4)]
        for next_message in watchers:
            assert {await next_message() for _ in ids} == {f"{url}/image/{id}" for id in ids}
        assert gunicorn.end(signal.SIGTERM) == 0
    finally:
        gunicorn.end()


# --- compose.yaml ---
def run(*command: str) -> str:
    environment = os.environ | {"PORT": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def compose(*arguments: str) -> str:
    return run(
        "docker-compose", "-p", "faces-test", "-f", str(CLUSTER / "compose.yaml"), *arguments
    )


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
        compose("down", "-v", "-t", "1")


@pytest.fixture
async def three_composed(composed: str, client: Client) -> str:
    """The same, once nginx answers for three servers that each count a watcher."""
    healthy = ("--filter", "name=faces-test_server", "--filter", "health=healthy")
    async with asyncio.timeout(TIMEOUT), contextlib.AsyncExitStack() as stack:
        while len(run("docker", "ps", "-q", *healthy).split()) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.2)
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                await stack.enter_async_context(client.session.ws_connect(f"{composed}/faces"))
                seen = [await client.json(f"{composed}/health") for _ in range(9)]
                if all(each.get("clients") for each in seen):
                    return composed
            await asyncio.sleep(0.05)


async def test_compose_runs_three_servers_as_one(three_composed: str, client: Client) -> None:
    url = three_composed
    watchers = [await client.watch(url) for _ in range(9)]
    for _ in range(9):
        posted = await client.post(url)
        assert posted["url"] == f"{url}/image/{posted['id']}"
        assert (await client.get(posted["url"]))[0] == 200
        assert {await next_message() for next_message in watchers} == {posted["url"]}
    assert (await client.json(f"{url}/health"))["clients"] < 9  # others are at the other servers


async def test_a_waiting_get_and_a_large_upload_pass_through_nginx(
    three_composed: str, client: Client
) -> None:
    promised = await client.post(three_composed, SLOW, **ASYNC)
    assert (await client.get(promised["url"]))[0] == 200
    reader, writer = await asyncio.open_connection("127.0.0.1", yarl.URL(three_composed).port)
    async with asyncio.timeout(TIMEOUT):
        writer.write(b"POST /image HTTP/1.1\r\nHost: large\r\nContent-Length: 21000000\r\n\r\n")
        writer.write(bytes(20 * 2**20 + 1))  # and no more: the answer comes before the rest
        answer = await reader.readuntil(b"}\n")
        writer.close()
        await writer.wait_closed()
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"--max-mb" in answer


async def test_compose_survives_its_redis(three_composed: str, client: Client) -> None:
    next_message = await client.watch(three_composed)
    await asyncio.to_thread(compose, "stop", "-t", "1", "redis")
    await client.refused(three_composed)
    assert (await client.get(f"{three_composed}/health"))[0] == 503
    await asyncio.to_thread(compose, "start", "redis")
    for _ in range(9):
        await client.until(three_composed, status="ok")
    posted = await client.post(three_composed)
    assert await next_message() == posted["url"]


async def test_compose_restarts_a_server_that_crashed(three_composed: str, client: Client) -> None:
    crashed, as_root = "faces-test_server_2", ("--pid=host", "--user=root", "--entrypoint=sh")
    pid, image = run("docker", "inspect", "-f", "{{.State.Pid}} {{.Image}}", crashed).split()
    run("docker", "run", "--rm", *as_root, image, "-c", f"kill -9 {pid}")
    for _ in range(6):  # the others serve meanwhile
        assert (await client.get((await client.post(three_composed))["url"]))[0] == 200
    state = "{{.RestartCount}} {{.State.Health.Status}}"
    async with asyncio.timeout(TIMEOUT):
        while run("docker", "inspect", "-f", state, crashed) != "1 healthy":  # noqa: ASYNC110
            await asyncio.sleep(0.2)
