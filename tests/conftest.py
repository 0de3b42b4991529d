"""The servers and the browser that the tests use."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
import pytest_asyncio
from aiohttp.test_utils import TestServer
from helpers import INSTALL, NOTE_TURNS, ROOT, TIMEOUT, Server, run_server, until
from photos import cv2, encode, pixels

from server import create_app, load_detector

if TYPE_CHECKING:
    from playwright.async_api import Browser, Page

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FIREFOX = shutil.which("firefox-esr") or shutil.which("firefox")
FLAGS = [
    "--no-sandbox",  # which root cannot use
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--use-fake-device-for-media-stream",
    "--host-resolver-rules=MAP classroom 127.0.0.1",  # not localhost, so http is not trusted
]
DETECTOR = load_detector()


# --- Servers ---
@pytest.fixture(scope="module")
def shared_server() -> Iterator[Server]:
    with run_server() as server:
        yield server


@pytest.fixture
async def server(shared_server: Server) -> AsyncIterator[Server]:
    """The server that most tests share; after each it is well, and has logged no traceback."""
    before = shared_server.log.stat().st_size
    yield shared_server
    await until(shared_server, queued=0, clients=0)
    assert "Traceback" not in shared_server.log.read_text()[before:]


@pytest.fixture
def fresh() -> Iterator[Server]:
    """A server of one's own: nothing is kept yet, and it may be measured or stopped."""
    with run_server() as server:
        yield server


@pytest_asyncio.fixture(loop_scope="session")
async def url(caplog: pytest.LogCaptureFixture) -> AsyncIterator[str]:
    """The URL of a server of one's own, in this process, where it starts in no time."""
    async with TestServer(create_app(detector=DETECTOR)) as running:
        yield f"http://127.0.0.1:{running.port}"
    assert "Traceback" not in caplog.text


@pytest.fixture
def impatient() -> Iterator[Server]:
    """A server that soon cuts off a client who does not go on."""
    with run_server("--upload-timeout", "3") as server:
        yield server


@pytest.fixture
def changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Writes a program that runs the server after these lines."""

    def changed(lines: str) -> Path:
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        program = tmp_path / "changed.py"
        program.write_text(f"import socket\nimport server\n{lines}\nserver.main()")
        return program

    return changed


@pytest.fixture
def timed(changed: Callable[[str], Path]) -> Iterator[Server]:
    """A server of one's own that notes the turns of its event loop."""
    with run_server(program=changed(NOTE_TURNS)) as server:
        yield server


# --- The browser ---
@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Browser]:
    """Chromium, whose camera sees the astronaut's upper part in 640 x 480 pixels."""
    playwright = pytest.importorskip("playwright.async_api", reason=f"needs Playwright: {INSTALL}")
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    video = tmp_path_factory.mktemp("camera") / "astronaut.mjpeg"
    video.write_bytes(encode(".jpg", cv2.resize(pixels()[:384], (640, 480))) * 2)
    async with playwright.async_playwright() as driver:
        flags = [*FLAGS, f"--use-file-for-fake-video-capture={video}"]
        browser = await driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        await browser.close()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def firefox() -> AsyncIterator[Browser]:
    """Debian's Firefox, by WebDriver BiDi."""
    playwright = pytest.importorskip("playwright.async_api", reason=f"needs Playwright: {INSTALL}")
    if FIREFOX is None:
        pytest.skip("needs Firefox: apt-get install firefox-esr")
    async with playwright.async_playwright() as driver:
        browser = await driver.firefox.launch(channel="moz-firefox", executable_path=FIREFOX)
        yield browser
        await browser.close()


@pytest_asyncio.fixture(loop_scope="session")
async def visit(browser: Browser) -> AsyncIterator[Callable[..., Awaitable[Page]]]:
    """Open a URL in a browser profile of its own. In the end, nothing may have gone wrong.

    Paused, the page's own time stands still, and goes on only by page.clock.run_for().
    """
    contexts, faults = [], []
    away = "establish a connection to the server at ws:"  # Firefox calls that an error of the page

    async def visit(
        url: str, allow: str = "", paused: bool = False, browser: Browser = browser, **options: Any
    ) -> Page:
        own = urlsplit(url).netloc

        def check(request_url: str) -> None:
            parts = urlsplit(request_url)
            if (
                parts.netloc != own
                and parts.scheme not in ("data", "blob")
                and f"//{parts.netloc}" not in allow
            ):
                faults.append(f"a request to {request_url}")

        context = await browser.new_context(**options)
        context.set_default_timeout(TIMEOUT * 1000)
        contexts.append(context)
        if paused:
            await context.clock.install(time=0)
            await context.clock.pause_at(1)  # second
        listener = "(v) => console.log('violates', v.effectiveDirective, v.blockedURI)"
        await context.add_init_script(f"addEventListener('securitypolicyviolation', {listener})")
        page = await context.new_page()
        page.on("request", lambda request: check(request.url))
        page.on("websocket", lambda socket: check(socket.url))
        page.on("pageerror", lambda error: away in str(error) or faults.append(str(error)))
        page.on(
            "console", lambda message: "violates" in message.text and faults.append(message.text)
        )
        await page.goto(url)
        return page

    yield visit
    for context in contexts:
        await context.close()
    assert not faults
