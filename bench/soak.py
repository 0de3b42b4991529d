"""Post 10,000 photos of all sizes and kinds, good and bad, and hold the server's memory against the first 1,000.

python bench/soak.py [POSTS]
"""

import asyncio
import re
import sys
import time
from pathlib import Path

import aiohttp
import cv2
import numpy as np

ROOT = Path(__file__).parent.parent
POSTS = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
AT_ONCE = 4
PHOTO = cv2.imread(str(ROOT / "samples/astronaut.jpg"))


def photos() -> list[bytes]:
    sizes = [50, 100, 200, 512, 800]
    images = [cv2.resize(PHOTO, (size, size * 3 // 4)) for size in sizes]
    encoded = [cv2.imencode(kind, image)[1].tobytes() for image in images for kind in (".jpg", ".png", ".webp", ".gif")]
    return encoded + [each[: len(each) // 2] for each in encoded] + [b"no photo"]


def memory(pid: int) -> int:
    """MiB."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) // 1024


async def main() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(ROOT / "server.py"),
        "--port",
        "0",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    while not (url := re.search(rb"http://[^/]+", await process.stdout.readline())):
        pass
    bodies, numbers, statuses, samples = photos(), iter(range(POSTS)), {}, []
    rng, start = np.random.default_rng(0), time.monotonic()
    async with aiohttp.ClientSession() as session, session.ws_connect(f"{url[0].decode()}/faces") as watcher:

        async def post() -> None:
            for number in numbers:
                form = aiohttp.FormData()
                form.add_field("image", bodies[rng.integers(len(bodies))], filename=f"{number}.jpg")
                async with session.post(f"{url[0].decode()}/image", data=form) as answer:
                    statuses[answer.status] = statuses.get(answer.status, 0) + 1
                if number % (POSTS // 20) == 0:
                    samples.append(memory(process.pid))
                    print(f"{number:6} posts {time.monotonic() - start:5.0f} s {samples[-1]:4} MiB", flush=True)

        async def watch() -> int:
            return len([message async for message in watcher])

        watching = asyncio.create_task(watch())
        await asyncio.gather(*(post() for _ in range(AT_ONCE)))
        samples.append(memory(process.pid))
        process.terminate()
        print(f"{statuses}, {await watching} URLs, exit {await process.wait()}")
    print(f"after a tenth {samples[2]} MiB, at the end {samples[-1]} MiB")
    assert samples[-1] < samples[2] * 1.1 + 10


asyncio.run(main())
