"""Mutate real photos and forms: whatever comes, only the server's own exceptions may come out.

python bench/fuzz.py [RUNS]
"""

import functools
import sys
import time
from pathlib import Path

import cv2
import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import server  # noqa: E402

RUNS = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
FACE = cv2.imread(str(ROOT / "samples/astronaut.jpg"))[40:190:2, 150:300:2]  # 75 x 75: small, for many runs a second
SIXTEEN_BITS = FACE.astype(np.uint16) * 257


def encode(extension: str, image: np.ndarray = FACE, *parameters: int) -> bytes:
    return cv2.imencode(extension, image, parameters)[1].tobytes()


def upright(jpeg: bytes, orientation: int) -> bytes:
    """The JPEG with an EXIF orientation."""
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0" + bytes([orientation]) + bytes(6)
    return jpeg[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2) + exif + jpeg[2:]


PHOTOS = [
    encode(".jpg"),
    encode(".jpg", FACE, cv2.IMWRITE_JPEG_PROGRESSIVE, 1),
    encode(".jpg", FACE, cv2.IMWRITE_JPEG_RST_INTERVAL, 2),
    encode(".jpg", FACE[:, :, 0]),
    upright(encode(".jpg"), 6),
    encode(".png"),
    encode(".png", FACE[:, :, 0]),
    encode(".png", SIXTEEN_BITS),
    encode(".png", cv2.cvtColor(FACE, cv2.COLOR_BGR2BGRA)),
    encode(".webp", FACE, cv2.IMWRITE_WEBP_QUALITY, 80),
    encode(".webp", FACE, cv2.IMWRITE_WEBP_QUALITY, 101),
    encode(".webp", cv2.cvtColor(FACE, cv2.COLOR_BGR2BGRA), cv2.IMWRITE_WEBP_QUALITY, 80),
    encode(".gif"),
]
PART = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'
FORM = PART + b"photo\r\n" + PART + b"photo\r\n--b--\r\n"
TYPE = 'multipart/form-data; charset="utf-8"; boundary="b"'
TOKENS = st.sampled_from(
    [b"\r\n", b"--b", b"--", b"; filename=", b"filename*0*=", b"''", b'"', b"%ff", b"\0", b"\xff", b";"]
)


@st.composite
def mutated(draw: st.DrawFn, originals: list[bytes], tokens: st.SearchStrategy[bytes]) -> bytes:
    """One of them with some bytes overwritten, inserted or removed, most of them early, and maybe cut short."""
    data = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.one_of(st.integers(0, min(200, len(data))), st.integers(0, len(data))))
        data[at : at + draw(st.integers(0, 8))] = draw(tokens)
    return bytes(data[: draw(st.one_of(st.just(len(data)), st.integers(0, len(data))))])


annotate = functools.partial(server.annotate, max_megapixels=1)
seen = {"annotated": 0, "refused": 0, "slowest": 0.0}


def expect(own: tuple[type[Exception], ...], function, *arguments: object) -> None:
    start = time.process_time()
    try:
        function(*arguments)
        seen["annotated"] += 1
    except own:
        seen["refused"] += 1
    seen["slowest"] = max(seen["slowest"], time.process_time() - start)


fuzz = settings(
    max_examples=RUNS, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)


@fuzz
@given(mutated(PHOTOS, st.binary(max_size=8)))
def fuzz_annotate(photo: bytes) -> None:
    expect((server.UnsupportedPhoto, server.BadPhoto), annotate, photo)


@fuzz
@given(mutated([TYPE.encode()], TOKENS), mutated([FORM], TOKENS))
def fuzz_forms(content_type: bytes, form: bytes) -> None:
    expect((server.Problem,), server.file_in_form, content_type.decode(errors="surrogateescape"), form)


for each in (fuzz_annotate, fuzz_forms):
    seen.update(annotated=0, refused=0, slowest=0.0)
    start = time.perf_counter()
    each()
    print(f"{each.__name__}: {seen}, {time.perf_counter() - start:.0f} s", flush=True)
