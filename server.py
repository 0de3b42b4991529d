#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["aiohttp==3.14.5", "numpy==2.4.6", "opencv-python-headless==4.14.0.94"]
# ///
"""A face detection server: post a photo, get it back with a box around each face."""
# The story comes first: what the server does, up to create_app(). A teacher shows this part.
# Then comes what keeps a hostile client from hurting others.
# Last come the detectors, and start and stop: the command line, listening, the goodbye.

import argparse
import asyncio
import json
import logging
import os
import re
import socket
import sys
import threading
import time
import uuid
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from email import errors, header, message_from_string, utils
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote, urlsplit

# OpenCV reads this limit when it is imported; if it is no number, C++ ends the whole process.
os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"] = os.getenv("OPENCV_IO_MAX_IMAGE_PIXELS") or "67108864"
if not re.fullmatch("[1-9][0-9]{0,17}", os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"]):
    sys.exit("OPENCV_IO_MAX_IMAGE_PIXELS must be a whole number above 0.")

import cv2
import numpy as np
from aiohttp import WSCloseCode, WSMsgType, web, web_protocol
from aiohttp.typedefs import Handler

HERE = Path(__file__).resolve().parent
MAX_PIXELS = os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"]
log = logging.getLogger("faces")
Json = dict[str, Any]
T = TypeVar("T")


# --- The settings ---
def option(default: T, explanation: str, minimum: int = 0) -> T:
    """Return a field of Config: its default, what --help says of it, and its minimum."""
    return field(default=default, metadata={"help": explanation, "minimum": minimum})


@dataclass(frozen=True)
class Config:
    """The settings. Each is an option of the command line."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 lets other machines in")
    port: int = option(8282, "port to listen on; 0 takes a free one")
    public_url: str = option("", "URL of this server behind a proxy")
    allow_origin: tuple[str, ...] = option((), "site that may use it, or *; repeatable")
    keep: int = option(100, "images to keep")
    keep_mb: int = option(128, "MiB of images to keep")
    max_mb: int = option(20, "MiB of the largest body", minimum=1)
    upload_timeout: int = option(40, "seconds for an upload, or for a client to read", minimum=1)
    threads: int = option(os.cpu_count() or 1, "photos to work on at a time", minimum=1)
    queue: int = option(8, "photos that may wait for each thread")
    max_clients: int = option(500, "watchers at a time")
    model: str = option("", "yunet, or a file: .onnx of YuNet, .xml of a cascade")
    min_score: float = option(0.0, "score that a face needs; if not given, 11, or 0.7 with YuNet")


# --- A photo: bytes in, bytes out ---
Pixels = np.ndarray  # BGR, (height, width, 3), uint8
Detector = Callable[[Pixels], list["Face"]]
SMALL_WIDTH = 480  # pixels, of an image for phones


class BadPhoto(Exception):
    """The photo cannot be used; the text says why, and the status is that of the answer."""

    def __init__(self, text: str, status: int = 422) -> None:
        super().__init__(text)
        self.status = status


class Face(NamedTuple):
    """A box in pixels from the top left corner of the photo, and the detector's score."""

    x: int
    y: int
    width: int
    height: int
    score: float


def annotate(photo: bytes, detector: Detector, drawn: bool = True) -> tuple[bytes, Json]:
    """Draw a box around each face in a photo; return the JPEG (b"" unless drawn), and the boxes.

    Many threads may call it at once. Raises BadPhoto; MemoryError or cv2.error if memory runs out.
    """
    pixels = decode(photo)
    height, width, _ = pixels.shape
    faces = detector(pixels)
    found = {"width": width, "height": height, "faces": [face._asdict() for face in faces]}
    if not drawn:
        return b"", found

    draw(pixels, faces)
    encoded, jpeg = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])
    if not encoded:
        raise BadPhoto("A side is over 65,500 pixels, too long for a JPEG.")
    return jpeg.tobytes(), found


def decode(photo: bytes) -> Pixels:
    """Decode a photo, and turn it upright by its EXIF data. Raises what annotate() raises."""
    content = np.frombuffer(make_harmless(photo), np.uint8)
    try:
        pixels = cv2.imdecode(content, cv2.IMREAD_COLOR)
    except cv2.error as error:
        if error.code == cv2.Error.StsNoMem:
            raise
        raise BadPhoto(f"Over {MAX_PIXELS} pixels (OPENCV_IO_MAX_IMAGE_PIXELS).") from None
    if pixels is None:
        raise BadPhoto("The photo is damaged or cut short.")
    return pixels


def draw(pixels: Pixels, faces: list[Face]) -> None:
    """Draw a box around each face: green with a black edge, to stand out on any photo."""
    thickness = max(2, max(pixels.shape) // 250)  # pixels; more on a large photo
    for face in faces:
        cv2.rectangle(pixels, face[:4], (0, 0, 0), 2 * thickness)
        cv2.rectangle(pixels, face[:4], (0, 255, 0), thickness)


# --- The detector ---
SMALLEST_FACE = 33  # pixels, the side of the smallest window that is searched
SMALLEST_PART = 38  # or 1/38 of the longer side, if that is more: a large photo costs no more
CROWD = 12  # so many faces of under 1.5 times the smallest: search again, at twice the size
HAAR_SCORE = 11  # windows that a face needs when it is looked at closely


class HaarDetector(threading.local):
    """Find frontal faces with a Haar cascade (Viola and Jones, 2001); a score counts windows.

    Each thread calls __init__ for itself: OpenCV lets no two threads use a cascade at a time.
    """

    def __init__(self, cascade: bytes, second: bytes, min_score: float) -> None:
        self.cascade, self.second = load_cascade(cascade), load_cascade(second)
        self.min_score = min_score or HAAR_SCORE

    def __call__(self, pixels: Pixels) -> list[Face]:
        smallest = max(SMALLEST_FACE, max(pixels.shape) / SMALLEST_PART)
        faces = search(self, pixels, smallest)
        small = [face for face in faces if face.width < 1.5 * smallest]
        if len(small) >= CROWD:
            faces = search(self, pixels, smallest / 2)
        return faces


# --- The images that are kept ---
@dataclass
class Image:
    """An annotated photo."""

    id: str
    filename: str | None
    jpeg: bytes
    found: Json  # its width, height, faces and took_ms
    created: float  # seconds since 1970
    small: bytes = b""  # the JPEG for phones, once somebody has asked for it

    def describe(self, base: str) -> Json:
        """Return all but the JPEGs, for a client who knows the server by this base URL."""
        url = f"{base}image/{self.id}"
        return {"id": self.id, "url": url, "filename": self.filename} | self.found


class ImageStore:
    """Images in memory; the least recently used go first. Async, as another store has to wait."""

    def __init__(self, keep: int, keep_mb: int) -> None:
        self.keep, self.keep_mb = keep, keep_mb
        self.images = OrderedDict[str, Image]()  # the least recently used first

    async def put(self, image: Image) -> None:
        """Keep an image; others go if there is no room, but never this one."""
        self.images[image.id] = image
        self.images.move_to_end(image.id)  # make_small() puts it again
        room = self.keep_mb * 2**20  # bytes
        while len(self.images) > 1 and (len(self.images) > self.keep or self.size() > room):
            self.images.popitem(last=False)

    def size(self) -> int:
        """Return the bytes of all JPEGs."""
        return sum(len(image.jpeg) + len(image.small) for image in self.images.values())

    async def get(self, image_id: str) -> Image | None:
        """Return an image, which counts as a use of it."""
        if image_id in self.images:
            self.images.move_to_end(image_id)
        return self.images.get(image_id)

    async def newest(self) -> list[Image]:
        """Return all images, the newest first."""
        return sorted(self.images.values(), key=lambda image: image.created, reverse=True)

    async def count(self) -> Json:
        """Return how many images there are, and the bytes of their JPEGs."""
        return {"images": len(self.images), "bytes": self.size()}


# --- What the application holds, and whom it tells ---
CONFIG = web.AppKey("CONFIG", Config)
DETECTOR: web.AppKey[Detector] = web.AppKey("DETECTOR")
THREADS = web.AppKey("THREADS", ThreadPoolExecutor)
IMAGES = web.AppKey("IMAGES", ImageStore)
Watcher = tuple[web.Request, str, bool]  # its request, base_url(), and whether it wants JSON
WATCHERS: web.AppKey[dict[web.WebSocketResponse, Watcher]] = web.AppKey("WATCHERS")
ADDRESS = web.AppKey("ADDRESS", str)  # the URL that serve() prints
SHRINKING = web.AppKey("SHRINKING", asyncio.Lock)
JOBS: web.AppKey[set[asyncio.Task[Any]]] = web.AppKey("JOBS")  # photos that wait or are in work
UPLOADED = web.AppKey("UPLOADED", Counter[str])  # ["bytes"] that all uploads hold


async def announce(app: web.Application, image: Image) -> None:
    """Send the URL of an image, or its JSON, to every watcher."""
    # If sending ever waits, others may come and go meanwhile; so the loop has a copy.
    for websocket, (request, base, wants_json) in list(app[WATCHERS].items()):
        cut_off_if_deaf(request)
        description = image.describe(base)
        text = json.dumps(description) if wants_json else description["url"]
        with suppress(ConnectionError):  # it has just left
            await websocket.send_str(text)


async def get_faces(request: web.Request) -> web.WebSocketResponse:
    """GET /faces: a websocket that gets the URL of each new image; with ?format=json, its JSON."""
    websocket = make_websocket(request)
    await websocket.prepare(request)
    wants_json = request.query.get("format") == "json"
    request.app[WATCHERS][websocket] = (request, base_url(request), wants_json)
    try:
        await wait_until_gone(websocket, request)
    finally:
        del request.app[WATCHERS][websocket]
    return websocket


# --- The other handlers, in the order in which a user meets them ---
STATIC = HERE / "static"  # the page; the server also runs without it
USAGE = """
  open    http{0}/
  watch   wscat -c ws{0}/faces
  post    curl -F image=@samples/astronaut.jpg http{0}/image
"""


async def get_home(request: web.Request) -> web.StreamResponse:
    """GET /: the page in a browser, and for curl the commands to try."""
    if STATIC.is_dir() and "text/html" in request.headers.get("Accept", ""):
        return web.FileResponse(STATIC / "index.html")
    rest = base_url(request).removeprefix("http").rstrip("/")  # of the URL, after http or ws
    return web.Response(text=USAGE.format(rest))


async def post_image(request: web.Request) -> web.Response:
    """POST /image: annotate a photo, keep the image, announce it, and answer with its JSON."""
    filename, photo = await read_photo(request)
    with place_in_queue(request.app):
        image = await make_image(request.app, filename, photo)
    description = image.describe(base_url(request))
    return reply(description, status=201, headers={"Location": description["url"]})


async def make_image(app: web.Application, filename: str | None, photo: bytes) -> Image:
    """Annotate a photo, keep the image, and announce it."""
    jpeg, found = await annotate_in_thread(app, photo, drawn=True)
    image = Image(str(uuid.uuid4()), filename, jpeg, found, time.time())
    await app[IMAGES].put(image)
    await announce(app, image)
    log.info("%r: %d faces in %d ms", filename, len(found["faces"]), found["took_ms"])
    return image


async def get_image(request: web.Request) -> web.StreamResponse:
    """GET /image/{id}: the photo with its boxes; with ?width=480, a small one."""
    response = web.StreamResponse(headers={"Cache-Control": "private, max-age=31536000, immutable"})
    response.content_type = "image/jpeg"
    response.content_length = len(await find_jpeg(request))
    await response.prepare(request)
    if request.method == "GET":  # HEAD wants no body
        await send_in_pieces(request, response)
    return response


async def find_image(request: web.Request) -> Image:
    """Return the image that a request asks for. Raises HTTPNotFound."""
    image = await request.app[IMAGES].get(request.match_info["id"])
    if image is None:
        raise web.HTTPNotFound(text="There is no such image, or no longer (--keep, --keep-mb).")
    return image


async def get_meta(request: web.Request) -> web.Response:
    """GET /image/{id}/meta: the JSON that answered its post."""
    image = await find_image(request)
    return reply(image.describe(base_url(request)))


async def get_images(request: web.Request) -> web.Response:
    """GET /image: a JSON list, with a line for each image, the newest first."""
    lines = []
    for image in await request.app[IMAGES].newest():
        description = image.describe(base_url(request))
        faces = description.pop("faces")  # in a crowd, these would be long
        lines.append(json.dumps(description | {"face_count": len(faces)}))
        await asyncio.sleep(0)  # let others run
    return web.json_response(text="[\n" + ",\n".join(lines) + "\n]\n")


async def post_detect(request: web.Request) -> web.Response:
    """POST /detect: find the faces in a photo, and keep nothing."""
    _, photo = await read_photo(request)
    with place_in_queue(request.app):
        _, found = await annotate_in_thread(request.app, photo, drawn=False)
    return reply(found)


async def get_docs(request: web.Request) -> web.FileResponse:
    """GET /docs: the API, for people."""
    return web.FileResponse(STATIC / "docs.html")


async def get_openapi(request: web.Request) -> web.FileResponse:
    """GET /openapi.json: the API, for programs."""
    return web.FileResponse(STATIC / "openapi.json")


async def get_health(request: web.Request) -> web.Response:
    """GET /health: what the server holds, and what its page needs to know."""
    app = request.app
    held = {"clients": len(app[WATCHERS]), "queued": len(app[JOBS])} | await app[IMAGES].count()
    for_page = {"join": url_for_others(request), "upload_timeout": app[CONFIG].upload_timeout}
    return reply({"status": "ok"} | held | for_page)


async def get_join(request: web.Request) -> web.Response:
    """GET /join.png: a QR code of the URL for others."""
    _, png = cv2.imencode(".png", encode_qr(url_for_others(request)))
    return web.Response(body=png.tobytes(), content_type="image/png")


def reply(data: Json, **options: Any) -> web.Response:
    """Return JSON that people can read in a terminal."""
    return web.json_response(text=json.dumps(data, indent=2) + "\n", **options)


def create_app(config: Config = Config(), detector: Detector | None = None) -> web.Application:
    """Return the server as an application. Raises OSError or ValueError if a setting is invalid."""
    config = check(config)
    app = web.Application(middlewares=[explain_errors, refuse_other_sites])
    app[CONFIG] = config
    app[DETECTOR] = detector or load_detector(config.model, config.min_score)
    app[THREADS] = ThreadPoolExecutor(config.threads)
    app[IMAGES] = ImageStore(config.keep, config.keep_mb)
    app[WATCHERS] = {}
    app[JOBS] = set()
    app[UPLOADED] = Counter()
    app[SHRINKING] = asyncio.Lock()
    app.on_response_prepare.append(set_headers)
    app.on_shutdown.append(finish)
    app.on_cleanup.append(end_threads)

    app.router.add_get("/", get_home, name="home")
    app.router.add_get("/faces", get_faces)
    app.router.add_post("/image", post_image)
    app.router.add_put("/image", post_image)  # for curl -T
    app.router.add_get("/image/{id}", get_image)
    app.router.add_get("/image/{id}/meta", get_meta)
    app.router.add_get("/image", get_images)
    app.router.add_post("/detect", post_detect)
    app.router.add_get("/health", get_health)
    app.router.add_get("/join.png", get_join)
    if STATIC.is_dir():
        app.router.add_get("/docs", get_docs)
        app.router.add_get("/openapi.json", get_openapi)
        app.router.add_static("/static", STATIC)
    else:
        log.warning("There is no page: %s is missing.", STATIC)
    return app


# ======== The guards: what keeps a hostile client from hurting others ========
# --- Photos that hurt ---
FORMATS = re.compile(rb"\xff\xd8|\x89PNG|RIFF....WEBP|GIF8.{9}", re.DOTALL)  # OpenCV reads more
OTHER_FORMATS = {  # by their first bytes
    rb"....ftyp.{0,24}avi[fs]": "AVIF",
    rb"....ftyp(he|mi|ms)": "HEIC (iPhone: Camera, Formats, Most Compatible; or use the page)",
    rb"%PDF": "PDF",
    rb"II\*\0|MM\0\*": "TIFF",
    rb"BM": "BMP",
    rb"\s{0,9}<(\?xml|svg)": "SVG",
    rb"\s{0,9}[{[]|data:|/9j/|iVBOR|UklGR|R0lGO": "JSON or base64; send the bytes of the photo",
}
SCAN = b"\xff\xda\0"  # begins each scan of a JPEG, and is elsewhere only by chance
MAX_SCANS = 40  # in a JPEG; cameras write up to 10, and each can take 0.1 s at 64 megapixels
# The frame of an arithmetic-coded JPEG: no browser reads it, and its scans take five times as long.
ARITHMETIC = re.compile(rb"\xff[\xc9\xca]\0[\x0b\x11\x14]\x08....[\x01\x03\x04]", re.DOTALL)
PNG_CHUNKS = (b"IHDR", b"PLTE", b"eXIf", b"IDAT", b"IEND")  # of a still picture


def make_harmless(photo: bytes) -> bytes:
    """Return a photo that OpenCV can be given. Raises BadPhoto."""
    if not FORMATS.match(photo):
        kinds = (kind for first, kind in OTHER_FORMATS.items() if re.match(first, photo, re.DOTALL))
        kind = next(kinds, "something else")
        raise BadPhoto(f"This is not a JPEG, PNG, WebP or GIF, but {kind}.", status=415)
    if photo.startswith(b"\x89PNG"):
        return still_png(photo)
    if photo.startswith(b"RIFF"):
        return plain_exif(photo)
    if photo.startswith(b"GIF8") and photo[11] >= 2 << (photo[10] & 7):
        return photo[:11] + b"\0" + photo[12:]  # OpenCV refuses a background without a color
    is_jpeg = photo.startswith(b"\xff\xd8")
    if is_jpeg and (photo.count(SCAN) > MAX_SCANS or ARITHMETIC.search(photo)):
        raise BadPhoto(f"The JPEG has over {MAX_SCANS} scans, or arithmetic coding.")
    return photo


def plain_exif(webp: bytes) -> bytes:
    """Move the mark "Exif" of a WebP behind its EXIF data; before them, OpenCV overlooks them."""
    before, mark, exif = webp.partition(b"Exif\0\0")
    size = int.from_bytes(before[-4:], "little") - len(mark)  # a chunk has its type, size, data
    return before + exif[:size] + mark + exif[size:]


def still_png(png: bytes) -> bytes:
    """Keep only what a still picture needs: on other chunks, OpenCV crashes or takes gigabytes."""
    kept, at = bytearray(png[:8]), 8  # the signature
    while at < len(png):
        end = at + 12 + int.from_bytes(png[at : at + 4])  # length, type, data, checksum
        if png[at + 4 : at + 8] in PNG_CHUNKS and end <= len(png):
            kept += png[at:end]
        at = end
    return bytes(kept)


# --- Uploads and forms ---
UPLOADS_AT_ONCE = 8  # bodies of --max-mb that all uploads under way may hold together
MAX_CONTENT_TYPE = 256  # characters; the time to parse them grows with their square
MAX_PARTS = 100  # of a form
MAX_PART_HEADERS = 2048  # bytes
MAX_PARAMETERS = 20  # of a part, for the same reason
MAX_FILENAME = 255  # characters


async def read_photo(request: web.Request) -> tuple[str | None, bytes]:
    """Return filename and content of the photo in a body or its form. Raises an HTTPError."""
    if len(request.headers.get("Content-Type", "")) > MAX_CONTENT_TYPE:
        raise web.HTTPBadRequest(text=f"The Content-Type is over {MAX_CONTENT_TYPE} characters.")
    filename, photo = None, await read_body(request)
    if request.content_type == "multipart/form-data":
        files = find_files(photo, request.headers["Content-Type"]) or await read_files(request)
        if len(files) != 1:
            text = "The form must be complete and have exactly one file: a part with a filename."
            raise web.HTTPBadRequest(text=text)
        name, photo = files[0]
        filename = re.split(r"[/\\]", name)[-1].strip('"')[:MAX_FILENAME]  # without folders
    # curl labels -d and --data-binary alike, but -d has stripped the NULs: no photo any more.
    if not photo or (request.content_type.endswith("urlencoded") and b"\0" not in photo):
        raise web.HTTPBadRequest(text="There is no photo. With curl, use -F or --data-binary.")
    return filename, photo


async def read_body(request: web.Request) -> bytes:
    """Read a body within the limits of its size, its time, and the memory of all uploads."""
    config, uploaded = request.app[CONFIG], request.app[UPLOADED]
    limit = config.max_mb * 2**20  # bytes
    body = bytearray()
    try:
        async with asyncio.timeout(config.upload_timeout):
            async for piece in request.content.iter_any():
                body += piece
                uploaded["bytes"] += len(piece)
                if uploaded["bytes"] > UPLOADS_AT_ONCE * limit:
                    raise web.HTTPServiceUnavailable(text="Too many uploads (--max-mb).")
                if len(body) > limit:
                    break
                await asyncio.sleep(0)  # else a body of tiny chunks would hold the others up
    except TimeoutError:
        raise web.HTTPRequestTimeout(text="Too slow an upload (--upload-timeout).") from None
    finally:
        uploaded["bytes"] -= len(body)
    photo = bytes(body) or await request.read()  # an application around may have read it already
    if len(photo) > limit:
        text = f"The body is over {config.max_mb} MiB (--max-mb)."
        raise web.HTTPRequestEntityTooLarge(limit, text=text)
    return photo


async def read_files(request: web.Request) -> list[tuple[str, bytes]]:
    """Return the files of a form that an application around has taken apart already."""
    try:
        form = await request.post()
    except ValueError:  # not taken apart, and nothing is left to read
        return []
    files = [each for each in form.values() if isinstance(each, web.FileField)]
    return [(unquote(each.filename), each.file.read()) for each in files]


def find_files(form: bytes, content_type: str) -> list[tuple[str, bytes]]:
    """Return name and content of the files in a form (RFC 7578); none if it is cut short.

    Not with aiohttp's own reader: a form of short lines would keep it, and so everybody, busy.
    """
    boundary = message_from_string(f"Content-Type: {content_type}").get_boundary()
    first_line = form.lstrip().partition(b"\r\n")[0]
    line = f"--{boundary}".encode(errors="replace") if boundary else first_line
    parts, end, _ = (b"\r\n" + form).partition(b"\r\n" + line + b"--")
    files = []
    for part in parts.split(b"\r\n" + line, MAX_PARTS)[1:]:
        headers, _, content = part.partition(b"\r\n\r\n")
        filename = find_filename(headers.lstrip())
        if filename is not None and content:
            files.append((filename, content))
    return files if end else []


def find_filename(headers: bytes) -> str | None:
    """Return the filename of a part, decoded; None if it is no file."""
    if headers.count(b";") > MAX_PARAMETERS:
        return None
    message = message_from_string(headers[:MAX_PART_HEADERS].decode(errors="replace"))
    try:
        parameters = dict(message.get_params([], "Content-Disposition"))
        name = parameters.get("filename")  # filename* comes last, and so wins
        if isinstance(name, tuple):
            name = utils.collapse_rfc2231_value(name)
        elif name:
            name = unquote(str(header.make_header(header.decode_header(name))))
    except (ValueError, LookupError, TypeError, errors.MessageError):  # malformed
        name = ""
    return name


# --- Other sites ---
# Any site can make its name resolve to this machine (DNS rebinding); a local name has no dot.
LOCAL_HOST = re.compile(r"([\w-]{1,63}|[\d.]{7,15}|\[[\w:.]{2,45}\])(:\d{1,5})?", re.ASCII)
ANY_HOST = re.compile(r"([\w.-]{1,253}|\[[\w:.]{2,45}\])(:\d{1,5})?", re.ASCII)


@web.middleware
async def refuse_other_sites(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse pages of other sites: otherwise any page that a visitor opens could use the server."""
    config, host = request.app[CONFIG], request.headers.get("Host")
    if host is not None and not is_own_host(config, host):  # curl may leave it out, no browser does
        raise web.HTTPForbidden(text=f"{host!r} is not this machine (--host, --public-url).")
    origin = request.headers.get("Origin")
    if origin is not None and not is_allowed(config, host, origin):
        text = f"Pages of {origin!r} may not use this (--allow-origin; --public-url if it is this)."
        raise web.HTTPForbidden(text=text)
    if request.method == "OPTIONS" and request.match_info.http_exception:
        return web.Response()  # a browser asks whether a page may post
    return await handler(request)


def is_own_host(config: Config, host: str) -> bool:
    """Tell whether a Host header means this server."""
    pattern = LOCAL_HOST if config.host in ("127.0.0.1", "::1", "localhost") else ANY_HOST
    name = host.lower().partition(":")[0]
    return name == urlsplit(config.public_url).hostname or pattern.fullmatch(host) is not None


def is_allowed(config: Config, host: str | None, origin: str) -> bool:
    """Tell whether pages of an origin may use the server: its own, and those of the option."""
    # A proxy that takes TLS off may pass the Host with the port of HTTP.
    sites = [f"http://{host}", f"https://{host}".removesuffix(":80"), *config.allow_origin]
    if config.public_url:  # a proxy may pass another Host
        sites.append(config.public_url)
    return "*" in sites or normalize(origin) in [normalize(site) for site in sites]


def normalize(url: str) -> str:
    """Return the origin of a URL as origins are compared (RFC 6454)."""
    scheme, _, rest = url.lower().partition("://")
    default_port = {"http": ":80", "https": ":443"}.get(scheme, "")
    return f"{scheme}://{rest.partition('/')[0].removesuffix(default_port)}"


def base_url(request: web.Request) -> str:
    """Return the URL by which this client knows the server, with a slash at its end."""
    site, host = request.app[CONFIG].public_url.rstrip("/"), request.headers.get("Host")
    if not site and host:  # HTTP/1.0 needs no Host: then the URL is a path
        site = f"{request.scheme}://{host}"
    return f"{site}{request.app.router['home'].url_for()}"


async def set_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Let allowed pages read the answers; none may frame them, and no browser guesses types."""
    for name in ("Origin", "Methods", "Headers"):
        response.headers.setdefault(f"Access-Control-Allow-{name}", "*")
    response.headers.setdefault("Cache-Control", "no-cache")  # browsers would keep an old page
    response.headers.setdefault("Content-Security-Policy", "frame-ancestors 'none'")
    response.headers.setdefault("X-Content-Type-Options", "nosniff")
    # What a browser keeps for one site is for no other.
    response.headers["Vary"] = "Accept, Origin"


def url_for_others(request: web.Request) -> str:
    """Return the URL for other machines, even to a client that knows the server as localhost."""
    base = base_url(request)
    is_local = re.match(r"https?://(localhost|127\.0\.0\.1|\[::1\])[:/]", base, re.IGNORECASE)
    return request.app.get(ADDRESS, base) if is_local else base


# --- Floods, and clients that do not read ---
MAX_UNREAD = 64 * 1024  # bytes that a watcher may leave unread
MAX_MESSAGES = 100  # of a watcher within MESSAGES_TIME end its connection; most send none
MESSAGES_TIME = 10  # seconds
PIECE = 64 * 1024  # bytes of an image that are sent at a time


@contextmanager
def place_in_queue(app: web.Application) -> Iterator[None]:
    """Give a photo a place while it waits and is in work; refuse it if there is none."""
    if len(app[JOBS]) >= app[CONFIG].threads * (1 + app[CONFIG].queue):
        raise web.HTTPServiceUnavailable(text="Too many photos wait (--queue).")
    job = asyncio.current_task()
    assert job  # a handler runs in a task
    app[JOBS].add(job)
    try:
        yield
    finally:
        app[JOBS].remove(job)


async def annotate_in_thread(app: web.Application, photo: bytes, drawn: bool) -> tuple[bytes, Json]:
    """Call annotate() in a thread; add took_ms, which counts the wait for a thread too."""
    begin = time.monotonic()
    loop = asyncio.get_running_loop()
    jpeg, found = await loop.run_in_executor(app[THREADS], annotate, photo, app[DETECTOR], drawn)
    found["took_ms"] = round((time.monotonic() - begin) * 1000)
    return jpeg, found


async def send_in_pieces(request: web.Request, response: web.StreamResponse) -> None:
    """Send a JPEG. Each piece is looked up: a slow client holds no image that was dropped."""
    try:
        for at in range(0, response.content_length or 0, PIECE):
            piece = (await find_jpeg(request))[at : at + PIECE]
            async with asyncio.timeout(request.app[CONFIG].upload_timeout):
                await response.write(piece)
    except Exception:  # otherwise an error page would be written into the image
        cut_off(request)


async def find_jpeg(request: web.Request) -> bytes:
    """Return the small or the full JPEG that a request asks for. Raises HTTPNotFound."""
    image = await find_image(request)
    if request.query.get("width") != str(SMALL_WIDTH) or image.found["width"] <= SMALL_WIDTH:
        return image.jpeg
    await make_small(request.app, image)
    return image.small


async def make_small(app: web.Application, image: Image) -> None:
    """Make the small JPEG of an image, unless it has one. One at a time: many ask for the same."""
    async with app[SHRINKING]:
        if not image.small:
            image.small = await asyncio.to_thread(shrink, image.jpeg)
            if await app[IMAGES].get(image.id):  # unless it was dropped meanwhile
                await app[IMAGES].put(image)  # it has grown, so others may have to go


def shrink(jpeg: bytes) -> bytes:
    """Return a JPEG of SMALL_WIDTH."""
    pixels = decode(jpeg)
    height, width, _ = pixels.shape
    size = (SMALL_WIDTH, max(1, round(height * SMALL_WIDTH / width)))
    pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 80])[1].tobytes()


def make_websocket(request: web.Request) -> web.WebSocketResponse:
    """Return a websocket for a watcher, with its limits. Raises an HTTPError."""
    websocket = web.WebSocketResponse(
        heartbeat=25,  # seconds; proxies drop a connection that is silent for 30 to 60
        autoping=False,  # wait_until_gone() answers pings, and counts them
        max_msg_size=1025,  # bytes, which aiohttp refuses: 1 KiB may come, though nobody reads it
        compress=False,  # it would take 256 KiB a watcher
        writer_limit=sys.maxsize,  # to send never waits; cut_off_if_deaf() limits what piles up
    )
    if not request.headers.get("Sec-WebSocket-Key", "").isascii():
        raise web.HTTPBadRequest(text="The Sec-WebSocket-Key is not base64.")
    if not websocket.can_prepare(request):
        text = f"This is a websocket: wscat -c ws{base_url(request).removeprefix('http')}faces"
        raise web.HTTPUpgradeRequired(text=text, headers={"Upgrade": "websocket"})
    if len(request.app[WATCHERS]) >= request.app[CONFIG].max_clients:
        raise web.HTTPServiceUnavailable(text="Too many watchers (--max-clients).")
    return websocket


async def wait_until_gone(websocket: web.WebSocketResponse, request: web.Request) -> None:
    """Answer the pings of a watcher until it leaves or floods the server."""
    times = deque[float](maxlen=MAX_MESSAGES)  # of its last messages
    async for message in websocket:
        cut_off_if_deaf(request)
        times.append(time.monotonic())
        if len(times) == MAX_MESSAGES and times[-1] - times[0] < MESSAGES_TIME:
            cut_off(request)
        elif message.type is WSMsgType.PING:
            await websocket.pong(message.data)


def cut_off_if_deaf(request: web.Request) -> None:
    """Cut off a watcher that does not read, so that no messages pile up."""
    if request.transport and request.transport.get_write_buffer_size() > MAX_UNREAD:
        cut_off(request)


def cut_off(request: web.Request) -> None:
    """End the connection of a client at once, whatever is still to be sent."""
    if request.transport:  # else it has left by itself
        request.transport.abort()


# --- Errors, in words ---
@web.middleware
async def explain_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer a refusal with a problem document (RFC 9457), also if no path or method fits."""
    # No error is passed on: with its traceback it forms a cycle, which would keep the photo.
    try:
        response = await handler(request)
        if isinstance(response, web.FileResponse):
            # This turns off sendfile(), which logs a traceback if the client leaves.
            response.enable_compression(web.ContentCoding.identity)
        return response
    except web.HTTPError as error:
        del error.headers["Content-Type"]  # that of its text
        detail = error.text
        if error is request.match_info.http_exception:  # no such path or method
            detail = f"There is no {request.method} {request.raw_path}; GET / tells what there is."
        response = explain(request, error.status, detail, headers=error.headers)
    except BadPhoto as error:
        response = explain(request, error.status, str(error))
    except (MemoryError, cv2.error) as error:
        response = explain(request, 503, str(error) or "Memory ran out.")
    except OSError:
        if request.transport and not request.transport.is_closing():
            raise
        return web.Response()  # the client has left, which is worth no traceback in the log

    if not request.content.at_eof():
        await send_early(request, response)
    return response


async def send_early(request: web.Request, response: web.Response) -> None:
    """Send a refusal, then skip the rest of the body: a client that still sends would miss it."""
    with suppress(OSError):  # the client has left, or the time is up
        await response.prepare(request)
        await response.write_eof()
        async with asyncio.timeout(request.app[CONFIG].upload_timeout):
            while not request.content.at_eof():  # hold no piece while waiting for the next
                await request.content.readany()
                await asyncio.sleep(0)


def explain(request: web.Request, status: int, detail: str | None, **options: Any) -> web.Response:
    """Return an error as a problem document, and log it."""
    log.info("%s %s %r: %d %s", request.remote, request.method, request.path, status, detail)
    problem = {"title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    if status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        problem["limit"] = request.app[CONFIG].max_mb * 2**20  # bytes
    response = reply(problem, status=status, content_type="application/problem+json", **options)
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        response.headers["Retry-After"] = "1"  # second
    return response


# ======== The detectors, closely ========
HAAR_STEP = 1.4  # how much larger each size of windows is than the last
HAAR_FINE_STEP = 1.05  # the same, in a close view
HAAR_ALIKE = 0.4  # of a side: windows whose edges are nearer to each other show one face
HAAR_WINDOWS = 4000  # the most that are grouped, in quadratic time
HAAR_BOXES = 1000  # the most that are looked at closely: it takes up to 3 ms for each
HAAR_VIEW = 45  # pixels, the side of a close view, which shows 7/5 of the box
HAAR_DOUBTFUL = 9  # windows that are enough if the second cascade agrees,
HAAR_SECOND = 12  # which means that it finds that many windows
HAAR_HINT = 3  # windows upright that may mean a tilted head
HAAR_TILT = 16  # degrees either way


def search(detector: HaarDetector, pixels: Pixels, smallest: float) -> list[Face]:
    """Find the faces that fill a window of this side, in pixels, or a larger one."""
    # Shrink the photo until the smallest windows are as large as those of the cascade.
    height, width, _ = pixels.shape
    shrunk = smallest / detector.cascade.getOriginalWindowSize()[0]
    size = [int(np.ceil(side / shrunk)) for side in (width, height)]
    gray = cv2.cvtColor(cv2.resize(pixels, size), cv2.COLOR_BGR2GRAY)

    faces = []
    for x, y, side, _ in propose(detector.cascade, gray):
        score = look_closely(detector, gray, x, y, side)
        if score >= detector.min_score:
            x, y, side = (round(each * shrunk) for each in (x, y, side))
            faces.append(Face(x, y, min(side, width - x), min(side, height - y), score))
    return faces


def propose(cascade: cv2.CascadeClassifier, gray: np.ndarray) -> Sequence[Sequence[int]]:
    """Scan in coarse steps, and group the windows that are alike; return x, y, side, side."""
    windows = [tuple(window) for window in cascade.detectMultiScale(gray, HAAR_STEP, 0)]
    windows.sort()  # OpenCV's threads find them in any order
    some = windows[:: 1 + len(windows) // HAAR_WINDOWS]  # from all parts of the photo
    boxes, _ = cv2.groupRectangles(some * 2, 1, HAAR_ALIKE)  # twice: OpenCV drops a group of one
    return boxes[:: 1 + len(boxes) // HAAR_BOXES]


def look_closely(detector: HaarDetector, gray: np.ndarray, x: int, y: int, side: int) -> int:
    """Return the score of a box: upright, in the eyes of the second cascade, or tilted."""
    middle, around = (x + side / 2, y + side / 2), side * 7 // 5
    view = (HAAR_VIEW, HAAR_VIEW)
    upright = cv2.resize(cv2.getRectSubPix(gray, (around, around), middle), view)
    score = count_windows(detector.cascade, upright)
    doubtful = HAAR_DOUBTFUL <= score < HAAR_SCORE
    if doubtful and count_windows(detector.second, upright) >= HAAR_SECOND:
        return HAAR_SCORE

    for degrees in (-HAAR_TILT, HAAR_TILT):
        if HAAR_HINT <= score < HAAR_SCORE:
            turn = cv2.getRotationMatrix2D(middle, degrees, HAAR_VIEW / around)
            turn[:, 2] += np.subtract(HAAR_VIEW / 2, middle)  # to the middle of the view
            tilted = cv2.warpAffine(gray, turn, view, borderMode=cv2.BORDER_REPLICATE)
            score = max(score, count_windows(detector.cascade, tilted))
    return score


def count_windows(cascade: cv2.CascadeClassifier, view: np.ndarray) -> int:
    """Count the windows in a close view and in its mirror image, where a face is one too."""
    count = len(cascade.detectMultiScale(view, HAAR_FINE_STEP, 0))
    if count:
        count += len(cascade.detectMultiScale(cv2.flip(view, 1), HAAR_FINE_STEP, 0))
    return count


# Longer side of a view in pixels: score from which a small face counts for a crowd (1.0: never)
YUNET_VIEWS = {416: 0.05, 832: 0.3, 1664: 1.0}
YUNET_SMALL = 16  # pixels of a view; it misses some smaller faces
YUNET_SHORTEST = 64  # pixels; with a shorter side it finds boxes of infinite size
YUNET_SCORE = 0.7  # of 1, that a face needs


class YuNetDetector(threading.local):
    """Find faces with the neural network YuNet (Wu et al., 2023); a score is from 0 to 1."""

    def __init__(self, network: bytes, min_score: float) -> None:
        cv2.setNumThreads(1)  # more would only wait for each other: each photo has a thread
        self.min_score = min_score or YUNET_SCORE
        model, no_config = np.frombuffer(network, np.uint8), np.zeros(0, np.uint8)
        least = min(YUNET_VIEWS.values())
        self.network = cv2.FaceDetectorYN.create("onnx", model, no_config, (64, 64), least)
        self(np.zeros((64, 64, 3), np.uint8))  # another network would fail only now

    def __call__(self, pixels: Pixels) -> list[Face]:
        height, width, _ = pixels.shape
        for longer, least in YUNET_VIEWS.items():  # the view grows while it shows a crowd
            scale = min(1, longer / max(width, height))
            size = [max(YUNET_SHORTEST, round(side * scale)) for side in (width, height)]
            self.network.setInputSize(size)
            _, rows = self.network.detect(cv2.resize(pixels, size))
            rows = [] if rows is None else rows  # x, y, width, height, five landmarks, score
            small = [row for row in rows if max(row[2:4]) < YUNET_SMALL and row[14] >= least]
            if len(small) < CROWD or scale == 1:
                break

        faces = []
        for row in rows:
            if row[14] >= self.min_score:
                corners = np.divide([row[:2], row[:2] + row[2:4]], size).clip(0, 1)  # as parts of 1
                (x, y), (right, bottom) = np.rint(corners * (width, height)).astype(int).tolist()
                faces.append(Face(x, y, right - x, bottom - y, round(float(row[14]), 3)))
        return faces


CASCADES = Path(cv2.__file__).with_name("data")
CASCADE = CASCADES / "haarcascade_frontalface_alt2.xml"
SECOND = HERE / "haarcascade_frontalface_default.xml"
YUNET = HERE / "models" / "face_detection_yunet_2023mar.onnx"
MAX_MODEL = 50_000_000  # bytes


def load_detector(model: str = "", min_score: float = 0) -> Detector:
    """Load YuNet, its .onnx file, a cascade's .xml file, or OpenCV's own cascade ("").

    Raises OSError or ValueError.
    """
    file = YUNET if model == "yunet" else Path(model or CASCADE)
    most = 1 if file.suffix == ".onnx" else HAAR_WINDOWS  # that a score can be
    if not 0 <= min_score <= most:
        raise ValueError(f"--min-score must be from 0 to {most}, not {min_score}")
    if not 0 < file.stat().st_size <= MAX_MODEL:  # that of a pipe or a device is 0
        raise ValueError(f"{file} must be a file of up to {MAX_MODEL} bytes")
    content = file.read_bytes()  # once: each thread can load it, whatever becomes of the file
    try:
        if file.suffix == ".onnx":
            return YuNetDetector(content, min_score)
        second = SECOND if SECOND.exists() else CASCADES / SECOND.name
        return HaarDetector(content, second.read_bytes(), min_score)
    except (SystemError, cv2.error):
        raise ValueError(f"{file} is neither a cascade nor a YuNet network") from None


def load_cascade(xml: bytes) -> cv2.CascadeClassifier:
    """Load a cascade. Raises ValueError, SystemError or cv2.error."""
    if not hasattr(cv2, "CascadeClassifier"):
        raise ValueError("OpenCV 5 has no cascades (pip install -r requirements.txt)")
    cascade = cv2.CascadeClassifier()  # from a text, since OpenCV cannot open every path
    storage = cv2.FileStorage(xml.decode("latin-1"), cv2.FILE_STORAGE_MEMORY)
    if not cascade.read(storage.getFirstTopLevelNode()):
        raise cv2.error("not a cascade")
    return cascade


# ======== Start and stop ========
LONGEST_STOP = 4  # seconds for the photos under way; Docker kills after 10
MAX_NUMBER = 1_000_000  # that a number may be: the milliseconds of a timeout must fit into a C int
PUBLIC_URL = re.compile(r"https?://([\w.-]+|\[[\w:.]+\])(:[1-6]?\d{1,4})?(/[\w.~%/-]*)?", re.ASCII)


async def finish(app: web.Application) -> None:
    """Finish the photos under way, then say goodbye to the watchers."""
    if app[JOBS]:
        await asyncio.wait([*app[JOBS]], timeout=LONGEST_STOP)
    goodbyes = [each.close(code=WSCloseCode.GOING_AWAY, drain=False) for each in app[WATCHERS]]
    await asyncio.gather(*goodbyes)


async def end_threads(app: web.Application) -> None:
    """End the threads, once no handler needs them; do not wait for one that takes a minute."""
    app[THREADS].shutdown(wait=False, cancel_futures=True)


def check(config: Config) -> Config:
    """Return the settings, the public URL without blanks. Raises ValueError if one is bad."""
    for setting in fields(config):
        name, minimum = setting.name.replace("_", "-"), setting.metadata["minimum"]
        value = getattr(config, setting.name)
        if isinstance(value, int) and not minimum <= value <= MAX_NUMBER:
            raise ValueError(f"--{name} must be {minimum} to {MAX_NUMBER}")
    if not config.host or not config.host.isprintable():  # "" would mean any address
        raise ValueError(f"--host must be a name or an address, not {config.host!r}")
    url = config.public_url.strip()
    if url and not (PUBLIC_URL.fullmatch(url) and urlsplit(url).hostname):  # or urlsplit() raises
        raise ValueError(f"--public-url must be like https://faces.example.org, not {url!r}")
    return replace(config, public_url=url)


def make_parser(kind: type[Config] = Config) -> argparse.ArgumentParser:
    """Return the parser of the command line, with an option for each of the settings."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for setting in fields(kind):
        name, default = "--" + setting.name.replace("_", "-"), setting.default
        explanation = f"{setting.metadata['help']} (default: {default or 'none'})"
        if isinstance(default, tuple):
            parser.add_argument(name, action="append", default=[], help=explanation)
        else:
            parser.add_argument(name, type=type(default), default=default, help=explanation)
    return parser


def open_sockets(config: Config) -> list[socket.socket]:
    """Listen on an address; for 127.0.0.1 also on ::1, since localhost may mean either."""
    host, port = config.host, config.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listeners = [socket.create_server((host, port), family=family, dualstack_ipv6=host == "::")]
    if host in ("127.0.0.1", "localhost"):
        port = listeners[0].getsockname()[1]
        try:
            listeners.append(socket.create_server(("::1", port), family=socket.AF_INET6))
        except OSError as error:  # there is no IPv6 here, or the port is taken
            log.warning("Not listening on ::1: %s", error)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux cuts off who does not read
        milliseconds = 1000 * config.upload_timeout
        for listener in listeners:
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
    return listeners


def address_for_others(host: str) -> str:
    """Return the address of this machine in its network if it listens on all, else the host."""
    if host in ("0.0.0.0", "::"):
        with socket.socket(type=socket.SOCK_DGRAM) as probe, suppress(OSError):
            probe.connect(("192.0.2.1", 9))  # sends nothing, but gets an address
            host = probe.getsockname()[0]
    return f"[{host}]" if ":" in host else host


def encode_qr(text: str) -> np.ndarray:
    """Return a QR code, a pixel for each module, with the border of 4 that the standard wants."""
    return np.pad(cv2.QRCodeEncoder.create().encode(text), 2, constant_values=255)  # it has 2


def draw_in_terminal(code: np.ndarray) -> str:
    """Return a QR code in block characters, two rows in a line, white on black on any terminal."""
    light = np.pad(code > 0, ((0, len(code) % 2), (0, 0)))
    blocks = np.array([*" ▄▀█"])[2 * light[::2] + light[1::2]]
    return "".join(f"  \033[97;40m{''.join(line)}\033[0m\n" for line in blocks)


def serve(app: web.Application) -> None:
    """Listen, say where, and serve until SIGINT or SIGTERM. Raises OSError or RuntimeError."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass  # none runs, as it should be
    else:
        raise RuntimeError("A loop runs already: use aiohttp.web.AppRunner (docs/running.md).")
    config = app[CONFIG]
    listeners = open_sockets(config)
    address = f"{address_for_others(config.host)}:{listeners[0].getsockname()[1]}"
    app[ADDRESS] = f"http://{address}/"
    usage = USAGE.format(f"://{address}")
    if config.host == "0.0.0.0" and sys.stdout.isatty():
        usage += "\n" + draw_in_terminal(encode_qr(app[ADDRESS]))
    web_protocol.MAX_MSG_QUEUE_SIZE = 2  # requests that a client may send ahead, each up to 1 MB
    web.run_app(
        app,
        sock=listeners,
        print=lambda _: print(usage, flush=True),  # printed only when SIGTERM already works
        access_log=None,
        auto_decompress=False,  # a small body could become a huge one
        keepalive_timeout=config.upload_timeout,
        lingering_time=0,  # send_early() lingers; here, tiny chunks would hold others up
        read_bufsize=4096,  # bytes of a body that are read ahead; it also waits after 256 chunks
        shutdown_timeout=1,  # second, for handlers that finish() did not end
    )


def is_news(record: logging.LogRecord) -> bool:
    """Return False for what asyncio says a hundred times a second when open files run out."""
    return not re.match(".*(accept|serving)", str(record.msg))


def main(kind: type[Config] = Config, create: Callable[..., web.Application] = create_app) -> None:
    """Run the server with the options of the command line; your own program may add some."""
    options = vars(make_parser(kind).parse_args())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("asyncio").addFilter(is_news)
    try:
        with suppress(web.GracefulExit, KeyboardInterrupt):  # a second Ctrl+C
            serve(create(kind(**options)))
    except (OSError, OverflowError, ValueError) as error:
        hint = "--host, --port, --public-url, --model, requirements.txt"
        sys.exit(f"The server cannot start ({hint}): {error}")
    os._exit(0)  # Python would wait for threads whose photos take minutes


if __name__ == "__main__":
    main()
