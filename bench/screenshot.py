"""Take the README's picture of the page: python bench/screenshot.py [FILE]

It needs Chromium, and Playwright, which tests/requirements.txt names.
"""

import asyncio
import shutil
import sys
from pathlib import Path

import aiohttp
from aiohttp.test_utils import TestServer
from playwright.async_api import async_playwright, expect

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import server  # noqa: E402
from server import cv2, np  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu"]  # root cannot use a sandbox


def make_photos() -> dict[str, np.ndarray]:
    """Return some photos, by their names."""
    photo = cv2.imread(str(ROOT / "samples/astronaut.jpg"))
    portrait = photo[:384, 60:348]
    return {
        "grey.jpg": cv2.cvtColor(photo[:400], cv2.COLOR_BGR2GRAY),
        "mirrored.jpg": cv2.flip(photo, 1),
        "portrait.jpg": portrait,
        "astronaut.jpg": photo,
        "small.jpg": photo[20:260, 100:340],
        "crew.jpg": np.hstack([portrait, cv2.flip(portrait, 1)]),
    }


async def post(url: str, name: str, pixels: np.ndarray) -> None:
    form = aiohttp.FormData()
    form.add_field("image", cv2.imencode(".jpg", pixels)[1].tobytes(), filename=name)
    async with aiohttp.ClientSession() as session, session.post(url, data=form) as answer:
        answer.raise_for_status()


async def main(file: str) -> None:
    """Post the photos while a page watches, then take a picture of it."""
    photos = make_photos()
    async with TestServer(server.create_app()) as running, async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = await browser.new_page(viewport={"width": 1280, "height": 720})
        await page.goto(str(running.make_url("/")))
        await expect(page.locator("#state")).to_have_text("Connected")
        for name, pixels in photos.items():
            await post(str(running.make_url("/image")), name, pixels)
        await expect(page.locator("#photos img")).to_have_count(len(photos))
        for image in await page.locator("#photos img").all():
            await expect(image).not_to_have_js_property("naturalWidth", 0)
        await page.screenshot(path=file, type="jpeg", quality=85, full_page=True)
        await browser.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:] or [str(ROOT / "docs/screenshot.jpg")]))
