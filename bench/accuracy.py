"""How many labelled faces are found in a folder of photographs, how many false ones, in what time?

    python bench/accuracy.py FOLDER [--model FILE] [--min-score N] [--curve SVG] [--worst JPG]
    python bench/accuracy.py FOLDER --crowd

FOLDER has photos/, faces.json and score.py, which gives the rule. The time is the processor's on
one thread, against that of the cascade's usual call (whole photo, scale 1.1, 5 neighbours, 30 px),
which takes turns with the detectors. In the last column, the least score is chosen on nine tenths
of the photographs and tried on the last tenth. --crowd makes photos of crowds from the labelled
faces instead, and prints how many are found.
"""

import argparse
import importlib.util
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import server  # noqa: E402

Box = tuple[float, ...]  # x, y, width, height, and maybe a score
Found = dict[str, list[Box]]  # by the photo's name
GREEN, RED, YELLOW = (0, 255, 0), (0, 0, 255), (0, 255, 255)
FOLDS = 10
HEAD = "| detector | precision | recall | F1 | false faces on empty photos | time | F1 in folds |"


def load_rule(folder: Path) -> Any:
    """The module score.py of the folder."""
    spec = importlib.util.spec_from_file_location("score", folder / "score.py")
    assert spec and spec.loader
    rule = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rule)
    return rule


def read(folder: Path, name: str) -> server.Pixels:
    """A photo of the folder."""
    image = cv2.imread(str(folder / "photos" / name))
    assert image is not None, name
    return image


def usual_call() -> Callable[[server.Pixels], list[Box]]:
    """What most examples do."""
    cascade = cv2.CascadeClassifier(str(ROOT / "haarcascade_frontalface_default.xml"))

    def detect(image: server.Pixels) -> list[Box]:
        grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
        return [
            (*box, 0)
            for box in np.array(cascade.detectMultiScale(grey, 1.1, 5, minSize=(30, 30))).tolist()
        ]

    return detect


def thresholds(haar: bool) -> list[float]:
    """The least scores to try."""
    return [float(score) for score in range(2, 41)] if haar else [n / 50 for n in range(5, 50)]


def at_least(score: float, found: Found) -> Found:
    """The boxes with at least a score."""
    return {name: [box[:4] for box in boxes if box[4] >= score] for name, boxes in found.items()}


def curve(
    rule: Any, found: Found, truth: dict[str, Any], scores: list[float]
) -> list[tuple[float, ...]]:
    """Least score, precision, recall and F1."""
    results = [(score, rule.score(at_least(score, found), truth)) for score in scores]
    return [
        (score, result["precision"], result["recall"], result["f1"]) for score, result in results
    ]


def folds(
    rule: Any, found: Found, truth: dict[str, Any], scores: list[float]
) -> list[tuple[float, ...]]:
    """For each fold: the least score that is best on the others, and how it does on the fold."""
    names = sorted(truth)
    random.Random(1).shuffle(names)
    rows = []
    for number in range(FOLDS):
        held_out = {name: truth[name] for name in names[number::FOLDS]}
        others = {name: truth[name] for name in names if name not in held_out}
        best = max(curve(rule, found, others, scores), key=lambda row: row[3])[0]
        rows += curve(rule, found, held_out, [best])
    return rows


def draw(curves: dict[str, list[tuple[float, ...]]], usual: dict[str, float]) -> str:
    """Precision over recall, from 0.7 to 1, as an SVG; the cross is the usual call."""
    side, colors = 400, ("#06c", "#c60")
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-60 -20 {side + 80} {side + 70}">']

    def at(recall: float, precision: float) -> tuple[float, float]:
        return round((recall - 0.7) / 0.3 * side, 1), round((1 - precision) / 0.3 * side, 1)

    for tick in (0.7, 0.8, 0.9, 1.0):
        x, y = at(tick, tick)
        lines.append(f'<path d="M{x} 0V{side}M0 {y}H{side}" stroke="#ddd"/>')
        lines.append(
            f'<text x="{x - 10}" y="{side + 18}">{tick}</text>'
            f'<text x="-32" y="{y + 5}">{tick}</text>'
        )
    lines.append(
        f'<text x="{side / 2 - 20}" y="{side + 38}">recall</text>'
        '<text x="-55" y="-6">precision</text>'
    )
    for color, (name, rows) in zip(colors, curves.items(), strict=False):
        points = [at(row[2], row[1]) for row in rows if row[1] >= 0.7 and row[2] >= 0.7]
        path = " ".join(f"{x},{y}" for x, y in points)
        lines.append(f'<polyline points="{path}" fill="none" stroke="{color}"/>')
        y = side - 30 + 20 * list(curves).index(name)
        lines.append(f'<text x="8" y="{y}" fill="{color}">{name}</text>')
    x, y = at(usual["recall"], usual["precision"])
    lines.append(f'<path d="M{x - 5} {y}h10M{x} {y - 5}v10" stroke="#000"/></svg>')
    return "\n".join(lines)


def tile(
    image: server.Pixels, boxes: list[tuple[Box, tuple[int, int, int]]], side: int = 400
) -> server.Pixels:
    """The photo with its boxes, in a square."""
    scale = side / max(image.shape[:2])
    small = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    for box, color in boxes:
        x, y, width, height = (round(value * scale) for value in box)
        cv2.rectangle(small, (x, y), (x + width, y + height), color, 2)
    square = np.zeros((side, side, 3), np.uint8)
    square[: small.shape[0], : small.shape[1]] = small[:side, :side]
    return square


def worst_photos(rule: Any, folder: Path, found: Found, truth: dict[str, Any]) -> server.Pixels:
    """The 20 worst photographs: found faces green, missed ones red, false ones yellow."""

    def errors(name: str) -> int:
        faces = len(truth[name]["faces"])
        result = rule.score({name: found[name]}, {name: truth[name]})
        return int(faces + len(found[name]) - 2 * round(result["recall"] * faces))

    tiles = []
    for name in sorted(truth, key=errors, reverse=True)[:20]:
        faces = [tuple(face) for face in truth[name]["faces"]]
        boxes = [
            (box, GREEN if any(rule.iou(box, face) >= 0.4 for face in faces) else YELLOW)
            for box in found[name]
        ]
        boxes += [
            (face, RED)
            for face in faces
            if not any(rule.iou(box, face) >= 0.4 for box in found[name])
        ]
        tiles.append(tile(read(folder, name), boxes))
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % 5)
    return np.vstack([np.hstack(tiles[at : at + 5]) for at in range(0, len(tiles), 5)])


def is_yunet(model: str) -> bool:
    return model == "yunet" or model.endswith(".onnx")


# --- Crowds: mosaics of the labelled faces, each different ---
CROWD_PARTS = (21, 32, 45, 56, 77, 100)  # of the longer side, that a face takes
CROWD_SIZE = (2000, 1500)  # pixels
CROWD_MOST = 308  # faces


def heads(rule: Any, folder: Path, truth: dict[str, Any]) -> list[tuple[server.Pixels, Box]]:
    """Cut out each face that is alone in a square of twice its size, with its box in there."""
    found = []
    for name, photo in truth.items():
        image = read(folder, name)
        for x, y, width, height in photo["faces"]:
            side = 2 * max(width, height)
            left, top = int(x + width / 2 - side / 2), int(y + height / 2 - side / 2)
            square = (left, top, side, side)
            others = [
                face for face in photo["faces"] + photo["ignore"] if rule.overlap(square, face)
            ]
            inside = 0 <= left <= image.shape[1] - side and 0 <= top <= image.shape[0] - side
            if inside and len(others) == 1 and min(width, height) >= 40:
                head = image[top : top + side, left : left + side]
                found.append((head, (x - left, y - top, width, height)))
    return found


def crowd(
    heads: list[tuple[server.Pixels, Box]], part: int, random: np.random.Generator
) -> tuple[server.Pixels, list[Box]]:
    """Return a photo of a crowd, whose faces are this part of its longer side, and their boxes."""
    width, height = CROWD_SIZE
    tile = 2 * width // part + 1
    photo = np.repeat(np.linspace(60, 160, height, dtype=np.uint8), width * 3)
    photo = photo.reshape(height, width, 3)
    places = [
        (left, top)
        for top in range(0, height - tile, tile)
        for left in range(0, width - tile, tile)
    ]
    places = places[:: -(-len(places) // CROWD_MOST)]
    boxes = []
    for number, (left, top) in enumerate(places):
        head, (x, y, face_width, face_height) = heads[number % len(heads)]
        scale = width / part / max(face_width, face_height) * random.uniform(0.93, 1.07)
        side = min(tile, round(len(head) * scale))
        shown = cv2.resize(head, (side, side), interpolation=cv2.INTER_AREA)
        shown = cv2.convertScaleAbs(shown, alpha=random.uniform(0.85, 1.1))
        photo[top : top + side, left : left + side] = shown
        scale = side / len(head)
        boxes.append((left + x * scale, top + y * scale, face_width * scale, face_height * scale))
    return photo, boxes


def print_crowds(rule: Any, folder: Path, truth: dict[str, Any]) -> None:
    """Print the recall of both detectors in crowds, in all and by thirds from left to right."""
    random = np.random.default_rng(1)
    all_heads = heads(rule, folder, truth)
    random.shuffle(all_heads)
    print("| faces of | faces | detector | recall | precision | left | middle | right |")
    print("| --- " * 8 + "|")
    for part in CROWD_PARTS:
        photo, boxes = crowd(all_heads, part, random)
        for model in ("", "yunet"):
            found = {"crowd": [face[:4] for face in server.load_detector(model)(photo)]}
            cells = [f"1/{part}", str(len(boxes)), model or "default"]
            result = rule.score(found, {"crowd": {"faces": boxes, "ignore": []}})
            cells += [f"{result[key]:.3f}" for key in ("recall", "precision")]
            for third in range(3):
                left, right = (CROWD_SIZE[0] * edge / 3 for edge in (third, third + 1))
                there = [box for box in boxes if left <= box[0] + box[2] / 2 < right]
                result = rule.score(found, {"crowd": {"faces": there, "ignore": []}})
                cells.append(f"{result['recall']:.2f}")
            print("|", " | ".join(cells), "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="", help="one more detector, as of server.py")
    parser.add_argument(
        "--min-score",
        type=float,
        default=0,
        help="as of server.py, of that model or else the default",
    )
    parser.add_argument("--curve", type=Path, help="write precision over recall as an SVG")
    parser.add_argument("--worst", type=Path, help="write the worst photographs as one picture")
    parser.add_argument("--crowd", action="store_true", help="print the recall in crowds instead")
    options = parser.parse_args()

    cv2.setNumThreads(1)
    rule = load_rule(options.folder)
    truth = json.loads((options.folder / "faces.json").read_text())
    if options.crowd:
        print_crowds(rule, options.folder, truth)
        return
    wanted = {"default": options.min_score if not options.model else 0}
    if options.model:
        wanted[options.model] = options.min_score
    least = {}
    detectors: dict[str, Callable[[server.Pixels], Any]] = {"usual call": usual_call()}
    for name, score in wanted.items():
        model = "" if name == "default" else name
        least[name] = score or (server.YUNET_SCORE if is_yunet(model) else server.HAAR_SCORE)
        detectors[name] = server.load_detector(
            model, 0.1 if is_yunet(model) else 1
        )  # all, for the curve
    found: dict[str, Found] = {name: {} for name in detectors}
    spent = dict.fromkeys(detectors, 0.0)
    for photo in truth:
        image = read(options.folder, photo)
        for name, detect in detectors.items():
            start = time.thread_time()
            found[name][photo] = [tuple(face) for face in detect(image)]
            spent[name] += time.thread_time() - start

    print(HEAD + "\n" + "| --- " * 7 + "|")
    curves = {}
    for name, boxes in found.items():
        result, crossed = rule.score(at_least(least.get(name, 0), boxes), truth), ""
        if name in least:
            scores = thresholds(haar=not is_yunet(name))
            curves[Path(name).name] = curve(rule, boxes, truth, scores)
            parts = [row[3] for row in folds(rule, boxes, truth, scores)]
            crossed = f"{np.mean(parts):.3f} ± {np.std(parts):.3f}"
        numbers = [f"{result[key]:.3f}" for key in ("precision", "recall", "f1")]
        ratio = f"{spent[name] / spent['usual call']:.3f}"
        print(
            "|",
            " | ".join([Path(name).name, *numbers, str(result["false_on_empty"]), ratio, crossed]),
            "|",
        )

    if options.curve:
        options.curve.write_text(draw(curves, rule.score(at_least(0, found["usual call"]), truth)))
    if options.worst:
        last = list(found)[-1]
        cv2.imwrite(
            str(options.worst),
            worst_photos(rule, options.folder, at_least(least[last], found[last]), truth),
        )


if __name__ == "__main__":
    main()
