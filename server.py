#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["aiohttp==3.14.5", "numpy==2.4.6", "opencv-python-headless==4.14.0.94"]
# ///
"""A face detection server: post a photo, get it back with a box around each face.

Start it, watch it in a second terminal, post a photo in a third, and the watcher gets its URL:

    $ python server.py
    $ wscat -c ws://127.0.0.1:8282/faces
    $ curl -F image=@samples/astronaut.jpg http://127.0.0.1:8282/image
    {
      "id": "4cfda8d0-543f-494c-a3b1-e8d8691887ab",
      "url": "http://127.0.0.1:8282/image/4cfda8d0-543f-494c-a3b1-e8d8691887ab",
      "filename": "astronaut.jpg",
      "width": 512,
      "height": 512,
      "faces": [{"x": 172, "y": 63, "width": 102, "height": 102, "score": 42}],
      "took_ms": 24
    }
"""

import argparse
import asyncio
import inspect
import json
import logging
import os
import re
import socket
import sys
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", "50000000")  # OpenCV reads it on import

import cv2
import numpy as np
from aiohttp import web
from aiohttp.typedefs import Handler

STATIC = Path(__file__).parent / "static"  # the web page; the server also runs without it
CASCADE = Path(cv2.__file__).with_name("data") / "haarcascade_frontalface_alt2.xml"

FORMATS = (b"\xff\xd8", b"\x89PNG", b"RIFF", b"GIF8")  # a photo's first bytes; OpenCV reads more
MAX_PIXELS = os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"]  # in a photo
SCAN = b"\xff\xda\0"  # begins each scan of a JPEG, and is elsewhere only by chance
MAX_SCANS = 40  # in a JPEG; cameras write up to 10, and each can take 0.1 s at 50 megapixels
PNG_CHUNKS = (b"IHDR", b"PLTE", b"eXIf", b"IDAT", b"IEND")  # of a still picture

HAAR_SMALLEST = 33  # px, the side of the smallest window; the face in it is smaller
HAAR_PART = 38  # or 1/38 of the photo's longer side, if that is more: a large photo costs no more
HAAR_WINDOWS = 1000  # the most that are grouped, in quadratic time; only textures have more
HAAR_SCORE = 9  # windows that a face needs in its close views; one more or less changes little
YUNET_SIDE = 416  # px, the longer side that the network sees, in 0.4 of the time of 640 px
YUNET_SHORTEST = 64  # px; with a shorter side the network finds boxes of infinite size
YUNET_SCORE = 0.7  # of 1, that a face needs

UPLOAD_MEMORY = 8  # times --max-mb: what all uploads under way may hold
MAX_ERRORS = 1000  # photos whose error is kept, so that a GET can tell it

log = logging.getLogger("faces")
SERVER: web.AppKey["Server"] = web.AppKey("SERVER")
Pixels = np.ndarray  # BGR, (height, width, 3), uint8
Detector = Callable[[Pixels], list["Face"]]
Meta = dict[str, Any]  # what is known of a photo, ready for JSON


@dataclass(frozen=True)
class Config:
    """The settings. Each is an option of the command line, and the comment on it is its help."""

    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0 lets other machines in
    port: int = 8282  # port to listen on; 0 takes a free one
    public_url: str = ""  # URL of this server behind a proxy
    allow_origin: tuple[str, ...] = ()  # site whose pages may use it, or *; may be repeated
    keep: int = 100  # images to keep
    keep_mb: int = 128  # MiB of images to keep
    max_mb: int = 20  # MiB of the largest body
    upload_timeout: int = 40  # seconds for an upload, and for a client to take what it asked for
    threads: int = os.cpu_count() or 1  # photos at a time
    queue: int = 8  # photos that may wait for each thread
    max_clients: int = 500  # watchers at a time
    model: str = ""  # YuNet network (.onnx) or cascade (.xml)
    min_score: float = 0.0  # score that a face needs; 0 means 9, with YuNet 0.7


# --- The photo: bytes in, bytes out, no HTTP ---
class BadPhoto(Exception):
    """The photo cannot be used; the text says why."""


class WrongFormat(BadPhoto):
    """It is not a JPEG, PNG, WebP or GIF."""


class Face(NamedTuple):
    """A box in pixels from the top left corner of the photo, and the detector's score."""

    x: int
    y: int
    width: int
    height: int
    score: float


def annotate(photo: bytes, detector: Detector, drawn: bool = True) -> tuple[bytes, Meta]:
    """Find the faces in a photo, and draw a box around each. Many threads may do so at once.

    Returns JPEG (b"" unless drawn) and Meta. Raises BadPhoto; MemoryError or cv2.error (no memory).
    """
    pixels = decode(photo)
    height, width, _ = pixels.shape
    faces = detector(pixels)
    meta = {"width": width, "height": height, "faces": [face._asdict() for face in faces]}
    if not drawn:
        return b"", meta

    draw(pixels, faces)
    encoded, jpeg = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])
    if not encoded:
        raise BadPhoto("A side is over 65,500 pixels, too long for a JPEG.")
    return jpeg.tobytes(), meta


def decode(photo: bytes) -> Pixels:
    """Decode a photo, and turn it upright. Raises as annotate()."""
    if not photo.startswith(FORMATS):
        raise WrongFormat("This is not a JPEG, PNG, WebP or GIF (iPhone: Most Compatible).")
    if photo.startswith(b"\x89PNG"):
        photo = still_png(photo)
    if photo.count(SCAN) > MAX_SCANS:
        raise BadPhoto(f"The photo has over {MAX_SCANS} scans.")

    try:
        pixels = cv2.imdecode(np.frombuffer(photo, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as error:
        if error.code == cv2.Error.StsNoMem:
            raise
        raise BadPhoto(f"Over {MAX_PIXELS} pixels (OPENCV_IO_MAX_IMAGE_PIXELS).") from None
    if pixels is None:
        raise BadPhoto("The photo is damaged or cut short.")
    return pixels


def still_png(png: bytes) -> bytes:
    """Keep only what a still picture needs: on other chunks, OpenCV crashes or takes gigabytes."""
    kept, at = bytearray(png[:8]), 8  # the signature
    while at < len(png):
        end = at + 12 + int.from_bytes(png[at : at + 4])  # length, type, data, checksum
        if png[at + 4 : at + 8] in PNG_CHUNKS and end <= len(png):
            kept += png[at:end]
        at = end
    return bytes(kept)


def draw(pixels: Pixels, faces: list[Face]) -> None:
    """Draw a box around each face: green with a black edge, to stand out on any photo."""
    line = max(2, max(pixels.shape) // 250)  # px; on a large photo more, to look the same
    for *box, _ in faces:
        cv2.rectangle(pixels, box, (0, 0, 0), 2 * line)
        cv2.rectangle(pixels, box, (0, 255, 0), line)


# --- The detectors ---
class HaarDetector(threading.local):  # runs __init__ in each thread: no cascade is thread-safe
    """Find frontal faces with a Haar cascade (Viola and Jones, 2001); a score counts windows."""

    def __init__(self, file: Path, min_score: float) -> None:
        self.min_score = min_score or HAAR_SCORE
        self.cascade = cv2.CascadeClassifier()
        text = file.read_text("latin-1")  # OpenCV cannot open every path
        with suppress(SystemError, cv2.error):  # another file leaves the cascade empty
            storage = cv2.FileStorage(text, cv2.FILE_STORAGE_MEMORY)
            self.cascade.read(storage.getFirstTopLevelNode())
        if self.cascade.empty():
            raise ValueError(f"{file} is not a cascade")

    def __call__(self, pixels: Pixels) -> list[Face]:
        # Shrink the photo until its smallest windows are as large as those of the cascade.
        height, width, _ = pixels.shape
        smallest = max(HAAR_SMALLEST, max(height, width) / HAAR_PART)
        shrink = smallest / self.cascade.getOriginalWindowSize()[0]
        size = [int(np.ceil(side / shrink)) for side in (width, height)]
        gray = cv2.cvtColor(cv2.resize(pixels, size), cv2.COLOR_BGR2GRAY)

        # Scan in coarse steps, and group the windows whose edges are within 0.4 of a side. OpenCV's
        # threads find them in any order, hence sorted(); it drops groups of one, hence * 2.
        windows = sorted(map(tuple, self.cascade.detectMultiScale(gray, 1.4, 0)))
        boxes, _ = cv2.groupRectangles(windows[:HAAR_WINDOWS] * 2, 1, 0.4)

        # Look in fine steps at the box of each group and at its mirror image: a face is one there
        # too, while a chance likeness often is not. All views are 1.4 boxes wide, scaled to 45 px.
        faces = []
        for x, y, side, _ in boxes:
            middle, around = (x + side / 2, y + side / 2), side * 7 // 5
            view = cv2.resize(cv2.getRectSubPix(gray, (around, around), middle), (45, 45))
            views = view, cv2.flip(view, 1)
            score = sum(len(self.cascade.detectMultiScale(each, 1.05, 0)) for each in views)
            if score >= self.min_score:
                x, y, side = (round(each * shrink) for each in (x, y, side))
                faces.append(Face(x, y, min(side, width - x), min(side, height - y), score))
        return faces


class YuNetDetector(threading.local):
    """Find faces with the neural network YuNet (Wu et al., 2023); a score is from 0 to 1."""

    def __init__(self, file: str, min_score: float) -> None:
        try:
            self.network = cv2.FaceDetectorYN.create(file, "", (64, 64), min_score or YUNET_SCORE)
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
            corners = np.divide([row[:2], row[:2] + row[2:4]], size).clip(0, 1)  # as parts of 1
            (x, y), (right, bottom) = np.rint(corners * (width, height)).astype(int).tolist()
            faces.append(Face(x, y, right - x, bottom - y, round(float(row[14]), 3)))
        return faces


def load_detector(model: str = "", min_score: float = 0) -> Detector:
    """Load a YuNet network (.onnx) or a cascade, else OpenCV's. Raises OSError or ValueError."""
    if model.endswith(".onnx"):
        return YuNetDetector(model, min_score)
    return HaarDetector(Path(model or CASCADE), min_score)


# --- The server: what it holds, and how it answers ---
class Image(NamedTuple):  # an annotated photo
    finished: float  # seconds since 1970
    jpeg: bytes
    meta: Meta  # "url" is empty here, since each client may reach the server by another URL

    def meta_at(self, base: str) -> Meta:
        """Return its Meta with its URL, for a client who reaches the server by this base URL."""
        return self.meta | {"url": f"{base}image/{self.meta['id']}"}


class Server:
    """The images, the watchers and the handlers. What a subclass may keep in Redis is async."""

    def __init__(self, config: Config, detector: Detector | None) -> None:
        self.config, self.pool = config, ThreadPoolExecutor(config.threads)
        self.detector = detector or load_detector(config.model, config.min_score)
        self.uploaded = 0  # bytes of the uploads under way
        self.jobs: dict[str, asyncio.Task[Any]] = {}  # photos waiting or in work, by id
        self.errors = OrderedDict[str, Exception]()  # of photos that failed, the oldest first
        self.images = OrderedDict[str, Image]()  # the least recently used first
        self.size = 0  # bytes of their JPEGs
        self.watchers: dict[web.WebSocketResponse, tuple[str, bool]] = {}  # base URL, wants JSON

    # --- The store ---
    async def put(self, id: str, image: Image) -> None:
        """Keep an image; drop the least recently used beyond the limits, but never this one."""
        self.images[id] = image
        self.size += len(image.jpeg)
        room = self.config.keep_mb * 2**20
        while len(self.images) > 1 and (len(self.images) > self.config.keep or self.size > room):
            self.size -= len(self.images.popitem(last=False)[1].jpeg)

    async def get(self, id: str) -> Any:
        """Return a photo's Image, Meta or error, once it is known; None if there is none."""
        if id in self.jobs:
            return await self.jobs[id]  # shield get(), or a client that leaves cancels the job
        if id in self.images:
            self.images.move_to_end(id)
        return self.images.get(id) or self.errors.get(id)

    # --- The photos under way, and the watchers ---
    async def start_job(self, id: str, photo: bytes, name: str | None, keep: bool) -> None:
        """Start to annotate a photo; from now on, get() waits for it."""
        self.jobs[id] = asyncio.create_task(self.run_job(id, photo, name, keep))

    async def run_job(self, id: str, photo: bytes, name: str | None, keep: bool) -> Any:
        """Annotate a photo, keep and announce it. Returns its Image or Meta, or its error."""
        start, loop = time.monotonic(), asyncio.get_running_loop()
        try:
            jpeg, meta = await loop.run_in_executor(self.pool, annotate, photo, self.detector, keep)
            meta["took_ms"] = round((time.monotonic() - start) * 1000)  # with the wait for a thread
            if not keep:
                return meta
            image = Image(time.time(), jpeg, {"id": id, "url": "", "filename": name, **meta})
            await self.put(id, image)
            await self.announce(image)
            log.info("%r: %d faces in %d ms", name, len(meta["faces"]), meta["took_ms"])
            return image
        except (BadPhoto, MemoryError, cv2.error) as error:
            # A copy, since the traceback of the original keeps the photo.
            self.errors[id] = type(error)(*error.args)
            if len(self.errors) > MAX_ERRORS:
                self.errors.popitem(last=False)
            return self.errors[id]
        finally:
            del self.jobs[id]

    async def announce(self, image: Image) -> None:
        """Send the URL of an image to every watcher, and wait for none of them."""
        for ws, (base, as_json) in self.watchers.items():
            meta = image.meta_at(base)
            with suppress(ConnectionError):  # it is leaving
                await ws.send_str(json.dumps(meta) if as_json else meta["url"])

    # --- The handlers ---
    def set_up(self, app: web.Application) -> None:
        """Give an application the routes of this server, its errors and its goodbye."""
        app[SERVER] = self
        app.middlewares.append(self.explain_errors)
        app.on_shutdown.append(self.finish)
        routes = [
            web.get("/", self.get_page, name="index.html"),  # the file of that name in STATIC
            web.get("/docs", self.get_page, name="docs.html"),
            web.get("/openapi.json", self.get_page, name="openapi.json"),
            web.get("/faces", self.get_faces),  # websocket: the URL of each new image
            web.post("/image", self.post_image),  # annotate a photo, keep it, and announce it
            web.put("/image", self.post_image),  # the same, for curl -T
            web.get("/image", self.get_images),  # the JSON of every image, the newest first
            web.get("/image/{id}", self.get_image),  # the JPEG, as soon as it is done
            web.get("/image/{id}/meta", self.get_image),  # its JSON
            web.post("/detect", self.post_detect),  # find the faces in a photo, and keep nothing
            web.get("/health", self.get_health),  # what the server holds
        ]
        app.add_routes(routes)
        if STATIC.is_dir():
            app.router.add_static("/static", STATIC)

    async def get_page(self, request: web.Request) -> web.StreamResponse:
        page = STATIC / str(request.match_info.route.name)
        wants_page = "text/html" in request.headers.get("Accept", "")
        if page.exists() and (wants_page or page.name != "index.html"):
            return web.FileResponse(page)
        address = self.base_url(request).partition("//")[2]
        return web.Response(text=str(__doc__).replace("127.0.0.1:8282/", address))  # for curl

    async def get_faces(self, request: web.Request) -> web.WebSocketResponse:
        ws = web.WebSocketResponse(
            heartbeat=25,  # seconds; proxies drop a connection that is silent for 30 to 60
            autoping=False,  # the loop below answers pings, and slows a flood of them
            max_msg_size=1025,  # bytes: 1 KiB may come, though nobody reads it
            compress=False,  # it would take 256 KiB a watcher
            writer_limit=sys.maxsize,  # send_str() never waits
        )
        if not ws.can_prepare(request):
            text = f"This is a websocket: wscat -c ws://{request.host}{request.path}"
            raise web.HTTPUpgradeRequired(text=text, headers={"Upgrade": "websocket"})
        if len(self.watchers) >= self.config.max_clients:
            raise web.HTTPServiceUnavailable(text="Too many watchers (--max-clients).")

        await ws.prepare(request)
        self.watchers[ws] = self.base_url(request), request.query.get("format") == "json"
        try:
            async for message in ws:
                if message.type is web.WSMsgType.PING:
                    await ws.pong(message.data)
                await asyncio.sleep(0.005)  # whoever floods the server waits
        finally:
            del self.watchers[ws]
        return ws

    async def post_image(self, request: web.Request) -> web.Response:
        id, (name, photo) = str(uuid.uuid4()), await self.read_photo(request)
        await self.start_job(id, photo, name, keep=True)
        url = f"{self.base_url(request)}image/{id}"
        headers = {"Location": url}
        if "respond-async" in re.split("[ ,;]+", request.headers.get("Prefer", "").lower()):
            headers["Preference-Applied"] = "respond-async"
            return reply({"id": id, "url": url}, status=202, headers=headers)
        image = await self.result_of(id)
        return reply(image.meta | {"url": url}, status=201, headers=headers)

    async def get_images(self, request: web.Request) -> web.Response:
        base, images = self.base_url(request), self.images.values()
        newest_first = sorted(images, key=lambda image: -image.finished)
        return reply([image.meta_at(base) for image in newest_first])

    async def get_image(self, request: web.Request) -> web.Response:
        image = await self.result_of(request.match_info["id"])
        if request.path.endswith("/meta"):
            return reply(image.meta_at(self.base_url(request)))

        # 64 KiB at a time, as aiohttp would copy the whole image for a client that does not read.
        async def pieces() -> AsyncIterator[bytes]:
            for at in range(0, len(image.jpeg), 2**16):
                yield image.jpeg[at : at + 2**16]

        headers = {
            "Cache-Control": "private, max-age=31536000, immutable",
            "Content-Length": str(len(image.jpeg)),
            "X-Content-Type-Options": "nosniff",
        }
        return web.Response(body=pieces(), headers=headers, content_type="image/jpeg")

    async def post_detect(self, request: web.Request) -> web.Response:
        id, (_, photo) = str(uuid.uuid4()), await self.read_photo(request)
        await self.start_job(id, photo, None, keep=False)
        return reply(await self.result_of(id))

    async def get_health(self, request: web.Request) -> web.Response:
        held = {"images": len(self.images), "bytes": self.size, "queued": len(self.jobs)}
        return reply({"status": "ok", "clients": len(self.watchers)} | held)

    def base_url(self, request: web.Request) -> str:
        """Return the URL by which this client reaches the server, with a slash at its end."""
        site = self.config.public_url.rstrip("/") or f"{request.scheme}://{request.host}"
        return f"{site}{request.app.router['index.html'].url_for()}"

    async def read_photo(self, request: web.Request) -> tuple[str | None, bytes]:
        """Return filename and content of the photo in a body or its form. Raises an HTTPError."""
        config, limit, body = self.config, self.config.max_mb * 2**20, bytearray()
        try:
            async with asyncio.timeout(config.upload_timeout):
                async for piece in request.content.iter_any():
                    body += piece
                    self.uploaded += len(piece)
                    if len(body) > limit:
                        text = f"The body is over {config.max_mb} MiB (--max-mb)."
                        raise web.HTTPRequestEntityTooLarge(limit, text=text)
                    if self.uploaded > UPLOAD_MEMORY * limit:
                        raise web.HTTPServiceUnavailable(text="Too many uploads (--max-mb).")
        except TimeoutError:
            raise web.HTTPRequestTimeout(text="Too slow an upload (--upload-timeout).") from None
        finally:
            self.uploaded -= len(body)

        # Only now, as the queue may have filled during the upload.
        if len(self.jobs) >= config.threads * (1 + config.queue):
            raise web.HTTPServiceUnavailable(text="Too many photos wait (--queue).")

        is_form = request.content_type == "multipart/form-data"
        name, photo = file_in_form(bytes(body)) if is_form else (None, bytes(body))
        # curl labels -d and --data-binary alike, but -d has stripped the NULs: no photo any more.
        if not photo or (request.content_type.endswith("urlencoded") and b"\0" not in photo):
            raise web.HTTPBadRequest(text="There is no photo. With curl, use -F or --data-binary.")
        return name, photo

    async def result_of(self, id: str) -> Any:
        """Return the Image or Meta of a photo, once known. Raises an HTTPError if there is none."""
        result = await asyncio.shield(self.get(id))  # the work goes on even if this client leaves
        if result is None:
            raise web.HTTPNotFound(text="There is no such image (any more: --keep, --keep-mb).")
        if isinstance(result, WrongFormat):
            raise web.HTTPUnsupportedMediaType(text=str(result))
        if isinstance(result, BadPhoto):
            raise web.HTTPUnprocessableEntity(text=str(result))
        if isinstance(result, Exception):  # for want of memory
            raise web.HTTPServiceUnavailable(text=str(result) or "Memory ran out.")
        return result

    # --- Before and after the handlers ---
    @web.middleware
    async def explain_errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Send each error as a problem document (RFC 9457), aiohttp's own too, and log it."""
        try:
            self.check_site(request)
            # Browsers ask by OPTIONS whether a page may post.
            response = web.Response() if request.method == "OPTIONS" else await handler(request)
        except web.HTTPError as error:
            method, path, status, detail = request.method, request.path, error.status, error.text
            if error is request.match_info.http_exception:  # no such path or method
                detail = f"There is no {method} {request.raw_path}; GET / tells what there is."
            if status == 503:
                error.headers["Retry-After"] = "1"
            log.info("%s %s %r: %d %s", request.remote, method, path, status, detail)

            # Not raised: a raised error and its traceback form a cycle that keeps the photo.
            problem = {"title": error.reason, "status": status, "detail": detail}
            kind = "application/problem+json"
            del error.headers["Content-Type"]
            response = reply(problem, status=status, headers=error.headers, content_type=kind)

        for name in ("Origin", "Methods", "Headers"):  # safe: others' pages get only a refusal
            response.headers[f"Access-Control-Allow-{name}"] = "*"
        response.headers.setdefault("Cache-Control", "no-cache")  # else browsers keep old pages
        return response

    def check_site(self, request: web.Request) -> None:
        """Refuse other sites' pages: a browser in this network would let any of them in."""
        config, host = self.config, request.headers.get("Host", "")
        public = re.sub("^[^/]*//|/.*", "", config.public_url.lower()) or "?"  # which no host is

        # Anybody can make a name with a dot resolve to this machine (DNS rebinding).
        names = r"[\w-]+|[\d.]+" if config.host in ("127.0.0.1", "localhost") else r"[\w.-]+"
        if host != public and not re.fullmatch(rf"({names}|\[[\w:.]+\])(:\d+)?", host):
            raise web.HTTPForbidden(text=f"{host!r} is not this machine (--host, --public-url).")

        origin = request.headers.get("Origin", f"//{host}")
        allowed = {site.rstrip("/") for site in config.allow_origin}
        if origin.partition("//")[2] not in (host, public) and allowed.isdisjoint({origin, "*"}):
            raise web.HTTPForbidden(text=f"Pages of {origin!r} may not use this (--allow-origin).")

    async def finish(self, app: web.Application) -> None:
        """Finish the photos under way, then say goodbye to the watchers."""
        if self.jobs:
            await asyncio.wait(self.jobs.values(), timeout=4)  # s; Docker kills after 10
        await asyncio.gather(*(ws.close(code=1001, drain=False) for ws in self.watchers))


def reply(data: Any, **options: Any) -> web.Response:
    """Return JSON that people can read in a terminal."""
    return web.json_response(text=json.dumps(data, indent=2) + "\n", **options)


def file_in_form(form: bytes) -> tuple[str, bytes]:
    """Return name and content of the file in a form (RFC 7578). Raises HTTPBadRequest."""
    # By hand: a preamble of short lines keeps aiohttp's reader, and so everybody, busy for seconds.
    form = b"\r\n" + form.lstrip()
    delimiter = b"\r\n" + form.split(b"\r\n", 2)[1]  # its first line
    parts, end, _ = form.partition(delimiter + b"--")
    files = []
    for part in parts.split(delimiter, 1000):  # millions would take seconds
        headers, _, content = part.partition(b"\r\n\r\n")
        name = re.search(rb'filename\*?=("[^"\r]*|[^;\r]*)', headers, re.IGNORECASE)
        if name and content:
            files.append((name[1].strip(b'"').decode(errors="replace")[:255], content))
    if len(files) != 1 or not end:
        raise web.HTTPBadRequest(text="The form must be complete and have exactly one file.")
    return files[0]


def create_app(config: Config = Config(), detector: Detector | None = None) -> web.Application:
    """Return the server as an application. Raises OSError or ValueError if the model is invalid."""
    app = web.Application()
    Server(config, detector).set_up(app)
    return app


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, with an option for each field of Config."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name, help in re.findall(r"(\w+): .+  # (.+)", inspect.getsource(Config)):
        option, default = "--" + name.replace("_", "-"), getattr(Config, name)
        if name == "allow_origin":
            parser.add_argument(option, action="append", default=[], help=help)
        else:
            parser.add_argument(option, type=type(default), default=default, help=help)
    return parser


def serve(app: web.Application) -> None:
    """Listen, say where, and serve until SIGINT or SIGTERM. Raises OSError or OverflowError."""
    config = app[SERVER].config
    host = config.host
    sock = socket.create_server((host or "?", config.port))  # "" would be any address, "?" is none
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # ms, after which Linux drops those who do not read
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * config.upload_timeout)
    if host == "0.0.0.0":
        with socket.socket(type=socket.SOCK_DGRAM) as probe, suppress(OSError):
            probe.connect(("192.0.2.1", 9))  # sends nothing, but gets an address of this machine
            host = probe.getsockname()[0]

    address = f"{host}:{sock.getsockname()[1]}"
    banner = f"""
  open    http://{address}
  watch   wscat -c ws://{address}/faces
  post    curl -F image=@samples/astronaut.jpg http://{address}/image
"""
    web.run_app(
        app,
        sock=sock,
        print=lambda _: print(banner, flush=True),  # called once SIGTERM is handled
        access_log=None,
        auto_decompress=False,  # a small body could become a huge one
        handler_cancellation=True,  # when a client leaves
        keepalive_timeout=config.upload_timeout,
        shutdown_timeout=1,
    )
    os._exit(0)  # else Python would wait for threads whose photos take minutes


def main() -> None:
    config = Config(**vars(make_parser().parse_args()))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    # If open files run out, asyncio would say so a hundred times a second, and again at the stop.
    logging.getLogger("asyncio").addFilter(lambda rec: not re.match(".*(accept|serving)", rec.msg))
    try:
        serve(create_app(config))
    except (AttributeError, OSError, OverflowError, ValueError) as error:  # OpenCV 5 lacks cascades
        sys.exit(f"The server cannot start (--host, --port, --model, requirements.txt): {error}")


if __name__ == "__main__":
    main()
