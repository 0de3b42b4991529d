"""Nothing that a client sends, or fails to do, may hurt anyone else: raw sockets show it."""

import asyncio
import base64
import contextlib
import gzip
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from email.message import Message
from email.parser import BytesHeaderParser
from pathlib import Path
from typing import NamedTuple

import photos
import pytest
from photos import ASTRONAUT, MIB, np

from conftest import ROOT, Server, running

TIMEOUT = 60  # s, for every wait: this may share its CPUs
BYTES_A_PIXEL = 9  # that a photo takes at most while it is annotated
PHOTO = photos.blank_png(9, 9)
DAMAGED = "The photo is damaged or cut short."


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
            assert set(problem) == {"title", "status", "detail"}
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


def head(method: str, path: str, *lines: str, host: str = "localhost") -> bytes:
    request = [f"{method} {path} HTTP/1.1", f"Host: {host}", *lines, "", ""]
    return "\r\n".join(request).encode(errors="surrogateescape")


def get(path: str, *lines: str, host: str = "localhost") -> bytes:
    return head("GET", path, *lines, host=host)


def post(body: bytes, *lines: str) -> bytes:
    return head("POST", "/image", *lines, f"Content-Length: {len(body)}") + body


def chunked(body: bytes) -> bytes:
    chunks = (body[at : at + 2**16] for at in range(0, len(body), 2**16))
    return b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"


TEXT, CLOSE, PING, PONG = 1, 8, 9, 10


def frame(opcode: int, payload: bytes) -> bytes:
    """A short websocket frame (RFC 6455, 5.2), masked with zeros."""
    return bytes([128 | opcode, 128 | len(payload)]) + bytes(4) + payload


def upgrade(query: str = "", *lines: str) -> bytes:
    key = f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}"
    lines += ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", key)
    return get(f"/faces{query}", *lines)


@contextlib.asynccontextmanager
async def watch(
    server: Server, query: str = "", receive_buffer: int | None = None
) -> AsyncIterator[Client]:
    async with connect(server, receive_buffer) as client:
        await client.send(upgrade(query))
        assert (await client.head())[0] == 101
        yield client


async def health(server: Server) -> dict[str, int]:
    return json.loads((await ask(server, get("/health"))).body)


async def until(server: Server, **expected: int) -> None:
    """Wait until /health says what is expected."""
    async with asyncio.timeout(TIMEOUT):
        while not expected.items() <= (await health(server)).items():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def memory(server: Server, key: str) -> float:
    """MiB that the server process takes (VmRSS), or has at most taken (VmHWM)."""
    status = Path(f"/proc/{server.process.pid}/status")
    if not status.exists():
        pytest.skip("needs /proc")
    return int(status.read_text().partition(key + ":")[2].split()[0]) / 1024


class Health(threading.Thread):
    """Somebody who asks for /health all the time, in a thread, and notes the longest wait."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self.url, self.longest, self.over = f"{server.url}/health", 0.0, threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.02):
            start = time.monotonic()
            with urllib.request.urlopen(self.url, timeout=TIMEOUT) as answer:
                assert answer.status == 200
            self.longest = max(self.longest, time.monotonic() - start)

    def __enter__(self) -> "Health":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join()


async def stop(server: Server) -> float:
    """Ask the server to stop; return how many seconds it took."""
    start = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(server.process.wait, 30) == 0
    return time.monotonic() - start


@pytest.fixture(scope="module")
def shared_server() -> Iterator[Server]:
    with running("--upload-timeout", "3") as server:
        yield server


@pytest.fixture
async def server(shared_server: Server) -> AsyncIterator[Server]:
    """The server that most tests share; after each it is well, and has logged no traceback."""
    before = shared_server.log.stat().st_size
    yield shared_server
    await until(shared_server, queued=0, clients=0)
    assert "Traceback" not in shared_server.log.read_text()[before:]


@pytest.fixture
def fresh() -> Iterator[Server]:
    """A server of one's own, to measure its memory or to stop it."""
    with running() as server:
        yield server


# --- Photos that hurt ---
async def test_an_animation_that_crashes_opencv_is_answered(server: Server) -> None:
    assert (await ask(server, post(photos.FRAME))).status in (201, 422)


async def test_a_chunk_that_claims_4_gib_takes_no_memory(fresh: Server) -> None:
    before = memory(fresh, "VmHWM")
    assert (await ask(fresh, post(photos.LENGTH))).says(422, DAMAGED)
    assert memory(fresh, "VmHWM") - before < 32


async def test_an_animated_16_bit_png_takes_what_a_photo_takes(fresh: Server) -> None:
    photo = photos.animated_png(3000, 3000, depth=16, color=6, frames=3, row=3000 * 8)
    before = memory(fresh, "VmHWM")
    assert (await ask(fresh, post(photo))).says(201)
    assert memory(fresh, "VmHWM") - before < 9 * BYTES_A_PIXEL + 16


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP"])
async def test_what_a_png_has_beside_its_pixels_is_not_inflated(
    server: Server, kind: bytes
) -> None:
    """These are 7 GB. libpng inflates up to 1,000 chunks, each to 8 MB."""
    photo = photos.with_chunk(PHOTO, kind, b"a\0\0" + photos.zeros(7 * MIB), times=950)
    begin = time.monotonic()
    assert (await ask(server, post(photo))).says(201)
    assert time.monotonic() - begin < 5


async def test_a_texture_full_of_faces_is_done_in_time(server: Server) -> None:
    start = time.monotonic()
    assert (await ask(server, post(photos.TEXTURE))).says(201)
    assert time.monotonic() - start < 5


async def test_a_jpeg_has_at_most_40_scans(server: Server) -> None:
    assert (await ask(server, post(photos.jpeg_of_scans(512, 40)))).says(201)
    start = time.monotonic()
    assert (await ask(server, post(photos.jpeg_of_scans(7000, 500)))).says(422, "40 scans")
    assert time.monotonic() - start < 2


async def test_scans_cannot_hide_behind_what_looks_like_segments(server: Server) -> None:
    """Some markers begin no segment, and libjpeg skips what is between two segments."""
    for filler in (b"", b"\xff\xff\xff", b"\xff\xd0", b"\xff\x01", b"\xff\x02", b"\xff\xfe\0\2"):
        photo = photos.jpeg_of_scans(512, 41, filler)
        assert (await ask(server, post(photo))).says(422, "40 scans")


def lying_gif() -> bytes:
    gif = photos.encode(".gif")
    return gif[:6] + (20_000).to_bytes(2, "little") * 2 + gif[10:]


def lying_webp() -> bytes:
    """An extended WebP around a photo of 512 x 512."""
    size = (20_000 - 1).to_bytes(3, "little") * 2
    body = b"WEBPVP8X\x0a\0\0\0" + bytes(4) + size + photos.encode(".webp")[12:]
    return b"RIFF" + len(body).to_bytes(4, "little") + body


TOO_LARGE = {
    "JPEG": photos.lying_jpeg(20_000, 20_000),
    "PNG": photos.blank_png(20_000, 20_000),
    "PNG of 51 megapixels": photos.png(7300, 7000, b""),
    "PNG of 2^31": photos.png(2**31 - 1, 2**31 - 1, b""),
    "WebP": lying_webp(),
    "GIF": lying_gif(),
}


async def test_a_photo_that_claims_too_many_pixels_is_refused_at_once(fresh: Server) -> None:
    before = memory(fresh, "VmHWM")
    for kind, photo in TOO_LARGE.items():
        words = "damaged" if kind == "PNG of 2^31" else "OPENCV_IO_MAX_IMAGE_PIXELS"
        assert (await ask(fresh, post(photo))).says(422, words)
    assert memory(fresh, "VmHWM") - before < 32


async def test_the_limit_of_pixels_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENCV_IO_MAX_IMAGE_PIXELS", "80")
    with running() as server:
        assert (await ask(server, post(PHOTO))).says(422, "Over 80 pixels")


async def test_a_photo_for_which_memory_runs_out_is_refused_for_now(fresh: Server) -> None:
    resource = pytest.importorskip("resource")
    assert (await ask(fresh, post(PHOTO))).says(201)  # its thread has its memory
    limit = int((memory(fresh, "VmSize") + 50) * MIB)
    resource.prlimit(fresh.process.pid, resource.RLIMIT_AS, (limit, -1))
    assert (await ask(fresh, post(photos.blank_png(7000, 7000)))).says(503, "memory")
    assert (await ask(fresh, post(PHOTO))).says(201)


async def test_a_jpeg_of_millions_of_segments_is_done_in_time(server: Server) -> None:
    start = time.monotonic()
    photo = b"\xff\xd8" + b"\xff\xfe\0\2" * 5_000_000 + ASTRONAUT[2:]
    assert (await ask(server, post(photo))).status in (201, 422)
    assert time.monotonic() - start < 5


# --- Bodies that hurt ---
async def test_a_compressed_body_is_refused(server: Server) -> None:
    body = gzip.compress(ASTRONAUT)
    assert (await ask(server, post(body, "Content-Encoding: gzip"))).says(415, "not a JPEG")


FORM = "Content-Type: multipart/form-data; boundary=b"
START = b"--b\r\nContent-Disposition: form-data; name=image; filename=a.jpg\r\n"


FILLERS = [b"\t", b"\r\n", b"; ", b'; filename="', b";filename*=", b"\r\n--b\r\n", b"-"]


@pytest.mark.parametrize("start", [b"--b", START], ids=["boundary", "headers"])
@pytest.mark.parametrize("filler", FILLERS)
async def test_a_form_of_19_mb_of_anything_holds_nobody_up(
    server: Server, start: bytes, filler: bytes
) -> None:
    form = start + filler * (19 * 10**6 // len(filler)) + b"\r\n\r\na\r\n--b--\r\n"
    with Health(server) as healthy:
        assert (await ask(server, post(form, FORM))).status in (400, 415)
    assert healthy.longest < 1


async def test_a_form_of_millions_of_lines_takes_no_memory(fresh: Server) -> None:
    before = memory(fresh, "VmHWM")
    assert (await ask(fresh, post(b"--\r\n" * 5_000_000, FORM))).says(400, "complete")
    assert memory(fresh, "VmHWM") - before < 100


OVER = bytes(20 * MIB + 1)


@pytest.mark.parametrize(
    "request_",
    [
        post(OVER),
        head("POST", "/image", "Transfer-Encoding: chunked") + chunked(OVER),
        head("POST", "/image", FORM, "Transfer-Encoding: chunked") + chunked(START + OVER),
    ],
    ids=["body", "chunked", "form"],
)
async def test_a_body_over_the_limit_is_refused_as_it_arrives(
    server: Server, request_: bytes
) -> None:
    assert (await ask(server, request_)).says(413, "--max-mb")


@pytest.mark.parametrize(
    "request_", [b"GARBAGE\r\n\r\n", get("/", "A: \0"), get("/" + "a" * 9000), get("/", "no colon")]
)
async def test_what_is_not_http_is_refused(request_: bytes) -> None:
    with running(tracebacks=True) as server:  # aiohttp logs one for each
        assert (await ask(server, request_)).status == 400


async def test_an_upload_that_takes_too_long_is_cut_off(server: Server) -> None:
    async with connect(server) as slow:
        await slow.send(head("POST", "/image", "Content-Length: 99"))
        for _ in range(2):
            await slow.send(b"a")
            await asyncio.sleep(1)
            assert (await ask(server, post(PHOTO))).says(201)
        assert (await slow.answer()).says(408, "--upload-timeout")


async def test_headers_that_trickle_are_cut_off(server: Server) -> None:
    async with connect(server) as slow, asyncio.timeout(10):
        with contextlib.suppress(ConnectionError):
            while not slow.reader.at_eof():
                await slow.send(b"G")
                await asyncio.wait([asyncio.create_task(slow.reader.read(1))], timeout=0.5)


@pytest.mark.parametrize(
    ("preference", "status"),
    [
        ("Wait=10, Respond-Async; a=b", 202),
        ("wait=10,respond-async", 202),
        ("x-respond-async", 201),
        ("respond-async-x", 201),
    ],
)
async def test_a_preference_counts_by_its_whole_name(
    server: Server, preference: str, status: int
) -> None:
    assert (await ask(server, post(PHOTO, f"Prefer: {preference}"))).says(status)


async def test_an_image_is_for_its_client_and_nothing_else_than_an_image(server: Server) -> None:
    path = (await ask(server, post(PHOTO))).headers["Location"].partition("localhost")[2]
    answer = await ask(server, get(path))
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert "private" in answer.headers["Cache-Control"]  # a proxy must not keep it
    assert (await ask(server, get("/image"))).headers["Cache-Control"] == "no-cache"


@pytest.mark.parametrize("what", ["Methods", "Headers"])
async def test_an_allowed_page_may_put_a_photo_and_name_its_type(server: Server, what: str) -> None:
    """Browsers ask before both."""
    page = ("Origin: http://localhost", f"Access-Control-Request-{what}: ...")
    answer = await ask(server, head("OPTIONS", "/image", *page))
    assert answer.headers[f"Access-Control-Allow-{what}"] == "*"


async def test_an_allowed_site_may_end_with_a_slash() -> None:
    with running("--allow-origin", "https://school.example/") as server:
        answer = await ask(server, get("/health", "Origin: https://school.example"))
        assert answer.says(200)
        assert (await ask(server, get("/health", "Origin: https://school.exampl"))).says(403)


@pytest.mark.parametrize("site", ["", "school.example"])
async def test_a_site_without_a_scheme_is_none_that_is_allowed(site: str) -> None:
    with running("--allow-origin", site) as server:
        for origin in ("null", "https://school.example"):
            assert (await ask(server, get("/health", f"Origin: {origin}"))).says(403)


async def test_what_is_around_a_form_is_ignored(server: Server) -> None:
    part = b'--b\r\nContent-Disposition: form-data; filename="a.png"\r\n\r\n' + PHOTO + b"\r\n"
    form = part + b"--b--\r\n"
    assert (await ask(server, post(form + part, FORM))).says(201)
    assert (await ask(server, post(b"\r\n" + form, FORM))).says(201)  # as C# programs send it


NAMES = {
    b'filename="a.png"': "a.png",
    b"filename=a.png; name=b": "a.png",
    b"filename=a.png\r\nContent-Type: image/png": "a.png",
    b'filename="a.png\r\nContent-Type: image/png': "a.png",
    b"FileName*=a.png": "a.png",
    b'filename="a;b.png"': "a;b.png",
    b'filename="\xff.png"': "\ufffd.png",
    b'filename="' + b"a" * 300 + b'"': "a" * 255,
}


@pytest.mark.parametrize("written", NAMES)
async def test_a_filename_is_read_however_it_is_written(server: Server, written: bytes) -> None:
    part = b"--b\r\nContent-Disposition: form-data; " + written + b"\r\n\r\n" + PHOTO
    answer = await ask(server, post(part + b"\r\n--b--\r\n", FORM))
    assert json.loads(answer.body)["filename"] == NAMES[written]


async def test_a_file_that_was_not_chosen_does_not_count(server: Server) -> None:
    """A browser sends an empty part for each input of a form."""
    form = START + b"\r\n\r\n" + START + b"\r\n" + PHOTO + b"\r\n--b--\r\n"
    assert (await ask(server, post(form, FORM))).says(201)


async def test_uploads_that_stall_keep_nobody_from_posting(server: Server) -> None:
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(100):
            client = await stack.enter_async_context(connect(server))
            await client.send(head("POST", "/image", f"Content-Length: {MIB}") + b"a")
        start = time.monotonic()
        assert (await ask(server, post(PHOTO))).says(201)
        assert time.monotonic() - start < 1


async def test_uploads_take_no_more_memory_than_eight_bodies() -> None:
    """What has come of them counts, not what they claim; when one leaves, others may come."""
    large, cut = b"a" * MIB, MIB - 9
    async with contextlib.AsyncExitStack() as stack:
        server = stack.enter_context(running("--max-mb", "1"))
        clients = [await stack.enter_async_context(connect(server)) for _ in range(8)]
        for client in clients:
            await client.send(
                post(large)[: cut + len(head("POST", "/image", "Content-Length: 1048576"))]
            )
        async with asyncio.timeout(TIMEOUT):
            while (await ask(server, post(large[:500]))).status != 503:
                pass
            clients[0].reset()
            while (await ask(server, post(large[:500]))).status == 503:
                pass
        for client in clients[1:]:  # they were in time
            await client.send(large[cut:])
            assert (await client.answer()).says(415)


async def test_clients_that_leave_give_their_place_back() -> None:
    photo = photos.photo_of(3000, 3000)
    with running("--queue", "0", "--upload-timeout", "10") as server:
        for cut in (len(photo) // 2, len(photo) + 999):  # in the upload, and in the detection
            for _ in range(40):
                async with connect(server) as client:
                    await client.send(post(photo)[:cut])
                    client.reset()
            await until(server, queued=0)
            assert (await ask(server, post(PHOTO))).says(201)


async def test_a_photo_is_kept_even_if_its_client_leaves(server: Server) -> None:
    """Somebody else may know its URL."""
    photo = photos.png(7, 9, photos.zeros(250 * MIB))  # libpng reads them for half a second
    async with connect(server) as client:
        await client.send(post(photo))
        await until(server, queued=1)
        client.reset()
        await until(server, queued=0)
        assert json.loads((await ask(server, get("/image"))).body)[0]["width"] == 7


# --- Photos that wait ---
async def test_each_thread_has_its_own_queue() -> None:
    slow = photos.png(9, 9, photos.zeros(250 * MIB))  # libpng reads them for half a second
    with running("--threads", "2", "--queue", "1") as server:
        answers = [await ask(server, post(slow, "Prefer: respond-async")) for _ in range(5)]
        assert [answer.status for answer in answers] == [202] * 4 + [503]
        await until(server, queued=0)


async def test_a_hundred_large_photos_at_once_stay_within_memory() -> None:
    threads, megapixels = 2, 9
    photo = photos.photo_of(3000, 3000)
    with running("--threads", str(threads), "--queue", "2") as server:
        with Health(server) as healthy:
            answers = await asyncio.gather(*(ask(server, post(photo)) for _ in range(100)))
        assert all(answer.says(answer.status) for answer in answers)
        assert {answer.status for answer in answers} == {201, 503}
        assert healthy.longest < 1
        bound = threads * megapixels * BYTES_A_PIXEL + 14 * len(photo) / MIB + 200
        assert memory(server, "VmHWM") < bound


async def test_photos_that_were_refused_take_no_memory(fresh: Server) -> None:
    photo = b"text" * (4 * MIB)  # which are 320 MiB, in the end
    for _ in range(5):
        assert (await ask(fresh, post(photo, "Prefer: respond-async"))).status == 202
        await until(fresh, queued=0)
    before = memory(fresh, "VmRSS")
    for _ in range(20):
        assert (await ask(fresh, post(photo, "Prefer: respond-async"))).status == 202
        await until(fresh, queued=0)
    assert memory(fresh, "VmRSS") - before < 150


async def test_photos_that_are_refused_at_once_take_no_memory(fresh: Server) -> None:
    before = memory(fresh, "VmHWM")
    for _ in range(20):
        assert (await ask(fresh, post(b"text" * (4 * MIB)))).says(415)
    assert memory(fresh, "VmHWM") - before < 100


async def test_photos_that_are_refused_never_drop_an_image(server: Server) -> None:
    image = (await ask(server, post(ASTRONAUT))).headers["Location"]
    for _ in range(120):
        assert (await ask(server, post(b"a", "Prefer: respond-async"))).status in (202, 503)
    assert (await ask(server, get(image.partition("localhost")[2]))).status == 200


async def test_photos_that_are_refused_never_drop_one_that_is_under_way(server: Server) -> None:
    """It remembers 1,000 of them, and no more."""
    bad = (await ask(server, post(b"a", "Prefer: respond-async"))).headers["Location"]
    slow = photos.png(9, 9, photos.zeros(1500 * MIB))  # libpng reads them for some seconds
    later = await ask(server, post(slow, "Prefer: respond-async"))
    for number in range(11):
        async with connect(server) as client:
            await client.send(post(b"a") * 100)
            for _ in range(100):
                assert (await client.answer()).says(415)
        if number == 8:
            assert (await ask(server, get(bad.partition("localhost")[2]))).says(415)
    assert (await ask(server, get(bad.partition("localhost")[2]))).says(404)
    assert (await ask(server, get(later.headers["Location"].partition("localhost")[2]))).says(200)


async def test_the_bytes_of_an_image_that_was_dropped_do_not_count() -> None:
    with running("--keep", "1") as server:
        for photo in (ASTRONAUT, PHOTO):
            path = (await ask(server, post(photo))).headers["Location"].partition("localhost")[2]
        size = len((await ask(server, get(path))).body)
        assert {"images": 1, "bytes": size}.items() <= (await health(server)).items()


# --- Clients that do not read, or never stop writing ---
async def test_a_hundred_who_get_an_image_and_do_not_read_it_take_no_memory() -> None:
    noise = np.random.default_rng(1).integers(0, 256, (3600, 3600, 3), np.uint8)
    with running("--upload-timeout", "2") as server:
        meta = json.loads((await ask(server, post(photos.encode(".jpg", noise)))).body)
        path = meta["url"].partition("localhost")[2]
        size = int((await ask_head(server, path))["Content-Length"])
        assert size > 10**7
        async with contextlib.AsyncExitStack() as stack:
            before = memory(server, "VmRSS")
            deaf = [
                await stack.enter_async_context(connect(server, receive_buffer=4096))
                for _ in range(100)
            ]
            for each in deaf:
                await each.send(get(path))
            await asyncio.sleep(1)
            assert memory(server, "VmRSS") - before < 30
            await asyncio.sleep(3)  # without progress: cut off
            assert len(await deaf[0].end()) < size


async def test_who_pauses_for_a_moment_gets_the_whole_image(server: Server) -> None:
    path = (await ask(server, post(ASTRONAUT))).headers["Location"].partition("localhost")[2]
    async with connect(server, receive_buffer=2048) as slow:
        await slow.send(get(path))
        await asyncio.sleep(0.5)
        assert (await slow.answer()).says(200)


async def test_a_connection_that_is_not_used_is_closed() -> None:
    with running("--upload-timeout", "1") as server:
        async with connect(server) as idle, asyncio.timeout(10):
            assert await idle.end() == b""


async def ask_head(server: Server, path: str) -> Message:
    async with connect(server) as client:
        await client.send(head("HEAD", path))
        return (await client.head())[1]


async def test_watchers_that_do_not_read_are_cut_off_and_hold_nobody_up(server: Server) -> None:
    form = START.replace(b"a.jpg", b"a" * 250) + b"\r\n" + PHOTO + b"\r\n--b--\r\n"
    async with contextlib.AsyncExitStack() as stack:
        good = await stack.enter_async_context(watch(server))
        for _ in range(50):
            await stack.enter_async_context(watch(server, "?format=json", receive_buffer=2048))
        await until(server, clients=51)
        before = memory(server, "VmRSS")
        for _ in range(400):
            answer = await ask(server, post(form, FORM))
            assert answer.says(201)
            assert await good.frame() == (TEXT, answer.headers["Location"].encode())
        assert memory(server, "VmRSS") - before < 10
        await until(server, clients=1)  # after --upload-timeout


@contextlib.asynccontextmanager
async def stuffed(server: Server) -> AsyncIterator[Client]:
    """A watcher who has not read 4 MB, which is more than the kernels take for it."""
    name = "\U0001f600".encode() * 63  # in JSON, 756 bytes
    form = START.replace(b"a.jpg", name) + b"\r\n" + PHOTO + b"\r\n--b--\r\n"
    async with watch(server, "?format=json", 2048) as deaf, connect(server) as client:
        async with asyncio.timeout(20):  # nobody waits for it
            for _ in range(20):
                await client.send(post(form, FORM) * 200)
                for _ in range(200):
                    assert (await client.answer()).says(201)
        yield deaf


async def test_a_watcher_that_is_leaving_takes_nothing_from_the_others(server: Server) -> None:
    """What it has not read keeps it from being gone."""
    async with stuffed(server) as leaving, watch(server) as good:
        leaving.writer.write_eof()
        for _ in range(2):
            answer = await ask(server, post(PHOTO))
            assert answer.says(201)
            assert await good.frame() == (TEXT, answer.headers["Location"].encode())


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


@pytest.mark.parametrize("data", [PINGS, TEXTS], ids=["pings", "texts"])
async def test_ten_watchers_that_talk_all_the_time_hold_nobody_up(
    fresh: Server, data: bytes
) -> None:
    async with flooding(fresh, data, watching=True):
        with Health(fresh) as healthy:
            await asyncio.sleep(1)
            assert (await ask(fresh, post(PHOTO))).says(201)
    assert healthy.longest < 1


async def test_a_watcher_that_pings_and_does_not_read_takes_no_memory(server: Server) -> None:
    async with watch(server, receive_buffer=2048) as deaf:
        before = memory(server, "VmRSS")
        with contextlib.suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(3):
                while True:
                    deaf.writer.write(frame(PING, bytes(125)) * 500)
                    await deaf.writer.drain()
        assert memory(server, "VmRSS") - before < 10


async def test_a_ping_is_answered(server: Server) -> None:
    async with watch(server) as client:
        await client.send(frame(PING, b"Are you there?"))
        assert await client.frame() == (PONG, b"Are you there?")


async def test_a_long_message_of_a_watcher_ends_it(server: Server) -> None:
    async with watch(server) as good, watch(server) as bad:
        await bad.send(b"\x81\xfe" + struct.pack(">H", 1026) + bytes(4 + 1026))
        assert await bad.frame() == (CLOSE, struct.pack(">H", 1009))
        answer = await ask(server, post(PHOTO))
        assert await good.frame() == (TEXT, answer.headers["Location"].encode())


async def test_who_is_no_watcher_is_told_how_to_be_one(server: Server) -> None:
    answer = await ask(server, get("/faces"))
    assert answer.says(426, "wscat")
    assert answer.headers["Upgrade"] == "websocket"  # RFC 9110, 15.5.22


async def test_a_watcher_gets_no_compression(server: Server) -> None:
    """It would take 256 KiB for each."""
    async with connect(server) as client:
        await client.send(upgrade("", "Sec-WebSocket-Extensions: permessage-deflate"))
        status, headers = await client.head()
        assert (status, headers["Sec-WebSocket-Extensions"]) == (101, None)


async def test_there_are_no_more_watchers_than_allowed() -> None:
    async with contextlib.AsyncExitStack() as stack:
        server = stack.enter_context(running("--max-clients", "2"))
        for _ in range(2):
            await stack.enter_async_context(watch(server))
        assert (await ask(server, upgrade())).says(503, "--max-clients")


async def test_more_connections_than_open_files_flood_no_log() -> None:
    async with contextlib.AsyncExitStack() as stack:
        server = stack.enter_context(running(files=100))
        stalled = await stack.enter_async_context(connect(server))
        await stalled.send(head("POST", "/image", "Content-Length: 99999"))  # the stop takes 1 s
        for _ in range(200):
            await stack.enter_async_context(connect(server))
        await asyncio.sleep(2)
        await stop(server)
        assert server.log.stat().st_size < 1000


# --- The stop ---
async def test_it_can_be_stopped_as_soon_as_it_says_where_it_listens() -> None:
    command = [sys.executable, str(ROOT / "server.py"), "--port", "0"]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    assert process.stdout
    try:
        async with asyncio.timeout(TIMEOUT):
            await process.stdout.readline()
            process.terminate()
            assert await process.wait() == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()


async def test_at_the_stop_photos_are_finished_and_watchers_told(fresh: Server) -> None:
    photo = photos.photo_of(2000, 1500)
    async with contextlib.AsyncExitStack() as stack:
        good = await stack.enter_async_context(watch(fresh))
        for _ in range(20):
            await stack.enter_async_context(watch(fresh, "?format=json", receive_buffer=2048))
        stalled = await stack.enter_async_context(connect(fresh))
        await stalled.send(head("POST", "/image", "Content-Length: 99999"))
        posts = [asyncio.create_task(ask(fresh, post(photo))) for _ in range(3)]
        later = await ask(fresh, post(photo, "Prefer: respond-async"))
        await until(fresh, clients=21)
        while (said := await health(fresh))["queued"] + said["images"] < 4:
            pass
        stopping = asyncio.create_task(stop(fresh))
        urls = [later.headers["Location"]]
        for answer in await asyncio.gather(*posts):
            assert answer.says(201)
            urls.append(answer.headers["Location"])
        announced = [(await good.frame())[1].decode() for _ in urls]
        assert sorted(announced) == sorted(urls)
        assert await good.frame() == (CLOSE, struct.pack(">H", 1001))
        assert await stopping < 8


PIPELINE = get("/health") * 300


@pytest.mark.parametrize(
    "data, watching",
    [(PINGS, True), (TEXTS, True), (PIPELINE, False)],
    ids=["pings", "texts", "pipelined GETs"],
)
async def test_a_flood_does_not_delay_the_stop(fresh: Server, data: bytes, watching: bool) -> None:
    async with flooding(fresh, data, watching):
        assert await stop(fresh) < 8


async def test_a_watcher_that_does_not_read_does_not_delay_the_stop(fresh: Server) -> None:
    async with stuffed(fresh):
        assert await stop(fresh) < 8


async def test_a_photo_that_takes_a_minute_does_not_delay_the_stop(fresh: Server) -> None:
    """libpng reads all the 20 GB behind the last row."""
    async with connect(fresh) as client:
        await client.send(post(photos.png(9, 9, photos.zeros(20_000 * MIB))))
        await until(fresh, queued=1)
        assert await stop(fresh) < 8


# --- Pages of other sites ---
HOSTS = {
    "localhost": 200,
    "LOCALHOST:80": 200,
    "laptop": 200,
    "127.0.0.1:8282": 200,
    "192.168.1.5": 200,
    "[::1]:8282": 200,
    "evil.test": 403,
    "evil.test.": 403,
    "evil.test:8282": 403,
    "127.0.0.1.evil.test": 403,
    "localhost.evil.test": 403,
    "localhost.": 403,
    "a\udcff": 403,
    "[": 403,
    "a\u2100": 403,
    "": 403,
    "evil\u3002test": 403,
    "a b": 403,
    "user@localhost": 403,
    "localhost/evil": 403,
    "<script>": 403,
}


@pytest.mark.parametrize("host", HOSTS)
async def test_a_name_that_was_made_to_resolve_here_may_nothing(server: Server, host: str) -> None:
    for request in (get("/health", host=host), get("/", host=host), get("/image", host=host)):
        assert (await ask(server, request)).says(HOSTS[host])
    rebound = get("/health", f"Origin: http://{host}", host=host)
    assert (await ask(server, rebound)).says(HOSTS[host])


@pytest.mark.parametrize(
    "options, status",
    [
        (["--host", "localhost"], 403),
        (["--host", "0.0.0.0"], 200),
        (["--public-url", "https://evil.test/app"], 200),
        (["--public-url", "https://Evil.Test"], 200),  # browsers send a Host in lower case
        (["--public-url", "https://evil.test/a//b"], 200),
    ],
)
async def test_which_names_are_its_own_depends_on_its_options(
    options: list[str], status: int
) -> None:
    with running(*options) as server:
        assert (await ask(server, get("/health", host="evil.test"))).says(status)


async def test_the_page_behind_a_proxy_may_all() -> None:
    """Some proxies send the server's own name as Host."""
    with running("--public-url", "https://school.test/app") as server:
        assert (await ask(server, get("/health", "Origin: https://school.test"))).says(200)
        assert (await ask(server, get("/health", "Origin: https://evil.test"))).says(403)


async def test_a_name_that_is_none_reaches_no_watcher() -> None:
    """It would stand in the URLs, and nobody would get them."""
    with running("--host", "0.0.0.0") as server:
        async with watch(server) as good, connect(server) as bad:
            await bad.send(upgrade().replace(b"localhost", b"a\xff"))
            assert (await bad.answer()).says(403)
            assert (await ask(server, post(PHOTO))).says(201)
            assert (await good.frame())[0] == TEXT


async def test_a_path_forges_no_line_of_the_log(server: Server) -> None:
    before = server.log.stat().st_size
    assert (await ask(server, get("/a%0a2025-01-01%20b%1b[31m"))).says(404, "/a%0a2025")
    line = server.log.read_bytes()[before:]
    assert (line.count(b"\n"), line.count(b"\x1b")) == (1, 0)


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.test",
        "http://localhost:1",
        "null",
        "",
        "http://localhost@evil.test",
        "http://[x",
        "http://\udcff",
    ],
)
async def test_a_page_of_another_site_may_nothing(server: Server, origin: str) -> None:
    line = f"Origin: {origin}"
    for request in (get("/health", line), post(PHOTO, line), upgrade("", line)):
        assert (await ask(server, request)).says(403, "--allow-origin")


# --- The start ---
@pytest.mark.parametrize("options", [["--port", "70000"], ["--host", ""], ["--host", "a b"]])
def test_where_it_cannot_listen_it_says_so(options: list[str]) -> None:
    command = [sys.executable, str(ROOT / "server.py"), "--port", "0", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode != 0
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert re.search("--port|--host|port", done.stderr)


async def test_the_log_has_the_time_and_one_line_for_a_photo_but_none_for_a_get() -> None:
    with running() as server:
        assert (await ask(server, post(PHOTO))).says(201)
        assert (await ask(server, get("/image"))).says(200)
        assert re.fullmatch(r"[\d-]+ [\d:,]+ None: 0 faces in \d+ ms\n", server.log.read_text())


def test_with_an_opencv_that_has_no_cascades_it_says_what_to_install() -> None:
    """OpenCV 5 has none."""
    start = "import cv2, server; del cv2.CascadeClassifier; server.main()"
    command = [sys.executable, "-c", start]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "requirements.txt" in done.stderr


@pytest.fixture
def changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Writes a program that runs the server after these lines."""

    def changed(lines: str) -> Path:
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        program = tmp_path / "changed.py"
        program.write_text(f"import socket\nimport server\n{lines}\nserver.main()")
        return program

    return changed


def test_without_a_network_it_starts_too(changed) -> None:
    """As in a machine that has no route to anywhere."""
    no_route = """
def connect(*_):
    raise OSError("Network is unreachable")

socket.socket.connect = connect"""
    with running("--host", "0.0.0.0", program=changed(no_route)) as server:
        assert server.url == f"http://0.0.0.0:{server.port}"


def test_what_asyncio_says_of_other_faults_is_logged(changed) -> None:
    """Also if the name of a coroutine or a folder is like what it says too often."""
    fault = """
import logging

def serve(_):
    logging.getLogger("asyncio").error("A task failed\\ncoro=<accept() in /serving/server.py>")

server.serve = serve"""
    done = subprocess.run(
        [sys.executable, changed(fault)], capture_output=True, text=True, timeout=TIMEOUT
    )
    assert (done.returncode, "A task failed" in done.stderr) == (0, True)


def test_on_a_system_that_has_no_such_timeout_it_starts_too(changed) -> None:
    """As macOS and Windows."""
    with running(program=changed('vars(socket).pop("TCP_USER_TIMEOUT", None)')):
        pass


def test_where_others_may_come_in_it_says_at_which_address(changed) -> None:
    route = 'socket.socket.connect = lambda probe, _: probe.bind(("127.0.0.1", 0))'
    with running("--host", "0.0.0.0", program=changed(route)) as server:
        assert server.url == f"http://127.0.0.1:{server.port}"


async def test_a_watcher_is_pinged_before_a_proxy_drops_it(changed) -> None:
    """They drop who is silent for 30 s; here, all is a hundred times as fast."""
    hurry = """
class Hurried(server.web.WebSocketResponse):
    def __init__(self, heartbeat, **options):
        assert heartbeat < 30
        super().__init__(heartbeat=heartbeat / 100, **options)

server.web.WebSocketResponse = Hurried"""
    with running(program=changed(hurry)) as server:
        async with watch(server) as client:
            assert await client.frame() == (PING, b"")
