"""Does the server's memory stay the same over 10,000 photos of all sizes and kinds, good and bad?

    python bench/soak.py [POSTS]

Exits 1 if the memory after the last post is over that after the first tenth, by 10 % and 10 MiB.
It reads /proc, so it needs Linux.
"""

import argparse
import asyncio
import re
import sys
import time
from collections import Counter
from pathlib import Path

import aiohttp
import cv2
import numpy as np

ROOT = Path(__file__).parent.parent
AT_ONCE = 4  # posts
SIZES = (50, 100, 200, 512, 800)  # px, the width
KINDS = (".jpg", ".png", ".webp", ".gif")


def make_photos() -> list[bytes]:
    """Return photos of all sizes and kinds, the first half of each, and what is no photo."""
    astronaut = cv2.imread(str(ROOT / "samples/astronaut.jpg"))
    images = [cv2.resize(astronaut, (size, size * 3 // 4)) for size in SIZES]
    photos = [cv2.imencode(kind, image)[1].tobytes() for image in images for kind in KINDS]
    return photos + [photo[: len(photo) // 2] for photo in photos] + [b"no photo"]


def memory(pid: int) -> int:
    """Return the resident memory of a process in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) // 1024


async def soak(posts: int) -> bool:
    """Post, and print a row each twentieth of the way; return whether the memory stays the same."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(ROOT / "server.py"),
        "--port",
        "0",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    while not (found := re.search(rb"open +(http\S+)/", await process.stdout.readline())):
        pass
    url = found[1].decode()
    bodies, numbers, statuses, samples = make_photos(), iter(range(posts)), Counter(), []
    rng, start = np.random.default_rng(0), time.monotonic()
    print("| posts | seconds | memory |\n| --- | --- | --- |")

    def sample(number: int) -> None:
        samples.append(memory(process.pid))
        print(f"| {number} | {time.monotonic() - start:.0f} | {samples[-1]} MiB |", flush=True)

    async with aiohttp.ClientSession() as session, session.ws_connect(f"{url}/faces") as watcher:

        async def post() -> None:
            for number in numbers:
                form = aiohttp.FormData()
                form.add_field("image", bodies[rng.integers(len(bodies))], filename="photo.jpg")
                async with session.post(f"{url}/image", data=form) as answer:
                    statuses[answer.status] += 1
                if number % (posts // 20) == 0:
                    sample(number)

        async def watch() -> int:
            return len([message async for message in watcher])

        watching = asyncio.create_task(watch())
        await asyncio.gather(*(post() for _ in range(AT_ONCE)))
        sample(posts)
        process.terminate()
        urls, code = await watching, await process.wait()

    answers = ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items()))
    print(f"\n{answers}; the watcher got {urls} URLs; exit {code}")
    return samples[-1] < samples[2] * 1.1 + 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("posts", type=int, nargs="?", default=10_000, help="20 or more")
    if not asyncio.run(soak(parser.parse_args().posts)):
        sys.exit("The memory grew.")


if __name__ == "__main__":
    main()
