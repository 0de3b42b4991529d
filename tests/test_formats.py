"""Each kind of photo is read, turned upright, and comes out as a plain JPEG."""

import photos
import pytest

import server
from server import cv2, np

DETECTOR = server.load_detector()
UPRIGHT = photos.pixels()[:, :340]  # the left two thirds of the astronaut, with her face
STORED = {  # how a camera stores a picture, by the orientation that EXIF tells
    1: lambda image: image,
    2: lambda image: cv2.flip(image, 1),
    3: lambda image: cv2.rotate(image, cv2.ROTATE_180),
    4: lambda image: cv2.flip(image, 0),
    5: cv2.transpose,
    6: lambda image: cv2.rotate(image, cv2.ROTATE_90_COUNTERCLOCKWISE),
    7: lambda image: cv2.rotate(cv2.transpose(image), cv2.ROTATE_180),
    8: lambda image: cv2.rotate(image, cv2.ROTATE_90_CLOCKWISE),
    99: lambda image: image,
}


@pytest.mark.parametrize("kind", photos.KINDS)
def test_each_kind_is_read_with_the_face_in_its_first_frame(kind: str) -> None:
    jpeg, meta = server.annotate(photos.KINDS[kind], DETECTOR)
    assert (meta["width"], meta["height"], len(meta["faces"])) == (512, 512, 1)
    assert jpeg.startswith(b"\xff\xd8")
    assert b"script" not in jpeg
    assert abs(photos.pixels(jpeg).mean() - photos.pixels().mean()) < 4


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("extension", [".jpg", ".png", ".webp"])
def test_a_turned_photo_comes_out_upright_and_without_metadata(
    extension: str, orientation: int
) -> None:
    photo = photos.with_exif(extension, STORED[orientation](UPRIGHT), orientation)
    assert b"GPS!" in photo
    jpeg, meta = server.annotate(photo, lambda pixels: [])
    assert (meta["width"], meta["height"]) == (340, 512)
    assert cv2.PSNR(photos.pixels(jpeg), np.ascontiguousarray(UPRIGHT)) > 25
    assert b"GPS!" not in jpeg
    assert b"Exif" not in jpeg


def test_cmyk_comes_out_in_its_colors() -> None:
    blue, green, red = photos.pixels(server.annotate(photos.CMYK, DETECTOR)[0])[8, 8]
    assert red > 200 > 60 > max(blue, green)


@pytest.mark.parametrize("share", [0.001, 0.1, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["JPEG", "JPEG, progressive", "PNG", "WebP", "GIF"])
def test_a_photo_that_was_cut_short_is_refused(kind: str, share: float) -> None:
    photo = photos.KINDS[kind]
    with pytest.raises(server.BadPhoto):
        server.annotate(photo[: max(16, int(len(photo) * share))], DETECTOR)


FOREIGN = {
    "TIFF": photos.encode(".tiff"),
    "JPEG 2000": photos.encode(".jp2"),
    "AVIF": photos.encode(".avif"),
    "BMP": photos.encode(".bmp"),
    "PPM": photos.encode(".ppm"),
    "HDR": photos.encode(".hdr", photos.pixels().astype(np.float32) / 255),
    "EXR": b"\x76\x2f\x31\x01\x02\0\0\0" + bytes(999),
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"></svg>',
    "text": b"photo",
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_any_other_format_is_refused(kind: str) -> None:
    with pytest.raises(server.WrongFormat):
        server.annotate(FOREIGN[kind], DETECTOR)


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1), (65_500, 1), (1, 65_500)])
def test_a_photo_of_odd_size_is_read(size: tuple[int, int]) -> None:
    _, meta = server.annotate(photos.blank_png(*size), DETECTOR)
    assert (meta["width"], meta["height"], meta["faces"]) == (*size, [])


def test_a_side_that_is_too_long_for_a_jpeg_is_refused_unless_none_is_drawn() -> None:
    photo = photos.blank_png(65_501, 1)
    with pytest.raises(server.BadPhoto, match="65,500"):
        server.annotate(photo, DETECTOR)
    assert server.annotate(photo, DETECTOR, drawn=False)[1]["width"] == 65_501


@pytest.mark.parametrize("side, width", [(100, 4), (5000, 40)])
def test_a_box_stands_out_on_any_photo(side: int, width: int) -> None:
    """It is wide on a large photo, and has black edges, to be seen on a green one."""
    photo = np.full((side, side, 3), (0, 255, 0), np.uint8)
    server.draw(photo, [server.Face(*[side // 4] * 2, *[side // 2] * 2, 9)])
    black = np.flatnonzero(photo[side // 2, : side // 2, 1] == 0)
    assert np.ptp(black) == pytest.approx(width, abs=1)
