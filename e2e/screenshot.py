"""Take the README's picture of the page: python e2e/screenshot.py [FILE]"""

import asyncio
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np

from conftest import ASTRONAUT, chromium, expect, film, post, serving


async def main(file: str) -> None:
    """Post some photos while a page watches, then take a picture of it."""
    photo = cv2.imread(str(ASTRONAUT))
    portrait, mirrored = photo[:384, 60:348], cv2.flip(photo, 1)
    photos = {
        "grey.jpg": cv2.cvtColor(photo[:400], cv2.COLOR_BGR2GRAY),
        "mirrored.jpg": mirrored,
        "portrait.jpg": portrait,
        "astronaut.jpg": photo,
        "small.jpg": photo[20:260, 100:340],
        "crew.jpg": np.hstack([portrait, cv2.flip(portrait, 1)]),
    }
    with tempfile.TemporaryDirectory() as folder:
        camera = film(Path(folder) / "camera.mjpeg")
        async with chromium(camera) as browser, serving() as url:
            page = await browser.new_page(viewport={"width": 1280, "height": 720})
            await page.goto(url)
            await expect(page.locator("#state")).to_have_text("Connected")
            for name, pixels in photos.items():
                await post(url, cv2.imencode(".jpg", pixels)[1].tobytes(), name)
            await expect(page.locator("#photos img")).to_have_count(len(photos))
            for image in await page.locator("#photos img").all():
                await expect(image).not_to_have_js_property("naturalWidth", 0)
            await page.screenshot(path=file, type="jpeg", quality=85, full_page=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:] or [str(Path(__file__).with_name("screenshot.jpg"))]))
