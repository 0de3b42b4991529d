"""What server.py promises, by example, in the order in which its users meet it.

pip install -r requirements.txt && pytest test_server.py
"""

import asyncio
import hashlib
import json
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from aiohttp import ClientTimeout, FormData, WSMsgType, web

import server
from server import cv2, np  # server.py has set OpenCV's limits

ROOT = Path(__file__).parent
ASTRONAUT = (ROOT / "samples/astronaut.jpg").read_bytes()  # 512 x 512 pixels, one face
FACE = (178, 67, 92, 92)  # x, y, width, height
YUNET = ROOT / "models/face_detection_yunet_2023mar.onnx"
DETECTOR = server.load_detector()
TIMEOUT = 20  # s, for every wait
LATER = {"Prefer": "respond-async"}


@pytest.fixture
def start(aiohttp_client):
    """Starts a server with these settings; returns a client of it."""

    async def start(detector=DETECTOR, **settings):
        app = server.create_app(server.Config(**settings), detector)
        return await aiohttp_client(app, timeout=ClientTimeout(TIMEOUT))

    return start


@pytest.fixture
async def client(start):
    return await start()


def decode(photo=ASTRONAUT):
    return cv2.imdecode(np.frombuffer(photo, np.uint8), cv2.IMREAD_COLOR)


def encode(pixels, extension=".jpg"):
    return cv2.imencode(extension, pixels)[1].tobytes()


def form(photo=ASTRONAUT, name="astronaut.jpg"):
    form = FormData(quote_fields=False)
    form.add_field("image", photo, filename=name)
    return form


async def post(client, photo=ASTRONAUT, path="/image", **headers):
    """Post a photo as curl --data-binary does; return the JSON of the answer."""
    answer = await client.post(path, data=photo, headers=headers)
    assert answer.ok, await answer.text()
    return await answer.json()


async def get(client, path, **headers):
    answer = await client.get(path, headers=headers)
    return answer.status, await answer.json()


async def detail(answer):
    """Return the words of an error, which must be a problem document (RFC 9457)."""
    problem = await answer.json(content_type="application/problem+json")
    assert problem.keys() == {"title", "status", "detail"}
    assert problem["status"] == answer.status
    return problem["detail"]


def path_of(meta):
    return f"/image/{meta['id']}"


def overlap(face, other=FACE):
    """Return intersection over union of two boxes."""
    boxes = [(x, y, x + width, y + height) for x, y, width, height, *_ in (face, other)]
    left, top, right, bottom = (*np.max(boxes, 0)[:2], *np.min(boxes, 0)[2:])
    common = max(0, right - left) * max(0, bottom - top)
    return common / (face[2] * face[3] + other[2] * other[3] - common)


# --- Post a photo ---
async def test_a_photo_is_answered_with_its_faces_and_its_url(client):
    answer = await client.post("/image", data=form())
    text = await answer.text()
    meta = json.loads(text)
    assert answer.status == 201
    assert text == json.dumps(meta, indent=2) + "\n"
    assert list(meta) == ["id", "url", "width", "height", "faces", "filename", "took_ms"]
    assert meta["url"] == answer.headers["Location"] == str(client.make_url(path_of(meta)))
    assert (meta["width"], meta["height"], meta["filename"]) == (512, 512, "astronaut.jpg")
    (face,) = meta["faces"]
    assert list(face) == ["x", "y", "width", "height", "score"]
    assert overlap(list(face.values())) > 0.5


async def test_a_photo_without_faces_is_no_error(client):
    assert (await post(client, encode(np.zeros((300, 400, 3), np.uint8))))["faces"] == []


@pytest.mark.parametrize("kind", ["image/jpeg", "text/plain", "application/x-www-form-urlencoded"])
async def test_a_body_without_a_form_is_the_photo_whatever_its_type(client, kind):
    meta = await post(client, **{"Content-Type": kind})
    assert (len(meta["faces"]), meta["filename"]) == (1, None)


async def test_put_does_what_post_does(client):
    assert (await client.put("/image", data=ASTRONAUT)).status == 201


async def test_a_form_may_have_other_fields_and_the_file_any_name(client):
    data = form(name="Žofie 1; \\ .jpg")
    data.add_field("comment", "no file")
    data.add_field("camera", b"", filename="")  # a field in which nobody chose a file
    answer = await client.post("/image", data=data)
    assert (await answer.json())["filename"] == "Žofie 1; \\ .jpg"


# --- The faces ---
def faces_of(pixels):
    return DETECTOR(pixels)


def test_each_face_of_a_group_is_found():
    assert len(faces_of(np.tile(decode(), (2, 3, 1)))) == 6


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (4000, 3000)])
def test_a_stretched_face_is_found(size):
    (face,) = faces_of(cv2.resize(decode(), size))
    x, y = np.array(size) / 512
    assert overlap(face, np.multiply(FACE, (x, y, x, y))) > 0.5


@pytest.mark.parametrize("degrees", [-15, -10, -5, 5, 10, 15])
def test_a_turned_face_is_found(degrees):
    middle = (FACE[0] + FACE[2] / 2, FACE[1] + FACE[3] / 2)
    turn = cv2.getRotationMatrix2D(middle, degrees, 1)
    (face,) = faces_of(cv2.warpAffine(decode(), turn, (512, 512), borderMode=cv2.BORDER_REFLECT))
    assert overlap(face) > 0.5


@pytest.mark.parametrize("size", [(1, 1), (1, 9000), (9000, 1), (23, 23)])
def test_a_photo_too_small_for_a_face_has_none(size):
    assert faces_of(np.zeros((*size, 3), np.uint8)) == []


def test_a_higher_score_can_be_asked_for():
    score = faces_of(decode())[0].score
    assert server.load_detector(min_score=score)(decode())
    assert not server.load_detector(min_score=score + 1)(decode())


def test_many_threads_find_what_one_finds():
    photos = [encode(cv2.resize(decode(), (side, side))) for side in range(300, 700, 50)] * 2
    alone = [server.annotate(photo, DETECTOR) for photo in photos]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda photo: server.annotate(photo, DETECTOR), photos)) == alone


# --- Get the image ---
async def test_the_url_opens_as_the_photo_with_a_green_box(client):
    meta = await post(client)
    answer = await client.get(path_of(meta))
    assert (answer.status, answer.content_type) == (200, "image/jpeg")
    assert "immutable" in answer.headers["Cache-Control"]
    pixels, (x, y, width, height, _) = decode(await answer.read()), meta["faces"][0].values()
    assert pixels.shape == (512, 512, 3)
    for point in [(y, x + width // 2), (y + height // 2, x), (y + height // 2, x + width)]:
        blue, green, red = pixels[point]
        assert green > 180 > 100 > max(blue, red)


async def test_a_large_photo_keeps_its_full_size(client):
    meta = await post(client, encode(cv2.resize(decode(), (4000, 3000))))
    assert decode(await (await client.get(path_of(meta))).read()).shape == (3000, 4000, 3)


@pytest.mark.parametrize("extension", [".png", ".webp", ".gif"])
async def test_png_webp_and_gif_come_out_as_jpegs(client, extension):
    meta = await post(client, encode(decode(), extension))
    assert len(meta["faces"]) == 1
    assert (await (await client.get(path_of(meta))).read()).startswith(b"\xff\xd8")


async def test_a_photo_comes_out_upright_and_without_its_place(client):
    lying = cv2.rotate(decode()[:, :340], cv2.ROTATE_90_COUNTERCLOCKWISE)
    exif = b"MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0my home"
    data = np.frombuffer(exif, np.uint8)
    photo = cv2.imencodeWithMetadata(".jpg", lying, [cv2.IMAGE_METADATA_EXIF], [data])[1].tobytes()
    assert b"my home" in photo
    meta = await post(client, photo)
    assert (meta["width"], meta["height"], len(meta["faces"])) == (340, 512, 1)
    assert b"my home" not in await (await client.get(path_of(meta))).read()


async def test_its_meta_is_the_json_of_the_post(client):
    meta = await post(client)
    assert await get(client, path_of(meta) + "/meta") == (200, meta)


async def test_head_tells_the_size(client):
    meta = await post(client)
    size = len(await (await client.get(path_of(meta))).read())
    assert int((await client.head(path_of(meta))).headers["Content-Length"]) == size


async def test_the_list_has_the_newest_image_first(client):
    metas = [await post(client) for _ in range(3)]
    assert await get(client, "/image") == (200, metas[::-1])


async def test_the_image_that_was_not_used_for_longest_goes_first(start):
    client = await start(keep=2)
    first, second = await post(client), await post(client)
    await client.get(path_of(first))
    third = await post(client)
    answers = [await client.get(path_of(meta)) for meta in (first, second, third)]
    assert [answer.status for answer in answers] == [200, 404, 200]
    assert "--keep" in await detail(answers[1])


async def test_an_image_over_the_room_is_kept_until_the_next(start):
    client = await start(keep_mb=1)
    noise = np.random.default_rng(1).integers(0, 256, (1500, 1500, 3), np.uint8)
    large = await post(client, encode(noise))
    assert len(await (await client.get(path_of(large))).read()) > 2**20
    small = await post(client)
    assert await get(client, "/image") == (200, [small])


# --- Watch ---
async def test_every_watcher_gets_the_url_of_each_image(client):
    watchers = [await client.ws_connect("/faces") for _ in range(3)]
    urls = [(await post(client))["url"] for _ in range(2)]
    for watcher in watchers:
        assert [await watcher.receive_str(timeout=TIMEOUT) for _ in urls] == urls


async def test_a_watcher_can_get_the_json_instead(client):
    watcher = await client.ws_connect("/faces?format=json")
    meta = await post(client)
    assert await watcher.receive_json(timeout=TIMEOUT) == meta


async def test_everybody_gets_the_address_that_they_use_themselves(client):
    hosts = ["192.168.1.5", "laptop:8282", "[fe80::1]:80"]
    watchers = {host: await client.ws_connect("/faces", headers={"Host": host}) for host in hosts}
    meta = await post(client, Host="localhost", **{"X-Forwarded-Host": "evil.test"})
    assert meta["url"] == f"http://localhost{path_of(meta)}"
    for host, watcher in watchers.items():
        assert await watcher.receive_str(timeout=TIMEOUT) == f"http://{host}{path_of(meta)}"


async def test_behind_a_proxy_everybody_gets_its_address(start):
    client = await start(public_url="https://faces.test/app/")
    watcher = await client.ws_connect("/faces")
    meta = await post(client)
    assert meta["url"] == f"https://faces.test/app{path_of(meta)}"
    assert await watcher.receive_str(timeout=TIMEOUT) == meta["url"]
    assert "wss://faces.test/app/faces" in await (await client.get("/")).text()


async def test_what_a_watcher_says_is_ignored(client):
    watcher = await client.ws_connect("/faces")
    await watcher.send_str("x" * 1000)
    meta = await post(client)
    assert await watcher.receive_str(timeout=TIMEOUT) == meta["url"]


async def test_a_watcher_that_says_too_much_is_sent_away(client):
    watcher = await client.ws_connect("/faces")
    await watcher.send_str("x" * 2000)
    closed = await watcher.receive(timeout=TIMEOUT)
    assert (closed.type, closed.data) == (WSMsgType.CLOSE, 1009)


async def test_there_is_a_limit_of_watchers(start):
    client = await start(max_clients=1)
    await client.ws_connect("/faces")
    with pytest.raises(Exception, match="503"):
        await client.ws_connect("/faces")


async def test_a_browser_that_opens_the_websocket_is_told_how_to_watch(client):
    answer = await client.get("/faces")
    assert (answer.status, "wscat" in await detail(answer)) == (426, True)


async def test_at_the_stop_each_watcher_is_told(client):
    watcher = await client.ws_connect("/faces")
    receiving = asyncio.create_task(watcher.receive(timeout=TIMEOUT))
    await client.server.app.shutdown()
    assert (await receiving).data == 1001


# --- Answer later ---
async def test_a_photo_can_be_answered_at_once_and_its_url_waits(client):
    answer = await client.post("/image", data=ASTRONAUT, headers=LATER)
    promise = await answer.json()
    assert (answer.status, answer.headers["Preference-Applied"]) == (202, "respond-async")
    assert promise == {"id": promise["id"], "url": answer.headers["Location"]}
    assert (await client.get(path_of(promise))).content_type == "image/jpeg"
    _, meta = await get(client, path_of(promise) + "/meta")
    assert len(meta["faces"]) == 1


async def test_a_photo_that_is_answered_at_once_is_announced(client):
    watcher = await client.ws_connect("/faces")
    promise = await post(client, **LATER)
    assert await watcher.receive_str(timeout=TIMEOUT) == promise["url"]


@pytest.mark.parametrize("photo, status", [(b"no photo", 415), (ASTRONAUT[:9000], 422)])
async def test_the_url_of_a_bad_photo_gives_its_error(client, photo, status):
    promise = await post(client, photo, **LATER)
    for path in (path_of(promise), path_of(promise) + "/meta"):
        answer = await client.get(path)
        assert (answer.status, bool(await detail(answer))) == (status, True)


# --- Detect only ---
async def test_detect_finds_the_faces_and_keeps_nothing(client):
    watcher = await client.ws_connect("/faces")
    found = await post(client, path="/detect")
    meta = await post(client)
    assert await watcher.receive_str(timeout=TIMEOUT) == meta["url"]
    assert found == {key: meta[key] for key in ("width", "height", "faces")} | {
        "took_ms": found["took_ms"]
    }
    assert await get(client, "/image") == (200, [meta])


# --- What it refuses, in words ---
PART = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n'
FORM, FIELDS = "multipart/form-data; boundary=b", "application/x-www-form-urlencoded"
AT = ASTRONAUT.index(b"\xff\xc0") + 5  # where the size is
HUGE = ASTRONAUT[:AT] + b"\x4e\x20\x4e\x20" + ASTRONAUT[AT + 4 :]  # claims 20,000 x 20,000
REFUSED = {
    "nothing": (b"", "image/jpeg", 400, "no photo"),
    "what curl -d makes of a file": (b"\xff\xd8\xff", FIELDS, 400, "--data-binary"),
    "a form without a file": (b"--b\r\n\r\n\r\nno file\r\n--b--\r\n", FORM, 400, "one file"),
    "a form with two files": (2 * (PART + b"x\r\n") + b"--b--\r\n", FORM, 400, "one file"),
    "a form cut short": (PART + ASTRONAUT, FORM, 400, "complete"),
    "a form of another boundary": (b"--c--\r\n", FORM, 400, "complete"),
    "text": (b"hello", "text/plain", 415, "not a JPEG, PNG, WebP or GIF"),
    "a TIFF": (encode(decode(), ".tiff"), "image/jpeg", 415, "not a JPEG, PNG, WebP or GIF"),
    "a photo of an iPhone": (b"\0\0\0\x18ftypheic", "image/heic", 415, "Most Compatible"),
    "half a photo": (ASTRONAUT[:9000], "image/jpeg", 422, "damaged"),
    "400 megapixels": (HUGE, "image/jpeg", 422, "OPENCV_IO_MAX_IMAGE_PIXELS"),
}


@pytest.mark.parametrize("what", REFUSED)
async def test_what_is_no_photo_is_refused(client, what):
    body, kind, status, words = REFUSED[what]
    answer = await client.post("/image", data=body, headers={"Content-Type": kind})
    assert words in await detail(answer)
    assert answer.status == status


async def test_a_compressed_body_is_refused(client):
    answer = await client.post("/image", data=b"x", headers={"Content-Encoding": "gzip"})
    assert (answer.status, "Content-Encoding" in await detail(answer)) == (415, True)


async def test_a_body_over_the_limit_is_refused(start):
    answer = await (await start(max_mb=1)).post("/image", data=bytes(2**20 + 1))
    assert (answer.status, "--max-mb" in await detail(answer)) == (413, True)


async def test_an_upload_that_takes_too_long_is_refused(start):
    async def slow():
        yield b"x"
        await asyncio.sleep(TIMEOUT)

    answer = await (await start(upload_timeout=1)).post("/image", data=slow())
    assert (answer.status, "--upload-timeout" in await detail(answer)) == (408, True)


async def test_photos_wait_for_a_thread_but_not_too_many(start):
    go_on = threading.Event()
    client = await start(lambda pixels: go_on.wait(TIMEOUT) and [], threads=1, queue=1)
    working, waiting = await post(client, **LATER), await post(client, **LATER)
    refused = await client.post("/image", data=ASTRONAUT)
    assert (await get(client, "/health"))[1]["queued"] == 2
    go_on.set()
    assert (refused.status, refused.headers["Retry-After"]) == (503, "1")
    assert "--queue" in await detail(refused)
    assert [(await client.get(path_of(each))).status for each in (working, waiting)] == [200, 200]


@pytest.mark.parametrize("path, status", [("/nothing", 404), ("/image/nothing", 404)])
async def test_what_is_not_there_is_said(client, path, status):
    answer = await client.get(path)
    assert (answer.status, "There is no" in await detail(answer)) == (status, True)


async def test_what_cannot_be_done_is_said(client):
    answer = await client.delete("/image")
    assert (answer.status, bool(await detail(answer))) == (405, True)


async def test_each_photo_and_each_refusal_is_one_line_in_the_log(client, caplog):
    caplog.set_level("INFO", "faces")
    await client.post("/image", data=form(name="a\x1b[31m.jpg"))
    await client.post("/image", data=b"text")
    photo, refusal = caplog.messages
    assert re.fullmatch(r"'a\\x1b\[31m\.jpg': 1 faces in \d+ ms", photo)
    assert refusal.startswith("127.0.0.1 POST '/image': 415 This is not a JPEG")


# --- Pages of other sites ---
@pytest.mark.parametrize("origin", ["http://evil.test", "http://127.0.0.1:1", "null"])
@pytest.mark.parametrize("method, path", [("POST", "/image"), ("GET", "/faces"), ("GET", "/image")])
async def test_a_page_of_another_site_may_nothing(client, origin, method, path):
    answer = await client.request(method, path, headers={"Origin": origin}, data=b"")
    assert (answer.status, "--allow-origin" in await detail(answer)) == (403, True)


async def test_its_own_page_may_all(client):
    for scheme in ("http", "https"):  # a proxy takes the TLS off
        own = {"Host": "laptop:8282", "Origin": f"{scheme}://laptop:8282"}
        assert (await get(client, "/health", **own))[0] == 200


@pytest.mark.parametrize("allowed", ["https://school.test", "*"])
async def test_a_page_that_was_allowed_gets_what_browsers_ask_for(start, allowed):
    client = await start(allow_origin=("https://other.test", allowed))
    page = {"Origin": "https://school.test"}
    preflight = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "prefer",
    }
    asked = await client.options("/image", headers=page | preflight)
    posted = await client.post("/image", data=ASTRONAUT, headers=page)
    refused = await client.post("/image", data=b"text", headers=page)
    assert [asked.ok, posted.status, refused.status] == [True, 201, 415]
    for answer in (asked, posted, refused):
        assert answer.headers["Access-Control-Allow-Origin"] in ("*", page["Origin"])
    await client.ws_connect("/faces", origin=page["Origin"])


@pytest.mark.parametrize("host, status", [("localhost", 200), ("[::1]", 200), ("evil.test", 403)])
async def test_a_name_that_was_made_to_resolve_here_may_nothing(client, host, status):
    assert (await client.get("/health", headers={"Host": host})).status == status


# --- As a part of another application ---
async def test_mounted_elsewhere_all_urls_have_its_path(aiohttp_client):
    app = web.Application()
    app.add_subapp("/faces/", server.create_app())
    client = await aiohttp_client(app)
    watcher = await client.ws_connect("/faces/faces")
    meta = await post(client, path="/faces/image")
    assert meta["url"] == str(client.make_url(f"/faces/image/{meta['id']}"))
    assert await watcher.receive_str(timeout=TIMEOUT) == meta["url"]
    assert (await client.get(meta["url"])).content_type == "image/jpeg"
    assert await get(client, "/faces/image") == (200, [meta])
    for path in ("/faces/", "/faces/docs", "/faces/openapi.json"):
        assert (await client.get(path, headers={"Accept": "text/html"})).status == 200


async def test_mounted_elsewhere_its_limit_of_a_body_holds(aiohttp_client):
    app = web.Application()  # whose own limit is 1 MiB
    app.add_subapp("/faces/", server.create_app(server.Config(max_mb=3)))
    client = await aiohttp_client(app)
    for size, status in ((2, 415), (4, 413)):
        assert (await client.post("/faces/image", data=b"x" * size * 2**20)).status == status


async def test_a_login_in_front_keeps_its_headers(aiohttp_client):
    @web.middleware
    async def login(request, handler):
        raise web.HTTPUnauthorized(headers={"WWW-Authenticate": "Basic"})

    app = server.create_app()
    app.middlewares.append(login)
    answer = await (await aiohttp_client(app)).get("/")
    assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Basic")
    await detail(answer)


async def test_a_redirect_keeps_its_location(aiohttp_client):
    async def redirect(request):
        raise web.HTTPFound("/health")

    app = server.create_app()
    app.router.add_get("/old", redirect)
    answer = await (await aiohttp_client(app)).get("/old", allow_redirects=False)
    assert (answer.status, answer.headers["Location"]) == (302, "/health")


async def test_a_detector_of_ones_own_can_be_used(start):
    client = await start(lambda pixels: [server.Face(1, 2, 3, 4, 0.5)])
    face = {"x": 1, "y": 2, "width": 3, "height": 4, "score": 0.5}
    assert (await post(client))["faces"] == [face]


# --- What it says of itself ---
async def test_the_first_page_is_for_browsers_and_in_short_for_curl(client):
    page = await client.get("/", headers={"Accept": "text/html"})
    text = await (await client.get("/")).text()
    assert page.content_type == "text/html"
    assert f"curl -F image=@samples/astronaut.jpg http://127.0.0.1:{client.port}/image" in text
    assert f"wscat -c ws://127.0.0.1:{client.port}/faces" in text


async def test_health_counts(client):
    empty = {"status": "ok", "clients": 0, "images": 0, "bytes": 0, "queued": 0}
    assert await get(client, "/health") == (200, empty)
    await client.ws_connect("/faces")
    size = len(await (await client.get(path_of(await post(client)))).read())
    assert await get(client, "/health") == (200, empty | {"clients": 1, "images": 1, "bytes": size})


# --- YuNet ---
@pytest.fixture(scope="module")
def yunet():
    return server.load_detector(str(YUNET))


def test_its_file_is_the_one_of_opencv_zoo():
    known = "8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4"
    assert hashlib.sha256(YUNET.read_bytes()).hexdigest() == known


def test_yunet_finds_faces_in_many_threads(yunet):
    photos = [encode(decode(), extension) for extension in (".jpg", ".png", ".webp", ".gif")] * 4
    with ThreadPoolExecutor(4) as pool:
        for _, meta in pool.map(lambda photo: server.annotate(photo, yunet), photos):
            (face,) = meta["faces"]
            assert overlap(list(face.values())) > 0.5
            assert 0.7 <= face["score"] <= 1


@pytest.mark.parametrize("size", [(1, 1), (1, 9000), (9000, 1), (31, 33), (1500, 2000)])
def test_yunet_bears_photos_of_any_shape(yunet, size):
    """In a side of 32 px or less, OpenCV 4.14 has it see boxes of infinite size."""
    noise = np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8)
    for face in yunet(noise):
        assert 0 <= face.x <= face.x + face.width <= size[1]
        assert 0 <= face.y <= face.y + face.height <= size[0]


def test_yunet_finds_a_crowd(yunet):
    assert len(yunet(np.tile(decode()[20:220, 120:320], (6, 6, 1)))) == 36


# --- The start ---
def run(*command, folder=ROOT):
    command = [sys.executable, *command]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT)


def test_help_shows_each_option_with_its_default():
    help = " ".join(run("server.py", "--help").stdout.split())
    for field, value in vars(server.Config()).items():
        option = "--" + field.replace("_", "-")
        assert re.search(rf"{option} [^()]*\(default: {re.escape(str(value))}\)", help), option


@pytest.mark.parametrize(
    "name, content", [("no.onnx", None), ("a.onnx", b"junk"), ("no.xml", None), ("a.xml", b"junk")]
)
def test_a_file_that_is_no_model_is_an_error(tmp_path, name, content):
    if content:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((OSError, ValueError), match=name):
        server.load_detector(str(tmp_path / name))


def test_an_error_at_the_start_is_one_line():
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
    wheel = Path(cv2.data.haarcascades, server.CASCADE)
    assert (ROOT / server.CASCADE).read_bytes() == wheel.read_bytes()


def test_the_script_metadata_is_what_requirements_txt_pins():
    dependencies = re.search(r"# dependencies = (\[.*])", (ROOT / "server.py").read_text())[1]
    pinned = re.findall(r"^[a-z-]+==[0-9.]+", (ROOT / "requirements.txt").read_text(), re.M)
    assert [*json.loads(dependencies), "pytest-aiohttp==1.1.1"] == pinned
