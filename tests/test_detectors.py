"""What the detectors find, and what they bear."""

import base64
import hashlib
import itertools
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import photos
import pytest
from helpers import ROOT

import server
from server import cv2, np

YUNET = ROOT / "models/face_detection_yunet_2023mar.onnx"
PORTRAIT, FACE = photos.pixels(), (178, 67, 92, 92)  # x, y, width, height
DETECTORS = {"cascade": server.load_detector(), "YuNet": server.load_detector(str(YUNET))}
CROWD = np.tile(PORTRAIT[20:220, 120:320], (6, 6, 1))
RELU = base64.b64decode(  # another network (ONNX's ModelProto) of one layer
    "CAc6SwoMCgFhEgFiIgRSZWx1EgFnWhsKAWESFgoUCAESEAoCCAEKAggDCgIIQAoCCEBiGwoBYhIW"
    "ChQIARIQCgIIAQoCCAMKAghACgIIQEICEAs="
)
NOISE = np.random.default_rng(1).integers(0, 256, (1500, 2000, 3), np.uint8)


@pytest.fixture(params=DETECTORS)
def detector(request: pytest.FixtureRequest) -> server.Detector:
    return DETECTORS[request.param]


def overlap(face: server.Face, other: tuple[float, ...] = FACE) -> float:
    """Return the intersection over union of two boxes."""
    (x, y, width, height, _), (x2, y2, width2, height2) = face, other
    across = min(x + width, x2 + width2) - max(x, x2)
    common = max(0, across) * max(0, min(y + height, y2 + height2) - max(y, y2))
    return common / (width * height + width2 * height2 - common)


def turned(degrees: int) -> np.ndarray:
    """Return the portrait, turned around the middle of the face."""
    turn = cv2.getRotationMatrix2D((224, 113), degrees, 1)
    return cv2.warpAffine(PORTRAIT, turn, (512, 512), borderMode=cv2.BORDER_REFLECT)


def fake(close: int, scan: list[tuple[int, ...]]) -> SimpleNamespace:
    """Return a cascade that finds this many windows in each close view, and these in a scan."""
    return SimpleNamespace(
        getOriginalWindowSize=lambda: (20, 20),
        detectMultiScale=lambda image, *_: [()] * close if image.shape == (45, 45) else scan,
    )


def test_yunet_is_the_file_of_opencv_zoo() -> None:
    known = "8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4"
    assert hashlib.sha256(YUNET.read_bytes()).hexdigest() == known


@pytest.mark.parametrize("size", [(512, 512), (640, 480), (480, 640), (1280, 1024), (4000, 3000)])
def test_a_face_is_found_also_stretched(detector: server.Detector, size: tuple[int, int]) -> None:
    where = np.multiply(FACE, np.tile(size, 2) / 512)
    found = detector(cv2.resize(PORTRAIT, size))
    assert max((overlap(face, where) for face in found), default=0) > 0.5


def test_a_face_that_fills_a_thumbnail_is_found_in_it() -> None:
    """Enlarged to what the network sees of a photo, it is none."""
    x, y, side, _ = FACE
    assert DETECTORS["YuNet"](cv2.resize(PORTRAIT[y : y + side, x : x + side], (16, 16)))


@pytest.mark.parametrize("degrees", [-15, -10, -5, 5, 10, 15])
def test_a_face_is_found_also_turned(detector: server.Detector, degrees: int) -> None:
    assert max(map(overlap, detector(turned(degrees))), default=0) > 0.5


def test_a_face_is_found_also_mirrored_and_dark(detector: server.Detector) -> None:
    assert len(detector(np.ascontiguousarray(PORTRAIT[:, ::-1]))) == 1
    assert len(detector(PORTRAIT // 3)) == 1


def test_each_face_of_a_crowd_is_found(detector: server.Detector) -> None:
    assert len(detector(CROWD)) == 36


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1), (31, 33), (20, 640), (640, 20)])
def test_a_photo_of_any_shape_is_searched(detector: server.Detector, size: tuple[int, int]) -> None:
    """In a side of 32 px or less, OpenCV 4.14 has YuNet see boxes of infinite size."""
    for image in (NOISE.reshape(-1, 3)[: size[0] * size[1]].reshape(*size, 3), NOISE):
        for face in detector(image):
            assert 0 <= face.x < face.x + face.width <= image.shape[1]
            assert 0 <= face.y < face.y + face.height <= image.shape[0]


def test_in_a_narrow_photo_yunet_sees_nothing_of_infinite_size() -> None:
    """How narrow, depends on what the memory held before."""
    for height, width in itertools.product(range(4, 36, 4), (100, 300, 416, 640, 2000)):
        for face in DETECTORS["YuNet"](np.zeros((height, width, 3), np.uint8)):
            assert 0 <= face.x < face.x + face.width <= width
            assert 0 <= face.y < face.y + face.height <= height


@pytest.mark.parametrize("right, bottom", [(95, 110), (200, 102), (70, 472), (352, 79)])
def test_the_box_of_a_face_at_the_edge_ends_there(
    detector: server.Detector, right: int, bottom: int
) -> None:
    for image in (PORTRAIT[40:, 160:], PORTRAIT[40:, 100:]):
        for face in detector(image[:bottom, :right]):
            assert 0 <= face.x < face.x + face.width <= right
            assert 0 <= face.y < face.y + face.height <= bottom


def test_a_photo_full_of_proposals_is_searched_in_time() -> None:
    """To group all its 17,000 windows would take 289 times as long as to group 1,000."""
    windows = [(x, y, 20, 20) for x in range(0, 740, 4) for y in range(0, 740, 8)]
    detector, times = server.load_detector(), [time.thread_time()]
    for number in (1000, len(windows)):
        detector.cascade = fake(0, windows[:number])
        assert detector(np.zeros((1254, 1254, 3), np.uint8)) == []
        times.append(time.thread_time())
    assert times[2] - times[1] < 60 * (times[1] - times[0])


@pytest.mark.parametrize(("size", "degrees"), [(480, 20), (512, -16), (640, 20), (800, -16)])
def test_the_cascade_finds_a_head_that_leans_to_its_shoulder(size: int, degrees: int) -> None:
    assert len(DETECTORS["cascade"](cv2.resize(turned(degrees), (size, size)))) == 1


@pytest.mark.parametrize(
    ("first", "second", "faces"), [(6, 0, 1), (5, 0, 0), (5, 5, 0), (5, 6, 1), (4, 20, 0)]
)
def test_a_doubtful_face_needs_a_second_opinion(first: int, second: int, faces: int) -> None:
    """Windows in one view; its mirror image has as many. 5 and 5 are doubtful, 6 and 6 are not."""
    detector = server.load_detector()
    detector.cascade, detector.second = fake(first, [(50, 50, 20, 20)]), fake(second, [])
    assert len(detector(np.zeros((500, 500, 3), np.uint8))) == faces


def test_what_the_cascade_skips_is_spread_over_the_photo() -> None:
    """Sorted by x and cut, it would be the right side."""
    scan = [(x, y, 20, 20) for x in range(0, 1500, 36) for y in range(0, 1500, 36)]
    detector = server.load_detector()
    detector.cascade = fake(6, scan)
    faces = detector(np.zeros((2000, 2000, 3), np.uint8))
    thirds = [sum(third <= face.x < third + 700 for face in faces) for third in (0, 700, 1400)]
    assert sum(thirds) == len(faces) <= server.HAAR_BOXES
    assert min(thirds) > 100


def test_many_threads_find_what_one_finds(detector: server.Detector) -> None:
    images = [
        *list(photos.KINDS.values())[::5],
        photos.encode(".jpg", CROWD),
        photos.encode(".png", NOISE),
    ]
    alone = [server.annotate(image, detector) for image in images]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda image: server.annotate(image, detector), images * 2))
    assert found == alone * 2


def test_a_higher_score_can_be_asked_for() -> None:
    for model, detector in {"": DETECTORS["cascade"], str(YUNET): DETECTORS["YuNet"]}.items():
        score = detector(PORTRAIT)[0].score
        assert score == round(score, 3)
        assert server.load_detector(model, score * 0.99)(PORTRAIT)
        assert not server.load_detector(model, score * 1.01)(PORTRAIT)


@pytest.mark.parametrize(
    "name, content",
    {
        "missing.xml": None,
        "missing.onnx": None,
        "junk.xml": b"junk",
        "other.xml": b"<?xml version='1.0'?><opencv_storage><a>1</a></opencv_storage>",
        "photo.xml": photos.ASTRONAUT,
        "junk.onnx": b"junk",
        "empty.onnx": b"",
        "other.onnx": RELU,
    }.items(),
)
def test_a_file_that_is_no_model_is_an_error(tmp_path, name: str, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((OSError, ValueError), match=name):
        server.load_detector(str(tmp_path / name))


def test_another_cascade_can_be_used(tmp_path) -> None:
    """Its path has letters that OpenCV on Windows cannot open."""
    data = ROOT.joinpath(cv2.data.haarcascades, "haarcascade_frontalface_alt2.xml").read_bytes()
    (tmp_path / "Gesichter, für alle.xml").write_bytes(data)
    assert server.load_detector(str(tmp_path / "Gesichter, für alle.xml"), 1)(PORTRAIT)


@pytest.mark.parametrize("error", [MemoryError(), cv2.error("Insufficient memory")])
async def test_a_photo_for_which_the_detector_has_no_memory_gets_503(
    aiohttp_client, error: Exception
) -> None:
    def hungry(pixels: server.Pixels) -> list[server.Face]:
        raise error

    client = await aiohttp_client(server.create_app(detector=hungry))
    answer = await client.post("/image", data=photos.ASTRONAUT)
    assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
    assert "memory" in (await answer.json())["detail"].lower()


def crowd(part: int) -> np.ndarray:
    """Return a photo of 400 astronauts, each face of that part of the longer side."""
    x, y, side, _ = FACE
    tile = 2000 * (side + 60) // side // part  # pixels, with what is around the face
    head = cv2.resize(PORTRAIT[y - 30 : y + side + 30, x - 30 : x + side + 30], (tile, tile))
    photo = np.full((2000, 2000, 3), 160, np.uint8)
    for top, left in itertools.product(range(0, 2000, 100), repeat=2):
        photo[top : top + tile, left : left + tile] = head
    return photo


@pytest.mark.parametrize(("name", "part"), [("cascade", 50), ("YuNet", 56), ("YuNet", 72)])
def test_the_faces_of_a_whole_school_are_found(name: str, part: int) -> None:
    assert len(DETECTORS[name](crowd(part))) > 360


def test_yunet_is_one_word(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert isinstance(server.load_detector("yunet"), server.YuNetDetector)


@pytest.mark.parametrize("name", ["a.xml", "a.onnx"])
def test_it_works_after_its_model_file_was_deleted(tmp_path: Path, name: str) -> None:
    """Each thread loads its own, when it is first used."""
    model = tmp_path / name
    model.write_bytes(YUNET.read_bytes() if name == "a.onnx" else server.CASCADE.read_bytes())
    detector = server.load_detector(str(model))
    model.unlink()
    with ThreadPoolExecutor(1) as pool:
        assert len(pool.submit(detector, PORTRAIT).result(60)) == 1


@pytest.mark.parametrize("score", [-1, float("nan"), 9])
def test_a_score_that_no_face_can_have_is_refused(score: float) -> None:
    with pytest.raises(ValueError, match="--min-score"):
        server.load_detector("yunet", score)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such devices")
def test_a_device_is_no_model() -> None:
    with pytest.raises(ValueError, match="/dev/zero"):
        server.load_detector("/dev/zero")
