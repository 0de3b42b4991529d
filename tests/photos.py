"""Photos of all kinds, honest ones and others, for the tests and for fuzz.py."""

import base64
import itertools
import struct
import zlib
from pathlib import Path

from server import cv2, np  # which has set OpenCV's limits

FOLDER = Path(__file__).parent
ASTRONAUT_FILE = FOLDER.parent / "samples/astronaut.jpg"
ASTRONAUT = ASTRONAUT_FILE.read_bytes()  # 512 x 512, one face
FRAME, LENGTH, TEXTURE = (
    (FOLDER / f"attacks/{name}.png").read_bytes() for name in ("frame", "length", "texture")
)
MIB = 2**20  # bytes

# 16 x 16, red; OpenCV writes no CMYK
CMYK = base64.b64decode(
    "/9j/7gAOQWRvYmUAZAAAAAAA/9sAQwCgbniMeGSgjIKMtKqgvvD///Dc3PD/////////////////////////////"
    "/////////////////////////////8AAFAgAEAAQBEMRAE0RAFkRAEsRAP/EABUAAQEAAAAAAAAAAAAAAAAAAAAD"
    "/8QAFBABAAAAAAAAAAAAAAAAAAAAAP/aAA4EQwBNAFkASwAAPwCyKKwAAAD/2Q=="
)
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2))
ADAM7 += ((0, 1, 1, 2),)  # first x and y, and the steps, of each pass over an interlaced PNG


def pixels(photo: bytes = ASTRONAUT) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(photo, np.uint8), cv2.IMREAD_COLOR)


def encode(extension: str, image: np.ndarray | None = None, *parameters: int) -> bytes:
    image = pixels() if image is None else image
    return cv2.imencode(extension, image, parameters)[1].tobytes()


def photo_of(width: int, height: int, extension: str = ".jpg", *parameters: int) -> bytes:
    """The astronaut, stretched to a size."""
    return encode(extension, cv2.resize(pixels(), (width, height)), *parameters)


def animation(extension: str, image: np.ndarray, frames: int = 2) -> bytes:
    """An image, and after it black frames."""
    animation = cv2.Animation()
    black = [np.zeros((*image.shape[:2], 4), np.uint8)] * (frames - 1)
    animation.frames = [cv2.cvtColor(image, cv2.COLOR_BGR2BGRA), *black]
    animation.durations = [100] * frames
    return cv2.imencodeanimation(extension, animation)[1].tobytes()


def exif(orientation: int) -> bytes:
    """EXIF (TIFF's form): an orientation, and a GPS tag that names a place."""
    entries = struct.pack(">HHII", 0x0112, 3, 1, orientation << 16)
    entries += struct.pack(">HHII", 0x8825, 4, 1, 38)
    gps = struct.pack(">H", 1) + struct.pack(">HHI4s", 0x001D, 2, 4, b"GPS!") + bytes(4)
    return b"MM\0*" + struct.pack(">IH", 8, 2) + entries + bytes(4) + gps


def with_exif(extension: str, image: np.ndarray, orientation: int, mark: bytes = b"") -> bytes:
    """An image with EXIF, and the mark that some programs write before it."""
    data = np.frombuffer(mark + exif(orientation), np.uint8)
    kinds = [cv2.IMAGE_METADATA_EXIF]
    return cv2.imencodeWithMetadata(extension, image, kinds, [data])[1].tobytes()


# --- PNG by hand (its specification, 5 and 11) ---


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int, height: int, rows: bytes, depth: int = 1, color: int = 0, interlaced: bool = False
) -> bytes:
    """A PNG of these rows, which are deflated already. Its size may be a lie."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlaced)
    palette = chunk(b"PLTE", bytes(level for level in range(256) for _ in "RGB"))
    data = chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + palette * (color == 3) + data


def blank_png(width: int, height: int) -> bytes:
    """A black PNG of one bit a pixel, thousands of times smaller than its pixels."""
    return png(width, height, zlib.compress(bytes((1 + (width + 7) // 8) * height), 9))


TINY = blank_png(9, 9)


def interlaced_png(image: np.ndarray) -> bytes:
    rows = (row for x, y, dx, dy in ADAM7 for row in image[y::dy, x::dx, ::-1] if row.size)
    packed = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return png(image.shape[1], image.shape[0], packed, 8, 2, interlaced=True)


def palette_png(grey: np.ndarray) -> bytes:
    packed = zlib.compress(b"".join(b"\0" + row.tobytes() for row in grey))
    return png(grey.shape[1], grey.shape[0], packed, 8, 3)


def with_chunk(png: bytes, kind: bytes, data: bytes, times: int = 1) -> bytes:
    """The PNG with one more chunk behind its header, or many."""
    return png[:33] + chunk(kind, data) * times + png[33:]


def zeros(size: int) -> bytes:
    """Many MiB of zeros, deflated to a thousandth (RFC 1950)."""
    deflate = zlib.compressobj(9, wbits=-15)
    mib = deflate.compress(bytes(MIB)) + deflate.flush(zlib.Z_FULL_FLUSH)  # may be repeated
    checksum = struct.pack(">HH", size % 65521, 1)
    return b"\x78\xda" + mib * (size // MIB) + deflate.flush() + checksum


def animated_png(width: int, height: int, depth: int, color: int, frames: int, row: int) -> bytes:
    """An APNG of black frames; row is the number of bytes in a row."""
    rows = zlib.compress(bytes((1 + row) * height), 9)
    number = itertools.count()
    control = struct.pack(">IIIIHHBB", width, height, 0, 0, 1, 10, 0, 0)
    body = chunk(b"acTL", struct.pack(">II", frames, 0))
    body += chunk(b"fcTL", struct.pack(">I", next(number)) + control) + chunk(b"IDAT", rows)
    for _ in range(frames - 1):
        body += chunk(b"fcTL", struct.pack(">I", next(number)) + control)
        body += chunk(b"fdAT", struct.pack(">I", next(number)) + rows)
    still = png(width, height, b"", depth, color)
    return still[:33] + body + chunk(b"IEND", b"")


# --- JPEG by hand (ITU T.81, annex B) ---


def segment(marker: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, 2 + len(data)) + data


def lying_jpeg(width: int, height: int) -> bytes:
    """A small JPEG whose frame header claims another size."""
    at = ASTRONAUT.index(b"\xff\xc0") + 5
    return ASTRONAUT[:at] + struct.pack(">HH", height, width) + ASTRONAUT[at + 4 :]


def jpeg_of_scans(side: int, scans: int, filler: bytes = b"") -> bytes:
    """A grey progressive JPEG whose every scan refines all of it, to no effect.

    libjpeg-turbo#284. The filler stands before each scan.
    """

    def scan(first: int, last: int, bit: int, bits: str) -> bytes:
        bits += "1" * (-len(bits) % 8)
        data = int(bits, 2).to_bytes(len(bits) // 8).replace(b"\xff", b"\xff\0")
        return filler + segment(0xDA, bytes([1, 1, 0, first, last, bit])) + data

    blocks = ((side + 7) // 8) ** 2
    frame = segment(0xC2, struct.pack(">BHHBBBB", 8, side, side, 1, 1, 0x11, 0))
    tables = segment(0xDB, bytes([0] + [16] * 64))
    for table, symbol in ((0, 0), (0x10, 0xE0)):  # each has one symbol, of one bit
        tables += segment(0xC4, bytes([table, 1] + [0] * 15 + [symbol]))
    nothing = scan(1, 63, 0x10, ("0" + "1" * 14) * (blocks // 32767 + 1))  # runs of 32,767 blocks
    first = scan(0, 0, 0, "0" * blocks)
    return b"\xff\xd8" + tables + frame + first + nothing * (scans - 1) + b"\xff\xd9"


def arithmetic_jpeg(side: int, scans: int) -> bytes:
    """A JPEG of noise, each scan of which has all pixels, in arithmetic coding (annex D)."""
    frame = segment(0xC9, struct.pack(">BHHB", 8, side, side, 3) + b"\1\x11\0\2\x11\0\3\x11\0")
    tables = segment(0xDB, bytes([0] + [16] * 64))
    noise = np.random.default_rng(1).bytes(10_000).replace(b"\xff", b"")
    scan = segment(0xDA, b"\3\1\0\2\0\3\0\0\x3f\0") + noise
    one_color = segment(0xDA, b"\1\1\0\0\x3f\0")  # makes libjpeg read all scans that follow
    return b"\xff\xd8" + tables + frame + one_color + scan * scans + b"\xff\xd9"


def film(size: int) -> bytes:
    """Bytes in which the marker of a scan stands by chance, as in those of a film."""
    noise = np.random.default_rng(1).bytes(size)
    assert noise.count(b"\xff\xda") > 100
    return noise


# --- What looks like a scan, and is none ---
LIKE_SCANS = b"\xff\xda\0" * 100


def png_like_scans() -> bytes:
    """A PNG of one row, deflated to itself."""
    row = zlib.compress(b"\0" + LIKE_SCANS, 0)
    return png(len(LIKE_SCANS) // 3, 1, row, 8, 2)


def gif_like_scans() -> bytes:
    """A GIF that ends with a comment."""
    comment = b"\x21\xfe" + b"\x96" + LIKE_SCANS[:150] + b"\x96" + LIKE_SCANS[150:] + b"\0"
    return encode(".gif")[:-1] + comment + b"\x3b"


def webp_like_scans() -> bytes:
    """A WebP with one more chunk."""
    body = encode(".webp")[8:] + b"JUNK" + struct.pack("<I", len(LIKE_SCANS)) + LIKE_SCANS
    return b"RIFF" + struct.pack("<I", len(body)) + body


# --- All of it ---


def kinds(image: np.ndarray) -> dict[str, bytes]:
    """An image in each format that is read, and each kind of it."""
    grey, alpha = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), cv2.cvtColor(image, cv2.COLOR_BGR2BGRA)
    deep = image.astype(np.uint16) * 257
    quality, lossless = (cv2.IMWRITE_WEBP_QUALITY, 80), (cv2.IMWRITE_WEBP_QUALITY, 101)
    html = b"<script>alert(1)</script>"
    jpeg = encode(".jpg", image)
    return {
        "JPEG": jpeg,
        "JPEG, progressive": encode(".jpg", image, cv2.IMWRITE_JPEG_PROGRESSIVE, 1),
        "JPEG, grey": encode(".jpg", grey),
        "JPEG with restarts": encode(".jpg", image, cv2.IMWRITE_JPEG_RST_INTERVAL, 4),
        "JPEG, then HTML": jpeg + html,
        "JPEG, HTML inside": jpeg[:2] + segment(0xFE, html) + jpeg[2:],
        "JPEG with fill bytes": jpeg[:2] + b"\xff" * 99 + jpeg[2:],
        "JPEG, then a film": jpeg + b"\0\0\0\x18ftypmp42" + film(8 * MIB),
        "PNG": encode(".png", image),
        "PNG, grey": encode(".png", grey),
        "PNG, transparent": encode(".png", alpha),
        "PNG, 16-bit": encode(".png", deep),
        "PNG, 16-bit grey": encode(".png", grey.astype(np.uint16) * 257),
        "PNG of a palette": palette_png(grey),
        "PNG, interlaced": interlaced_png(image),
        "PNG, animated": animation(".png", image),
        "WebP": encode(".webp", image, *quality),
        "WebP, lossless": encode(".webp", image, *lossless),
        "WebP, transparent": encode(".webp", alpha, *quality),
        "WebP, animated": animation(".webp", image),
        "GIF": encode(".gif", image),
        "GIF, animated": animation(".gif", image),
    }


KINDS = kinds(pixels())
