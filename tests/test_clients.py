"""Browsers, proxies, curl and other programs: each gets what it needs."""

import asyncio
import contextlib
import dataclasses
import io
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from aiohttp import ClientSession, FormData, web
from aiohttp.test_utils import TestClient, TestServer
from helpers import (
    FORM,
    GATE,
    PING,
    PONG,
    START,
    TIMEOUT,
    Server,
    ask,
    connect,
    frame,
    head_of,
    open_gate,
    post_and_get_path,
    post_photo,
    run_server,
    to_get,
    to_post,
    to_watch,
    until,
    watch,
)
from photos import ASTRONAUT, MIB, TINY

from server import IMAGES, Config, create_app, find_files


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
async def test_an_image_is_neither_sniffed_nor_kept_by_a_proxy(server: Server) -> None:
    path = await post_and_get_path(server, TINY)
    answer = await ask(server, to_get(path))
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert "private" in answer.headers["Cache-Control"]  # a proxy must not keep it
    assert (await ask(server, to_get("/image"))).headers["Cache-Control"] == "no-cache"


async def test_a_photo_is_kept_even_if_its_client_leaves(changed: Callable[[str], Path]) -> None:
    """Somebody else may know its URL."""
    with run_server(program=changed(GATE)) as server:
        async with connect(server) as client:
            await client.send(to_post(TINY))
            await until(server, queued=1)
            client.reset()
        open_gate(server)
        await until(server, queued=0, images=1)


async def test_a_client_that_pauses_gets_the_whole_image(server: Server) -> None:
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


async def test_a_plain_get_of_faces_is_told_to_use_a_websocket(server: Server) -> None:
    answer = await ask(server, to_get("/faces"))
    assert answer.says(426, "wscat")
    assert answer.headers["Upgrade"] == "websocket"  # RFC 9110, 15.5.22


async def test_a_plain_get_of_faces_behind_https_is_told_of_wss() -> None:
    with run_server("--public-url", "https://faces.example.org") as server:
        answer = await ask(server, to_get("/faces"))
        assert answer.says(426, "wscat -c wss://faces.example.org/faces")


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
async def test_a_site_without_a_scheme_is_not_allowed(site: str) -> None:
    with run_server("--allow-origin", site) as server:
        for origin in ("null", "https://school.example"):
            assert (await ask(server, to_get("/health", f"Origin: {origin}"))).says(403)


async def test_its_page_works_behind_a_proxy() -> None:
    """Some proxies send the server's own name as Host."""
    with run_server("--public-url", "https://school.test/app") as server:
        assert (await ask(server, to_get("/health", "Origin: https://school.test"))).says(200)
        assert (await ask(server, to_get("/health", "Origin: https://evil.test"))).says(403)


# --- The same page by another spelling of its name (RFC 6454) ---
@pytest.mark.parametrize(
    "host, origin, status",
    [
        ("laptop:443", "https://laptop", 200),  # as nginx passes $host:$server_port
        ("laptop:80", "http://laptop", 200),
        ("laptop:80", "https://laptop", 200),  # behind a proxy that takes the TLS off
        ("laptop", "https://laptop", 200),
        ("LAPTOP:8282", "http://laptop:8282", 200),
        ("[::1]:80", "http://[::1]", 200),
        ("laptop:8282", "http://laptop", 403),
        ("laptop", "http://laptop:8282", 403),
        ("laptop", "https://laptop:8443", 403),
        ("laptop", "capacitor://laptop", 403),
        ("laptop:443", "http://laptop:8080", 403),
    ],
)
async def test_its_own_page_is_known_by_scheme_name_and_port(
    server: Server, host: str, origin: str, status: int
) -> None:
    answer = await ask(server, to_get("/health", f"Origin: {origin}", host=host))
    assert answer.says(status)


@pytest.mark.parametrize(
    "host", ["faces.test", "FACES.TEST:443", "faces.test:80", "faces.test:8282", "127.0.0.1:8282"]
)
async def test_a_proxy_may_write_the_host_of_the_public_url_as_it_likes(host: str) -> None:
    with run_server("--public-url", " https://Faces.test:443/app/ ") as server:
        answer = await ask(server, to_get("/image", "Origin: https://faces.test", host=host))
        assert answer.says(200)
        assert (
            (await ask(server, to_post(TINY)))
            .headers["Location"]
            .startswith("https://Faces.test:443/app/image/")
        )


async def test_behind_a_proxy_with_tls_the_commands_to_try_use_it() -> None:
    with run_server("--public-url", "https://faces.test/app/") as server:
        text = (await ask(server, to_get("/", host="faces.test"))).body.decode()
    assert "wscat -c wss://faces.test/app/faces" in text
    assert "https://faces.test/app/image" in text


async def test_head_says_how_long_an_image_is_and_the_connection_goes_on(server: Server) -> None:
    path = await post_and_get_path(server, TINY)
    full = await ask(server, to_get(path))
    async with connect(server) as client:
        await client.send(head_of("HEAD", path) + to_get("/health"))
        status, headers = await client.head()
        assert (status, headers["Content-Length"]) == (200, str(len(full.body)))
        assert (await client.answer()).says(200, '"status": "ok"')


async def test_a_page_that_a_proxy_hides_is_told_of_the_public_url(server: Server) -> None:
    """By default, nginx passes the Host of the server behind it."""
    answer = await ask(server, to_get("/image", "Origin: https://faces.test"))
    assert answer.says(403, "--public-url")


@pytest.mark.parametrize(
    "site, origin",
    [
        ("file://", "file://"),
        ("null", "null"),  # what a page sends that a double click has opened
        ("chrome-extension://abc", "chrome-extension://abc"),
        ("capacitor://localhost", "capacitor://localhost"),
        ("HTTPS://School.test:443/", "https://school.test"),
        ("http://school.test/page.html", "http://school.test"),
    ],
)
async def test_an_allowed_site_is_let_in_however_it_is_written(site: str, origin: str) -> None:
    with run_server("--allow-origin", site) as server:
        assert (await ask(server, to_get("/health", f"Origin: {origin}"))).says(200)
        assert (await ask(server, to_get("/health", "Origin: https://other.test"))).says(403)


# --- Programs that are no browser ---
async def test_a_health_check_without_a_host_is_answered(server: Server) -> None:
    """HAProxy sends OPTIONS by HTTP/1.0."""
    for request in (b"OPTIONS / HTTP/1.0\r\n\r\n", b"GET /health HTTP/1.0\r\n\r\n"):
        assert (await ask(server, request)).says(200)
    head = f"POST /image HTTP/1.0\r\nContent-Length: {len(TINY)}\r\n\r\n"
    answer = await ask(server, head.encode() + TINY)
    assert answer.says(201)
    assert (await ask(server, to_get(answer.headers["Location"]))).says(200)  # a path
    assert (await ask(server, b"GET / HTTP/1.0\r\nOrigin: http://evil.test\r\n\r\n")).says(403)


async def test_an_absolute_target_gets_urls_of_the_host(server: Server) -> None:
    """As a proxy may write it (RFC 9112, 3.2.2)."""
    request = to_post(TINY).replace(b"POST /image", b"POST http://elsewhere:1/image")
    answer = await ask(server, request)
    assert answer.headers["Location"].startswith("http://localhost/image/")


async def test_a_websocket_key_that_is_not_ascii_is_refused(server: Server) -> None:
    request = to_watch().replace(b"Sec-WebSocket-Key: ", b"Sec-WebSocket-Key: \xc3\xa9")
    assert (await ask(server, request)).says(400, "Sec-WebSocket-Key")


# --- What forms may look like (RFC 2046, RFC 7578) ---
LAST = b"\r\n--b--\r\n"


@pytest.mark.parametrize(
    "form, kind",
    [
        (b"This is a form.\r\n" + START + b"\r\n" + TINY + LAST, FORM),
        (START.replace(b"--b\r\n", b"--b \t \r\n") + b"\r\n" + TINY + b"\r\n--b-- \r\n", FORM),
        (START + b"\r\n" + TINY + LAST, 'Content-Type: multipart/form-data; Boundary="b"'),
        (START + b"\r\n" + TINY + LAST, "Content-Type: multipart/form-data"),
        (START + b"\r\n" + TINY + LAST, "Content-Type: multipart/form-data; boundary="),
        (START + b"\r\n" + TINY + b"\r\n--b--", FORM),
        (START + b"\r\n" + TINY + LAST + b"That was the form.", FORM),
    ],
    ids=["preamble", "blanks", "quotes", "no boundary", "empty boundary", "no end", "epilogue"],
)
async def test_a_form_is_read_however_it_is_framed(server: Server, form: bytes, kind: str) -> None:
    answer = await ask(server, to_post(form, kind))
    assert answer.says(201)
    assert json.loads(answer.body)["filename"] == "a.jpg"


DECODED = {
    rb'filename="C:\Users\me\my photo.png"': "my photo.png",
    b'filename="/home/me/a.png"': "a.png",
    b"filename=\"a.png\"; filename*=UTF-8''%C5%BDofie%2525.png": "Žofie%25.png",
    b"filename*=utf-8'en'%C5%BDofie.png; filename=a.png": "Žofie.png",
    b"filename*=iso-8859-1''%E4.png": "ä.png",
    b'filename="=?utf-8?B?xb1vZmllLmpwZw==?="': "Žofie.jpg",  # .NET
    b"filename==?utf-8?Q?=C5=BDofie.jpg?=": "Žofie.jpg",
    b'filename="my%20photo.png"': "my photo.png",  # aiohttp
    b'filename="say %22cheese%22.png"': 'say "cheese".png',  # browsers
    b'filename="50% off.png"': "50% off.png",
    b'filename="..%2F..%5Ca.png"': "a.png",
}


@pytest.mark.parametrize("written", DECODED)
async def test_a_filename_is_decoded_and_without_folders(server: Server, written: bytes) -> None:
    part = b"--b\r\nContent-Disposition: form-data; name=a; " + written + b"\r\n\r\n" + TINY
    answer = await ask(server, to_post(part + LAST, FORM))
    assert json.loads(answer.body)["filename"] == DECODED[written]


NO_FILENAME = b"--b\r\nContent-Disposition: form-data; name=image\r\n\r\n" + TINY + LAST


@pytest.mark.parametrize(
    "body, kind, status, words",
    [
        (NO_FILENAME, FORM, 400, "filename"),
        (2 * (START + b"\r\nx\r\n") + LAST, FORM, 400, "exactly one file"),
    ],
    ids=["no filename", "two files"],
)
async def test_each_mistake_in_a_form_has_a_message_of_its_own(
    server: Server, body: bytes, kind: str, status: int, words: str
) -> None:
    answer = await ask(server, to_post(body, kind))
    assert answer.says(status, words)


async def test_parameters_without_end_take_little_time() -> None:
    """The parser of the standard library takes time by their square."""

    def measure(filler: bytes) -> float:
        part = START[:-2] + b'; a="' + filler * 1900 + b"\r\n\r\n"
        begin = time.process_time()
        find_files(part * 100 + b"\r\n--b--", FORM)
        return time.process_time() - begin

    assert measure(b";") < 20 * measure(b"a")


# --- Who waits for whom ---
async def test_a_long_list_leaves_others_their_turn(aiohttp_client) -> None:
    app = create_app(Config(keep=10_000))
    client = await aiohttp_client(app)
    async with client.post("/image", data=TINY) as answer:
        image = await app[IMAGES].get((await answer.json())["id"])
    for number in range(5000):
        await app[IMAGES].put(dataclasses.replace(image, id=str(number)))
    listing = asyncio.create_task(client.get("/image"))
    turns = 0
    while not listing.done():
        await asyncio.sleep(0)
        turns += 1
    assert len(await (await listing).json()) == 5001
    assert turns > 5000


# --- Applications around it ---
@pytest.fixture
def mount(aiohttp_client):
    """Mounts the server in an application with these middlewares and signals; returns a client."""

    async def mount(middlewares=(), signals=(), **settings):
        outer = web.Application(middlewares=middlewares, client_max_size=4 * MIB)
        outer.on_response_prepare.extend(signals)
        outer.add_subapp("/faces", create_app(Config(**settings)))
        return await aiohttp_client(outer)

    return mount


async def test_a_body_that_an_outer_middleware_has_read_is_a_photo(mount) -> None:
    @web.middleware
    async def audit(request, handler):
        await request.read()
        return await handler(request)

    client = await mount([audit], max_mb=1)
    form = FormData()
    form.add_field("image", TINY, filename="a.png")
    for body in (form, TINY):
        assert (await client.post("/faces/image", data=body)).status == 201
    answer = await client.post("/faces/image", data=io.BytesIO(bytes(MIB + 1)))
    assert (answer.status, "--max-mb" in await answer.text()) == (413, True)


async def test_a_form_that_an_outer_middleware_has_taken_apart_has_its_photo(mount) -> None:
    @web.middleware
    async def find_token(request, handler):
        assert (await request.post())["token"] == "secret"
        return await handler(request)

    client = await mount([find_token])
    for filenames, status in (["C:\\class\\a.png"], 201), ([], 400), (["a.png", "b.png"], 400):
        form = FormData({"token": "secret"})
        for filename in filenames:
            form.add_field("image", TINY, filename=filename)
        answer = await client.post("/faces/image", data=form)
        assert answer.status == status
        if status == 201:
            assert (await answer.json())["filename"] == "a.png"


async def test_a_detector_that_fails_is_an_error_of_the_server(aiohttp_client) -> None:
    """One that asks another machine may raise what also means that a client has left."""

    def detect(pixels):
        raise ConnectionRefusedError

    client = await aiohttp_client(create_app(detector=detect))
    async with client.post("/image", data=TINY) as answer:
        assert answer.status == 500


async def test_an_empty_form_is_refused_in_words(server: Server) -> None:
    request = head_of("POST", "/image", FORM, "Transfer-Encoding: chunked") + b"0\r\n\r\n"
    assert (await ask(server, request)).says(400, "complete")


async def test_the_address_that_curl_is_told_opens_below_a_prefix(mount) -> None:
    client = await mount()
    async with client.get("/faces/") as usage:
        address = (await usage.text()).split()[1]
    async with client.get(urlsplit(address).path) as answer:
        assert answer.status == 200


async def test_the_cors_headers_of_an_outer_application_win(mount) -> None:
    """As aiohttp-cors writes them, which insists that there are none yet."""

    async def set_origin(request, response):
        assert "Access-Control-Allow-Origin" not in response.headers
        response.headers["Access-Control-Allow-Origin"] = request.headers["Origin"]

    client = await mount(signals=[set_origin], allow_origin=("https://school.test",))
    for path in ("/faces/health", "/faces/nothing"):
        answer = await client.get(path, headers={"Origin": "https://school.test"})
        assert answer.headers.getall("Access-Control-Allow-Origin") == ["https://school.test"]


async def test_a_route_of_ones_own_answers_what_a_browser_asks_first(aiohttp_client) -> None:
    """aiohttp-cors adds one to each path."""

    async def ask_first(request):
        return web.Response(text="mine")

    app = create_app(Config())
    app.router.add_options("/health", ask_first)
    client = await aiohttp_client(app)
    assert await (await client.options("/health")).text() == "mine"
    assert (await client.options("/image")).status == 200


async def test_applications_that_were_cleaned_up_leave_no_threads() -> None:
    before = threading.active_count()
    for _ in range(5):
        async with TestClient(TestServer(create_app(Config(threads=2)))) as client:
            answers = [client.post("/image", data=TINY) for _ in range(4)]
            assert [(await answer).status for answer in answers] == [201] * 4
    async with asyncio.timeout(TIMEOUT):
        while threading.active_count() > before:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


# --- Proxies ---
NGINX = """
daemon off; pid nginx.pid; error_log stderr;
events {}
http {
    access_log off; client_body_temp_path .; proxy_temp_path .;
    fastcgi_temp_path .; uwsgi_temp_path .; scgi_temp_path .;
    server {
        listen 127.0.0.1:PORT;
        location / { proxy_pass http://127.0.0.1:SERVER; proxy_set_header Host HOST; }
    }
}
"""
HAPROXY = """
defaults
    mode http
    timeout client 9s
    timeout server 9s
    timeout connect 9s
    timeout check 9s
frontend front
    bind 127.0.0.1:PORT
    default_backend back
backend back
    option httpchk
    server faces 127.0.0.1:SERVER check inter 100ms
"""


@contextlib.asynccontextmanager
async def run_proxy(folder: Path, config: str, server: Server, *command: str) -> AsyncIterator[str]:
    """Run a proxy in front of a server; yields its URL once it answers."""
    program = shutil.which(command[0], path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.skip(f"needs {command[0]}: apt-get install {command[0]}")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = config.replace("PORT", str(port)).replace("SERVER", str(server.port))
    (folder / "config").write_text(config)
    process = await asyncio.create_subprocess_exec(program, *command[1:], cwd=folder)
    try:
        async with asyncio.timeout(TIMEOUT):
            while True:
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                    writer.close()
                    break
                await asyncio.sleep(0.02)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        await process.wait()


async def test_haproxy_finds_the_server_healthy(server: Server, tmp_path: Path) -> None:
    async with run_proxy(tmp_path, HAPROXY, server, "haproxy", "-f", "config") as url:
        await asyncio.sleep(1)  # for ten of its health checks
        assert (await post_photo(url, TINY))["faces"] == []


@pytest.mark.parametrize(
    "passed_on, host, origin, status",
    [
        ("$host:443", "laptop", "https://laptop", 201),
        ("$http_host", "LAPTOP:443", "https://laptop", 201),
        ("$proxy_host", "laptop", "https://laptop", 403),  # its default
    ],
)
async def test_behind_nginx_the_page_can_post_or_is_told_why_not(
    server: Server, tmp_path: Path, passed_on: str, host: str, origin: str, status: int
) -> None:
    config = NGINX.replace("HOST", passed_on)
    command = ("nginx", "-p", ".", "-c", "config", "-e", "stderr")
    async with run_proxy(tmp_path, config, server, *command) as url, ClientSession() as session:
        page = {"Host": host, "Origin": origin}
        async with session.post(url + "/image", data=TINY, headers=page) as answer:
            assert answer.status == status
            assert status == 201 or "--public-url" in await answer.text()
