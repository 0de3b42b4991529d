"""The page at /, in a real Chromium, with a real server."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import re
import shutil
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.test_utils import TestServer
from helpers import (
    ROOT,
    TIMEOUT,
    Server,
    ask_json,
    connect,
    head_of,
    post_photo,
    run_server,
    to_get,
)
from pages import (
    CARDS,
    LAPTOP,
    PHONE,
    PROJECTOR,
    choose,
    connected,
    expect,
    grey_jpeg,
    names,
    unanswered,
)
from photos import ASTRONAUT, ASTRONAUT_FILE, TINY, cv2, encode, np, pixels

from server import Config, Face, create_app, load_detector

if TYPE_CHECKING:
    from pages import Visit
    from playwright.async_api import Browser, FileChooser, Page, Request, Route, WebSocketRoute

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def kind_of(url: str, **headers: str) -> tuple[int, str]:
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
async def test_the_page_is_for_browsers_the_text_for_curl(
    url: str, accept: str, content_type: str
) -> None:
    assert await kind_of(url, Accept=accept) == (200, content_type)


async def test_server_py_alone_serves_the_text(tmp_path: Path) -> None:
    program = Path(shutil.copy(ROOT / "server.py", tmp_path))
    with run_server(program=program) as server:
        assert await kind_of(server.url, Accept="text/html") == (200, "text/plain")


async def test_no_script_runs_but_that_of_the_page(url: str, browser: Browser) -> None:
    page = await browser.new_page()
    await page.goto(url)
    blocked = """() => new Promise((done) => {
        addEventListener("securitypolicyviolation", (event) => done(event.effectiveDirective));
        document.body.append(Object.assign(document.createElement("script"), { text: "alert(1)" }));
    })"""
    async with asyncio.timeout(TIMEOUT):
        assert await page.evaluate(blocked) == "script-src-elem"
    await page.context.close()


async def test_a_change_of_a_file_shows_on_reload(visit: Visit, tmp_path: Path) -> None:
    program = Path(shutil.copy(ROOT / "server.py", tmp_path))
    shutil.copytree(ROOT / "static", tmp_path / "static")
    script = tmp_path / "static" / "page.js"
    os.utime(script, (0, 0))  # browsers keep what has not changed for long, if they are not told
    with run_server(program=program) as server:
        page = await connected(await visit(server.url))
        script.write_text(script.read_text("utf-8").replace('"Connected"', '"Changed"'), "utf-8")
        await page.reload()
        await expect(page.locator("#state")).to_have_text("Changed")


async def test_an_answer_without_a_body_has_none(fresh: Server) -> None:
    """What came after it would spoil the next answer on its connection."""
    lines = ("Accept-Encoding: deflate", "Connection: close")
    unchanged = to_get("/static/page.js", "If-None-Match: *", *lines)
    for request, status in ((head_of("HEAD", "/static/page.js", *lines), 200), (unchanged, 304)):
        async with connect(fresh) as client:
            await client.send(request)
            assert (await client.head())[0] == status
            assert await client.end() == b""


@contextlib.asynccontextmanager
async def mounted_below_a_path() -> AsyncIterator[str]:
    """Run a server behind a proxy that has it at /class/room/; yields its URL."""

    async def forward(request: web.Request) -> web.StreamResponse:
        target = f"{server.url}/{request.match_info['path']}"
        if "Upgrade" in request.headers:
            here = web.WebSocketResponse()
            await here.prepare(request)
            async with session.ws_connect(target, params=request.query) as there:
                async for message in there:
                    await here.send_str(message.data)
            return here
        passed = {"Accept", "Content-Type"} & set(request.headers)
        headers, body = {name: request.headers[name] for name in passed}, await request.read()
        async with session.request(request.method, target, data=body, headers=headers) as answer:
            content_type = {"Content-Type": answer.headers["Content-Type"]}
            return web.Response(
                body=await answer.read(), status=answer.status, headers=content_type
            )

    app = web.Application()
    app.router.add_route("*", "/class/room/{path:.*}", forward)
    async with aiohttp.ClientSession() as session, TestServer(app) as proxy:
        public_url = f"http://127.0.0.1:{proxy.port}/class/room"
        with run_server("--public-url", public_url) as server:
            yield public_url


async def test_it_works_below_a_path(visit: Visit) -> None:
    async with mounted_below_a_path() as url:
        page = await connected(await visit(f"{url}/", permissions=["camera"]))
        await choose(page, ASTRONAUT_FILE)
        picture = page.get_by_role("img", name="astronaut.jpg, 1 face")
        await expect(picture).not_to_have_js_property("naturalWidth", 0)
        await page.get_by_role("button", name="Live camera").click()
        await expect(page.locator("#seen")).to_have_text("1 face")
        await page.reload()
        await names(page).to_have_text(["astronaut.jpg"])


# --- Post ---


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


async def test_post_by_choosing_files_one_after_the_other(
    url: str, visit: Visit, tmp_path: Path
) -> None:
    files = [tmp_path / name for name in ("first.jpg", "second.jpg", "third.jpg")]
    for file in files:
        shutil.copy(ASTRONAUT_FILE, file)
    page = await connected(await visit(url))
    under_way = watch_posts(page)
    await choose(page, *files)
    await names(page).to_have_text(["third.jpg", "second.jpg", "first.jpg"])
    await expect(page.locator("#upload")).to_be_hidden()
    assert max(under_way) == 1


async def test_post_by_dropping_a_file(url: str, visit: Visit) -> None:
    page = await connected(await visit(url))
    devtools = await page.context.new_cdp_session(page)
    data = {"items": [], "files": [str(ASTRONAUT_FILE)], "dragOperationsMask": 1}

    async def drag(kind: str) -> None:
        event = {"type": kind, "x": 300, "y": 500, "data": data}
        await devtools.send("Input.dispatchDragEvent", event)

    await drag("dragEnter")
    await drag("dragOver")
    await expect(page.locator("body.over")).to_be_visible()
    await drag("drop")
    await names(page).to_have_text(["astronaut.jpg"])
    await expect(page.locator("body.over")).to_have_count(0)


async def test_post_by_pasting(url: str, visit: Visit) -> None:
    page = await connected(await visit(url, permissions=["clipboard-read", "clipboard-write"]))
    png = base64.b64encode(encode(".png")).decode()
    copy = """async (base64) => {
        const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
        const image = new Blob([bytes], { type: "image/png" });
        await navigator.clipboard.write([new ClipboardItem({ "image/png": image })]);
    }"""
    await page.evaluate(copy, png)
    await page.keyboard.press("Control+V")
    await expect(page.locator(CARDS)).to_contain_text(["1 face"])


async def test_post_with_the_camera_of_a_phone(url: str, visit: Visit) -> None:
    page = await connected(await visit(url, **PHONE))
    await expect(page.get_by_text("Take a photo", exact=True)).to_be_visible()
    await expect(page.get_by_label("Take a photo")).to_have_attribute("capture", "environment")
    await page.get_by_label("Take a photo").set_input_files(ASTRONAUT_FILE)
    await expect(page.locator(CARDS)).to_contain_text(["1 face"])


@contextlib.asynccontextmanager
async def slow_network(page: Page) -> AsyncIterator[None]:
    """Inside, 10 MB would take 50 s; in the end it goes on as fast as it can."""
    devtools = await page.context.new_cdp_session(page)
    network = {"offline": False, "latency": 0, "downloadThroughput": -1}  # bytes/s

    async def upload(throughput: int) -> None:
        await devtools.send(
            "Network.emulateNetworkConditions", network | {"uploadThroughput": throughput}
        )

    await upload(2 * 10**5)
    yield
    await upload(-1)


async def test_a_progress_bar_while_it_uploads(url: str, visit: Visit, tmp_path: Path) -> None:
    file = tmp_path / "large.jpg"
    file.write_bytes(bytes(10**7))
    page = await connected(await visit(url))
    async with slow_network(page):
        await choose(page, file)
        await expect(page.locator("progress[value^='0.']")).to_have_accessible_name("large.jpg")
    await expect(page.locator("#refusals")).to_contain_text("large.jpg: ")
    await expect(page.locator("#upload")).to_be_hidden()


async def test_the_progress_of_a_list_shows_the_one_under_way(
    url: str, visit: Visit, tmp_path: Path
) -> None:
    large = tmp_path / "large.jpg"
    large.write_bytes(bytes(10**7))
    page = await connected(await visit(url, **PHONE))
    async with slow_network(page):
        await choose(page, *[ASTRONAUT_FILE] * 3, large, ASTRONAUT_FILE)
        await expect(page.locator("progress[value^='0.']")).to_have_accessible_name(
            "4 of 5: large.jpg"
        )
        await expect(page.get_by_text("4 of 5: large.jpg")).to_be_in_viewport()


async def test_names_are_shown_as_text(url: str, visit: Visit, tmp_path: Path) -> None:
    name = "Käthe <img src=x onerror=alert(1)>.jpg"
    page = await connected(await visit(url))
    (tmp_path / name).write_bytes(b"a poem")
    await choose(page, tmp_path / name)
    await expect(page.locator("#refusals")).to_contain_text(f"{name}: ")
    (tmp_path / name).write_bytes(ASTRONAUT)
    await choose(page, tmp_path / name)
    await names(page).to_have_text([name])


# --- Photos are made smaller before they are posted ---


async def test_a_large_photo_is_made_smaller_and_upright(
    url: str, visit: Visit, tmp_path: Path
) -> None:
    exif = b"\xff\xe1\0\x22Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    photo = grey_jpeg(3000, 2000)
    (tmp_path / "turned.jpg").write_bytes(photo[:2] + exif + photo[2:])  # a quarter, clockwise
    page = await connected(await visit(url))
    await choose(page, tmp_path / "turned.jpg")
    await expect(page.locator(".size")).to_contain_text("1365\u00a0\u00d7\u00a02048 px")
    await names(page).to_have_text(["turned.jpg"])


async def test_a_photo_that_fits_goes_as_it_is(url: str, visit: Visit, tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "small.png"), np.zeros((2048, 100), np.uint8))
    page = await connected(await visit(url))
    await choose(page, tmp_path / "small.png")
    await names(page).to_have_text(["small.png"])


async def test_what_only_the_browser_can_read_goes_as_a_jpeg(
    url: str, visit: Visit, tmp_path: Path
) -> None:
    cv2.imwrite(str(tmp_path / "astronaut.bmp"), pixels())
    page = await connected(await visit(url))
    await choose(page, tmp_path / "astronaut.bmp")
    await expect(page.locator(CARDS)).to_contain_text(["1 face"])
    await names(page).to_have_text(["astronaut.jpg"])


async def test_what_the_browser_cannot_read_goes_as_it_is(
    url: str, visit: Visit, tmp_path: Path
) -> None:
    (tmp_path / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    page = await connected(await visit(url))
    await choose(page, tmp_path / "IMG_1.HEIC")
    await expect(page.locator("#refusals p")).to_contain_text(re.compile("^IMG_1.HEIC: .*iPhone"))


# --- Errors ---


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a poem", "JPEG, PNG, WebP or GIF"),
        (ASTRONAUT[:5000], "damaged"),
        (bytes(21 * 2**20), "It has 21 MB. The server takes 20 MB at most."),
    ],
    ids=["a poem", "damaged", "too large"],
)
async def test_a_refusal_speaks_to_a_person(
    url: str, visit: Visit, tmp_path: Path, content: bytes, words: str
) -> None:
    (tmp_path / "photo.jpg").write_bytes(content)
    page = await connected(await visit(url))
    await choose(page, tmp_path / "photo.jpg", ASTRONAUT_FILE)
    await expect(page.locator("#refusals p")).to_have_text([re.compile(f"^photo.jpg: .*{words}")])
    await expect(page.locator("#refusals p")).not_to_contain_text("--")  # no option of the server
    await names(page).to_have_text(["astronaut.jpg"])  # the next one follows all the same


@pytest.mark.parametrize("device", [PHONE, LAPTOP], ids=["phone", "laptop"])
async def test_refusals_never_push_the_photos_away(
    url: str, visit: Visit, tmp_path: Path, device: Any
) -> None:
    await post_photo(url)
    page = await connected(await visit(url, **device))
    await expect(page.locator("#photos img")).not_to_have_js_property("naturalWidth", 0)
    before = await page.locator(CARDS).bounding_box()
    files = [tmp_path / f"{number}.txt" for number in range(20)]
    for file in files:
        file.write_bytes(b"a poem")
    await choose(page, *files)
    await expect(page.locator("#refusals > li")).to_have_count(20)
    assert await page.locator(CARDS).bounding_box() == before
    over = await page.locator("#notices").bounding_box()
    assert over is not None and over["height"] <= device["viewport"]["height"] / 2


async def test_refusals_can_be_dismissed(url: str, visit: Visit, tmp_path: Path) -> None:
    files = [tmp_path / "1.txt", tmp_path / "2.txt"]
    for file in files:
        file.write_bytes(b"a poem")
    page = await connected(await visit(url))
    await choose(page, *files)
    refusals, dismiss = (
        page.locator("#refusals p"),
        page.get_by_role("button", name="Dismiss", exact=True),
    )
    await expect(refusals).to_have_count(2)
    await dismiss.first.click()
    await expect(refusals).to_contain_text(["1.txt"])
    await expect(dismiss).to_be_focused()
    await page.keyboard.press("Enter")
    await expect(refusals).to_have_count(0)
    await expect(page.get_by_label("Choose photos")).to_be_focused()


async def test_all_refusals_can_be_dismissed_at_once(
    url: str, visit: Visit, tmp_path: Path
) -> None:
    (tmp_path / "image.jpg").write_bytes(b"a poem")
    page = await connected(await visit(url))
    await choose(page, *[tmp_path / "image.jpg"] * 3)  # so are all photos of an iPhone called
    await expect(page.locator("#refusals > li")).to_have_count(3)
    await page.get_by_role("button", name="Dismiss all").click()
    await expect(page.locator("#refusals > li")).to_have_count(0)


async def test_an_upload_that_failed_can_be_tried_again(url: str, visit: Visit) -> None:
    page = await connected(await visit(url))
    await page.route("**/image", lambda route: route.abort(), times=1)
    await choose(page, ASTRONAUT_FILE)
    await expect(page.locator("#refusals p")).to_have_text(
        ["astronaut.jpg: The server cannot be reached. Are you still in its Wi-Fi?"]
    )
    await page.get_by_role("button", name="Try again").click()
    await names(page).to_have_text(["astronaut.jpg"])
    await expect(page.locator("#refusals > li")).to_have_count(0)


async def test_photos_that_are_chosen_meanwhile_wait_their_turn(url: str, visit: Visit) -> None:
    page = await connected(await visit(url))
    async with unanswered(page, "**/image") as asked:
        async with page.expect_request("**/image"):
            await choose(page, ASTRONAUT_FILE)
        await choose(page, ASTRONAUT_FILE)
        await page.evaluate("smaller(new File(['a'], 'a.jpg'))")  # so long it takes to ask
        assert len(asked) == 1
    await expect(page.locator("#upload")).to_be_hidden()


# --- Watch ---


async def test_another_browser_sees_it(url: str, visit: Visit) -> None:
    poster, watcher = await connected(await visit(url)), await connected(await visit(url))
    await choose(poster, ASTRONAUT_FILE)
    card = watcher.locator(CARDS)
    await expect(card).to_contain_text(["1 face"])
    await expect(card.locator(".size")).to_contain_text("512\u00a0\u00d7\u00a0512 px, took ")
    picture = card.get_by_role("img", name="astronaut.jpg, 1 face")
    await expect(picture).not_to_have_js_property("naturalWidth", 0)
    async with watcher.expect_popup() as full_size:
        await card.get_by_role("link").click()
    (listed,) = await ask_json("GET", f"{url}/image")
    assert (await full_size.value).url == listed["url"]


@pytest.mark.parametrize("device", [PHONE, LAPTOP], ids=["phone", "laptop"])
async def test_a_late_visitor_sees_the_photos_that_are_kept(
    url: str, visit: Visit, device: Any
) -> None:
    for number in range(3):
        await post_photo(url, TINY, f"{number}.jpg")
    page = await visit(url, **device)
    await names(page).to_have_text(["2.jpg", "1.jpg", "0.jpg"])
    await page.reload()
    await names(page).to_have_text(["2.jpg", "1.jpg", "0.jpg"])


async def visit_to_lose(visit: Visit, url: str) -> tuple[Page, list[WebSocketRoute]]:
    """Open the page, whose time stands still; return it and its websockets, to close."""
    page = await visit(f"{url}/health", paused=True)
    sockets: list[WebSocketRoute] = []

    def connect(socket: WebSocketRoute) -> None:
        sockets.append(socket)
        socket.connect_to_server()

    await page.route_web_socket(re.compile("/faces"), connect)
    await connected_page(page, url)
    return page, sockets


async def test_after_a_lost_connection_the_page_shows_what_it_missed(
    url: str, visit: Visit
) -> None:
    page, sockets = await visit_to_lose(visit, url)
    for number in range(2):
        await post_photo(url, TINY, f"{number}.jpg")
    await names(page).to_have_text(["1.jpg", "0.jpg"])
    await sockets[0].close()
    await expect(page.locator("#state")).to_contain_text("The server is away")
    await post_photo(url, TINY, "2.jpg")
    await page.clock.run_for(1000)  # until it connects again
    await expect(page.locator("#state")).to_have_text("Connected again")
    await names(page).to_have_text(["2.jpg", "1.jpg", "0.jpg"])


async def connected_page(page: Page, url: str) -> None:
    await page.goto(url)
    await connected(page)


@pytest.mark.parametrize("listed", [False, True], ids=["after the list", "before the list"])
async def test_a_photo_that_arrives_while_the_list_loads_is_shown_once(
    url: str, visit: Visit, listed: bool
) -> None:
    page = await visit(f"{url}/health")
    await post_photo(url, TINY, "old.jpg")
    released = asyncio.Event()

    async def answer_late(route: Route) -> None:
        if listed:
            await released.wait()
        answer = await route.fetch()
        await released.wait()
        await route.fulfill(response=answer)

    await page.route("**/image", answer_late)
    async with page.expect_request("**/image"):
        await connected_page(page, url)
    await post_photo(url, TINY, "new.jpg")
    await names(page).to_have_text(["new.jpg"])
    released.set()
    await names(page).to_have_text(["new.jpg", "old.jpg"])


async def test_after_a_restart_it_shows_what_is_kept_and_says_so(visit: Visit) -> None:
    with run_server() as server:
        page = await connected(await visit(server.url))
        await post_photo(server.url, TINY, "gone.jpg")
        await names(page).to_have_text(["gone.jpg"])
    state = page.locator("#state")
    await expect(state).to_have_text("The server is away")
    with run_server("--port", str(server.port)):
        await expect(state).to_have_text("Connected again")
        await names(page).to_have_count(0)
        await post_photo(server.url)
        await names(page).to_have_text(["astronaut.jpg"])


@pytest.mark.parametrize("host", ["127.0.0.1", "classroom"], ids=["https or local", "plain http"])
async def test_its_link_can_be_copied(url: str, visit: Visit, host: str) -> None:
    page = await connected(await visit(url.replace("127.0.0.1", host), paused=True))
    photo = await post_photo(url)
    await page.get_by_role("button", name="Copy link").click()
    await expect(page.get_by_role("button", name="Copied")).to_be_focused()
    await page.clock.run_for(2000)
    await expect(page.get_by_role("button", name="Copy link")).to_be_focused()
    paste = "document.body.append(Object.assign(document.createElement('input'), { id: 'paste' }))"
    await page.evaluate(paste)
    await page.locator("#paste").focus()
    await page.keyboard.press("Control+V")
    url = photo["url"].replace("127.0.0.1", host)
    await expect(page.locator("#paste")).to_have_value(url)


async def test_the_newest_50_stay_newest_first(url: str, visit: Visit) -> None:
    page = await connected(await visit(url))
    for number in range(52):
        await post_photo(url, TINY, f"{number}.jpg")
    await names(page).to_have_text([f"{number}.jpg" for number in reversed(range(2, 52))])


async def test_a_slow_viewer_skips_to_the_newest(url: str, visit: Visit) -> None:
    page = await connected(await visit(url, paused=True))  # or a picture were passed over
    asked, released = [], asyncio.Event()

    async def slow_network(route: Route) -> None:
        asked.append(route.request.url.partition("?")[0])
        await released.wait()
        await route.continue_()

    await page.route(re.compile("/image/"), slow_network)
    async with page.expect_request(re.compile("/image/")):
        urls = [(await post_photo(url, name="0.jpg"))["url"]]
    urls += [(await post_photo(url, name=f"{number}.jpg"))["url"] for number in range(1, 4)]
    await expect(page.locator(CARDS)).to_have_count(4)
    see = "img => new Promise((seen) => new IntersectionObserver(seen).observe(img))"
    await page.locator("#photos img").first.evaluate(see)  # as the page does
    assert asked == urls[:1]
    released.set()
    await expect(page.locator("#photos img").nth(2)).not_to_have_js_property("naturalWidth", 0)
    assert asked == [urls[0], urls[3], urls[2], urls[1]]


async def test_after_a_lost_connection_a_picture_that_failed_comes(url: str, visit: Visit) -> None:
    page, sockets = await visit_to_lose(visit, url)
    await page.route("**/image/*", lambda route: route.abort())
    async with page.expect_event("requestfailed"):
        await post_photo(url)
    await page.unroute("**/image/*")
    await sockets[0].close()
    await expect(page.locator("#state")).to_contain_text("The server is away")
    await page.clock.run_for(1000)  # until it connects again
    await expect(page.locator("#photos img")).not_to_have_js_property("naturalWidth", 0)


async def test_only_pictures_near_the_screen_are_loaded(url: str, visit: Visit) -> None:
    for number in range(30):
        await post_photo(url, TINY, f"{number}.jpg")
    page = await connected(await visit(url, **PHONE))
    await expect(page.locator("#photos img").nth(2)).to_have_js_property("naturalWidth", 9)
    last = page.locator("#photos img").last
    await expect(last).to_have_js_property("naturalWidth", 0)
    assert await page.locator("#photos img[src]").count() < 20
    await last.scroll_into_view_if_needed()
    await expect(last).to_have_js_property("naturalWidth", 9)


async def test_the_example_page_of_the_docs_works(visit: Visit) -> None:
    html = re.search(r"```html\n(.*?)```", (ROOT / "docs/page.md").read_text("utf-8"), re.DOTALL)
    assert html is not None

    async def answer(_: web.Request) -> web.Response:
        return web.Response(
            text=html[1].replace("127.0.0.1:8282", f"127.0.0.1:{server.port}"),
            content_type="text/html",
        )

    app = web.Application()
    app.router.add_get("/", answer)
    async with TestServer(app) as other_site:
        origin = f"http://127.0.0.1:{other_site.port}"
        with run_server("--allow-origin", origin) as server:
            page = await visit(origin, allow=server.url)
            await expect(page.get_by_role("status")).to_have_text("connected")
            await post_photo(server.url)
            await expect(page.get_by_role("img", name="1 faces")).not_to_have_js_property(
                "naturalWidth", 0
            )


# --- The live camera ---


async def start_camera(page: Page) -> Page:
    await page.get_by_role("button", name="Live camera").click()
    await expect(page.locator("#seen")).to_have_text("1 face")
    return page


@pytest_asyncio.fixture(loop_scope="session")
async def camera(url: str, visit: Visit) -> Page:
    """A page whose camera is on."""
    return await start_camera(await connected(await visit(url, permissions=["camera"])))


async def green_box(page: Page, selector: str) -> list[float]:
    """Where green lines are in what is seen: left, top, width and height, of 1."""
    seen = np.frombuffer(await page.locator(selector).screenshot(), np.uint8)
    pixels = cv2.imdecode(seen, cv2.IMREAD_COLOR).astype(int)
    green = (pixels[..., 1] > 200) & (pixels[..., 0] < 80) & (pixels[..., 2] < 80)
    x, y, width, height = cv2.boundingRect(green.astype(np.uint8))
    rows, columns = green.shape
    return [x / columns, y / rows, width / columns, height / rows]


async def test_the_camera_shows_the_video_itself_at_its_own_rate(camera: Page) -> None:
    """As many frames as in a video beside it, whose frames nobody sends anywhere."""
    await expect(camera.locator("video")).to_be_visible()
    count_frames = """async () => {
        const beside = Object.assign(document.createElement("video"), { muted: true });
        beside.srcObject = video.srcObject;
        await beside.play();
        const frames = (each) => each.getVideoPlaybackQuality().totalVideoFrames;
        const count = () => [video, beside].map(frames);
        const before = count();
        while (frames(beside) < before[1] + 30)
            await new Promise((done) => beside.requestVideoFrameCallback(done));
        return count().map((number, index) => number - before[index]);
    }"""
    async with asyncio.timeout(TIMEOUT):
        shown, beside = await camera.evaluate(count_frames)
    assert shown > 0.7 * beside


async def test_the_boxes_are_drawn_over_the_video_mirrored(camera: Page) -> None:
    await expect(camera.get_by_role("img", name="Your camera, 1 face")).to_be_visible()
    left, top, width, height = await green_box(camera, ".view")
    assert left + width / 2 == pytest.approx(1 - 282 / 640, abs=0.03)  # her face, from the right
    assert top + height / 2 == pytest.approx(140 / 480, abs=0.05)
    assert width == pytest.approx(110 / 640, abs=0.06)
    mirrored = "element => getComputedStyle(element).transform"
    assert await camera.locator("video").evaluate(mirrored) == "matrix(-1, 0, 0, 1, 0, 0)"


async def test_a_camera_on_the_back_is_not_mirrored(url: str, visit: Visit) -> None:
    page = await connected(await visit(url, permissions=["camera"]))
    back = "MediaStreamTrack.prototype.getSettings = () => ({ facingMode: 'environment' })"
    await page.evaluate(back)
    await start_camera(page)
    left, _, width, _ = await green_box(page, ".view")
    assert left + width / 2 == pytest.approx(282 / 640, abs=0.03)


async def test_the_camera_shows_its_rate_and_the_number_of_faces(camera: Page) -> None:
    about = camera.locator("#camera .about")
    await expect(about).to_contain_text("1 face")
    await expect(about).to_contain_text(re.compile(r"\b[1-9]\d* looks a second"))


async def test_two_looks_are_under_way_at_once(url: str, visit: Visit) -> None:
    page = await connected(await visit(url, paused=True, permissions=["camera"]))
    await start_camera(page)
    see_five_more_frames = """async () => {
        for (let i = 0; i < 5; i++)
            await new Promise((done) => video.requestVideoFrameCallback(done));
    }"""
    async with unanswered(page, "**/detect") as looking, asyncio.timeout(TIMEOUT):
        while len(looking) < 2:
            await page.evaluate(see_five_more_frames)
        await page.evaluate(see_five_more_frames)
        assert len(looking) == 2


async def test_what_the_camera_sees_is_neither_kept_nor_announced(
    url: str, visit: Visit, camera: Page
) -> None:
    watcher = await connected(await visit(url))
    for _ in range(5):
        async with camera.expect_response("**/detect"):
            pass  # and look again
    assert await ask_json("GET", f"{url}/image") == []
    await post_photo(url, name="later.jpg")
    await names(watcher).to_have_text(["later.jpg"])


async def test_a_button_posts_one_picture_to_all(url: str, visit: Visit, camera: Page) -> None:
    watcher = await connected(await visit(url))
    await camera.get_by_role("button", name="Post this picture to all").click()
    await names(watcher).to_have_text(["camera.jpg"])
    (listed,) = await ask_json("GET", f"{url}/image")
    picture = await ask_json("GET", f"{listed['url']}/meta")
    (face,) = picture["faces"]
    assert (picture["width"], picture["height"]) == (640, 480)
    assert face["x"] + face["width"] / 2 == pytest.approx(282, abs=20)  # as others see her


async def test_the_camera_stops_when_told_to(camera: Page) -> None:
    await camera.get_by_role("button", name="Stop the camera").click()
    await expect(camera.locator("#camera")).to_be_hidden()
    assert await camera.evaluate("video.srcObject") is None


async def test_the_camera_stops_when_the_tab_is_hidden(camera: Page) -> None:
    hidden = "Object.defineProperty(document, 'hidden', { value: true })"
    await camera.evaluate(hidden)  # headless tabs never are
    await camera.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    await expect(camera.locator("#refusals p")).to_have_text(
        ["The camera stopped, as the page was hidden."]
    )
    assert await camera.evaluate("video.srcObject") is None


async def test_without_a_permission_it_says_so(url: str, visit: Visit) -> None:
    page = await connected(await visit(url))
    await page.get_by_role("button", name="Live camera").click()
    await expect(page.locator("#refusals p")).to_contain_text(["was not allowed to use the camera"])


@pytest.mark.parametrize(
    ("device", "words"),
    [(LAPTOP, "needs https, or localhost"), (PHONE, "needs https: take a photo instead")],
    ids=["laptop", "phone"],
)
async def test_by_plain_http_the_button_says_what_to_do_before_one_presses_it(
    url: str, visit: Visit, device: Any, words: str
) -> None:
    page = await connected(await visit(url.replace("127.0.0.1", "classroom"), **device))
    button = page.get_by_role("button", name="Live camera")
    await expect(button).to_contain_text(words)
    await button.click()
    local = url.replace("127.0.0.1", "localhost")
    await expect(page.locator("#refusals p")).to_contain_text([local])


async def test_the_camera_waits_for_a_busy_server(visit: Visit) -> None:
    both_work, go_on = threading.Barrier(3), threading.Event()
    detector = load_detector()

    def detect(image: np.ndarray) -> list[Face]:
        if len(image) == 9:  # rows, as TINY has
            both_work.wait(TIMEOUT)
            go_on.wait(TIMEOUT)
        return detector(image)

    async with TestServer(create_app(Config(threads=2, queue=0), detect)) as server:
        url = f"http://127.0.0.1:{server.port}"
        page = await connected(await visit(url, permissions=["camera"]))
        posts = [asyncio.create_task(post_photo(url, TINY)) for _ in range(2)]
        await asyncio.to_thread(both_work.wait, TIMEOUT)
        await page.get_by_role("button", name="Live camera").click()
        await expect(page.locator("#seen")).to_have_text("The server is busy")
        go_on.set()
        await asyncio.gather(*posts)
        await expect(page.locator("#seen")).to_have_text("1 face")


async def test_the_camera_waits_for_a_server_that_is_away(visit: Visit) -> None:
    with run_server() as server:
        page = await start_camera(await connected(await visit(server.url, permissions=["camera"])))
    await expect(page.locator("#seen")).to_have_text("The server is away")
    with run_server("--port", str(server.port)):
        await expect(page.locator("#seen")).to_have_text("1 face")


# --- It fits ---


@pytest.mark.parametrize("device", [LAPTOP, PROJECTOR], ids=["laptop", "projector"])
@pytest.mark.parametrize(
    "size", [(512, 512), (1080, 1920), (4000, 500)], ids=["square", "portrait", "panorama"]
)
async def test_the_newest_photo_and_its_words_are_on_the_first_screen(
    url: str, visit: Visit, device: Any, size: tuple[int, int]
) -> None:
    for _ in range(3):
        await post_photo(url, TINY)
    await post_photo(url, grey_jpeg(*size))
    page = await connected(await visit(url.replace("127.0.0.1", "classroom"), **device))
    newest = page.locator(CARDS).first
    await expect(newest.locator("img")).not_to_have_js_property("naturalWidth", 0)
    await expect(newest.locator("img")).to_be_in_viewport(ratio=1)
    for words in await newest.locator(".facts > *").all():
        await expect(words).to_be_in_viewport(ratio=1)


async def test_the_camera_leaves_the_newest_photo_on_the_first_screen(
    url: str, visit: Visit
) -> None:
    await post_photo(url)
    page = await connected(await visit(url, permissions=["camera"], **LAPTOP))
    await start_camera(page)
    await expect(page.locator("#camera")).to_be_in_viewport(ratio=1)
    await expect(page.locator(CARDS)).to_be_in_viewport(ratio=1)


async def test_30_photos_fit_a_phone_in_two_columns(url: str, visit: Visit) -> None:
    for number in range(30):
        await post_photo(url, TINY, f"{number} is a name of many words.jpg")
    page = await connected(await visit(url, permissions=["camera"], **PHONE))
    await expect(page.locator(CARDS)).to_have_count(30)
    lefts = "cards => new Set(cards.map((card) => card.getBoundingClientRect().left)).size"
    assert await page.locator(CARDS).evaluate_all(lefts) == 2
    height, width = "document.documentElement.scrollHeight", "document.documentElement.scrollWidth"
    assert await page.evaluate(height) < 6000
    await start_camera(page)
    assert await page.evaluate(width) == 360


# --- Words by device ---


async def test_dropping_is_only_mentioned_where_it_works(url: str, visit: Visit) -> None:
    drop = re.compile("drop", re.IGNORECASE)
    phone, laptop = await visit(url, **PHONE), await visit(url, **LAPTOP)
    await expect((await connected(laptop)).get_by_text(drop)).to_be_visible()
    await expect((await connected(phone)).get_by_text(drop)).to_be_hidden()


@pytest.mark.parametrize("device", [PHONE, LAPTOP], ids=["phone", "laptop"])
async def test_an_empty_page_tells_how_to_post_from_a_terminal(
    url: str, visit: Visit, device: Any
) -> None:
    page = await connected(await visit(url, **device))
    command = page.get_by_text(f"curl -F image=@photo.jpg {url}/image")
    await expect(command).to_be_in_viewport(ratio=1)
    await post_photo(url)
    await expect(command).to_be_hidden()


async def test_an_empty_page_shows_the_address_for_others(url: str, visit: Visit) -> None:
    address = url.replace("127.0.0.1", "classroom")
    page = await connected(await visit(address))
    await expect(page.locator("#empty").get_by_text(address, exact=True)).to_be_visible()
    await expect(page.locator("#address")).to_be_hidden()  # it would stand there twice
    await post_photo(url)
    await expect(page.locator("#address")).to_contain_text(address)


async def test_a_local_server_says_how_to_let_others_in(url: str, visit: Visit) -> None:
    page = await connected(await visit(url))
    await expect(page.locator("#empty")).to_contain_text("Start the server with --host 0.0.0.0")


# --- For everyone ---


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_light_and_dark_by_the_setting_of_the_system(
    url: str, visit: Visit, scheme: str
) -> None:
    page = await connected(await visit(url, color_scheme=scheme))
    seen = np.frombuffer(await page.screenshot(), np.uint8)
    assert (np.median(cv2.imdecode(seen, cv2.IMREAD_GRAYSCALE)) < 50) == (scheme == "dark")


async def test_it_works_by_keyboard(url: str, visit: Visit) -> None:
    page = await connected(await visit(url, permissions=["camera"]))
    chooser: asyncio.Future[FileChooser] = asyncio.get_running_loop().create_future()
    page.once("filechooser", lambda opened: chooser.set_result(opened))
    await page.keyboard.press("Tab")
    await expect(page.get_by_label("Choose photos")).to_be_focused()
    await page.keyboard.press("Enter")
    async with asyncio.timeout(TIMEOUT):
        await (await chooser).set_files(ASTRONAUT_FILE)
    await expect(page.locator(CARDS)).to_be_visible()
    await page.keyboard.press("Tab")
    await expect(page.get_by_role("button", name="Live camera")).to_be_focused()
    await page.keyboard.press("Enter")
    await expect(page.locator("#camera")).to_be_visible()
    for name in ("Hold", "Projector", "Post this picture to all"):
        await page.keyboard.press("Tab")
        await expect(page.get_by_role("button", name=name)).to_be_focused()
    for _ in range(3):
        await page.keyboard.press("Shift+Tab")
    await page.keyboard.press("Enter")
    await expect(page.locator("#camera")).to_be_hidden()


async def test_a_photo_has_two_stops_for_the_tab_key(url: str, visit: Visit) -> None:
    for name in ("second.jpg", "first.jpg"):
        await post_photo(url, TINY, name)
    page = await connected(await visit(url))
    await expect(page.locator(CARDS)).to_have_count(2)
    await page.get_by_role("button", name="Projector").focus()
    for card in await page.locator(CARDS).all():
        for role in ("link", "button"):
            await page.keyboard.press("Tab")
            focused = card.get_by_role(role)
            await expect(focused).to_be_focused()
            assert await focused.evaluate("e => getComputedStyle(e).outlineStyle") == "solid"


async def test_a_screen_reader_is_told_of_new_photos(url: str, visit: Visit) -> None:
    page = await connected(await visit(url, paused=True))
    for _ in range(2):
        await post_photo(url)
    await expect(page.locator(CARDS)).to_have_count(2)
    await page.clock.run_for(2000)
    news = page.get_by_role("status").filter(has_text="new photo")
    await expect(news).to_have_text("2 new photos, 2 faces")
