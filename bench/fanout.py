"""How long does it take until the last of many watchers has a new URL?

    python bench/fanout.py [--watchers 100 1000 5000] [--rounds 30]

Connects that many watchers to a server, posts a photo of one pixel, in which there is nothing to find, and takes the
time until the last watcher has its URL. Beside it, the same server sends its URLs by the broadcast() of the websockets
library, to as many connections of that library. The two take turns. Each number is the median of the rounds. Needs
`pip install websockets tqdm` beside the server's own requirements.
"""

import argparse
import asyncio
import os
import re
import statistics
import subprocess
import sys
import time
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
POST = b"POST /image HTTP/1.1\r\nHost: bench\r\nContent-Length: %d\r\n\r\n%b" % (len(ONE_PIXEL), ONE_PIXEL)
HANDSHAKE = (
    b"GET /faces HTTP/1.1\r\nHost: bench\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)
URL = f"http://bench/image/{'0' * 36}"
TEXT = b"\x81" + bytes([len(URL)]) + URL.encode()
PING, PONG = b"\x89\x00", b"\x8a\x80" + bytes(4)


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


async def serve_by_broadcast() -> None:
    """The server, with the websockets library for its watchers, who have a port of their own."""
    clients: set[websockets.ServerConnection] = set()

    async def handler(client: websockets.ServerConnection) -> None:
        clients.add(client)
        try:
            await client.wait_closed()
        finally:
            clients.remove(client)

    async def announce(app: web.Application, image: server.Image) -> None:
        websockets.broadcast(clients, image.meta("http://bench")["url"])

    server.announce = announce
    async with websockets.serve(handler, "127.0.0.1", 0, compression=None, ping_interval=None) as serving:
        port = next(iter(serving.sockets)).getsockname()[1]
        print(f"watch ws://127.0.0.1:{port}/faces", flush=True)
        await server.serve(server.create_app(server.Config(port=0)))


def start(*command: str) -> tuple[subprocess.Popen[str], int, int]:
    """A server process, its port for watchers and its port for posts: the first and the last that it names."""
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    ports = []
    for line in process.stdout:
        ports += re.findall(r"\d:(\d+)/", line)
        if "check" in line:
            break
    return process, int(ports[0]), int(ports[-1])


def resident(process: subprocess.Popen[str]) -> int:
    """Its resident memory in bytes, where /proc tells."""
    statm = Path(f"/proc/{process.pid}/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


async def connect(port: int, count: int, name: str) -> Watchers:
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
        """Seconds from a post until all watchers have its URL."""
        watchers.expect(len(watchers.transports))
        begin = time.perf_counter()
        self.writer.write(POST)
        await asyncio.wait_for(watchers.all_there.wait(), 10)
        seconds = time.perf_counter() - begin
        await asyncio.wait_for(self.reader.readuntil(b"\n}\n"), 10)
        return seconds


async def compare(count: int, rounds: int) -> str:
    """A row of the table."""
    servers = [start("server.py", "--port", "0", "--max-clients", str(count)), start(__file__, "--serve")]
    try:
        times: list[list[float]] = []
        pairs = []
        for (process, watch, post), name in zip(servers, ("ours", "websockets"), strict=True):
            before = resident(process)
            watchers, poster = await connect(watch, count, name), Poster()
            each = (resident(process) - before) / count / 1024
            await poster.connect(post)
            pairs.append((poster, watchers, each))
        for _ in range(rounds + 3):
            times.append([await poster.measure(watchers) for poster, watchers, _ in pairs])
        ours, theirs = (statistics.median(each) * 1000 for each in zip(*times[3:], strict=True))
        memory = " | ".join(f"{each:.0f} KiB" for _, _, each in pairs)
        for poster, watchers, _ in pairs:
            poster.writer.close()
            for transport in watchers.transports:
                transport.abort()
        return f"| {count} | {ours:.1f} ms | {theirs:.1f} ms | {ours / theirs:.2f} | {memory} |"
    finally:
        for process, _, _ in servers:
            process.kill()
            process.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--watchers", type=int, nargs="+", default=[100, 1000, 5000])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--serve", action="store_true", help="be the server with the websockets library")
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve_by_broadcast())
        return
    print(
        "| watchers | post to last URL | by websockets | ratio | memory each | by websockets |\n" + "| --- " * 6 + "|"
    )
    for count in options.watchers:
        print(asyncio.run(compare(count, options.rounds)), flush=True)


if __name__ == "__main__":
    main()
