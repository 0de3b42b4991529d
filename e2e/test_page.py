"""The page at /, in a real Chromium, with a real server."""

from __future__ import annotations

import asyncio
import base64
import os
import re
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import aiohttp
import cv2
import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from conftest import ASTRONAUT, ROOT, TIMEOUT, expect, post, serving

if TYPE_CHECKING:
    from playwright.async_api import FileChooser, Page, Request, Route

    Visit = Callable[..., Awaitable[Page]]

pytestmark = pytest.mark.asyncio(loop_scope="session")
TINY = cv2.imencode(".jpg", np.zeros((8, 8), np.uint8))[1].tobytes()
CARDS = "#photos > li"


async def connected(page: Page) -> Page:
    await expect(page.locator("#state")).to_have_text("Connected")
    return page


async def get(url: str, **headers: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(url, headers=headers) as response:
        return response.status, response.content_type


# --- GET / ---


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", "text/html"),
        ("*/*", "text/plain"),
    ],
    ids=["a browser", "curl"],
)
async def test_the_page_is_for_browsers_the_text_for_curl(server: str, accept: str, content_type: str) -> None:
    assert await get(server, Accept=accept) == (200, content_type)


async def test_each_answer_has_a_nonce_of_its_own(server: str) -> None:
    policies = set()
    for _ in range(2):
        async with aiohttp.ClientSession() as session, session.get(server, headers={"Accept": "text/html"}) as response:
            policy, page = response.headers["Content-Security-Policy"], await response.text()
        nonce = policy.partition("'nonce-")[2].partition("'")[0]
        assert len(nonce) >= 22  # 128 bits, by the specification
        assert page.count(f'nonce="{nonce}"') == 2  # the style and the script
        policies.add(policy)
    assert len(policies) == 2


async def test_server_py_alone_serves_the_text(tmp_path: Path) -> None:
    program = Path(shutil.copy(ROOT / "server.py", tmp_path))
    async with serving(program=program) as url:
        assert await get(url, Accept="text/html") == (200, "text/plain")


# --- Post ---


async def test_post_by_choosing_files_one_after_the_other(server: str, visit: Visit, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("first.jpg", "second.jpg", "third.jpg")]
    for file in files:
        shutil.copy(ASTRONAUT, file)
    page = await connected(await visit(server))
    under_way = watch_posts(page)
    await page.get_by_label("Choose photos").set_input_files(files)
    await expect(page.locator("#photos .name")).to_have_text(["third.jpg", "second.jpg", "first.jpg"])
    await expect(page.locator("#uploads")).to_have_text("")  # they have gone, as all went well
    assert max(under_way) == 1


async def test_post_by_dropping_a_file(server: str, visit: Visit) -> None:
    page = await connected(await visit(server))
    devtools = await page.context.new_cdp_session(page)
    data = {"items": [], "files": [str(ASTRONAUT)], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver"):
        await devtools.send("Input.dispatchDragEvent", {"type": kind, "x": 300, "y": 500, "data": data})
    await expect(page.locator("#drop.over")).to_be_visible()
    await devtools.send("Input.dispatchDragEvent", {"type": "drop", "x": 300, "y": 500, "data": data})
    await expect(page.locator(CARDS)).to_contain_text(["astronaut.jpg"])
    await expect(page.locator("#drop.over")).to_have_count(0)


async def test_post_by_pasting(server: str, visit: Visit) -> None:
    page = await connected(await visit(server, permissions=["clipboard-read", "clipboard-write"]))
    png = base64.b64encode(cv2.imencode(".png", cv2.imread(str(ASTRONAUT)))[1]).decode()
    copy = """async (base64) => {
        const image = new Blob([Uint8Array.from(atob(base64), (c) => c.charCodeAt(0))], { type: "image/png" });
        await navigator.clipboard.write([new ClipboardItem({ "image/png": image })]);
    }"""
    await page.evaluate(copy, png)
    await page.keyboard.press("Control+V")
    await expect(page.locator(CARDS)).to_contain_text(["1 face"])


async def test_post_with_the_camera_of_a_phone(server: str, visit: Visit) -> None:
    page = await connected(await visit(server, has_touch=True, viewport={"width": 360, "height": 740}))
    await expect(page.get_by_text("Take a photo")).to_be_visible()
    await expect(page.get_by_label("Take a photo")).to_have_attribute("capture", "environment")
    await page.get_by_label("Take a photo").set_input_files(ASTRONAUT)
    await expect(page.locator(CARDS)).to_contain_text(["1 face"])


async def test_a_progress_bar_while_it_uploads(server: str, visit: Visit, tmp_path: Path) -> None:
    file = tmp_path / "large.jpg"
    file.write_bytes(bytes(10**6))
    page = await connected(await visit(server))
    devtools = await page.context.new_cdp_session(page)
    slow = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": 2 * 10**5}  # bytes/s
    await devtools.send("Network.emulateNetworkConditions", slow)
    await page.get_by_label("Choose photos").set_input_files(file)
    await expect(page.locator("progress[value^='0.']")).to_have_accessible_name("large.jpg")
    await expect(page.locator("#uploads .refused")).to_be_visible()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a poem", "This is no JPEG, PNG, WebP or GIF."),
        (ASTRONAUT.read_bytes()[:5000], "The photo is damaged or cut short."),
        (bytes(21 * 2**20), "The body is over 20 MiB (--max-mb)."),
        (b"", "There is no photo, only an empty file or body. Try: curl -F image=@photo.jpg"),
    ],
    ids=["a poem", "damaged", "too large", "empty"],
)
async def test_a_refused_file_shows_the_words_of_the_server(
    server: str, visit: Visit, tmp_path: Path, content: bytes, words: str
) -> None:
    file = tmp_path / "a file"
    file.write_bytes(content)
    page = await connected(await visit(server))
    await page.get_by_label("Choose photos").set_input_files([file, ASTRONAUT])
    await expect(page.locator("#uploads .refused")).to_have_text([words])
    await expect(page.locator(CARDS)).to_contain_text(["astronaut.jpg"])  # the next one follows all the same


async def test_names_are_shown_as_text(server: str, visit: Visit, tmp_path: Path) -> None:
    name = "Käthe <img src=x onerror=alert(1)>.jpg"
    page = await connected(await visit(server))
    for content in (b"a poem", ASTRONAUT.read_bytes()):
        (tmp_path / name).write_bytes(content)
        await page.get_by_label("Choose photos").set_input_files(tmp_path / name)
        await expect(page.locator("#uploads .name")).to_have_text([name])
    await expect(page.locator("#photos .name")).to_have_text([name])


# --- Watch ---


async def test_another_browser_sees_it(server: str, visit: Visit) -> None:
    poster, watcher = await connected(await visit(server)), await connected(await visit(server))
    await poster.get_by_label("Choose photos").set_input_files(ASTRONAUT)
    card = watcher.locator(CARDS)
    await expect(card).to_contain_text(["1 face"])
    await expect(card.locator(".size")).to_contain_text("512 \u00d7 512 pixels, took ")
    url = await card.get_by_label("URL of the photo").input_value()
    assert url.startswith(f"{server}/image/")
    await expect(card.get_by_role("img", name="astronaut.jpg, 1 face")).to_have_js_property("naturalWidth", 512)
    async with watcher.expect_popup() as full_size:
        await card.get_by_role("link").click()
    assert (await full_size.value).url == url


@pytest.mark.parametrize("host", ["127.0.0.1", "faces.test"], ids=["from the same machine", "by plain http"])
async def test_its_url_can_be_copied(server: str, visit: Visit, host: str) -> None:
    page = await connected(await visit(server.replace("127.0.0.1", host)))
    await post(server)
    await page.get_by_role("button", name="Copy").click()
    await expect(page.get_by_role("button", name="Copied")).to_be_visible()
    field = page.get_by_label("URL of the photo")
    url = await field.input_value()
    assert url.startswith(server.replace("127.0.0.1", host))
    await field.evaluate("field => { field.readOnly = false; field.value = ''; field.focus(); }")
    await page.keyboard.press("Control+V")
    await expect(field).to_have_value(url)


async def test_the_newest_50_stay_newest_first(server: str, visit: Visit) -> None:
    page = await connected(await visit(server))
    for number in range(52):
        await post(server, TINY, f"{number}.jpg")
    await expect(page.locator("#photos .name")).to_have_text([f"{number}.jpg" for number in reversed(range(2, 52))])


async def test_a_slow_viewer_skips_to_the_newest(server: str, visit: Visit) -> None:
    page = await connected(await visit(server))
    asked, released = [], asyncio.Event()

    async def slow_network(route: Route) -> None:
        asked.append(route.request.url)
        await released.wait()
        await route.continue_()

    await page.route("**/image/*", slow_network)
    urls = [(await post(server, name=f"{number}.jpg"))["url"] for number in range(4)]
    await expect(page.locator(CARDS)).to_have_count(4)
    assert asked == urls[:1]
    released.set()
    await expect(page.locator("#photos img").last).to_have_js_property("complete", True)
    await expect(page.locator("#photos img").nth(2)).to_have_js_property("naturalWidth", 512)
    assert asked == [urls[0], urls[3], urls[2], urls[1]]


async def test_the_frames_of_another_ones_camera_take_each_others_place(server: str, visit: Visit) -> None:
    page = await connected(await visit(server))
    await post(server, name="photo.jpg")
    for _ in range(3):
        newest = await post(server, name="live-1234.jpg")
    await expect(page.get_by_label("URL of the photo").first).to_have_value(newest["url"])
    await expect(page.locator("#photos .name")).to_have_text(["live-1234.jpg", "photo.jpg"])


async def test_it_reconnects_after_a_restart_and_says_so(visit: Visit) -> None:
    async with serving() as url:
        page = await connected(await visit(url))
    state = page.locator("#state")
    await expect(state).to_contain_text("The server is away, trying again in ")
    async with serving("--port", str(urlsplit(url).port)):
        await expect(state).to_have_text("Connected again")
        await post(url)
        await expect(page.locator(CARDS)).to_contain_text(["astronaut.jpg"])


async def test_the_page_of_ones_own_in_the_readme(visit: Visit) -> None:
    html = re.search(r"```html\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert html is not None

    async def answer(_: web.Request) -> web.Response:
        return web.Response(text=html[1].replace("localhost:8282", urlsplit(url).netloc), content_type="text/html")

    app = web.Application()
    app.router.add_get("/", answer)
    async with TestServer(app) as other_site:
        origin = f"http://127.0.0.1:{other_site.port}"
        async with serving("--allow-origin", origin) as url:
            page = await visit(origin, allow=url)
            await expect(page.get_by_role("status")).to_have_text("connected")
            await post(url)
            await expect(page.get_by_role("img", name="1 faces")).to_have_js_property("naturalWidth", 512)


# --- The live camera ---


def watch_posts(page: Page) -> list[int]:
    """How many posts were under way, each time that one was sent."""
    under_way, counts = set(), []

    def sent(request: Request) -> None:
        if request.method == "POST":
            under_way.add(request)
            counts.append(len(under_way))

    page.on("request", sent)
    page.on("response", lambda response: under_way.discard(response.request))
    return counts


async def test_the_live_camera_shows_boxes_and_counts_frames(server: str, visit: Visit) -> None:
    page, watcher = await visit(server, permissions=["camera"]), await connected(await visit(server))
    under_way = watch_posts(await connected(page))
    await page.get_by_role("button", name="Live camera").click()
    view = page.get_by_role("img", name="Your camera, 1 face")
    await expect(view).to_have_js_property("naturalWidth", 640)
    seen = cv2.imdecode(np.frombuffer(await view.screenshot(), np.uint8), cv2.IMREAD_COLOR).astype(int)
    green = (seen[..., 1] > 200) & (seen[..., 0] < 80) & (seen[..., 2] < 80)
    assert green.sum() > 500
    await expect(page.locator("#fps")).not_to_have_text("0.0")
    await expect(watcher.locator(CARDS)).to_contain_text(["1 face"])
    assert max(under_way) == 1
    await page.get_by_role("button", name="Stop the camera").click()
    await expect(page.locator("#stage")).to_be_hidden()


async def test_the_live_camera_stops_when_the_tab_is_hidden(server: str, visit: Visit) -> None:
    page = await connected(await visit(server, permissions=["camera"]))
    await page.get_by_role("button", name="Live camera").click()
    await expect(page.locator("#view")).to_be_visible()
    await page.evaluate("Object.defineProperty(document, 'hidden', { value: true })")  # headless tabs never are
    await page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    await expect(page.locator("#says")).to_have_text("The camera stopped, as the page was hidden.")
    assert await page.evaluate("video.srcObject") is None


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("127.0.0.1", "The browser was not allowed to use the camera."),
        (
            "faces.test",
            "Browsers give the camera only to pages by https, or from this same machine (http://localhost).",
        ),
    ],
    ids=["no permission", "plain http from another machine"],
)
async def test_where_there_is_no_camera_it_says_why(server: str, visit: Visit, host: str, words: str) -> None:
    page = await connected(await visit(server.replace("127.0.0.1", host)))
    await page.get_by_role("button", name="Live camera").click()
    await expect(page.locator("#says")).to_have_text(words)


async def test_the_live_camera_waits_for_a_busy_server(visit: Visit) -> None:
    large = cv2.imencode(".jpg", np.zeros((7000, 7000), np.uint8))[1].tobytes()
    async with serving("--queue", "0") as url, aiohttp.ClientSession() as session:
        page = await connected(await visit(url, permissions=["camera"]))
        await page.get_by_role("button", name="Live camera").click()
        await expect(page.locator("#view")).to_be_visible()

        async def keep_busy() -> None:
            while True:
                async with session.post(f"{url}/image", data=large) as response:
                    await response.read()

        others = [asyncio.create_task(keep_busy()) for _ in range(2 * (os.cpu_count() or 1))]
        await expect(page.locator("#says")).to_contain_text("photos are waiting already")
        for other in others:
            other.cancel()
        await expect(page.locator("#says")).to_be_empty()
        await expect(page.locator("#view")).to_be_visible()


# --- For everyone ---


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_light_and_dark_by_the_setting_of_the_system(server: str, visit: Visit, scheme: str) -> None:
    page = await connected(await visit(server, color_scheme=scheme))
    pixels = cv2.imdecode(np.frombuffer(await page.screenshot(), np.uint8), cv2.IMREAD_GRAYSCALE)
    assert (np.median(pixels) < 50) == (scheme == "dark")


async def test_it_fits_a_phone(server: str, visit: Visit) -> None:
    page = await connected(await visit(server, viewport={"width": 360, "height": 740}, permissions=["camera"]))
    await post(server, name="a name of many words " * 5 + ".jpg")
    await expect(page.locator(CARDS)).to_be_visible()
    await page.get_by_role("button", name="Live camera").click()
    await expect(page.locator("#view")).to_be_visible()
    assert await page.evaluate("document.documentElement.scrollWidth") == 360


async def test_it_works_by_keyboard(server: str, visit: Visit) -> None:
    page = await connected(await visit(server, permissions=["camera"]))
    chooser: asyncio.Future[FileChooser] = asyncio.get_running_loop().create_future()
    page.once("filechooser", lambda opened: chooser.set_result(opened))
    await page.keyboard.press("Tab")
    await expect(page.get_by_label("Choose photos")).to_be_focused()
    await page.keyboard.press("Enter")
    async with asyncio.timeout(TIMEOUT):
        await (await chooser).set_files(ASTRONAUT)
    await expect(page.locator(CARDS)).to_be_visible()
    await page.keyboard.press("Tab")
    await expect(page.get_by_role("button", name="Live camera")).to_be_focused()
    await page.keyboard.press("Enter")
    await expect(page.locator("#view")).to_be_visible()
    await page.keyboard.press("Enter")
    await expect(page.locator("#view")).to_be_hidden()
    for name in ("link", "textbox", "button"):
        await page.keyboard.press("Tab")
        focused = page.locator(CARDS).get_by_role(name)
        await expect(focused).to_be_focused()
        assert await focused.evaluate("element => getComputedStyle(element).outlineStyle") == "solid"


async def test_a_screen_reader_is_told_of_new_photos(server: str, visit: Visit) -> None:
    page = await connected(await visit(server))
    for _ in range(2):
        await post(server)
    await expect(page.get_by_role("status").filter(has_text="new photo")).to_have_text("2 new photos, 2 faces")
