"""What server.py promises, section by section, against a real server process with real photos and websockets."""

import asyncio
import base64
import contextlib
import gzip
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import uuid
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
import cv2
import numpy as np
import pytest
import yarl

import server

ROOT = Path(__file__).parent
ASTRONAUT = (ROOT / "samples/astronaut.jpg").read_bytes()  # 512 x 512, one face
FACE = (178, 67, 92, 92)  # where it is, by the cascade at its usual settings
COMMAND = shlex.split(os.environ.get("FACES_SERVER", "server.py"))  # what is tested: a program that takes its options
TIMEOUT = 20  # s, for every wait
ON_WINDOWS = sys.platform == "win32"


# --- Photos ---


def pixels(photo: bytes = ASTRONAUT) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(photo, np.uint8), cv2.IMREAD_UNCHANGED)


def encode(extension: str, image: np.ndarray | None = None, *parameters: int) -> bytes:
    image = pixels() if image is None else image
    return cv2.imencode(extension, image, parameters)[1].tobytes()


def large(width: int, height: int) -> bytes:
    """A JPEG of the astronaut in the upper left of a grey field, half as high or wide."""
    image, side = np.full((height, width, 3), 128, np.uint8), min(width, height) // 2
    image[:side, :side] = cv2.resize(pixels(), (side, side))
    return encode(".jpg", image)


def png(width: int, height: int, depth: int, color_type: int, rows: bytes, palette: bytes = b"") -> bytes:
    """A PNG made by hand (its specification, 11.2), also one that lies about its size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0))
    colors = chunk(b"PLTE", palette) if palette else b""
    return b"\x89PNG\r\n\x1a\n" + header + colors + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def lying_jpeg(width: int, height: int) -> bytes:
    """A small JPEG whose frame header claims another size."""
    frame_header = ASTRONAUT.index(b"\xff\xc0") + 5
    return ASTRONAUT[:frame_header] + struct.pack(">HH", height, width) + ASTRONAUT[frame_header + 4 :]


def exif(orientation: int) -> bytes:
    """An EXIF block in TIFF's form: an orientation, and a GPS tag that names a place."""
    entries = struct.pack(">HHII", 0x0112, 3, 1, orientation << 16) + struct.pack(">HHII", 0x8825, 4, 1, 38)
    gps = struct.pack(">H", 1) + struct.pack(">HHI4s", 0x001D, 2, 4, b"GPS!") + bytes(4)
    return b"MM\0*" + struct.pack(">IH", 8, 2) + entries + bytes(4) + gps


def with_exif(jpeg: bytes, orientation: int) -> bytes:
    block = b"Exif\0\0" + exif(orientation)
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + jpeg[2:]


def animation(extension: str) -> bytes:
    """The astronaut, then nothing but black."""
    frames = cv2.Animation()
    frames.frames = [cv2.cvtColor(pixels(), cv2.COLOR_BGR2BGRA), np.zeros((512, 512, 4), np.uint8)]
    frames.durations = [100, 100]
    return cv2.imencodeanimation(extension, frames)[1].tobytes()


SIXTEEN_BITS = pixels().astype(np.uint16) * 257
FORMATS = {
    "JPEG": ASTRONAUT,
    "progressive JPEG": encode(".jpg", None, cv2.IMWRITE_JPEG_PROGRESSIVE, 1),
    "PNG": encode(".png"),
    "WebP": encode(".webp", None, cv2.IMWRITE_WEBP_QUALITY, 80),
    "lossless WebP": encode(".webp", None, cv2.IMWRITE_WEBP_QUALITY, 101),
    "transparent WebP": encode(".webp", cv2.cvtColor(pixels(), cv2.COLOR_BGR2BGRA), cv2.IMWRITE_WEBP_QUALITY, 80),
    "GIF": encode(".gif"),
    "animated GIF": animation(".gif"),
    "animated WebP": animation(".webp"),
    "grey JPEG": encode(".jpg", cv2.cvtColor(pixels(), cv2.COLOR_BGR2GRAY)),
    "grey PNG": encode(".png", cv2.cvtColor(pixels(), cv2.COLOR_BGR2GRAY)),
    "transparent PNG": encode(".png", cv2.cvtColor(pixels(), cv2.COLOR_BGR2BGRA)),
    "16-bit PNG": encode(".png", SIXTEEN_BITS),
    "16-bit PNG of 12-bit values": encode(".png", SIXTEEN_BITS >> 4),
    "palette PNG": png(
        512,
        512,
        8,
        3,
        b"".join(b"\0" + row.tobytes() for row in cv2.cvtColor(pixels(), cv2.COLOR_BGR2GRAY)),
        bytes(level for level in range(256) for _ in "RGB"),
    ),
}
CMYK = base64.b64decode(
    "/9j/7gAOQWRvYmUAZAAAAAAA/9sAQwCgbniMeGSgjIKMtKqgvvD///Dc3PD/////////////////////////////////////////////////"
    "/////////8AAFAgAEAAQBEMRAE0RAFkRAEsRAP/EABUAAQEAAAAAAAAAAAAAAAAAAAAD/8QAFBABAAAAAAAAAAAAAAAAAAAAAP/aAA4EQwBN"
    "AFkASwAAPwCyKKwAAAD/2Q=="
)


# --- The server ---


class Server:
    """A server process, on a free port."""

    def __init__(self, log: Path, *options: str) -> None:
        self.log = log
        with log.open("w") as stderr:
            command = [sys.executable, *COMMAND, "--port", "0", *options]
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True)
        watchdog = threading.Timer(TIMEOUT, self.process.kill)
        watchdog.start()
        assert self.process.stdout is not None
        self.said = ""
        for line in self.process.stdout:  # until it ends, should it not start
            self.said += line
            if "/health" in line:
                break
        watchdog.cancel()
        found = re.search(r"curl (http://\S+)/health", self.said)
        assert found, log.read_text()
        self.url = found[1]
        self.port = int(self.url.rpartition(":")[2])

    def stop(self) -> int:
        """Ask it to stop, and return its exit code."""
        self.process.terminate()
        return self.process.wait(TIMEOUT)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Starts servers with the options given, and stops them in the end."""
    servers: list[Server] = []

    def start(*options: str) -> Server:
        servers.append(Server(tmp_path_factory.mktemp("server") / "log", *options))
        return servers[-1]

    yield start
    for each in servers:
        each.process.kill()
        each.process.communicate()


@pytest.fixture(scope="module")
def default(start: Callable[..., Server]) -> Server:
    """A server that most tests share, with room for all that they post."""
    return start("--queue", "100")


@pytest.fixture(scope="module")
def one_megabyte(start: Callable[..., Server]) -> Server:
    """A server that takes bodies of up to 1 MiB."""
    return start("--max-mb", "1")


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(TIMEOUT)) as session:
        yield session


@pytest.fixture
async def post(default: Server, client: aiohttp.ClientSession) -> Callable[..., Awaitable[dict]]:
    """Posts a photo as the body, and returns the JSON of the answer, which must be 201."""

    async def post(photo: bytes = ASTRONAUT, url: str = default.url, **headers: str) -> dict:
        async with client.post(f"{url}/image", data=io.BytesIO(photo), headers=headers) as answer:
            assert answer.status == 201, await answer.text()
            return await answer.json()

    return post


async def problem(answer: aiohttp.ClientResponse) -> str:
    """The detail of an error, which must be a problem document."""
    document = await answer.json(content_type="application/problem+json")
    assert document.keys() == {"title", "status", "detail"}
    assert document["status"] == answer.status
    return document["detail"]


async def talk(port: int, request: bytes) -> bytes:
    """Send bytes that a client library would refuse to, and return all that comes back."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    async with asyncio.timeout(TIMEOUT):
        writer.write(request)
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
    return answer


def form(content: bytes = ASTRONAUT, filename: str = "astronaut.jpg", field: str = "image") -> aiohttp.FormData:
    data = aiohttp.FormData()
    data.add_field(field, content, filename=filename)
    return data


def overlap(box: dict, other: tuple[float, ...]) -> float:
    """Intersection over union."""
    x, y, width, height = other
    across = min(box["x"] + box["width"], x + width) - max(box["x"], x)
    down = min(box["y"] + box["height"], y + height) - max(box["y"], y)
    common = max(0, across) * max(0, down)
    return common / (box["width"] * box["height"] + width * height - common)


# --- The start ---


def test_the_script_metadata_names_what_requirements_txt_pins() -> None:
    dependencies = re.search(r"# dependencies = (\[.*])", (ROOT / "server.py").read_text())
    pinned = re.findall(r"^[a-z-]+==[0-9.]+", (ROOT / "requirements.txt").read_text(), re.M)
    assert dependencies
    assert [*json.loads(dependencies[1]), "pytest-aiohttp==1.1.1"] == pinned


def test_the_cascade_is_the_one_of_the_wheel() -> None:
    assert (ROOT / server.CASCADE).read_bytes() == Path(cv2.data.haarcascades, server.CASCADE).read_bytes()


def run(*command: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT)


def test_server_py_alone_in_a_folder_finds_faces(tmp_path: Path) -> None:
    shutil.copy(ROOT / "server.py", tmp_path)
    (tmp_path / "photo.jpg").write_bytes(ASTRONAUT)
    script = "import server; print(len(server.annotate(open('photo.jpg', 'rb').read()).faces), server.__file__)"
    done = run("-W", "ignore", "-c", script, cwd=tmp_path)
    assert done.stdout.split() == ["1", str(tmp_path / "server.py")], done.stderr


def test_an_opencv_without_cascades_ends_the_start_with_one_line() -> None:
    done = run("-c", "import cv2; del cv2.CascadeClassifier; import server; server.main()")
    assert done.returncode == 1
    assert re.fullmatch(r"OpenCV .* has no CascadeClassifier: pip install '.*>=4.12,<5'\n", done.stderr)


def test_help_shows_each_option_with_its_default() -> None:
    help = " ".join(run(*COMMAND, "--help").stdout.split())
    for name, value in {
        "host": "127.0.0.1",
        "port": 8282,
        "public-url": "none",
        "allow-origin": "none",
        "keep": 100,
        "keep-mb": 128,
        "max-mb": 20,
        "max-megapixels": 50,
        "upload-timeout": 40,
        "queue": 8,
        "max-clients": 1000,
        "model": "none",
        "min-score": 0.0,
    }.items():
        assert re.search(rf"--{name} [^-][^()]*\(default: {value}\)", help), name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--port", "http"], "invalid int value"),
        (["--keep", "0"], "--keep 0 is too small"),
        (["--max-megapixels", "251"], "--max-megapixels can be 250 at most"),
        (["--public-url", "example.org"], "example.org is no URL"),
        (["--allow-origin", "example.org"], "example.org is no URL"),
    ],
)
def test_a_bad_option_is_refused_in_words(options: list[str], words: str) -> None:
    done = run(*COMMAND, *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr


def test_a_port_in_use_is_named(default: Server) -> None:
    done = run(*COMMAND, "--port", str(default.port))
    assert done.returncode == 1
    assert done.stderr.startswith(f"Cannot listen on 127.0.0.1 port {default.port} (--host, --port): ")


def test_it_prints_the_commands_to_try_with_its_address(default: Server) -> None:
    assert f"wscat -c ws://127.0.0.1:{default.port}/faces" in default.said
    assert f"curl -F image=@samples/astronaut.jpg http://127.0.0.1:{default.port}/image" in default.said


# --- Posting a photo ---


async def test_a_photo_posted_gets_its_boxes_and_its_url(default: Server, client: aiohttp.ClientSession) -> None:
    async with client.post(f"{default.url}/image", data=form()) as answer:
        text = await answer.text()
    meta = json.loads(text)
    assert answer.status == 201
    assert answer.content_type == "application/json"
    assert text == json.dumps(meta, indent=2) + "\n"
    assert list(meta) == ["id", "url", "width", "height", "faces", "filename", "took_ms"]
    assert str(uuid.UUID(meta["id"], version=4)) == meta["id"]
    assert meta["url"] == answer.headers["Location"] == f"{default.url}/image/{meta['id']}"
    assert (meta["width"], meta["height"], meta["filename"]) == (512, 512, "astronaut.jpg")
    assert isinstance(meta["took_ms"], int)
    (box,) = meta["faces"]
    assert all(type(box[side]) is int for side in ("x", "y", "width", "height"))
    assert overlap(box, FACE) > 0.6


async def test_a_photo_without_faces_is_no_error(post: Callable[..., Awaitable[dict]]) -> None:
    assert (await post(encode(".jpg", np.full((300, 400, 3), 90, np.uint8))))["faces"] == []


@pytest.mark.parametrize("content_type", ["image/jpeg", "text/plain", "application/x-www-form-urlencoded", "nonsense"])
async def test_a_raw_body_is_a_photo_whatever_its_type(post: Callable[..., Awaitable[dict]], content_type: str) -> None:
    meta = await post(**{"Content-Type": content_type})
    assert (len(meta["faces"]), meta["filename"]) == (1, None)


async def test_put_does_what_post_does(default: Server, client: aiohttp.ClientSession) -> None:
    async with client.put(f"{default.url}/image", data=ASTRONAUT) as answer:
        assert answer.status == 201


async def test_the_first_file_of_a_form_is_the_photo(default: Server, client: aiohttp.ClientSession) -> None:
    data = aiohttp.FormData({"comment": "no file"}, quote_fields=False)
    data.add_field("camera", b"", filename="")
    data.add_field("anything", ASTRONAUT, filename="Žofie 1.jpg")
    data.add_field("image", b"second", filename="second.jpg")
    async with client.post(f"{default.url}/image", data=data) as answer:
        assert (await answer.json())["filename"] == "Žofie 1.jpg"


@pytest.mark.parametrize("name", FORMATS)
async def test_each_format_is_read(post: Callable[..., Awaitable[dict]], name: str) -> None:
    meta = await post(FORMATS[name])
    assert (meta["width"], meta["height"], len(meta["faces"])) == (512, 512, 1)


async def test_cmyk_is_read_in_its_colors(post: Callable[..., Awaitable[dict]]) -> None:
    blue, green, red = pixels(server.annotate(CMYK).jpeg)[8, 8]
    assert (await post(CMYK))["width"] == 16
    assert red > 200 > 60 > max(blue, green)


@pytest.mark.parametrize("orientation", [*range(1, 9), 99])
async def test_a_photo_comes_out_upright(orientation: int) -> None:
    upright = large(1280, 1024)
    stored = {
        1: lambda image: image,
        2: lambda image: cv2.flip(image, 1),
        3: lambda image: cv2.rotate(image, cv2.ROTATE_180),
        4: lambda image: cv2.flip(image, 0),
        5: cv2.transpose,
        6: lambda image: cv2.rotate(image, cv2.ROTATE_90_COUNTERCLOCKWISE),
        7: lambda image: cv2.rotate(cv2.transpose(image), cv2.ROTATE_180),
        8: lambda image: cv2.rotate(image, cv2.ROTATE_90_CLOCKWISE),
        99: lambda image: image,
    }[orientation](pixels(upright))
    annotated = server.annotate(with_exif(encode(".jpg", stored), orientation))
    assert (annotated.width, annotated.height) == (1280, 1024)
    (face,) = annotated.faces
    assert overlap(face._asdict(), FACE) > 0.6


def test_nothing_of_the_metadata_comes_out() -> None:
    photo = with_exif(ASTRONAUT, 1)
    assert b"GPS!" in photo
    jpeg = server.annotate(photo).jpeg
    assert b"GPS!" not in jpeg
    assert b"Exif" not in jpeg


def test_the_photo_keeps_its_full_size_and_its_quality() -> None:
    annotated = server.annotate(large(4000, 3000))
    image = pixels(annotated.jpeg)
    assert image.shape == (3000, 4000, 3)
    assert (annotated.width, annotated.height) == (4000, 3000)
    assert len(annotated.jpeg) == pytest.approx(len(encode(".jpg", image, cv2.IMWRITE_JPEG_QUALITY, 90)), rel=0.02)


# --- Finding the faces ---


@pytest.mark.parametrize(("width", "height"), [(600, 600), (1200, 900), (4000, 3000), (3000, 4000)])
def test_the_box_is_drawn_around_the_face(width: int, height: int) -> None:
    annotated = server.annotate(large(width, height))
    (face,) = annotated.faces
    scale, image = min(width, height) / 2 / 512, pixels(annotated.jpeg)
    assert overlap(face._asdict(), tuple(side * scale for side in FACE)) > 0.6
    for x, y in [
        (face.x, face.y + face.height // 2),
        (face.x + face.width, face.y + face.height // 2),
        (face.x + face.width // 2, face.y),
        (face.x + face.width // 2, face.y + face.height),
    ]:
        blue, green, red = image[y, x].astype(int)
        assert green > 180 > 100 > max(blue, red), (x, y)


def test_each_face_of_a_group_is_found() -> None:
    annotated = server.annotate(encode(".jpg", np.tile(pixels(), (2, 3, 1))))
    assert len(annotated.faces) == 6


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 20_000), (20_000, 1), (23, 23), (65_500, 1)])
def test_a_photo_too_small_for_a_face_has_none(width: int, height: int) -> None:
    annotated = server.annotate(encode(".png", np.zeros((height, width, 3), np.uint8)))
    assert (annotated.width, annotated.height, annotated.faces) == (width, height, [])


def test_threads_at_once_find_what_one_alone_finds() -> None:
    photos = [large(size, 600) for size in range(600, 1000, 50)] * 2
    alone = [server.annotate(photo).faces for photo in photos]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda photo: server.annotate(photo).faces, photos)) == alone
    assert all(alone)


async def test_others_are_answered_while_faces_are_searched(default: Server, client: aiohttp.ClientSession) -> None:
    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(posted(client, default.url, large(6000, 4000)))
        while (await health(client, default.url))["queued"] < 4:
            pass
        start = time.monotonic()
        await health(client, default.url)
        assert time.monotonic() - start < 1


async def test_a_photo_alone_has_all_cores_and_each_of_several_has_one(aiohttp_client: Any) -> None:
    cores: list[int] = []
    go_on = threading.Event()

    def detect(image: server.Pixels) -> list[server.Face]:
        assert go_on.wait(TIMEOUT)
        cores.append(cv2.getNumThreads())
        return []

    app = server.create_app(server.Config())
    app[server.DETECTOR] = detect
    client = await aiohttp_client(app)
    async with asyncio.timeout(TIMEOUT), asyncio.TaskGroup() as group:
        go_on.set()
        await posted(client, "")
        go_on.clear()
        for _ in range(2):
            group.create_task(posted(client, ""))
        while (await health(client, ""))["queued"] < 2:
            pass
        go_on.set()
    cv2.setNumThreads(-1)  # back to the default
    assert cores == [cv2.getNumThreads(), 1, 1]


async def posted(client: aiohttp.ClientSession, url: str, photo: bytes = ASTRONAUT, **headers: str) -> int:
    """The status of a post."""
    async with client.post(f"{url}/image", data=io.BytesIO(photo), headers=headers) as answer:
        await answer.read()
        return answer.status


async def health(client: aiohttp.ClientSession, url: str) -> dict:
    async with client.get(f"{url}/health") as answer:
        return await answer.json()


# --- Which detector, and how sure it must be ---


YUNET = ROOT.parent / "shared/models/face_detection_yunet_2023mar.onnx"


async def test_a_face_says_how_sure_its_detector_is(post: Callable[..., Awaitable[dict]]) -> None:
    (face,) = (await post())["faces"]
    assert face["score"] >= server.HAAR_SCORE


async def test_a_higher_score_can_be_asked_for(
    start: Callable[..., Server], post: Callable[..., Awaitable[dict]]
) -> None:
    score = server.annotate(ASTRONAUT).faces[0].score
    counts = [len((await post(url=start("--min-score", str(least)).url))["faces"]) for least in (score, score + 1)]
    assert counts == [1, 0]


async def test_another_cascade_can_be_used(
    start: Callable[..., Server], post: Callable[..., Awaitable[dict]], tmp_path: Path
) -> None:
    cascade = tmp_path / "Kaskade für Gesichter.xml"
    shutil.copy(Path(cv2.data.haarcascades, "haarcascade_frontalface_alt2.xml"), cascade)
    assert overlap((await post(url=start("--model", str(cascade)).url))["faces"][0], FACE) > 0.6


@pytest.mark.skipif(not YUNET.exists(), reason=f"needs {YUNET.name} in ../shared/models")
@pytest.mark.parametrize(
    "image", [pixels(), np.tile(pixels(), (1, 3, 1)), large(4000, 3000)], ids=["one", "three", "big"]
)
async def test_yunet_can_be_used(
    start: Callable[..., Server], post: Callable[..., Awaitable[dict]], image: np.ndarray | bytes
) -> None:
    photo = image if isinstance(image, bytes) else encode(".jpg", image)
    faces = (await post(photo, url=start("--model", str(YUNET)).url))["faces"]
    assert len(faces) == (3 if pixels(photo).shape[1] == 1536 else 1)
    assert all(0.7 <= face["score"] <= 1 for face in faces)


@pytest.mark.skipif(not YUNET.exists(), reason=f"needs {YUNET.name} in ../shared/models")
@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 20_000), (20_000, 1), (31, 33), (640, 20)])
def test_yunet_takes_a_photo_of_any_shape(width: int, height: int) -> None:
    """In a side of 32 px or less, OpenCV 4.14 has it see boxes of infinite size."""
    noise = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
    for face in server.load_detector(str(YUNET), 0.0)(noise):
        assert face.width <= width * 2


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("missing.xml", None),
        ("missing.onnx", None),
        ("junk.xml", b"junk"),
        ("other.xml", b"<?xml version='1.0'?><opencv_storage><a>1</a></opencv_storage>"),
        ("photo.xml", ASTRONAUT),
        ("junk.onnx", b"junk"),
        ("empty.onnx", b""),
    ],
)
def test_a_model_that_is_none_ends_the_start_with_one_line(tmp_path: Path, name: str, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    done = run(*COMMAND, "--model", tmp_path / name)
    assert (done.returncode, done.stdout) == (1, "")
    assert name in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


# --- Answering later (Prefer: respond-async) ---


async def test_an_asynchronous_post_is_answered_at_once_and_its_url_waits(
    default: Server, client: aiohttp.ClientSession
) -> None:
    headers = {"Prefer": "wait=10, Respond-Async"}
    async with client.post(f"{default.url}/image", data=io.BytesIO(large(4000, 3000)), headers=headers) as answer:
        promise = await answer.json()
    assert answer.status == 202
    assert answer.headers["Preference-Applied"] == "respond-async"
    assert promise == {"id": promise["id"], "url": answer.headers["Location"]}
    async with client.get(promise["url"]) as image:
        assert (image.status, image.content_type) == (200, "image/jpeg")
    async with client.get(f"{promise['url']}/meta") as meta:
        assert len((await meta.json())["faces"]) == 1


async def test_an_asynchronous_post_is_announced(default: Server, client: aiohttp.ClientSession) -> None:
    async with client.ws_connect(f"{default.url}/faces") as watcher:
        headers = {"Prefer": "respond-async"}
        async with client.post(f"{default.url}/image", data=ASTRONAUT, headers=headers) as answer:
            promise = await answer.json()
        assert await watcher.receive_str(timeout=TIMEOUT) == promise["url"]


@pytest.mark.parametrize(("photo", "status"), [(b"no photo", 415), (ASTRONAUT[:9000], 422)])
@pytest.mark.parametrize("path", ["", "/meta"])
async def test_the_url_of_a_bad_photo_gives_its_error(
    default: Server, client: aiohttp.ClientSession, photo: bytes, status: int, path: str
) -> None:
    headers = {"Prefer": "respond-async"}
    async with client.post(f"{default.url}/image", data=photo, headers=headers) as answer:
        promise = await answer.json()
    for _ in range(2):
        async with client.get(promise["url"] + path) as image:
            assert (image.status, bool(await problem(image))) == (status, True)


# --- Getting the image ---


async def test_the_url_opens_as_the_annotated_photo(
    default: Server, client: aiohttp.ClientSession, post: Callable[..., Awaitable[dict]]
) -> None:
    meta = await post()
    async with client.get(meta["url"]) as image:
        jpeg = await image.read()
    assert jpeg == server.annotate(ASTRONAUT).jpeg
    assert image.content_type == "image/jpeg"
    assert image.headers["X-Content-Type-Options"] == "nosniff"
    assert image.headers["Cache-Control"] == "private, max-age=31536000, immutable"
    async with client.head(meta["url"]) as head:
        assert (head.status, head.headers["Content-Length"]) == (200, str(len(jpeg)))
    async with client.get(f"{meta['url']}/meta") as again:
        assert await again.json() == meta


@pytest.mark.parametrize(
    "spell", [str.upper, lambda id: id.replace("-", ""), lambda id: f"{{{id}}}", lambda id: f"{id}x", lambda id: ""]
)
async def test_an_id_spelled_otherwise_is_404(
    default: Server, client: aiohttp.ClientSession, post: Callable[..., Awaitable[dict]], spell: Callable[[str], str]
) -> None:
    meta = await post()
    for path in ("", "/meta"):
        async with client.get(f"{default.url}/image/{spell(meta['id'])}{path}") as answer:
            assert (answer.status, bool(await problem(answer))) == (404, True)


async def test_the_least_recently_used_image_goes_first(
    start: Callable[..., Server], client: aiohttp.ClientSession, post: Callable[..., Awaitable[dict]]
) -> None:
    url = start("--keep", "2").url
    first, second = await post(url=url), await post(url=url)
    async with client.get(first["url"]):
        pass  # a read counts as use
    third = await post(url=url)
    statuses = {}
    for name, meta in {"first": first, "second": second, "third": third}.items():
        async with client.get(meta["url"]) as answer:
            statuses[name] = answer.status
            if answer.status == 404:
                assert "--keep" in await problem(answer)
    assert statuses == {"first": 200, "second": 404, "third": 200}


async def test_images_are_kept_up_to_a_size(
    start: Callable[..., Server], client: aiohttp.ClientSession, post: Callable[..., Awaitable[dict]]
) -> None:
    url = start("--keep-mb", "1").url
    noise = encode(".jpg", np.random.default_rng(1).integers(0, 256, (900, 900, 3), np.uint8))
    for _ in range(3):
        newest = await post(noise, url=url)
    kept = await health(client, url)
    async with client.get(newest["url"]) as answer:
        size = len(await answer.read())
    assert 2**19 < size < 2**20  # so that two are too much
    assert (kept["images"], kept["bytes"]) == (1, size)


async def test_an_image_larger_than_the_room_is_kept_until_the_next(
    start: Callable[..., Server], client: aiohttp.ClientSession, post: Callable[..., Awaitable[dict]]
) -> None:
    url = start("--keep-mb", "1").url
    meta = await post(encode(".jpg", np.random.default_rng(1).integers(0, 256, (1500, 1500, 3), np.uint8)), url=url)
    async with client.get(meta["url"]) as answer:
        assert len(await answer.read()) > 2**20


# --- Watching ---


async def test_every_watcher_gets_the_url_of_each_new_image(
    default: Server, client: aiohttp.ClientSession, post: Callable[..., Awaitable[dict]]
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        watchers = [await stack.enter_async_context(client.ws_connect(f"{default.url}/faces")) for _ in range(3)]
        posted = [(await post())["url"] for _ in range(3)]
        for watcher in watchers:
            assert [await watcher.receive_str(timeout=TIMEOUT) for _ in posted] == posted


async def test_a_watcher_can_get_the_json_instead(
    default: Server, client: aiohttp.ClientSession, post: Callable[..., Awaitable[dict]]
) -> None:
    async with client.ws_connect(f"{default.url}/faces?format=json") as watcher:
        meta = await post()
        assert await watcher.receive_json(timeout=TIMEOUT) == meta


async def test_each_watcher_gets_the_address_that_it_used(default: Server, client: aiohttp.ClientSession) -> None:
    hosts = ["faces.local:8282", "192.168.1.5", "[fe80::1]:80", "Upper.Case"]
    async with contextlib.AsyncExitStack() as stack:
        watchers = {
            host: await stack.enter_async_context(client.ws_connect(f"{default.url}/faces", headers={"Host": host}))
            for host in hosts
        }
        async with client.post(f"{default.url}/image", data=ASTRONAUT, headers={"Host": "evil.example"}) as answer:
            meta = await answer.json()
        assert meta["url"] == f"http://evil.example/image/{meta['id']}"
        for host, watcher in watchers.items():
            assert await watcher.receive_str(timeout=TIMEOUT) == f"http://{host}/image/{meta['id']}"


async def test_a_public_url_is_what_everybody_gets(start: Callable[..., Server], client: aiohttp.ClientSession) -> None:
    url, public = start("--public-url", "https://faces.example.org/app/").url, "https://faces.example.org/app"
    async with client.ws_connect(f"{url}/faces") as watcher:
        forwarded = {"X-Forwarded-Host": "evil.example", "Forwarded": "host=evil.example"}
        async with client.post(f"{url}/image", data=ASTRONAUT, headers=forwarded) as answer:
            meta = await answer.json()
        assert meta["url"] == answer.headers["Location"] == f"{public}/image/{meta['id']}"
        assert await watcher.receive_str(timeout=TIMEOUT) == meta["url"]
    async with client.get(url) as index:
        assert "wss://faces.example.org/app/faces" in await index.text()


async def test_forwarded_headers_are_not_trusted(default: Server, client: aiohttp.ClientSession) -> None:
    forwarded = {"X-Forwarded-Host": "evil.example", "X-Forwarded-Proto": "https", "Forwarded": "host=evil.example"}
    async with client.post(f"{default.url}/image", data=ASTRONAUT, headers=forwarded) as answer:
        assert answer.headers["Location"].startswith(f"{default.url}/image/")


async def test_a_plain_get_is_told_how_to_connect(default: Server, client: aiohttp.ClientSession) -> None:
    async with client.get(f"{default.url}/faces") as answer:
        assert (answer.status, answer.headers["Upgrade"]) == (426, "websocket")
        assert f"wscat -c ws://127.0.0.1:{default.port}/faces" in await problem(answer)


async def test_an_unknown_format_is_refused(default: Server, client: aiohttp.ClientSession) -> None:
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await client.ws_connect(f"{default.url}/faces?format=xml")
    assert refused.value.status == 400


async def test_what_a_watcher_says_is_ignored(
    default: Server, client: aiohttp.ClientSession, post: Callable[..., Awaitable[dict]]
) -> None:
    async with client.ws_connect(f"{default.url}/faces") as watcher:
        await watcher.send_str("x" * 1024)
        await watcher.send_bytes(b"\0")
        assert (await post())["url"] == await watcher.receive_str(timeout=TIMEOUT)


async def test_a_long_message_closes_the_watcher_with_1009(default: Server, client: aiohttp.ClientSession) -> None:
    async with client.ws_connect(f"{default.url}/faces") as watcher:
        await watcher.send_str("x" * 1025)
        closed = await watcher.receive(TIMEOUT)
        assert (closed.type, closed.data) == (aiohttp.WSMsgType.CLOSE, 1009)


async def test_more_watchers_than_allowed_get_503(start: Callable[..., Server], client: aiohttp.ClientSession) -> None:
    url = start("--max-clients", "2").url
    async with client.ws_connect(f"{url}/faces"), client.ws_connect(f"{url}/faces"):
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await client.ws_connect(f"{url}/faces")
        assert (refused.value.status, refused.value.headers["Retry-After"]) == (503, "1")
        assert (await health(client, url))["clients"] == 2
    async with client.ws_connect(f"{url}/faces"):  # those who left made room
        pass


async def test_a_watcher_that_does_not_read_is_cut_off_and_holds_up_nobody(
    start: Callable[..., Server], client: aiohttp.ClientSession, post: Callable[..., Awaitable[dict]]
) -> None:
    """It leaves unread more than the network takes for it: some hundred descriptions of a photo of 100 faces."""
    url = start("--max-megapixels", "60", "--keep", "1").url
    crowd = encode(".jpg", np.tile(cv2.resize(pixels()[20:220, 120:320], (100, 100)), (10, 10, 1)))
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        deaf.connect(("127.0.0.1", int(url.rpartition(":")[2])))
        handshake = "GET /faces?format=json HTTP/1.1\r\nHost: deaf\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        deaf.sendall(f"{handshake}Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {'A' * 22}==\r\n\r\n".encode())
        async with client.ws_connect(f"{url}/faces") as good:
            while (await health(client, url))["clients"] < 2:
                pass
            for _ in range(1000):
                assert (await post(crowd, url=url))["url"] == await good.receive_str(timeout=TIMEOUT)
                if (await health(client, url))["clients"] == 1:
                    break
            else:
                pytest.fail("it was not cut off")


# --- Pages of other sites ---


@pytest.mark.parametrize("path", ["/image", "/faces", "/health", "/"])
@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:1", "http://", "x", "http://[", ""]
)
async def test_a_page_of_another_site_gets_403(
    default: Server, client: aiohttp.ClientSession, path: str, origin: str
) -> None:
    method = "POST" if path == "/image" else "GET"
    async with client.request(method, default.url + path, data=b"x", headers={"Origin": origin}) as answer:
        assert (answer.status, "--allow-origin" in await problem(answer)) == (403, True)
        assert "Access-Control-Allow-Origin" not in answer.headers


async def test_a_watcher_from_another_site_gets_403(default: Server, client: aiohttp.ClientSession) -> None:
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await client.ws_connect(f"{default.url}/faces", origin="http://evil.example")
    assert refused.value.status == 403


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("faces.example.org", "http://faces.example.org"),
        ("faces.example.org", "https://faces.example.org"),  # a proxy took the TLS off
        ("Faces.Example.org:8282", "http://faces.example.org:8282"),
        ("faces.example.org:80", "http://faces.example.org"),
        ("[::1]:8282", "http://[::1]:8282"),
    ],
)
async def test_its_own_page_is_let_in(default: Server, client: aiohttp.ClientSession, host: str, origin: str) -> None:
    async with client.get(default.url, headers={"Host": host, "Origin": origin}) as answer:
        assert answer.status == 200


async def test_the_site_of_the_public_url_is_its_own(
    start: Callable[..., Server], client: aiohttp.ClientSession
) -> None:
    url = start("--public-url", "https://faces.example.org:444/app").url
    for origin, status in {"https://faces.example.org:444": 200, "https://faces.example.org": 403}.items():
        async with client.get(url, headers={"Origin": origin}) as answer:
            assert answer.status == status


@pytest.mark.parametrize("option", ["https://school.example", "https://school.example/", "*"])
async def test_an_allowed_site_gets_what_browsers_need(
    start: Callable[..., Server], client: aiohttp.ClientSession, option: str
) -> None:
    url, page = start("--allow-origin", "http://other.example", "--allow-origin", option).url, "https://school.example"
    preflight = {"Origin": page, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "prefer"}
    async with client.options(f"{url}/image", headers=preflight) as answer:
        assert answer.status == 204
        assert "POST" in answer.headers["Access-Control-Allow-Methods"]
        assert "Prefer" in answer.headers["Access-Control-Allow-Headers"]
        assert answer.headers["Access-Control-Allow-Origin"] == page
    for photo, status in {ASTRONAUT: 201, b"no photo": 415}.items():
        async with client.post(f"{url}/image", data=photo, headers={"Origin": page}) as answer:
            assert answer.status == status
            assert answer.headers["Access-Control-Allow-Origin"] == page
            assert answer.headers["Vary"] == "Origin"
            assert "Location" in answer.headers["Access-Control-Expose-Headers"]
    async with client.ws_connect(f"{url}/faces", origin=page):
        pass


@pytest.mark.parametrize("host", ["a b", "evil.example/path", "user@host", "host:port", "host:123456", "<script>", ""])
async def test_a_host_that_is_none_gets_400(default: Server, host: str) -> None:
    answer = await talk(default.port, f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"application/problem+json" in answer


# --- Limits and errors ---


PART = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n'
FORM_TYPE = {"Content-Type": "multipart/form-data; boundary=b"}


@pytest.mark.parametrize(
    ("body", "headers", "status", "words"),
    {
        "empty body": (b"", {}, 400, "empty"),
        "empty file": (PART + b"\r\n--b--\r\n", FORM_TYPE, 400, "empty"),
        "no file": (b"--b\r\nContent-Disposition: form-data; name=a\r\n\r\nx\r\n--b--\r\n", FORM_TYPE, 400, "no file"),
        "empty form": (b"--b--\r\n", FORM_TYPE, 400, "no file"),
        "no boundary": (b"--b--\r\n", {"Content-Type": "multipart/form-data"}, 400, "malformed"),
        "another boundary": (PART + b"x\r\n--c--\r\n", FORM_TYPE, 400, "malformed"),
        "no end": (PART + ASTRONAUT, FORM_TYPE, 400, "malformed"),
        "no form": (ASTRONAUT, FORM_TYPE, 400, "malformed"),
        "no end of the headers": (b"--b\r\nContent-Disposition: form-data\r\n--b--\r\n", FORM_TYPE, 400, "malformed"),
        "noise in the headers": (b"--b\r\n\0\xff noise\r\n\r\nx\r\n--b--\r\n", FORM_TYPE, 400, "malformed"),
        "encoded file": (
            PART.replace(b"\r\n\r\n", b"\r\nContent-Transfer-Encoding: x-uuencode\r\n\r\n") + b"x\r\n--b--\r\n",
            FORM_TYPE,
            400,
            "Content-Transfer-Encoding",
        ),
        "too many parts": (PART + b"x" + b"\r\n--b\r\n\r\nx" * 1001 + b"\r\n--b--\r\n", FORM_TYPE, 400, "1000 parts"),
        "no gzip": (ASTRONAUT, {"Content-Encoding": "gzip"}, 400, "malformed"),
        "text": (b"hello", {}, 415, "no JPEG, PNG, WebP or GIF"),
        "HTML": (b"<html>", {}, 415, "no JPEG, PNG, WebP or GIF"),
        "TIFF": (encode(".tiff"), {}, 415, "no JPEG, PNG, WebP or GIF"),
        "BMP": (encode(".bmp"), {}, 415, "no JPEG, PNG, WebP or GIF"),
        "JPEG 2000": (encode(".jp2"), {}, 415, "no JPEG, PNG, WebP or GIF"),
        "HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", {}, 415, "export it as JPEG"),
        "only a magic number": (b"\xff\xd8\xff", {}, 422, "ends within its header"),
        "truncated JPEG": (ASTRONAUT[:-1000], {}, 422, "damaged"),
        "truncated PNG": (FORMATS["PNG"][:-1000], {}, 422, "damaged"),
        "truncated WebP": (FORMATS["WebP"][:-1000], {}, 422, "damaged"),
        "truncated GIF": (FORMATS["GIF"][:-1000], {}, 422, "damaged"),
        "50.4 megapixels": (png(7200, 7000, 8, 0, bytes(7000 * 7201)), {}, 422, "the limit is 50 (--max-megapixels)"),
        "a JPEG that lies": (lying_jpeg(20_000, 20_000), {}, 422, "20000 x 20000 pixels, 400.0 megapixels"),
        "a PNG that lies": (png(2**31 - 1, 2**31 - 1, 8, 0, b""), {}, 422, "--max-megapixels"),
        "a side too long": (encode(".png", np.zeros((1, 65_501), np.uint8)), {}, 422, "65500 a side"),
    }.values(),
)
async def test_bad_input_is_refused_in_words(
    default: Server, client: aiohttp.ClientSession, body: bytes, headers: dict[str, str], status: int, words: str
) -> None:
    async with client.post(f"{default.url}/image", data=io.BytesIO(body), headers=headers) as answer:
        detail = await problem(answer)
        assert (answer.status, words in detail) == (status, True), detail


def test_a_lying_header_takes_no_memory() -> None:
    """Run apart, since the peak is that of a process."""
    script = """
import resource, sys, server
photo = sys.stdin.buffer.read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    server.annotate(photo)
except server.BadPhoto:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    photo = lying_jpeg(28_000, 27_000)
    done = subprocess.run([sys.executable, "-c", script], input=photo, capture_output=True, timeout=TIMEOUT, cwd=ROOT)
    assert int(done.stdout) < 10_000  # KiB; it claims 2.3 GB


async def test_megapixels_have_an_option(start: Callable[..., Server], client: aiohttp.ClientSession) -> None:
    url = start("--max-megapixels", "1").url
    assert [await posted(client, url, large(*size)) for size in [(1000, 1000), (1001, 1000)]] == [201, 422]


def chunked(body: bytes) -> bytes:
    pieces = [body[at : at + 2**16] for at in range(0, len(body), 2**16)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


OVER = bytes(2**21)


@pytest.mark.parametrize(
    ("headers", "body"),
    {
        "length": (b"Content-Length: %d" % len(OVER), OVER),
        "chunked": (b"Transfer-Encoding: chunked", chunked(OVER)),
        "form": (b"Content-Type: multipart/form-data; boundary=b\r\nTransfer-Encoding: chunked", chunked(PART + OVER)),
        "preamble": (b"Content-Type: multipart/form-data; boundary=b\r\nTransfer-Encoding: chunked", chunked(OVER)),
        "gzip": (b"Content-Encoding: gzip\r\nContent-Length: %d" % len(gzip.compress(OVER)), gzip.compress(OVER)),
    }.values(),
    ids=["length", "chunked", "form", "preamble", "gzip"],
)
async def test_a_body_over_the_limit_gets_413(one_megabyte: Server, headers: bytes, body: bytes) -> None:
    request = b"POST /image HTTP/1.1\r\nHost: a\r\nConnection: close\r\n" + headers + b"\r\n\r\n" + body
    answer = await talk(one_megabyte.port, request)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"The body is over 1 MiB (--max-mb)." in answer


async def test_an_upload_that_takes_too_long_gets_408(start: Callable[..., Server]) -> None:
    port = start("--upload-timeout", "1").port
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    async with asyncio.timeout(TIMEOUT):
        writer.write(b"POST /image HTTP/1.1\r\nHost: slow\r\nContent-Length: 100\r\n\r\nx")
        answer = await reader.readuntil(b"}\n")
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"over 1 s (--upload-timeout)" in answer
    writer.close()
    await writer.wait_closed()


async def test_more_photos_than_may_wait_get_503(start: Callable[..., Server], client: aiohttp.ClientSession) -> None:
    url, photo, answers = start("--queue", "1").url, large(4000, 3000), []

    async def flood() -> None:
        async with client.post(f"{url}/image", data=io.BytesIO(photo)) as answer:
            answers.append(answer.status)
            if answer.status != 201:
                assert answer.headers["Retry-After"] == "1"
                assert "--queue" in await problem(answer)

    async with asyncio.TaskGroup() as group:
        for _ in range(5 * server.usable_cpus()):
            group.create_task(flood())
    assert set(answers) == {201, 503}
    assert answers.count(201) >= 2 * server.usable_cpus()
    assert await posted(client, url) == 201


async def test_the_unforeseen_is_logged_and_answered_with_500(
    aiohttp_client: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def annotate(photo: bytes, *_: object) -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr(server, "annotate", annotate)
    client = await aiohttp_client(server.create_app(server.Config()))
    async with client.post("/image", data=ASTRONAUT) as answer:
        text = await answer.text()
        assert (answer.status, bool(await problem(answer))) == (500, True)
    assert "a secret" in caplog.text
    assert "secret" not in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", "/nothing", 404, None),
        ("GET", "/image/../server.py", 404, None),
        ("GET", "/image", 405, {"POST", "PUT"}),
        ("DELETE", "/image/x", 405, {"GET", "HEAD"}),
        ("POST", "/faces", 405, {"GET"}),
        ("OPTIONS", "/image", 405, {"POST", "PUT"}),
    ],
)
async def test_what_is_not_there_is_a_problem_too(
    default: Server, client: aiohttp.ClientSession, method: str, path: str, status: int, allow: set[str] | None
) -> None:
    async with client.request(method, yarl.URL(default.url + path, encoded=True)) as answer:
        assert (answer.status, bool(await problem(answer))) == (status, True)
        assert allow is None or set(answer.headers["Allow"].split(",")) == allow


@pytest.mark.parametrize(
    "request_",
    [b"GARBAGE\r\n\r\n", b"GET / HTTP/1.1\r\nno colon\r\n\r\n", b"GET /%s HTTP/1.1\r\n\r\n" % (b"x" * 10_000)],
)
async def test_what_is_not_http_is_a_problem_too(default: Server, request_: bytes) -> None:
    head, _, body = (await talk(default.port, request_)).partition(b"\r\n\r\n")
    assert re.match(rb"HTTP/1.[01] 400 Bad Request\r\n", head)
    assert b"Content-Type: application/problem+json" in head
    assert json.loads(body)["status"] == 400


# --- What it says of itself ---


async def test_the_index_tells_curl_what_to_do(default: Server, client: aiohttp.ClientSession) -> None:
    async with client.get(default.url, headers={"Host": "192.168.1.5:8282"}) as answer:
        text = await answer.text()
    assert (answer.status, answer.content_type) == (200, "text/plain")
    assert "python server.py" in text
    assert "wscat -c ws://192.168.1.5:8282/faces" in text
    assert "curl -F image=@samples/astronaut.jpg http://192.168.1.5:8282/image" in text


async def test_health_counts(start: Callable[..., Server], client: aiohttp.ClientSession) -> None:
    url = start().url
    assert await health(client, url) == {"status": "ok", "clients": 0, "images": 0, "bytes": 0, "queued": 0}
    async with client.ws_connect(f"{url}/faces"):
        assert await posted(client, url) == 201
        jpeg = len(server.annotate(ASTRONAUT).jpeg)
        assert await health(client, url) == {"status": "ok", "clients": 1, "images": 1, "bytes": jpeg, "queued": 0}


async def test_each_photo_gets_one_line_in_the_log(start: Callable[..., Server], client: aiohttp.ClientSession) -> None:
    fresh = start()
    body = PART.replace(b"a.jpg", b"a\x1b[31mb.jpg") + ASTRONAUT + b"\r\n--b--\r\n"
    async with client.ws_connect(f"{fresh.url}/faces"):
        assert await posted(client, fresh.url, body, **FORM_TYPE) == 201
    (line,) = fresh.log.read_text().splitlines()
    assert re.search(r"'a\\x1b\[31mb\.jpg': 512 x 512 px, 1 faces, \d+ ms, 1 watchers$", line)


async def test_a_bad_photo_gets_one_line_too(start: Callable[..., Server], client: aiohttp.ClientSession) -> None:
    fresh = start()
    assert await posted(client, fresh.url, FORMATS["GIF"][:-1000]) == 422
    (line,) = fresh.log.read_text().splitlines()
    assert line.endswith("None: 422 The photo is damaged or cut short.")


# --- Stopping ---


@pytest.mark.skipif(ON_WINDOWS, reason="Windows has no SIGTERM to catch")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_what_was_accepted_is_answered_and_announced_before_the_end(
    start: Callable[..., Server], client: aiohttp.ClientSession, number: signal.Signals
) -> None:
    stopping, photo, count = start(), large(4000, 3000), 2
    async with client.ws_connect(f"{stopping.url}/faces") as watcher, asyncio.TaskGroup() as group:
        posts = [group.create_task(posted(client, stopping.url, photo)) for _ in range(count)]
        posts += [group.create_task(posted(client, stopping.url, photo, Prefer="respond-async")) for _ in range(count)]
        while (said := await health(client, stopping.url))["queued"] + said["images"] < len(posts):
            pass
        stopping.process.send_signal(number)
        sent = time.monotonic()
        while (said := await health(client, stopping.url))["status"] == "ok":
            pass
        assert said["status"] == "stopping"
        assert await posted(client, stopping.url) == 503
        for _ in posts:
            assert re.fullmatch(f"{stopping.url}/image/[0-9a-f-]+", await watcher.receive_str(timeout=TIMEOUT))
        closed = await watcher.receive(TIMEOUT)
        assert (closed.type, closed.data) == (aiohttp.WSMsgType.CLOSE, 1001)
    assert [post.result() for post in posts] == [201] * count + [202] * count
    assert await asyncio.to_thread(stopping.process.wait, TIMEOUT) == 0
    assert time.monotonic() - sent < 8


@pytest.mark.skipif(ON_WINDOWS, reason="Windows has no SIGTERM to catch")
async def test_a_deaf_watcher_and_a_slow_upload_do_not_delay_the_end(start: Callable[..., Server]) -> None:
    stopping = start()
    handshake = b"GET /faces HTTP/1.1\r\nHost: deaf\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    handshake += b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    upload = b"POST /image HTTP/1.1\r\nHost: slow\r\nContent-Length: 100\r\n\r\nx"
    with (
        socket.create_connection(("127.0.0.1", stopping.port)) as deaf,
        socket.create_connection(("127.0.0.1", stopping.port)) as slow,
    ):
        deaf.sendall(handshake)
        assert deaf.recv(100).startswith(b"HTTP/1.1 101 ")
        slow.sendall(upload)
        start_ = time.monotonic()
        assert await asyncio.to_thread(stopping.stop) == 0
        assert time.monotonic() - start_ < 8
