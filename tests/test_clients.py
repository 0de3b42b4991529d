"""Browsers, proxies, curl and other programs: each gets what it needs."""

import asyncio
import json

import photos
import pytest
from helpers import (
    FORM,
    PING,
    PONG,
    START,
    Server,
    ask,
    connect,
    frame,
    head_of,
    post_and_get_path,
    run_server,
    to_get,
    to_post,
    until,
    watch,
)
from photos import ASTRONAUT, MIB, TINY


# --- Forms, as programs write them ---
async def test_what_is_around_a_form_is_ignored(server: Server) -> None:
    part = b'--b\r\nContent-Disposition: form-data; filename="a.png"\r\n\r\n' + TINY + b"\r\n"
    form = part + b"--b--\r\n"
    assert (await ask(server, to_post(form + part, FORM))).says(201)
    assert (await ask(server, to_post(b"\r\n" + form, FORM))).says(201)  # as C# programs send it


NAMES = {
    b'filename="a.png"': "a.png",
    b"filename=a.png; name=b": "a.png",
    b"filename=a.png\r\nContent-Type: image/png": "a.png",
    b'filename="a.png\r\nContent-Type: image/png': "a.png",
    b"FileName*=a.png": "a.png",
    b'filename="a;b.png"': "a;b.png",
    b'filename="\xff.png"': "\ufffd.png",
    b'filename="' + b"a" * 300 + b'"': "a" * 255,
}


@pytest.mark.parametrize("written", NAMES)
async def test_a_filename_is_read_however_it_is_written(server: Server, written: bytes) -> None:
    part = b"--b\r\nContent-Disposition: form-data; " + written + b"\r\n\r\n" + TINY
    answer = await ask(server, to_post(part + b"\r\n--b--\r\n", FORM))
    assert json.loads(answer.body)["filename"] == NAMES[written]


async def test_a_file_that_was_not_chosen_does_not_count(server: Server) -> None:
    """A browser sends an empty part for each input of a form."""
    form = START + b"\r\n\r\n" + START + b"\r\n" + TINY + b"\r\n--b--\r\n"
    assert (await ask(server, to_post(form, FORM))).says(201)


# --- Images, and who gets them ---
async def test_an_image_is_for_its_client_and_nothing_else_than_an_image(server: Server) -> None:
    path = await post_and_get_path(server, TINY)
    answer = await ask(server, to_get(path))
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert "private" in answer.headers["Cache-Control"]  # a proxy must not keep it
    assert (await ask(server, to_get("/image"))).headers["Cache-Control"] == "no-cache"


async def test_a_photo_is_kept_even_if_its_client_leaves(server: Server) -> None:
    """Somebody else may know its URL."""
    photo = photos.png(7, 9, photos.zeros(250 * MIB))  # libpng reads them for half a second
    async with connect(server) as client:
        await client.send(to_post(photo))
        await until(server, queued=1)
        client.reset()
        await until(server, queued=0)
        assert json.loads((await ask(server, to_get("/image"))).body)[0]["width"] == 7


async def test_who_pauses_for_a_moment_gets_the_whole_image(server: Server) -> None:
    path = await post_and_get_path(server, ASTRONAUT)
    async with connect(server, receive_buffer=2048) as slow:
        await slow.send(to_get(path))
        await asyncio.sleep(0.5)
        assert (await slow.answer()).says(200)


# --- Watchers ---
async def test_a_ping_is_answered(server: Server) -> None:
    async with watch(server) as client:
        await client.send(frame(PING, b"Are you there?"))
        assert await client.frame() == (PONG, b"Are you there?")


async def test_who_is_no_watcher_is_told_how_to_be_one(server: Server) -> None:
    answer = await ask(server, to_get("/faces"))
    assert answer.says(426, "wscat")
    assert answer.headers["Upgrade"] == "websocket"  # RFC 9110, 15.5.22


async def test_a_watcher_is_pinged_before_a_proxy_drops_it(changed) -> None:
    """They drop who is silent for 30 s; here, all is a hundred times as fast."""
    hurry = """
class Hurried(server.web.WebSocketResponse):
    def __init__(self, heartbeat, **options):
        assert heartbeat < 30
        super().__init__(heartbeat=heartbeat / 100, **options)

server.web.WebSocketResponse = Hurried"""
    with run_server(program=changed(hurry)) as server:
        async with watch(server) as client:
            assert await client.frame() == (PING, b"")


# --- Pages that are allowed, and pages behind a proxy ---
@pytest.mark.parametrize("what", ["Methods", "Headers"])
async def test_an_allowed_page_may_put_a_photo_and_name_its_type(server: Server, what: str) -> None:
    """Browsers ask before both."""
    page = ("Origin: http://localhost", f"Access-Control-Request-{what}: ...")
    answer = await ask(server, head_of("OPTIONS", "/image", *page))
    assert answer.headers[f"Access-Control-Allow-{what}"] == "*"


async def test_an_allowed_site_may_end_with_a_slash() -> None:
    with run_server("--allow-origin", "https://school.example/") as server:
        answer = await ask(server, to_get("/health", "Origin: https://school.example"))
        assert answer.says(200)
        assert (await ask(server, to_get("/health", "Origin: https://school.exampl"))).says(403)


@pytest.mark.parametrize("site", ["", "school.example"])
async def test_a_site_without_a_scheme_is_none_that_is_allowed(site: str) -> None:
    with run_server("--allow-origin", site) as server:
        for origin in ("null", "https://school.example"):
            assert (await ask(server, to_get("/health", f"Origin: {origin}"))).says(403)


async def test_the_page_behind_a_proxy_may_all() -> None:
    """Some proxies send the server's own name as Host."""
    with run_server("--public-url", "https://school.test/app") as server:
        assert (await ask(server, to_get("/health", "Origin: https://school.test"))).says(200)
        assert (await ask(server, to_get("/health", "Origin: https://evil.test"))).says(403)
