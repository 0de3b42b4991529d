"""The page in a room: how a class joins, the projector, a network that dies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import re
import select
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import aiohttp
import pytest
import pytest_asyncio
from helpers import (
    NPM_INSTALL,
    ROOT,
    TIMEOUT,
    Server,
    ask,
    connect,
    health,
    post_and_get_path,
    post_photo,
    run_server,
    to_get,
    to_post,
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
from photos import ASTRONAUT, ASTRONAUT_FILE, MIB, TINY, cv2, encode, np, photo_of, pixels

from server import shrink

if TYPE_CHECKING:
    from pages import Visit
    from playwright.async_api import Browser, Page

pytestmark = pytest.mark.asyncio(loop_scope="session")
SIDE = PHONE | {"viewport": {"width": 740, "height": 360}}
DEVICES: dict[str, Any] = {
    "projector": PROJECTOR,
    "laptop": LAPTOP,
    "dark": LAPTOP | {"color_scheme": "dark"},
    "phone": PHONE | {"device_scale_factor": 2},
    "phone on its side": SIDE | {"device_scale_factor": 2},
}
AXE = Path(__file__).parent / "node_modules" / "axe-core" / "axe.min.js"
MINUTE = 60_000  # ms


@pytest.fixture
def room() -> Iterator[tuple[str, str]]:
    """A server for a room: its address for the class, and the URL for its own machine."""
    with run_server("--host", "0.0.0.0") as server:
        yield server.url, f"http://127.0.0.1:{server.port}"


def read_codes(picture: Path) -> list[str]:
    """What zbarimg reads in a picture."""
    if shutil.which("zbarimg") is None:
        pytest.skip("needs zbarimg: apt-get install zbar-tools")
    command = ["zbarimg", "-q", "--raw", str(picture)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    return done.stdout.splitlines()


# --- Joining ---
async def test_the_code_is_read_from_each_screen(
    room: tuple[str, str], visit: Visit, tmp_path: Path
) -> None:
    address, local = room
    pages = {name: await visit(local, **options) for name, options in DEVICES.items()}
    picture = tmp_path / "screen.png"
    for name, page in pages.items():
        await expect(page.locator("#empty .code")).not_to_have_js_property("naturalWidth", 0)
        await page.locator("#empty .code").scroll_into_view_if_needed()
        await page.screenshot(path=picture)
        assert read_codes(picture) == [f"{address}/"], f"empty, {name}"
    await post_photo(local)
    for name in ("projector", "laptop", "dark"):
        await expect(pages[name].locator("header .code")).to_be_visible()
        await pages[name].screenshot(path=picture)
        assert read_codes(picture) == [f"{address}/"], f"with a photo, {name}"
    for name in ("phone", "phone on its side"):  # who holds one is in already
        await expect(pages[name].locator("header .code")).to_be_hidden()


async def test_on_its_own_machine_the_page_shows_the_address_for_the_class(
    room: tuple[str, str], visit: Visit
) -> None:
    address, local = room
    page = await connected(await visit(local, **LAPTOP))
    await expect(page.locator("#empty .url")).to_have_text(address)
    await expect(page.get_by_text("--host")).to_be_hidden()
    command = page.locator("#curl")
    await expect(command).to_be_in_viewport(ratio=1)
    await post_photo(local)
    await expect(page.locator("#address")).to_contain_text(address)


async def test_a_local_server_shows_no_code(url: str, visit: Visit) -> None:
    page = await connected(await visit(url, **PHONE))
    option = page.locator("#alone code")
    await expect(option).to_have_text("--host 0.0.0.0")
    one_line = "code => code.getClientRects().length"
    assert await option.evaluate(one_line) == 1
    await expect(page.locator("#empty .code")).to_be_hidden()


async def test_the_page_tells_how_many_watch(url: str, visit: Visit) -> None:
    async with aiohttp.ClientSession() as session, session.ws_connect(f"{url}/faces"):
        page = await connected(await visit(url))
        await expect(page.locator("#more")).to_have_text("2 watching")


def read_terminal(terminal: int) -> bytes:
    ready, _, _ = select.select([terminal], [], [], TIMEOUT)
    assert ready
    return os.read(terminal, 2**16)


async def test_the_terminal_shows_the_code(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, str(ROOT / "server.py"), "--host", "0.0.0.0", "--port", "0"]
    process = await asyncio.create_subprocess_exec(*command, stdout=theirs, stderr=theirs)
    os.close(theirs)
    output = b""
    while b"open" not in output:
        output += read_terminal(ours)
    process.terminate()
    with contextlib.suppress(OSError):  # the server has ended
        while printed := read_terminal(ours):
            output += printed
    os.close(ours)
    async with asyncio.timeout(TIMEOUT):
        assert await process.wait() == 0
    text = output.decode()
    lines = re.findall("\x1b\\[97;40m(.*?)\x1b", text)
    rows = [[char in half for char in line] for line in lines for half in ("▀█", "▄█")]
    picture = tmp_path / "terminal.png"
    cv2.imwrite(str(picture), np.kron(np.uint8(rows) * 255, np.ones((6, 6), np.uint8)))
    (address,) = re.findall(r"open +(http://\S+)", text)
    assert read_codes(picture) == [address]


# --- The projector ---
async def test_the_projector_shows_what_the_last_row_can_read(
    room: tuple[str, str], visit: Visit, tmp_path: Path
) -> None:
    address, local = room
    await post_photo(local)
    page = await connected(await visit(local, **PROJECTOR))
    await page.get_by_role("button", name="Projector").click()
    await expect(page.locator("header .code")).to_have_css("width", "422.391px")
    size = "element => parseFloat(getComputedStyle(element).fontSize)"
    for words in ("#address .url", "#state", ".name", ".faces"):
        # A capital letter has 0.72 of the size: 34.9 mm, if 1920 px are 2 m.
        assert await page.locator(words).first.evaluate(size) * 0.72 > 33.5, words
        await expect(page.locator(words).first).to_be_in_viewport(ratio=1)
    await page.screenshot(path=tmp_path / "wall.png")
    assert read_codes(tmp_path / "wall.png") == [f"{address}/"]
    await page.keyboard.press("Escape")
    await page.evaluate("document.exitFullscreen().catch(() => {})")  # headless has no such key
    await expect(page.locator("body")).not_to_have_class("wall")


async def test_hold_keeps_the_newest_photo_and_counts_the_others(url: str, visit: Visit) -> None:
    await post_photo(url, TINY, "held.jpg")
    page = await connected(await visit(url, **LAPTOP))
    await page.get_by_role("button", name="Hold").click()
    for number in range(2):
        await post_photo(url, TINY, f"{number}.jpg")
    await expect(page.locator("#fresh")).to_have_text("2 new photos")
    await names(page).to_have_text(["held.jpg"])
    await page.get_by_role("button", name="Release").click()
    await names(page).to_have_text(["1.jpg", "0.jpg", "held.jpg"])


async def test_nothing_moves_under_somebody_who_scrolled_down(url: str, visit: Visit) -> None:
    for number in range(30):
        await post_photo(url, TINY, f"{number}.jpg")
    page = await connected(await visit(url, **PHONE))
    card = page.locator(CARDS).nth(9)
    await card.scroll_into_view_if_needed()
    before = await card.bounding_box()
    await post_photo(url, TINY, "new.jpg")
    await page.get_by_role("button", name="1 new photo").wait_for()
    assert await card.bounding_box() == before
    await page.get_by_role("button", name="1 new photo").click()
    await names(page).to_contain_text(["new.jpg", "29.jpg"])
    await expect(page.locator(CARDS).first.get_by_role("link")).to_be_focused()


async def test_the_focus_stays_among_the_photos_when_its_card_goes(url: str, visit: Visit) -> None:
    for number in range(2):
        await post_photo(url, TINY, f"{number}.jpg")
    page = await connected(await visit(url, **PROJECTOR))
    await page.locator(CARDS).nth(1).get_by_role("link").focus()
    await page.evaluate("photos = photos.slice(0, 1); show()")
    await expect(page.locator(CARDS)).to_have_count(1)
    await expect(page.locator(CARDS).get_by_role("link")).to_be_focused()


# --- Pictures that fit the network ---
WIDE = photo_of(2048, 1024)


async def test_a_phone_loads_small_pictures(url: str, visit: Visit) -> None:
    for _ in range(3):
        await post_photo(url, photo_of(2048, 2048))
    page = await visit(url, **PHONE | {"device_scale_factor": 3})
    await expect(page.locator("#photos img").nth(2)).not_to_have_js_property("naturalWidth", 0)
    sources = await page.locator("#photos img").evaluate_all("all => all.map((i) => i.currentSrc)")
    assert all(source.endswith("?width=480") for source in sources)
    assert not (await page.locator("#photos a").first.get_attribute("href")).endswith("480")


@pytest.mark.parametrize(
    ("query", "size"), [("", (2048, 1024)), ("?width=480", (480, 240)), ("?width=99", (2048, 1024))]
)
async def test_a_picture_comes_in_two_sizes(url: str, query: str, size: tuple[int, int]) -> None:
    image = await post_photo(url, WIDE)
    async with aiohttp.ClientSession() as session, session.get(image["url"] + query) as answer:
        assert pixels(await answer.read()).shape[1::-1] == size


async def test_a_small_picture_is_made_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image = await post_photo(url, WIDE)
    making = Mock(side_effect=shrink)
    monkeypatch.setattr("server.shrink", making)
    for _ in range(2):
        async with aiohttp.ClientSession() as session, session.get(f"{image['url']}?width=480"):
            making.assert_called_once()


SLOW_SHRINKING = """
import time
from pathlib import Path
shrink, began, go_on = server.shrink, Path({began!r}), Path({go_on!r})

def shrink_slowly(jpeg):
    began.touch()
    while not go_on.exists():
        time.sleep(0.01)
    return shrink(jpeg)

server.shrink = shrink_slowly"""


async def exists(path: Path) -> None:
    """Wait until there is this file."""
    async with asyncio.timeout(TIMEOUT):
        while not path.exists():  # noqa: ASYNC110, ASYNC240
            await asyncio.sleep(0.01)


async def test_who_leaves_before_a_small_picture_is_made_takes_no_place_of_a_photo(
    changed: Callable[[str], Path], tmp_path: Path
) -> None:
    began, go_on = tmp_path / "began", tmp_path / "go on"
    program = changed(SLOW_SHRINKING.format(began=str(began), go_on=str(go_on)))
    with run_server("--threads", "1", "--queue", "0", program=program) as server:
        path = await post_and_get_path(server, WIDE)
        full = (await health(server))["bytes"]
        async with connect(server) as leaving:
            await leaving.send(to_get(f"{path}?width=480"))
            await exists(began)
        assert (await ask(server, to_post(TINY))).says(201)
        go_on.touch()
        small = await ask(server, to_get(f"{path}?width=480"))
        assert len(small.body) < full / 3


async def test_small_pictures_do_not_exceed_the_room_for_images() -> None:
    """One of 481 x 481 is nearly as large as the full one."""
    noise = np.random.default_rng(1).integers(0, 256, (481, 481, 3), np.uint8)
    with run_server("--keep-mb", "2") as server:
        paths = [await post_and_get_path(server, encode(".jpg", noise)) for _ in range(7)]
        for path in paths:
            await ask(server, to_get(f"{path}?width=480"))
        assert (await health(server))["bytes"] <= 2 * MIB


async def test_no_small_picture_brings_back_an_image_that_was_dropped(
    changed: Callable[[str], Path], tmp_path: Path
) -> None:
    began, go_on = tmp_path / "began", tmp_path / "go on"
    program = changed(SLOW_SHRINKING.format(began=str(began), go_on=str(go_on)))
    with run_server("--keep", "1", program=program) as server:
        path = await post_and_get_path(server, WIDE)
        asked = asyncio.create_task(ask(server, to_get(f"{path}?width=480")))
        await exists(began)
        newer = await post_and_get_path(server, TINY)
        go_on.touch()
        await asyncio.wait([asked], timeout=TIMEOUT)
        assert asked.exception()  # it was cut off
        assert (await ask(server, to_get(path))).says(404)
        assert (await ask(server, to_get(newer))).says(200)


async def test_no_picture_is_made_larger(url: str) -> None:
    image = await post_photo(url, grey_jpeg(300, 200))
    async with (
        aiohttp.ClientSession() as session,
        session.get(image["url"]) as full,
        session.get(f"{image['url']}?width=480") as it,
    ):
        assert await full.read() == await it.read()


# --- A network that dies ---
class Proxy:
    """Passes on all bytes, until it swallows them, as a network does that loses all packets."""

    def __init__(self, port: int) -> None:
        self.to, self.open = port, asyncio.Event()
        self.open.set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, here = await asyncio.open_connection("127.0.0.1", self.to)
        await asyncio.gather(self.pump(reader, here), self.pump(there, writer))

    async def pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(2**16):
                await self.open.wait()
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()


@pytest_asyncio.fixture(loop_scope="session")
async def proxy(fresh: Server) -> AsyncIterator[tuple[Proxy, str]]:
    proxy = Proxy(fresh.port)
    listener = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    yield proxy, f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    proxy.open.set()
    listener.close()


async def test_a_silent_network_is_noticed_within_a_minute(
    proxy: tuple[Proxy, str], fresh: Server, visit: Visit
) -> None:
    network, address = proxy
    page = await connected(await visit(address, paused=True))
    await expect(page.locator("#more")).to_have_text("1 watching")
    network.open.clear()
    for _ in range(12):
        await page.clock.run_for(MINUTE // 12)
    await expect(page.locator("#state")).to_have_text("The server is away")
    await post_photo(fresh.url, TINY, "meanwhile.jpg")
    network.open.set()
    await expect(page.locator("#state")).to_have_text("Connected again")
    await names(page).to_have_text(["meanwhile.jpg"])


async def test_a_list_that_did_not_come_is_asked_for_again(fresh: Server, visit: Visit) -> None:
    await post_photo(fresh.url, TINY, "before.jpg")
    page = await visit(f"{fresh.url}/health", paused=True)
    await page.route("**/image", lambda route: route.abort(), times=1)
    await page.goto(fresh.url)
    await expect(page.locator("#empty")).to_be_visible()
    await page.clock.run_for(MINUTE // 4)  # in one more, the page would give its question up
    await names(page).to_have_text(["before.jpg"])


async def test_it_counts_down_to_the_next_try(visit: Visit) -> None:
    with run_server() as server:
        page = await connected(await visit(server.url, paused=True))
    more = page.locator("#more")
    for seconds in (1, 2, 1):  # each wait is twice as long
        await expect(more).to_have_text(f"trying again in {seconds} s")
        await page.clock.run_for(1000)
    nowrap = "element => getComputedStyle(element).whiteSpace"
    assert "nowrap" in await more.evaluate(nowrap)


async def test_an_upload_that_hangs_times_out(visit: Visit) -> None:
    with run_server("--upload-timeout", "5") as server:
        page = await connected(await visit(server.url, paused=True))
        await expect(page.locator("#more")).to_have_text("1 watching")
        assert await page.evaluate("longestUpload") == 25_000  # the server's 5 s, and 20 more
        await page.evaluate("longestUpload = 300")
        async with unanswered(page, "**/image"):
            await choose(page, ASTRONAUT_FILE)
            await expect(page.locator("#refusals p")).to_contain_text(["cannot be reached"])
            await expect(page.get_by_role("button", name="Try again")).to_be_visible()


async def test_uploads_can_be_cancelled(url: str, visit: Visit) -> None:
    page = await connected(await visit(url))
    async with unanswered(page, "**/image"):
        async with page.expect_request("**/image"):
            await choose(page, *[ASTRONAUT_FILE] * 3)
        await page.get_by_role("button", name="Cancel").press("Enter")
        await expect(page.locator("#upload")).to_be_hidden()
        await expect(page.locator("#refusals > li")).to_have_count(0)
        await expect(page.get_by_label("Choose photos")).to_be_focused()
    await choose(page, ASTRONAUT_FILE)
    await names(page).to_have_text(["astronaut.jpg"])


# --- What was wrong ---
async def test_pasting_anything_but_a_photo_is_explained(url: str, visit: Visit) -> None:
    page = await connected(await visit(url))
    await page.evaluate(
        "dispatchEvent.call(document, new ClipboardEvent('paste', "
        "{ clipboardData: new DataTransfer() }))"
    )
    await expect(page.locator("#refusals p")).to_contain_text(["no photo in what you pasted"])


async def test_a_camera_that_does_not_fit_counts_as_none(url: str, visit: Visit) -> None:
    page = await connected(await visit(url))
    await page.evaluate(
        "navigator.mediaDevices.getUserMedia = async () => "
        "{ await Promise.reject(Object.assign(new Error('Invalid constraint'), "
        "{ name: 'OverconstrainedError' })); }; 0"
    )
    await page.get_by_role("button", name="Live camera").click()
    await expect(page.locator("#refusals p")).to_have_text(["There is no camera."])


async def test_a_phone_on_its_side_shows_the_newest_photo_and_the_camera_whole(
    url: str, visit: Visit
) -> None:
    await post_photo(url, grey_jpeg(1500, 1000))
    page = await connected(await visit(url, permissions=["camera"], **SIDE))
    await expect(page.locator(CARDS)).to_be_in_viewport(ratio=1)
    await page.get_by_role("button", name="Live camera").click()
    await expect(page.locator("#camera")).to_be_in_viewport(ratio=1)
    await expect(page.locator("#shoot")).to_be_in_viewport(ratio=1)


async def test_no_other_site_may_frame_the_pages(url: str) -> None:
    async with aiohttp.ClientSession() as session:
        for path in ("/", "/docs"):
            async with session.get(url + path, headers={"Accept": "text/html"}) as answer:
                assert answer.headers["Content-Security-Policy"] == "frame-ancestors 'none'"


# --- For everyone ---
async def no_finding_of_axe(page: Page, state: str) -> None:
    if not AXE.exists():
        pytest.skip(f"needs axe-core: {NPM_INSTALL}")
    await page.evaluate(AXE.read_text("utf-8"))
    tags = ["wcag2a", "wcag2aa", "wcag21aa", "wcag22aa", "best-practice"]
    options = {"runOnly": tags}
    violations = (await page.evaluate("options => axe.run(options)", options))["violations"]
    found = [(each["id"], [node["target"] for node in each["nodes"]]) for each in violations]
    assert not found, state


@pytest.mark.parametrize("device", ["laptop", "dark", "phone", "phone on its side"])
async def test_axe_finds_nothing_in_any_state(
    room: tuple[str, str], visit: Visit, device: str
) -> None:
    _, local = room
    page = await connected(await visit(local, permissions=["camera"], **DEVICES[device]))
    await expect(page.locator("#empty")).to_be_visible()
    await no_finding_of_axe(page, "empty")
    for number in range(12):
        await post_photo(local, name=f"{number}.jpg")
    await expect(page.locator(CARDS)).to_have_count(12)
    await no_finding_of_axe(page, "photos")
    for number in range(5):
        await page.evaluate(f"say('{number}.jpg: The photo is damaged or cut short.', () => 0)")
    await no_finding_of_axe(page, "messages")
    await page.get_by_role("button", name="Dismiss all").click()
    await page.get_by_role("button", name="Live camera").click()
    await expect(page.locator("#seen")).to_have_text("1 face")
    await no_finding_of_axe(page, "camera")
    await page.get_by_role("button", name="Stop the camera").click()
    if device in ("laptop", "dark"):
        await page.get_by_role("button", name="Projector").click()
        await no_finding_of_axe(page, "projector")


# --- Firefox ---
async def test_firefox_posts_watches_and_counts(
    room: tuple[str, str], visit: Visit, firefox: Browser
) -> None:
    _, local = room
    page = await connected(await visit(local, browser=firefox, viewport=PROJECTOR["viewport"]))
    await expect(page.locator("#empty .code")).not_to_have_js_property("naturalWidth", 0)
    await choose(page, ASTRONAUT_FILE, ROOT / "README.md")
    await names(page).to_have_text(["astronaut.jpg"])
    await expect(page.locator("#photos img")).not_to_have_js_property("naturalWidth", 0)
    await expect(page.locator("#refusals p")).to_contain_text(["README.md: This is not a JPEG"])
    await page.get_by_role("button", name="Hold").click()
    await post_photo(local, ASTRONAUT, "new.jpg")
    await page.get_by_role("button", name="1 new photo").click()
    await names(page).to_have_text(["new.jpg", "astronaut.jpg"])
    await page.get_by_role("button", name="Projector").click()
    await expect(page.locator("body")).to_have_class("wall")
    await no_finding_of_axe(page, "firefox")


async def test_firefox_connects_again(visit: Visit, firefox: Browser) -> None:
    with run_server() as server:
        page = await connected(await visit(server.url, browser=firefox))
    await expect(page.locator("#state")).to_have_text("The server is away")
    with run_server("--port", str(server.port)) as again:
        await expect(page.locator("#state")).to_have_text("Connected again")
        await post_photo(again.url)
        await names(page).to_have_text(["astronaut.jpg"])
