"""What the tests share: a server as a process of its own, and clients of it, polite and other."""

import asyncio
import base64
import contextlib
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from email.message import Message
from email.parser import BytesHeaderParser
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest
from photos import ASTRONAUT, TINY

ROOT = Path(__file__).parent.parent
TIMEOUT = 30  # s, for every wait: the tests may share their CPUs with others
STOP = 10  # s: so long Docker waits for a stop, of which the server's own waits take 6
INSTALL = "pip install -r tests/requirements.txt"
NPM_INSTALL = "npm install --prefix tests --no-package-lock --ignore-scripts"


def run_python(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Python in the folder of the project; return its exit code, output and errors."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=4 * TIMEOUT)


# --- A server ---
class Server(NamedTuple):
    """A running server: its process, where it listens, and the file of its log."""

    process: subprocess.Popen[str]
    url: str
    port: int
    log: Path


@contextlib.contextmanager
def run_server(
    *options: str,
    program: Path = ROOT / "server.py",
    files: int | None = None,
    tracebacks: bool = False,
) -> Iterator[Server]:
    """Run a server, on a free port unless the options name one; with a limit of open files.

    In the end it must stop in time, with exit code 0 and no traceback in its log, unless allowed.
    """
    command = [sys.executable, str(program), "--port", "0", *options]
    # glibc gives large memory back as soon as it is freed; else memory() could not tell.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**16)}
    if files:
        command = ["sh", "-c", f'ulimit -n {files} && exec "$@"', "sh", *command]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        with log.open("w") as stderr:
            pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": stderr}
            process = subprocess.Popen(command, env=environment, text=True, **pipes)
        watchdog = threading.Timer(TIMEOUT, process.kill)
        watchdog.start()
        try:
            assert process.stdout
            line = next((line for line in process.stdout if "open" in line), "")
            found = re.search(r"(http://\S+:(\d+))", line)
            assert found, log.read_text()
            urllib.request.urlopen(f"{found[1]}/health", timeout=TIMEOUT).close()
            watchdog.cancel()
            yield Server(process, found[1], int(found[2]), log)
            if process.poll() is None:
                process.terminate()
                assert process.wait(STOP) == 0
            text = log.read_text()
            assert "Warning" not in text, text[:3000]
            _, traceback, tail = text.partition("Traceback")
            assert tracebacks or not traceback, tail[:3000]
        finally:
            watchdog.cancel()
            process.kill()
            process.communicate()


async def stop(server: Server) -> float:
    """Ask the server to stop; return how many seconds it took."""
    start = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(server.process.wait, 30) == 0
    return time.monotonic() - start


def memory(server: Server, key: str) -> float:
    """MiB that the server process takes (VmRSS), or has at most taken (VmHWM)."""
    status = Path(f"/proc/{server.process.pid}/status")
    if not status.exists():
        pytest.skip("needs /proc")
    return int(status.read_text().partition(key + ":")[2].split()[0]) / 1024


def open_files(server: Server) -> int:
    """Count the open files of the server process."""
    folder = Path(f"/proc/{server.process.pid}/fd")
    if not folder.exists():
        pytest.skip("needs /proc")
    return len([*folder.iterdir()])


def cpu_time(server: Server, loop_only: bool = False) -> float:
    """Return the CPU seconds of the server process so far, or of its event loop's thread alone.

    Unlike the seconds of a clock, they are no more beside other programs.
    """
    process = Path(f"/proc/{server.process.pid}")
    if not process.exists():
        pytest.skip("needs /proc")
    file = process / "task" / process.name / "stat" if loop_only else process / "stat"
    user, system = file.read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


# A program that writes down how long each turn of its event loop takes, but for collecting garbage
NOTE_TURNS = """
import gc
import selectors
import time

gc.disable()


class Turns(selectors.DefaultSelector):
    file = open(server.Path(__file__).with_name("turns"), "w", buffering=1)
    begin = None

    def select(self, timeout=None):
        if self.begin is not None:
            print(time.thread_time() - self.begin, file=self.file)
        events = super().select(timeout)
        self.begin = time.thread_time()
        return events


selectors.DefaultSelector = Turns"""


# A program that looks at photos without end, or until open_gate(), and finds no face
GATE = """
import time


def wait(_):
    while not server.Path(__file__).with_name("gate").exists():
        time.sleep(0.01)
    return []


server.load_detector = lambda *_: wait"""


def beside(server: Server, name: str) -> Path:
    """Return the path of a file in the folder of the server's program."""
    assert isinstance(server.process.args, list)
    return Path(server.process.args[1]).with_name(name)


def turns(server: Server) -> list[float]:
    """Return the CPU seconds of each turn of the event loop so far. All others wait for a turn."""
    lines = beside(server, "turns").read_text().rpartition("\n")[0]
    return [float(line) for line in lines.split()]


def open_gate(server: Server) -> None:
    """Let the photos go on that wait in GATE."""
    beside(server, "gate").touch()


# --- A client with manners ---
async def post_photo(url: str, photo: bytes = ASTRONAUT, name: str = "astronaut.jpg") -> Any:
    """Post a photo as curl does; return the JSON of the answer."""
    form = aiohttp.FormData()
    form.add_field("image", photo, filename=name)
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/image", data=form) as response,
    ):
        assert response.status == 201
        return await response.json()


async def ask_json(method: str, url: str, **options: Any) -> Any:
    """Send a request; return the JSON of the answer."""
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, url, **options) as response,
    ):
        return await response.json(content_type=None)


# --- A client without manners ---
class Answer(NamedTuple):
    status: int
    headers: Message
    body: bytes

    def says(self, status: int, words: str = "") -> bool:
        """It has this status and these words; and an error is a problem document."""
        if self.status >= 400:
            problem = json.loads(self.body)
            assert self.headers["Content-Type"].startswith("application/problem+json")
            assert set(problem) - {"limit"} == {"title", "status", "detail"}
            assert problem["status"] == self.status
            assert (self.status == 503) == ("Retry-After" in self.headers)
        assert self.status == status, self
        assert words.encode() in self.body, self
        return True


class Client:
    """A connection, and what can be done with it by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        async with asyncio.timeout(TIMEOUT):
            await self.writer.drain()

    async def head(self) -> tuple[int, Message]:
        async with asyncio.timeout(TIMEOUT):
            status, _, lines = (await self.reader.readuntil(b"\r\n\r\n")).partition(b"\r\n")
            return int(status.split()[1]), BytesHeaderParser().parsebytes(lines)

    async def answer(self) -> Answer:
        status, headers = await self.head()
        async with asyncio.timeout(TIMEOUT):
            body = await self.reader.readexactly(int(headers.get("Content-Length", 0)))
            return Answer(status, headers, body)

    async def frame(self) -> tuple[int, bytes]:
        """Read a websocket frame: opcode and payload."""
        async with asyncio.timeout(TIMEOUT):
            opcode, length = await self.reader.readexactly(2)
            if length == 126:
                (length,) = struct.unpack(">H", await self.reader.readexactly(2))
            return opcode & 15, await self.reader.readexactly(length)

    async def end(self) -> bytes:
        """Read until the server closes."""
        async with asyncio.timeout(TIMEOUT):
            with contextlib.suppress(ConnectionResetError):
                return await self.reader.read()
        return b""

    def reset(self) -> None:
        """Go away without a word."""
        linger = struct.pack("ii", 1, 0)
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.writer.transport.abort()


@contextlib.asynccontextmanager
async def connect(server: Server, receive_buffer: int | None = None) -> AsyncIterator[Client]:
    """A connection to the server, maybe one that takes but a few bytes unread."""
    plug = socket.socket()
    if receive_buffer:
        plug.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    plug.setblocking(False)
    async with asyncio.timeout(TIMEOUT):
        await asyncio.get_running_loop().sock_connect(plug, ("127.0.0.1", server.port))
        reader, writer = await asyncio.open_connection(sock=plug, limit=receive_buffer or 2**16)
    try:
        yield Client(reader, writer)
    finally:
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def ask(server: Server, request: bytes) -> Answer:
    async with connect(server) as client:
        writing = asyncio.create_task(client.send(request))  # it may answer before it read all
        try:
            return await client.answer()
        finally:
            writing.cancel()
            await asyncio.wait([writing])


# --- Its requests ---
def head_of(method: str, path: str, *lines: str, host: str = "localhost") -> bytes:
    request = [f"{method} {path} HTTP/1.1", f"Host: {host}", *lines, "", ""]
    return "\r\n".join(request).encode(errors="surrogateescape")


def to_get(path: str, *lines: str, host: str = "localhost") -> bytes:
    return head_of("GET", path, *lines, host=host)


def to_post(body: bytes, *lines: str) -> bytes:
    return head_of("POST", "/image", *lines, f"Content-Length: {len(body)}") + body


def chunked(body: bytes) -> bytes:
    chunks = (body[at : at + 2**16] for at in range(0, len(body), 2**16))
    return b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"


FORM = "Content-Type: multipart/form-data; boundary=b"
START = b"--b\r\nContent-Disposition: form-data; name=image; filename=a.jpg\r\n"

# --- Its websocket (RFC 6455) ---
TEXT, CLOSE, PING, PONG = 1, 8, 9, 10


def frame(opcode: int, payload: bytes) -> bytes:
    """A short websocket frame (RFC 6455, 5.2), masked with zeros."""
    return bytes([128 | opcode, 128 | len(payload)]) + bytes(4) + payload


def to_watch(query: str = "", *lines: str) -> bytes:
    key = f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}"
    lines += ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", key)
    return to_get(f"/faces{query}", *lines)


@contextlib.asynccontextmanager
async def watch(
    server: Server, query: str = "", receive_buffer: int | None = None
) -> AsyncIterator[Client]:
    async with connect(server, receive_buffer) as client:
        await client.send(to_watch(query))
        assert (await client.head())[0] == 101
        yield client


async def post_and_get_path(server: Server, photo: bytes) -> str:
    """Post a photo; return the path of its image."""
    answer = await ask(server, to_post(photo))
    assert answer.says(201)
    return answer.headers["Location"].partition("localhost")[2]


async def health(server: Server) -> dict[str, int]:
    return json.loads((await ask(server, to_get("/health"))).body)


async def until(server: Server, **expected: int) -> None:
    """Wait until /health says what is expected."""
    async with asyncio.timeout(TIMEOUT):
        while not expected.items() <= (await health(server)).items():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


# --- Floods ---
# A form whose JSON has 900 bytes
LONG_NAME = START.replace(b"a.jpg", "\U0001f600".encode() * 63) + b"\r\n" + TINY + b"\r\n--b--\r\n"


@contextlib.asynccontextmanager
async def stuffed(server: Server) -> AsyncIterator[Client]:
    """A watcher who has not read 4 MB, which is more than the kernels take for it."""
    async with (
        watch(server, "?format=json", receive_buffer=2048) as deaf,
        connect(server) as client,
        asyncio.timeout(4 * TIMEOUT),  # for 4,000 posts
    ):
        for _ in range(20):
            await client.send(to_post(LONG_NAME, FORM) * 200)
            for _ in range(200):
                assert (await client.answer()).says(201)
        yield deaf


@contextlib.asynccontextmanager
async def flooding(server: Server, data: bytes, watching: bool, number: int = 10) -> AsyncIterator:
    """Clients that write all the time, and read what they get."""

    async def flood() -> None:
        async with watch(server) if watching else connect(server) as client:
            with contextlib.suppress(ConnectionError):
                reading = asyncio.create_task(client.end())
                while not reading.done():
                    client.writer.write(data)
                    await client.writer.drain()
                    await asyncio.sleep(len(data) * number * 8 / 20e6)  # 20 Mbit/s in all

    floods = [asyncio.create_task(flood()) for _ in range(number)]
    await asyncio.sleep(1)
    yield
    for each in floods:
        each.cancel()
    await asyncio.wait(floods)


PINGS, TEXTS = frame(PING, b"") * 10_000, frame(TEXT, b"a") * 10_000
