"""What the cluster promises: with a real Redis, real processes, and real containers by compose."""

import asyncio
import contextlib
import io
import itertools
import json
import os
import random
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

pytest.importorskip("celery", reason="Celery is missing: pip install -r cluster/requirements.txt")
if not shutil.which("redis-server"):
    pytest.skip("redis-server is missing: apt-get install redis-server", allow_module_level=True)

import redis as redis_client
import worker

CLUSTER = Path(__file__).parent
ASTRONAUT = (CLUSTER.parent / "samples/astronaut.jpg").read_bytes()
TIMEOUT = 30  # seconds, for every wait
LATEST = 60  # seconds until an accepted photo is announced, whatever is killed
LATER = {"Prefer": "respond-async"}

# A worker whose detector looks at the width of a photo, and tells the test what it does.
ODD_WORKER = """
import os, pathlib, signal, time
import worker
from worker import app

FOLDER = pathlib.Path(os.environ["FOLDER"])


def detect(pixels):
    width = pixels.shape[1]
    (FOLDER / f"began-{width}-{os.getpid()}").touch()
    if width == 66:
        os.kill(os.getpid(), signal.SIGKILL)
    while 70 <= width < 80 and not (FOLDER / f"go-on-{width}").exists():
        time.sleep(0.01)
    if width >= 1000:
        time.sleep(0.1)
    return []


worker.detector = detect
"""


def photo_of_width(width: int) -> bytes:
    """Return a photo that the odd detector knows."""
    return cv2.imencode(".png", np.zeros((64, width, 3), np.uint8))[1].tobytes()


DEADLY = photo_of_width(66)
SLOW, SLOW_2, SLOW_3 = (photo_of_width(width) for width in (70, 71, 72))  # until they may go on


# --- Processes ---
class Program:
    """A process with a log, in a group of its own."""

    def __init__(self, log: Path, *command: str | Path, **environment: str) -> None:
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [str(each) for each in command],
                stdout=output,
                stderr=output,
                env=os.environ | environment,
                start_new_session=True,
            )

    def until_it_says(self, pattern: str) -> str:
        """Return the first group of what matches in its log."""
        for _ in range(TIMEOUT * 50):
            if said := re.search(pattern, self.log.read_text()):
                return said[1]
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.02)
        raise AssertionError(self.log.read_text())

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send it a signal, and return its exit code."""
        self.process.send_signal(number)
        return self.process.wait(TIMEOUT)

    def children(self) -> list[int]:
        """Return the ids of the processes that it started."""
        pid = self.process.pid
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def signal_all(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to the process and to those that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


class Redis:
    """A Redis that can be paused or killed, and run again at the same port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = str(free.getsockname()[1])
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.client = redis_client.Redis.from_url(self.url, protocol=2)
        self.start()

    def start(self) -> None:
        options = "--save", "", "--maxmemory-policy", "volatile-lru", "--appendonly", "yes"
        command = "redis-server", "--port", self.port, *options, "--dir", self.folder
        self.program = Program(self.folder / "redis.log", *command)
        self.program.until_it_says("(Ready) to accept connections")

    def recover(self) -> None:
        """Have it run as at first, whatever was done to it."""
        self.program.signal_all(signal.SIGCONT)
        if self.program.process.poll() is not None:
            self.start()
        self.client.config_set("maxmemory", 0)
        self.client.config_set("requirepass", "")
        self.client.flushall()


class Cluster:
    """A Redis, and what a test starts: web processes and workers."""

    def __init__(self, redis: Redis, folder: Path) -> None:
        self.redis, self.folder = redis, folder
        self.programs: list[Program] = []
        self.numbers = itertools.count()
        (folder / "odd_worker.py").write_text(ODD_WORKER)

    def start(self, name: str, *command: str | Path, **environment: str) -> Program:
        log = self.folder / f"{name}-{next(self.numbers)}.log"
        program = Program(log, *command, **environment)
        self.programs.append(program)
        return program

    def web(self, *options: str) -> tuple[Program, str]:
        """Start a web process; return it and its URL."""
        command = CLUSTER / "web.py", "--port", "0", "--redis-url", self.redis.url, *options
        program = self.start("web", sys.executable, *command)
        return program, program.until_it_says(r"(http://[^/\s]+)")

    async def start_many(self, count: int) -> tuple[list[Program], list[tuple[Program, str]]]:
        """Start as many odd workers and web processes, all at once."""
        webs = [asyncio.to_thread(self.web) for _ in range(count)]
        return [self.odd_worker(2) for _ in range(count)], await asyncio.gather(*webs)

    def worker(self, *options: str) -> Program:
        """Start a worker with the real detector."""
        command = CLUSTER / "worker.py", "--redis-url", self.redis.url, "--threads", "2", *options
        return self.start_worker(2, sys.executable, *command)

    def odd_worker(self, threads: int = 2) -> Program:
        """Start a worker with the odd detector, as those do who run Celery already."""
        celery = sys.executable, "-m", "celery", "-A", "odd_worker", "-b", self.redis.url
        environment = {"PYTHONPATH": f"{CLUSTER}:{self.folder}", "FOLDER": str(self.folder)}
        return self.start_worker(threads, *celery, "worker", "-c", str(threads), **environment)

    def start_worker(self, threads: int, *command: str | Path, **environment: str) -> Program:
        """Start a worker, and wait until its processes are connected to Redis."""
        before = self.connections()
        program = self.start("worker", *command, **environment)
        for _ in range(TIMEOUT * 20):
            if len(self.connections() - before) >= threads:
                return program
            assert program.process.poll() is None, program.log.read_text()
            time.sleep(0.05)
        raise AssertionError(program.log.read_text())

    def connections(self) -> set[str]:
        """Return those of the processes of all workers."""
        clients = self.redis.client.client_list()
        return {client["id"] for client in clients if client["name"] == worker.NAME}

    async def begun(self, width: int) -> int:
        """Wait until the odd detector works on a photo of this width; return the process."""
        async with asyncio.timeout(TIMEOUT):
            while not (found := list(self.folder.glob(f"began-{width}-*"))):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        return int(found[-1].name.rpartition("-")[2])

    def go_on(self, width: int) -> None:
        """Let the odd detector finish photos of this width."""
        (self.folder / f"go-on-{width}").touch()


@pytest.fixture(scope="module")
def one_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    redis = Redis(tmp_path_factory.mktemp("redis"))
    yield redis
    redis.client.close()
    redis.program.end(signal.SIGKILL)


@pytest.fixture
def redis(one_redis: Redis) -> Redis:
    one_redis.recover()
    return one_redis


@pytest.fixture
def cluster(redis: Redis, tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(redis, tmp_path)
    yield cluster
    for program in cluster.programs:
        program.signal_all()
        program.process.wait(TIMEOUT)
    for log in tmp_path.glob("web*.log"):
        assert "Traceback" not in log.read_text(), log.read_text()


# --- Clients ---
class Client:
    """What a user does."""

    def __init__(self, session: aiohttp.ClientSession, stack: contextlib.AsyncExitStack) -> None:
        self.session, self.stack = session, stack

    async def try_post(self, url: str, photo: bytes = ASTRONAUT, **headers: str) -> tuple[int, Any]:
        """Post a photo; return the status and the JSON of the answer."""
        body = io.BytesIO(photo)
        async with self.session.post(f"{url}/image", data=body, headers=headers) as answer:
            return answer.status, await answer.json(content_type=None)

    async def post(self, url: str, photo: bytes = ASTRONAUT, **headers: str) -> dict[str, Any]:
        """Post a photo, which must be accepted; return the JSON of the answer."""
        status, known = await self.try_post(url, photo, **headers)
        assert status in (201, 202), known
        return known

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
                await asyncio.sleep(0.05)

    async def watch(self, url: str, **headers: str) -> Callable[[], Awaitable[str]]:
        """Connect a watcher; what is returned waits for its next message."""
        connecting = self.session.ws_connect(f"{url}/faces", headers=headers)
        watcher = await self.stack.enter_async_context(connecting)
        return lambda: watcher.receive_str(timeout=LATEST)


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(LATEST))
    async with session, contextlib.AsyncExitStack() as stack:
        yield Client(session, stack)


# --- Many processes are one server ---
async def test_watch_at_one_process_post_at_another_fetch_at_a_third(
    cluster: Cluster, client: Client
) -> None:
    cluster.worker()
    (_, one), (_, two), (_, three) = (cluster.web() for _ in range(3))
    watchers = {url: await client.watch(url) for url in (one, two, three)}
    watchers["http://10.0.0.5:80"] = await client.watch(one, Host="10.0.0.5:80")
    posted = [await client.post(two, Prefer="") for _ in range(3)]
    for url, next_message in watchers.items():
        assert [await next_message() for _ in posted] == [f"{url}/image/{p['id']}" for p in posted]

    image = f"{three}/image/{posted[0]['id']}"
    assert (await client.get(image))[1].startswith(b"\xff\xd8")
    assert await client.json(f"{image}/meta") == posted[0] | {"url": image}
    listed = [each["id"] for each in await client.json(f"{three}/image")]
    assert listed == [each["id"] for each in posted[::-1]]

    # Each process makes small pictures of its own, and keeps them.
    wide = await client.post(two, photo_of_width(960))
    for url in (one, three, three):
        status, small = await client.get(f"{url}/image/{wide['id']}?width=480")
        pixels = cv2.imdecode(np.frombuffer(small, np.uint8), cv2.IMREAD_COLOR)
        assert (status, pixels.shape) == (200, (32, 480, 3))

    # What is answered at once can be fetched anywhere, and what is wrong with it too.
    promised = await client.post(one, **LATER)
    assert promised == {"id": promised["id"], "url": f"{one}/image/{promised['id']}"}
    assert (await client.get(f"{two}/image/{promised['id']}"))[0] == 200
    for photo, status in [(b"no photo", 415), (ASTRONAUT[:9000], 422)]:
        bad = (await client.post(one, photo, **LATER))["id"]
        answers = [await client.get(f"{url}/image/{bad}") for url in (one, two, three)]
        assert answers == [(status, answers[0][1])] * 3
        assert (await client.try_post(two, photo))[0] == status
    assert (await client.get(f"{three}/image/none"))[0] == 404


SERVER_TESTS = """
import json, sys, threading
import pytest, redis, server, web, worker

url, *options = sys.argv[1:]
worker.app.conf.broker_url = url
worker.prepare()
worker.connection = redis.Redis.from_url(url)  # without the name of those who are counted
create_alone = server.create_app


def work(is_over):
    queue = redis.Redis.from_url(url)
    while not is_over.is_set():
        if taken := queue.brpop(["faces:queue"], timeout=0.2):
            (photo_id,), *_ = json.loads(json.loads(taken[1])["body"])
            worker.annotate(photo_id)
    queue.close()


def create_app(config=server.Config(), detector=None):
    worker.connection.flushdb()
    worker.detector = detector = detector or server.load_detector()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "create_app", create_alone)
        app = web.create_app(worker.Config(**vars(config), redis_url=url))
    app[server.DETECTOR] = detector
    is_over = threading.Event()

    async def stop_working(app):
        is_over.set()

    app.on_cleanup.append(stop_working)
    for _ in range(config.threads):
        threading.Thread(target=work, args=[is_over], daemon=True).start()
    return app


server.create_app = create_app
sys.exit(pytest.main(["-q", "test_server.py", *options]))
"""


def test_the_tests_of_server_py_pass(redis: Redis) -> None:
    """All but two of its store in memory; the work of a worker is done by threads here."""
    own = [
        "test_the_image_that_was_not_used_for_longest_goes_first",
        "test_an_image_that_is_larger_than_the_room_is_kept_until_the_next",
    ]
    options = [f"--deselect=test_server.py::{name}" for name in own]
    environment = os.environ | {"PYTHONPATH": f"{CLUSTER}:{CLUSTER.parent}"}
    command = [sys.executable, "-c", SERVER_TESTS, redis.url, *options]
    done = subprocess.run(
        command, cwd=CLUSTER.parent, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(own)} deselected" in done.stdout


# --- Whatever is killed, no photo is lost ---
async def test_a_process_of_a_worker_is_killed(cluster: Cluster, client: Client) -> None:
    cluster.odd_worker(threads=1)
    _, url = cluster.web()
    next_message = await client.watch(url)
    waiting = asyncio.create_task(client.post(url, SLOW))
    os.kill(await cluster.begun(70), signal.SIGKILL)
    cluster.go_on(70)
    posted = await waiting
    assert await next_message() == posted["url"]
    assert (await client.get(posted["url"]))[0] == 200


async def test_whole_processes_are_killed_at_the_worst_moments(
    cluster: Cluster, client: Client
) -> None:
    """At once, as it takes a while until a photo is overdue."""
    began, queue = time.monotonic(), cluster.redis.client
    working, (doomed, doomed_url), (_, url) = cluster.odd_worker(1), cluster.web(), cluster.web()
    next_message = await client.watch(url)

    # One worker is killed in the middle of a photo, another before it reads what Redis gave it.
    waiting = asyncio.create_task(client.post(url, SLOW))
    await cluster.begun(70)
    working.signal_all()
    stuck, promised, is_taken = cluster.odd_worker(1), [], False
    while not is_taken:  # it asks Redis each second, for a second
        stuck.signal_all(signal.SIGCONT)
        await asyncio.sleep(0.2)
        stuck.signal_all(signal.SIGSTOP)
        promised.append(await client.post(doomed_url, **LATER))
        is_taken = not queue.exists("faces:queue")
    stuck.signal_all()

    # A web process is killed while others' photos wait in the queue, and before it has sent one.
    promised += [await client.post(doomed_url, **LATER) for _ in range(3)]
    doomed.signal_all()
    queue.ltrim("faces:queue", 1, -1)
    cluster.go_on(70)
    cluster.odd_worker(2)
    ids = {each["id"] for each in [*promised, await waiting]}
    assert {await next_message() for _ in ids} == {f"{url}/image/{id}" for id in ids}
    assert time.monotonic() - began < LATEST
    assert {(await client.get(f"{url}/image/{id}"))[0] for id in ids} == {200}
    assert {each["id"] for each in await client.json(f"{url}/image")} == ids
    assert queue.exists("faces:jobs", "faces:starts", "faces:queue") == 0
    assert queue.get("faces:bytes") == b"0"


async def test_processes_are_killed_at_random_moments(cluster: Cluster, client: Client) -> None:
    """Each photo is as wide as no other, which tells whether one got two ids."""
    seed = int(os.environ.get("SEED", time.time_ns()))
    print(f"SEED={seed}")
    chance = random.Random(seed)
    workers, webs = await cluster.start_many(3)
    next_message = await client.watch(webs[0][1])
    widths = itertools.count(1000)
    waiting: list[asyncio.Task[tuple[int, Any]]] = []
    promised: list[str] = []

    async def promise(url: str) -> None:
        with contextlib.suppress(aiohttp.ClientError):  # it was just killed
            status, known = await client.try_post(url, photo_of_width(next(widths)), **LATER)
            assert status == 202, known
            promised.append(known["id"])

    victims = ["process of a worker", "worker", "web"] * 2
    chance.shuffle(victims)
    for victim in victims:
        posts = [promise(chance.choice(webs)[1]) for _ in range(6)]
        waiting.append(
            asyncio.create_task(client.try_post(webs[0][1], photo_of_width(next(widths))))
        )
        killing = asyncio.create_task(asyncio.sleep(chance.uniform(0, 0.4)))
        await asyncio.gather(*posts, killing)
        if victim == "web":
            webs.pop()[0].signal_all()
        elif victim == "worker":
            workers.pop().signal_all()
        else:
            os.kill(chance.choice(chance.choice(workers).children()), signal.SIGKILL)

    url = webs[0][1]
    answers = [await each for each in waiting]
    assert [status for status, _ in answers] == [201] * len(waiting)
    expected = {f"{url}/image/{id}" for id in [*promised, *(known["id"] for _, known in answers)]}
    announced = []
    while expected - {*announced}:  # and maybe photos whose 202 was not received
        announced.append(await next_message())
    widths_announced = [(await client.json(f"{each}/meta"))["width"] for each in announced]
    assert len({*announced}) == len(announced) == len({*widths_announced})
    assert {(await client.get(each))[0] for each in announced} == {200}


async def test_a_photo_that_ends_its_process_is_given_up_after_three_starts(
    cluster: Cluster, client: Client
) -> None:
    cluster.odd_worker(2)
    _, url = cluster.web()
    next_message = await client.watch(url)
    deadly = asyncio.create_task(client.try_post(url, DEADLY))
    others = [await client.post(url) for _ in range(5)]
    assert [await next_message() for _ in others] == [each["url"] for each in others]
    status, problem = await deadly
    assert (status, "given up" in problem["detail"]) == (422, True)
    assert len(list(cluster.folder.glob("began-66-*"))) == 3
    assert (await client.post(url))["url"] == await next_message()


# --- Redis fails ---
async def test_redis_is_killed_and_started_again(cluster: Cluster, client: Client) -> None:
    """What was accepted is in its append-only file."""
    cluster.odd_worker(1)
    _, url = cluster.web()
    next_message = await client.watch(url)
    known = await client.post(url)
    assert await next_message() == known["url"]
    assert (await client.get(known["url"]))[0] == 200
    waiting = asyncio.create_task(client.post(url, SLOW))
    await cluster.begun(70)
    promised = await client.post(url, **LATER)
    cluster.redis.program.end(signal.SIGKILL)

    for path in ("/health", "/image", f"/image/{known['id']}", f"/image/{promised['id']}"):
        assert (await client.get(url + path))[0] == 503
    status, problem = await client.try_post(url)
    assert (status, problem["detail"]) == (503, "Redis is away (--redis-url).")
    async with client.session.post(f"{url}/detect", data=ASTRONAUT) as answer:
        assert len((await answer.json())["faces"]) == 1
    cluster.redis.start()
    await client.until(url, status="ok")
    cluster.go_on(70)
    ids = {each["id"] for each in (promised, await waiting)}
    assert {await next_message() for _ in ids} == {f"{url}/image/{id}" for id in ids}
    assert {(await client.get(f"{url}/image/{id}"))[0] for id in ids} == {200}


async def test_redis_is_paused_for_5_s(cluster: Cluster, client: Client) -> None:
    cluster.odd_worker(1)
    _, url = cluster.web()
    next_message = await client.watch(url)
    waiting = asyncio.create_task(client.post(url, SLOW))
    await cluster.begun(70)
    cluster.redis.program.signal_all(signal.SIGSTOP)
    refused = asyncio.create_task(client.try_post(url))
    cluster.go_on(70)
    await asyncio.sleep(5)
    cluster.redis.program.signal_all(signal.SIGCONT)
    assert (await refused)[0] == 503
    await client.until(url, status="ok")
    urls = {(await client.post(url))["url"], (await waiting)["url"]}
    # What was refused was not kept, though Redis read it when it went on.
    assert {await next_message() for _ in urls} == urls
    assert {each["url"] for each in await client.json(f"{url}/image")} == urls


async def test_an_image_that_can_no_longer_be_looked_up_is_cut_off(
    cluster: Cluster, client: Client
) -> None:
    """And no error page is written into it."""
    cluster.worker()
    _, url = cluster.web("--keep", "1")
    noise = np.random.default_rng(1).integers(0, 255, (3500, 3500, 3), np.uint8)
    photo = cv2.imencode(".jpg", noise)[1].tobytes()  # more than the buffers of sockets hold
    assert 10e6 < len(photo) < 20e6
    large = await client.post(url, photo)
    small = await client.post(url)
    with socket.create_connection(("127.0.0.1", yarl.URL(url).port), TIMEOUT) as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        path = yarl.URL(large["url"]).path
        reader.sendall(f"GET {path} HTTP/1.1\r\nHost: slow\r\nConnection: close\r\n\r\n".encode())
        received = reader.recv(1000)
        assert (await client.get(small["url"]))[0] == 200  # the copy of the large one goes
        cluster.redis.program.end(signal.SIGKILL)
        with contextlib.suppress(ConnectionResetError):
            while piece := await asyncio.to_thread(reader.recv, 65536):
                received += piece
    headers, _, image = received.partition(b"\r\n\r\n")
    assert headers.startswith(b"HTTP/1.1 200 ")
    assert b"HTTP/1.1" not in image and b"problem" not in image
    cluster.redis.start()
    await client.until(url, status="ok")


async def test_redis_has_lost_what_it_was_given(cluster: Cluster, client: Client) -> None:
    """As it does if it is killed without an append-only file."""
    _, url = cluster.web()
    waiting = asyncio.create_task(client.try_post(url))
    async with asyncio.timeout(TIMEOUT):
        while not cluster.redis.client.zcard("faces:jobs"):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    cluster.redis.client.config_set("appendonly", "no")
    cluster.redis.program.end(signal.SIGKILL)
    shutil.rmtree(cluster.redis.folder / "appendonlydir")
    cluster.redis.start()
    status, problem = await waiting
    assert (status, problem["detail"]) == (503, "Redis has lost the photo; post it again.")


async def test_redis_is_full(cluster: Cluster, client: Client) -> None:
    """Images go, the least recently used first; photos that were accepted stay."""
    cluster.odd_worker(1)
    _, url = cluster.web("--queue", "99")
    store = cluster.redis.client
    next_message = await client.watch(url)
    store.config_set("maxmemory", "16mb")
    noise = np.random.default_rng(1).integers(0, 255, (500, 69, 3), np.uint8)
    large = cv2.imencode(".png", cv2.resize(noise, (69, 5000)))[1].tobytes()
    promised = [await client.post(url, SLOW, **LATER)]
    while (answer := await client.try_post(url, large, **LATER))[0] == 202:
        promised.append(answer[1])
    assert "--maxmemory" in answer[1]["detail"]
    assert 2 * store.memory_usage(f"faces:photo:{promised[1]['id']}") * len(promised) > 16e6 - 2e6
    for number in range(60):
        store.set(f"faces:image:{number}", os.urandom(10**6), ex=1000)
    assert 0 < len(store.keys("faces:image:*")) < 30
    cluster.go_on(70)
    for each in promised:
        assert await next_message() == each["url"]

    store.config_set("maxmemory", "1mb")
    status, problem = await client.try_post(url)
    assert (status, problem["detail"]) == (503, "Redis is full (--maxmemory).")


async def test_redis_wants_another_password(cluster: Cluster, client: Client) -> None:
    cluster.redis.client.config_set("requirepass", "secret")
    _, url = cluster.web()
    status, problem = await client.try_post(url)
    assert (status, problem["detail"]) == (503, "Redis is away (--redis-url).")


async def test_what_strangers_wrote_is_skipped(cluster: Cluster, client: Client) -> None:
    cluster.worker()
    web, url = cluster.web()
    next_message = await client.watch(url)
    store = cluster.redis.client
    garbage = [b"", b"\xff", b"{}", b"[]", b"7", b'{"id": 1, "faces": 5}', b'{"error": 1, "id": 2}']
    for line in garbage:
        store.xadd("faces:news", {"id": "garbage", "json": line})
        store.hset("faces:image:garbage", mapping={"json": line})
        assert (await client.get(f"{url}/image/garbage"))[0] == 404
    store.xadd("faces:news", {"other": "field"})
    store.lpush("faces:newest", "garbage", "nothing", b"\xff")
    store.set("faces:image:empty", "")
    store.zadd("faces:jobs", {"nothing": 0})  # and no photo
    assert (await client.get(f"{url}/image/empty"))[0] == 503
    async with asyncio.timeout(TIMEOUT):
        while store.exists("faces:jobs"):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert (await client.get(f"{url}/image/nothing"))[0] == 404
    posted = await client.post(url)
    assert await next_message() == posted["url"]
    assert [each["id"] for each in await client.json(f"{url}/image")] == [posted["id"]]
    assert "stranger" in web.log.read_text()


def make_garbage(message: dict[str, Any]) -> Iterator[bytes | str]:
    """Yield what is no JSON, JSON that is no message, and messages that are almost good."""
    yield from (b"", b"\xff", b"no JSON", b"5", b"[]", b"{}", b'{"body": 1}')
    id, headers = "x", message["headers"]
    almost_good: list[dict[str, Any]] = [
        {"headers": 5},
        {"headers": {"task": "of a stranger", "id": id}},
        {"headers": {"task": ["a list"], "id": id}},
        {"headers": headers | {"eta": "never"}},
        {"headers": headers | {"timelimit": 5}},
        {"body": None},
        {"body": "no JSON"},
        {"body": "[]"},
        {"body": '[["too", "many"], {}, {}]'},
        {"body": '[[{"an": "object"}], {}, {}]'},
        {"properties": {}},
        {"content-type": "application/x-python-serialize"},
    ]
    for each in almost_good:
        yield json.dumps(message | each)


async def test_garbage_in_the_queue_of_celery_is_skipped(cluster: Cluster, client: Client) -> None:
    """The worker goes on, as the same process, and what is in work and what waits is not lost."""
    worker, (_, url) = cluster.odd_worker(1), cluster.web()
    next_message = await client.watch(url)
    queue = cluster.redis.client
    promised = [await client.post(url, SLOW, **LATER)]
    await cluster.begun(70)
    message = json.loads(queue.hget(f"faces:photo:{promised[0]['id']}", "message"))
    for garbage in make_garbage(message):
        queue.lpush("faces:queue", garbage)
    promised.append(await client.post(url, **LATER))
    cluster.go_on(70)
    assert {await next_message() for _ in promised} == {each["url"] for each in promised}
    assert (await client.post(url))["url"] == await next_message()
    assert worker.process.poll() is None


# --- Limits ---
async def test_too_many_waiting_photos_are_refused_counted_over_the_cluster(
    cluster: Cluster, client: Client
) -> None:
    cluster.odd_worker(1)
    cluster.odd_worker(2)
    (_, one), (_, two) = (cluster.web("--queue", "1") for _ in range(2))
    await asyncio.sleep(1.5)  # each second, they count the processes
    promised = [await client.post(url, SLOW, **LATER) for url in (one, two, one, two, one, two)]
    for url in (one, two):
        status, problem = await client.try_post(url, SLOW)
        assert (status, problem["detail"]) == (503, "Too many photos wait (--queue).")
    cluster.go_on(70)
    assert {(await client.get(each["url"]))[0] for each in promised} == {200}
    await client.post(one)


async def test_an_image_is_kept_for_the_time_set(cluster: Cluster, client: Client) -> None:
    cluster.worker("--keep-seconds", "1")
    (_, one), (_, two) = (cluster.web() for _ in range(2))
    posted = await client.post(one)
    urls = [f"{url}/image/{posted['id']}" for url in (one, two)]
    assert [(await client.get(url))[0] for url in urls] == [200, 200]
    await asyncio.sleep(1.1)
    assert [(await client.get(url))[0] for url in urls] == [404, 404]
    assert await client.json(f"{one}/image") == []


# --- Start and stop ---
async def test_a_worker_that_is_told_to_stop_finishes_its_photo(
    cluster: Cluster, client: Client
) -> None:
    worker, (_, url) = cluster.odd_worker(1), cluster.web()
    waiting = asyncio.create_task(client.post(url, SLOW))
    await cluster.begun(70)
    later = await client.post(url, **LATER)
    worker.process.send_signal(signal.SIGTERM)
    await asyncio.sleep(0.5)
    cluster.go_on(70)
    await waiting
    assert await asyncio.to_thread(worker.process.wait, TIMEOUT) == 0
    cluster.odd_worker(1)
    assert (await client.get(later["url"]))[0] == 200


async def test_a_web_process_that_is_told_to_stop_answers_who_waits(
    cluster: Cluster, client: Client
) -> None:
    cluster.odd_worker(1)
    web, url = cluster.web()
    next_message = await client.watch(url)
    posting = asyncio.create_task(client.post(url, SLOW))
    await cluster.begun(70)
    promised = await client.post(url, **LATER)
    getting = asyncio.create_task(client.get(promised["url"]))
    await asyncio.sleep(0.2)
    web.process.send_signal(signal.SIGTERM)
    await asyncio.sleep(0.2)
    cluster.go_on(70)
    assert await next_message() == (await posting)["url"]
    assert (await getting)[0] == 200
    assert await asyncio.to_thread(web.process.wait, TIMEOUT) == 0


@pytest.mark.parametrize("program", ["web.py", "worker.py"])
@pytest.mark.parametrize(
    "option, words", {"--redis-url=localhost": "Redis URL", "--model=no.onnx": "no.onnx"}.items()
)
def test_what_cannot_start_says_so_in_one_line(program: str, option: str, words: str) -> None:
    command = [sys.executable, CLUSTER / program, option]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 1
    assert words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


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
    """The URL of two web processes and three workers behind nginx."""
    for command in ("docker", "docker-compose"):
        if not shutil.which(command):
            pytest.skip(f"{command} is missing")
    if subprocess.run(["docker", "info"], capture_output=True, timeout=TIMEOUT).returncode:
        pytest.skip("a Docker engine is missing")
    try:
        compose("up", "-d", "--build", "--scale", "web=2", "--scale", "worker=3")
        yield f"http://127.0.0.1:{compose('port', 'nginx', '80').rpartition(':')[2]}"
    finally:
        compose("down", "-v", "-t", "1")


async def healthy(service: str, count: int) -> None:
    """Wait until as many containers of a service are healthy."""
    filters = "--filter", f"name=faces-test_{service}", "--filter", "health=healthy"
    async with asyncio.timeout(TIMEOUT):
        while len(run("docker", "ps", "-q", *filters).split()) < count:  # noqa: ASYNC110
            await asyncio.sleep(0.2)


async def until_connected(url: str, client: Client) -> None:
    """Wait until nginx has passed watchers on to both web processes."""
    async with asyncio.timeout(TIMEOUT):
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                await client.watch(url)
                seen = [await client.json(f"{url}/health") for _ in range(9)]
                if all(each.get("clients") for each in seen):
                    return
            await asyncio.sleep(0.05)


async def test_compose_runs_it_all(composed: str, client: Client) -> None:
    await healthy("web", 2)
    await healthy("worker", 3)
    await until_connected(composed, client)
    watchers = [await client.watch(composed) for _ in range(5)]
    for _ in range(3):
        posted = await client.post(composed)
        assert posted["url"] == f"{composed}/image/{posted['id']}"
        assert (await client.get(posted["url"]))[0] == 200
        assert {await next_message() for next_message in watchers} == {posted["url"]}
    promised = await client.post(composed, **LATER)
    assert (await client.get(promised["url"]))[0] == 200

    # A large upload passes through nginx, and is refused before it is over.
    reader, writer = await asyncio.open_connection("127.0.0.1", yarl.URL(composed).port)
    async with asyncio.timeout(TIMEOUT):
        writer.write(b"POST /image HTTP/1.1\r\nHost: large\r\nContent-Length: 21000000\r\n\r\n")
        writer.write(bytes(20 * 2**20 + 1))
        answer = await reader.readuntil(b"}\n")
        writer.close()
        await writer.wait_closed()
    assert answer.startswith(b"HTTP/1.1 413 ")


async def test_compose_survives_its_redis_and_restarts_what_crashed(
    composed: str, client: Client
) -> None:
    next_message = await client.watch(composed)
    old = await client.post(composed)
    assert await next_message() == old["url"]
    as_root = ("--pid=host", "--user=root", "--entrypoint=sh")
    crashed = [f"faces-test_{each}_1" for each in ("worker", "redis")]
    states = [run("docker", "inspect", "-f", "{{.State.Pid}}", each) for each in crashed]
    image = run("docker", "inspect", "-f", "{{.Image}}", "faces-test_web_1")
    run("docker", "run", "--rm", *as_root, image, "-c", f"kill -9 {' '.join(states)}")
    for each in crashed:
        async with asyncio.timeout(TIMEOUT):
            state = "{{.RestartCount}} {{.State.Health.Status}}"
            while run("docker", "inspect", "-f", state, each) != "1 healthy":  # noqa: ASYNC110
                await asyncio.sleep(0.2)
    for _ in range(6):
        await client.until(composed, status="ok")
    assert (await client.get(old["url"]))[0] == 200  # from the file of Redis
    posted = await client.post(composed)
    assert await next_message() == posted["url"]
