"""How long does it take until the last of many watchers has a new URL?

    pip install websockets tqdm
    python bench/fanout.py [--watchers 100 1000 5000] [--rounds 30]

Connects that many watchers to a server, posts a photo of one pixel, in which there is nothing to
find, and takes the time until the last watcher has its URL. Beside it runs the same server with
the broadcast() of the websockets library, and as many connections of that library. The two take
turns. Each number is the median of the rounds.
"""

import argparse
import asyncio
import contextlib
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import cv2
import numpy as np
import websockets
from aiohttp import web
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import server  # noqa: E402

ONE_PIXEL = cv2.imencode(".png", np.zeros((1, 1), np.uint8))[1].tobytes()
POST = b"POST /image HTTP/1.1\r\nHost: bench\r\nContent-Length: %d\r\n\r\n" % len(ONE_PIXEL)
HANDSHAKE = (
    b"GET /faces HTTP/1.1\r\nHost: bench\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)
URL = f"http://bench/image/{'0' * 36}"
TEXT = b"\x81" + bytes([len(URL)]) + URL.encode()
PING, PONG = b"\x89\x00", b"\x8a\x80" + bytes(4)
FILES = 100  # that a server and this program need beside a file for each watcher


class Watchers:
    """Connections that count what comes, and cost as little as they can."""

    def __init__(self) -> None:
        self.missing = 0
        self.all_there = asyncio.Event()
        self.transports: list[asyncio.Transport] = []

    def expect(self, count: int) -> None:
        self.missing = count
        self.all_there.clear()

    def one_came(self) -> None:
        self.missing -= 1
        if self.missing == 0:
            self.all_there.set()


class Watcher(asyncio.Protocol):
    """One of them."""

    def __init__(self, watchers: Watchers) -> None:
        self.watchers = watchers

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.watchers.transports.append(transport)
        transport.write(HANDSHAKE)

    def data_received(self, data: bytes) -> None:
        if data == PING:
            self.transport.write(PONG)
        elif data.startswith(b"HTTP/1.1 101 ") or len(data) == len(TEXT):
            self.watchers.one_came()
        else:
            raise ValueError(f"Unexpected: {data!r}")


def serve_by_broadcast() -> None:
    """Run the server with the websockets library for its watchers, who have a port of their own."""
    clients: set[websockets.ServerConnection] = set()
    listener = socket.create_server(("127.0.0.1", 0))

    async def handler(client: websockets.ServerConnection) -> None:
        clients.add(client)
        try:
            await client.wait_closed()
        finally:
            clients.remove(client)

    async def announce(app: web.Application, image: server.Image) -> None:
        websockets.broadcast(clients, f"http://bench/image/{image.id}")

    async def serve_watchers(app: web.Application) -> AsyncIterator[None]:
        async with websockets.serve(handler, sock=listener, compression=None, ping_interval=None):
            yield

    server.announce = announce
    app = server.create_app(server.Config(port=0))
    app.cleanup_ctx.append(serve_watchers)
    print(f"watch ws://127.0.0.1:{listener.getsockname()[1]}/faces", flush=True)
    server.serve(app)


def start(*command: str) -> tuple[subprocess.Popen[str], int, int]:
    """Start a server; return it, its port for watchers and its port for posts."""
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    ports = {}
    for line in process.stdout:
        if found := re.match(r" *(watch|post) .*?:(\d+)/", line):
            ports.setdefault(found[1], int(found[2]))
        if "post" in line:
            break
    return process, ports["watch"], ports["post"]


def resident(process: subprocess.Popen[str]) -> int:
    """Return its resident memory in bytes, where /proc tells."""
    statm = Path(f"/proc/{process.pid}/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


async def connect(port: int, count: int, name: str) -> Watchers:
    """Connect the watchers one after the other."""
    watchers, loop = Watchers(), asyncio.get_running_loop()
    for _ in tqdm(range(count), desc=f"{count} watchers of {name}", leave=False):
        watchers.expect(1)
        await loop.create_connection(lambda: Watcher(watchers), "127.0.0.1", port)
        await asyncio.wait_for(watchers.all_there.wait(), 10)
    return watchers


class Poster:
    """A connection for posts."""

    async def connect(self, port: int) -> None:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", port)

    async def measure(self, watchers: Watchers) -> float:
        """Return the seconds from a post until all watchers have its URL."""
        watchers.expect(len(watchers.transports))
        begin = time.perf_counter()
        self.writer.write(POST + ONE_PIXEL)
        await asyncio.wait_for(watchers.all_there.wait(), 10)
        seconds = time.perf_counter() - begin
        await asyncio.wait_for(self.reader.readuntil(b"\n}\n"), 10)
        return seconds


async def compare(count: int, rounds: int) -> str:
    """Return a row of the table."""
    ours = start("server.py", "--port", "0", "--max-clients", str(count))
    theirs = start(__file__, "--serve")
    try:
        times: list[list[float]] = []
        pairs = []
        for (process, watch, post), name in ((ours, "the server"), (theirs, "websockets")):
            before = resident(process)
            watchers, poster = await connect(watch, count, name), Poster()
            each = (resident(process) - before) / count / 1024
            await poster.connect(post)
            pairs.append((poster, watchers, each))
        for _ in range(rounds + 3):
            times.append([await poster.measure(watchers) for poster, watchers, _ in pairs])
        here, there = (statistics.median(each) * 1000 for each in zip(*times[3:], strict=True))
        memory = " | ".join(f"{each:.0f} KiB" for _, _, each in pairs)
        for poster, watchers, _ in pairs:
            poster.writer.close()
            for transport in watchers.transports:
                transport.abort()
        return f"| {count} | {here:.1f} ms | {there:.1f} ms | {here / there:.2f} | {memory} |"
    finally:
        for process, _, _ in (ours, theirs):
            process.kill()
            process.communicate()


def allow_files(count: int) -> None:
    """Let this program and its servers open that many files, as `ulimit -n` does."""
    with contextlib.suppress(ImportError):  # Windows has no such limit
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft not in (hard, resource.RLIM_INFINITY) and soft < count:
            limit = count if hard == resource.RLIM_INFINITY else min(count, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--watchers", type=int, nargs="+", default=[100, 1000, 5000])
    add("--rounds", type=int, default=30)
    add("--serve", action="store_true", help="be the server with the websockets library")
    options = parser.parse_args()
    if options.serve:
        serve_by_broadcast()
        return
    allow_files(2 * max(options.watchers) + FILES)
    print("| watchers | post to last URL | by websockets | ratio | memory each", end=" ")
    print("| by websockets |\n" + "| --- " * 6 + "|", flush=True)
    for count in options.watchers:
        print(asyncio.run(compare(count, options.rounds)), flush=True)


if __name__ == "__main__":
    main()
