"""Step 4, watchers: everybody at the websocket /faces gets the URL of each new image.

$ python workshop/step4.py
$ python watch.py
$ curl --data-binary @samples/astronaut.jpg http://127.0.0.1:8282/image
"""

import asyncio
import contextlib
import threading
import uuid

import cv2
import numpy as np
from aiohttp import web

CASCADE = cv2.data.haarcascades + "haarcascade_frontalface_default.xml"
DETECTOR: web.AppKey["HaarDetector"] = web.AppKey("DETECTOR")
IMAGES: web.AppKey[dict[str, bytes]] = web.AppKey("IMAGES")
WATCHERS: web.AppKey[set[web.WebSocketResponse]] = web.AppKey("WATCHERS")


def annotate(photo: bytes, detector: "HaarDetector") -> tuple[bytes, list[list[int]]]:
    """Draw a box around each face in a photo; return the JPEG, and the boxes."""
    pixels = cv2.imdecode(np.frombuffer(photo, np.uint8), cv2.IMREAD_COLOR)
    faces = np.array(detector.cascade.detectMultiScale(pixels, 1.1, 5)).tolist()
    draw(pixels, faces)
    return cv2.imencode(".jpg", pixels)[1].tobytes(), faces


def draw(pixels: np.ndarray, faces: list[list[int]]) -> None:
    """Draw a green box around each face."""
    for box in faces:
        cv2.rectangle(pixels, box, (0, 255, 0), 2)


class HaarDetector(threading.local):
    """A cascade for each thread: OpenCV lets no two threads use one at a time."""

    def __init__(self) -> None:
        self.cascade = cv2.CascadeClassifier(CASCADE)


async def announce(app: web.Application, url: str) -> None:
    """Send a URL to every watcher."""
    # While one is sent to, others come and go; so the loop needs a copy.
    for websocket in list(app[WATCHERS]):
        with contextlib.suppress(ConnectionError):  # it has just left
            await websocket.send_str(url)


async def get_faces(request: web.Request) -> web.WebSocketResponse:
    """GET /faces: a websocket that gets the URL of each new image."""
    websocket = web.WebSocketResponse()
    watchers = request.app[WATCHERS]
    await websocket.prepare(request)
    watchers.add(websocket)
    try:
        async for _ in websocket:
            pass  # whatever it says; the loop ends when it leaves
    finally:
        watchers.remove(websocket)
    return websocket


async def post_image(request: web.Request) -> web.Response:
    """POST /image: draw a box around each face, keep the image, and announce it."""
    photo = await request.read()
    jpeg, faces = await asyncio.to_thread(annotate, photo, request.app[DETECTOR])

    id = str(uuid.uuid4())
    request.app[IMAGES][id] = jpeg
    url = str(request.url / id)
    boxes = [{"x": x, "y": y, "width": w, "height": h} for x, y, w, h in faces]
    await announce(request.app, url)
    answer = {"id": id, "url": url, "faces": boxes}
    return web.json_response(answer, status=201, headers={"Location": url})


async def get_image(request: web.Request) -> web.Response:
    """GET /image/{id}: the photo with its boxes."""
    jpeg = request.app[IMAGES].get(request.match_info["id"])
    if jpeg is None:
        raise web.HTTPNotFound
    return web.Response(body=jpeg, content_type="image/jpeg")


def create_app() -> web.Application:
    """Return the server."""
    app = web.Application(client_max_size=20 * 2**20)
    app[DETECTOR] = HaarDetector()
    app[IMAGES] = {}
    app[WATCHERS] = set()
    app.router.add_get("/faces", get_faces)
    app.router.add_post("/image", post_image)
    app.router.add_get("/image/{id}", get_image)
    return app


def main() -> None:
    """Serve until Ctrl-C."""
    web.run_app(create_app(), host="127.0.0.1", port=8282)


if __name__ == "__main__":
    main()
