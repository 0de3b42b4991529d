"""What the tests of the pages share: devices, and what a person does with a page."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import TIMEOUT
from photos import encode, np

if TYPE_CHECKING:
    from playwright.async_api import Page, Route

    Visit = Callable[..., Awaitable[Page]]

CARDS = "#photos > li"
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
LAPTOP = {"viewport": {"width": 1280, "height": 800}}
PROJECTOR = {"viewport": {"width": 1920, "height": 1080}}


def expect(actual: Any) -> Any:
    """Playwright's expect, which waits; imported late, as Playwright may be missing."""
    from playwright.async_api import expect

    expect.set_options(timeout=TIMEOUT * 1000)
    return expect(actual)


async def connected(page: Page) -> Page:
    await expect(page.locator("#state")).to_have_text("Connected")
    return page


async def choose(page: Page, *files: Path) -> None:
    await page.get_by_label("Choose photos").set_input_files(files)


def names(page: Page) -> Any:
    return expect(page.locator("#photos .name"))


@contextlib.asynccontextmanager
async def unanswered(page: Page, pattern: str) -> AsyncIterator[list[Route]]:
    """Hold these requests of a page back, and gather them; in the end they fail."""
    routes: list[Route] = []
    await page.route(pattern, lambda route: routes.append(route))
    yield routes
    for route in routes:  # Playwright would wait for each, beyond the end of the tests
        await route.abort()
    await page.unroute(pattern)


def grey_jpeg(width: int, height: int) -> bytes:
    return encode(".jpg", np.full((height, width), 128, np.uint8))
