"""Has schemathesis post photos, beside the noise that it makes up; a variable names this file."""

from pathlib import Path

import schemathesis
from hypothesis import strategies

ASTRONAUT = (Path(__file__).parent.parent / "samples" / "astronaut.jpg").read_bytes()
BODIES = strategies.sampled_from([ASTRONAUT, ASTRONAUT[:5000], b""]) | strategies.binary()

for media_type in (
    "image/jpeg",
    "image/png",
    "image/webp",
    "image/gif",
    "application/octet-stream",
):
    schemathesis.openapi.media_type(media_type, BODIES)
