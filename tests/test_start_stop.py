"""The start says where it listens, the log what happens; a stop finishes what is under way."""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from subprocess import PIPE

import photos
import pytest
from aiohttp.test_utils import TestClient, TestServer
from helpers import (
    CLOSE,
    GATE,
    PINGS,
    ROOT,
    STOP,
    TEXTS,
    TIMEOUT,
    Server,
    ask,
    connect,
    flooding,
    head_of,
    health,
    run_python,
    run_server,
    stop,
    stuffed,
    to_get,
    to_post,
    until,
    watch,
)
from photos import MIB, TINY

from server import Config, create_app, serve


# --- The start ---
@pytest.mark.parametrize(
    "options", [["--port", "70000"], ["--host", "a b"], ["--public-url", "https://[abc]"]]
)
def test_an_address_that_cannot_be_used_is_named_in_one_line(options: list[str]) -> None:
    done = run_python("server.py", "--port", "0", *options)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert options[0] in done.stderr


async def test_the_log_has_the_time_and_one_line_for_a_photo_but_none_for_a_get() -> None:
    with run_server() as server:
        assert (await ask(server, to_post(TINY))).says(201)
        assert (await ask(server, to_get("/image"))).says(200)
        assert re.fullmatch(r"[\d-]+ [\d:,]+ None: 0 faces in \d+ ms\n", server.log.read_text())


def test_with_an_opencv_that_has_no_cascades_it_says_what_to_install() -> None:
    """OpenCV 5 has none."""
    done = run_python("-c", "import cv2, server; del cv2.CascadeClassifier; server.main()")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "requirements.txt" in done.stderr


def test_it_starts_without_a_network(changed) -> None:
    """As in a machine that has no route to anywhere."""
    no_route = """
def connect(*_):
    raise OSError("Network is unreachable")

socket.socket.connect = connect"""
    with run_server("--host", "0.0.0.0", program=changed(no_route)) as server:
        assert server.url == f"http://0.0.0.0:{server.port}"


def test_what_asyncio_says_of_other_faults_is_logged(changed) -> None:
    """Also if the name of a coroutine or a folder is like what it says too often."""
    fault = """
import logging

def serve(_):
    logging.getLogger("asyncio").error("A task failed\\ncoro=<accept() in /serving/server.py>")

server.serve = serve"""
    done = run_python(changed(fault))
    assert (done.returncode, "A task failed" in done.stderr) == (0, True)


def test_it_starts_without_tcp_user_timeout(changed) -> None:
    """As macOS and Windows."""
    with run_server(program=changed('vars(socket).pop("TCP_USER_TIMEOUT", None)')):
        pass


def test_it_prints_its_address_in_the_network(changed) -> None:
    route = 'socket.socket.connect = lambda probe, _: probe.bind(("127.0.0.1", 0))'
    with run_server("--host", "0.0.0.0", program=changed(route)) as server:
        assert server.url == f"http://127.0.0.1:{server.port}"


@pytest.fixture
def ipv6() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("needs IPv6")


@pytest.mark.parametrize(
    "option, value",
    [
        ("--queue", "-1"),
        ("--max-mb", "0"),
        ("--threads", "0"),
        ("--upload-timeout", "0"),
        ("--upload-timeout", "10000000"),
        ("--keep", "-1"),
        ("--port", "-1"),
        ("--host", ""),
        ("--host", "\udcff"),
        ("--host", "a\nb"),
        ("--public-url", "faces.example.org"),
        ("--public-url", "https:/faces.example.org"),
        ("--public-url", "https://faces.example.org:99999"),
        ("--public-url", "ftp://faces.example.org"),
        ("--public-url", "https://faces.example.org?a"),
        ("--public-url", "https://me@faces.example.org"),
        ("--public-url", "https://faces.example\n.org"),
        ("--public-url", "https://faces.example.org/\r\nA: b"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_in_one_line(option: str, value: str) -> None:
    done = run_python("server.py", "--port", "0", option, value)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert f"{option} must be" in done.stderr


def test_help_tells_what_an_empty_default_means() -> None:
    text = " ".join(run_python("server.py", "--help").stdout.split())
    for option in ("public-url", "allow-origin", "model", "min-score"):
        assert re.search(rf"--{option} ((?!--).)*\(default: none\)", text)
    assert "default: )" not in text
    assert "[]" not in text


@pytest.mark.parametrize("options", [[], ["--host", "localhost"], ["--host", "::"]])
async def test_localhost_may_mean_either_address(ipv6, options: list[str]) -> None:
    """To Node 17 and later, and to macOS, it is ::1."""
    with run_server(*options) as server:
        for address in ("127.0.0.1", "::1"):
            reader, writer = await asyncio.open_connection(address, server.port)
            writer.write(to_get("/health"))
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            writer.close()


def test_an_address_of_ipv6_stands_in_brackets(ipv6) -> None:
    with run_server("--host", "::1") as server:
        assert server.url == f"http://[::1]:{server.port}"


def test_it_starts_without_ipv6(changed) -> None:
    no_ipv6 = """
create = socket.create_server

def create_server(address, family=socket.AF_INET, **options):
    if family == socket.AF_INET6:
        raise OSError("Address family not supported by protocol")
    return create(address, family=family, **options)

socket.create_server = create_server"""
    with run_server(program=changed(no_ipv6)):
        pass


def test_if_another_program_has_ipv6s_port_it_says_so(ipv6) -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as other:
        port = other.getsockname()[1]
        with run_server("--port", str(port)) as server:
            assert "::1: [Errno 98] Address already in use" in server.log.read_text()


def test_without_its_page_it_says_so(tmp_path: Path) -> None:
    shutil.copy(ROOT / "server.py", tmp_path)
    with run_server(program=tmp_path / "server.py") as server:
        assert f"There is no page: {tmp_path / 'static'} is missing." in server.log.read_text()


@pytest.mark.parametrize("optimized", ["-O", "-OO"])
async def test_it_also_runs_without_docstrings_and_asserts(optimized: str) -> None:
    done = run_python(optimized, "server.py", "--help")
    assert (done.returncode, "None" in done.stdout) == (0, False)


async def test_a_link_to_it_finds_its_page(tmp_path: Path) -> None:
    (tmp_path / "faces").symlink_to(ROOT / "server.py")
    with run_server(program=tmp_path / "faces") as server:
        assert (await ask(server, to_get("/", "Accept: text/html"))).says(200, "<!doctype html>")


async def test_in_a_running_loop_it_says_what_to_use_and_takes_no_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(RuntimeError, match="AppRunner"):
        serve(create_app(Config(port=port)))
    socket.create_server(("127.0.0.1", port)).close()


# --- The stop ---
OWN_PROGRAM = """
import server

try:
    server.serve(server.create_app(server.Config(port=0)))
finally:
    print("finally")
print("the end")
"""


async def refused(server: Server) -> None:
    """Wait until the server listens no more."""
    async with asyncio.timeout(TIMEOUT):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            except OSError:
                return
            writer.close()
            await asyncio.sleep(0.02)


async def test_a_program_around_it_goes_on_after_the_stop(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN_PROGRAM)
    command = (sys.executable, str(tmp_path / "own.py"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = await asyncio.create_subprocess_exec(*command, stdout=PIPE, env=environment)
    assert process.stdout
    try:
        async with asyncio.timeout(TIMEOUT):
            while b"post" not in await process.stdout.readline():
                pass
            process.terminate()
            said = await process.stdout.read()
            assert (await process.wait(), said) == (0, b"\nfinally\nthe end\n")
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
async def test_a_second_ctrl_c_ends_it_at_once(changed, first: signal.Signals) -> None:
    with run_server(program=changed(GATE)) as server:
        async with connect(server) as client:
            await client.send(to_post(TINY))
            await until(server, queued=1)
            server.process.send_signal(first)
            await refused(server)
            begin = time.monotonic()
            server.process.send_signal(signal.SIGINT)
            assert await asyncio.to_thread(server.process.wait, TIMEOUT) == 0
            assert time.monotonic() - begin < 3


async def test_a_photo_that_comes_during_the_stop_is_answered() -> None:
    """On a connection that was there before; in the log, it would be a traceback."""
    app = create_app()
    async with TestClient(TestServer(app)) as client:
        async with client.get("/health") as answer:
            assert answer.status == 200
        await app.shutdown()
        async with client.post("/detect", data=TINY) as answer:
            assert answer.status == 200


async def test_a_thread_that_never_ends_does_not_delay_the_stop(changed) -> None:
    with run_server(program=changed(GATE)) as server:
        async with connect(server) as client:
            await client.send(to_post(TINY))
            await until(server, queued=1)
            assert await stop(server) < STOP


async def test_it_can_be_stopped_as_soon_as_it_says_where_it_listens() -> None:
    command = [sys.executable, str(ROOT / "server.py"), "--port", "0"]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    assert process.stdout
    try:
        async with asyncio.timeout(TIMEOUT):
            await process.stdout.readline()
            process.terminate()
            assert await process.wait() == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()


async def test_at_the_stop_photos_are_finished_and_watchers_told(fresh: Server) -> None:
    photo = photos.photo_of(1000, 1000)
    async with contextlib.AsyncExitStack() as stack:
        good = await stack.enter_async_context(watch(fresh))
        for _ in range(20):
            await stack.enter_async_context(watch(fresh, "?format=json", receive_buffer=2048))
        stalled = await stack.enter_async_context(connect(fresh))
        await stalled.send(head_of("POST", "/image", "Content-Length: 99999"))
        posts = [asyncio.create_task(ask(fresh, to_post(photo))) for _ in range(3)]
        leaving = await stack.enter_async_context(connect(fresh))
        await leaving.send(to_post(photo))
        await until(fresh, clients=21)
        while (said := await health(fresh))["queued"] + said["images"] < 4:
            pass
        leaving.reset()
        stopping = asyncio.create_task(stop(fresh))
        answers = await asyncio.gather(*posts)
        assert all(answer.says(201) for answer in answers)
        announced = [(await good.frame())[1].decode() for _ in range(4)]
        assert {answer.headers["Location"] for answer in answers} < set(announced)
        assert await good.frame() == (CLOSE, struct.pack(">H", 1001))
        assert await stopping < STOP


PIPELINE = to_get("/health") * 300


@pytest.mark.parametrize(
    "data, watching",
    [(PINGS, True), (TEXTS, True), (PIPELINE, False)],
    ids=["pings", "texts", "pipelined GETs"],
)
async def test_a_flood_does_not_delay_the_stop(fresh: Server, data: bytes, watching: bool) -> None:
    async with flooding(fresh, data, watching):
        assert await stop(fresh) < STOP


async def test_a_watcher_that_does_not_read_does_not_delay_the_stop(fresh: Server) -> None:
    async with stuffed(fresh):
        assert await stop(fresh) < STOP


async def test_a_photo_that_takes_a_minute_does_not_delay_the_stop(fresh: Server) -> None:
    """libpng reads all the 20 GB behind the last row."""
    async with connect(fresh) as client:
        await client.send(to_post(photos.png(9, 9, photos.zeros(20_000 * MIB))))
        await until(fresh, queued=1)
        assert await stop(fresh) < STOP
