"""A short run of bench/fuzz.py."""

import subprocess
import sys

import pytest

from conftest import ROOT


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WebP", "GIF", "form"])
def test_mutants_are_annotated_or_refused(name: str) -> None:
    command = [sys.executable, str(ROOT / "bench/fuzz.py"), "0.02", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    row = done.stdout.splitlines()[-1].split(" | ")
    assert int(row[2].replace(",", "")) > 100, done.stderr
    assert row[-1] == "none |"
