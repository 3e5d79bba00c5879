"""The wheel holds every module and every YAML file, under `crossguard/` alone."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLOORS = ("configs", "data", "launchers", "recipes", "train")


def test_the_wheel_holds_every_file_of_the_floors(tmp_path: Path) -> None:
    build = "from hatchling.build import build_wheel; import sys; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    tracked = subprocess.run(["git", "ls-files", *FLOORS], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert packed == {f"crossguard/{name}" for name in tracked.splitlines()}
