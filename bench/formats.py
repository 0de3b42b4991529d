"""Does the server read the images of a folder as Pillow does: size, orientation and colours?

    pip install pillow
    python bench/formats.py FOLDER [--most FILES] [--seconds SECONDS]

A table counts the images of each format, and what differs. Below, each file that differs is named.
The server draws no boxes here: only server.decode() is called, so that nothing is posted.
"""

import argparse
import io
import itertools
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, ImageSequence

sys.path.insert(0, str(Path(__file__).parent.parent))
import server

ENDINGS = {".jpg", ".jpeg", ".jfif", ".png", ".apng", ".webp", ".gif", ".tif", ".tiff", ".bmp"}
ENDINGS |= {".avif", ".heic", ".heif", ".ico", ".jp2", ".ppm", ".mpo"}
READ = ("JPEG", "MPO", "PNG", "WEBP", "GIF")  # Pillow's names of what the server reads
FAR = 6  # of 255, the mean distance of colours that are not the same
SLOW, MUCH_SLOWER = 0.5, 4  # CPU seconds, and times as many as Pillow


class Reading(NamedTuple):
    """An image as Pillow reads it."""

    format: str  # Pillow's name of it
    pixels: np.ndarray | None  # RGB and the opacity, (height, width, 4), uint8; None: not read
    why: str  # it was not read
    seconds: float  # of CPU time, which does not depend on what else runs


def read_with_pillow(photo: bytes) -> Reading:
    """Read the first frame, turned upright."""
    begin, kind = time.thread_time(), "no image"
    try:
        with Image.open(io.BytesIO(photo)) as image:
            kind = image.format or kind
            frame = ImageOps.exif_transpose(next(ImageSequence.Iterator(image)))
            pixels = to_rgba(frame)
    except Exception as error:  # which of them it raises depends on the format
        return Reading(kind, None, str(error), time.thread_time() - begin)
    return Reading(kind, pixels, "", time.thread_time() - begin)


def to_rgba(image: Image.Image) -> np.ndarray:
    """Return 8 bits a colour; Pillow itself would cut off what is over 255."""
    if image.mode.startswith("I"):
        upper = np.asarray(image).astype(np.int64) >> 8
        image = Image.fromarray(upper.clip(0, 255).astype(np.uint8))
    return np.asarray(image.convert("RGBA"))


def turns(pixels: np.ndarray) -> Iterator[np.ndarray]:
    """Yield an image in all eight orientations, the first as it is."""
    for flipped, quarters in itertools.product((False, True), range(4)):
        yield np.rot90(pixels[:, ::-1] if flipped else pixels, quarters)


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Return the mean distance of the colours (of 255) where both are opaque."""
    if one.shape[:2] != other.shape[:2]:
        return float("inf")
    opaque = other[..., 3] == 255
    if not opaque.any():
        return 0
    apart = np.abs(one[..., :3].astype(np.int16) - other[..., :3])
    return float(apart[opaque].mean())


def compare(photo: bytes) -> tuple[str, str, str]:
    """Return the format of a file, a verdict, and what is to be said about it."""
    theirs = read_with_pillow(photo)
    begin = time.thread_time()
    try:
        ours = server.decode(photo)[..., ::-1]
    except server.BadPhoto as refusal:
        if theirs.format not in READ and refusal.status == 415:
            return theirs.format, "another format", ""
        if theirs.pixels is None:
            return theirs.format, "both refuse it", ""
        return theirs.format, "refused", str(refusal)
    seconds = time.thread_time() - begin
    if theirs.pixels is None:
        return theirs.format, "read, Pillow refuses it", theirs.why

    apart, *turned = (distance(each, theirs.pixels) for each in turns(ours))
    if min(turned) < min(apart, FAR) / 2:
        return theirs.format, "turned", ""
    if apart == float("inf"):
        (height, width), (high, wide) = ours.shape[:2], theirs.pixels.shape[:2]
        return theirs.format, "size", f"{width} x {height}, Pillow {wide} x {high}"
    if apart > FAR:
        return theirs.format, "colours", f"{apart:.0f} of 255 apart"
    if seconds > max(SLOW, MUCH_SLOWER * theirs.seconds):
        return theirs.format, "slow", f"{seconds:.1f} s, Pillow {theirs.seconds:.1f} s"
    return theirs.format, "same", ""


def find_images(folder: Path, most: int) -> list[Path]:
    """Return the images of a folder and of those in it."""
    found = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in ENDINGS)
    return list(itertools.islice((path for path in found if path.is_file()), most))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--most", type=int, default=10_000, help="files to read")
    parser.add_argument("--seconds", type=float, default=600, help="to spend at most")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # Pillow's, about what is odd in a file
    end = time.monotonic() + options.seconds

    counts, differing = defaultdict[str, Counter[str]](Counter), []
    for path in find_images(options.folder, options.most):
        if time.monotonic() > end:
            print(f"Stopped after {options.seconds:.0f} s, before {path}.")
            break
        kind, verdict, why = compare(path.read_bytes())
        counts[kind][verdict] += 1
        if verdict not in ("same", "another format", "both refuse it"):
            differing.append(f"{kind} {verdict}: {path} {why}")

    print("| format | files | same | what differs or is not read |\n| --- | --- | --- | --- |")
    for kind, verdicts in sorted(counts.items()):
        rest = ", ".join(f"{number} {name}" for name, number in verdicts.items() if name != "same")
        print(f"| {kind} | {verdicts.total()} | {verdicts['same']} | {rest} |")
    print("", *differing, sep="\n")


if __name__ == "__main__":
    main()
