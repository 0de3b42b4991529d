"""The workshop as a class does it: each step started as a program, and the guide's own commands."""

import asyncio
import contextlib
import difflib
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import aiohttp
import cv2
import numpy as np
import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent
ASTRONAUT = (ROOT / "samples/astronaut.jpg").read_bytes()
TINY = cv2.imencode(".png", np.zeros((9, 9, 3), np.uint8))[1].tobytes()
GUIDE = (HERE / "README.md").read_text()
STEPS = [HERE / f"step{number}.py" for number in range(1, 6)]
MAX_LINES = [40, 60, 80, 110, 150]
MAX_REMOVED = [12, 6, 6, 26]  # lines, from each step to the next
TIMEOUT = 60  # s, for every wait, and for a command of the guide that posts 4,000 photos
NO_END = re.compile(r"python (workshop/step[2-5]|blocking|watch|deaf|server)\.py$")
SERVER = re.compile(r"python (workshop/step[2-5]|blocking|server)\.py$")
UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"

needs_curl = pytest.mark.skipif(not shutil.which("curl"), reason="curl is missing")
if sys.platform == "win32":
    pytest.skip("the guide's commands need a POSIX shell", allow_module_level=True)


# --- A class room ---


class Room:
    """A folder like a clone of the project, in which the servers listen on a free port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.running: list[tuple[str, subprocess.Popen[bytes], Path]] = []
        for name in ("workshop", "samples"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__*"))
        for name in ("server.py", "README.md"):
            shutil.copy(ROOT / name, folder)
        for step in (folder / "workshop").glob("step*.py"):
            step.write_text(self.local(step.read_text()))
        (folder / "server.py").write_text(self.local((folder / "server.py").read_text()))
        for block in re.findall(r"```python\n(# (\w+\.py)\n.*?)```", GUIDE, re.DOTALL):
            (folder / block[1]).write_text(self.local(block[0]))
        # OpenCV's limits of this process, which has imported server.py, are not those of a class.
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("OPENCV_")}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.environment = inherited | {"PATH": path, "PYTHONUNBUFFERED": "1"}

    def local(self, text: str) -> str:
        return text.replace("8282", str(self.port))

    def run(self, script: str) -> str:
        """Run commands in a terminal, and return what they print."""
        shell = ["bash", "-c", self.local(script)]
        options = {"cwd": self.folder, "env": self.environment, "timeout": TIMEOUT}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.run(shell, text=True, check=False, **options, **pipes).stdout

    def start(self, command: str) -> Path:
        """Start a program that does not end, and return the file into which it prints."""
        if SERVER.match(command):
            self.stop()
        output = self.folder / f"output-{len(list(self.folder.glob('output-*')))}"
        with output.open("wb") as file:
            process = subprocess.Popen(
                self.local(command).split(),
                cwd=self.folder,
                env=self.environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self.running.append((command, process, output))
        if SERVER.match(command):
            wait_until(lambda: can_connect(self.port))
        return output

    def stop(self, sign: signal.Signals = signal.SIGKILL) -> None:
        """Stop what runs, the server first."""
        for _, process, _ in self.running:
            process.send_signal(sign)
            sign = signal.SIGKILL if sign is signal.SIGKILL else signal.SIGCONT
            process.wait(TIMEOUT)
        self.running.clear()


def free_port() -> int:
    """A free port of four digits: how many URLs fit into a buffer depends on their length."""
    while True:
        port = random.randrange(2000, 10_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def can_connect(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), TIMEOUT):
        return True
    return False


def wait_until(condition: Callable[[], object], seconds: float = TIMEOUT) -> None:
    """Wait for something outside of this process, which cannot tell when it is there."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def wait_for(output: Path, printed: re.Pattern[str]) -> None:
    """Wait until a program has printed this."""
    try:
        wait_until(lambda: printed.match(output.read_text()))
    except AssertionError:
        raise AssertionError(f"no {printed.pattern} in:\n{output.read_text()[-2000:]}") from None


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Room]:
    room = Room(tmp_path)
    yield room
    room.stop()


# --- The guide ---


def section(title: str) -> str:
    """The guide's text from a heading to the next."""
    return re.search(rf"^## {title}.*?(?=^## |\Z)", GUIDE, re.DOTALL | re.MULTILINE)[0]


def pattern(printed: str) -> re.Pattern[str]:
    """What the guide says that a command prints, with any UUID and any time for its own."""
    text = re.sub(UUID, "UUID", printed.strip())
    text = re.escape(re.sub(r"\d+\.\d{6}", "TIME", text))
    text = re.sub(r"(\\[ \n\t])+", r"\\s+", text).replace(r"\.\.\.", ".*")
    return re.compile(text.replace("UUID", UUID).replace("TIME", r"\d+\.\d+"), re.DOTALL)


def sessions(text: str) -> list[list[tuple[str, str]]]:
    """The listings of a text: for each, its commands with what they print."""
    listings = re.findall(r"^```console\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    each = re.compile(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", re.MULTILINE)
    return [each.findall(listing) for listing in listings]


def follow(room: Room, text: str) -> list[tuple[Path, re.Pattern[str]]]:
    """Type the commands of a text, and compare; return what runs on, with what it shall print."""
    runs_on = []
    for listing in sessions(room.local(text)):
        command, printed = listing[0]
        if NO_END.match(command):
            output = room.start(command)
            wait_for(output, pattern(printed.partition("\n")[0]))
            runs_on.append((output, pattern(printed)))
            continue
        answers = room.run("\nprintf '\\036'\n".join(command for command, _ in listing)).split(
            "\036"
        )
        for (command, printed), answer in zip(listing, answers, strict=True):
            assert pattern(printed).fullmatch(answer.strip()), f"$ {command}\n{answer}"
    return runs_on


@needs_curl
@pytest.mark.parametrize("title", ["Step 1", "Step 2", "Step 3", "Step 4"])
def test_the_commands_of_a_step_print_what_the_guide_says(room, title):
    for output, printed in follow(room, section(title)):
        wait_for(output, printed)


@needs_curl
def test_the_commands_of_step_5_print_what_the_guide_says_and_its_stop_is_clean(room):
    [tiny] = re.findall(r"^\$ (python -c .*tiny.jpg.*)", section("Step 4"), re.MULTILINE)
    room.run(tiny)
    runs_on = follow(room, section("Step 5"))
    server = room.running[0][1]
    server.send_signal(signal.SIGINT)
    assert server.wait(TIMEOUT) == 0
    for output, printed in runs_on:
        wait_for(output, printed)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Room]]:
    """A room with step 5, and one with server.py."""
    rooms = []
    for command in ("python workshop/step5.py", "python server.py"):
        room = Room(tmp_path_factory.mktemp("room"))
        room.run("python odd.py")
        room.start(command)
        rooms.append(room)
    yield rooms
    for room in rooms:
        room.stop()


ROWS = [
    [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    for line in section("What server.py adds").splitlines()
    if re.match(r"\| (?!---|`server.py` \|)(?:.*[^\\]\|){4} `", line)
]


@needs_curl
@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_what_server_py_adds_shows(both, row):
    _, _, command, *answers = [cell.strip("`") for cell in row]
    tools = re.search(r"```sh\n(.*?)```", GUIDE, re.DOTALL)[1]
    for room, answer in zip(both, answers, strict=True):
        printed = room.run(tools + command)
        assert re.search(rf"(?<!\d){pattern(answer).pattern}(?!\d)", printed), printed


# --- The steps ---


@pytest.mark.parametrize(("step", "most"), list(zip(STEPS, MAX_LINES, strict=True)))
def test_a_step_is_short(step, most):
    lines = step.read_text().splitlines()
    assert len(lines) <= most
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("index", range(4))
def test_a_step_adds_one_idea_to_the_one_before(index):
    before, after = (step.read_text().splitlines() for step in STEPS[index : index + 2])
    removed = [line for line in difflib.ndiff(before, after) if line.startswith("- ")]
    assert len(removed) <= MAX_REMOVED[index], "\n".join(removed)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.stem)
def test_names_stand_in_the_order_of_server_py(step):
    def names(file: Path) -> list[str]:
        return re.findall(r"^ *(?:async )?(?:def|class) (?!__)(\w+)", file.read_text(), re.M)

    theirs, ours = names(ROOT / "server.py"), names(step)
    assert [name for name in theirs if name in ours] == ours


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.stem)
def test_the_session_in_a_docstring_is_of_the_guide(step):
    def commands(file: Path) -> list[str]:
        text = re.sub(r" -s\b| -[ow] (?:'[^']*'|\S+)", "", file.read_text())
        return re.findall(r"^\$ (.*)", text, re.MULTILINE)

    assert commands(step)
    assert set(commands(step)) <= set(commands(HERE / "README.md"))


# --- What the guide says, and no command of it shows ---


@pytest.fixture
async def client(room: Room) -> AsyncIterator[aiohttp.ClientSession]:
    timeout = aiohttp.ClientTimeout(total=TIMEOUT)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{room.port}", timeout=timeout) as session:
        yield session


@pytest.mark.parametrize(("program", "blocks"), [("workshop/step2", False), ("blocking", True)])
async def test_only_the_blocking_server_makes_others_wait_for_a_photo(
    room, client, program, blocks
):
    for listing in sessions(section("Step 2")):
        if listing[0][0].startswith("sed"):
            room.run("\n".join(command for command, _ in listing))
    room.start(f"python {program}.py")

    async def time_post() -> float:
        start = time.monotonic()
        async with client.post("/image", data=(room.folder / "large.jpg").read_bytes()) as answer:
            assert answer.status == 200
        return time.monotonic() - start

    waits = []
    for _ in range(5):  # the machine may have held up one or two
        posting, longest = asyncio.create_task(time_post()), 0.0
        while not posting.done():
            start = time.monotonic()
            async with client.get("/") as answer:
                assert answer.status == 404
            longest = max(longest, time.monotonic() - start)
        waits.append(longest / await posting)
    assert (statistics.median(waits) > 1 / 2) == blocks, waits


@pytest.mark.parametrize("step", ["step3", "step4", "step5"])
async def test_the_url_opens_as_the_photo_with_a_box(room, client, step):
    room.start(f"python workshop/{step}.py")
    async with client.post("/image", data=ASTRONAUT) as answer:
        assert answer.status == 201
        posted = await answer.json()
    assert answer.headers["Location"] == posted["url"]
    async with client.get(posted["url"]) as answer:
        jpeg = cv2.imdecode(np.frombuffer(await answer.read(), np.uint8), cv2.IMREAD_COLOR)
    face = posted["faces"][0]
    blue, green, red = jpeg[face["y"] + face["height"] // 2, face["x"]].tolist()
    assert green > 200 > 100 > max(blue, red)


@pytest.mark.parametrize("step", ["step4", "step5"])
async def test_every_watcher_gets_each_url_after_another_has_left(room, client, step):
    room.start(f"python workshop/{step}.py")
    gone, *watchers = [await client.ws_connect("/faces") for _ in range(3)]
    await gone.close()
    for _ in range(2):
        async with client.post("/image", data=ASTRONAUT) as answer:
            posted = await answer.json()
        for watcher in watchers:
            assert await watcher.receive_str(timeout=TIMEOUT) == posted["url"]


async def test_a_slow_upload_gets_408(room, client):
    step = room.folder / "workshop/step5.py"
    step.write_text(step.read_text().replace("UPLOAD_TIMEOUT = 40", "UPLOAD_TIMEOUT = 0.1"))
    room.start("python workshop/step5.py")

    async def slowly() -> AsyncIterator[bytes]:
        yield ASTRONAUT[:1000]
        await asyncio.Event().wait()

    async with client.post("/image", data=slowly()) as answer:
        assert answer.status == 408
        assert "too long" in await answer.text()


async def test_slow_uploads_make_others_wait_until_their_time_is_over(room, client):
    step = room.folder / "workshop/step5.py"
    text = step.read_text().replace("UPLOAD_TIMEOUT = 40", "UPLOAD_TIMEOUT = 0.3")
    step.write_text(text.replace("Semaphore(16)", "Semaphore(1)"))
    room.start("python workshop/step5.py")
    reader, writer = await asyncio.open_connection("127.0.0.1", room.port)
    lines = ["POST /image HTTP/1.1", "Host: a", "Content-Length: 9", "Expect: 100-continue"]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    async with asyncio.timeout(TIMEOUT):
        await reader.readuntil(b"\r\n\r\n")  # now it has the only place
    slow = asyncio.create_task(reader.readline())
    other = asyncio.create_task(client.post("/image", data=TINY).__aenter__())
    first, _ = await asyncio.wait(
        [slow, other], timeout=TIMEOUT, return_when=asyncio.FIRST_COMPLETED
    )
    assert slow in first
    assert b"408" in await slow
    assert (await other).status == 201
    writer.close()


def test_a_deaf_watcher_does_not_delay_the_end(room):
    room.start("python workshop/step5.py")
    deaf = room.start("python deaf.py")
    wait_until(lambda: "I am deaf" in deaf.read_text())
    server = room.running[0][1]
    server.send_signal(signal.SIGINT)
    assert server.wait(TIMEOUT) == 0  # its handler would go on for 120 s


async def test_a_photo_in_work_is_answered_before_the_end(room, client):
    step = room.folder / "workshop/step5.py"
    line = "    pixels = decode(photo)\n"
    step.write_text(step.read_text().replace(line, f"    print('in work')\n{line}"))
    output = room.start("python workshop/step5.py")
    server = room.running[0][1]
    posting = asyncio.create_task(client.post("/image", data=ASTRONAUT).__aenter__())
    await asyncio.to_thread(wait_until, lambda: "in work" in output.read_text())
    server.send_signal(signal.SIGINT)
    assert (await posting).status == 201
    assert await asyncio.to_thread(server.wait, TIMEOUT) == 0
