"""Nothing that a client sends, or fails to do, may hurt anyone else: raw sockets show it."""

import asyncio
import contextlib
import gzip
import json
import struct
import urllib.request
from collections.abc import AsyncIterator, Callable
from email.message import Message
from pathlib import Path

import photos
import pytest
from helpers import (
    CLOSE,
    FORM,
    GATE,
    LONG_NAME,
    NOTE_TURNS,
    PING,
    PINGS,
    PONG,
    START,
    TEXT,
    TIMEOUT,
    Answer,
    Client,
    Server,
    ask,
    chunked,
    connect,
    cpu_time,
    flooding,
    frame,
    head_of,
    health,
    memory,
    open_files,
    open_gate,
    post_and_get_path,
    run_python,
    run_server,
    stop,
    stuffed,
    to_get,
    to_post,
    to_watch,
    turns,
    until,
    watch,
)
from photos import ASTRONAUT, MIB, TINY, np

BYTES_A_PIXEL = 9  # that a photo takes at most while it is annotated
NOISE = photos.encode(".jpg", np.random.default_rng(1).integers(0, 256, (2500, 2500, 3), np.uint8))
BLIND = "server.load_detector = lambda *_: lambda _: []"  # a server that is quick with noise
DAMAGED = "The photo is damaged or cut short."


@pytest.fixture(scope="module")
def largest(shared_server: Server) -> float:
    """CPU seconds that an honest photo takes that is as large as allowed."""
    photo = urllib.request.Request(f"{shared_server.url}/image", photos.photo_of(7000, 7000))
    before = cpu_time(shared_server)
    urllib.request.urlopen(photo, timeout=TIMEOUT).close()
    return cpu_time(shared_server) - before


# --- Photos that hurt ---
async def test_an_animation_that_crashes_opencv_is_answered(server: Server) -> None:
    assert (await ask(server, to_post(photos.FRAME))).status in (201, 422)


async def test_a_chunk_that_claims_4_gib_takes_no_memory(fresh: Server) -> None:
    before = memory(fresh, "VmHWM")
    assert (await ask(fresh, to_post(photos.LENGTH))).says(422, DAMAGED)
    assert memory(fresh, "VmHWM") - before < 32


async def test_an_animated_16_bit_png_takes_what_a_photo_takes(fresh: Server) -> None:
    photo = photos.animated_png(3000, 3000, depth=16, color=6, frames=3, row=3000 * 8)
    before = memory(fresh, "VmHWM")
    assert (await ask(fresh, to_post(photo))).says(201)
    assert memory(fresh, "VmHWM") - before < 9 * BYTES_A_PIXEL + 16


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP"])
async def test_what_a_png_has_beside_its_pixels_is_not_inflated(
    server: Server, largest: float, kind: bytes
) -> None:
    """These are 7 GB. libpng inflates up to 1,000 chunks, each to 8 MB."""
    photo = photos.with_chunk(TINY, kind, b"a\0\0" + photos.zeros(7 * MIB), times=950)
    before = cpu_time(server)
    assert (await ask(server, to_post(photo))).says(201)
    assert cpu_time(server) - before < 2 * largest


async def test_a_texture_full_of_faces_is_done_in_time(server: Server, largest: float) -> None:
    before = cpu_time(server)
    assert (await ask(server, to_post(photos.TEXTURE))).says(201)
    assert cpu_time(server) - before < 2 * largest


async def test_a_jpeg_has_at_most_40_scans(server: Server, largest: float) -> None:
    assert (await ask(server, to_post(photos.jpeg_of_scans(512, 40)))).says(201)
    before = cpu_time(server)
    assert (await ask(server, to_post(photos.jpeg_of_scans(7000, 500)))).says(422, "40 scans")
    assert cpu_time(server) - before < largest


async def test_scans_cannot_hide_behind_what_looks_like_segments(server: Server) -> None:
    """Some markers begin no segment, and libjpeg skips what is between two segments."""
    for filler in (b"", b"\xff\xff\xff", b"\xff\xd0", b"\xff\x01", b"\xff\x02", b"\xff\xfe\0\2"):
        photo = photos.jpeg_of_scans(512, 41, filler)
        assert (await ask(server, to_post(photo))).says(422, "40 scans")


async def test_an_arithmetic_coded_jpeg_is_refused_at_once(server: Server, largest: float) -> None:
    """Its scans take several times as long; browsers do not read it either."""
    before = cpu_time(server)
    photo = photos.arithmetic_jpeg(7000, 39)
    assert (await ask(server, to_post(photo))).says(422, "arithmetic")
    assert cpu_time(server) - before < largest


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
    "PNG of one row too many": photos.png(8192, 8193, b""),
    "PNG of 2^31": photos.png(2**31 - 1, 2**31 - 1, b""),
    "WebP": lying_webp(),
    "GIF": lying_gif(),
}


async def test_a_photo_that_claims_too_many_pixels_is_refused_at_once(fresh: Server) -> None:
    before = memory(fresh, "VmHWM")
    for kind, photo in TOO_LARGE.items():
        words = "damaged" if kind == "PNG of 2^31" else "OPENCV_IO_MAX_IMAGE_PIXELS"
        assert (await ask(fresh, to_post(photo))).says(422, words)
    assert memory(fresh, "VmHWM") - before < 32


async def test_the_limit_of_pixels_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENCV_IO_MAX_IMAGE_PIXELS", "80")
    with run_server() as server:
        assert (await ask(server, to_post(TINY))).says(422, "Over 80 pixels")


async def test_an_empty_limit_of_pixels_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENCV_IO_MAX_IMAGE_PIXELS", "")
    with run_server() as server:
        assert (await ask(server, to_post(TINY))).says(201)


@pytest.mark.parametrize("limit", ["abc", "50e6", "0", "-1", "٣", "9" * 30])
@pytest.mark.parametrize("command", [["server.py"], ["-c", "import server"]])
def test_an_invalid_limit_of_pixels_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, command: list[str], limit: str
) -> None:
    """OpenCV would end the process with words of C++."""
    monkeypatch.setenv("OPENCV_IO_MAX_IMAGE_PIXELS", limit)
    done = run_python(*command)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "OPENCV_IO_MAX_IMAGE_PIXELS must be a whole number above 0.\n"


async def test_a_photo_that_does_not_fit_in_memory_gets_503(fresh: Server) -> None:
    resource = pytest.importorskip("resource")
    assert (await ask(fresh, to_post(TINY))).says(201)  # its thread has its memory
    limit = int((memory(fresh, "VmSize") + 50) * MIB)
    resource.prlimit(fresh.process.pid, resource.RLIMIT_AS, (limit, -1))
    assert (await ask(fresh, to_post(photos.blank_png(7000, 7000)))).says(503, "memory")
    assert (await ask(fresh, to_post(TINY))).says(201)


async def test_a_jpeg_of_millions_of_segments_is_done_in_time(
    server: Server, largest: float
) -> None:
    before = cpu_time(server)
    photo = b"\xff\xd8" + b"\xff\xfe\0\2" * 5_000_000 + ASTRONAUT[2:]
    assert (await ask(server, to_post(photo))).status in (201, 422)
    assert cpu_time(server) - before < 2 * largest


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WebP", "GIF", "form"])
def test_mutants_are_annotated_or_refused(name: str) -> None:
    """A short run of fuzz.py."""
    done = run_python("tests/fuzz.py", "0.02", name)
    row = done.stdout.splitlines()[-1].split(" | ")
    assert int(row[2].replace(",", "")) > 100, done.stderr
    assert row[-1] == "none |"


# --- Bodies that hurt ---
async def test_a_compressed_body_is_refused(server: Server) -> None:
    body = gzip.compress(ASTRONAUT)
    assert (await ask(server, to_post(body, "Content-Encoding: gzip"))).says(415, "not a JPEG")


FILLERS = [b"\t", b"a:b\r\n", b"\r\n", b"; ", b'; filename="', b";filename*=", b"\r\n--b\r\n", b"-"]


@pytest.mark.parametrize("start", [b"--b", START], ids=["boundary", "headers"])
@pytest.mark.parametrize("filler", FILLERS)
async def test_a_form_of_19_mb_of_anything_holds_nobody_up(
    server: Server, start: bytes, filler: bytes
) -> None:
    """It keeps the event loop no longer busy than 20 honest forms of that size."""
    honest = START + b"\r\n" + photos.film(19 * 10**6) + b"\r\n--b--\r\n"
    form = start + filler * (19 * 10**6 // len(filler)) + b"\r\n\r\na\r\n--b--\r\n"
    times = [cpu_time(server, loop_only=True)]
    for body in (honest, form):
        assert (await ask(server, to_post(body, FORM))).status in (400, 415)
        times.append(cpu_time(server, loop_only=True))
    assert times[2] - times[1] < 20 * (times[1] - times[0])


@pytest.mark.parametrize("name", ["=?utf-8?b?a?=", "=?none?q?a?=", "=?hex?q?a?="])
async def test_a_filename_that_cannot_be_decoded_is_left_empty(server: Server, name: str) -> None:
    form = START.replace(b"a.jpg", name.encode()) + b"\r\n" + TINY + b"\r\n--b--\r\n"
    assert (await ask(server, to_post(form, FORM))).says(201, '"filename": ""')


async def test_a_form_of_millions_of_lines_takes_no_memory(fresh: Server) -> None:
    before = memory(fresh, "VmHWM")
    assert (await ask(fresh, to_post(b"--\r\n" * 5_000_000, FORM))).says(400, "complete")
    assert memory(fresh, "VmHWM") - before < 100


OVER = bytes(20 * MIB + 1)


@pytest.mark.parametrize(
    "request_",
    [
        to_post(OVER),
        head_of("POST", "/image", "Transfer-Encoding: chunked") + chunked(OVER),
        head_of("POST", "/image", FORM, "Transfer-Encoding: chunked") + chunked(START + OVER),
    ],
    ids=["body", "chunked", "form"],
)
async def test_a_body_over_the_limit_is_refused_as_it_arrives(
    server: Server, request_: bytes
) -> None:
    assert (await ask(server, request_)).says(413, "--max-mb")


@pytest.mark.parametrize(
    "request_",
    [
        b"GARBAGE\r\n\r\n",
        to_get("/", "A: \0"),
        to_get("/" + "a" * 9000),
        to_get("/", "no colon"),
        to_get("/", *["A: b"] * 128),  # with Host, 129 headers
    ],
)
async def test_what_is_not_http_is_refused(request_: bytes) -> None:
    with run_server(tracebacks=True) as server:  # aiohttp logs one for each
        assert (await ask(server, request_)).status == 400


async def test_an_upload_that_takes_too_long_is_cut_off(impatient: Server) -> None:
    async with connect(impatient) as slow:
        await slow.send(head_of("POST", "/image", "Content-Length: 99"))
        for _ in range(2):
            await slow.send(b"a")
            await asyncio.sleep(1)
            assert (await ask(impatient, to_post(TINY))).says(201)
        assert (await slow.answer()).says(408, "--upload-timeout")


async def test_a_client_that_sends_all_before_it_reads_learns_why_it_is_refused(
    server: Server,
) -> None:
    for path, status in (("/image", 413), ("/nothing", 404)):
        async with connect(server) as client:
            await client.send(head_of("POST", path, "Content-Length: 30000000") + bytes(30_000_000))
            assert (await client.answer()).says(status)


async def test_a_refused_body_that_trickles_is_cut_off(impatient: Server) -> None:
    async with connect(impatient) as slow, asyncio.timeout(10):
        await slow.send(head_of("POST", "/nothing", "Content-Length: 99"))
        assert (await slow.answer()).says(404)
        ending = asyncio.create_task(slow.end())
        with contextlib.suppress(ConnectionError):
            while not ending.done():
                await slow.send(b"a")
                await asyncio.wait([ending], timeout=0.5)
        assert await ending == b""


async def test_a_client_that_leaves_in_a_refused_body_leaves_no_traceback(server: Server) -> None:
    async with connect(server) as leaving:
        await leaving.send(head_of("POST", "/nothing", "Content-Length: 99"))
        assert (await leaving.answer()).says(404)
        leaving.reset()


async def test_headers_that_trickle_are_cut_off(impatient: Server) -> None:
    async with connect(impatient) as slow, asyncio.timeout(TIMEOUT):
        await slow.send(b"GET / HTTP/1.1\r\nA: ")
        end = asyncio.create_task(slow.end())
        while not end.done():
            with contextlib.suppress(ConnectionError):
                await slow.send(b"a")
            await asyncio.wait([end], timeout=0.5)


@contextlib.asynccontextmanager
async def pouring(server: Server, start: bytes, data: bytes, number: int = 20) -> AsyncIterator:
    """Clients that send data after a start, as fast as they can."""

    async def pour() -> None:
        async with connect(server) as client:
            await client.send(start)
            with contextlib.suppress(ConnectionError):
                while True:
                    await client.send(data)

    floods = [asyncio.create_task(pour()) for _ in range(number)]
    await asyncio.sleep(0.5)
    yield
    for each in floods:
        each.cancel()
    await asyncio.wait(floods)


@contextlib.asynccontextmanager
async def holding_nobody_up(server: Server) -> AsyncIterator[None]:
    """No turn of the event loop takes a quarter of the CPU time of a photo of 9 megapixels."""
    before = cpu_time(server)
    assert (await ask(server, to_post(photos.photo_of(3000, 3000)))).says(201)
    photo, seen = cpu_time(server) - before, len(turns(server))
    yield
    assert max(turns(server)[seen:]) < photo / 4


TINY_CHUNKS = b"1\r\nx\r\n" * 10_000


@pytest.mark.parametrize(
    "method, path", [("POST", "/detect"), ("POST", "/nothing"), ("GET", "/health")]
)
async def test_bodies_in_tiny_chunks_hold_nobody_up(timed: Server, method: str, path: str) -> None:
    """Also those that are refused, and that the server reads on, so that clients see why."""
    start = head_of(method, path, "Transfer-Encoding: chunked")
    async with holding_nobody_up(timed), pouring(timed, start, TINY_CHUNKS):
        for _ in range(20):
            assert (await ask(timed, to_get("/health"))).says(200)


LONG_HEADERS = {
    "Host": to_get("/join.png", host=2000 * "a"),  # a large QR code
    "Content-Type": to_post(TINY, "Content-Type: " + 8000 * '"'),
}


@pytest.mark.parametrize("header", LONG_HEADERS)
async def test_a_long_header_holds_nobody_up(timed: Server, header: str) -> None:
    async with holding_nobody_up(timed):
        requests = [ask(timed, LONG_HEADERS[header]) for _ in range(5)]
        for answer in await asyncio.gather(*requests):
            assert answer.status in (400, 403)


async def test_frames_without_end_hold_nobody_up(timed: Server) -> None:
    """Each is an empty continuation of the same message, so that the server sees no message."""
    begin, more = b"\x01\x80\0\0\0\0", b"\0\x80\0\0\0\0" * 10_000
    async with holding_nobody_up(timed), pouring(timed, to_watch() + begin, more, number=5):
        for _ in range(20):
            assert (await ask(timed, to_get("/health"))).says(200)


async def test_refused_bodies_that_go_on_take_no_memory() -> None:
    """Not what was refused, nor what comes after it and is skipped."""
    async with contextlib.AsyncExitStack() as stack:
        server = stack.enter_context(run_server("--max-mb", "1"))
        before = memory(server, "VmRSS")
        for _ in range(200):
            client = await stack.enter_async_context(connect(server))
            await client.send(to_post(bytes(2 * MIB))[:-9])
            assert (await client.answer()).says(413)
        assert memory(server, "VmRSS") - before < 200 / 4


async def test_uploads_that_stall_keep_nobody_from_posting(fresh: Server) -> None:
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connect(fresh)) for _ in range(100)]
        for client in clients:
            await client.send(head_of("POST", "/image", f"Content-Length: {MIB}") + b"a")
        stalled = [asyncio.create_task(client.end()) for client in clients]
        assert (await ask(fresh, to_post(TINY))).says(201)
        assert not any(each.done() for each in stalled)


async def ask_until_accepted(server: Server, request: bytes) -> Answer:
    """Ask again while the server has no room."""
    async with asyncio.timeout(TIMEOUT):
        while (answer := await ask(server, request)).status == 503:
            pass
    return answer


@contextlib.asynccontextmanager
async def eight_uploads(server: Server) -> AsyncIterator[dict[Client, asyncio.Task[Answer]]]:
    """Clients that lack nine bytes of a body each, and their answers: a ninth was refused."""
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connect(server)) for _ in range(9)]
        for client in clients:
            await client.send(to_post(bytes(MIB))[:-9])
        answers = {client: asyncio.create_task(client.answer()) for client in clients}
        (refused,), _ = await asyncio.wait(
            answers.values(), timeout=TIMEOUT, return_when=asyncio.FIRST_COMPLETED
        )
        assert refused.result().says(503, "Too many uploads (--max-mb).")
        yield {client: answer for client, answer in answers.items() if answer is not refused}
        await asyncio.gather(*answers.values(), return_exceptions=True)


async def test_uploads_take_no_more_memory_than_eight_bodies() -> None:
    with run_server("--max-mb", "1") as server:
        async with eight_uploads(server) as uploads:
            for client, answer in uploads.items():
                await client.send(bytes(9))
                assert (await answer).says(415)


async def test_uploads_that_end_early_give_their_memory_back() -> None:
    with run_server("--max-mb", "1") as server:
        async with eight_uploads(server) as uploads:
            for client in uploads:
                client.reset()
            assert (await ask_until_accepted(server, to_post(bytes(MIB)))).says(415)


async def test_clients_that_leave_give_their_place_back() -> None:
    photo = photos.photo_of(3000, 3000)
    with run_server("--queue", "0", "--upload-timeout", "10") as server:
        for cut in (len(photo) // 2, len(photo) + 999):  # in the upload, and in the detection
            for _ in range(40):
                async with connect(server) as client:
                    await client.send(to_post(photo)[:cut])
                    client.reset()
            assert (await ask_until_accepted(server, to_post(TINY))).says(201)
            await until(server, queued=0)


async def test_a_client_that_leaves_a_damaged_photo_leaves_no_traceback(
    changed: Callable[[str], Path],
) -> None:
    with run_server("--threads", "1", program=changed(GATE)) as server:
        async with connect(server) as busy, connect(server) as leaving:
            await busy.send(to_post(TINY))
            await until(server, queued=1)
            await leaving.send(to_post(ASTRONAUT[:9000]))
            await until(server, queued=2)
            leaving.reset()
            open_gate(server)
            assert (await busy.answer()).says(201)
        await until(server, queued=0)  # in the end, the log must have no traceback


# --- Photos that wait ---
async def test_each_thread_has_its_own_queue(changed: Callable[[str], Path]) -> None:
    with run_server("--threads", "2", "--queue", "1", program=changed(GATE)) as server:
        posts = [asyncio.create_task(ask(server, to_post(TINY))) for _ in range(5)]
        await asyncio.wait(posts, timeout=TIMEOUT, return_when=asyncio.FIRST_COMPLETED)
        open_gate(server)
        answers = await asyncio.gather(*posts)
        assert sorted(answer.status for answer in answers) == [201] * 4 + [503]


async def test_a_hundred_large_photos_at_once_stay_within_memory() -> None:
    threads, megapixels = 2, 9
    photo = photos.photo_of(3000, 3000)
    with run_server("--threads", str(threads), "--queue", "2") as server:
        answers = await asyncio.gather(*(ask(server, to_post(photo)) for _ in range(100)))
        assert all(answer.says(answer.status) for answer in answers)
        assert {answer.status for answer in answers} == {201, 503}
        bound = threads * megapixels * BYTES_A_PIXEL + 14 * len(photo) / MIB + 200
        assert memory(server, "VmHWM") < bound


async def test_photos_that_are_refused_at_once_take_no_memory(fresh: Server) -> None:
    before = memory(fresh, "VmHWM")
    for _ in range(20):
        assert (await ask(fresh, to_post(b"text" * (4 * MIB)))).says(415)
    assert memory(fresh, "VmHWM") - before < 100


async def test_photos_that_are_refused_never_drop_an_image(server: Server) -> None:
    """By default, 100 images are kept."""
    image = await post_and_get_path(server, ASTRONAUT)
    answers = await asyncio.gather(*(ask(server, to_post(b"a")) for _ in range(120)))
    assert {answer.status for answer in answers} <= {415, 503}
    assert (await ask(server, to_get(image))).says(200)


async def test_photos_that_are_refused_never_drop_one_that_is_under_way(
    changed: Callable[[str], Path],
) -> None:
    """By default, 100 images are kept."""
    with run_server("--threads", "2", program=changed(GATE)) as server:
        posting = asyncio.create_task(ask(server, to_post(TINY)))
        await until(server, queued=1)
        async with connect(server) as client:
            await client.send(to_post(b"a") * 200)
            for _ in range(200):
                assert (await client.answer()).says(415)
        open_gate(server)
        assert (await posting).says(201)


async def test_the_bytes_of_an_image_that_was_dropped_do_not_count() -> None:
    with run_server("--keep", "1") as server:
        for photo in (ASTRONAUT, TINY):
            path = await post_and_get_path(server, photo)
        size = len((await ask(server, to_get(path))).body)
        assert {"images": 1, "bytes": size}.items() <= (await health(server)).items()


# --- Clients that do not read, or never stop writing ---
async def test_a_hundred_clients_that_do_not_read_their_image_take_no_memory(
    changed: Callable[[str], Path],
) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (3600, 3600, 3), np.uint8)
    with run_server("--upload-timeout", "5", program=changed(BLIND)) as server:
        meta = json.loads((await ask(server, to_post(photos.encode(".jpg", noise)))).body)
        path = meta["url"].partition("localhost")[2]
        size = int((await ask_head(server, path))["Content-Length"])
        assert size > 10**7
        async with contextlib.AsyncExitStack() as stack:
            before, files = memory(server, "VmRSS"), open_files(server)
            deaf = [
                await stack.enter_async_context(connect(server, receive_buffer=4096))
                for _ in range(100)
            ]
            for each in deaf:
                await each.send(to_get(path))
            for each in deaf:
                await each.head()  # the server is sending
            assert memory(server, "VmRSS") - before < 100
            async with asyncio.timeout(TIMEOUT):  # without progress: cut off
                while open_files(server) > files:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            assert len(await deaf[0].end()) < size


async def test_a_client_that_reads_too_slowly_holds_no_dropped_image(
    changed: Callable[[str], Path],
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        server = stack.enter_context(run_server("--keep", "1", program=changed(BLIND)))
        for _ in range(4):  # each thread takes the memory that it will keep
            path = await post_and_get_path(server, NOISE)
        before, size = memory(server, "VmRSS"), (await health(server))["bytes"] / MIB
        for _ in range(15):
            slow = await stack.enter_async_context(connect(server, receive_buffer=4096))
            await slow.send(to_get(path))
            assert (await slow.head())[0] == 200
            path = await post_and_get_path(server, NOISE)
        assert memory(server, "VmRSS") - before < 5 * size
        assert len(await slow.end()) < size * MIB  # it is cut off, not made to wait


async def test_a_client_that_reads_below_a_least_pace_is_cut_off(
    changed: Callable[[str], Path],
) -> None:
    """The pace is 64 KiB in --upload-timeout; this client reads 8 KiB a second."""
    with run_server("--upload-timeout", "2", program=changed(BLIND)) as server:
        path = await post_and_get_path(server, NOISE)
        async with connect(server, receive_buffer=4096) as slow, asyncio.timeout(TIMEOUT):
            await slow.send(to_get(path))
            with contextlib.suppress(ConnectionError):
                while await slow.reader.read(2048):  # noqa: ASYNC110
                    await asyncio.sleep(0.25)


async def test_a_client_that_reads_no_answer_is_cut_off() -> None:
    with run_server("--upload-timeout", "3") as server:
        before = open_files(server)
        async with connect(server, receive_buffer=4096) as deaf, asyncio.timeout(TIMEOUT):
            await deaf.send(to_get("/openapi.json") * 1000)
            assert (await deaf.head())[0] == 200
            while open_files(server) > before:  # noqa: ASYNC110
                await asyncio.sleep(0.05)


async def test_a_client_that_reads_no_file_of_the_page_leaves_no_traceback(
    changed, tmp_path: Path
) -> None:
    (tmp_path / "large.js").write_bytes(bytes(20 * MIB))
    program = changed(f"server.STATIC = server.Path({str(tmp_path)!r})")
    with run_server("--upload-timeout", "3", program=program) as server:
        before = open_files(server)
        async with connect(server, receive_buffer=4096) as deaf, asyncio.timeout(TIMEOUT):
            await deaf.send(to_get("/static/large.js"))
            assert (await deaf.head())[0] == 200
            while open_files(server) > before:  # noqa: ASYNC110
                await asyncio.sleep(0.05)


async def test_requests_that_wait_behind_an_unread_answer_take_no_memory(fresh: Server) -> None:
    path = await post_and_get_path(fresh, NOISE)
    large = to_get("/health", *[f"A{number}: {8000 * 'a'}" for number in range(60)])  # 480 KB
    async with contextlib.AsyncExitStack() as stack:
        before = memory(fresh, "VmRSS")
        for _ in range(5):
            deaf = await stack.enter_async_context(connect(fresh, receive_buffer=4096))
            await deaf.send(to_get(path))
            await deaf.head()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(deaf.send(40 * large), 1)  # the server stops to read
        assert memory(fresh, "VmRSS") - before < 50


async def test_a_long_list_holds_nobody_up(changed: Callable[[str], Path]) -> None:
    async with contextlib.AsyncExitStack() as stack:
        server = stack.enter_context(run_server("--keep", "2000", program=changed(NOTE_TURNS)))
        client = await stack.enter_async_context(connect(server))
        for _ in range(20):
            await client.send(to_post(TINY) * 100)
            for _ in range(100):
                assert (await client.answer()).says(201)
        clients = [await stack.enter_async_context(connect(server)) for _ in range(20)]
        async with holding_nobody_up(server):
            for each in clients:
                await each.send(to_get("/image"))
            for each in clients:
                assert (await each.answer()).says(200, '"face_count": 0')


async def test_a_connection_that_is_not_used_is_closed() -> None:
    with run_server("--upload-timeout", "1") as server:
        async with connect(server) as idle, asyncio.timeout(TIMEOUT):
            assert await idle.end() == b""


async def ask_head(server: Server, path: str) -> Message:
    async with connect(server) as client:
        await client.send(head_of("HEAD", path))
        return (await client.head())[1]


async def test_watchers_that_do_not_read_are_cut_off_and_hold_nobody_up(fresh: Server) -> None:
    async with contextlib.AsyncExitStack() as stack:
        good = await stack.enter_async_context(watch(fresh))
        client = await stack.enter_async_context(connect(fresh))

        async def post() -> None:
            await client.send(to_post(LONG_NAME, FORM) * 200)
            for _ in range(200):
                answer = await client.answer()
                assert answer.says(201)
                while (message := await good.frame()) == (PING, b""):
                    await good.send(frame(PONG, b""))  # on a slow machine
                assert message == (TEXT, answer.headers["Location"].encode())

        await post()  # the images that are kept take their memory
        before = memory(fresh, "VmHWM")
        for _ in range(60):
            await stack.enter_async_context(watch(fresh, "?format=json", receive_buffer=2048))
        while (await health(fresh))["clients"] > 1:  # the kernels take up to 4 MB for each
            await post()
        assert memory(fresh, "VmHWM") - before < 60


async def test_a_watcher_that_does_not_read_long_announcements_holds_nobody_up(
    changed: Callable[[str], Path],
) -> None:
    """One of 2,000 faces is 110 KB; above 64, aiohttp would wait until the watcher reads."""
    crowd = "server.load_detector = lambda *_: lambda _: [server.Face(1, 1, 9, 9, 99)] * 2000"
    async with contextlib.AsyncExitStack() as stack:
        server = stack.enter_context(run_server(program=changed(crowd)))
        for _ in range(5):
            await stack.enter_async_context(watch(server, "?format=json", receive_buffer=2048))
        while (await health(server))["clients"]:  # the kernels take up to 4 MB for each
            assert (await ask(server, to_post(TINY))).says(201)


async def test_a_watcher_that_is_leaving_takes_nothing_from_the_others(server: Server) -> None:
    """What it has not read keeps it from being gone."""
    async with stuffed(server) as leaving, watch(server) as good:
        leaving.writer.write_eof()
        for _ in range(2):
            answer = await ask(server, to_post(TINY))
            assert answer.says(201)
            assert await good.frame() == (TEXT, answer.headers["Location"].encode())


async def test_a_watcher_that_pings_all_the_time_holds_nobody_up(timed: Server) -> None:
    async with holding_nobody_up(timed), flooding(timed, PINGS, watching=True, number=1):
        assert (await ask(timed, to_post(TINY))).says(201)


async def test_a_watcher_that_pings_and_does_not_read_takes_no_memory(
    changed: Callable[[str], Path],
) -> None:
    """Not even one that takes its time; so the limit of messages is lifted here."""
    with run_server(program=changed("server.MAX_MESSAGES = 10**9")) as server:
        async with watch(server, receive_buffer=2048) as deaf:
            before = memory(server, "VmHWM")
            with contextlib.suppress(ConnectionError, TimeoutError):
                async with asyncio.timeout(5):
                    while True:
                        deaf.writer.write(frame(PING, bytes(125)) * 500)
                        await deaf.writer.drain()
            assert memory(server, "VmHWM") - before < 10


async def test_a_watcher_may_send_a_hundred_messages_if_it_takes_its_time(
    changed: Callable[[str], Path],
) -> None:
    with run_server(program=changed("server.MESSAGES_TIME = 0.5")) as server:
        async with watch(server) as good:
            for _ in range(2):
                await good.send(frame(PONG, b"") * 60 + frame(PING, b"still there"))
                assert await good.frame() == (PONG, b"still there")
                await asyncio.sleep(0.6)


@pytest.mark.parametrize("watching", [False, True], ids=["image", "watcher"])
async def test_a_client_that_asks_and_leaves_at_once_leaves_no_traceback(
    server: Server, watching: bool
) -> None:
    path = await post_and_get_path(server, TINY)
    for _ in range(40):
        async with connect(server) as client:
            await client.send(to_watch() if watching else to_get(path))
            client.reset()


async def test_a_watcher_that_sends_too_much_is_cut_off(server: Server) -> None:
    async with watch(server) as good, watch(server) as bad:
        await good.send(frame(PONG, b"") * 99)
        await bad.send(frame(PONG, b"") * 100)
        assert await bad.end() == b""
        answer = await ask(server, to_post(TINY))
        assert await good.frame() == (TEXT, answer.headers["Location"].encode())


async def test_a_watcher_that_sends_and_leaves_gives_its_place_back(fresh: Server) -> None:
    before = memory(fresh, "VmRSS")
    for _ in range(100):
        async with watch(fresh) as leaving:
            leaving.writer.write(frame(PONG, b"") * 30_000)
    async with asyncio.timeout(20):  # a ping would find it out after 25 s
        await until(fresh, clients=0)
    assert memory(fresh, "VmRSS") - before < 100


async def test_a_watcher_that_sends_a_long_message_is_cut_off(server: Server) -> None:
    async with watch(server) as good, watch(server) as bad:
        await bad.send(b"\x81\xfe" + struct.pack(">H", 1026) + bytes(4 + 1026))
        assert await bad.frame() == (CLOSE, struct.pack(">H", 1009))
        answer = await ask(server, to_post(TINY))
        assert await good.frame() == (TEXT, answer.headers["Location"].encode())


async def test_a_watcher_gets_no_compression(server: Server) -> None:
    """It would take 256 KiB for each."""
    async with connect(server) as client:
        await client.send(to_watch("", "Sec-WebSocket-Extensions: permessage-deflate"))
        status, headers = await client.head()
        assert (status, headers["Sec-WebSocket-Extensions"]) == (101, None)


async def test_there_are_no_more_watchers_than_allowed() -> None:
    async with contextlib.AsyncExitStack() as stack:
        server = stack.enter_context(run_server("--max-clients", "2"))
        for _ in range(2):
            await stack.enter_async_context(watch(server))
        assert (await ask(server, to_watch())).says(503, "--max-clients")


async def test_more_connections_than_open_files_flood_no_log() -> None:
    async with contextlib.AsyncExitStack() as stack:
        server = stack.enter_context(run_server(files=100))
        stalled = await stack.enter_async_context(connect(server))
        await stalled.send(head_of("POST", "/image", "Content-Length: 99999"))  # the stop takes 1 s
        for _ in range(200):
            await stack.enter_async_context(connect(server))
        await asyncio.sleep(2)
        await stop(server)
        assert server.log.stat().st_size < 1000


# --- Pages of other sites ---
HOSTS = {
    "localhost": 200,
    "LOCALHOST:80": 200,
    "laptop": 200,
    "127.0.0.1:8282": 200,
    "192.168.1.5": 200,
    "[::1]:8282": 200,
    "[1.2]": 200,  # no address, but no name either
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
    64 * "a": 403,
    f"localhost:{64 * '1'}": 403,
    "<script>": 403,
}


@pytest.mark.parametrize("host", HOSTS)
async def test_a_name_of_another_site_that_resolves_to_this_machine_is_refused(
    server: Server, host: str
) -> None:
    for request in (
        to_get("/health", host=host),
        to_get("/", host=host),
        to_get("/image", host=host),
    ):
        assert (await ask(server, request)).says(HOSTS[host])
    rebound = to_get("/health", f"Origin: http://{host}", host=host)
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
async def test_its_options_decide_which_names_it_answers_to(
    options: list[str], status: int
) -> None:
    with run_server(*options) as server:
        assert (await ask(server, to_get("/health", host="evil.test"))).says(status)


async def test_a_malformed_host_never_reaches_a_watcher() -> None:
    """It would stand in the URLs, and nobody would get them."""
    with run_server("--host", "0.0.0.0") as server:
        async with watch(server) as good, connect(server) as bad:
            await bad.send(to_watch().replace(b"localhost", b"a\xff"))
            assert (await bad.answer()).says(403)
            assert (await ask(server, to_post(TINY))).says(201)
            assert (await good.frame())[0] == TEXT


async def test_a_browser_does_not_share_its_cache_with_other_sites(server: Server) -> None:
    """It would show an image of its cache to a page that may not get it from the server."""
    for path in ("/", await post_and_get_path(server, TINY)):
        assert (await ask(server, to_get(path))).headers["Vary"] == "Accept, Origin"


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
async def test_pages_of_other_sites_are_refused(server: Server, origin: str) -> None:
    line = f"Origin: {origin}"
    for request in (to_get("/health", line), to_post(TINY, line), to_watch("", line)):
        assert (await ask(server, request)).says(403, "--allow-origin")


# --- The log ---
async def test_a_path_forges_no_line_of_the_log(server: Server) -> None:
    before = server.log.stat().st_size
    assert (await ask(server, to_get("/a%0a2025-01-01%20b%1b[31m"))).says(404, "/a%0a2025")
    line = server.log.read_bytes()[before:]
    assert (line.count(b"\n"), line.count(b"\x1b")) == (1, 0)
