"""Step 2, a server: post a photo, and get it back with its boxes.

$ python workshop/step2.py
$ curl -o out.jpg --data-binary @samples/astronaut.jpg http://127.0.0.1:8282/image
"""

import asyncio
import threading

import cv2
import numpy as np
from aiohttp import web

CASCADE = cv2.data.haarcascades + "haarcascade_frontalface_default.xml"
DETECTOR: web.AppKey["HaarDetector"] = web.AppKey("DETECTOR")


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


async def post_image(request: web.Request) -> web.Response:
    """POST /image: draw a box around each face."""
    photo = await request.read()
    jpeg, _ = await asyncio.to_thread(annotate, photo, request.app[DETECTOR])
    return web.Response(body=jpeg, content_type="image/jpeg")


def create_app() -> web.Application:
    """Return the server."""
    app = web.Application(client_max_size=20 * 2**20)
    app[DETECTOR] = HaarDetector()
    app.router.add_post("/image", post_image)
    return app


def main() -> None:
    """Serve until Ctrl-C."""
    web.run_app(create_app(), host="127.0.0.1", port=8282)


if __name__ == "__main__":
    main()
