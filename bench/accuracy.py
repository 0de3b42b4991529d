"""How many of the faces in a folder of labelled photographs are found, and in what time?

    python bench/accuracy.py FOLDER [--model FILE] [--min-score N] [--worst worst.jpg]

FOLDER has photos/, faces.json and score.py, which gives the rule. Prints precision, recall, F1 and the false boxes on
photographs without a face, and the processor time of detection on one thread, against that of the cascade's usual call
on the whole photo (scale 1.1, 5 neighbours, 30 px), which takes turns with it. Writes the worst photographs into one
picture: found faces green, missed ones red, false ones yellow.
"""

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path

import cv2
import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import server  # noqa: E402

Box = tuple[float, float, float, float]
GREEN, RED, YELLOW = (0, 255, 0), (0, 0, 255), (0, 255, 255)


def usual_call(cascade: cv2.CascadeClassifier, image: server.Pixels) -> list[Box]:
    """What most examples do."""
    grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    return [tuple(box) for box in cascade.detectMultiScale(grey, 1.1, 5, minSize=(30, 30))]


def tile(image: server.Pixels, boxes: list[tuple[Box, tuple[int, int, int]]], side: int = 400) -> server.Pixels:
    """The photo with its boxes, in a square."""
    scale = side / max(image.shape[:2])
    small = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    for box, color in boxes:
        x, y, width, height = (round(value * scale) for value in box)
        cv2.rectangle(small, (x, y), (x + width, y + height), color, 2)
    square = np.zeros((side, side, 3), np.uint8)
    square[: small.shape[0], : small.shape[1]] = small[:side, :side]
    return square


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="", help="as of server.py")
    parser.add_argument("--min-score", type=float, default=0, help="as of server.py")
    parser.add_argument("--worst", type=Path, default=Path("worst.jpg"), help="the picture to write (worst.jpg)")
    options = parser.parse_args()

    cv2.setNumThreads(1)
    spec = importlib.util.spec_from_file_location("score", options.folder / "score.py")
    assert spec and spec.loader
    rule = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rule)
    truth = json.loads((options.folder / "faces.json").read_text())
    detector = server.load_detector(options.model, options.min_score)
    cascade = cv2.CascadeClassifier(str(ROOT / server.CASCADE))
    found: dict[str, list[Box]] = {}
    usual: dict[str, list[Box]] = {}
    spent, spent_usual = 0.0, 0.0
    worst: list[tuple[int, str]] = []
    for name, photo in truth.items():
        image = cv2.imread(str(options.folder / "photos" / name))
        start = time.thread_time()
        found[name] = [face[:4] for face in detector(image)]
        between = time.thread_time()
        usual[name] = usual_call(cascade, image)
        spent, spent_usual = spent + between - start, spent_usual + time.thread_time() - between
        result = rule.score({name: found[name]}, {name: photo})
        errors = len(photo["faces"]) + len(found[name]) - 2 * round(result["recall"] * len(photo["faces"]))
        worst.append((errors, name))

    print("| detector | precision | recall | F1 | false faces on photos without any | time |\n" + "| --- " * 6 + "|")
    for name, boxes, time_ in [("usual call", usual, 1.0), (options.model or "ours", found, spent / spent_usual)]:
        result = rule.score(boxes, truth)
        numbers = " | ".join(f"{result[key]:.3f}" for key in ("precision", "recall", "f1"))
        print(f"| {Path(name).name} | {numbers} | {result['false_on_empty']} | {time_:.3f} |")

    tiles = []
    for _, name in sorted(worst, reverse=True)[:20]:
        faces = [tuple(face) for face in truth[name]["faces"]]
        boxes = [(box, GREEN if any(rule.iou(box, face) >= 0.4 for face in faces) else YELLOW) for box in found[name]]
        boxes += [(face, RED) for face in faces if not any(rule.iou(box, face) >= 0.4 for box in found[name])]
        tiles.append(tile(cv2.imread(str(options.folder / "photos" / name)), boxes))
    blank = [np.zeros_like(tiles[0])] * (-len(tiles) % 5)
    rows = [np.hstack((tiles + blank)[at : at + 5]) for at in range(0, len(tiles), 5)]
    cv2.imwrite(str(options.worst), np.vstack(rows))


if __name__ == "__main__":
    main()
