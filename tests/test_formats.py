"""Each kind of photo is read, turned upright, and comes out as a plain JPEG."""

import re
from pathlib import Path

import photos
import pytest
from helpers import INSTALL, run_python
from photos import ASTRONAUT

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


@pytest.mark.parametrize("orientation", STORED)
def test_a_webp_is_turned_though_its_exif_begins_as_that_of_a_jpeg(orientation: int) -> None:
    """Programs with libvips write it so, such as sharp."""
    photo = photos.with_exif(".webp", STORED[orientation](UPRIGHT), orientation, b"Exif\0\0")
    jpeg, meta = server.annotate(photo, lambda pixels: [])
    assert (meta["width"], meta["height"]) == (340, 512)
    assert cv2.PSNR(photos.pixels(jpeg), np.ascontiguousarray(UPRIGHT)) > 25


def test_a_photo_with_all_pixels_of_a_phone_is_read() -> None:
    """Phones of 50 megapixels have a little more."""
    assert server.decode(photos.blank_png(8160, 6144)).shape == (6144, 8160, 3)


def test_only_a_jpeg_has_scans() -> None:
    for photo in (photos.png_like_scans(), photos.gif_like_scans(), photos.webp_like_scans()):
        assert photo.count(server.SCAN) > server.MAX_SCANS
        assert server.decode(photo).size


def test_a_transparent_pixel_of_a_gif_has_the_color_of_its_background() -> None:
    header, background = b"GIF89a\1\0\1\0\x81\1\0", (0, 255, 0)
    palette = bytes([255, 0, 0, *background, 0, 0, 255, 255, 255, 255])
    transparent = b"\x21\xf9\4\1\0\0\2\0"  # the color of number 2
    pixel = b"\x2c\0\0\0\0\1\0\1\0\0" + b"\2\2\x54\1\0"  # has number 2
    photo = header + palette + transparent + pixel + b"\x3b"
    assert tuple(server.decode(photo)[0, 0]) == background


@pytest.mark.parametrize("background", [4, 255])
def test_a_gif_is_read_though_its_background_has_no_color(background: int) -> None:
    """The icons of Python's IDLE are such."""
    photo = photos.encode(".gif", np.zeros((9, 9, 3), np.uint8))
    colors = 2 << (photo[10] & 7)
    short = photo[:10] + bytes([0x81, background]) + photo[12:25] + photo[13 + 3 * colors :]
    assert server.decode(short).shape == (9, 9, 3)


@pytest.mark.parametrize("length", range(4, 16))
def test_the_beginning_of_a_gif_is_refused(length: int) -> None:
    with pytest.raises(server.BadPhoto):
        server.decode(photos.encode(".gif")[:length])


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
    "SVG, XML": b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"></svg>',
    "PDF": b"%PDF-1.7\n",
    "HEIC": b"\0\0\0\x24ftypheic\0\0\0\0mif1heic",
    "HEIC, its brand second": b"\0\0\0\x24ftypmif1\0\0\0\0mif1heic",
    "AVIF, its brand second": b"\0\0\0\x24ftypmif1\0\0\0\0mif1avif",
    "JSON": b'{"image": "/9j/4AAQSkZJRg"}',
    "JSON, data URL": b"data:image/jpeg;base64,/9j/4AAQSkZJRg",
    "JSON, a PNG in base64": b"iVBORw0KGgoAAAANSUhEUg",
    "AVI": b"RIFF\x24\0\0\0AVI LIST" + bytes(99) + b"\xff\xda\0" * 99,
    "WAV": b"RIFF\x24\0\0\0WAVEfmt " + bytes(99),
    "text": b"photo",
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_any_other_format_is_refused_and_named_if_people_often_send_it(kind: str) -> None:
    with pytest.raises(server.BadPhoto) as refusal:
        server.annotate(FOREIGN[kind], DETECTOR)
    named = "JPEG 2000|PPM|HDR|EXR|AVI|WAV|text"
    name = "something else" if kind in named.split("|") else kind.partition(",")[0]
    assert f"not a JPEG, PNG, WebP or GIF, but {name}" in str(refusal.value)
    assert ("iPhone" in str(refusal.value)) == (name == "HEIC")
    assert refusal.value.status == 415


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


def test_the_comparison_with_pillow_names_what_differs(tmp_path: Path) -> None:
    """Pillow turns a photo by XMP too, the server does not."""
    pytest.importorskip("PIL", reason=f"needs Pillow: {INSTALL}")
    for number, photo in enumerate([*photos.KINDS.values()][::2]):
        tmp_path.joinpath(f"{number}.jpg").write_bytes(photo)
    xmp = b'http://ns.adobe.com/xap/1.0/\0<rdf:Description tiff:Orientation="6"/>'
    turned = ASTRONAUT[:2] + photos.segment(0xE1, xmp) + ASTRONAUT[2:]
    tmp_path.joinpath("turned.jpg").write_bytes(turned)
    done = run_python("bench/formats.py", tmp_path)
    assert re.findall("^(?:JPEG|PNG|WEBP|GIF) .*", done.stdout, re.MULTILINE) == [
        f"JPEG turned: {tmp_path / 'turned.jpg'} "
    ], done.stderr
