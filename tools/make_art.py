"""Draw the sprite sheet of `pali.scenes` from Noto Color Emoji.

    python tools/make_art.py [--font NotoColorEmoji.ttf] [--check]

Writes `sheet.png`, `kinds.json` and `README.md` to `src/pali/art`. The
font comes from the Debian package fonts-noto-color-emoji, the names
that are compared with ours from unicode-cldr-core (optional: without
it the names in the present `kinds.json` are kept). `--check` writes
nothing and says whether the files would change.
"""

import argparse
import io
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ART = Path(__file__).resolve().parents[1] / "src" / "pali" / "art"
FONTS = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "~/.fonts",
    "~/.local/share/fonts",
)
CLDR = Path("/usr/share/unicode/cldr/common/annotations/en.xml")
CELL, MARGIN, COLUMNS = 64, 1, 8
STRIKE = 109  # the one bitmap size that the font holds, in pixels

# kind, code point of the drawing, code point whose name translates it
# (a face is drawn where the animal is meant).
TRAINED = """
cat 1F431 1F408 | dog 1F436 1F415 | fox 1F98A | lion 1F981 | frog 1F438
panda 1F43C | pig 1F437 1F416 | penguin 1F427 | octopus 1F419
crab 1F980 | turtle 1F422 | butterfly 1F98B | bee 1F41D
whale 1F433 1F40B | apple 1F34E | banana 1F34C | pizza 1F355
mushroom 1F344 | tree 1F333 | tulip 1F337 | car 1F697 | bus 1F68C
rocket 1F680 | star 2B50 | heart 2764 | moon 1F319 | house 1F3E0
key 1F511 | ball 26BD | umbrella 2602 | ghost 1F47B | robot 1F916
"""
LATER = """
duck 1F986 | owl 1F989 | elephant 1F418 | snail 1F40C
rabbit 1F430 1F407 | snake 1F40D | spider 1F577 | sun 2600
fire 1F525 | cactus 1F335 | strawberry 1F353 | corn 1F33D
cake 1F382 | doughnut 1F369 | cup 2615 | bicycle 1F6B2
train 1F682 | sailboat 26F5 | airplane 2708 | guitar 1F3B8
drum 1F941 | crown 1F451 | bell 1F514 | gift 1F381
book 1F4D7 | pencil 270F | camera 1F4F7 | clock 23F0
hat 1F3A9 | shoe 1F45F | anchor 2693 | snowman 26C4
"""
PLURALS = {
    "fox": "foxes",
    "octopus": "octopuses",
    "butterfly": "butterflies",
    "bus": "buses",
    "cactus": "cactuses",
    "strawberry": "strawberries",
    "snowman": "snowmen",
}
# drawings with a right way round, never mirrored
FIXED = {"book", "camera", "clock"}


def entries() -> list[dict]:
    """The 64 rows of the catalogue, without the names from CLDR."""
    rows = []
    for text, trained in ((TRAINED, True), (LATER, False)):
        for entry in text.replace("\n", "|").split("|"):
            if not entry.strip():
                continue
            kind, drawn, *named = entry.split()
            rows.append(
                {
                    "kind": kind,
                    "plural": PLURALS.get(kind, kind + "s"),
                    "codepoint": drawn,
                    "named_by": named[0] if named else drawn,
                    "mirror": kind not in FIXED,
                    "trained": trained,
                }
            )
    return rows


def check_names(rows: list[dict]) -> None:
    """Refuse a catalogue in which one name hides inside another."""
    names = [row["kind"] for row in rows]
    if len(names) != COLUMNS**2 or len(set(names)) != len(names):
        raise ValueError(f"expected 64 different kinds, got {len(set(names))}")
    for name in names:
        inside = [n for n in names if name in n and n != name]
        if inside:
            raise ValueError(f"{name!r} is contained in {inside}: rename one")


def cldr_names() -> dict[str, str]:
    """English short names of CLDR by character, {} where not installed."""
    if not CLDR.exists():
        return {}
    found = ElementTree.parse(CLDR).getroot().iter("annotation")
    return {a.get("cp"): a.text for a in found if a.get("type") == "tts"}


def add_names(rows: list[dict], names: dict[str, str]) -> None:
    """Put CLDR's short name beside a kind that we call differently."""
    for row in rows:
        name = names.get(chr(int(row["named_by"], 16)), row["kind"])
        if name != row["kind"]:
            row["cldr"] = name


def find_font(name: str = "NotoColorEmoji.ttf") -> Path:
    """The installed font file; OSError where there is none."""
    for folder in FONTS:
        for path in sorted(Path(folder).expanduser().rglob(name)):
            return path
    raise OSError(
        f"{name} was not found under {', '.join(FONTS)}. Install the "
        f"package fonts-noto-color-emoji or give --font."
    )


def draw(font: ImageFont.FreeTypeFont, character: str) -> Image.Image:
    """One emoji, cropped to its paint and centred in a 64 x 64 cell."""
    wide = Image.new("RGBA", (2 * STRIKE, 2 * STRIKE))
    ImageDraw.Draw(wide).text(
        (STRIKE // 4, STRIKE // 4), character, font=font, embedded_color=True
    )
    art = wide.crop(wide.getchannel("A").getbbox())
    scale = (CELL - 2 * MARGIN) / max(art.size)
    size = tuple(max(1, round(scale * side)) for side in art.size)
    art = art.resize(size, Image.Resampling.LANCZOS)
    cell = Image.new("RGBA", (CELL, CELL))
    cell.paste(art, tuple((CELL - side) // 2 for side in size))
    return cell


def sheet(font_path: Path, rows: list[dict]) -> Image.Image:
    """All cells, eight to a row, in the order of the catalogue."""
    font = ImageFont.truetype(str(font_path), STRIKE)
    image = Image.new("RGBA", (COLUMNS * CELL, COLUMNS * CELL))
    for i, row in enumerate(rows):
        place = (i % COLUMNS * CELL, i // COLUMNS * CELL)
        image.paste(draw(font, chr(int(row["codepoint"], 16))), place)
    return image


def font_version(path: Path) -> str:
    """The Debian package that owns the font, else the file's name."""
    try:
        owner = subprocess.run(
            ["dpkg-query", "--search", str(path)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split(":")[0]
        version = subprocess.run(
            ["dpkg-query", "--showformat=${Version}", "--show", owner],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return path.name
    return f"{owner} {version}"


README = """\
# Art

`sheet.png` holds 64 drawings of 64 × 64 px, eight to a row, RGBA on a
transparent ground. `kinds.json` lists them in the same order:

- `kind`, `plural`: the English words that the scenes use;
- `codepoint`: the character that is drawn;
- `named_by`: the character whose name in Unicode CLDR says what is
  meant (a cat is drawn as its face and named after the whole cat);
- `cldr`: that English name, where it differs from ours;
- `mirror`: whether the drawing may be mirrored;
- `trained`: whether the first world, and so the shipped model, uses it.

The drawings are from **Noto Color Emoji**, © Google Inc., font licensed
under the SIL Open Font License 1.1 (`OFL.txt`). Each is cropped to its
paint, scaled to 62 px on its longer side and centred; nothing else is
changed.

Source: {source}. Made by

    python tools/make_art.py

which writes the same pixels again from the same font; `--check` says
whether that is so.
"""


def write(path: Path, content: bytes) -> None:
    """Write beside the place, then move there."""
    beside = path.with_name(path.name + ".part")
    beside.write_bytes(content)
    beside.replace(path)


def main(argv: list[str] | None = None) -> int:
    """Build everything, then compare or write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--font", type=Path, help="path of the font file")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(argv)
    font = options.font or find_font()
    rows = entries()
    check_names(rows)
    names = cldr_names()
    listing = ART / "kinds.json"
    if names:
        add_names(rows, names)
    elif listing.exists():
        old = {row["kind"]: row for row in json.loads(listing.read_text())}
        for row in rows:
            if "cldr" in old.get(row["kind"], {}):
                row["cldr"] = old[row["kind"]]["cldr"]
    image = sheet(font, rows)
    text = "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"
    if options.check:
        same = (ART / "sheet.png").exists() and listing.exists()
        same = same and listing.read_text() == text
        same = same and Image.open(ART / "sheet.png").tobytes() == image.tobytes()
        print("art is up to date" if same else "art differs: run tools/make_art.py")
        return 0 if same else 1
    packed = io.BytesIO()
    image.save(packed, "PNG", optimize=True)
    ART.mkdir(parents=True, exist_ok=True)
    write(ART / "sheet.png", packed.getvalue())
    write(listing, text.encode())
    readme = README.format(source=font_version(font))
    write(ART / "README.md", readme.encode())
    print(f"{len(rows)} drawings, {len(packed.getvalue()) / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
