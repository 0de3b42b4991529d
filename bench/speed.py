"""How fast is the whole server, beside what it could be at best?

    python bench/speed.py [--model FILE] [--seconds 10] [--rounds 3]

Prints, for three sizes of photo, the server's requests a second with a connection for each thread and one more, beside
(a) the bare pipeline, annotate() in as many threads without a server, and (b) the naive one: the cascade's usual call
on the whole photo. Two settings of the server for a process that is busy, OpenCV with one thread a photo and memory
that is kept for the next, help the bare pipeline as well: that is (a) tuned. All take turns, so that a noisy machine is
noisy for all; each number is the median of the rounds. Then it says where the time of a 12-megapixel photo goes, on one
thread.
"""

import argparse
import asyncio
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import server  # noqa: E402

PIPELINES = "bare", "tuned", "naive"
SIZES = {"640 x 480": (640, 480), "2 MP": (1632, 1224), "12 MP": (4000, 3000)}


def photo(width: int, height: int) -> bytes:
    """The astronaut, as wide as the photo."""
    astronaut = cv2.imread(str(ROOT / "samples/astronaut.jpg"))
    image = cv2.resize(astronaut, (width, width), interpolation=cv2.INTER_CUBIC)[:height]
    grain = np.random.default_rng(1).normal(0, 4, image.shape)  # else an enlarged photo would encode too well
    image = np.clip(image + grain, 0, 255).astype(np.uint8)
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()


class NaiveDetector(server.HaarDetector):
    """The cascade on the whole photo, with the settings of most examples."""

    def __call__(self, image: server.Pixels) -> list[server.Face]:
        grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
        return [server.Face(*box, 0) for box in self.cascade.detectMultiScale(grey, 1.1, 5, minSize=(30, 30)).tolist()]


def pipeline(detector: server.Detector, seconds: float, photo: bytes) -> float:
    """Photos a second through annotate() in a thread for each CPU."""
    threads = server.usable_cpus()

    def work(until: float) -> int:
        done = 0
        while time.monotonic() < until or done < 5:
            server.annotate(photo, detector)
            done += 1
        return done

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda _: server.annotate(photo, detector), range(threads)))  # a detector for each thread
        start = time.monotonic()
        done = sum(pool.map(work, [start + seconds] * threads))
        return done / (time.monotonic() - start)


async def requests(port: int, seconds: float, photo: bytes) -> list[float]:
    """The seconds that each answer took."""
    boundary = b"------------------------d74496d66958873e"  # as curl makes them
    request = b"POST /image HTTP/1.1\r\nHost: bench\r\nContent-Type: multipart/form-data; boundary=%b\r\n" % boundary
    head = b'--%b\r\nContent-Disposition: form-data; name="image"; filename="photo.jpg"\r\n\r\n' % boundary
    body = head + photo + b"\r\n--%b--\r\n" % boundary
    request += b"Content-Length: %d\r\n\r\n" % len(body) + body
    until, took = time.monotonic() + seconds, []

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
        while time.monotonic() < until:
            start = time.perf_counter()
            writer.write(request)
            answer = await reader.readuntil(b"\n}\n")
            assert answer.startswith(b"HTTP/1.1 201 "), answer
            took.append(time.perf_counter() - start)
        writer.close()
        await writer.wait_closed()

    await asyncio.gather(*(client() for _ in range(server.usable_cpus() + 1)))
    return took


def steps(photo: bytes, detector: server.Detector, count: int = 20) -> dict[str, float]:
    """Milliseconds of each step of annotate(), on this thread."""
    image = server.decode(photo)
    jpeg = [cv2.IMWRITE_JPEG_QUALITY, server.JPEG_QUALITY]

    def milliseconds(step: Callable[[], object]) -> float:
        step()
        start = time.thread_time()
        for _ in range(count):
            step()
        return (time.thread_time() - start) / count * 1000

    return {
        "decode the JPEG": milliseconds(lambda: server.decode(photo)),
        "find the faces": milliseconds(lambda: detector(image)),
        "encode the JPEG": milliseconds(lambda: cv2.imencode(".jpg", image, jpeg)),
        "all of annotate()": milliseconds(lambda: server.annotate(photo, detector)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="", help="as of server.py")
    parser.add_argument("--seconds", type=float, default=5, help="of each measurement (default: 5)")
    parser.add_argument("--rounds", type=int, default=5, help="of all measurements (default: 5)")
    parser.add_argument("--pipeline", choices=PIPELINES, help="measure only this, on the photo in the input")
    options = parser.parse_args()
    detector = server.load_detector(options.model)
    if options.pipeline:
        if options.pipeline == "naive":
            detector = NaiveDetector(ROOT / server.CASCADE, 0)
        if options.pipeline == "tuned":
            server.keep_memory()
            cv2.setNumThreads(1)
        print(pipeline(detector, options.seconds, sys.stdin.buffer.read()))
        return
    command = [sys.executable, str(ROOT / "server.py"), "--port", "0", "--model", options.model]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    port = int(next(line for line in process.stdout if "check" in line).rpartition(":")[2].partition("/")[0])
    print("| photo | requests/s | p50 | p95 | (a) bare/s | (a) tuned/s | (b) naive/s", end=" ")
    print("| of (a) | of (a) tuned | times (b) |\n" + "| --- " * 10 + "|")
    try:
        for name, size in SIZES.items():
            jpeg, rates, took = photo(*size), {name: [] for name in ("server", *PIPELINES)}, []
            asyncio.run(requests(port, 1, jpeg))  # warm
            for _ in range(options.rounds):
                start = time.monotonic()
                answers = asyncio.run(requests(port, options.seconds, jpeg))
                rates["server"].append(len(answers) / (time.monotonic() - start))
                took += answers
                for which in PIPELINES:
                    script = [sys.executable, __file__, "--pipeline", which, "--model", options.model]
                    done = subprocess.run(
                        [*script, "--seconds", str(options.seconds)], input=jpeg, stdout=subprocess.PIPE, check=True
                    )
                    rates[which].append(float(done.stdout))
            rate, bare, tuned, naive = (statistics.median(each) for each in rates.values())
            cuts = statistics.quantiles(took, n=20)
            print(
                f"| {name} | {rate:.1f} | {cuts[9] * 1000:.0f} ms | {cuts[18] * 1000:.0f} ms | {bare:.1f} | {tuned:.1f}"
                f" | {naive:.1f} | {rate / bare:.2f} | {rate / tuned:.2f} | {rate / naive:.1f} |",
                flush=True,
            )
    finally:
        process.terminate()
        process.wait()
    print("\n| 12 MP, one thread | ms |\n| --- | --- |")
    server.keep_memory()
    cv2.setNumThreads(1)
    for name, value in steps(photo(*SIZES["12 MP"]), detector).items():
        print(f"| {name} | {value:.0f} |")


if __name__ == "__main__":
    main()
