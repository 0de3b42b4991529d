"""What server.py promises, by example, in the order in which its users meet it.

pip install -r requirements.txt && pytest test_server.py
"""

import asyncio
import io
import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from aiohttp import ClientTimeout, FormData, web

import server
from server import cv2, np  # server.py has set OpenCV's limits

ROOT = Path(__file__).parent
ASTRONAUT = (ROOT / "samples/astronaut.jpg").read_bytes()  # 512 x 512 pixels
FACE = (178, 67, 92, 92)  # where her face is: x, y, width, height
DETECTOR = server.load_detector()
TIMEOUT = 20  # s, for every wait


@pytest.fixture
def start(aiohttp_client):
    """Starts a server with these settings, and returns a client of it."""

    async def start(detector=DETECTOR, mounted=False, **settings):
        app = server.create_app(server.Config(**settings), detector)
        if mounted:
            outer = web.Application()
            outer.add_subapp("/faces/", app)
            app = outer
        return await aiohttp_client(app, timeout=ClientTimeout(TIMEOUT))

    return start


@pytest.fixture
async def client(start):
    return await start()


def decode(photo=ASTRONAUT):
    return cv2.imdecode(np.frombuffer(photo, np.uint8), cv2.IMREAD_COLOR)


def encode(pixels, extension=".jpg"):
    return cv2.imencode(extension, pixels)[1].tobytes()


async def post(client, photo=ASTRONAUT, path="/image", **headers):
    """Post a photo as curl --data-binary does, and return the JSON of the answer."""
    answer = await client.post(path, data=io.BytesIO(photo), headers=headers)
    assert answer.ok, await answer.text()
    return await answer.json()


async def get(client, meta, suffix=""):
    """Get an image by the JSON of its post."""
    return await client.get(f"/image/{meta['id']}{suffix}")


async def get_json(client, path):
    return await (await client.get(path)).json()


async def ids(client):
    """Return the ids of the images that are kept, the newest first."""
    return [image["id"] for image in await get_json(client, "/image")]


async def refused(answer, status):
    """Return the words of an error, which must be a problem document (RFC 9457)."""
    problem = await answer.json(content_type="application/problem+json")
    assert problem == {"title": answer.reason, "status": status, "detail": problem["detail"]}
    assert (answer.status, await answer.text()) == (status, json.dumps(problem, indent=2) + "\n")
    return problem["detail"]


# --- Post a photo ---
async def test_a_photo_is_answered_with_its_faces_and_its_url(client):
    form = FormData(quote_fields=False)
    form.add_field("any name", io.BytesIO(ASTRONAUT), filename="Žofie 1.jpg")
    form.add_field("comment", "this is no file")
    answer = await client.post("/image", data=form)
    meta = await answer.json()
    assert (answer.status, await answer.text()) == (201, json.dumps(meta, indent=2) + "\n")
    assert meta.keys() == {"id", "url", "width", "height", "faces", "filename", "took_ms"}
    assert (meta["width"], meta["height"], meta["filename"]) == (512, 512, "Žofie 1.jpg")
    assert meta["url"] == answer.headers["Location"] == f"{client.make_url('/image/')}{meta['id']}"
    ((*box, _score),) = [face.values() for face in meta["faces"]]
    assert box == pytest.approx(FACE, abs=25)


@pytest.mark.parametrize("kind", ["image/jpeg", "text/plain", "application/x-www-form-urlencoded"])
async def test_a_body_that_is_no_form_is_the_photo_whatever_its_type(client, kind):
    for send in (client.post, client.put):
        answer = await send("/image", data=ASTRONAUT, headers={"Content-Type": kind})
        assert len((await answer.json())["faces"]) == 1


async def test_a_photo_without_faces_is_no_error(client):
    assert (await post(client, encode(np.zeros((300, 400, 3), np.uint8))))["faces"] == []


# --- Get the image ---
async def test_the_url_opens_as_the_photo_with_a_green_box(client):
    meta = await post(client, encode(cv2.resize(decode(), (1500, 1500))))
    answer = await get(client, meta)
    assert (answer.status, answer.content_type) == (200, "image/jpeg")
    assert "immutable" in answer.headers["Cache-Control"]
    pixels, (x, y, width, height, _) = decode(await answer.read()), meta["faces"][0].values()
    assert pixels.shape == (1500, 1500, 3)
    for point in [(y, x + width // 2), (y + height // 2, x), (y + height // 2, x + width)]:
        blue, green, red = pixels[point]
        assert green > 180 > 100 > max(blue, red)


@pytest.mark.parametrize("extension", [".png", ".webp", ".gif"])
async def test_png_webp_and_gif_come_out_as_jpegs(client, extension):
    meta = await post(client, encode(decode(), extension))
    assert len(meta["faces"]) == 1
    assert (await (await get(client, meta)).read()).startswith(b"\xff\xd8")


async def test_a_photo_comes_out_upright_and_without_metadata(client):
    lying = cv2.rotate(decode()[:, :340], cv2.ROTATE_90_COUNTERCLOCKWISE)
    exif = b"MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0my home"
    kinds, data = [cv2.IMAGE_METADATA_EXIF], [np.frombuffer(exif, np.uint8)]
    photo = cv2.imencodeWithMetadata(".jpg", lying, kinds, data)[1].tobytes()
    meta = await post(client, photo)
    assert (meta["width"], meta["height"], len(meta["faces"])) == (340, 512, 1)
    assert b"my home" in photo
    assert b"my home" not in await (await get(client, meta)).read()


async def test_the_json_is_kept_too(client):
    meta = await post(client)
    assert await (await get(client, meta, "/meta")).json() == meta


async def test_the_list_has_a_line_for_each_image_with_the_newest_first(client):
    metas = [await post(client) for _ in range(3)]
    assert await ids(client) == [meta["id"] for meta in reversed(metas)]
    line = (await (await client.get("/image")).text()).splitlines()[1].rstrip(",")
    faces = metas[-1].pop("faces")  # in a crowd they are long; /image/{id}/meta has them
    assert json.loads(line) == metas[-1] | {"face_count": len(faces)}


async def test_the_image_that_was_not_used_for_longest_goes_first(start):
    client = await start(keep=2)
    first, second = await post(client), await post(client)
    await get(client, first)
    third = await post(client)
    answers = [await get(client, meta) for meta in (first, second, third)]
    assert [answer.status for answer in answers] == [200, 404, 200]
    assert "--keep" in await refused(answers[1], 404)


async def test_an_image_that_is_larger_than_the_room_is_kept_until_the_next(start):
    client = await start(keep_mb=0)
    assert (await get(client, await post(client))).status == 200
    second = await post(client)
    assert await ids(client) == [second["id"]]


# --- Watch ---
async def test_every_watcher_gets_the_url_of_each_image(client):
    watchers = [await client.ws_connect("/faces") for _ in range(3)]
    urls = [(await post(client))["url"] for _ in range(2)]
    for watcher in watchers:
        assert [await watcher.receive_str(timeout=TIMEOUT) for _ in urls] == urls


async def test_a_watcher_can_get_the_json_instead(client):
    watcher = await client.ws_connect("/faces?format=json")
    assert await post(client) == await watcher.receive_json(timeout=TIMEOUT)


async def test_everybody_gets_the_address_that_they_use_themselves(client):
    hosts = ["192.168.1.5", "laptop:8282", "[fe80::1]:80"]
    watchers = {host: await client.ws_connect("/faces", headers={"Host": host}) for host in hosts}
    meta = await post(client, Host="localhost", **{"X-Forwarded-Host": "evil.test"})
    assert meta["url"] == f"http://localhost/image/{meta['id']}"
    for host, watcher in watchers.items():
        assert await watcher.receive_str(timeout=TIMEOUT) == f"http://{host}/image/{meta['id']}"


async def test_behind_a_proxy_everybody_gets_the_public_url(start):
    client = await start(public_url="https://faces.test/app/")
    watcher = await client.ws_connect("/faces")
    meta = await post(client)
    assert meta["url"] == f"https://faces.test/app/image/{meta['id']}"
    assert await watcher.receive_str(timeout=TIMEOUT) == meta["url"]


# --- Keep nothing ---
async def test_detect_finds_the_faces_and_keeps_nothing(client):
    watcher = await client.ws_connect("/faces")
    found, meta = await post(client, path="/detect"), await post(client)
    assert found["faces"] == meta["faces"]
    assert await watcher.receive_str(timeout=TIMEOUT) == meta["url"]
    assert await ids(client) == [meta["id"]]


# --- What it refuses, in words ---
PART = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a\x1b.jpg"\r\n\r\n'
FORM, FIELDS = "multipart/form-data; boundary=b", "application/x-www-form-urlencoded"
SIZE = ASTRONAUT.index(b"\xff\xc0") + 5  # where a JPEG tells it
HUGE = ASTRONAUT[:SIZE] + bytes([78, 32, 78, 32]) + ASTRONAUT[SIZE + 4 :]  # 20,000 x 20,000
REFUSED = {
    "nothing": (b"", "image/jpeg", 400, "no photo"),
    "what curl -d makes of a file": (b"\xff\xd8\xff", FIELDS, 400, "--data-binary"),
    "a form without a file": (b"--b\r\n\r\n\r\nno file\r\n--b--\r\n", FORM, 400, "one file"),
    "a form with two files": (2 * (PART + b"x\r\n") + b"--b--\r\n", FORM, 400, "one file"),
    "a form cut short": (PART + ASTRONAUT, FORM, 400, "complete"),
    "a form of another boundary": (b"--c--\r\n", FORM, 400, "complete"),
    "a TIFF": (encode(decode(), ".tiff"), "image/jpeg", 415, "not a JPEG, PNG, WebP or GIF"),
    "a photo of an iPhone": (b"\0\0\0\x18ftypheic", "image/heic", 415, "Most Compatible"),
    "half a photo": (ASTRONAUT[:9000], "image/jpeg", 422, "damaged"),
    "400 megapixels": (HUGE, "image/jpeg", 422, "OPENCV_IO_MAX_IMAGE_PIXELS"),
}


@pytest.mark.parametrize("what", REFUSED)
async def test_what_is_no_photo_is_refused(client, what):
    body, kind, status, words = REFUSED[what]
    answer = await client.post("/image", data=io.BytesIO(body), headers={"Content-Type": kind})
    assert words in await refused(answer, status)


async def test_a_body_over_the_limit_is_refused(start):
    client = await start(mounted=True, max_mb=3)  # in an application that takes 1 MiB
    for size, status in {3 * 2**20: 415, 3 * 2**20 + 1: 413}.items():
        answer = await client.post("/faces/image", data=io.BytesIO(bytes(size)))
        assert answer.status == status
    assert "--max-mb" in await answer.text()


async def test_an_upload_that_takes_too_long_is_refused(start):
    async def slow():
        yield b"x"
        await asyncio.sleep(TIMEOUT)

    answer = await (await start(upload_timeout=1)).post("/image", data=slow())
    assert "--upload-timeout" in await refused(answer, 408)


async def test_photos_wait_for_a_thread_but_not_too_many(start):
    go_on = threading.Event()
    client = await start(lambda pixels: go_on.wait(TIMEOUT) and [], threads=1, queue=1)
    posts = [asyncio.create_task(client.post("/image", data=ASTRONAUT)) for _ in range(3)]
    done, _ = await asyncio.wait(posts, timeout=TIMEOUT, return_when=asyncio.FIRST_COMPLETED)
    (refusal,) = [post.result() for post in done]
    assert (await get_json(client, "/health"))["queued"] == 2
    go_on.set()
    assert "--queue" in await refused(refusal, 503)
    assert refusal.headers["Retry-After"] == "1"
    assert sorted([(await post).status for post in posts]) == [201, 201, 503]


async def test_what_is_not_there_is_said(client):
    for path, words in {"/nothing": "GET /nothing", "/image/x": "--keep"}.items():
        assert words in await refused(await client.get(path), 404)
    assert "wscat" in await refused(await client.get("/faces"), 426)


async def test_each_photo_and_each_refusal_is_one_line_in_the_log(client, caplog):
    caplog.set_level("INFO", "faces")
    await post(client, PART + ASTRONAUT + b"\r\n--b--", **{"Content-Type": FORM})
    await client.post("/image", data=b"text")
    photo, refusal = caplog.messages
    assert re.fullmatch(r"'a\\x1b\.jpg': 1 faces in \d+ ms", photo)
    assert refusal.startswith("127.0.0.1 POST '/image': 415 This is not a JPEG")


# --- Pages of other sites ---
@pytest.mark.parametrize("origin", ["http://evil.test", "http://127.0.0.1:1", "null"])
async def test_a_page_of_another_site_is_refused(client, origin):
    for method, path in [("POST", "/image"), ("GET", "/faces"), ("GET", "/image")]:
        answer = await client.request(method, path, headers={"Origin": origin})
        assert "--allow-origin" in await refused(answer, 403)


@pytest.mark.parametrize("host, status", [("laptop:8282", 200), ("[::1]", 200), ("evil.test", 403)])
async def test_its_own_page_is_let_in_but_not_by_a_name_that_anybody_can_make(client, host, status):
    for scheme in ("http", "https"):  # a proxy takes the TLS off
        answer = await client.get("/image", headers={"Host": host, "Origin": f"{scheme}://{host}"})
        assert answer.status == status


@pytest.mark.parametrize("allowed", ["https://school.test", "*"])
async def test_a_page_that_was_allowed_gets_what_browsers_ask_for(start, allowed):
    client = await start(allow_origin=("https://other.test", allowed))
    page = {"Origin": "https://school.test"}
    asked = await client.options("/image", headers={"Access-Control-Request-Method": "POST"} | page)
    posted = await client.post("/image", data=b"text", headers=page)
    assert (asked.ok, posted.status) == (True, 415)
    for answer in (asked, posted):
        assert answer.headers["Access-Control-Allow-Origin"] in ("*", page["Origin"])


# --- As a part of another application ---
async def test_mounted_elsewhere_all_urls_have_its_path(start):
    client = await start(mounted=True)
    watcher = await client.ws_connect("/faces/faces")
    meta = await post(client, path="/faces/image")
    assert meta["url"] == f"{client.make_url('/faces/image/')}{meta['id']}"
    assert await watcher.receive_str(timeout=TIMEOUT) == meta["url"]
    (listed,) = await get_json(client, "/faces/image")
    assert listed["url"] == meta["url"]
    assert str(client.make_url("/faces/image")) in await (await client.get("/faces/")).text()
    for path in (f"/faces/image/{meta['id']}", "/faces/", "/faces/docs", "/faces/openapi.json"):
        assert (await client.get(path, headers={"Accept": "text/html"})).status == 200


async def test_a_login_keeps_its_headers_and_a_redirect_its_location(aiohttp_client):
    @web.middleware
    async def login(request, handler):
        if "Authorization" not in request.headers:
            raise web.HTTPUnauthorized(headers={"WWW-Authenticate": "Basic"})
        raise web.HTTPFound("/health")

    app = server.create_app()  # with the default settings
    app.middlewares.append(login)
    client = await aiohttp_client(app)
    answer = await client.get("/")
    assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Basic")
    answer = await client.get("/", headers={"Authorization": "Basic"}, allow_redirects=False)
    assert (answer.status, answer.headers["Location"]) == (302, "/health")
    assert await answer.text() == "302: Found"


async def test_a_detector_of_ones_own_can_be_used(start):
    client = await start(lambda pixels: [server.Face(1, 2, 3, 4, 0.5)])
    assert [*(await post(client))["faces"][0].values()] == [1, 2, 3, 4, 0.5]


# --- What it says of itself ---
async def test_the_first_page_is_for_browsers_and_a_text_for_curl(client):
    page = await client.get("/", headers={"Accept": "text/html"})
    text = await (await client.get("/")).text()
    assert page.content_type == "text/html"
    assert f"curl -F image=@samples/astronaut.jpg http://127.0.0.1:{client.port}/image" in text
    assert f"wscat -c ws://127.0.0.1:{client.port}/faces" in text


async def test_health_counts(client):
    await client.ws_connect("/faces")
    photo = await post(client)
    answers = [await get(client, photo, suffix) for suffix in ("", "?width=480")]
    size = sum([len(await answer.read()) for answer in answers])
    health = {"status": "ok", "clients": 1, "images": 1, "bytes": size, "queued": 0}
    page = {"join": f"http://127.0.0.1:{client.port}/", "upload_timeout": 40}
    assert await get_json(client, "/health") == health | page


# --- The start ---
def run(*command, folder=ROOT):
    command = [sys.executable, *command]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT)


def test_help_shows_each_option_with_its_default():
    help = " ".join(run("server.py", "--help").stdout.split())
    for field, value in vars(server.Config()).items():
        option, default = "--" + field.replace("_", "-"), re.escape(f"{value})" if value else "")
        assert re.search(rf"{option} ((?!--).)*default: {default}", help), option


def test_a_bad_model_ends_the_start_with_one_line():
    done = run("server.py", "--model", "no.onnx")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "no.onnx" in done.stderr


def test_server_py_alone_in_a_folder_finds_faces(tmp_path):
    shutil.copy(ROOT / "server.py", tmp_path)
    (tmp_path / "photo.jpg").write_bytes(ASTRONAUT)
    detect = "server.annotate(open('photo.jpg', 'rb').read(), server.load_detector())"
    done = run("-c", f"import server; print(len({detect}[1]['faces']))", folder=tmp_path)
    assert done.stdout == "1\n", done.stderr


def test_the_cascade_is_the_one_of_opencv():
    name = "haarcascade_frontalface_default.xml"
    assert (ROOT / name).read_bytes() == Path(cv2.data.haarcascades, name).read_bytes()


def test_the_script_metadata_is_what_requirements_txt_pins():
    dependencies = re.search(r"# dependencies = (\[.*])", (ROOT / "server.py").read_text())[1]
    pinned = re.findall(r"^[a-z-]+==[0-9.]+", (ROOT / "requirements.txt").read_text(), re.M)
    assert [*json.loads(dependencies), "pytest-aiohttp==1.1.1"] == pinned
