"""What the tests share: real server processes, and a real Chromium that tells what goes wrong."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import aiohttp
import pytest
import pytest_asyncio

if TYPE_CHECKING:
    from playwright.async_api import Browser, Page

ROOT = Path(__file__).parent.parent
ASTRONAUT = ROOT / "samples" / "astronaut.jpg"
CDN = "https://cdn.jsdelivr.net"
TIMEOUT = 20  # s, for every wait
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
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


class Server(NamedTuple):
    """A running server: its process, where it listens, and the file of its log."""

    process: subprocess.Popen[str]
    url: str
    port: int
    log: Path


@contextlib.contextmanager
def running(
    *options: str,
    program: Path = ROOT / "server.py",
    files: int | None = None,
    tracebacks: bool = False,
) -> Iterator[Server]:
    """Run a server, on a free port unless the options name one; with a limit of open files.

    In the end it must stop in time, with exit code 0 and no traceback in its log, unless allowed.
    """
    command = [sys.executable, str(program), "--port", "0", *options]
    if files:
        command = ["sh", "-c", f'ulimit -n {files} && exec "$@"', "sh", *command]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        with log.open("w") as stderr:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
        watchdog = threading.Timer(TIMEOUT, process.kill)
        watchdog.start()
        try:
            assert process.stdout
            line = next((line for line in process.stdout if "open" in line), "")
            found = re.search(r"(http://\S+:(\d+))", line)
            assert found, log.read_text()
            urllib.request.urlopen(f"http://127.0.0.1:{found[2]}/health", timeout=TIMEOUT).close()
            watchdog.cancel()
            yield Server(process, found[1], int(found[2]), log)
            if process.poll() is None:
                process.terminate()
                assert process.wait(8) == 0
            text = log.read_text()
            assert "Warning" not in text, text[:3000]
            _, traceback, tail = text.partition("Traceback")
            assert tracebacks or not traceback, tail[:3000]
        finally:
            watchdog.cancel()
            process.kill()
            process.communicate()


@contextlib.asynccontextmanager
async def serving(*options: str, **more: Any) -> AsyncIterator[str]:
    """Run a server; yields its URL."""
    with running(*options, **more) as server:
        yield server.url


@contextlib.asynccontextmanager
async def chromium(camera: Path) -> AsyncIterator[Browser]:
    """Run Chromium with a video as its camera."""
    playwright = pytest.importorskip(
        "playwright.async_api", reason="Playwright is missing: pip install -r e2e/requirements.txt"
    )
    if CHROMIUM is None:
        pytest.skip("Chromium is missing: apt-get install chromium")
    async with playwright.async_playwright() as driver:
        flags = [*FLAGS, f"--use-file-for-fake-video-capture={camera}"]
        browser = await driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        await browser.close()


def expect(actual: Any) -> Any:
    """Playwright's expect, which waits; imported late, as Playwright may be missing."""
    from playwright.async_api import expect

    expect.set_options(timeout=TIMEOUT * 1000)
    return expect(actual)


def film(path: Path) -> Path:
    """Write a video of 640 x 480 pixels, of the astronaut's upper part, as what a camera sees."""
    import cv2  # only now, as server.py sets OpenCV's limits before

    frame = cv2.resize(cv2.imread(str(ASTRONAUT))[:384], (640, 480))
    path.write_bytes(cv2.imencode(".jpg", frame)[1].tobytes() * 2)
    return path


async def post(url: str, photo: bytes = ASTRONAUT.read_bytes(), name: str = "astronaut.jpg") -> Any:
    """Post a photo as curl does; returns the JSON of the answer."""
    form = aiohttp.FormData()
    form.add_field("image", photo, filename=name)
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/image", data=form) as response,
    ):
        assert response.status == 201
        return await response.json()


@pytest.fixture
async def server() -> AsyncIterator[str]:
    async with serving() as url:
        yield url


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Browser]:
    async with chromium(film(tmp_path_factory.mktemp("camera") / "astronaut.mjpeg")) as browser:
        yield browser


@pytest_asyncio.fixture(loop_scope="session")
async def visit(browser: Browser) -> AsyncIterator[Callable[..., Awaitable[Page]]]:
    """Open a URL in a browser profile of its own. In the end, nothing may have gone wrong."""
    contexts, faults = [], []

    async def visit(url: str, allow: str = "", **options: Any) -> Page:
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
        listener = "(v) => console.log('violates', v.effectiveDirective, v.blockedURI)"
        await context.add_init_script(f"addEventListener('securitypolicyviolation', {listener})")
        page = await context.new_page()
        page.on("request", lambda request: check(request.url))
        page.on("websocket", lambda socket: check(socket.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on(
            "console", lambda message: "violates" in message.text and faults.append(message.text)
        )
        await page.goto(url)
        return page

    yield visit
    for context in contexts:
        await context.close()
    assert not faults
