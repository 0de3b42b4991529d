"""What the tests share: real server processes, and a real Chromium that tells what goes wrong in it."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import aiohttp
import cv2
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
    "--host-resolver-rules=MAP classroom 127.0.0.1",  # a name that is not localhost, so that http is not trusted
]


@contextlib.asynccontextmanager
async def serving(*options: str, program: Path = ROOT / "server.py") -> AsyncIterator[str]:
    """Run a server, on a free port unless the options name one; yields its URL."""
    command = [sys.executable, str(program), "--port", "0", *options]
    process = await asyncio.create_subprocess_exec(*command, stdout=-1, stderr=asyncio.subprocess.DEVNULL)
    assert process.stdout is not None
    try:
        async with asyncio.timeout(TIMEOUT):
            while not (url := re.search(rb"curl (http://\S+)/health", await process.stdout.readline())):
                assert not process.stdout.at_eof(), "the server did not start"
        yield url[1].decode()
    finally:
        if process.returncode is None:
            process.terminate()
        async with asyncio.timeout(TIMEOUT):
            await process.communicate()


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
    """Playwright's expect, which waits until the expected is so; imported late, as Playwright may be missing."""
    from playwright.async_api import expect

    expect.set_options(timeout=TIMEOUT * 1000)
    return expect(actual)


def film(path: Path) -> Path:
    """Write a video of 640 x 480 pixels, of the astronaut's upper part, as what a camera sees."""
    frame = cv2.resize(cv2.imread(str(ASTRONAUT))[:384], (640, 480))
    path.write_bytes(cv2.imencode(".jpg", frame)[1].tobytes() * 2)
    return path


async def post(url: str, photo: bytes = ASTRONAUT.read_bytes(), name: str = "astronaut.jpg") -> Any:
    """Post a photo as curl does; returns the JSON of the answer."""
    form = aiohttp.FormData()
    form.add_field("image", photo, filename=name)
    async with aiohttp.ClientSession() as session, session.post(f"{url}/image", data=form) as response:
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
    """Open a URL as somebody of their own. In the end, nothing may have gone wrong, nor to another host."""
    contexts, faults = [], []

    async def visit(url: str, allow: str = "", **options: Any) -> Page:
        own = urlsplit(url).netloc

        def check(request_url: str) -> None:
            parts = urlsplit(request_url)
            if parts.netloc != own and parts.scheme not in ("data", "blob") and f"//{parts.netloc}" not in allow:
                faults.append(f"a request to {request_url}")

        context = await browser.new_context(**options)
        context.set_default_timeout(TIMEOUT * 1000)
        contexts.append(context)
        listener = "(violation) => console.log('violates', violation.effectiveDirective, violation.blockedURI)"
        await context.add_init_script(f"addEventListener('securitypolicyviolation', {listener})")
        page = await context.new_page()
        page.on("request", lambda request: check(request.url))
        page.on("websocket", lambda socket: check(socket.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: "violates" in message.text and faults.append(message.text))
        await page.goto(url)
        return page

    yield visit
    for context in contexts:
        await context.close()
    assert not faults


class Server(NamedTuple):
    """A running server process, where it listens, and the file that it logs to."""

    process: subprocess.Popen[str]
    host: str
    port: int
    url: str
    log: Path


StartServer = Callable[..., Awaitable[Server]]


@pytest.fixture(scope="module")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartServer]:
    """A function that starts a server with the given options, on a free port."""
    servers = []

    def launch(*options: str) -> Server:
        log = tmp_path_factory.mktemp("server") / "log"
        command = [sys.executable, str(ROOT / "server.py"), "--port", "0", *options]
        with log.open("w") as stderr:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
        assert process.stdout
        for line in process.stdout:
            if address := re.search(r"http://([^:/]+):(\d+)", line):
                servers.append(Server(process, address[1], int(address[2]), address[0], log))
                return servers[-1]
        raise AssertionError(log.read_text())

    async def start(*options: str) -> Server:
        async with asyncio.timeout(20):
            return await asyncio.to_thread(launch, *options)

    yield start
    for server in servers:
        server.process.terminate()
    for server in servers:
        with server.process:
            assert server.process.wait(timeout=8) == 0
        log = server.log.read_text()
        assert "Traceback" not in log, log
