#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["aiohttp==3.14.5", "numpy==2.4.6", "opencv-python-headless==4.14.0.94"]
# ///
"""A face detection server: post a photo, get it back with a box around each face, watch all of them arrive.

    $ python server.py &
    $ curl -F image=@samples/astronaut.jpg http://localhost:8282/image
    {
      "id": "4cfda8d0-543f-494c-a3b1-e8d8691887ab",
      "url": "http://localhost:8282/image/4cfda8d0-543f-494c-a3b1-e8d8691887ab",
      "width": 512,
      "height": 512,
      "faces": [
        {
          "x": 182,
          "y": 69,
          "width": 86,
          "height": 86,
          "score": 24
        }
      ],
      "filename": "astronaut.jpg",
      "took_ms": 24
    }

Meanwhile, in another terminal:

    $ wscat -c ws://localhost:8282/faces
    Connected (press CTRL+C to quit)
    < http://localhost:8282/image/4cfda8d0-543f-494c-a3b1-e8d8691887ab
"""

import argparse
import asyncio
import contextlib
import ctypes
import functools
import json
import logging
import mimetypes
import os
import re
import secrets
import signal
import struct
import sys
import threading
import time
import uuid
import zlib
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from http import HTTPStatus
from pathlib import Path
from socket import SO_SNDBUF, SOL_SOCKET
from typing import Any, NamedTuple

# OpenCV reads these once, when it is imported. The limit only backs up --max-megapixels, which is checked before.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", "250000000")
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")  # the answers say what is wrong with a photo

import cv2
import numpy as np
from aiohttp import WSCloseCode, WSMsgType, web
from aiohttp.typedefs import Handler

ROOT = Path(__file__).parent
CASCADE = "haarcascade_frontalface_default.xml"  # beside this file, or else in the OpenCV wheel
STATIC = ROOT / "static"  # where that is beside this file
PAGES = {"/": "index.html", "/docs": "docs.html", "/openapi.json": "openapi.json"}  # in it
PAGE_POLICY = (  # data: and blob: are images that a page has in itself
    "default-src 'none'; script-src 'nonce-NONCE'; style-src 'nonce-NONCE'; connect-src 'self'; "
    "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
MIB = 2**20  # bytes
MAX_MEGAPIXELS = 250  # as OpenCV was told

HAAR_WINDOW = 24  # px, the side of the window that the cascade was trained on
HAAR_SMALLEST = 32  # px, the smallest face that is looked for: a smaller one looks like any texture
HAAR_PER_SIDE = 32  # and none under 1/32 of the longer side: no photo costs more than one of 1024 px
HAAR_FACE, HAAR_VIEW = 32, 44  # px, the sides of the proposed face in a view, and of the view
HAAR_VIEWS = ((0, False), (-8, True), (8, True), (-16, False), (16, False))  # degrees turned, and whether mirrored
HAAR_PROPOSALS = 128  # that are verified in a photo at most, the best first
HAAR_SCORE = 16  # windows: the least score
YUNET_SIDE = 416  # px, the longer side of the copy that the network sees: 0.4 of the time of 640, for 0.006 of F1
YUNET_LEAST = 64  # px, to which a shorter side is stretched: in less, the network sees boxes of infinite size
YUNET_SCORE = 0.7  # of 1: the least score
OVERLAP = 0.3  # intersection over union, from which two boxes are of one face
MAX_JPEG_SIDE = 65_500  # px, libjpeg's JPEG_MAX_DIMENSION
JPEG_QUALITY = 90  # of 100: no loss that one sees
MAX_SEGMENTS = 1000  # of a JPEG before its frame header: 20 MiB of metadata are 320
MAX_SCANS = 500  # of a JPEG: some 10 are usual, and 300,000 would take an hour (libjpeg-turbo#284)
MAX_PARTS = 1000  # of a form
MAX_NAME = 255  # characters of a filename

HEARTBEAT = 25  # s between pings: proxies drop a silent connection after 30 to 60
MAX_MESSAGE = 1024  # bytes in a watcher's message: it has nothing to say
MAX_UNREAD = 32 * 1024  # bytes that may wait for a watcher, in the system and again here: some 400 URLs each
DRAIN_TIMEOUT = 4  # s for the photos under way when the server stops; Docker kills it after 10
GOODBYE_TIMEOUT = 1  # s for the watchers to return the goodbye, and then for the answers to be sent

FRAME_HEADERS = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # the markers SOF0 to SOF15 of a JPEG
HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
BOUNDARY = re.compile(r'; *boundary=("[^"]+"|[^ ";]+)', re.IGNORECASE)
PART = re.compile(rb"[ \t]*((?:\r\n[!-9;-~]+:[^\r\n\0]{,8000}){,100})\r\n\r\n(.*)", re.DOTALL)  # headers and content
FILENAME = re.compile(r'\nContent-Disposition:.*?; *filename\*?="?((?<=")[^"]*|[^ ";\r]*)', re.IGNORECASE)
ENCODED = re.compile(r"\nContent-Transfer-Encoding:(?! *(binary|8bit|7bit))", re.IGNORECASE)
HOST = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?")  # a name or address, maybe a port

log = logging.getLogger("faces")
Pixels = np.ndarray[Any, np.dtype[Any]]  # BGR, (height, width, 3), uint8


def option(default: Any, help: str) -> Any:
    """A field of Config that is an option of the command line."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    """What can be set, here or on the command line."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 lets other machines in")
    port: int = option(8282, "port to listen on; 0 takes a free one")
    public_url: str = option("", "URL that all clients know this server by, where it is behind a proxy")
    allow_origin: tuple[str, ...] = option((), "site whose pages may use this server, * for all; may be repeated")
    keep: int = option(100, "images to keep")
    keep_mb: int = option(128, "MiB of images to keep")
    max_mb: int = option(20, "MiB in a body")
    max_megapixels: int = option(50, f"megapixels in a photo, {MAX_MEGAPIXELS} at most")
    upload_timeout: int = option(40, "seconds for an upload")
    queue: int = option(8, "photos that may wait for each thread; there is a thread for each CPU")
    max_clients: int = option(1000, "watchers at a time")
    model: str = option("", "file to find faces with: a YuNet network in .onnx or a cascade in OpenCV's XML")
    min_score: float = option(0.0, f"score of a face; 0 takes {HAAR_SCORE} with a cascade, {YUNET_SCORE} with YuNet")


# --- The image: bytes in, bytes out, nothing of HTTP ---


class UnsupportedPhoto(Exception):
    """It is in none of the formats that are read; the text says what to do."""


class BadPhoto(Exception):
    """It is damaged or too large; the text says which."""


class Face(NamedTuple):
    """The box around a face, in pixels of the upright photo from its top left corner, and its detector's score."""

    x: int
    y: int
    width: int
    height: int
    score: float


class Annotated(NamedTuple):
    """An upright photo with a box around each face, as a JPEG without metadata; width and height in pixels."""

    jpeg: bytes
    width: int
    height: int
    faces: list[Face]


Detector = Callable[[Pixels], list[Face]]


def annotate(photo: bytes, detect: Detector | None = None, max_megapixels: float = Config.max_megapixels) -> Annotated:
    """Find the faces in a JPEG, PNG, WebP or GIF and draw a box around each. Safe in any number of threads.

    Raises UnsupportedPhoto or BadPhoto.
    """
    try:
        width, height = pixel_size(photo)
    except (ValueError, struct.error):
        raise BadPhoto("The photo has no frame header, or ends within its header.") from None
    if photo.startswith(b"\xff\xd8") and photo.count(b"\xff\xda") > MAX_SCANS:
        raise BadPhoto(f"The photo has over {MAX_SCANS} scans.")
    if width * height > max_megapixels * 1e6:
        size = f"{width} x {height} pixels, {width * height / 1e6:.1f} megapixels"
        raise BadPhoto(f"The photo has {size}; the limit is {max_megapixels} (--max-megapixels).")
    if max(width, height) > MAX_JPEG_SIDE:
        raise BadPhoto(f"The photo has {width} x {height} pixels; a JPEG has at most {MAX_JPEG_SIDE} a side.")
    image, faces = decode(photo), []
    height, width = image.shape[:2]
    line = max(2, max(width, height) // 250)  # px: as wide on a screen, however large the photo
    for x, y, w, h, score in (detect or load_detector())(image):
        left, top, right, bottom = max(0, x), max(0, y), min(width, x + w), min(height, y + h)
        for color, thickness in (((0, 0, 0), 2 * line), ((0, 255, 0), line)):  # a black edge, to stand out from green
            cv2.rectangle(image, (left, top), (right, bottom), color, thickness)
        faces.append(Face(left, top, right - left, bottom - top, score))
    _, jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    return Annotated(jpeg.tobytes(), width, height, faces)


def pixel_size(photo: bytes) -> tuple[int, int]:
    """Width and height in pixels by the header, before OpenCV allocates whatever that claims.

    The first bytes tell the format: OpenCV reads many more, which nobody here asked for. Raises UnsupportedPhoto,
    and ValueError or struct.error where the header has no size.
    """
    if photo.startswith(b"\x89PNG\r\n\x1a\n"):
        return struct.unpack_from(">II", photo, 16)
    if photo.startswith((b"GIF87a", b"GIF89a")):
        return struct.unpack_from("<HH", photo, 6)
    if photo.startswith(b"RIFF") and photo[8:16] == b"WEBPVP8 ":  # RFC 9649: lossy, lossless, extended
        width, height = struct.unpack_from("<HH", photo, 26)
        return width & 0x3FFF, height & 0x3FFF
    if photo.startswith(b"RIFF") and photo[8:16] == b"WEBPVP8L":
        (bits,) = struct.unpack_from("<I", photo, 21)
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if photo.startswith(b"RIFF") and photo[8:16] == b"WEBPVP8X":
        return 1 + int.from_bytes(photo[24:27], "little"), 1 + int.from_bytes(photo[27:30], "little")
    if photo.startswith(b"\xff\xd8\xff"):  # ITU T.81, B.1: segments, each with its length, up to the frame header
        at = 2
        for _ in range(MAX_SEGMENTS):
            at = photo.index(b"\xff", at)
            marker, length, height, width = struct.unpack_from(">xBHxHH", photo, at)
            if marker in FRAME_HEADERS:
                return width, height
            at += 2 + length if 0x01 < marker < 0xD0 or 0xD8 < marker < 0xFF else 1  # the others stand alone, or fill
        raise ValueError
    if photo[4:8] == b"ftyp" and photo[8:12] in HEIC_BRANDS:
        raise UnsupportedPhoto("This is a HEIC photo; export it as JPEG (iPhone: Settings, Camera, Most Compatible).")
    raise UnsupportedPhoto("This is no JPEG, PNG, WebP or GIF.")


def decode(photo: bytes) -> Pixels:
    """Decode to 8 bits a channel, turned upright by the EXIF orientation. Raises BadPhoto."""
    image = None
    with contextlib.suppress(cv2.error):
        image = cv2.imdecode(np.frombuffer(photo, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    if image is None:
        raise BadPhoto("The photo is damaged or cut short.")
    if image.dtype != np.uint8:  # cameras use 10 to 16 bits of 16: keep the 8 highest in use
        image = cv2.convertScaleAbs(image, alpha=2.0 ** min(0, 8 - int(image.max()).bit_length()))
    return image


class HaarDetector(threading.local):
    """Frontal faces by a Haar cascade (Viola and Jones, 2001), proposed by a coarse scan and verified one by one.

    A face's score is the number of windows that pass the cascade when the face is looked at from five sides. A face
    bears to be turned and mirrored a little; what only looks like one by chance does not.
    Raises ValueError if the file is no cascade. OpenCV's detectors are not thread-safe: threading.local runs __init__
    anew in each thread.
    """

    def __init__(self, file: Path, min_score: float) -> None:
        self.min_score = min_score or HAAR_SCORE
        self.cascade = cv2.CascadeClassifier()
        with contextlib.suppress(SystemError, cv2.error):  # by its text: OpenCV on Windows opens no path beyond ASCII
            storage = cv2.FileStorage(file.read_text("latin-1"), cv2.FILE_STORAGE_READ | cv2.FILE_STORAGE_MEMORY)
            self.cascade.read(storage.getFirstTopLevelNode())
        if self.cascade.empty():
            raise ValueError(f"{file} is no cascade in OpenCV's XML")

    def __call__(self, image: Pixels) -> list[Face]:
        height, width = image.shape[:2]
        scale = max(HAAR_SMALLEST, max(height, width) / HAAR_PER_SIDE) / HAAR_WINDOW
        copies: dict[float, Pixels] = {}  # by photo pixels per pixel: the smallest face fills one window, two, four...
        windows: list[list[int]] = []
        while min(height, width) >= scale * HAAR_WINDOW:
            image = cv2.resize(image, (round(width / scale), round(height / scale)))
            if not copies:
                image = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
            # Two sizes of window, within one octave: for larger ones, OpenCV doubles the positions.
            found = self.cascade.detectMultiScale(image, 2 ** (1 / 2), 0, maxSize=(2 * HAAR_WINDOW - 1,) * 2)
            windows += np.multiply(found, scale).astype(int).tolist()
            copies[scale] = image
            scale *= 2
        boxes, counts = cv2.groupRectangles(windows * 2, 1, 0.3)  # twice, as it drops what is there only once
        proposals = sorted(zip(counts, map(tuple, boxes), strict=True), reverse=True)[:HAAR_PROPOSALS]
        faces = [self.verify(copies, box) for _, box in proposals]
        faces = [face for face in faces if face.score >= self.min_score and face.width >= 0.9 * HAAR_SMALLEST]
        kept = cv2.dnn.NMSBoxes([face[:4] for face in faces], [face.score for face in faces], 0, OVERLAP)
        return [faces[i] for i in kept]

    def verify(self, copies: dict[float, Pixels], box: tuple[int, ...]) -> Face:
        """The mean of the windows that pass in views of a proposed box, and their number as the score."""
        x, y, side, _ = box
        # In the copy in which the face is nearest to twice as large as in a view.
        scale = min(copies, key=lambda each: abs(side / each - 2 * HAAR_FACE))
        middle = ((x + side / 2) / scale, (y + side / 2) / scale)
        passed = []
        for angle, mirrored in HAAR_VIEWS:
            turn: Pixels = cv2.getRotationMatrix2D(middle, angle, HAAR_FACE * scale / side)
            turn[:, 2] += np.subtract(HAAR_VIEW / 2, middle)
            if mirrored:
                turn[0] = (0, 0, HAAR_VIEW) - turn[0]
            view = cv2.warpAffine(copies[scale], turn, (HAAR_VIEW, HAAR_VIEW), borderMode=cv2.BORDER_REPLICATE)
            back = cv2.invertAffineTransform(turn)
            for left, top, size, _ in self.cascade.detectMultiScale(view, minNeighbors=0):
                passed.append((*(back @ (left + size / 2, top + size / 2, 1) * scale), size * side / HAAR_FACE))
        if not passed:
            return Face(x, y, side, side, 0)
        x, y, side = np.mean(passed, axis=0)
        return Face(round(x - side / 2), round(y - side / 2), round(side), round(side), len(passed))


class YuNetDetector(threading.local):
    """Faces by the neural network YuNet (Wu et al., 2023), for OpenCV's FaceDetectorYN; its score is from 0 to 1.

    Raises ValueError if the file is not such a network.
    """

    def __init__(self, file: Path, min_score: float) -> None:
        model, none = np.frombuffer(file.read_bytes(), np.uint8), np.empty(0, np.uint8)
        try:
            self.network = cv2.FaceDetectorYN.create("onnx", model, none, (32, 32), min_score or YUNET_SCORE, OVERLAP)
            self(np.zeros((32, 32, 3), np.uint8))  # another network would load, and fail at the first photo
        except cv2.error:
            raise ValueError(f"{file} is no YuNet network in ONNX") from None

    def __call__(self, image: Pixels) -> list[Face]:
        height, width = image.shape[:2]
        scale = max(1, max(height, width) / YUNET_SIDE)
        size = max(YUNET_LEAST, round(width / scale)), max(YUNET_LEAST, round(height / scale))
        self.network.setInputSize(size)
        _, found = self.network.detect(cv2.resize(image, size))
        scales, faces = np.divide((width, height, width, height), size * 2), []
        for row in [] if found is None else found:  # x, y, width, height, five landmarks, score
            x, y, width, height = np.rint(row[:4] * scales).astype(int).tolist()
            faces.append(Face(x, y, width, height, round(float(row[14]), 3)))
        return faces


@functools.cache
def load_detector(model: str = Config.model, min_score: float = Config.min_score) -> Detector:
    """The detector in a file, by default in the cascade beside this file, or else the same one in OpenCV's wheel.

    Raises OSError or ValueError.
    """
    if model.endswith(".onnx"):
        return YuNetDetector(Path(model), min_score)
    folder = ROOT if (ROOT / CASCADE).exists() else Path(cv2.__file__).parent / "data"
    return HaarDetector(Path(model or folder / CASCADE), min_score)


# --- The store ---


class Image(NamedTuple):
    """An annotated photo, and what is known of it; took_ms is from its last byte received to its JPEG."""

    id: str
    filename: str | None
    took_ms: int
    annotated: Annotated

    def meta(self, base: str) -> dict[str, Any]:
        """Its JSON, for a client that knows this server by the URL `base`."""
        _, width, height, faces = self.annotated
        boxes = [face._asdict() for face in faces]
        known = {"width": width, "height": height, "faces": boxes, "filename": self.filename, "took_ms": self.took_ms}
        return {"id": self.id, "url": f"{base}/image/{self.id}"} | known


class Problem(Exception):
    """An answer that is an error: its HTTP status, what is wrong, and headers."""

    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(status, detail)
        self.status, self.detail, self.headers = status, detail, headers or {}

    def response(self) -> web.Response:
        """The answer, as application/problem+json (RFC 9457)."""
        document = {"title": HTTPStatus(self.status).phrase, "status": self.status, "detail": self.detail}
        retry = {"Retry-After": "1"} if self.status == 503 else {}  # s
        return json_response(document, self.status, self.headers | retry, "application/problem+json")


class Store:
    """What became of each photo, by id: its Image or its Problem.

    The least recently used go first where they are too many (--keep, --keep-mb); the newest stays in any case.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.bytes, self.max_bytes = config, 0, config.keep_mb * MIB
        self.kept: OrderedDict[str, Image | Problem] = OrderedDict()
        self.promised: dict[str, asyncio.Future[Image | Problem]] = {}

    async def promise(self, id: str) -> None:
        """Have those who get `id` wait until it is put."""
        self.promised[id] = asyncio.get_running_loop().create_future()

    async def put(self, id: str, outcome: Image | Problem) -> None:
        """Keep an outcome, and hand it to those who wait for it."""
        self.kept[id] = outcome
        self.bytes += self.size(outcome)
        while len(self.kept) > 1 and (len(self.kept) > self.config.keep or self.bytes > self.max_bytes):
            self.bytes -= self.size(self.kept.popitem(last=False)[1])
        if id in self.promised:
            self.promised.pop(id).set_result(outcome)

    async def get(self, id: str) -> Image | Problem:
        """Return an outcome, as soon as there is one; that counts as use. Raises Problem where there will be none."""
        if id in self.promised:
            return await asyncio.shield(self.promised[id])  # who goes away must not cancel it for the others
        if id not in self.kept:
            kept = f"the last {self.config.keep} are kept, up to {self.config.keep_mb} MiB (--keep, --keep-mb)"
            raise Problem(404, f"There is no such image; {kept}.")
        self.kept.move_to_end(id)
        return self.kept[id]

    async def health(self) -> dict[str, Any]:
        """What GET /health says of it."""
        return {"images": len(self.kept), "bytes": self.bytes}

    @staticmethod
    def size(outcome: Image | Problem) -> int:
        return len(outcome.annotated.jpeg) if isinstance(outcome, Image) else 0


# --- What the application holds, and whom it tells ---


CONFIG = web.AppKey("CONFIG", Config)
DETECTOR: web.AppKey[Detector] = web.AppKey("DETECTOR")
POOL = web.AppKey("POOL", ThreadPoolExecutor)
STORE = web.AppKey("STORE", Store)
UPLOADS: web.AppKey[dict[int, int]] = web.AppKey("UPLOADS")  # the bytes that have come of each, by its id()
JOBS: web.AppKey[dict["asyncio.Task[Image | Problem]", int]] = web.AppKey("JOBS")  # the bytes of each photo under way
STOPPING = web.AppKey("STOPPING", asyncio.Event)
# of each websocket: its transport, the URL by which its client knows this server, and whether it wants JSON
WATCHERS: web.AppKey[dict[web.WebSocketResponse, tuple[asyncio.WriteTransport, str, bool]]] = web.AppKey("WATCHERS")


async def announce(app: web.Application, image: Image) -> None:
    """Send the image's URL to every watcher. It is written to their buffers, so that none is waited for."""
    texts: dict[tuple[str, bool], str] = {}  # most watchers get the same one
    for socket, (transport, base, as_json) in [*app[WATCHERS].items()]:
        if transport.get_write_buffer_size() > MAX_UNREAD:
            log.info("A watcher that does not read is cut off")
            transport.abort()  # which ends its handler; close() would wait until all is read
            continue
        if (base, as_json) not in texts:
            meta = image.meta(base)
            texts[base, as_json] = json.dumps(meta) if as_json else meta["url"]
        with contextlib.suppress(ConnectionError):  # it is leaving, and its handler about to notice
            await socket.send_str(texts[base, as_json])


# --- The handlers, in the order in which a user meets them ---


def commands(base: str) -> str:
    """The commands to try on the server at the URL `base`."""
    return f"""
  watch   wscat -c {base.replace("http", "ws", 1)}/faces
  post    curl -F image=@samples/astronaut.jpg {base}/image
  check   curl {base}/health
"""


async def get_page(request: web.Request) -> web.Response:
    """GET /, /docs and /openapi.json: a file of static/, whose scripts run by a nonce; for curl, / is text."""
    page = STATIC / PAGES[request.path]
    if request.path == "/" and not ("text/html" in request.headers.get("Accept", "") and page.exists()):
        what = "Post a photo, and every watcher gets the URL of the same photo with a box around each face.\n"
        return web.Response(text=f"{what}{commands(base_url(request))}\nStart your own: python server.py\n")
    if not page.exists():
        raise Problem(404, f"This server runs without its folder static/, which has {page.name}.")
    nonce = secrets.token_urlsafe()
    headers = {"Content-Security-Policy": PAGE_POLICY.replace("NONCE", nonce)}
    text = page.read_text("utf-8").replace("NONCE", nonce)
    return web.Response(text=text, headers=headers, content_type=mimetypes.guess_type(page)[0])


async def get_faces(request: web.Request) -> web.WebSocketResponse:
    """GET /faces: a websocket that gets the URL of each new image, or its JSON with ?format=json."""
    app = request.app
    socket = web.WebSocketResponse(
        timeout=GOODBYE_TIMEOUT,
        heartbeat=HEARTBEAT,
        autoping=False,  # the answers would pile up for who does not read them
        max_msg_size=MAX_MESSAGE + 1,  # aiohttp takes less than that
        compress=False,  # 256 KiB a watcher, to shorten 80 bytes
        writer_limit=sys.maxsize,  # send_str() never waits: announce() sees to those who do not read
    )
    if not socket.can_prepare(request):
        connect = f"wscat -c {base_url(request).replace('http', 'ws', 1)}/faces"
        headers = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
        raise Problem(426, f"This is a websocket. Connect with: {connect}", headers)
    if request.query.get("format", "json") != "json":
        raise Problem(400, "The format can only be json; without one you get the URL alone.")
    refuse_if_stopping(app)
    if len(app[WATCHERS]) >= app[CONFIG].max_clients:
        raise Problem(503, f"There are {app[CONFIG].max_clients} watchers already (--max-clients).")
    await socket.prepare(request)
    transport = request.transport
    assert transport is not None
    transport.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_SNDBUF, MAX_UNREAD)  # else it holds megabytes
    app[WATCHERS][socket] = transport, base_url(request), "format" in request.query
    try:
        async for message in socket:  # but for pings, it has nothing to say
            if message.type is WSMsgType.PING and transport.get_write_buffer_size() <= MAX_UNREAD:
                await socket.pong(message.data)
    finally:
        del app[WATCHERS][socket]
        if socket.close_code == WSCloseCode.ABNORMAL_CLOSURE:
            transport.abort()  # it does not answer: close() would wait until all is read
    return socket


async def post_image(request: web.Request) -> web.Response:
    """POST /image: find the faces in the photo that is the body, or a file in its form."""
    app, config = request.app, request.app[CONFIG]
    filename, photo = await read_photo(request)
    refuse_if_stopping(app)
    if len(app[JOBS]) >= max_jobs(config):
        raise Problem(503, f"Too many photos are waiting already, {config.queue} for each thread (--queue).")
    id = str(uuid.uuid4())
    url = f"{base_url(request)}/image/{id}"
    preferences = ",".join(request.headers.getall("Prefer", [])).lower().split(",")  # RFC 7240
    respond_async = "respond-async" in (each.partition(";")[0].strip() for each in preferences)
    if respond_async:
        await app[STORE].promise(id)
    job = asyncio.create_task(process(app, id, filename, photo, respond_async))
    app[JOBS][job] = len(photo)
    job.add_done_callback(app[JOBS].pop)
    if respond_async:
        return json_response({"id": id, "url": url}, 202, {"Location": url, "Preference-Applied": "respond-async"})
    outcome = await asyncio.shield(job)  # for who goes away meanwhile, too
    if isinstance(outcome, Problem):
        return outcome.response()
    return json_response(outcome.meta(base_url(request)), 201, {"Location": url})


async def read_photo(request: web.Request) -> tuple[str | None, bytes]:
    """The photo in the body or its form, and its name there. Raises Problem where it goes beyond the limits."""
    app, config = request.app, request.app[CONFIG]
    uploads, body = app[UPLOADS], bytearray()
    size, limit = request.content_length or 0, config.max_mb * MIB  # what is claimed first, and then what has come
    too_large = f"The body is over {config.max_mb} MiB (--max-mb)."
    room = max_jobs(config) * limit  # for all uploads and photos under way
    try:
        async with asyncio.timeout(config.upload_timeout):
            while size <= limit and not request.content.at_eof():
                body += await request.content.readany()
                size = uploads[id(body)] = len(body)
                if sum(uploads.values()) + sum(app[JOBS].values()) > room:
                    raise Problem(503, "The uploads under way are too many for the memory (--queue, --max-mb).")
                refuse_if_stopping(app)
        if size > limit:
            raise Problem(413, too_large)
        photo = bytes(body)
        if request.headers.get("Content-Encoding") in ("gzip", "deflate") and isinstance(request.protocol, Connection):
            inflate = zlib.decompressobj(47).decompress  # 47: either of the two
            photo = await asyncio.get_running_loop().run_in_executor(app[POOL], inflate, photo, limit + 1)
            if len(photo) > limit:
                raise Problem(413, too_large)
    except TimeoutError:
        raise Problem(408, f"The upload took over {config.upload_timeout} s (--upload-timeout).") from None
    except (web.RequestPayloadError, zlib.error) as error:
        raise Problem(400, f"The body is malformed: {error}") from None
    finally:
        uploads.pop(id(body), None)
    filename, content_type = None, request.headers.get("Content-Type", "")
    if content_type.lower().startswith("multipart/"):
        filename, photo = file_in_form(content_type, photo)
    if not photo:
        raise Problem(400, "There is no photo, only an empty file or body. Try: curl -F image=@photo.jpg")
    return filename, photo


def file_in_form(content_type: str, form: bytes) -> tuple[str, bytes]:
    """Name and content of the first file in a multipart/form-data body (RFC 7578). Raises Problem.

    By regular expressions: the email package takes seconds for some headers (python/cpython#136063), and aiohttp's
    reader takes six times as long for most photos, and lets a preamble have any length.
    """
    boundary = BOUNDARY.search(content_type)
    delimiter = b"\r\n--" + (boundary[1].strip('"').encode(errors="replace") if boundary else b"")
    texts = (b"\r\n" + form).split(delimiter, MAX_PARTS)[1:]  # without the preamble
    end = next((number for number, text in enumerate(texts) if text.startswith(b"--")), None)
    parts = [PART.fullmatch(text) for text in texts[:end]]
    if not boundary or end is None or None in parts:
        raise Problem(400, f"The form is malformed (RFC 7578), or has over {MAX_PARTS} parts.")
    for part in filter(None, parts):
        headers, content = part[1].decode(errors="replace"), part[2]
        filename = FILENAME.search(headers)
        if filename and (filename[1] or content):  # a browser sends neither where none was chosen
            if ENCODED.search(headers):
                raise Problem(400, "The file in the form has a Content-Transfer-Encoding; send it as it is.")
            return filename[1][:MAX_NAME], content
    raise Problem(400, "There is no file in the form. Try: curl -F image=@photo.jpg")


async def process(app: web.Application, id: str, filename: str | None, photo: bytes, promised: bool) -> Image | Problem:
    """Annotate a photo in a thread of the pool, keep what becomes of it, and tell the watchers."""
    start, loop, config = time.monotonic(), asyncio.get_running_loop(), app[CONFIG]
    cv2.setNumThreads(-1 if len(app[JOBS]) == 1 else 1)  # a photo alone has all cores; where many are, each has one
    try:
        annotated = await loop.run_in_executor(app[POOL], annotate, photo, app[DETECTOR], config.max_megapixels)
        image = Image(id, filename, round((time.monotonic() - start) * 1000), annotated)
        await app[STORE].put(id, image)
        await announce(app, image)
        _, width, height, faces = annotated
        counts = len(faces), image.took_ms, len(app[WATCHERS])
        log.info("%r: %d x %d px, %d faces, %d ms, %d watchers", filename, width, height, *counts)
        return image
    except (UnsupportedPhoto, BadPhoto) as error:
        problem = Problem(415 if isinstance(error, UnsupportedPhoto) else 422, str(error))
    except Problem as error:
        problem = error
    except asyncio.CancelledError:
        problem = Problem(503, "The server stopped before the photo had its turn.")
    except Exception:
        log.exception("%r failed", filename)
        problem = Problem(500, "The server failed on this photo; its log says why.")
    if promised:
        await app[STORE].put(id, problem)
    log.info("%r: %d %s", filename, problem.status, problem.detail)
    return problem


async def get_image(request: web.Request) -> web.Response:
    """GET /image/{id}: the annotated JPEG, and /image/{id}/meta: the JSON of the POST; one under way is waited for."""
    outcome = await request.app[STORE].get(request.match_info["id"])
    if isinstance(outcome, Problem):
        return outcome.response()
    if request.path.endswith("/meta"):
        return json_response(outcome.meta(base_url(request)))
    headers = {"Cache-Control": "private, max-age=31536000, immutable"}
    return web.Response(body=outcome.annotated.jpeg, content_type="image/jpeg", headers=headers)


async def get_health(request: web.Request) -> web.Response:
    """GET /health: 200 as long as photos are taken."""
    app = request.app
    status = "stopping" if app[STOPPING].is_set() else "ok"
    health = {"status": status, "clients": len(app[WATCHERS]), "queued": len(app[JOBS])} | await app[STORE].health()
    return json_response(health, 200 if health["status"] == "ok" else 503)


# --- What the handlers share ---


def json_response(
    data: Any, status: int = 200, headers: dict[str, str] | None = None, content_type: str = "application/json"
) -> web.Response:
    """JSON, laid out for people with curl."""
    text = json.dumps(data, indent=2) + "\n"
    return web.Response(text=text, status=status, headers=headers, content_type=content_type)


def refuse_if_stopping(app: web.Application) -> None:
    """Raise Problem once the server is told to stop."""
    if app[STOPPING].is_set():
        raise Problem(503, "The server is stopping.")


def base_url(request: web.Request) -> str:
    """The URL by which the client knows this server. X-Forwarded headers are not trusted."""
    return request.app[CONFIG].public_url or f"{request.scheme}://{request.headers['Host']}"


@web.middleware
async def answer(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer each error as a problem, aiohttp's 404 and 405 as well, and tell browsers what they may do with it.

    The pages of other sites are refused but for those allowed: they could use a server on their reader's machine.
    """
    headers = {"X-Content-Type-Options": "nosniff", "Vary": "Origin"}
    host, origin = request.headers.get("Host", ""), request.headers.get("Origin")
    try:
        if not HOST.fullmatch(host):
            raise Problem(400, "The request needs one Host header, with a name or an address and maybe a port.")
        if origin is not None and site(origin) not in (site(f"http://{host}"), site(base_url(request))):
            if {"*", origin}.isdisjoint(request.app[CONFIG].allow_origin):
                raise Problem(403, f"A page of {origin} may not use this server (--allow-origin).")
            headers["Access-Control-Allow-Origin"] = origin
            headers["Access-Control-Allow-Methods"] = "GET, HEAD, POST, PUT"
            headers["Access-Control-Allow-Headers"] = "Content-Type, Prefer"
            headers["Access-Control-Expose-Headers"] = "Location, Preference-Applied, Retry-After"
            if request.method == "OPTIONS":
                return web.Response(status=204, headers=headers)
        response = await handler(request)
    except Problem as problem:
        response = problem.response()
    except web.HTTPException as error:
        allow = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
        response = Problem(error.status, HTTPStatus(error.status).description, allow).response()
    except ConnectionError:
        raise  # the client is gone
    except Exception:
        log.exception("%s %r failed", request.method, request.path)
        response = Problem(500, "The server failed on this request; its log says why.").response()
    response.headers.update(headers)
    return response


def site(url: str) -> str:
    """Host and port of a URL. A proxy changes the scheme, so the ports that schemes imply do not count."""
    return re.sub(":(80|443)$", "", url.partition("://")[2].partition("/")[0].lower())


# --- The application ---


def usable_cpus() -> int:
    """The CPUs that this process may use, as far as the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def max_jobs(config: Config) -> int:
    """The photos that may be under way: one for each thread, and those that wait for it."""
    return usable_cpus() * (1 + config.queue)


def create_app(config: Config) -> web.Application:
    """The server, for web.run_app(), a test, or serve(). Raises OSError or ValueError where the model is none."""
    app = web.Application(middlewares=[answer])
    app[CONFIG] = config
    app[DETECTOR] = load_detector(config.model, config.min_score)
    app[POOL] = ThreadPoolExecutor(usable_cpus(), thread_name_prefix="annotate")
    app[STORE] = Store(config)
    app[UPLOADS] = {}
    app[JOBS] = {}
    app[WATCHERS] = {}
    app[STOPPING] = asyncio.Event()
    for path in PAGES:
        app.router.add_get(path, get_page)
    app.router.add_get("/faces", get_faces, allow_head=False)
    app.router.add_post("/image", post_image)
    app.router.add_put("/image", post_image)  # what curl -T sends
    app.router.add_get("/image/{id}", get_image)
    app.router.add_get("/image/{id}/meta", get_image)
    app.router.add_get("/health", get_health)
    app.on_shutdown.append(drain)
    return app


async def drain(app: web.Application) -> None:
    """Take no more photos, finish and announce those under way, and send the watchers away with 1001."""
    app[STOPPING].set()
    if app[JOBS]:
        _, late = await asyncio.wait([*app[JOBS]], timeout=DRAIN_TIMEOUT)
        for job in late:
            job.cancel()
    await asyncio.gather(*(each.close(code=WSCloseCode.GOING_AWAY, drain=False) for each in app[WATCHERS]))
    app[POOL].shutdown(wait=False)


class Connection(web.RequestHandler):
    """aiohttp's connection, with what its parser refuses answered as a problem: that comes before any middleware."""

    def handle_error(self, request: Any, status: int = 500, exc: Any = None, message: Any = None) -> web.Response:
        """The answer to what is not HTTP."""
        response = Problem(status, message or HTTPStatus(status).description).response()
        response.force_close()
        return response


async def serve(app: web.Application) -> None:
    """Serve until SIGINT or SIGTERM, then finish what was accepted."""
    config, loop = app[CONFIG], asyncio.get_running_loop()
    runner = web.AppRunner(app, shutdown_timeout=GOODBYE_TIMEOUT)
    await runner.setup()
    manager = runner.server
    assert manager is not None
    connection = functools.partial(  # aiohttp would inflate a body beyond the limit, on the event loop
        Connection, manager, loop=loop, keepalive_timeout=config.upload_timeout, auto_decompress=False
    )
    server = await loop.create_server(connection, config.host, config.port, backlog=1024)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(app[STOPPING].set))
    host, port = server.sockets[0].getsockname()[:2]
    host = "localhost" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    print(commands(f"http://{host}:{port}"), flush=True)
    await app[STOPPING].wait()
    await drain(app)  # before cleanup(), after which nothing more is read, not even the goodbyes
    await runner.cleanup()
    server.close()


def parse_config(arguments: list[str], kind: type[Config] = Config) -> Config:
    """Read the command line; each field of Config is an option of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for each in fields(kind):
        default = "none" if each.default in ("", ()) else each.default
        name, help = "--" + each.name.replace("_", "-"), f"{each.metadata['help']} (default: {default})"
        if each.name == "allow_origin":
            parser.add_argument(name, action="append", default=[], metavar="URL", help=help)
        else:
            parser.add_argument(name, type=type(each.default), default=each.default, help=help)
    options = parser.parse_args(arguments)
    options.allow_origin = tuple(url.rstrip("/") for url in options.allow_origin)
    options.public_url = options.public_url.rstrip("/")
    for name, value in vars(options).items():
        if isinstance(value, int) and value < (0 if name in ("port", "queue") else 1):
            parser.error(f"--{name.replace('_', '-')} {value} is too small")
    for url in (options.public_url, *options.allow_origin):
        if url not in ("", "*") and not re.match("https?://.", url):
            parser.error(f"{url} is no URL: it begins with neither http:// nor https://")
    if options.max_megapixels > MAX_MEGAPIXELS:
        parser.error(f"--max-megapixels can be {MAX_MEGAPIXELS} at most")
    return kind(**vars(options))


def keep_memory() -> None:
    """Have glibc keep the memory of a photo for the next one: to get it anew takes up to a sixth of the time."""
    with contextlib.suppress(AttributeError, TypeError):  # other systems do as they do
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-8, 1)  # M_ARENA_MAX: one heap for all threads
        mallopt(-3, 64 * MIB)  # M_MMAP_THRESHOLD: for blocks of up to 20 megapixels
        mallopt(-1, 128 * MIB)  # M_TRIM_THRESHOLD: that may lie unused


def main(create: Callable[[Any], web.Application] = create_app, kind: type[Config] = Config) -> None:
    """Run the server that `create` makes of the options."""
    config = parse_config(sys.argv[1:], kind)
    keep_memory()
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no such limit; others may not move it
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # each connection is a file; often, 1,024 are allowed
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, config.max_clients + 1000), hard))
    if not hasattr(cv2, "CascadeClassifier"):
        sys.exit(f"OpenCV {cv2.__version__} has no CascadeClassifier: pip install 'opencv-python-headless>=4.12,<5'")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)  # one line a photo is enough
    try:
        app = create(config)
    except (OSError, ValueError) as error:
        sys.exit(f"No model to find faces with (--model): {error}")
    try:
        asyncio.run(serve(app))
    except OSError as error:
        sys.exit(f"Cannot listen on {config.host} port {config.port} (--host, --port): {error.strerror}")
    os._exit(0)  # else Python would wait for threads whose photos were given up


if __name__ == "__main__":
    main()
