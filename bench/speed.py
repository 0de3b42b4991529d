"""How many photos a second does the server take, and how many could it take at best?

    python bench/speed.py [--model FILE] [--seconds 5] [--rounds 5]

For three sizes of photo it prints the rates of POST /image and POST /detect, with a connection
for each thread and one more, and beside them:

(a)        annotate() in as many threads, without a server,
(a) tuned  the same with the memory settings of the container, which the server has here too,
(b)        the same with the cascade as most examples call it, on the whole photo.

All take turns, so that a noisy machine is noisy for all. Each number is the median of the rounds.
A second table says where the time of a 12-megapixel photo goes, on one thread.
"""

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import server  # noqa: E402

SIZES = {"640 x 480": (640, 480), "2 MP": (1632, 1224), "12 MP": (4000, 3000)}
PIPELINES = ("bare", "tuned", "naive")
THREADS = server.Config().threads
MEMORY = {  # glibc keeps the memory of a photo for the next one; as in the Dockerfile
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "67108864",
    "MALLOC_TRIM_THRESHOLD_": "134217728",
}
BOUNDARY = b"------------------------d74496d66958873e"  # as curl makes them
PART = b'--%b\r\nContent-Disposition: form-data; name="image"; filename="photo.jpg"\r\n\r\n'
REQUEST = (
    b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n"
    b"Content-Type: multipart/form-data; boundary=%b\r\n\r\n"
)


def encode(pixels: server.Pixels) -> bytes:
    """Return a JPEG, as the server makes it."""
    quality = [cv2.IMWRITE_JPEG_QUALITY, 90]
    return cv2.imencode(".jpg", pixels, quality)[1].tobytes()


def make_photo(width: int, height: int) -> bytes:
    """Return the astronaut as a JPEG, as wide as the photo."""
    astronaut = cv2.imread(str(ROOT / "samples/astronaut.jpg"))
    pixels = cv2.resize(astronaut, (width, width), interpolation=cv2.INTER_CUBIC)[:height]
    # Without grain, an enlarged photo would be easier to encode than one from a camera.
    grain = np.random.default_rng(1).normal(0, 4, pixels.shape)
    pixels = np.clip(pixels + grain, 0, 255).astype(np.uint8)
    return encode(pixels)


class NaiveDetector(threading.local):
    """The cascade on the whole photo, with the settings of most examples."""

    def __init__(self) -> None:
        self.cascade = cv2.CascadeClassifier(str(ROOT / "haarcascade_frontalface_default.xml"))

    def __call__(self, pixels: server.Pixels) -> list[server.Face]:
        grey = cv2.cvtColor(pixels, cv2.COLOR_BGR2GRAY)
        boxes = self.cascade.detectMultiScale(grey, 1.1, 5, minSize=(30, 30))
        return [server.Face(*map(int, box), 0) for box in boxes]


def measure_pipeline(detector: server.Detector, seconds: float, photo: bytes) -> float:
    """Return the photos a second through annotate() in as many threads as the server has."""

    def work(until: float) -> int:
        done = 0
        while time.monotonic() < until or done < 5:
            server.annotate(photo, detector)
            done += 1
        return done

    with ThreadPoolExecutor(THREADS) as pool:
        # Once in each thread first, since each makes a detector of its own.
        list(pool.map(lambda _: server.annotate(photo, detector), range(THREADS)))
        start = time.monotonic()
        done = sum(pool.map(work, [start + seconds] * THREADS))
        return done / (time.monotonic() - start)


async def post(port: int, path: bytes, photo: bytes, seconds: float) -> tuple[float, list[float]]:
    """Post without a pause; return the answers a second, and the seconds that each took."""
    form = PART % BOUNDARY + photo + b"\r\n--%b--\r\n" % BOUNDARY
    request = REQUEST % (path, len(form), BOUNDARY) + form
    start, took = time.monotonic(), []

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
        while time.monotonic() < start + seconds:
            begin = time.perf_counter()
            writer.write(request)
            answer = await reader.readuntil(b"\n}\n")
            assert answer.startswith(b"HTTP/1.1 20"), answer
            took.append(time.perf_counter() - begin)
        writer.close()
        await writer.wait_closed()

    await asyncio.gather(*(client() for _ in range(THREADS + 1)))
    return len(took) / (time.monotonic() - start), took


def print_steps(detector: server.Detector, photo: bytes, count: int = 20) -> None:
    """Print the milliseconds of each step of annotate(), on this thread."""
    cv2.setNumThreads(1)
    pixels = server.decode(photo)
    steps: dict[str, Callable[[], object]] = {
        "decode the JPEG": lambda: server.decode(photo),
        "find the faces": lambda: detector(pixels),
        "encode the JPEG": lambda: encode(pixels),
        "all of annotate()": lambda: server.annotate(photo, detector),
    }
    print("\n| 12 MP, one thread | ms |\n| --- | --- |")
    for name, step in steps.items():
        step()
        start = time.thread_time()
        for _ in range(count):
            step()
        print(f"| {name} | {(time.thread_time() - start) / count * 1000:.0f} |")


def start_server(model: str) -> tuple[subprocess.Popen[str], int]:
    """Start the server; return it and its port."""
    command = [sys.executable, str(ROOT / "server.py"), "--port", "0", "--model", model]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | MEMORY,
    )
    assert process.stdout is not None
    line = next(line for line in process.stdout if "open" in line)
    return process, int(line.rpartition(":")[2].partition("/")[0])


def make_row(name: str, size: tuple[int, int], port: int, options: argparse.Namespace) -> str:
    """Measure everything with photos of a size; return its row of the table."""
    photo, took = make_photo(*size), []
    rates: dict[str, list[float]] = {each: [] for each in ("image", "detect", *PIPELINES)}
    script = [sys.executable, __file__, "--model", options.model]
    script += ["--seconds", str(options.seconds), "--pipeline"]
    asyncio.run(post(port, b"/image", photo, 1))  # warm
    for _ in range(options.rounds):
        rate, seconds = asyncio.run(post(port, b"/image", photo, options.seconds))
        rates["image"].append(rate)
        took += seconds
        rates["detect"].append(asyncio.run(post(port, b"/detect", photo, options.seconds))[0])
        for which in PIPELINES:
            env = os.environ | (MEMORY if which == "tuned" else {})
            done = subprocess.run(
                [*script, which], input=photo, stdout=subprocess.PIPE, env=env, check=True
            )
            rates[which].append(float(done.stdout))

    image, detect, bare, tuned, naive = (statistics.median(each) for each in rates.values())
    cuts = statistics.quantiles(took, n=20)
    return (
        f"| {name} | {image:.1f} | {cuts[9] * 1000:.0f} ms | {cuts[18] * 1000:.0f} ms"
        f" | {detect:.1f} | {bare:.1f} | {tuned:.1f} | {naive:.1f}"
        f" | {image / bare:.2f} | {image / tuned:.2f} | {image / naive:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="", help="as of server.py")
    add("--seconds", type=float, default=5, help="of each measurement (default: 5)")
    add("--rounds", type=int, default=5, help="of all measurements (default: 5)")
    add("--pipeline", choices=(*PIPELINES, "steps"), help="only this, on the photo in the input")
    options = parser.parse_args()
    if options.pipeline:
        photo, detector = sys.stdin.buffer.read(), server.load_detector(options.model)
        if options.pipeline == "steps":
            print_steps(detector, photo)
        else:
            detector = NaiveDetector() if options.pipeline == "naive" else detector
            print(measure_pipeline(detector, options.seconds, photo))
        return

    process, port = start_server(options.model)
    print("| photo | POST /image a second | p50 | p95 | POST /detect a second", end=" ")
    print("| (a) a second | (a) tuned | (b) naive | of (a) | of (a) tuned | times (b) |")
    print("| --- " * 11 + "|", flush=True)
    try:
        for name, size in SIZES.items():
            print(make_row(name, size, port, options), flush=True)
    finally:
        process.terminate()
        process.wait()
    script = [sys.executable, __file__, "--model", options.model, "--pipeline", "steps"]
    photo = make_photo(*SIZES["12 MP"])
    subprocess.run(script, input=photo, env=os.environ | MEMORY, check=True)


if __name__ == "__main__":
    main()
