#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["aiohttp==3.14.5", "numpy==2.4.6", "opencv-python-headless==4.14.0.94"]
# ///
"""A face detection server: post a photo, get it back with a box around each face.

Start it, watch it in a second terminal, and post a photo in a third:

    $ python server.py
    $ wscat -c ws://127.0.0.1:8282/faces
    $ curl -F image=@samples/astronaut.jpg http://127.0.0.1:8282/image
    {
      "id": "4cfda8d0-543f-494c-a3b1-e8d8691887ab",
      "url": "http://127.0.0.1:8282/image/4cfda8d0-543f-494c-a3b1-e8d8691887ab",
      "width": 512,
      "height": 512,
      "faces": [{"x": 172, "y": 63, "width": 102, "height": 102, "score": 42}],
      "filename": "astronaut.jpg",
      "took_ms": 24
    }

The watcher sees the URL at once. It opens as the photo with a box around the face.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import math
import os
import re
import socket
import sys
import threading
import time
import uuid
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

# OpenCV reads these when it is imported.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", "50000000")
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")  # the answers say what is wrong with a photo

import cv2
import numpy as np
from aiohttp import WSCloseCode, WSMsgType, web
from aiohttp.typedefs import Handler

ROOT = Path(__file__).parent
STATIC = ROOT / "static"  # the web page; the server also runs without it
CASCADE = "haarcascade_frontalface_alt2.xml"
MIB = 2**20  # bytes
MAX_PIXELS = os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"]  # in a photo

MAX_SCANS = 40  # in a JPEG; cameras write up to 10, and one of 50 megapixels can take 0.1 s
MAX_SEGMENTS = 10_000  # in a JPEG; to walk through millions would take 10 s
PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"IDAT", b"IEND")  # of a still picture
JPEG_QUALITY = 90  # percent; people see no loss

HAAR_SMALLEST = 33  # px, the smallest window; the face in it is smaller
HAAR_PART = 38  # and at least 1/38 of the photo's longer side: a larger photo costs no more
HAAR_WINDOWS = 1000  # of one scan; grouping them is quadratic, and only textures have more
HAAR_SCORE = 9  # windows that a face needs; F1 is flat around it
YUNET_SIDE = 416  # px, the longer side that the network sees: 0.4 of the time of 640 px
YUNET_SHORTEST = 64  # px; on a shorter side the network sees boxes of infinite size
YUNET_SCORE = 0.7  # of 1, that a face needs
OVERLAP = 0.3  # intersection over union, from which two boxes are of one face

UPLOAD_MEMORY = 8  # times --max-mb: what all uploads under way may hold
MAX_FAILURES = 1000  # photos whose error is kept, so that a GET can tell it
PIECE = 64 * 1024  # bytes of an image to send at a time
HEARTBEAT = 25  # seconds between pings: proxies drop a connection that is silent for 30 to 60
PAUSE = 0.005  # seconds after each message of a watcher: whoever floods the server waits
MAX_UNREAD = 32 * 1024  # bytes that a watcher may leave unread: some 400 URLs
DRAIN_TIMEOUT = 4  # seconds to finish photos when the server stops; Docker kills it after 10
GOODBYE_TIMEOUT = 1  # seconds for clients to read what they were sent

log = logging.getLogger("faces")
Pixels = np.ndarray[Any, np.dtype[Any]]  # BGR, (height, width, 3), uint8


@dataclass(frozen=True)
class Config:
    """The settings; --help explains them."""

    host: str = "127.0.0.1"
    port: int = 8282
    public_url: str = ""
    allow_origin: tuple[str, ...] = ()
    keep: int = 100
    keep_mb: int = 128
    max_mb: int = 20
    upload_timeout: int = 40
    threads: int = os.cpu_count() or 1
    queue: int = 8
    max_clients: int = 500
    model: str = ""
    min_score: float = 0.0


# --- The photo: bytes in, bytes out, no HTTP ---
class UnsupportedPhoto(Exception):
    """The format is not supported; the text says what to do."""


class BadPhoto(Exception):
    """The photo cannot be used; the text says why."""


class Face(NamedTuple):
    """A box in pixels from the top left corner of the photo, and the detector's score."""

    x: int
    y: int
    width: int
    height: int
    score: float


Detector = Callable[[Pixels], list[Face]]


def annotate(photo: bytes, detector: Detector, drawn: bool = True) -> tuple[bytes, dict[str, Any]]:
    """Find the faces in a photo, and draw a box around each.

    Returns the JPEG, upright and without metadata (empty unless drawn), and a dict with its width,
    height and faces. Many threads may call this at once. Raises UnsupportedPhoto, BadPhoto, or
    cv2.error if memory runs out.
    """
    pixels = decode(photo)
    height, width, _ = pixels.shape
    faces = detector(pixels)
    meta = {"width": width, "height": height, "faces": [face._asdict() for face in faces]}
    if not drawn:
        return b"", meta

    draw(pixels, faces)
    encoded, jpeg = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    if not encoded:
        raise BadPhoto("A side is over 65,500 pixels, too long for a JPEG.")
    return jpeg.tobytes(), meta


def decode(photo: bytes) -> Pixels:
    """Decode a JPEG, PNG, WebP or GIF, and turn it upright. Raises as annotate()."""
    # The first bytes tell the format. OpenCV reads many more, which nobody here asked for.
    if photo.startswith(b"\xff\xd8"):
        check_scans(photo)
    elif photo.startswith(b"\x89PNG"):
        photo = still_png(photo)
    elif photo[4:8] == b"ftyp":
        raise UnsupportedPhoto(
            "This is HEIC or AVIF; send a JPEG (iPhone: Camera, Most Compatible)."
        )
    elif not photo.startswith((b"GIF8", b"RIFF")):
        raise UnsupportedPhoto("This is not a JPEG, PNG, WebP or GIF.")

    try:
        pixels = cv2.imdecode(np.frombuffer(photo, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as error:
        if error.code == cv2.Error.StsNoMem:
            raise
        raise BadPhoto(f"Over {MAX_PIXELS} pixels (OPENCV_IO_MAX_IMAGE_PIXELS).") from None
    if pixels is None:
        raise BadPhoto("The photo is damaged or cut short.")
    return pixels


def check_scans(jpeg: bytes) -> None:
    """Raise BadPhoto if a JPEG has more scans than it needs (libjpeg-turbo#284)."""
    scans, segments, at = 0, 0, 2
    # A segment is a marker, a length and data, which is skipped: it may hold a thumbnail.
    while marker := re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]").search(jpeg, at):
        at = marker.end() + int.from_bytes(jpeg[marker.end() : marker.end() + 2])
        segments += 1
        scans += marker[0] == b"\xff\xda"
        if scans > MAX_SCANS or segments > MAX_SEGMENTS:
            raise BadPhoto(f"The photo has over {MAX_SCANS} scans or {MAX_SEGMENTS} segments.")
        if marker[0] == b"\xff\xd9":  # the end of the picture; some phones append a film
            return


def still_png(png: bytes) -> bytes:
    """Keep only what a still picture needs: on other chunks, OpenCV crashes or takes gigabytes."""
    kept, at = [png[:8]], 8
    while at < len(png):
        end = at + 12 + int.from_bytes(png[at : at + 4])  # length, type, data, checksum
        if png[at + 4 : at + 8] in PNG_CHUNKS:
            kept.append(png[at:end])
        at = end
    if at > len(png):
        raise BadPhoto("The photo is damaged or cut short.")
    return b"".join(kept)


def draw(pixels: Pixels, faces: list[Face]) -> None:
    """Draw a box around each face: green with a black edge, to stand out on any photo."""
    line = max(2, max(pixels.shape) // 250)  # px, so that it looks as wide on a large photo
    for *box, _ in faces:
        cv2.rectangle(pixels, box, (0, 0, 0), 2 * line)
        cv2.rectangle(pixels, box, (0, 255, 0), line)


# --- The detectors ---
class HaarDetector(threading.local):
    """Find frontal faces with a Haar cascade (Viola and Jones, 2001). Raises ValueError.

    A score counts the windows that pass in a close view of a face and in its mirror image.
    A cascade is not thread-safe: by threading.local, __init__ runs in each thread.
    """

    def __init__(self, file: Path, min_score: float) -> None:
        self.min_score, self.cascade = min_score or HAAR_SCORE, cv2.CascadeClassifier()
        text = file.read_text("latin-1")  # OpenCV cannot open every path
        with contextlib.suppress(SystemError, cv2.error):
            storage = cv2.FileStorage(text, cv2.FILE_STORAGE_MEMORY)
            self.cascade.read(storage.getFirstTopLevelNode())
        if self.cascade.empty():
            raise ValueError(f"{file} is not a cascade")

    def __call__(self, pixels: Pixels) -> list[Face]:
        # Shrink the photo until the smallest face that is searched fills the cascade's window.
        height, width, _ = pixels.shape
        smallest = max(HAAR_SMALLEST, max(height, width) / HAAR_PART)
        shrink = smallest / self.cascade.getOriginalWindowSize()[0]
        size = [math.ceil(width / shrink), math.ceil(height / shrink)]
        gray = cv2.cvtColor(cv2.resize(pixels, size), cv2.COLOR_BGR2GRAY)

        # Scan in coarse steps; OpenCV's threads find the windows in any order. Those with edges
        # within 0.3 of a side make a group; a group of one would be dropped, hence * 2.
        windows = sorted(np.array(self.cascade.detectMultiScale(gray, 1.4, 0)).tolist())
        boxes, _ = cv2.groupRectangles(windows[:HAAR_WINDOWS] * 2, 1, 0.3)

        # Look closely and in fine steps at each group, and at its mirror image: a face is one there
        # too, while a chance likeness often is not. The view is larger than the box by 1.4.
        faces = []
        for x, y, side, _ in np.array(boxes).tolist():
            around, middle = (side * 7 // 5,) * 2, (x + side / 2, y + side / 2)
            view = cv2.getRectSubPix(gray, around, middle)
            view = cv2.resize(view, (45, 45))
            views = (view, cv2.flip(view, 1))
            score = sum(len(self.cascade.detectMultiScale(each, 1.05, 0)) for each in views)
            if score >= self.min_score:
                x, y, side = (round(each * shrink) for each in (x, y, side))
                faces.append(Face(x, y, min(side, width - x), min(side, height - y), score))

        # Of two boxes of one face, the better one stays.
        best = cv2.dnn.NMSBoxes([f[:4] for f in faces], [f.score for f in faces], 0, OVERLAP)
        return [faces[i] for i in best]


class YuNetDetector(threading.local):
    """Find faces with the neural network YuNet (Wu et al., 2023); a score is from 0 to 1."""

    def __init__(self, file: Path, min_score: float) -> None:
        model, none = np.frombuffer(file.read_bytes(), np.uint8), np.empty(0, np.uint8)
        score = min_score or YUNET_SCORE
        try:
            self.network = cv2.FaceDetectorYN.create("onnx", model, none, (64, 64), score, OVERLAP)
            self(np.zeros((64, 64, 3), np.uint8))  # another network would fail only now
        except cv2.error:
            raise ValueError(f"{file} is not a YuNet network") from None

    def __call__(self, pixels: Pixels) -> list[Face]:
        height, width, _ = pixels.shape
        scale = min(1, YUNET_SIDE / max(width, height))
        size = [max(YUNET_SHORTEST, round(side * scale)) for side in (width, height)]
        self.network.setInputSize(size)
        _, rows = self.network.detect(cv2.resize(pixels, size))

        faces = []
        for row in [] if rows is None else rows:  # x, y, width, height, five landmarks, score
            corners = np.divide([row[:2], row[:2] + row[2:4]], size).clip(0, 1)
            (x, y), (right, bottom) = np.rint(corners * (width, height)).astype(int).tolist()
            faces.append(Face(x, y, right - x, bottom - y, round(float(row[14]), 3)))
        return faces


def load_detector(model: str = "", min_score: float = 0) -> Detector:
    """Return the detector in a YuNet network (.onnx) or a cascade. Raises OSError or ValueError."""
    if model.endswith(".onnx"):
        return YuNetDetector(Path(model), min_score)
    if not hasattr(cv2, "CascadeClassifier"):
        raise ValueError("OpenCV 5 has no cascades: pip install 'opencv-python-headless<5'")

    own, wheel = ROOT / CASCADE, Path(cv2.__file__).parent / "data" / CASCADE
    return HaarDetector(Path(model or (own if own.exists() else wheel)), min_score)


# --- The store ---
ERRORS = {  # of a photo, and what HTTP calls them
    UnsupportedPhoto: web.HTTPUnsupportedMediaType,
    BadPhoto: web.HTTPUnprocessableEntity,
    cv2.error: web.HTTPServiceUnavailable,  # out of memory
    MemoryError: web.HTTPServiceUnavailable,
}


class Image(NamedTuple):
    """An annotated photo."""

    done: float  # when, in seconds since 1970
    jpeg: bytes
    meta: dict[str, Any]  # its JSON, but for the URL, which is another one for each client


class Store:
    """The images by id, least recently used first, and the photos under way or failed.

    Its methods are async for a store elsewhere, such as Redis.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.size = config, 0  # bytes of all images
        self.images: OrderedDict[str, Image] = OrderedDict()
        self.jobs: dict[str, asyncio.Task[Any]] = {}

    def under_way(self) -> list[asyncio.Task[Any]]:
        """Return the photos that are not done."""
        return [job for job in self.jobs.values() if not job.done()]

    async def start(self, id: str | None, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Start work on a photo; without an id, no GET can ask for it."""
        key = id or str(uuid.uuid4())
        self.jobs[key] = job = asyncio.create_task(self.run(key, work))
        for done in [id for id, job in self.jobs.items() if job.done()][:-MAX_FAILURES]:
            del self.jobs[done]
        return job

    async def run(self, id: str, work: Coroutine[Any, Any, Any]) -> Any:
        """Return the result of the work. If it fails, return why, and keep that for a GET."""
        try:
            result = await work
        except tuple(ERRORS) as error:
            return type(error)(*error.args)  # a copy: the original's traceback keeps the photo
        except Exception:
            del self.jobs[id]
            raise
        del self.jobs[id]
        return result

    async def put(self, id: str, image: Image) -> None:
        """Keep an image; drop the least recently used beyond the limits, but never this one."""
        self.images[id] = image
        self.size += len(image.jpeg)
        room = self.config.keep_mb * MIB
        while len(self.images) > 1 and (len(self.images) > self.config.keep or self.size > room):
            self.size -= len(self.images.popitem(last=False)[1].jpeg)

    async def get(self, id: str) -> Any:
        """Return what became of a photo, as soon as it is known. This counts as use."""
        if id in self.jobs:
            return await self.jobs[id]
        if id in self.images:
            self.images.move_to_end(id)
        return self.images.get(id)

    async def newest_first(self) -> list[Image]:
        """Return all images, by the time when they were done."""
        return sorted(self.images.values(), key=lambda image: image.done, reverse=True)


CONFIG = web.AppKey("CONFIG", Config)
DETECTOR: web.AppKey[Detector] = web.AppKey("DETECTOR")
STORE = web.AppKey("STORE", Store)
POOL = web.AppKey("POOL", ThreadPoolExecutor)
UPLOADS: web.AppKey[Counter[int]] = web.AppKey("UPLOADS")  # bytes received of each, by its id()
CORS = web.RequestKey("CORS", bool)  # whether a page of another site may read the answer
WATCHERS = web.AppKey("WATCHERS", dict)  # by websocket: transport, URL prefix, wants JSON


# --- The work, and who hears of it ---
async def announce(app: web.Application, image: Image) -> None:
    """Send the URL of an image to every watcher, and wait for none of them."""
    for websocket, (transport, prefix, as_json) in list(app[WATCHERS].items()):
        if transport.get_write_buffer_size() > MAX_UNREAD:
            transport.abort()  # close() would wait until the watcher has read everything
            continue
        url = prefix + image.meta["id"]
        text = json.dumps(image.meta | {"url": url}) if as_json else url
        with contextlib.suppress(ConnectionError):  # it has left
            await websocket.send_str(text)


async def run_in_pool(app: web.Application, photo: bytes, drawn: bool, **more: Any) -> Any:
    """Run annotate() in a thread; return its JPEG, and its JSON with more in it."""
    start, loop = time.monotonic(), asyncio.get_running_loop()
    jpeg, meta = await loop.run_in_executor(app[POOL], annotate, photo, app[DETECTOR], drawn)
    return jpeg, meta | more | {"took_ms": round((time.monotonic() - start) * 1000)}


async def annotate_and_announce(
    app: web.Application, id: str, name: str | None, photo: bytes
) -> Image:
    """Annotate a photo, keep the image, and announce it."""
    jpeg, meta = await run_in_pool(app, photo, drawn=True, filename=name)
    image = Image(time.time(), jpeg, {"id": id, "url": "", **meta})
    await app[STORE].put(id, image)
    await announce(app, image)
    log.info("%r: %d faces in %d ms", name, len(meta["faces"]), meta["took_ms"])
    return image


# --- The handlers, in the order in which a user meets them ---
async def get_page(request: web.Request) -> web.StreamResponse:
    """GET /, /docs and /openapi.json: a file of static/. For curl, / is text."""
    page = STATIC / str(request.match_info.route.name)
    for_curl = page.name == "index.html" and "text/html" not in request.headers.get("Accept", "")
    if page.exists() and not for_curl:
        return web.FileResponse(page)
    return web.Response(text=commands(url_of(request).removesuffix("/image/")))


async def get_faces(request: web.Request) -> web.WebSocketResponse:
    """GET /faces: a websocket that gets the URL of each new image, or its JSON (?format=json)."""
    watchers, transport = request.app[WATCHERS], request.transport
    websocket = web.WebSocketResponse(
        timeout=GOODBYE_TIMEOUT,
        heartbeat=HEARTBEAT,
        autoping=False,  # the loop below answers pings
        max_msg_size=1025,  # bytes; nobody reads what a watcher says
        compress=False,  # it would take 256 KiB a watcher
        writer_limit=sys.maxsize,  # send_str() never waits; announce() looks at the buffer
    )
    if not transport or not websocket.can_prepare(request):
        text = f"This is a websocket: wscat -c {request.url.with_scheme('ws')}"
        raise web.HTTPUpgradeRequired(text=text, headers={"Upgrade": "websocket"})
    if len(watchers) >= request.app[CONFIG].max_clients:
        raise web.HTTPServiceUnavailable(text="Too many watchers (--max-clients).")

    await websocket.prepare(request)
    # Else the system holds megabytes for a watcher that does not read.
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_UNREAD)
    watchers[websocket] = transport, url_of(request), request.query.get("format") == "json"
    try:
        async for message in websocket:
            if message.type is WSMsgType.PING and transport.get_write_buffer_size() < MAX_UNREAD:
                await websocket.pong(message.data)
            await asyncio.sleep(PAUSE)
    finally:
        del watchers[websocket]
    return websocket


async def post_image(request: web.Request) -> web.Response:
    """POST /image: annotate a photo, keep it, and announce it."""
    app, id = request.app, str(uuid.uuid4())
    name, photo = await read_photo(request)
    job = await app[STORE].start(id, annotate_and_announce(app, id, name, photo))

    url = url_of(request, id)
    headers = {"Location": url}
    preferences = ",".join(request.headers.getall("Prefer", []))  # RFC 7240
    if re.search(r"(^|,)\s*respond-async\s*($|[,;])", preferences, re.IGNORECASE):
        headers["Preference-Applied"] = "respond-async"
        return json_response({"id": id, "url": url}, status=202, headers=headers)
    image = await result_of(job)
    return json_response(image.meta | {"url": url}, status=201, headers=headers)


async def get_image(request: web.Request) -> web.StreamResponse:
    """GET /image/{id}: the annotated photo, as soon as it is done; /image/{id}/meta: its JSON."""
    id = request.match_info["id"]
    _, jpeg, meta = await result_of(request.app[STORE].get(id))
    if request.path.endswith("/meta"):
        return json_response(meta | {"url": url_of(request, id)})

    response = web.StreamResponse(headers={"Cache-Control": "private, max-age=31536000, immutable"})
    response.content_type, response.content_length = "image/jpeg", len(jpeg)
    await response.prepare(request)
    if request.method == "HEAD":
        return response

    # In pieces, since aiohttp would copy the whole image for a client that does not read.
    for at in range(0, len(jpeg), PIECE):
        async with asyncio.timeout(request.app[CONFIG].upload_timeout):
            await response.write(jpeg[at : at + PIECE])
    return response


async def get_images(request: web.Request) -> web.Response:
    """GET /image: the JSON of every image, the newest first."""
    metas = [image.meta for image in await request.app[STORE].newest_first()]
    return json_response([meta | {"url": url_of(request, meta["id"])} for meta in metas])


async def post_detect(request: web.Request) -> web.Response:
    """POST /detect: find the faces in a photo, and keep nothing."""
    _, photo = await read_photo(request)
    job = await request.app[STORE].start(None, run_in_pool(request.app, photo, drawn=False))
    _, meta = await result_of(job)
    return json_response(meta)


async def get_health(request: web.Request) -> web.Response:
    """GET /health: 200, and what the server holds."""
    store, clients = request.app[STORE], len(request.app[WATCHERS])
    stored = {"images": len(store.images), "bytes": store.size, "queued": len(store.under_way())}
    return json_response({"status": "ok", "clients": clients} | stored)


# --- What the handlers share ---
def json_response(data: Any, **options: Any) -> web.Response:
    """Return JSON that people can read in a terminal."""
    return web.json_response(text=json.dumps(data, indent=2) + "\n", **options)


def commands(url: str) -> str:
    """Return what to try with the server at a URL."""
    return f"""
  open    {url}
  watch   wscat -c {url.replace("http", "ws", 1)}/faces
  post    curl -F image=@samples/astronaut.jpg {url}/image
  check   curl {url}/health
"""


def url_of(request: web.Request, id: str = "") -> str:
    """Return the URL of an image, as this client knows it. X-Forwarded headers are not trusted."""
    base = request.app[CONFIG].public_url.rstrip("/") or f"{request.scheme}://{request.host}"
    return f"{base}{request.app.router['image'].url_for(id=id)}"


async def read_photo(request: web.Request) -> tuple[str | None, bytes]:
    """Return filename and content of the photo, which is the body or the file in its form."""
    app, config, kind = request.app, request.app[CONFIG], request.content_type
    if "Content-Encoding" in request.headers:  # a few KB of gzip can inflate for minutes
        raise web.HTTPUnsupportedMediaType(text="Send the body without a Content-Encoding.")
    body = await read_body(request)
    if len(app[STORE].under_way()) >= config.threads * (1 + config.queue):
        raise web.HTTPServiceUnavailable(text="Too many photos are waiting (--queue).")
    if kind == "multipart/form-data":
        return file_in_form(request.headers["Content-Type"], body)
    # curl labels -d and --data-binary alike, but -d has stripped the NULs: no photo any more.
    if not body or (kind.endswith("urlencoded") and b"\0" not in body):
        raise web.HTTPBadRequest(text="There is no photo. With curl, use -F or --data-binary.")
    return None, body


async def read_body(request: web.Request) -> bytes:
    """Read a body within the limits of size, time and memory. Raises an HTTPException."""
    config, uploads, body = request.app[CONFIG], request.app[UPLOADS], bytearray()
    limit = config.max_mb * MIB
    try:
        async with asyncio.timeout(config.upload_timeout):
            async for piece in request.content.iter_any():
                body += piece
                uploads[id(body)] = len(body)
                if max(len(body), request.content_length or 0) > limit:
                    raise web.HTTPRequestEntityTooLarge(limit, len(body))
                if uploads.total() > UPLOAD_MEMORY * limit:
                    raise web.HTTPServiceUnavailable(text="Too many uploads (--max-mb).")
    except TimeoutError:
        raise web.HTTPRequestTimeout(text="The upload took too long (--upload-timeout).") from None
    except web.RequestPayloadError as error:
        raise web.HTTPBadRequest(text=f"The body is malformed: {error}") from None
    finally:
        del uploads[id(body)]
    return bytes(body)


def file_in_form(content_type: str, form: bytes) -> tuple[str, bytes]:
    """Return name and content of the file in a form (RFC 7578). Raises HTTPBadRequest.

    aiohttp's reader would hold up everybody for seconds on a preamble of short lines.
    """
    boundary = re.split("boundary=", content_type, flags=re.I)[-1].partition(";")[0].strip('" ')
    _, *parts = (b"\r\n" + form).split(b"\r\n--" + boundary.encode(errors="replace"), 1000)
    end = next((at for at, part in enumerate(parts) if part.startswith(b"--")), None)
    files = []
    for part in parts[:end]:  # what follows the end is ignored
        headers, _, content = part.partition(b"\r\n\r\n")
        name = re.search(rb'; *filename\*?=("[^"]*"|[^;\s]*)', headers, re.IGNORECASE)
        if name and content:
            files.append((name[1].strip(b'"').decode(errors="replace")[:255], content))
    if len(files) != 1 or end is None:
        raise web.HTTPBadRequest(text="The form must be complete and have exactly one file.")
    return files[0]


async def result_of(job: Awaitable[Any]) -> Any:
    """Wait for what became of a photo. Raises an HTTPException if it failed, or is not there."""
    result = await asyncio.shield(job)  # it goes on even if this client leaves
    if result is None:
        raise web.HTTPNotFound(text="There is no such image (any more: --keep, --keep-mb).")
    if isinstance(result, Exception):
        raise ERRORS[type(result)](text=str(result))
    return result


# --- Who may use the server, and how it says no ---
@web.middleware
async def explain_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Send each error as a problem document (RFC 9457), aiohttp's own too, and log it."""
    try:
        check_site(request)
        if request.method == "OPTIONS" and request[CORS]:
            return web.Response()
        return await handler(request)
    except (ConnectionError, TimeoutError):  # the client has left, or does not read
        if request.transport:
            request.transport.abort()
        return web.Response()
    except web.HTTPError as error:
        status, detail = error.status, error.text
        if error is request.match_info.http_exception:
            detail = f"There is no {request.method} {request.path}; GET / tells what there is."
        if status == 413:
            detail = f"The body is over {request.app[CONFIG].max_mb} MiB (--max-mb)."
        if status == 503:
            error.headers["Retry-After"] = "1"
        log.info("%s %s %r: %d %s", request.remote, request.method, request.path, status, detail)
        # Returned, not raised: a raised error and its traceback form a cycle that keeps the photo.
        document = {"title": error.reason, "status": status, "detail": detail}
        del error.headers["Content-Type"]
        kind = "application/problem+json"
        return json_response(document, status=status, headers=error.headers, content_type=kind)


def check_site(request: web.Request) -> None:
    """Refuse pages of other sites: the browser that shows them may reach this machine."""
    config, host = request.app[CONFIG], request.headers.get("Host", "")
    public = urlsplit(config.public_url).netloc
    if not re.fullmatch(r"([\w.-]+|\[[\w:.]+\])(:\d+)?", host, re.ASCII):
        raise web.HTTPBadRequest(text="The Host header must be a name or an address.")

    # Any name can be made to resolve to this machine (DNS rebinding), but for those without a dot.
    local = config.host in ("127.0.0.1", "localhost")
    if local and host != public and re.search(r"\.[^.]*[a-zA-Z]", host):
        raise web.HTTPForbidden(text=f"{host} is not this machine (--host, --public-url).")

    origin = request.headers.get("Origin", f"//{host}")
    allowed = {site.rstrip("/") for site in config.allow_origin}
    request[CORS] = not allowed.isdisjoint({origin, "*"})
    if not request[CORS] and origin.partition("//")[2] not in (host, public or host):
        raise web.HTTPForbidden(text=f"Pages of {origin} may not use this (--allow-origin).")


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Tell browsers what they may do with an answer."""
    response.headers.setdefault("Cache-Control", "no-cache")
    response.headers["Content-Security-Policy"] = "frame-ancestors 'none'"
    response.headers.update({"X-Content-Type-Options": "nosniff", "Vary": "Origin"})
    if request.get(CORS):
        for name in ("Origin", "Methods", "Headers"):
            response.headers[f"Access-Control-Allow-{name}"] = "*"


# --- The application ---
def create_app(config: Config = Config(), detector: Detector | None = None) -> web.Application:
    """Return the server. Raises OSError or ValueError if the model file is invalid."""
    app = web.Application(middlewares=[explain_errors])
    app[CONFIG] = config
    app[DETECTOR] = detector or load_detector(config.model, config.min_score)
    app[STORE] = Store(config)
    app[POOL] = ThreadPoolExecutor(config.threads)
    app[UPLOADS] = Counter()
    app[WATCHERS] = {}
    app.on_response_prepare.append(add_headers)
    app.on_shutdown.append(finish)

    routes = [
        web.get("/", get_page, name="index.html"),
        web.get("/docs", get_page, name="docs.html"),
        web.get("/openapi.json", get_page, name="openapi.json"),
        web.get("/faces", get_faces, allow_head=False),
        web.post("/image", post_image),
        web.put("/image", post_image),  # curl -T
        web.get("/image", get_images),
        web.get("/image/{id}", get_image, name="image"),
        web.get("/image/{id}/meta", get_image),
        web.post("/detect", post_detect),
        web.get("/health", get_health),
    ]
    app.add_routes(routes)
    if STATIC.is_dir():
        app.router.add_static("/static", STATIC)
    return app


async def finish(app: web.Application) -> None:
    """Finish the photos under way, then say goodbye to the watchers."""
    if jobs := app[STORE].under_way():
        await asyncio.wait(jobs, timeout=DRAIN_TIMEOUT)
    closing = [each.close(code=WSCloseCode.GOING_AWAY, drain=False) for each in app[WATCHERS]]
    await asyncio.gather(*closing)


def make_parser() -> argparse.ArgumentParser:
    """Return the command line, with an option for each field of Config."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.set_defaults(**asdict(Config()))
    add = parser.add_argument
    add("--host", help="0.0.0.0 lets other machines in")
    add("--port", type=int, help="0 takes a free one")
    add("--public-url", help="URL of this server behind a proxy")
    add("--allow-origin", action="append", default=[], help="site whose pages may use it, or *")
    add("--keep", type=int, help="images to keep")
    add("--keep-mb", type=int, help="MiB of images to keep")
    add("--max-mb", type=int, help="MiB in a body")
    add("--upload-timeout", type=int, help="seconds for an upload")
    add("--threads", type=int, help="photos at a time")
    add("--queue", type=int, help="photos waiting for each thread")
    add("--max-clients", type=int, help="watchers at a time")
    add("--model", help="YuNet network (.onnx) or cascade (.xml)")
    add("--min-score", type=float, help=f"of a face; 0 is {HAAR_SCORE}, with YuNet {YUNET_SCORE}")
    return parser


def serve(app: web.Application) -> None:
    """Listen, say where, and serve until SIGINT or SIGTERM. Raises OSError or OverflowError."""
    config, host = app[CONFIG], app[CONFIG].host
    listener = socket.create_server((host or "?", config.port))  # "" would be any address
    if host == "0.0.0.0":
        with socket.socket(type=socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
            probe.connect(("192.0.2.1", 9))  # sends nothing, but has an address in the network
            host = probe.getsockname()[0]
    url = f"http://{host}:{listener.getsockname()[1]}"

    web.run_app(
        app,
        sock=listener,
        print=lambda _: print(commands(url), flush=True),  # SIGTERM is handled from now on
        access_log=None,
        auto_decompress=False,
        keepalive_timeout=config.upload_timeout,
        shutdown_timeout=GOODBYE_TIMEOUT,
    )
    os._exit(0)  # else Python would wait for threads whose photos take minutes


def main() -> None:
    """Run the server with the options of the command line."""
    config = Config(**vars(make_parser().parse_args()))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    # No tracebacks if files run out (a hundred a second), or if a client speaks no HTTP.
    noise = re.compile(r"accept\(\)|_start_serving|aiohttp\.http_exceptions")
    for name in ("asyncio", "aiohttp.server"):
        logger = logging.getLogger(name)
        logger.addFilter(lambda record: not noise.search(f"{record.msg} {record.exc_info}"))
    try:
        serve(create_app(config))
    except (OSError, OverflowError, ValueError) as error:
        sys.exit(f"The server cannot start (--host, --port, --model): {error}")


if __name__ == "__main__":
    main()
