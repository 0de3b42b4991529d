"""Nothing that a client sends, or fails to do, may hurt anyone else: raw sockets against a real server process."""

import asyncio
import base64
import contextlib
import gzip
import io
import json
import os
import signal
import socket
import struct
import time
import urllib.request
import zlib
from collections.abc import AsyncIterator
from email.message import Message
from email.parser import BytesHeaderParser
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest
from conftest import ROOT, Server, StartServer

import server as faces

for missing in ("PIL", "hypothesis"):
    pytest.importorskip(missing, reason=f"{missing} is missing: pip install -r e2e/requirements.txt")

from hypothesis import Phase, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from PIL import Image  # noqa: E402

TIMEOUT = 60  # s, for every wait: this may share its CPUs
MIB = 2**20  # bytes
BYTES_A_PIXEL = 12  # that a photo takes at most while it is annotated
ASTRONAUT = (ROOT / "samples/astronaut.jpg").read_bytes()  # 512 x 512, one face
UPRIGHT = Image.open(io.BytesIO(ASTRONAUT))


# --- A client without manners ---


class Answer(NamedTuple):
    status: int
    headers: Message
    body: bytes

    def says(self, status: int, words: str = "") -> bool:
        """It is this status, these words are in its detail, and an error is a problem in all its form."""
        if self.status >= 400:
            problem = json.loads(self.body)
            assert self.headers["Content-Type"] == "application/problem+json; charset=utf-8"
            assert set(problem) == {"title", "status", "detail"} and problem["status"] == self.status
            assert (self.status == 503) == ("Retry-After" in self.headers)
        assert (self.status, words in self.body.decode()) == (status, True), self
        return True


class Client:
    """A connection, and what can be done with it by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        async with asyncio.timeout(TIMEOUT):
            await self.writer.drain()

    async def answer(self, head: bool = False) -> Answer:
        """Read one answer; the final one, if there is an interim one."""
        async with asyncio.timeout(TIMEOUT):
            status_line, _, lines = (await self.reader.readuntil(b"\r\n\r\n")).partition(b"\r\n")
            status, headers = int(status_line.split()[1]), BytesHeaderParser().parsebytes(lines)
            if status == 100:
                return await self.answer(head)
            body = b"" if head else await self.reader.readexactly(int(headers.get("Content-Length", 0)))
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
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


@contextlib.asynccontextmanager
async def connect(server: Server, receive_buffer: int | None = None) -> AsyncIterator[Client]:
    """A connection to the server, maybe one that takes but a few bytes unread."""
    plug = socket.socket()
    if receive_buffer:
        plug.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    plug.setblocking(False)
    async with asyncio.timeout(TIMEOUT):
        await asyncio.get_running_loop().sock_connect(plug, (server.host, server.port))
        reader, writer = await asyncio.open_connection(sock=plug, limit=receive_buffer or 2**16)
    try:
        yield Client(reader, writer)
    finally:
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def ask(server: Server, request: bytes) -> Answer:
    async with connect(server) as client:
        writing = asyncio.create_task(client.send(request))  # the server may answer before it has read all
        try:
            return await client.answer()
        finally:
            writing.cancel()
            await asyncio.wait([writing])


def get(path: str, *lines: str, host: str = "faces.test") -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", f"Host: {host}", *lines, "", ""]).encode(errors="surrogateescape")


def post(body: bytes, *lines: str) -> bytes:
    return head(*lines, f"Content-Length: {len(body)}") + body


def head(*lines: str) -> bytes:
    """All of a POST but the body."""
    return "\r\n".join(["POST /image HTTP/1.1", "Host: faces.test", *lines, "", ""]).encode(errors="surrogateescape")


def chunked(body: bytes, size: int = 2**16) -> bytes:
    chunks = (body[at : at + size] for at in range(0, len(body), size))
    return b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"


async def health(server: Server) -> dict[str, int]:
    return json.loads((await ask(server, get("/health"))).body)


async def until(server: Server, **expected: int) -> None:
    """Wait until /health says what is expected."""
    async with asyncio.timeout(TIMEOUT):
        while not expected.items() <= (await health(server)).items():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def until_answered(server: Server, status: int) -> None:
    """Wait until a small photo gets this status."""
    async with asyncio.timeout(TIMEOUT):
        while (await ask(server, post(PHOTO))).status != status:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


@pytest.fixture(scope="module")
def shared_server(start_server: StartServer) -> Server:
    return asyncio.run(start_server("--upload-timeout", "3"))


@pytest.fixture
async def server(shared_server: Server) -> AsyncIterator[Server]:
    """The server that most cases share; after each of them it is well, and has logged no traceback."""
    before = len(shared_server.log.read_bytes())
    yield shared_server
    await until(shared_server, queued=0, clients=0)
    log = shared_server.log.read_bytes()[before:]
    assert b"Traceback" not in log and b"exception" not in log, log.decode()


# --- 1. Photos ---


def pixels() -> np.ndarray:
    return cv2.imdecode(np.frombuffer(ASTRONAUT, np.uint8), cv2.IMREAD_COLOR)


def encode(extension: str, image: np.ndarray | None = None, *parameters: int) -> bytes:
    return cv2.imencode(extension, pixels() if image is None else image, parameters)[1].tobytes()


def save(kind: str, image: Image.Image = UPRIGHT, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(rows: bytes) -> bytes:
    """A PNG of 9 x 9 with these rows, which are deflated already."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 9, 9, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def png(width: int, height: int, rows: bytes = b"", extra: bytes = b"") -> bytes:
    """A PNG of one bit a pixel by hand (its specification, 11.2), also one that lies about its size."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def blank_png(width: int, height: int, extra: bytes = b"") -> bytes:
    return png(width, height, bytes((1 + (width + 7) // 8) * height), extra)


def lying_jpeg(width: int, height: int) -> bytes:
    at = ASTRONAUT.index(b"\xff\xc0") + 5
    return ASTRONAUT[:at] + struct.pack(">HH", height, width) + ASTRONAUT[at + 4 :]


def lying_webp(width: int, height: int) -> bytes:
    """An extended WebP, which may claim 2^24 pixels a side, around a photo of 512 x 512."""
    body = b"VP8X" + struct.pack("<II", 10, 0) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBP" + body + FORMATS["WebP"][12:]
    return b"RIFF" + struct.pack("<I", len(body)) + body


def lying_gif(width: int, height: int) -> bytes:
    return FORMATS["GIF"][:6] + struct.pack("<HH", width, height) + FORMATS["GIF"][10:]


def jpeg_of_scans(side: int, scans: int) -> bytes:
    """A grey progressive JPEG, each of whose scans goes through all of it to change nothing (libjpeg-turbo#284)."""

    def segment(marker: int, *data: int) -> bytes:
        return struct.pack(">BBH", 0xFF, marker, 2 + len(data)) + bytes(data)

    def scan(first: int, last: int, bits: str) -> bytes:
        bits += "1" * (-len(bits) % 8)
        data = int(bits, 2).to_bytes(len(bits) // 8).replace(b"\xff", b"\xff\0")
        return segment(0xDA, 1, 1, 0, first, last, 0) + data

    blocks = (side + 7) // 8 * ((side + 7) // 8)
    frame = segment(0xC2, 8, *struct.pack(">HH", side, side), 1, 1, 0x11, 0)
    tables = segment(0xDB, 0, *[16] * 64) + segment(0xC4, 0, 1, *[0] * 15, 0) + segment(0xC4, 0x10, 1, *[0] * 15, 0xE0)
    nothing = scan(1, 63, ("0" + "1" * 14) * (blocks // 32767 + 1))  # runs of 32,767 blocks
    return b"\xff\xd8" + tables + frame + scan(0, 0, "0" * blocks) + nothing * (scans - 1) + b"\xff\xd9"


def corrupt(photo: bytes) -> bytes:
    return photo[: len(photo) // 2] + bytes(100) + photo[len(photo) // 2 + 100 :]


def with_exif(kind: str, orientation: int) -> bytes:
    """The left two thirds of the astronaut, with an orientation, and a GPS tag that names a place."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x8825] = {0x001D: "GPSGPSGPS"}
    return save(kind, UPRIGHT.crop((0, 0, 340, 512)), exif=exif)


FORMATS = {
    "JPEG": ASTRONAUT,
    "progressive JPEG": save("JPEG", progressive=True),
    "PNG": save("PNG"),
    "WebP": save("WEBP"),
    "lossless WebP": save("WEBP", lossless=True),
    "GIF": save("GIF"),
}
ANIMATED = {"save_all": True, "append_images": [Image.new("RGB", (512, 512))]}
KINDS = FORMATS | {
    "CMYK JPEG": save("JPEG", UPRIGHT.convert("CMYK")),
    "grey JPEG": save("JPEG", UPRIGHT.convert("L")),
    "grey PNG": save("PNG", UPRIGHT.convert("L")),
    "16-bit PNG": encode(".png", pixels().astype(np.uint16) * 257),
    "16-bit PNG of 10 bits": encode(".png", pixels().astype(np.uint16) * 4),
    "16-bit grey PNG": encode(".png", cv2.cvtColor(pixels(), cv2.COLOR_BGR2GRAY).astype(np.uint16) * 257),
    "palette PNG": save("PNG", UPRIGHT.convert("P")),
    "PNG with alpha": save("PNG", UPRIGHT.convert("RGBA")),
    "grey PNG with alpha": save("PNG", UPRIGHT.convert("LA")),
    "animated PNG": save("PNG", **ANIMATED),
    "WebP with alpha": save("WEBP", UPRIGHT.convert("RGBA"), exact=True),
    "animated WebP": save("WEBP", **ANIMATED),
    "animated GIF": save("GIF", **ANIMATED),
    "JPEG, then HTML": ASTRONAUT + b"<html><script>alert(1)</script></html>",
    "JPEG with HTML in a comment": ASTRONAUT[:2] + b"\xff\xfe\x00\x1a<script>alert(1)</script" + ASTRONAUT[2:],
    "JPEG with fill bytes": ASTRONAUT[:2] + b"\xff" * 99 + ASTRONAUT[2:],
}
assert len(b"<script>alert(1)</script") == 0x1A - 2


def zeros(size: int) -> bytes:
    """As many zeros, in zlib's form (RFC 1950): a thousandth of their size."""
    deflate = zlib.compressobj(9, wbits=-15)
    mib = deflate.compress(bytes(MIB)) + deflate.flush(zlib.Z_FULL_FLUSH)  # after which it may be repeated
    return b"\x78\xda" + mib * (size // MIB) + deflate.flush() + struct.pack(">HH", size % 65521, 1)


assert zlib.decompress(zeros(3 * MIB)) == bytes(3 * MIB)
BOMB = zeros(1024 * MIB)
BOMBS = {
    "zTXt of 1 GiB": blank_png(9, 9, chunk(b"zTXt", b"a\0\0" + BOMB)),
    "iTXt of 1 GiB": blank_png(9, 9, chunk(b"iTXt", b"a\0\1\0\0\0" + BOMB)),
    "iCCP of 1 GiB": blank_png(9, 9, chunk(b"iCCP", b"a\0\0" + BOMB)),
    "IDAT of 1 GiB": png_of(BOMB),
}
FOREIGN = {
    "TIFF": save("TIFF"),
    "JPEG 2000": save("JPEG2000"),
    "AVIF": save("AVIF"),
    "BMP": save("BMP"),
    "EXR": b"\x76\x2f\x31\x01\x02\0\0\0" + bytes(999),
    "PPM": encode(".ppm"),
    "PFM": encode(".pfm", pixels().astype(np.float32) / 255),
    "HDR": encode(".hdr", pixels().astype(np.float32) / 255),
    "Sun raster": encode(".sr"),
    "PSD": b"8BPS\0\1" + bytes(999),
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
    "PDF": save("PDF"),
    "HTML": b"<!DOCTYPE html><script>alert(1)</script>",
    "ICO": save("ICO", UPRIGHT.resize((32, 32))),
    "a byte": b"\xff",
    "text": b"photo",
}
OVER_THE_LIMIT = "megapixels; the limit is 50 (--max-megapixels)"
DAMAGED = "The photo is damaged or cut short."
BAD_PHOTOS = {
    "JPEG of 20,000 x 20,000": (lying_jpeg(20_000, 20_000), "400.0 " + OVER_THE_LIMIT),
    "JPEG of 65,535 x 65,535": (lying_jpeg(65_535, 65_535), "4294.8 " + OVER_THE_LIMIT),
    "JPEG of 0 x 0": (lying_jpeg(0, 0), DAMAGED),
    "PNG of 20,000 x 20,000": (png(20_000, 20_000), "400.0 " + OVER_THE_LIMIT),
    "PNG of 65,535 x 65,535": (png(65_535, 65_535), "4294.8 " + OVER_THE_LIMIT),
    "PNG of 2^31 x 2^31": (png(2**31, 2**31), OVER_THE_LIMIT),
    "PNG of 0 x 0": (png(0, 0), "The photo"),
    "PNG of 7,000 x 7,000 without data": (png(7000, 7000), DAMAGED),
    "PNG of 400 megapixels in 49 KB": (blank_png(20_000, 20_000), "400.0 " + OVER_THE_LIMIT),
    "WebP of 20,000 x 20,000": (lying_webp(20_000, 20_000), "400.0 " + OVER_THE_LIMIT),
    "WebP of 65,535 x 65,535": (lying_webp(65_535, 65_535), "4294.8 " + OVER_THE_LIMIT),
    "WebP of 7,000 x 7,000 with the data of 512 x 512": (lying_webp(7000, 7000), DAMAGED),
    "GIF of 20,000 x 20,000": (lying_gif(20_000, 20_000), "400.0 " + OVER_THE_LIMIT),
    "GIF of 65,535 x 65,535": (lying_gif(65_535, 65_535), "4294.8 " + OVER_THE_LIMIT),
    "70,000 x 1": (blank_png(70_000, 1), "70000 x 1 pixels; a JPEG has at most 65500 a side"),
    "1 x 70,000": (blank_png(1, 70_000), "1 x 70000 pixels; a JPEG has at most 65500 a side"),
    "JPEG of a million fill bytes": (b"\xff\xd8" + b"\xff" * 10**6, "The photo"),
    "JPEG of a million restart markers": (b"\xff\xd8" + b"\xff\xd0" * 10**6, "The photo has no frame header"),
    "JPEG of a million empty segments": (b"\xff\xd8" + b"\xff\xe0\0\2" * 10**6, "The photo has no frame header"),
    "JPEG of a million segments of no length": (b"\xff\xd8" + b"\xff\xe0\0\0" * 10**6, "The photo"),
    "JPEG of 300,000 scans": (jpeg_of_scans(512, 300_000), "The photo has over 500 scans."),
    "JPEG without a frame": (b"\xff\xd8\xff\xda\0\2", "The photo has no frame header"),
}


@pytest.mark.parametrize("kind", KINDS)
async def test_photo_of_each_kind(server: Server, kind: str) -> None:
    answer = await ask(server, post(KINDS[kind]))
    assert answer.says(201)
    meta = json.loads(answer.body)
    assert (meta["width"], meta["height"], len(meta["faces"])) == (512, 512, 1)
    jpeg = (await ask(server, get(f"/image/{meta['id']}"))).body
    assert b"alert" not in jpeg
    assert abs(cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR).mean() - pixels().mean()) < 4


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 20_000), (20_000, 1), (65_500, 1), (1, 65_500)])
async def test_photo_of_odd_size(server: Server, width: int, height: int) -> None:
    answer = await ask(server, post(blank_png(width, height)))
    assert answer.says(201)
    assert (json.loads(answer.body)["width"], json.loads(answer.body)["height"]) == (width, height)


async def test_jpeg_of_500_scans(server: Server) -> None:
    assert (await ask(server, post(jpeg_of_scans(512, 500)))).says(201)


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8, 99])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
async def test_exif_turns_upright_and_stays_inside(server: Server, kind: str, orientation: int) -> None:
    photo = with_exif(kind, orientation)
    assert b"GPSGPSGPS" in photo
    answer = await ask(server, post(photo))
    assert answer.says(201)
    meta = json.loads(answer.body)
    assert (meta["width"], meta["height"]) == ((512, 340) if 5 <= orientation <= 8 else (340, 512))
    jpeg = (await ask(server, get(f"/image/{meta['id']}"))).body
    assert b"GPSGPSGPS" not in jpeg and b"Exif" not in jpeg


@pytest.mark.parametrize("share", [0.0001, 0.001, 0.01, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("kind", FORMATS)
async def test_truncated_photo(server: Server, kind: str, share: float) -> None:
    photo = FORMATS[kind][: max(16, int(len(FORMATS[kind]) * share))]
    assert (await ask(server, post(photo))).says(422, "The photo ")


@pytest.mark.parametrize("kind", FORMATS)
async def test_corrupt_photo(server: Server, kind: str) -> None:
    answer = await ask(server, post(corrupt(FORMATS[kind])))
    assert answer.status == 201 or answer.says(422, DAMAGED)  # most decoders show what they can


@pytest.mark.parametrize("kind", BAD_PHOTOS)
async def test_bad_photo(server: Server, kind: str) -> None:
    photo, detail = BAD_PHOTOS[kind]
    assert (await ask(server, post(photo))).says(422, detail)


@pytest.mark.parametrize("kind", FOREIGN)
async def test_foreign_format_under_a_jpeg_name(server: Server, kind: str) -> None:
    body, content_type = form(FOREIGN[kind], 'filename="photo.jpg"\r\nContent-Type: image/jpeg')
    assert (await ask(server, post(body, content_type))).says(415, "This is no JPEG, PNG, WebP or GIF.")


async def test_heic_is_told_what_to_do(server: Server) -> None:
    assert (await ask(server, post(b"\0\0\0\x18ftypheic" + bytes(999)))).says(415, "export it as JPEG")


# --- 2. HTTP and forms ---


PHOTO = blank_png(9, 9)


def form(photo: bytes = PHOTO, disposition: str = 'filename="a.jpg"', boundary: str = "b") -> tuple[bytes, str]:
    """A form with one file, and the header line that goes with it."""
    part = f"--{boundary}\r\nContent-Disposition: form-data; name=image; {disposition}\r\n\r\n"
    body = part.encode(errors="surrogateescape") + photo + f"\r\n--{boundary}--\r\n".encode()
    return body, f"Content-Type: multipart/form-data; boundary={boundary}"


FORM, FORM_TYPE = form()
MALFORMED = "The form is malformed (RFC 7578), or has over"
NO_FILE = "There is no file in the form."
START = b"--b\r\nContent-Disposition: form-data; name=image; filename=a.jpg\r\n"
END = b"\r\n\r\n" + PHOTO + b"\r\n--b--\r\n"


def multipart(parameters: str) -> str:
    return f"Content-Type: multipart/form-data{parameters}"


FORMS = {
    "as it should be": (FORM_TYPE, FORM, 201, '"a.jpg"'),
    "quoted boundary": (multipart('; boundary="b"'), FORM, 201, ""),
    "boundary of all that it may have": (
        multipart('; boundary="\'()+_,-./:=? b"'),
        FORM.replace(b"--b", b"--'()+_,-./:=? b"),
        201,
        "",
    ),
    "boundary after other parameters": (multipart("; charset=utf-8; boundary=b"), FORM, 201, ""),
    "extended boundary": (multipart("; boundary*=utf-8''b"), FORM, 400, MALFORMED),
    "extended boundary of no charset": (multipart("; boundary*=nope''b"), FORM, 400, MALFORMED),
    "extended boundary of bad bytes": (multipart("; boundary*=utf-8''%ff"), FORM, 400, MALFORMED),
    "boundary in pieces": (multipart("; boundary*0=b; boundary*1=c"), FORM, 400, MALFORMED),
    "boundary in many pieces": (multipart(f"; boundary*{'9' * 5000}=b"), FORM, 400, MALFORMED),
    "two boundaries": (multipart("; boundary=b; boundary=c"), FORM, 201, ""),
    "no boundary": (multipart(""), FORM, 400, MALFORMED),
    "no boundary, but its name": (multipart("; boundary"), FORM, 400, MALFORMED),
    "empty boundary": (multipart("; boundary="), FORM, 400, MALFORMED),
    "empty quoted boundary": (multipart('; boundary=""'), FORM, 400, MALFORMED),
    "wrong boundary": (multipart("; boundary=c"), FORM, 400, MALFORMED),
    "boundary of 7 KB": (multipart("; boundary=" + "b" * 7000), FORM, 400, MALFORMED),
    "boundary of 7 KB, used": (*form(boundary="b" * 7000)[::-1], 201, ""),
    "boundary of 9 KB": (*form(boundary="b" * 9000)[::-1], 400, ""),
    "boundary that is no ASCII": (multipart("; boundary=é"), FORM, 400, MALFORMED),
    "boundary that is no text": (multipart("; boundary=\udcff"), FORM, 400, MALFORMED),
    "boundary that is half a text": (multipart("; boundary=é\udcff"), FORM, 400, MALFORMED),
    "no part": (FORM_TYPE, b"", 400, MALFORMED),
    "nothing but an end": (FORM_TYPE, b"--b--\r\n", 400, NO_FILE),
    "no end": (FORM_TYPE, FORM.replace(b"--b--", b""), 400, MALFORMED),
    "end cut short": (FORM_TYPE, FORM.replace(b"--b--\r\n", b"--b-"), 400, MALFORMED),
    "no line break before the end": (FORM_TYPE, FORM.replace(b"\r\n--b--", b"--b--"), 400, MALFORMED),
    "line feeds alone": (FORM_TYPE, FORM.replace(b"\r\n", b"\n"), 400, MALFORMED),
    "carriage returns alone": (FORM_TYPE, FORM.replace(b"\r\n", b"\r"), 400, MALFORMED),
    "no headers": (FORM_TYPE, b"--b" + END, 400, NO_FILE),
    "no headers, nor their end": (FORM_TYPE, b"--b\r\n--b--\r\n", 400, MALFORMED),
    "no end of headers": (FORM_TYPE, START + b"--b--\r\n", 400, MALFORMED),
    "headers of noise": (FORM_TYPE, b"--b\r\n\x8f\x12\xe3 noise" + END, 400, MALFORMED),
    "header without a colon": (FORM_TYPE, START + b"noise" + END, 400, MALFORMED),
    "header without a name": (FORM_TYPE, START + b": noise" + END, 400, MALFORMED),
    "NUL in a header": (FORM_TYPE, START + b"A: \0" + END, 400, MALFORMED),
    "NUL in the filename": (*form(disposition='filename="a\0b"')[::-1], 400, MALFORMED),
    "line feed in the filename": (*form(disposition='filename="a\nb"')[::-1], 400, MALFORMED),
    "filename in two lines": (*form(disposition='filename="a\r\n b"')[::-1], 400, MALFORMED),
    "20 KB in a header": (FORM_TYPE, START + b"A: " + b"a" * 20_000 + END, 400, MALFORMED),
    "500 headers": (FORM_TYPE, START + b"A: a\r\n" * 500 + END[2:], 400, MALFORMED),
    "a million headers": (FORM_TYPE, START + b"A: a\r\n" * 10**6 + END[2:], 400, MALFORMED),
    "a million semicolons": (*form(disposition=";" * 10**6)[::-1], 400, MALFORMED),
    "999 parts with 7,000 semicolons each": (
        FORM_TYPE,
        (b'--b\r\nContent-Disposition: form-data; a="' + b";" * 7000 + b"\r\n\r\n\r\n") * 998 + FORM,
        201,
        "",
    ),
    "2,000 fields": (
        FORM_TYPE,
        b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\na\r\n' * 2000 + FORM,
        400,
        MALFORMED,
    ),
    "50 fields": (FORM_TYPE, b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\na\r\n' * 50 + FORM, 201, ""),
    "nested": (
        FORM_TYPE,
        b"--b\r\nContent-Type: multipart/mixed; boundary=cc\r\n\r\n" + FORM.replace(b"--b", b"--cc") + b"\r\n--b--\r\n",
        400,
        NO_FILE,
    ),
    "base64": (FORM_TYPE, START + b"Content-Transfer-Encoding: base64" + END, 400, "send it as it is"),
    "unknown transfer encoding": (FORM_TYPE, START + b"Content-Transfer-Encoding: x" + END, 400, "send it as it is"),
    "binary": (FORM_TYPE, START + b"Content-Transfer-Encoding: BINARY" + END, 201, ""),
    "content encoding in a part": (FORM_TYPE, START + b"Content-Encoding: gzip" + END, 201, ""),
    "_charset_": (
        FORM_TYPE,
        b'--b\r\nContent-Disposition: form-data; name="_charset_"\r\n\r\nnope\r\n' + FORM,
        201,
        "",
    ),
    "lying length in a part": (FORM_TYPE, START + b"Content-Length: 99999999999" + END, 201, ""),
    "negative length in a part": (FORM_TYPE, START + b"Content-Length: -1" + END, 201, ""),
    "empty file": (*form(b"")[::-1], 400, "There is no photo, only an empty file or body."),
    "no file chosen": (*form(b"", 'filename=""')[::-1], 400, NO_FILE),
    "field, no file": (*form(disposition="a=b")[::-1], 400, NO_FILE),
    "two files": (FORM_TYPE, FORM.replace(b"--b--\r\n", b"") + FORM, 201, ""),
    "preamble": (FORM_TYPE, b"noise\r\n" * 999 + FORM, 201, ""),
    "epilogue": (FORM_TYPE, FORM + b"noise" * 999, 201, ""),
    "epilogue that is a form": (FORM_TYPE, FORM + START + b"noise", 201, ""),
    "multipart/mixed": ("Content-Type: multipart/mixed; boundary=b", FORM, 201, ""),
    "photo that says it is a form": (FORM_TYPE, PHOTO, 400, MALFORMED),
    "form that says it is a photo": ("Content-Type: image/jpeg", FORM, 415, "This is no JPEG"),
    "form in fields": ("Content-Type: application/x-www-form-urlencoded", b"image=a", 415, "This is no JPEG"),
}


@pytest.mark.parametrize("kind", FORMS)
async def test_form(server: Server, kind: str) -> None:
    content_type, body, status, detail = FORMS[kind]
    assert (await ask(server, post(body, content_type))).says(status, detail)


@pytest.mark.parametrize(
    ("disposition", "filename"),
    [
        ('filename="a b.jpg"', "a b.jpg"),
        ("filename=a.jpg", "a.jpg"),
        ('FileName="a.jpg"', "a.jpg"),
        ('filename="новый год.jpg"', "новый год.jpg"),
        ('filename="a\udcffb"', "a\ufffdb"),
        ('filename="..\\..\\etc/passwd"', "..\\..\\etc/passwd"),
        ('filename="a;b.jpg"', "a;b.jpg"),
        ('filename="<script>"', "<script>"),
        ('filename="\x1b[31m"', "\x1b[31m"),
        (f'filename="{"a" * 4000}"', "a" * 255),
        ("filename=\"a\"; filename*=utf-8''b", "a"),
        ("filename=a; filename*=nope''b", "a"),
        ("filename=a; filename*=undefined''%ff", "a"),
        ("filename=a; filename*=idna''%ff%ff", "a"),
        ("filename=a; filename*=unicode_escape''%5cud800", "a"),
        ("filename=a; filename*=b; filename*0=c", "a"),
        (f"filename=a; filename*{'9' * 5000}=c", "a"),
    ],
)
async def test_filename(server: Server, disposition: str, filename: str) -> None:
    body, content_type = form(disposition=disposition)
    answer = await ask(server, post(body, content_type))
    assert answer.says(201)
    assert json.loads(answer.body)["filename"] == filename
    log = server.log.read_text().splitlines()[-1]
    assert log.isprintable() and "9 x 9 px, 0 faces" in log


GZIP_BOMB = gzip.compress(bytes(21 * MIB))
TOO_LARGE = "The body is over 20 MiB (--max-mb)."
ENDLESS = b"a" * (20 * MIB + 1)
BODIES = {
    "nothing": (post(b""), 400, "There is no photo, only an empty file or body."),
    "no length": (head(), 400, "There is no photo, only an empty file or body."),
    "chunked": (head("Transfer-Encoding: chunked") + chunked(PHOTO), 201, ""),
    "chunked, a byte each": (head("Transfer-Encoding: chunked") + chunked(PHOTO, 1), 201, ""),
    "chunked in a form": (head(FORM_TYPE, "Transfer-Encoding: chunked") + chunked(FORM, 1), 201, ""),
    "chunked, with extensions and trailers": (
        head("Transfer-Encoding: chunked") + b"%x;a=b\r\n%b\r\n0\r\nA: b\r\n\r\n" % (len(PHOTO), PHOTO),
        201,
        "",
    ),
    "chunk of no size": (head("Transfer-Encoding: chunked") + b"\r\n\r\n", 400, ""),
    "chunk of size zz": (head("Transfer-Encoding: chunked") + b"zz\r\n\r\n", 400, ""),
    "chunk of size -1": (head("Transfer-Encoding: chunked") + b"-1\r\n\r\n", 400, ""),
    "chunk of size 0x5": (head("Transfer-Encoding: chunked") + b"0x5\r\nabcde\r\n0\r\n\r\n", 400, ""),
    "chunk of size 2^64": (head("Transfer-Encoding: chunked") + b"10000000000000000\r\n", 400, ""),
    "chunk longer than its size": (head("Transfer-Encoding: chunked") + b"1\r\nabc\r\n0\r\n\r\n", 400, ""),
    "chunk, then noise": (head("Transfer-Encoding: chunked") + b"1\r\na\r\nnoise\r\n", 400, ""),
    "chunk extension without end": (
        head("Transfer-Encoding: chunked") + b"1;" + b"a" * MIB,
        408,
        "The upload took over 3 s",
    ),
    "length over the limit": (head(f"Content-Length: {20 * MIB + 1}"), 413, TOO_LARGE),
    "length of 10^18": (head(f"Content-Length: {10**18}"), 413, TOO_LARGE),
    "length of 10^30": (head(f"Content-Length: {10**30}"), 400, ""),
    "length -1": (head("Content-Length: -1"), 400, ""),
    "length +1": (head("Content-Length: +1") + b"a", 400, ""),
    "length 1e3": (head("Content-Length: 1e3"), 400, ""),
    "length 1, 1": (head("Content-Length: 1, 1") + b"a", 400, ""),
    "length none": (head("Content-Length:") + b"a", 400, ""),
    "length twice": (head("Content-Length: 1", "Content-Length: 1") + b"a", 400, ""),
    "lengths that differ": (head("Content-Length: 1", "Content-Length: 2") + b"aa", 400, ""),
    "length and chunked": (head("Content-Length: 1", "Transfer-Encoding: chunked") + chunked(b"a"), 400, ""),
    "chunked twice": (head("Transfer-Encoding: chunked, chunked") + chunked(PHOTO), 400, ""),
    "chunked, not last": (head("Transfer-Encoding: chunked, gzip") + chunked(PHOTO), 400, ""),
    "unknown transfer encoding": (head("Transfer-Encoding: nope") + PHOTO, 400, ""),
    "chunked past the limit": (head("Transfer-Encoding: chunked") + chunked(ENDLESS), 413, TOO_LARGE),
    "form past the limit": (head(FORM_TYPE, "Transfer-Encoding: chunked") + chunked(START + ENDLESS), 413, TOO_LARGE),
    "endless preamble": (head(FORM_TYPE, "Transfer-Encoding: chunked") + chunked(ENDLESS), 413, TOO_LARGE),
    "gzip": (post(gzip.compress(PHOTO), "Content-Encoding: gzip"), 201, ""),
    "gzip bomb": (post(GZIP_BOMB, "Content-Encoding: gzip"), 413, TOO_LARGE),
    "gzip bomb of 1 GiB": (post(zeros(1024 * MIB), "Content-Encoding: deflate"), 413, TOO_LARGE),
    "gzip bomb, chunked, in a form": (
        head(FORM_TYPE, "Content-Encoding: gzip", "Transfer-Encoding: chunked") + chunked(GZIP_BOMB),
        413,
        TOO_LARGE,
    ),
    "deflate": (post(zlib.compress(PHOTO), "Content-Encoding: deflate"), 201, ""),
    "gzip that is none": (post(PHOTO, "Content-Encoding: gzip"), 400, "The body is malformed"),
    "gzip cut short": (post(gzip.compress(PHOTO)[:-20], "Content-Encoding: gzip"), 422, DAMAGED),
    "deflate that is none": (post(PHOTO, "Content-Encoding: deflate"), 400, "The body is malformed"),
    "br that is none": (post(PHOTO, "Content-Encoding: br"), 201, ""),
    "two content encodings": (post(PHOTO, "Content-Encoding: gzip, gzip"), 201, ""),
    "unknown content encoding": (post(PHOTO, "Content-Encoding: nope"), 201, ""),
    "expectation": (post(PHOTO, "Expect: 100-continue"), 201, ""),
    "unknown method": (post(PHOTO).replace(b"POST", b"BREW"), 400, "Invalid method"),
    "put": (post(PHOTO).replace(b"POST", b"PUT"), 201, ""),
    "async": (post(PHOTO, "Prefer: handling=lenient, respond-async"), 202, ""),
    "another preference": (post(PHOTO, "Prefer: x-respond-async"), 201, ""),
}


@pytest.mark.parametrize("kind", BODIES)
async def test_body(server: Server, kind: str) -> None:
    request, status, detail = BODIES[kind]
    assert (await ask(server, request)).says(status, detail)


ID = "0b4a8a3c-5a3c-4d3b-8c3e-3f2a1b0c9d8e"
LINES = "a: b\r\n"
HEADS = {
    "nothing but a line": (b"\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", 200, ""),
    "noise": (b"\x8f\x12\xe3\r\n\r\n", 400, ""),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, ""),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, ""),
    "HTTP/0.9": (b"GET /\r\n\r\n", 400, ""),
    "HTTP/1.0 with a Host": (b"GET / HTTP/1.0\r\nHost: a\r\n\r\n", 200, ""),
    "HTTP/1.0 without": (b"GET / HTTP/1.0\r\n\r\n", 400, "one Host header"),
    "HTTP/9.9": (b"GET / HTTP/9.9\r\nHost: a\r\n\r\n", 400, ""),
    "lower case": (b"get / http/1.1\r\nHost: a\r\n\r\n", 400, ""),
    "line of 9 KB": (get("/" + "a" * 9000), 400, ""),
    "line without end": (b"GET /" + b"a" * MIB, 400, ""),
    "header of 9 KB": (get("/", "A: " + "a" * 9000), 400, ""),
    "header without end": (b"GET / HTTP/1.1\r\nA: " + b"a" * MIB, 400, ""),
    "500 headers": (get("/", *["A: a"] * 500), 400, ""),
    "header without a colon": (get("/", "A"), 400, ""),
    "header without a name": (get("/", ": a"), 400, ""),
    "header with a space": (get("/", "A : a"), 400, ""),
    "header in two lines": (get("/", "A: a", " b"), 400, ""),
    "NUL in a header": (get("/", "A: \0"), 400, ""),
    "carriage return in a header": (get("/", "A: \r b"), 400, ""),
    "no Host": (b"GET / HTTP/1.1\r\n\r\n", 400, "Missing 'Host' header"),
    "empty Host": (get("/", host=""), 400, "one Host header"),
    "two Hosts": (get("/", "Host: faces.test"), 400, "Host"),
    "foreign Host": (get("/", host="evil.test"), 200, "http://evil.test/image"),
    "IPv6 Host": (get("/", host="[::1]:80"), 200, "http://[::1]:80/image"),
    "script in the Host": (get("/", host="<script>alert(1)</script>"), 400, "one Host header"),
    "space in the Host": (get("/", host="a b"), 400, "one Host header"),
    "user in the Host": (get("/", host="a@b"), 400, "one Host header"),
    "path in the Host": (get("/", host="a/b"), 400, "one Host header"),
    "query in the Host": (get("/", host="a?b"), 400, "one Host header"),
    "Host that is no ASCII": (get("/", host="é"), 400, "one Host header"),
    "Host that is no text": (get("/", host="\udcff"), 400, "one Host header"),
    "colon in the Host": (get("/", host="a:b:80"), 400, "one Host header"),
    "bracket in the Host": (get("/", host="[a"), 400, "one Host header"),
    "no port": (get("/", host="a:"), 400, "one Host header"),
    "port x": (get("/", host="a:x"), 400, "one Host header"),
    "port 99999, which only its sender sees": (get("/", host="a:99999"), 200, "http://a:99999/image"),
    "port -1": (get("/", host="a:-1"), 400, "one Host header"),
    "absolute target": (get("http://faces.test/health"), 200, "ok"),
    "absolute target of another host": (get("http://evil.test/"), 200, "http://faces.test/image"),
    "absolute target of port 99999": (get("http://a:99999/"), 400, ""),
    "absolute target of no host": (get("http:///"), 400, ""),
    "absolute target of a broken host": (get("http://[a/"), 400, ""),
    "CONNECT": (b"CONNECT evil.test:443 HTTP/1.1\r\nHost: faces.test\r\n\r\n", 404, ""),
    "OPTIONS *": (b"OPTIONS * HTTP/1.1\r\nHost: faces.test\r\n\r\n", 404, ""),
    "TRACE": (b"TRACE / HTTP/1.1\r\nHost: faces.test\r\n\r\n", 405, ""),
    "DELETE": (b"DELETE /image HTTP/1.1\r\nHost: faces.test\r\n\r\n", 405, ""),
    "own Origin": (get("/", "Origin: http://faces.test"), 200, ""),
    "own Origin, by a proxy": (get("/", "Origin: https://FACES.test:443"), 200, ""),
    "foreign Origin": (get("/", "Origin: http://evil.test"), 403, "A page of http://evil.test may not use"),
    "longer Origin": (get("/", "Origin: http://faces.test.evil.test"), 403, "may not use"),
    "Origin of another port": (get("/", "Origin: http://faces.test:81"), 403, "may not use"),
    "Origin null": (get("/", "Origin: null"), 403, "A page of null may not use"),
    "empty Origin": (get("/", "Origin:"), 403, "may not use"),
    "Origin without a scheme": (get("/", "Origin: faces.test"), 403, "may not use"),
    "Origin with a user": (get("/", "Origin: http://faces.test@evil.test"), 403, "may not use"),
    "Origin with a script": (get("/", "Origin: <script>"), 403, "may not use"),
    "Origin that is no text": (get("/", "Origin: http://\udcff"), 403, "may not use"),
    "parent": (get("/image/../health"), 404, ""),
    "encoded parent": (get("/image/%2e%2e/%2e%2e/etc/passwd"), 404, ""),
    "two slashes": (get("//health"), 404, ""),
    "slash at the end": (get("/health/"), 404, ""),
    "encoded letter": (get("/%68ealth"), 200, "ok"),
    "query": (get("/health?a=%ff&b=%00"), 200, "ok"),
    "bad percent": (get("/%zz"), 404, ""),
    "NUL": (get("/%00"), 404, ""),
    "NUL, not encoded": (get("/\0"), 400, ""),
    "path that is no text": (get("/\udcff"), 400, ""),
    "path of another language": (get("/é"), 400, ""),
    "header in the path": (get("/%0d%0aA:%20b"), 404, ""),
    "id that is not kept": (get(f"/image/{ID}"), 404, "There is no such image; the last 100 are kept"),
    "id in capitals": (get(f"/image/{ID.upper()}"), 404, "There is no such image"),
    "id in braces": (get(f"/image/%7B{ID}%7D"), 404, ""),
    "id without dashes": (get(f"/image/{ID.replace('-', '')}"), 404, "There is no such image"),
    "id that is none": (get("/image/1"), 404, "There is no such image"),
    "id of NUL": (get("/image/%00"), 404, "There is no such image"),
    "id of a parent": (get("/image/%2e%2e%2fhealth"), 404, "There is no such image"),
    "id with a header": (get("/image/%0d%0aA:%20b"), 404, "There is no such image"),
    "id of 8 KB": (get("/image/" + "a" * 8000), 404, "There is no such image"),
    "no id": (get("/image/"), 404, ""),
    "range": (get("/health", "Range: bytes=0-1"), 200, "ok"),
    "conditional": (get("/health", "If-None-Match: *", "If-Modified-Since: nope"), 200, "ok"),
    "no websocket": (get("/faces"), 426, "wscat -c ws://faces.test/faces"),
    "websocket upgrade elsewhere": (get("/health", "Connection: Upgrade", "Upgrade: websocket"), 200, "ok"),
    "unknown upgrade": (get("/health", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c"), 200, "ok"),
}


@pytest.mark.parametrize("kind", HEADS)
async def test_request(server: Server, kind: str) -> None:
    request, status, detail = HEADS[kind]
    assert (await ask(server, request)).says(status, detail)


async def test_two_requests_in_one_packet(server: Server) -> None:
    async with connect(server) as client:
        await client.send(post(PHOTO) + get("/health"))
        assert (await client.answer()).says(201)
        assert (await client.answer()).says(200)


async def test_a_thousand_requests_in_one_packet(server: Server) -> None:
    async with connect(server) as client:
        await client.send(get("/health") * 1000)
        for _ in range(1000):
            assert (await client.answer()).says(200)


async def test_smuggled_request_is_none(server: Server) -> None:
    """What follows a request that is malformed is not read."""
    async with connect(server) as client:
        await client.send(head("Content-Length: 4", "Transfer-Encoding: chunked") + b"0\r\n\r\n" + get("/health"))
        assert (await client.answer()).says(400)
        assert await client.end() == b""


async def test_photo_of_a_half_closed_connection_is_announced(server: Server) -> None:
    """Whether it gets an answer is a matter of luck (aio-libs/aiohttp#3659)."""
    async with watch(server) as watcher, connect(server) as client:
        await client.send(post(PHOTO))
        client.writer.write_eof()
        assert (await client.end()).partition(b"\r\n")[0] in (b"", b"HTTP/1.1 201 Created")
        assert (await watcher.frame())[0] == TEXT


@pytest.mark.parametrize(
    "request_line", [b"", b"GET / HT", head("Content-Length: 9") + b"a", head("Transfer-Encoding: chunked") + b"9\r\na"]
)
async def test_request_cut_short_is_closed(server: Server, request_line: bytes) -> None:
    async with connect(server) as client:
        await client.send(request_line)
        client.writer.write_eof()
        async with asyncio.timeout(2):  # before the time for an upload is over
            await client.end()
        await until(server, queued=0)


@pytest.mark.parametrize(
    "request_line", [head("Content-Length: 99999"), head("Transfer-Encoding: chunked"), post(ASTRONAUT), get("/health")]
)
async def test_reset_connection(server: Server, request_line: bytes) -> None:
    for _ in range(20):
        async with connect(server) as client:
            await client.send(request_line + b"9\r\n")
            client.reset()


async def test_upload_of_a_byte_a_second(server: Server) -> None:
    async with connect(server) as slow:
        await slow.send(head("Content-Length: 99"))
        for _ in range(2):
            await slow.send(b"a")
            await asyncio.sleep(1)
            assert (await ask(server, post(PHOTO))).says(201)
        assert (await slow.answer()).says(408, "The upload took over 3 s (--upload-timeout).")


async def test_header_of_a_byte_a_second(server: Server) -> None:
    async with connect(server) as slow:
        for byte in b"GET":
            await slow.send(bytes([byte]))
            await asyncio.sleep(1)
        async with asyncio.timeout(3):
            assert await slow.end() == b""


# --- 3. Watchers ---


def upgrade(query: str = "", *lines: str) -> bytes:
    key = base64.b64encode(os.urandom(16)).decode()
    ask_for = "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", f"Sec-WebSocket-Key: {key}"
    return get(f"/faces{query}", *ask_for, *lines)


@contextlib.asynccontextmanager
async def watch(server: Server, query: str = "", receive_buffer: int | None = None) -> AsyncIterator[Client]:
    async with connect(server, receive_buffer) as client:
        await client.send(upgrade(query))
        assert (await client.answer()).status == 101
        yield client


def frame(opcode: int, payload: bytes = b"", final: bool = True, reserved: int = 0, mask: bool = True) -> bytes:
    """A websocket frame (RFC 6455, 5.2), masked with zeros."""
    first = final << 7 | reserved << 4 | opcode
    size = len(payload)
    length = bytes([mask << 7 | min(size, 126)]) + (struct.pack(">H", size) if 125 < size < 2**16 else b"")
    if size > 0xFFFF:
        length = bytes([mask << 7 | 127]) + struct.pack(">Q", size)
    return bytes([first]) + length + bytes(4 * mask) + payload


TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
FRAMES = {
    "1 MB": (frame(TEXT, b"a" * 10**6), 1009),
    "1 KiB and a byte": (frame(TEXT, b"a" * 1025), 1009),
    "2^62": (b"\x81\xff" + struct.pack(">Q", 2**62) + bytes(4), 1009),
    "2^64 - 1": (b"\x81\xff" + struct.pack(">Q", 2**64 - 1) + bytes(4), 1009),
    "1 MB in 10,000 fragments": (frame(TEXT, b"", False) + frame(0, b"a" * 100, False) * 10_000, 1009),
    "bad UTF-8": (frame(TEXT, b"\xff"), 1007),
    "bad UTF-8 in fragments": (frame(TEXT, b"\xc3", False) + frame(0, b"("), 1007),
    "RSV1": (frame(TEXT, b"a", reserved=4), 1002),
    "RSV2": (frame(TEXT, b"a", reserved=2), 1002),
    "RSV3": (frame(TEXT, b"a", reserved=1), 1002),
    "unknown opcode": (frame(3), 1002),
    "unknown control opcode": (frame(11), 1002),
    "fragmented ping": (frame(PING, b"", False), 1002),
    "ping of 126 bytes": (frame(PING, bytes(126)), 1002),
    "continuation of nothing": (frame(0, b"a"), 1002),
    "message in a message": (frame(TEXT, b"a", False) + frame(TEXT, b"a"), 1002),
    "close of 1 byte": (frame(CLOSE, b"a"), 1002),
    "close with code 999": (frame(CLOSE, struct.pack(">H", 999)), 1002),
    "close with bad UTF-8": (frame(CLOSE, struct.pack(">H", 1000) + b"\xff"), 1007),
    "close": (frame(CLOSE, struct.pack(">H", 1000)), 1000),
    "close without a code": (frame(CLOSE), 1000),
    "HTTP": (get("/health"), 1002),
}


@pytest.mark.parametrize("kind", FRAMES)
async def test_frame(server: Server, kind: str) -> None:
    data, code = FRAMES[kind]
    async with watch(server) as good, watch(server) as bad:
        bad.writer.write(data)
        with contextlib.suppress(ConnectionResetError if len(data) > 10**6 else ()):  # it was still sending
            opcode, payload = await bad.frame()
            assert (opcode, struct.unpack(">H", payload[:2])[0]) == (CLOSE, code)
            await bad.send(frame(CLOSE, struct.pack(">H", code)))
            assert await bad.end() == b""
        await until(server, clients=1)
        answer = await ask(server, post(PHOTO))
        assert await good.frame() == (TEXT, answer.headers["Location"].encode())


@pytest.mark.parametrize(
    "data", [frame(TEXT, b"a" * 1024), frame(BINARY, b"\xff"), frame(PONG), frame(TEXT, b"a", False) + frame(0, b"b")]
)
async def test_frame_that_is_ignored(server: Server, data: bytes) -> None:
    async with watch(server) as watcher:
        await watcher.send(data + frame(PING, b"still there?"))
        assert await watcher.frame() == (PONG, b"still there?")


async def test_a_hundred_thousand_pings(server: Server) -> None:
    async with watch(server) as good, watch(server, receive_buffer=4096) as bad:
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(2):
                for _ in range(1000):
                    await bad.send(frame(PING, bytes(125)) * 100)
        start = time.monotonic()
        answer = await ask(server, post(PHOTO))
        assert await good.frame() == (TEXT, answer.headers["Location"].encode())
        assert time.monotonic() - start < 2


HANDSHAKES = {
    "no key": (upgrade().replace(b"Sec-WebSocket-Key", b"X"), 426),
    "bad key": (upgrade().replace(b"Sec-WebSocket-Key: ", b"Sec-WebSocket-Key: AAAA"), 426),
    "version 99": (upgrade().replace(b"Version: 13", b"Version: 99"), 426),
    "unknown format": (upgrade("?format=xml"), 400),
    "foreign Origin": (upgrade("", "Origin: http://evil.test"), 403),
    "Origin null": (upgrade("", "Origin: null"), 403),
    "no Host": (upgrade().replace(b"Host: faces.test\r\n", b""), 400),
    "HEAD": (upgrade().replace(b"GET", b"HEAD"), 405),
    "POST": (upgrade().replace(b"GET", b"POST"), 405),
}


@pytest.mark.parametrize("kind", HANDSHAKES)
async def test_handshake(server: Server, kind: str) -> None:
    request, status = HANDSHAKES[kind]
    async with connect(server) as client:
        await client.send(request)
        assert (await client.answer(head=request.startswith(b"HEAD"))).status == status


async def test_watchers_reset_in_mid_broadcast(server: Server) -> None:
    async with contextlib.AsyncExitStack() as stack:
        good = await stack.enter_async_context(watch(server))
        urls = []
        for _ in range(10):
            bad = [await stack.enter_async_context(watch(server)) for _ in range(5)]
            posting = asyncio.create_task(ask(server, post(PHOTO)))
            for each in bad:
                each.reset()
            urls.append((await posting).headers["Location"].encode())
        assert [await good.frame() for _ in urls] == [(TEXT, url) for url in urls]


async def test_fifty_watchers_that_never_read(start_server: StartServer) -> None:
    server = await start_server()
    body, content_type = form(disposition=f'filename="{"a" * 255}"')

    async def time_of(posts: int) -> float:
        start = time.monotonic()
        for _ in range(posts):
            assert (
                json.loads((await ask(server, post(body, content_type))).body)["id"] in (await good.frame())[1].decode()
            )
        return (time.monotonic() - start) / posts

    async with contextlib.AsyncExitStack() as stack:
        good = await stack.enter_async_context(watch(server))
        alone = await time_of(100)
        for _ in range(50):
            await stack.enter_async_context(watch(server, "?format=json", receive_buffer=2048))
        await until(server, clients=51)
        with_deaf = await time_of(400)
        assert (await health(server))["clients"] == 1
        assert with_deaf < 2 * alone + 0.01, (with_deaf, alone)


async def test_more_watchers_than_there_may_be(start_server: StartServer) -> None:
    """Also where a process may open but 1,024 files, unless it asks for more."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    server = await start_server()
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    async with contextlib.AsyncExitStack() as stack:
        watchers = [await stack.enter_async_context(watch(server)) for _ in range(1000)]
        assert (await ask(server, upgrade())).says(503, "There are 1000 watchers already (--max-clients).")
        idle = [await stack.enter_async_context(connect(server)) for _ in range(100)]
        answer = await ask(server, post(PHOTO))
        assert answer.says(201)
        for watcher in watchers:
            assert await watcher.frame() == (TEXT, answer.headers["Location"].encode())
        assert len(idle) == 100
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_watcher_that_pings_and_never_reads(start_server: StartServer) -> None:
    """The answers to its pings do not pile up."""
    server = await start_server()
    async with watch(server, receive_buffer=2048) as deaf:
        before = memory(server)
        with contextlib.suppress(ConnectionError, TimeoutError):
            for _ in range(300):
                async with asyncio.timeout(1):
                    deaf.writer.write((frame(PING, bytes(125))) * 800)
                    await deaf.writer.drain()
        assert memory(server) - before < 10


# --- 4. Load ---


def memory(server: Server, key: str = "VmRSS") -> float:
    """MiB that the server process takes, or has at most taken (VmHWM)."""
    status = Path(f"/proc/{server.process.pid}/status")
    if not status.exists():
        pytest.skip("needs /proc")
    return int(status.read_text().partition(key + ":")[2].split()[0]) / 1024


def photo_of(megapixels: int) -> bytes:
    side = round((megapixels * 10**6) ** 0.5)
    return encode(".jpg", cv2.resize(pixels(), (side, side)), cv2.IMWRITE_JPEG_QUALITY, 70)


@pytest.mark.parametrize("kind", BOMBS)
async def test_bomb_in_a_png_takes_no_memory(start_server: StartServer, kind: str) -> None:
    server = await start_server()
    before = memory(server, "VmHWM")
    answer = await ask(server, post(BOMBS[kind]))
    assert answer.says(201) or answer.says(422)
    assert memory(server, "VmHWM") - before < 64


async def test_gzip_bombs_hold_nobody_up(server: Server) -> None:
    bombs = [asyncio.create_task(ask(server, BODIES["gzip bomb of 1 GiB"][0])) for _ in range(10)]
    for _ in range(10):
        assert await asyncio.to_thread(time_of_health, server) < 1
    for bomb in bombs:
        assert (await bomb).says(413, TOO_LARGE)


def time_of_health(server: Server) -> float:
    """Seconds, by a client that does nothing else."""
    start = time.monotonic()
    with urllib.request.urlopen(f"{server.url}/health", timeout=TIMEOUT) as answer:
        assert answer.status == 200
    return time.monotonic() - start


async def test_a_hundred_large_photos_at_once(start_server: StartServer) -> None:
    server, photo, waits = await start_server("--queue", "2"), photo_of(9), []
    threads = len(os.sched_getaffinity(server.process.pid))
    posts = [asyncio.create_task(ask(server, post(photo))) for _ in range(100)]
    while not all(each.done() for each in posts):
        waits.append(await asyncio.to_thread(time_of_health, server))
        await asyncio.sleep(0.05)
    answers = await asyncio.gather(*posts)
    assert all(each.says(each.status) for each in answers)
    statuses = [each.status for each in answers]
    assert set(statuses) == {201, 503} and statuses.count(201) >= 3 * threads
    print(f"{statuses.count(201)} x 201, /health {max(waits):.2f} s, {memory(server, 'VmHWM'):.0f} MiB")
    assert max(waits) < 1
    assert memory(server, "VmHWM") < threads * 9 * BYTES_A_PIXEL * 10**6 / MIB + threads * 3 * 20 + 128


async def test_uploads_that_stall_leave_room(start_server: StartServer) -> None:
    """What uploads take is bounded by bytes, not by their number, and given back."""
    server = await start_server("--max-mb", "1", "--queue", "0")
    threads = len(os.sched_getaffinity(server.process.pid))
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(50):
            client = await stack.enter_async_context(connect(server))
            await client.send(head(f"Content-Length: {MIB}") + b"a")
        assert (await ask(server, post(PHOTO))).says(201)
        for _ in range(threads):
            large = await stack.enter_async_context(connect(server))
            await large.send(head(f"Content-Length: {MIB}") + bytes(MIB - 50))
        for _ in range(100):
            await ask(server, get("/health"))  # meanwhile it reads what was sent: a photo in work would be too much
        assert (await ask(server, post(PHOTO))).says(503, "too many for the memory (--queue, --max-mb)")
        large.reset()
        await until_answered(server, 201)


async def test_disconnects_give_their_slot_back(start_server: StartServer) -> None:
    server, photo = await start_server("--queue", "0"), photo_of(9)
    for cut in (len(photo) // 2, len(photo) + 999):  # in the middle of the upload, and of the detection
        for _ in range(5):
            async with connect(server) as client:
                await client.send(post(photo)[:cut])
                client.reset()
        await until_answered(server, 201)


# --- 5. Stopping ---


async def test_stop_with_everything_under_way(start_server: StartServer) -> None:
    """Each photo is answered and announced, or refused in words where there was no time for it."""
    server, photo = await start_server(), photo_of(1)
    async with contextlib.AsyncExitStack() as stack:
        good = await stack.enter_async_context(watch(server))
        for _ in range(20):
            await stack.enter_async_context(watch(server, "?format=json", receive_buffer=2048))
        uploading = await stack.enter_async_context(connect(server))
        await uploading.send(head("Content-Length: 99999"))
        stalled = await stack.enter_async_context(connect(server))
        await stalled.send(head("Content-Length: 99999"))
        queued = [(await ask(server, post(photo, "Prefer: respond-async"))).headers["Location"] for _ in range(3)]
        posts = [asyncio.create_task(ask(server, post(photo))) for _ in range(3)]
        await until(server, clients=21)
        server.process.send_signal(signal.SIGTERM)
        start = time.monotonic()
        await uploading.send(b"a")
        assert (await uploading.answer()).says(503, "The server is stopping.")
        answers = await asyncio.gather(*posts)
        done = [each.headers["Location"] for each in answers if each.status == 201 or each.says(503, "stop")]
        announced = []
        while (frame := await good.frame())[0] == TEXT:
            announced.append(frame[1].decode())
        assert frame == (CLOSE, struct.pack(">H", 1001))
        assert set(filter(None, done)) <= set(announced) <= {*done, *queued}
        await stalled.end()
        assert await asyncio.to_thread(server.process.wait, 8) == 0
        assert time.monotonic() - start < 8


async def test_stop_while_a_photo_takes_a_minute(start_server: StartServer) -> None:
    """A PNG of 9 x 9 with 20 GiB of pixels: libpng reads them all, and no thread can be stopped."""
    server = await start_server()
    async with connect(server) as client:
        await client.send(post(png_of(zeros(20 * 1000 * MIB))))
        await until(server, queued=1)
        server.process.send_signal(signal.SIGTERM)
        assert (await client.answer()).says(503, "The server stopped before")
        assert await asyncio.to_thread(server.process.wait, 8) == 0


# --- 6. Fuzzing: bench/fuzz.py is a longer one ---


@st.composite
def mutated(draw: st.DrawFn, originals: list[bytes], new: st.SearchStrategy[bytes]) -> bytes:
    """One of them, with some bytes overwritten, inserted or removed, and maybe cut short."""
    data = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.one_of(st.integers(0, min(200, len(data))), st.integers(0, len(data))))
        data[at : at + draw(st.integers(0, 8))] = draw(new)
    return bytes(data[: draw(st.one_of(st.just(len(data)), st.integers(0, len(data))))])


THUMBNAIL = UPRIGHT.resize((64, 64))
THUMBNAILS = [save(kind, THUMBNAIL) for kind in ("JPEG", "PNG", "WEBP", "GIF")]
TOKENS = st.sampled_from([b"\r\n", b"--b", b"; filename=", b"filename*0*=", b"''", b'"', b"%ff", b"\0", b"\xff"])
fuzz = settings(max_examples=500, deadline=None, database=None, phases=[Phase.generate], derandomize=True)


@fuzz
@given(mutated(THUMBNAILS, st.binary(max_size=8)))
def test_any_photo_is_annotated_or_refused(photo: bytes) -> None:
    with contextlib.suppress(faces.UnsupportedPhoto, faces.BadPhoto):
        assert faces.annotate(photo, max_megapixels=1).jpeg.startswith(b"\xff\xd8")


@fuzz
@given(mutated([FORM_TYPE.encode()], TOKENS), mutated([FORM], TOKENS))
def test_any_form_is_read_or_refused(content_type: bytes, body: bytes) -> None:
    with contextlib.suppress(faces.Problem):
        name, photo = faces.file_in_form(content_type.decode(errors="surrogateescape"), body)
        assert name.encode().decode()[:255] == name and photo in body
