"""How long does it take until the last of many watchers has a new URL?

    python bench/fanout.py [--watchers 100 1000 5000] [--rounds 30]

Connects that many watchers to a server, posts a photo of one pixel, in which there is nothing to find, and takes the
time until the last watcher has its URL. The same with the broadcast() of the websockets library, where a message of
the same length comes in place of the post; the two take turns. Each number is the median of the rounds. Needs
`pip install websockets tqdm` beside the server's own requirements.
"""

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import websockets
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
ONE_PIXEL = cv2.imencode(".png", np.zeros((1, 1), np.uint8))[1].tobytes()
POST = b"POST /image HTTP/1.1\r\nHost: bench\r\nContent-Length: %d\r\n\r\n%b" % (len(ONE_PIXEL), ONE_PIXEL)
HANDSHAKE = (
    b"GET /faces HTTP/1.1\r\nHost: bench\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)
URL = f"http://bench/image/{'0' * 36}"
TEXT = b"\x81" + bytes([len(URL)]) + URL.encode()
MASKED_TEXT = b"\x81" + bytes([0x80 | len(URL)]) + bytes(4) + URL.encode()  # what a client sends
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


async def broadcast_server() -> None:
    """A server of the websockets library, on a free port: what one client says, all get."""
    clients: set[websockets.ServerConnection] = set()

    async def handler(client: websockets.ServerConnection) -> None:
        clients.add(client)
        try:
            async for message in client:
                websockets.broadcast(clients, message)
        finally:
            clients.remove(client)

    async with websockets.serve(handler, "127.0.0.1", 0, compression=None, ping_interval=None) as serving:
        port = next(iter(serving.sockets)).getsockname()[1]
        print(f"check http://127.0.0.1:{port}/", flush=True)
        await serving.wait_closed()


def start(*command: str) -> tuple[subprocess.Popen[str], int]:
    """A server process and its port."""
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    return process, int(next(line for line in process.stdout if "check" in line).rpartition(":")[2].partition("/")[0])


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


async def measure(watchers: Watchers, trigger: asyncio.StreamWriter, what: bytes) -> float:
    """Seconds from the trigger until all watchers have its message."""
    watchers.expect(len(watchers.transports))
    begin = time.perf_counter()
    trigger.write(what)
    await asyncio.wait_for(watchers.all_there.wait(), 10)
    return time.perf_counter() - begin


async def compare(count: int, rounds: int) -> str:
    """A row of the table."""
    ours, port = start("server.py", "--port", "0", "--max-clients", str(count))
    theirs, their_port = start(__file__, "--serve")
    try:
        before = resident(ours)
        watchers = await connect(port, count, "ours")
        each = (resident(ours) - before) / count
        their_watchers = await connect(their_port, count, "websockets")
        reader, poster = await asyncio.open_connection("127.0.0.1", port)
        their_reader, speaker = await asyncio.open_connection("127.0.0.1", their_port)
        speaker.write(HANDSHAKE)
        await asyncio.wait_for(their_reader.readuntil(b"\r\n\r\n"), 10)
        times: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(rounds + 3):
            times["ours"].append(await measure(watchers, poster, POST))
            await asyncio.wait_for(reader.readuntil(b"\n}\n"), 10)
            times["theirs"].append(await measure(their_watchers, speaker, MASKED_TEXT))
            await asyncio.wait_for(their_reader.readexactly(len(TEXT)), 10)
        a, b = (statistics.median(each[3:]) * 1000 for each in times.values())
        for transport in (*watchers.transports, *their_watchers.transports):
            transport.abort()
        poster.close()
        speaker.close()
        return f"| {count} | {a:.1f} ms | {b:.1f} ms | {a / b:.2f} | {each / 1024:.0f} KiB |"
    finally:
        for process in (ours, theirs):
            process.kill()
            process.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--watchers", type=int, nargs="+", default=[100, 1000, 5000])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--serve", action="store_true", help="be the server of the websockets library")
    options = parser.parse_args()
    if options.serve:
        asyncio.run(broadcast_server())
        return
    print("| watchers | post to last URL | websockets' broadcast() | ratio | memory each |\n" + "| --- " * 5 + "|")
    for count in options.watchers:
        print(asyncio.run(compare(count, options.rounds)), flush=True)


if __name__ == "__main__":
    main()
