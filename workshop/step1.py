"""Step 1, a photo: find the faces in it, and draw a box around each.

$ python workshop/step1.py samples/astronaut.jpg out.jpg
[[178, 67, 92, 92]]
"""

import sys
from pathlib import Path

import cv2
import numpy as np

CASCADE = cv2.data.haarcascades + "haarcascade_frontalface_default.xml"


def annotate(photo: bytes) -> tuple[bytes, list[list[int]]]:
    """Draw a box around each face in a photo; return the JPEG, and the boxes."""
    pixels = cv2.imdecode(np.frombuffer(photo, np.uint8), cv2.IMREAD_COLOR)
    faces = np.array(cv2.CascadeClassifier(CASCADE).detectMultiScale(pixels, 1.1, 5)).tolist()
    draw(pixels, faces)
    return cv2.imencode(".jpg", pixels)[1].tobytes(), faces


def draw(pixels: np.ndarray, faces: list[list[int]]) -> None:
    """Draw a green box around each face."""
    for box in faces:
        cv2.rectangle(pixels, box, (0, 255, 0), 2)


def main() -> None:
    """Read one file, and write the other."""
    source, target = sys.argv[1:]
    jpeg, faces = annotate(Path(source).read_bytes())
    Path(target).write_bytes(jpeg)
    print(faces)


if __name__ == "__main__":
    main()
