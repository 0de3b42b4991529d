"""The container as its users meet it: built, run and stopped by docker, used by a mapped port."""

import asyncio
import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest
from helpers import INSTALL, ROOT, TIMEOUT
from photos import ASTRONAUT_FILE, cv2, encode, np, pixels

ENGINE = ROOT.parent / "shared/docker/local-images"  # if it is there: starts an engine
BASE = "python:3.13-slim"
MODEL = "models/face_detection_yunet_2023mar.onnx"
COMMAND_TIMEOUT = 300  # seconds, for every command: the first build, or all tests in the container

# What docs/running.md advises for a flood
HARDENED = ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
SMALL = ("--memory", "512m", "--memory-swap", "512m", "-e", "OPENCV_IO_MAX_IMAGE_PIXELS=12000000")
FOR_SMALL = ("--threads", "2", "--queue", "2", "--max-mb", "5", "--keep-mb", "16")


async def run(*command: str | Path) -> tuple[int, str, str]:
    """Run a command; return its exit code, output and errors."""
    process = await asyncio.create_subprocess_exec(
        *command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
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
        """Return what the engine knows of its process."""
        found = await inspect(self.id)
        return found["State"] | {"RestartCount": found["RestartCount"]}

    async def until(self, health: str) -> list[dict[str, Any]]:
        """Wait until the engine calls it healthy, or unhealthy; return all checks so far."""
        async with asyncio.timeout(TIMEOUT):
            while (found := (await self.state())["Health"])["Status"] != health:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        return found["Log"]


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
    """Starts a container and waits until it is healthy: start(*options of docker, serve=...)."""
    containers: list[str] = []

    async def start(*options: str, serve: tuple[str, ...] = ()) -> Container:
        detached = "run", "--detach", "-p", "127.0.0.1::8282"
        containers.append(await docker(*detached, *options, image, *serve))
        address = await docker("port", containers[-1], "8282")
        container = Container(containers[-1], f"http://{address}")
        await container.until("healthy")
        return container

    yield start
    for each in containers:
        await docker("rm", "--force", each)


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    """Like so many runs of curl: no limit, and a connection for each request."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(TIMEOUT)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        yield session


@pytest.fixture(scope="module")
def large_photo() -> bytes:
    """A JPEG of 9 megapixels, with the noise that gives a camera's its 4 MB."""
    image = cv2.resize(pixels(), (3000, 3000))
    noise = np.random.default_rng(0).normal(0, 20, (1000, 1000, 3))
    image = np.clip(image + np.tile(noise, (3, 3, 1)), 0, 255).astype(np.uint8)
    return encode(".jpg", image, cv2.IMWRITE_JPEG_QUALITY, 90)


async def post(client: aiohttp.ClientSession, container: Container, photo: bytes) -> int:
    """Post a photo; return the status of the answer."""
    async with client.post(f"{container.url}/image", data=io.BytesIO(photo)) as answer:
        await answer.read()
        return answer.status


# --- It runs ---
async def test_no_check_fails_after_it_listens(start: Start) -> None:
    container = await start()
    log = await docker("logs", "--timestamps", container.id)
    (listens,) = re.findall(r"^(\S+) +open +http", log, re.MULTILINE)
    checks = await container.until("healthy")
    time = datetime.fromisoformat
    assert not [each for each in checks if time(each["Start"]) > time(listens) and each["ExitCode"]]


async def test_it_is_checked_every_2_seconds(image: str) -> None:
    assert (await inspect(image))["Config"]["Healthcheck"]["Interval"] == 2e9  # ns


async def test_it_is_unhealthy_if_something_else_answers(image: str) -> None:
    check = "--health-interval", "0.5s", "--health-retries", "3"
    other = image, "-m", "http.server", "8282"
    started = await docker("run", "--detach", *check, "--entrypoint", "python", *other)
    container = Container(started, "")
    try:
        await container.until("unhealthy")
    finally:
        await docker("rm", "--force", container.id)


@pytest.mark.parametrize("serve", [(), ("--model", MODEL)], ids=["cascade", "YuNet"])
async def test_a_watcher_gets_a_url_that_opens_from_outside(
    start: Start, client: aiohttp.ClientSession, serve: tuple[str, ...]
) -> None:
    container = await start(serve=serve)
    async with client.ws_connect(f"{container.url}/faces") as watcher:
        form = aiohttp.FormData({"image": ASTRONAUT_FILE.open("rb")})
        async with client.post(f"{container.url}/image", data=form) as answer:
            assert answer.status == 201
            posted = await answer.json()
        url = await watcher.receive_str(timeout=TIMEOUT)
    assert url == posted["url"] == f"{container.url}/image/{posted['id']}"  # by the mapped port
    async with client.get(url) as answer:
        assert answer.content_type == "image/jpeg"
        boxed = cv2.imdecode(np.frombuffer(await answer.read(), np.uint8), cv2.IMREAD_COLOR)
    (face,) = posted["faces"]
    assert (face["score"] < 1) == bool(serve)
    blue, green, red = boxed[face["y"], face["x"] + face["width"] // 2].tolist()
    assert green > 200 and blue < 60 and red < 60  # the upper edge of the box


async def test_it_lists_its_options(image: str) -> None:
    said = await docker("run", "--rm", image, "--help")
    assert "--keep-mb" in said and "--port" in said


async def test_its_own_tests_pass_in_it(image: str) -> None:
    said = await docker("run", "--rm", "--entrypoint", "pytest", image)
    assert " passed" in said and " skipped" not in said


# --- It is confined ---
async def test_it_has_no_rights(start: Start) -> None:
    container = await start(*HARDENED)
    status = await docker("exec", container.id, "cat", "/proc/1/status")
    lines = dict(line.split(":\t", 1) for line in status.splitlines())
    assert lines["Name"] == "python"
    assert "0" not in lines["Uid"].split()
    assert int(lines["CapEff"], 16) == int(lines["CapPrm"], 16) == 0
    assert lines["NoNewPrivs"] == "1"


async def test_it_cannot_change_its_own_code(image: str) -> None:
    touch = "--entrypoint", "touch", image, "server.py"
    code, _, errors = await run("docker", "run", "--rm", *touch)
    assert code and "Permission denied" in errors


async def test_a_flood_of_large_photos_does_not_kill_it(
    start: Start, client: aiohttp.ClientSession, large_photo: bytes
) -> None:
    container = await start(*HARDENED, *SMALL, serve=FOR_SMALL)
    before, answers = await container.state(), Counter[int]()

    async def flood() -> None:
        while answers[201] < 10:
            answers[await post(client, container, large_photo)] += 1

    async def look() -> None:
        """Ask for the small picture of the newest image, which may be dropped meanwhile."""
        while answers[201] < 10:
            async with client.get(f"{container.url}/image") as answer:
                images = await answer.json()
            with contextlib.suppress(aiohttp.ClientPayloadError):
                for image in images[:1]:
                    async with client.get(f"{image['url']}?width=480") as answer:
                        await answer.read()

    async with asyncio.TaskGroup() as clients:
        clients.create_task(look())
        for _ in range(128):
            clients.create_task(flood())
    after = await container.state()
    assert set(answers) == {201, 503}, answers
    for same in ("Pid", "StartedAt", "RestartCount", "Running", "OOMKilled"):
        assert after[same] == before[same]
    assert after["Health"]["Status"] == "healthy"


async def test_docker_stop_waits_for_the_photos_under_way(
    start: Start, client: aiohttp.ClientSession, large_photo: bytes
) -> None:
    container = await start(*HARDENED)

    async def accepted() -> int:
        async with client.get(f"{container.url}/health") as answer:
            health = await answer.json()
            return health["images"] + health["queued"]

    async def watch() -> int:
        return len([message async for message in watcher])

    async with client.ws_connect(f"{container.url}/faces") as watcher, asyncio.timeout(TIMEOUT):
        watching = asyncio.create_task(watch())
        posts = [asyncio.create_task(post(client, container, large_photo)) for _ in range(8)]
        while await accepted() < len(posts):
            pass  # ask again
        await docker("stop", container.id)
        answers = await asyncio.gather(*posts, return_exceptions=True)
        seen = await watching
        assert watcher.close_code == aiohttp.WSCloseCode.GOING_AWAY
    assert (await container.state())["ExitCode"] == 0  # it was not killed after 10 s
    assert 0 < seen <= answers.count(201), answers  # a slow machine gives some up


# --- The image ---
@pytest.fixture(scope="module")
def changed_image(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An image with another server.py, which only its owner can read."""
    folder = tmp_path_factory.mktemp("changed")
    for each in ("Dockerfile", ".dockerignore", "requirements.txt", "cluster/requirements.txt"):
        (folder / each).parent.mkdir(exist_ok=True)
        shutil.copy2(ROOT / each, folder / each)
    (folder / "server.py").write_text("print('another server')")
    (folder / "server.py").chmod(0o600)
    command = ["docker", "build", "-q", "-t", "faces-changed", folder]
    subprocess.run(command, check=True, timeout=COMMAND_TIMEOUT)
    yield "faces-changed"
    subprocess.run(["docker", "rmi", "faces-changed"], check=True, timeout=TIMEOUT)


async def test_a_change_of_the_server_does_not_rebuild_the_dependencies(
    image: str, changed_image: str
) -> None:
    before, after = [(await inspect(each))["RootFS"]["Layers"] for each in (image, changed_image)]
    assert before[:-2] == after[:-2]
    assert before[-2] != after[-2]  # the copy of this folder


async def test_it_runs_from_a_folder_that_only_its_owner_can_read(changed_image: str) -> None:
    assert await docker("run", "--rm", changed_image) == "another server"


async def test_it_adds_less_than_260_mb_to_its_base(image: str) -> None:
    added = (await inspect(image))["Size"] - (await inspect(BASE))["Size"]
    assert added < 260e6


async def test_it_has_no_leftovers(image: str) -> None:
    programs = "-name gcc -perm -1 -o -name make -perm -1"
    files = "-path */.cache/* -o -name *.whl -size +1M -o -name .git*"
    find = f"/ -xdev -type f ( {programs} -o {files} )".split()
    as_root = "--user", "root", "--entrypoint", "find"
    assert await docker("run", "--rm", *as_root, image, *find) == ""


NOT_TRIED = {  # Python version and platform
    "arm64": ("3.13", "aarch64-unknown-linux-gnu"),
    "macOS": ("3.13", "aarch64-apple-darwin"),
    "Windows": ("3.13", "x86_64-pc-windows-msvc"),
    "Python 3.14": ("3.14", "x86_64-unknown-linux-gnu"),
}


async def test_there_is_a_wheel_of_each_dependency_where_nobody_tried_it() -> None:
    uv = Path(sys.executable).with_name("uv")
    if not uv.exists():
        pytest.skip(f"needs uv: {INSTALL}")

    async def resolve(version: str, platform: str) -> tuple[int, str, str]:
        place = "--python-version", version, "--python-platform", platform
        wheels = "--only-binary", ":all:", ROOT / "requirements.txt"
        return await run(uv, "pip", "compile", "--python", sys.executable, *place, *wheels)

    found = await asyncio.gather(*(resolve(*place) for place in NOT_TRIED.values()))
    for place, (code, _, errors) in zip(NOT_TRIED, found, strict=True):
        assert code == 0, f"{place}: {errors}"
