"""Can a photo or form crash or hang server.py, take too much memory, or raise what it should not?

    python tests/fuzz.py [MINUTES] [FORMAT ...]

Each format is mutated in a process of its own. What goes wrong is saved in /tmp, and named.
"""

import contextlib
import mmap
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

PIXELS = 10**6  # the limit, small for many runs a second
BYTES_A_PIXEL, SPARE = 9, 100 * 2**20  # what a photo may take
SLOW, HUNG = 1, 10  # s; an honest photo of the limit takes 0.05
STATE = struct.Struct("QQQdQ")  # runs, annotated, refused, slowest, length of the input
ROOM = 2**21  # bytes, for an input


# --- Each format in parts, (kind, data): so a mutant still has the right lengths and checksums ---
def split_png(photo: bytes) -> list[tuple[bytes, bytes]]:
    parts, at = [(b"", photo[:8])], 8
    while at < len(photo):
        size = int.from_bytes(photo[at : at + 4])
        parts.append((photo[at + 4 : at + 8], photo[at + 8 : at + 8 + size]))
        at += 12 + size
    return parts


def join_png(parts: list[tuple[bytes, bytes]]) -> bytes:
    return b"".join(
        len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4) if kind else data
        for kind, data in parts
    )


def split_jpeg(photo: bytes) -> list[tuple[bytes, bytes]]:
    parts, at = [(b"", photo[:2])], 2
    while at < len(photo):
        kind, size = photo[at : at + 2], int.from_bytes(photo[at + 2 : at + 4])
        if kind == b"\xff\xff":
            at += 1
        elif kind[:1] != b"\xff" or kind[1:] in b"\0\xd9" or b"\xd0" <= kind[1:] <= b"\xd7":
            end = photo.find(b"\xff", at + 2)  # the pixels
            end = end if end > 0 else len(photo)
            parts.append((b"", photo[at:end]))
            at = end
        else:
            parts.append((kind, photo[at + 4 : at + 2 + size]))
            at += 2 + size
    return parts


def join_jpeg(parts: list[tuple[bytes, bytes]]) -> bytes:
    return b"".join(
        kind + min(2 + len(data), 65535).to_bytes(2) + data if kind else data
        for kind, data in parts
    )


def split_webp(photo: bytes) -> list[tuple[bytes, bytes]]:
    parts, at = [(b"", photo[:12])], 12
    while at < len(photo):
        size = int.from_bytes(photo[at + 4 : at + 8], "little")
        if photo[at : at + 4] == b"ANMF":  # a frame with chunks of its own
            parts += [
                (b"ANMF", photo[at + 8 : at + 24]),
                *split_webp(bytes(12) + photo[at + 24 : at + 8 + size])[1:],
            ]
        else:
            parts.append((photo[at : at + 4], photo[at + 8 : at + 8 + size]))
        at += 8 + size + size % 2
    return parts


def join_webp(parts: list[tuple[bytes, bytes]]) -> bytes:
    body, frame = b"", None
    for kind, data in [*parts[1:], (b"ANMF", b"")]:
        chunk = kind + len(data).to_bytes(4, "little") + data + bytes(len(data) % 2)
        if kind == b"ANMF":
            if frame is not None:
                body += b"ANMF" + len(frame).to_bytes(4, "little") + frame + bytes(len(frame) % 2)
            frame = data
        elif frame is not None:
            frame += chunk
        else:
            body += chunk
    return b"RIFF" + (4 + len(body)).to_bytes(4, "little") + b"WEBP" + body


def split_gif(photo: bytes) -> list[tuple[bytes, bytes]]:
    """The sub-blocks of a kind b"LZW" are joined to one."""

    def colors(packed: int) -> int:
        return 3 << (packed % 8 + 1) if packed & 128 else 0

    at = 13 + colors(photo[10])
    parts = [(b"", photo[:at])]
    while at < len(photo):
        if photo[at] == 0x3B:
            parts.append((b"", photo[at:]))
            break
        size = 2 if photo[at] == 0x21 else 11 + colors(photo[at + 9])
        parts.append((b"", photo[at : at + size]))
        at, data = at + size, b""
        while at < len(photo) and photo[at]:
            data += photo[at + 1 : at + 1 + photo[at]]
            at += 1 + photo[at]
        parts.append((b"LZW", data))
        at += 1
    return parts


def join_gif(parts: list[tuple[bytes, bytes]]) -> bytes:
    def blocks(data: bytes) -> bytes:
        pieces = (data[at : at + 255] for at in range(0, len(data), 255))
        return b"".join(bytes([len(piece)]) + piece for piece in pieces) + b"\0"

    return b"".join(blocks(data) if kind else data for kind, data in parts)


def split_form(form: bytes) -> list[tuple[bytes, bytes]]:
    return [(b"", line) for line in form.splitlines(keepends=True)]


def join_form(parts: list[tuple[bytes, bytes]]) -> bytes:
    return b"".join(data for _, data in parts)


# --- Mutants ---
KINDS = {
    "PNG": b"IHDR PLTE tRNS eXIf IDAT IEND acTL fcTL fdAT zTXt iCCP gAMA cHRM sRGB bKGD".split(),
    "JPEG": [bytes([0xFF, marker]) for marker in (*range(0xC0, 0xD0), *range(0xDA, 0xE2), 0xFE)],
    "WebP": b"VP8X,VP8 ,VP8L,ALPH,ANIM,ANMF,EXIF,ICCP,XMP ".split(b","),
    "GIF": [b"", b"LZW"],
    "form": [b""],
}
TOKENS = b"\r\n,--b,--,; filename=,filename*=utf-8''%ff,\",\0,\xff,;,\t,=".split(b",")
NUMBERS = [0, 1, 2, 7, 8, 15, 16, 31, 63, 64, 127, 128, 254, 255]


def mutate_data(rng: random.Random, name: str, data: bytes, others: list[bytes]) -> bytes:
    """Change some bytes, most of them early."""
    new = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = (
            rng.randrange(min(32, len(new)) + 1)
            if rng.random() < 0.5
            else rng.randrange(len(new) + 1)
        )
        what = rng.random()
        if what < 0.3:
            new[at : at + 1] = [rng.choice(NUMBERS)]
        elif what < 0.5:
            new[at : at + 1] = [rng.randrange(256)]
        elif what < 0.6 and at < len(new):
            new[at] ^= 1 << rng.randrange(8)
        elif what < 0.7:
            new[at : at + rng.randrange(9)] = rng.randbytes(rng.randrange(9))
        elif what < 0.8:
            del new[at : at + rng.randrange(1 + len(new))]
        elif what < 0.9:
            other = rng.choice(others)
            start = rng.randrange(len(other) + 1)
            new[at:at] = other[start : start + rng.randrange(64)]
        elif name == "form":
            new[at : at + rng.randrange(9)] = rng.choice(TOKENS) * rng.choice((1, 1, 1, 9, 1000))
        else:
            new[at : at + 4] = struct.pack(rng.choice("<>") + "I", 1 << rng.randrange(32))
    return bytes(new)


def mutate_pixels(rng: random.Random, name: str, data: bytes, others: list[bytes]) -> bytes:
    """Change what is deflated in a PNG, such as the filters of its rows."""
    try:
        return zlib.compress(mutate_data(rng, name, zlib.decompress(data), others), 1)
    except zlib.error:
        return data


def mutant(
    rng: random.Random, name: str, pool: list[list[tuple[bytes, bytes]]], join: Callable
) -> bytes:
    """Change one photo of the pool, its parts or its bytes."""
    parts = list(rng.choice(pool))
    for _ in range(rng.choice((0, 1, 1, 2, 3, 5))):
        other = rng.choice(pool)
        at, what = rng.randrange(len(parts)), rng.random()
        kind, data = parts[at]
        if what < 0.55:
            change = (
                mutate_pixels if kind in (b"IDAT", b"fdAT") and rng.random() < 0.5 else mutate_data
            )
            parts[at] = kind, change(rng, name, data, [each for _, each in other])
        elif what < 0.65:
            parts[at] = rng.choice(KINDS[name]), data
        elif what < 0.7 and len(parts) > 1:
            del parts[at]
        elif what < 0.8:
            parts.insert(rng.randrange(len(parts) + 1), rng.choice(other))
        elif what < 0.9:
            parts[at:at] = [parts[at]] * rng.choice((1, 2, 50))
        elif what < 0.95:
            parts.insert(at, (rng.choice(KINDS[name]), rng.randbytes(rng.randrange(40))))
        else:
            parts[at:] = other[rng.randrange(len(other)) :]
    photo = join(parts)
    if rng.random() < 0.1:
        photo = mutate_data(rng, name, photo, [photo])
    if rng.random() < 0.05:
        photo = photo[: rng.randrange(len(photo) + 1)]
    return photo[: ROOM - STATE.size]


# --- The process of a format ---
def fuzz(name: str, seconds: float, seed: int, state_file: str) -> None:
    """Run mutants of a format, and note in a file what runs, which outlives a crash."""
    os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"] = str(PIXELS)
    import photos

    import server

    face = photos.pixels()[40:190:3, 150:300:3]  # 50 x 50
    if name == "form":
        part = b'--b\r\nContent-Disposition: form-data; name="a"; filename="a.jpg"\r\n\r\nphoto'
        seeds = [part + b"\r\n--b--\r\n", part + b"\r\n--b\r\nA: b\r\n\r\n\r\n--b--\r\n"]
    else:
        small = photos.kinds(face)
        seeds = [photo for kind, photo in small.items() if kind.startswith(name)]
        if name in ("PNG", "JPEG", "WebP"):
            seeds.append(photos.with_exif(f".{name.lower()}", face, 6))
        if name == "PNG":
            seeds += [photos.FRAME, photos.LENGTH, photos.animated_png(9, 9, 16, 6, 3, 72)]
        if name in ("WebP", "GIF"):
            seeds.append(photos.animation(f".{name.lower()}", face, 3))
        if name == "JPEG":
            seeds += [photos.CMYK, photos.jpeg_of_scans(64, 10), small["JPEG"][:2] + small["JPEG"]]
    split, join = globals()[f"split_{name.lower()}"], globals()[f"join_{name.lower()}"]
    pool = [split(each) for each in seeds]
    rng = random.Random(seed)
    box = [server.Face(5, 5, 20, 20, 1.0)]

    with Path(state_file).open("r+b") as file:
        state = mmap.mmap(file.fileno(), ROOM)
    runs, annotated, refused, slowest, _ = STATE.unpack(state[: STATE.size])
    end = time.monotonic() + seconds
    server.annotate(seeds[0] if name != "form" else photos.ASTRONAUT, lambda _: box)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kept = {}

    def keep(what: str, data: bytes) -> None:
        if what not in kept:
            kept[what] = Path(tempfile.gettempdir(), f"fuzz-{name}-{what}-{seed}")
            kept[what].write_bytes(data)
            print(f"{what}: {kept[what]}", flush=True)

    while time.monotonic() < end:
        data = mutant(rng, name, pool, join)
        state[STATE.size : STATE.size + len(data)] = data
        state[: STATE.size] = STATE.pack(runs, annotated, refused, slowest, len(data))
        signal.setitimer(signal.ITIMER_REAL, HUNG)  # nobody handles it, so it ends the process
        start = time.thread_time()
        try:
            if name == "form":
                found = bool(server.find_files(data, "multipart/form-data"))
            else:
                found = bool(server.annotate(data, lambda _: box))
            annotated += found
            refused += not found
        except server.BadPhoto:
            refused += 1
        except Exception as error:
            keep(type(error).__name__, data)
        took = time.thread_time() - start
        runs, slowest = runs + 1, max(slowest, took)
        if took > SLOW:
            keep("slow", data)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if (memory - peak) * 1024 > BYTES_A_PIXEL * PIXELS + SPARE:
            keep("memory", data)
    signal.setitimer(signal.ITIMER_REAL, 0)
    state[: STATE.size] = STATE.pack(runs, annotated, refused, slowest, 0)


def watch(name: str, seconds: float) -> str:
    """Run the process of a format, again after each crash; return a row of the table."""
    found, peak, seed = [], 0, random.randrange(2**32)
    end = time.monotonic() + seconds
    with tempfile.NamedTemporaryFile() as state:
        state.truncate(ROOM)
        while (left := end - time.monotonic()) > 0:
            command = [
                sys.executable,
                __file__,
                "--process",
                name,
                str(left),
                str(seed),
                state.name,
            ]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            found += process.stdout.read().decode().split("\n")[:-1]
            _, status, usage = os.wait4(process.pid, 0)
            peak, code = max(peak, usage.ru_maxrss), os.waitstatus_to_exitcode(status)
            runs, annotated, refused, slowest, size = STATE.unpack(state.read(STATE.size))
            if code == 1:
                raise SystemExit(f"The process of {name} did not start.")
            if code:
                what = signal.Signals(-code).name
                data = state.read(size)
                file = Path(tempfile.gettempdir(), f"fuzz-{name}-{what}-{seed}")
                file.write_bytes(data)
                found.append(f"{what}: {file}")
            state.seek(0)
            seed += 1
    crashes = f"{len(found)}, such as {found[0]}" if found else "none"
    return (
        f"| {name} | {seconds / 60:.1f} | {runs:,} | {annotated:,} | {refused:,} "
        f"| {slowest:.2f} | {peak / 1024:.0f} | {crashes} |"
    )


def main(minutes: str = "1", *names: str) -> None:
    print("| format | min | runs | annotated | refused | slowest s | peak MiB | findings |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in names or KINDS:
        print(watch(name, float(minutes) * 60), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--process"]:
        fuzz(sys.argv[2], float(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
    else:
        with contextlib.suppress(KeyboardInterrupt):
            main(*sys.argv[1:])
