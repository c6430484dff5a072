"""Draw the sprite sheet of `pali.scenes` from Noto Color Emoji.

    python tools/make_art.py [--font NotoColorEmoji.ttf] [--check]

Writes `sheet.png`, `kinds.json`, `words.json` and `README.md` to
`src/pali/art`. The font comes from the Debian package
fonts-noto-color-emoji, the names that are compared with ours from
unicode-cldr-core (optional: without it the names in the present files
are kept). `--check` writes
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
CLDR = Path("/usr/share/unicode/cldr/common/annotations")
LANGUAGES = ("en", "de", "fr", "es", "zh")
CELL, MARGIN, COLUMNS = 64, 1, 8
STRIKE = 109  # the one bitmap size that the font holds, in pixels

# kind, code point of the drawing, code point whose name translates it
# (a face is drawn where the animal is meant).
FIRST = """
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

# kind | German | French | Spanish | Chinese; gender before the word, the
# plural after a comma; the measure word before the Chinese name. A line
# that ends in a bar goes on in the next.
WORDS = """
cat | f Katze, Katzen | m chat, chats | m gato, gatos | 只 猫
dog | m Hund, Hunde | m chien, chiens | m perro, perros | 只 狗
fox | m Fuchs, Füchse | m renard, renards | m zorro, zorros | 只 狐狸
lion | m Löwe, Löwen | m lion, lions | m león, leones | 头 狮子
frog | m Frosch, Frösche | f grenouille, grenouilles | f rana, ranas | 只 青蛙
panda | m Panda, Pandas | m panda, pandas | m panda, pandas | 只 熊猫
pig | n Schwein, Schweine | m cochon, cochons | m cerdo, cerdos | 头 猪
penguin | m Pinguin, Pinguine |
  m pingouin, pingouins | m pingüino, pingüinos | 只 企鹅
octopus | m Oktopus, Oktopusse | f pieuvre, pieuvres | m pulpo, pulpos | 只 章鱼
crab | m Krebs, Krebse | m crabe, crabes | m cangrejo, cangrejos | 只 螃蟹
turtle | f Schildkröte, Schildkröten |
  f tortue, tortues | f tortuga, tortugas | 只 乌龟
butterfly | m Schmetterling, Schmetterlinge |
  m papillon, papillons | f mariposa, mariposas | 只 蝴蝶
bee | f Biene, Bienen | f abeille, abeilles | f abeja, abejas | 只 蜜蜂
whale | m Wal, Wale | f baleine, baleines | f ballena, ballenas | 头 鲸鱼
apple | m Apfel, Äpfel | f pomme, pommes | f manzana, manzanas | 个 苹果
banana | f Banane, Bananen | f banane, bananes | m plátano, plátanos | 根 香蕉
pizza | f Pizza, Pizzas | f pizza, pizzas | f pizza, pizzas | 块 披萨
mushroom | m Pilz, Pilze | m champignon, champignons | f seta, setas | 朵 蘑菇
tree | m Baum, Bäume | m arbre, arbres | m árbol, árboles | 棵 树
tulip | f Tulpe, Tulpen | f tulipe, tulipes | m tulipán, tulipanes | 朵 郁金香
car | n Auto, Autos | f voiture, voitures | m coche, coches | 辆 汽车
bus | m Bus, Busse | m bus, bus | m autobús, autobuses | 辆 公交车
rocket | f Rakete, Raketen | f fusée, fusées | m cohete, cohetes | 枚 火箭
star | m Stern, Sterne | f étoile, étoiles | f estrella, estrellas | 颗 星星
heart | n Herz, Herzen | m cœur, cœurs | m corazón, corazones | 颗 红心
moon | m Mond, Monde | f lune, lunes | f luna, lunas | 个 月亮
house | n Haus, Häuser | f maison, maisons | f casa, casas | 座 房子
key | m Schlüssel, Schlüssel | f clé, clés | f llave, llaves | 把 钥匙
ball | m Ball, Bälle | m ballon, ballons | m balón, balones | 个 足球
umbrella | m Regenschirm, Regenschirme |
  m parapluie, parapluies | m paraguas, paraguas | 把 雨伞
ghost | n Gespenst, Gespenster |
  m fantôme, fantômes | m fantasma, fantasmas | 个 幽灵
robot | m Roboter, Roboter | m robot, robots | m robot, robots | 个 机器人
duck | f Ente, Enten | m canard, canards | m pato, patos | 只 鸭子
owl | f Eule, Eulen | f chouette, chouettes | m búho, búhos | 只 猫头鹰
elephant | m Elefant, Elefanten |
  m éléphant, éléphants | m elefante, elefantes | 头 大象
snail | f Schnecke, Schnecken |
  m escargot, escargots | m caracol, caracoles | 只 蜗牛
rabbit | m Hase, Hasen | m lapin, lapins | m conejo, conejos | 只 兔子
snake | f Schlange, Schlangen |
  m serpent, serpents | f serpiente, serpientes | 条 蛇
spider | f Spinne, Spinnen | f araignée, araignées | f araña, arañas | 只 蜘蛛
sun | f Sonne, Sonnen | m soleil, soleils | m sol, soles | 个 太阳
fire | n Feuer, Feuer | m feu, feux | m fuego, fuegos | 团 火焰
cactus | m Kaktus, Kakteen | m cactus, cactus | m cactus, cactus | 棵 仙人掌
strawberry | f Erdbeere, Erdbeeren | f fraise, fraises | f fresa, fresas | 颗 草莓
corn | m Maiskolben, Maiskolben |
  m épi de maïs, épis de maïs | f mazorca, mazorcas | 根 玉米
cake | f Torte, Torten | m gâteau, gâteaux | f tarta, tartas | 个 蛋糕
doughnut | m Donut, Donuts | m doughnut, doughnuts | m dónut, dónuts | 个 甜甜圈
cup | f Tasse, Tassen | f tasse, tasses | f taza, tazas | 个 杯子
bicycle | n Fahrrad, Fahrräder | m vélo, vélos | f bicicleta, bicicletas | 辆 自行车
train | m Zug, Züge | m train, trains | m tren, trenes | 列 火车
sailboat | n Segelboot, Segelboote |
  m voilier, voiliers | m velero, veleros | 艘 帆船
airplane | n Flugzeug, Flugzeuge | m avion, avions | m avión, aviones | 架 飞机
guitar | f Gitarre, Gitarren | f guitare, guitares | f guitarra, guitarras | 把 吉他
drum | f Trommel, Trommeln | m tambour, tambours | m tambor, tambores | 面 鼓
crown | f Krone, Kronen | f couronne, couronnes | f corona, coronas | 顶 皇冠
bell | f Glocke, Glocken | f cloche, cloches | f campana, campanas | 个 铃铛
gift | n Geschenk, Geschenke | m cadeau, cadeaux | m regalo, regalos | 份 礼物
book | n Buch, Bücher | m livre, livres | m libro, libros | 本 书
pencil | m Bleistift, Bleistifte | m crayon, crayons | m lápiz, lápices | 支 铅笔
camera | f Kamera, Kameras |
  m appareil photo, appareils photo | f cámara, cámaras | 台 相机
clock | m Wecker, Wecker |
  m réveil, réveils | m despertador, despertadores | 个 闹钟
hat | m Hut, Hüte | m chapeau, chapeaux | m sombrero, sombreros | 顶 帽子
shoe | m Schuh, Schuhe | f chaussure, chaussures | f zapatilla, zapatillas | 只 鞋
anchor | m Anker, Anker | f ancre, ancres | f ancla, anclas | 个 锚
snowman | m Schneemann, Schneemänner |
  m bonhomme de neige, bonshommes de neige |
  m muñeco de nieve, muñecos de nieve | 个 雪人
"""
ARTICLES = {
    "de": {"m": "ein", "f": "eine", "n": "ein"},
    "fr": {"m": "un", "f": "une"},
    "es": {"m": "un", "f": "una"},
}
# feminine, but a stressed a- takes the masculine article
ARTICLE_OF = {"ancla": "un"}
# said by no annotation of CLDR: the character is called "hot beverage"
NOT_IN_CLDR = {"cup", "Tasse", "tasse", "taza", "杯子", "zapatilla"}


def entries() -> list[dict]:
    """The 64 rows of the catalogue, without the names from CLDR."""
    rows = []
    for text, first in ((FIRST, True), (LATER, False)):
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
                    "first": first,
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


def annotations(language: str) -> tuple[dict, dict]:
    """CLDR's short names and keywords by character; {} where not installed."""
    names, keywords = {}, {}
    path = CLDR / f"{language}.xml"
    if path.exists():
        for found in ElementTree.parse(path).getroot().iter("annotation"):
            if found.get("type") == "tts":
                names[found.get("cp")] = found.text
            else:
                keywords[found.get("cp")] = found.text.split(" | ")
    return names, keywords


def add_names(rows: list[dict], names: dict[str, str]) -> None:
    """Put CLDR's short name beside a kind that we call differently."""
    for row in rows:
        name = names.get(chr(int(row["named_by"], 16)), row["kind"])
        if name != row["kind"]:
            row["cldr"] = name


def english(row: dict) -> dict[str, str]:
    """The English forms of a kind."""
    article = "an" if row["kind"][0] in "aeiou" else "a"
    return {
        "name": row["kind"],
        "one": f"{article} {row['kind']}",
        "many": row["plural"],
    }


def european(text: str, language: str) -> dict[str, str]:
    """The forms of "f Katze, Katzen": gender, singular, plural."""
    gender, forms = text.split(" ", 1)
    name, many = forms.split(", ")
    article = ARTICLE_OF.get(name, ARTICLES[language][gender])
    return {"name": name, "gender": gender, "one": f"{article} {name}", "many": many}


def word_rows(rows: list[dict]) -> list[dict]:
    """Every kind in every language, in the order of the catalogue."""
    table = {}
    for line in WORDS.strip().replace(" |\n  ", " | ").splitlines():
        kind, german, french, spanish, chinese = line.split(" | ")
        measure, name = chinese.split()
        table[kind] = {
            "de": european(german, "de"),
            "fr": european(french, "fr"),
            "es": european(spanish, "es"),
            "zh": {"name": name, "measure": measure},
        }
    if list(table) != [row["kind"] for row in rows]:
        raise ValueError("WORDS must hold the kinds of the catalogue in its order")
    return [
        {"kind": row["kind"], "en": english(row), **table[row["kind"]]} for row in rows
    ]


def add_cldr(words: list[dict], rows: list[dict], old: list[dict]) -> None:
    """Put CLDR's short name beside every word, and refuse words it never uses.

    Without CLDR on this machine the short names of the present file stay.
    """
    for language in LANGUAGES:
        names, keywords = annotations(language)
        for i, (word, row) in enumerate(zip(words, rows, strict=True)):
            entry = word[language]
            character = chr(int(row["named_by"], 16))
            if not names:
                entry["cldr"] = old[i][language]["cldr"]
                continue
            entry["cldr"] = names[character]
            known = f" {names[character]} | {' | '.join(keywords[character])} "
            said = f" {entry['name']} " in known
            if not said and entry["name"] not in NOT_IN_CLDR:
                raise ValueError(f"CLDR does not call {character} {entry['name']!r}")


def find_font(name: str = "NotoColorEmoji.ttf") -> Path:
    """The installed font file; OSError where there is none."""
    for folder in FONTS:
        for path in sorted(Path(folder).expanduser().rglob(name)):
            return path
    raise OSError(
        f"{name} was not found under {', '.join(FONTS)}. Install the "
        f"package fonts-noto-color-emoji or give --font."
    )


def in_cell(art: Image.Image) -> Image.Image:
    """Cropped to its paint, 62 px on its longer side, centred in a cell."""
    art = art.crop(art.getchannel("A").getbbox())
    scale = (CELL - 2 * MARGIN) / max(art.size)
    size = tuple(max(1, round(scale * side)) for side in art.size)
    art = art.resize(size, Image.Resampling.LANCZOS)
    cell = Image.new("RGBA", (CELL, CELL))
    cell.paste(art, tuple((CELL - side) // 2 for side in size))
    return cell


def draw(font: ImageFont.FreeTypeFont, character: str) -> Image.Image:
    """One emoji in its cell of 64 x 64 px."""
    wide = Image.new("RGBA", (2 * STRIKE, 2 * STRIKE))
    ImageDraw.Draw(wide).text(
        (STRIKE // 4, STRIKE // 4), character, font=font, embedded_color=True
    )
    return in_cell(wide)


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
- `first`: whether the first world uses it.

`words.json` holds the words of every kind in English, German, French,
Spanish and Chinese (simplified), in the same order:

- `name`: the bare noun; `one`, `many`: with its article, and the plural;
- `gender`: m, f or n, where articles depend on it;
- `measure`: the Chinese word between number and noun;
- `cldr`: the short name of the `named_by` character in that language.

A `name` is CLDR's short name, a part of it, or one of its keywords for
that character; the tool refuses any other but the few that it lists
(CLDR calls the cup a hot beverage). Articles, plurals and measure words
are ours.

The names are from the **Unicode CLDR 41**, © 1991-2022 Unicode, Inc.
(`UNICODE.txt`).

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


def as_lines(rows: list[dict]) -> str:
    """A JSON list with one row a line."""
    lines = (json.dumps(row, ensure_ascii=False) for row in rows)
    return "[\n" + ",\n".join(lines) + "\n]\n"


def main(argv: list[str] | None = None) -> int:
    """Build everything, then compare or write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--font", type=Path, help="path of the font file")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(argv)
    font = options.font or find_font()
    rows = entries()
    check_names(rows)
    names = annotations("en")[0]
    listing, wording = ART / "kinds.json", ART / "words.json"
    if names:
        add_names(rows, names)
    elif listing.exists():
        old = {row["kind"]: row for row in json.loads(listing.read_text("utf-8"))}
        for row in rows:
            if "cldr" in old.get(row["kind"], {}):
                row["cldr"] = old[row["kind"]]["cldr"]
    words = word_rows(rows)
    add_cldr(
        words, rows, json.loads(wording.read_text("utf-8")) if wording.exists() else []
    )
    image = sheet(font, rows)
    text, told = as_lines(rows), as_lines(words)
    if options.check:
        same = (ART / "sheet.png").exists() and listing.exists()
        same = same and listing.read_text("utf-8") == text
        same = same and wording.exists() and wording.read_text("utf-8") == told
        same = same and Image.open(ART / "sheet.png").tobytes() == image.tobytes()
        print("art is up to date" if same else "art differs: run tools/make_art.py")
        return 0 if same else 1
    packed = io.BytesIO()
    image.save(packed, "PNG", optimize=True)
    ART.mkdir(parents=True, exist_ok=True)
    write(ART / "sheet.png", packed.getvalue())
    write(listing, text.encode())
    write(wording, told.encode())
    readme = README.format(source=font_version(font))
    write(ART / "README.md", readme.encode())
    print(f"{len(rows)} drawings, {len(packed.getvalue()) / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
