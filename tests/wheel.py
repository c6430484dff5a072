"""The wheel works without the repository: build it, install it elsewhere, ask it.

python tests/wheel.py book/_static/scene.png

The new environment borrows the other packages from this one, so that nothing large is
downloaded; the package itself can come from the wheel only, and it is used from an
empty folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MUST_HOLD = (
    "pali/__main__.py",
    "pali/viz.py",
    "pali/art/sheet.png",
    "pali/mini/config.json",
    "pali/mini/model.safetensors",
    "pali/mini/tokenizer.model",
)
MUST_NOT_HOLD = ("notebooks/", "tests/", "pali/runs/", ".ipynb", ".part")


def run(*command: object, cwd: Path) -> str:
    """Run a command with a clean environment; its output, or stop with what it said."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_T"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def build(into: Path) -> Path:
    """A wheel made from a copy of the sources, so that no build folder stays behind."""
    copy = into / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "THIRD_PARTY.md"):
        shutil.copy(ROOT / name, copy)
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.part")
    shutil.copytree(ROOT / "src", copy / "src", ignore=skip)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    options = ("--no-deps", "--no-build-isolation", "--wheel-dir", into)
    run(*pip, "wheel", *options, copy, cwd=into)
    (wheel,) = into.glob("*.whl")
    return wheel


def install(wheel: Path, into: Path) -> Path:
    """A fresh environment with the wheel in it; the folder of its programs."""
    venv.create(into, with_pip=False)
    programs = into / ("Scripts" if os.name == "nt" else "bin")
    pip = (sys.executable, "-m", "pip", "--python", programs / "python", "--quiet")
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=into)
    packages = run(
        programs / "python",
        "-c",
        "import sysconfig; print(sysconfig.get_path('purelib'))",
        cwd=into,
    )
    # A plain line in a .pth file adds a folder without reading the .pth files in it,
    # so an editable install of this package over there is not seen.
    borrowed = Path(packages.strip()) / "borrowed.pth"
    borrowed.write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return programs


def main(argv: list[str]) -> int:
    picture = (ROOT / argv[0]).resolve()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder).resolve()
        wheel = build(place)
        held = zipfile.ZipFile(wheel).namelist()
        missing = [name for name in MUST_HOLD if name not in held]
        extra = [n for n in held if any(bad in n for bad in MUST_NOT_HOLD)]
        if missing or extra:
            print(f"{wheel.name}: missing {missing}, should not hold {extra}")
            return 1
        programs = install(wheel, place / "environment")
        empty = place / "empty"
        empty.mkdir()
        where = run(
            programs / "python", "-c", "import pali; print(pali.__file__)", cwd=empty
        ).strip()
        if not Path(where).is_relative_to(place):
            print(f"the package came from {where}, not from the wheel")
            return 1
        shutil.copy(picture, empty / "picture.png")
        answer = run(
            programs / "pali", "ask", "picture.png", "caption en", cwd=empty
        ).strip()
        here = run(
            sys.executable, "-m", "pali", "ask", picture, "caption en", cwd=ROOT
        ).strip()
        if not answer or answer != here:
            print(f"the wheel says {answer!r}, the repository says {here!r}")
            return 1
        size = wheel.stat().st_size / 1e6
        print(f"{wheel.name} ({size:.1f} MB), from an empty folder: {answer}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
