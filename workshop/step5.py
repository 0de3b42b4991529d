"""Step 5, trust: limit what one client can do to another.

$ python workshop/step5.py
$ curl --data-binary @README.md http://127.0.0.1:8282/image
"""

import asyncio
import contextlib
import os
import threading
import uuid
from collections import OrderedDict

os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", "25000000")  # read by the import of cv2

import cv2
import numpy as np
from aiohttp import WSCloseCode, web

CASCADE = cv2.data.haarcascades + "haarcascade_frontalface_default.xml"
DETECTOR: web.AppKey["HaarDetector"] = web.AppKey("DETECTOR")
IMAGES: web.AppKey[OrderedDict[str, bytes]] = web.AppKey("IMAGES")
UPLOADS = web.AppKey("UPLOADS", asyncio.Semaphore)
WATCHERS: web.AppKey[dict[web.WebSocketResponse, asyncio.Transport]] = web.AppKey("WATCHERS")
KEEP = 100  # images
UPLOAD_TIMEOUT = 40  # seconds
MAX_UNREAD = 16 * 1024  # bytes that a watcher may leave unread; asyncio makes nobody wait before


class BadPhoto(Exception):
    """There is no photo in these bytes, or too large a one; the text says which."""


def annotate(photo: bytes, detector: "HaarDetector") -> tuple[bytes, list[list[int]]]:
    """Draw a box around each face in a photo; return the JPEG, and the boxes."""
    pixels = decode(photo)
    faces = np.array(detector.cascade.detectMultiScale(pixels, 1.1, 5)).tolist()
    draw(pixels, faces)
    return cv2.imencode(".jpg", pixels)[1].tobytes(), faces


def decode(photo: bytes) -> np.ndarray:
    """Decode a photo. Raises BadPhoto."""
    try:
        pixels = cv2.imdecode(np.frombuffer(photo, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:
        raise BadPhoto("The body is empty, or the photo has over 25 megapixels.") from None
    if pixels is None:
        raise BadPhoto("This is no photo, or a damaged one; send a JPEG, PNG or WebP.")
    return pixels


def draw(pixels: np.ndarray, faces: list[list[int]]) -> None:
    """Draw a green box around each face."""
    for box in faces:
        cv2.rectangle(pixels, box, (0, 255, 0), 2)


class HaarDetector(threading.local):
    """A cascade for each thread: OpenCV lets no two threads use one at a time."""

    def __init__(self) -> None:
        self.cascade = cv2.CascadeClassifier(CASCADE)


async def announce(app: web.Application, url: str) -> None:
    """Send a URL to every watcher, and cut off those that do not read."""
    # While one is sent to, others come and go; so the loop needs a copy.
    for websocket, transport in list(app[WATCHERS].items()):
        if transport.get_write_buffer_size() > MAX_UNREAD:
            transport.abort()  # so that sending fails
        with contextlib.suppress(ConnectionError):  # it has just left
            await websocket.send_str(url)


async def get_faces(request: web.Request) -> web.WebSocketResponse:
    """GET /faces: a websocket that gets the URL of each new image."""
    websocket = web.WebSocketResponse(timeout=1)  # second, for its goodbye
    watchers, transport = request.app[WATCHERS], request.transport
    await websocket.prepare(request)
    watchers[websocket] = transport
    try:
        async for _ in websocket:
            pass  # whatever it says; the loop ends when it leaves
    finally:
        del watchers[websocket]
    return websocket


async def post_image(request: web.Request) -> web.Response:
    """POST /image: draw a box around each face, keep the image, and announce it."""
    try:
        async with request.app[UPLOADS]:
            async with asyncio.timeout(UPLOAD_TIMEOUT):
                photo = await request.read()
            jpeg, faces = await asyncio.to_thread(annotate, photo, request.app[DETECTOR])
    except TimeoutError:
        raise web.HTTPRequestTimeout(text="The upload took too long.") from None
    except BadPhoto as error:
        raise web.HTTPUnprocessableEntity(text=str(error)) from None

    id, images = str(uuid.uuid4()), request.app[IMAGES]
    images[id] = jpeg
    if len(images) > KEEP:
        images.popitem(last=False)
    url = str(request.url / id)
    boxes = [{"x": x, "y": y, "width": w, "height": h} for x, y, w, h in faces]
    await announce(request.app, url)
    answer = {"id": id, "url": url, "faces": boxes}
    return web.json_response(answer, status=201, headers={"Location": url})


async def get_image(request: web.Request) -> web.Response:
    """GET /image/{id}: the photo with its boxes."""
    id, images = request.match_info["id"], request.app[IMAGES]
    if id not in images:
        raise web.HTTPNotFound(text="There is no such image, or no longer.")
    images.move_to_end(id)
    return web.Response(body=images[id], content_type="image/jpeg")


def create_app() -> web.Application:
    """Return the server."""
    app = web.Application(client_max_size=20 * 2**20)
    app[DETECTOR] = HaarDetector()
    app[IMAGES] = OrderedDict()
    app[UPLOADS] = asyncio.Semaphore(16)  # at a time; others wait
    app[WATCHERS] = {}
    app.on_shutdown.append(finish)
    app.router.add_get("/faces", get_faces)
    app.router.add_post("/image", post_image)
    app.router.add_get("/image/{id}", get_image)
    return app


async def finish(app: web.Application) -> None:
    """Say goodbye to the watchers; otherwise their handlers would go on for a minute."""
    goodbyes = [each.close(code=WSCloseCode.GOING_AWAY, drain=False) for each in app[WATCHERS]]
    await asyncio.gather(*goodbyes)
    for transport in app[WATCHERS].values():
        transport.abort()


def main() -> None:
    """Serve until Ctrl-C."""
    web.run_app(create_app(), host="127.0.0.1", port=8282)


if __name__ == "__main__":
    main()
