"""The container as its users meet it: built, run and stopped by the docker command, used through a mapped port."""

import asyncio
import io
import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import cv2
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
ENGINE = ROOT.parent / "shared/docker/local-images"  # where it exists, it starts an engine and makes the base image
BASE = "python:3.13-slim"
ASTRONAUT = ROOT / "samples/astronaut.jpg"  # one face
TIMEOUT = 60  # s, for every answer
COMMAND_TIMEOUT = 300  # s, for every command: the first build, or all the tests in the container
HARDENED = ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
SMALL = ("--memory", "512m", "--memory-swap", "512m")  # both: what is over 512 MB must not go to swap
FOR_SMALL = ("--queue", "2", "--keep-mb", "32", "--max-mb", "10", "--max-megapixels", "12")  # the README's


async def run(*command: str | Path) -> tuple[int, str, str]:
    """Run a command; return its exit code, output and errors."""
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(COMMAND_TIMEOUT):
            output, errors = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.communicate()
        raise
    assert process.returncode is not None
    return process.returncode, output.decode(), errors.decode()


async def docker(*arguments: str | Path) -> str:
    """Run a docker command that must succeed; return its output."""
    code, output, errors = await run("docker", *arguments)
    assert code == 0, output[-3000:] + errors[-3000:]
    return output.strip()


async def inspect(name: str) -> dict[str, Any]:
    (found,) = json.loads(await docker("inspect", name))
    return found


class Container(NamedTuple):
    id: str
    url: str

    async def state(self) -> dict[str, Any]:
        """What the engine knows of its process."""
        found = await inspect(self.id)
        return found["State"] | {"RestartCount": found["RestartCount"]}

    async def healthy(self) -> None:
        """Wait until its own check says so."""
        arguments = "events", "--since", "1", "--filter", f"container={self.id}", "--filter", "event=health_status"
        events = await asyncio.create_subprocess_exec("docker", *arguments, stdout=asyncio.subprocess.PIPE)
        assert events.stdout
        try:
            async with asyncio.timeout(TIMEOUT):
                while b"health_status: healthy" not in (line := await events.stdout.readline()):
                    assert line, "the events ended"
        finally:
            events.kill()
            await events.communicate()


Start = Callable[..., Awaitable[Container]]


@pytest.fixture(scope="module")
def image() -> str:
    """The image, built from this folder."""
    if ENGINE.exists():
        subprocess.run([ENGINE], check=True, timeout=COMMAND_TIMEOUT)
    if not shutil.which("docker"):
        pytest.skip("there is no docker command")
    if subprocess.run(["docker", "version"], timeout=TIMEOUT).returncode:
        pytest.skip("no Docker engine answers")
    subprocess.run(["docker", "build", "-t", "faces", ROOT], check=True, timeout=COMMAND_TIMEOUT)
    return "faces"


@pytest.fixture
async def start(image: str) -> AsyncIterator[Start]:
    """A function that starts a container and waits until it is healthy: start(*options of docker, serve=options)."""
    containers: list[str] = []

    async def start(*options: str, serve: tuple[str, ...] = ()) -> Container:
        containers.append(await docker("run", "--detach", "-p", "127.0.0.1::8282", *options, image, *serve))
        address = await docker("port", containers[-1], "8282")
        container = Container(containers[-1], f"http://{address}")
        await container.healthy()
        return container

    yield start
    for each in containers:
        await docker("rm", "--force", each)


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    """Like so many runs of curl: without a limit, and each request on a connection of its own."""
    connector, timeout = aiohttp.TCPConnector(limit=0, force_close=True), aiohttp.ClientTimeout(TIMEOUT)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        yield session


@pytest.fixture(scope="module")
def large_photo() -> bytes:
    """A JPEG of 9 megapixels, with the noise that gives a camera's its 4 MB."""
    image = cv2.resize(cv2.imdecode(np.frombuffer(ASTRONAUT.read_bytes(), np.uint8), cv2.IMREAD_COLOR), (3000, 3000))
    noise = np.random.default_rng(0).normal(0, 20, image.shape)
    return cv2.imencode(".jpg", np.clip(image + noise, 0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 90])[
        1
    ].tobytes()


def moment(text: str) -> datetime:
    """A time of the engine's, which has nanoseconds, more than Python reads."""
    return datetime.fromisoformat(text[:23] + "+00:00")


# --- It runs ---


async def test_it_is_healthy_within_3_seconds(start: Start) -> None:
    container = await start()
    state = await container.state()
    checks = state["Health"]["Log"]
    first_good = next(check for check in checks if check["ExitCode"] == 0)
    assert (moment(first_good["End"]) - moment(state["StartedAt"])).total_seconds() < 3, checks


async def test_a_watcher_gets_a_url_that_opens_from_outside(start: Start, client: aiohttp.ClientSession) -> None:
    container = await start()
    async with client.ws_connect(f"{container.url}/faces") as watcher:
        form = aiohttp.FormData({"image": ASTRONAUT.open("rb")})
        async with client.post(f"{container.url}/image", data=form) as answer:
            assert answer.status == 201
            posted = await answer.json()
        url = await watcher.receive_str(timeout=TIMEOUT)
    assert url == posted["url"] == f"{container.url}/image/{posted['id']}"  # not 8282, the port inside
    async with client.get(url) as answer:
        assert answer.content_type == "image/jpeg"
        boxed = cv2.imdecode(np.frombuffer(await answer.read(), np.uint8), cv2.IMREAD_COLOR)
    (face,) = posted["faces"]
    blue, green, red = boxed[face["y"], face["x"] + face["width"] // 2].tolist()
    assert green > 200 and blue < 60 and red < 60  # the upper edge of the box


@pytest.mark.parametrize("options", [("--keep", "500"), ("--keep-mb", "7", "--keep", "8")], ids=" ".join)
async def test_it_takes_the_options_of_the_server(
    start: Start, client: aiohttp.ClientSession, options: tuple[str, ...]
) -> None:
    container = await start(serve=options)
    async with client.get(f"{container.url}/image/none") as answer:
        detail = (await answer.json(content_type="application/problem+json"))["detail"]
    given = dict(zip(options[::2], options[1::2], strict=True))
    assert f"the last {given['--keep']} are kept, up to {given.get('--keep-mb', '128')} MiB" in detail


async def test_it_tells_its_options(image: str) -> None:
    said = await docker("run", "--rm", image, "--help")
    assert "--keep-mb" in said and "--port" in said


async def test_its_own_tests_pass_in_it(image: str) -> None:
    said = await docker("run", "--rm", image, "pytest", "-rs")
    assert " passed" in said
    assert all("needs face_detection_yunet" in line for line in said.splitlines() if line.startswith("SKIPPED"))


# --- It is confined ---


async def test_it_has_no_rights(start: Start) -> None:
    container = await start(*HARDENED)
    status = await docker("exec", container.id, "cat", "/proc/1/status")
    lines = dict(line.split(":\t", 1) for line in status.splitlines())
    assert lines["Name"] == "python"
    assert "0" not in lines["Uid"].split()
    assert int(lines["CapEff"], 16) == int(lines["CapPrm"], 16) == 0
    assert lines["NoNewPrivs"] == "1"


async def test_it_cannot_change_its_own_code(start: Start) -> None:
    container = await start()
    code, _, errors = await run("docker", "exec", container.id, "sh", "-c", "echo >> server.py")
    assert code and "Permission denied" in errors


async def test_a_flood_of_large_photos_does_not_kill_it(
    start: Start, client: aiohttp.ClientSession, large_photo: bytes
) -> None:
    container = await start(*HARDENED, *SMALL, serve=FOR_SMALL)
    before, answers, end = await container.state(), Counter[str](), time.monotonic() + 20

    async def flood() -> None:
        try:
            while time.monotonic() < end:
                async with client.post(f"{container.url}/image", data=io.BytesIO(large_photo)) as answer:
                    await answer.read()
                    answers[str(answer.status)] += 1
        except aiohttp.ClientError as error:
            answers[repr(error)] += 1

    async with asyncio.TaskGroup() as clients:
        for _ in range(128):
            clients.create_task(flood())
    after = await container.state()
    assert not after["OOMKilled"]
    assert set(answers) == {"201", "503"}, answers
    for same in ("Pid", "StartedAt", "RestartCount", "Running"):
        assert after[same] == before[same]
    assert after["Health"]["Status"] == "healthy"


async def test_docker_stop_waits_for_the_photos_under_way(
    start: Start, client: aiohttp.ClientSession, large_photo: bytes
) -> None:
    container = await start(*HARDENED)

    async def post() -> int:
        async with client.post(f"{container.url}/image", data=io.BytesIO(large_photo)) as answer:
            await answer.read()
            return answer.status

    async def queued() -> int:
        async with client.get(f"{container.url}/health") as answer:
            return (await answer.json())["queued"]

    async def watch() -> int:
        return len([message async for message in watcher])

    async with client.ws_connect(f"{container.url}/faces") as watcher, asyncio.timeout(TIMEOUT):
        watching = asyncio.create_task(watch())
        posts = [asyncio.create_task(post()) for _ in range(8)]
        while await queued() < 8:
            pass  # ask again
        begin = time.monotonic()
        await docker("stop", container.id)
        took = time.monotonic() - begin
        statuses, seen = await asyncio.gather(*posts), await watching
        assert watcher.close_code == aiohttp.WSCloseCode.GOING_AWAY
    state = await container.state()
    assert state["ExitCode"] == 0
    assert took < 9
    assert set(statuses) <= {201, 503}, statuses  # 503: on a slow machine, some have no turn in the time that is left
    assert statuses.count(201) == seen > 0


# --- The image ---


async def layers(image: str) -> list[str]:
    return (await inspect(image))["RootFS"]["Layers"]


@pytest.fixture
async def changed(image: str, tmp_path: Path) -> AsyncIterator[str]:
    """An image from a copy of this folder with another server.py, which only its owner can read."""
    for each in ("Dockerfile", ".dockerignore", "requirements.txt"):
        shutil.copy2(ROOT / each, tmp_path)
    (tmp_path / "server.py").write_text("print('another server')")
    (tmp_path / "server.py").chmod(0o600)
    changed = await docker("build", "-q", tmp_path)
    yield changed
    await docker("rmi", changed)


async def test_a_change_of_the_server_does_not_rebuild_the_dependencies(image: str, changed: str) -> None:
    before, after = await layers(image), await layers(changed)
    assert before[:-2] == after[:-2]
    assert before[-2] != after[-2]  # the copy of this folder


async def test_it_runs_from_a_folder_that_only_its_owner_can_read(changed: str) -> None:
    assert await docker("run", "--rm", changed) == "another server"


async def test_it_adds_less_than_260_mb_to_its_base(image: str) -> None:
    added = (await inspect(image))["Size"] - (await inspect(BASE))["Size"]
    assert added < 260e6


@pytest.mark.parametrize("leftover", ["gcc", "make", "-path '*/.cache/*'", "-name '*.whl' -size +1M", "-name '.git*'"])
async def test_it_has_no_leftovers(image: str, leftover: str) -> None:
    name = leftover if leftover.startswith("-") else f"-name {leftover} -perm -1"
    found = await docker("run", "--rm", "--user", "root", image, "sh", "-c", f"find / -xdev -type f {name}")
    assert found == ""


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
async def test_there_is_a_wheel_of_each_dependency_for(machine: str) -> None:
    platforms = [f"--platform={platform}_{machine}" for platform in ("manylinux2014", "manylinux_2_28")]
    options = "--dry-run", "--ignore-installed", "--only-binary=:all:", "--python-version=3.13", "--target=unused"
    command = sys.executable, "-m", "pip", "install", *options, *platforms, "-r", ROOT / "requirements.txt"
    code, output, errors = await run(*command)
    assert code == 0, errors
    assert "Would install" in output
