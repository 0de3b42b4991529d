"""What the tests of the cluster share: programs that can be killed, and what a user does."""

import asyncio
import contextlib
import io
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
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
SLOW = photo_of_width(70)  # until it may go on


async def until(is_so: Callable[[], object]) -> None:
    """Wait until something is so."""
    async with asyncio.timeout(TIMEOUT):
        while not is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def listens(url: str) -> bool:
    """Tell whether a server accepts connections."""
    address = yarl.URL(url)
    with socket.socket() as probe:
        return probe.connect_ex((address.host, address.port)) == 0


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

    def calls(self, command: str) -> int:
        """Return how often a command was called."""
        return self.client.info("commandstats").get(f"cmdstat_{command}", {}).get("calls", 0)

    def is_asked_for_photos(self) -> bool:
        """Tell whether a worker waits for the next photo."""
        clients = self.client.client_list()
        return any(client["cmd"] == "brpop" and "b" in client["flags"] for client in clients)

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
        queue = "--queue", "99"  # photos wait while workers are killed
        webs = [asyncio.to_thread(self.web, *queue) for _ in range(count)]
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
        pattern = f"began-{width}-*"
        await until(lambda: list(self.folder.glob(pattern)))
        return int(next(self.folder.glob(pattern)).name.rpartition("-")[2])

    def go_on(self, width: int) -> None:
        """Let the odd detector finish photos of this width."""
        (self.folder / f"go-on-{width}").touch()


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
        # Not with its own timeout, which begins anew with each ping of the server.
        return lambda: asyncio.wait_for(watcher.receive_str(), LATEST)
