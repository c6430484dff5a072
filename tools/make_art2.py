"""Draw a second artist's sprite sheet, for tests alone, from Twemoji.

    npm pack @discordapp/twemoji@16.0.1
    pip install resvg-py
    python tools/make_art2.py discordapp-twemoji-16.0.1.tgz [--check]

Writes `sheet.png` and `README.md` to `benchmarks/art2`: the characters of
`src/pali/art/kinds.json` in the same order and places, drawn by somebody else.
The model never trains on them; `benchmarks/evaluate_mini.py` asks it about them.
`--check` writes nothing and says whether the sheet would change.
"""

import argparse
import io
import json
import sys
import tarfile
from pathlib import Path

from make_art import CELL, COLUMNS, in_cell, write
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
ART = ROOT / "benchmarks" / "art2"
KINDS = ROOT / "src" / "pali" / "art" / "kinds.json"
LARGE = 512  # px at which a drawing is painted before it is made small


def read_package(path: Path) -> tuple[dict, dict[str, str]]:
    """The package's description, and its drawings as SVG by code point."""
    drawings, about = {}, {}
    with tarfile.open(path) as archive:
        for member in archive.getmembers():
            name = Path(member.name)
            if member.name == "package/package.json":
                about = json.load(archive.extractfile(member))
            elif name.suffix == ".svg":
                text = archive.extractfile(member).read().decode()
                drawings[name.stem.upper()] = text
    if not drawings or not about:
        raise ValueError(f"{path} is no package of Twemoji drawings")
    return about, drawings


def paint(svg: str) -> Image.Image:
    """A drawing as pixels, RGBA, 512 px on its longer side."""
    from resvg_py import svg_to_bytes

    data = bytes(svg_to_bytes(svg_string=svg, width=LARGE, height=LARGE))
    return Image.open(io.BytesIO(data)).convert("RGBA")


def sheet(drawings: dict[str, str], codepoints: list[str]) -> Image.Image:
    """All cells, eight to a row, in the order of the catalogue."""
    missing = [point for point in codepoints if point not in drawings]
    if missing:
        raise ValueError(f"the package has no drawing of {', '.join(missing)}")
    rows = -(-len(codepoints) // COLUMNS)
    image = Image.new("RGBA", (COLUMNS * CELL, rows * CELL))
    for i, point in enumerate(codepoints):
        place = (i % COLUMNS * CELL, i // COLUMNS * CELL)
        image.paste(in_cell(paint(drawings[point])), place)
    return image


README = """\
# A second artist's drawings

`sheet.png` holds the 64 kinds of `src/pali/art/kinds.json`, in the same
order and places, 64 × 64 px, eight to a row, drawn by other artists. The
shipped model has never seen them: `benchmarks/evaluate_mini.py` asks
what it makes of them. They are no part of the installed package.

The drawings are from **Twemoji**, © 2014-2021 Twitter, © 2022-present
Jason Sofonia and Justine De Caires, and contributors, licensed under
Creative Commons Attribution 4.0 International (`CC-BY-4.0.txt`,
<https://creativecommons.org/licenses/by/4.0/>). Each is painted from its
SVG, cropped to its paint, scaled to 62 px on its longer side and
centred; nothing else is changed. The sheet is under the same licence.

Source: the npm package `{name}` {version}
(<https://github.com/discord/twemoji>). Made by

    python tools/make_art2.py {file}

which writes the same pixels again from the same package; `--check` says
whether that is so.
"""


def main(argv: list[str] | None = None) -> int:
    """Build the sheet, then compare or write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path, help="the .tgz that npm pack fetched")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(argv)
    about, drawings = read_package(options.package)
    rows = json.loads(KINDS.read_text("utf-8"))
    image = sheet(drawings, [row["codepoint"] for row in rows])
    if options.check:
        path = ART / "sheet.png"
        same = path.exists() and Image.open(path).tobytes() == image.tobytes()
        print("art is up to date" if same else "art differs: run tools/make_art2.py")
        return 0 if same else 1
    packed = io.BytesIO()
    image.save(packed, "PNG", optimize=True)
    ART.mkdir(parents=True, exist_ok=True)
    write(ART / "sheet.png", packed.getvalue())
    told = README.format(**about, file=options.package.name)
    write(ART / "README.md", told.encode())
    print(f"{len(rows)} drawings, {len(packed.getvalue()) / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
