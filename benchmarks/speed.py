"""Speed side by side: ours and `transformers` in turns, one table, JSON to keep.

    python -m pali bench                       every row, full size
    python -m pali bench --quick               a slice of the model, a minute or two
    python -m pali bench --only decode_bf16    one row, or a group of rows
    python -m pali bench --column masked       as on a machine without a bf16 unit

Each side is a process of its own (`sides.py`); both read the same checkpoint folder
(`checkpoint.py`). What is compared is checked first: the same tokens in float32, the
same logits within bfloat16's reach. `targets.py` has the rows.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
from checkpoint import default_cache, is_complete
from targets import BY_NAME, GROUPS, ROWS, SECONDS, Row, met, wanted

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
MASK = "AVX512_CORE_VNNI"  # oneDNN then does without the bf16 unit
TOKENS = 9  # of an answer: one prefill, eight steps
ATTENTION = ("sdpa", "eager")
LENGTHS = [1, 128, 256, 384, 512]


@dataclass
class Context:
    """How this run measures."""

    size: str
    rounds: int
    column: str
    cache: Path
    names: list[str]
    command: str
    env: dict[str, str]
    machine: dict = field(default_factory=dict)
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)

    def wants(self, *names: str) -> bool:
        return any(name in self.names for name in names)

    def folder(self, dtype: str) -> str:
        return str(self.cache / f"{self.size}-{dtype}")

    @property
    def probe(self) -> dict:
        """How the memory is probed: far more than a cache holds is read."""
        if self.size == "tiny":
            return {"gigabytes": 0.01, "seconds": 0.05}
        return {"gigabytes": 2.0, "seconds": 2.0}


class Side:
    """A process that answers commands; see `sides.py`."""

    def __init__(self, kind: str, context: Context) -> None:
        self.kind = kind
        self.noise = tempfile.TemporaryFile("w+")  # noqa: SIM115  what libraries say
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "sides.py"), kind],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.noise,
            text=True, env=context.env,
        )  # fmt: skip

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *error) -> None:
        with suppress(BrokenPipeError):  # it may have ended by itself
            self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.noise.close()

    def ask(self, do: str, **arguments) -> dict:
        """Have something done; RuntimeError with what went wrong."""
        request = json.dumps({"do": do} | arguments)
        try:
            self.process.stdin.write(request + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"{self.kind} ended in `{do}`: {self.last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self.kind}, {do}: {answer['error']}")
        return answer

    def last_words(self) -> str:
        code = self.process.wait()
        self.noise.seek(0)
        lines = self.noise.read().strip().splitlines() or ["no message"]
        why = " (killed: too little memory?)" if code == -9 else ""
        return f"exit code {code}{why}, {lines[-1]}"

    def anonymous(self) -> int:
        """Bytes of this process that no file holds, now."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        for line in status.splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        raise OSError("this system does not tell anonymous memory")

    def peak(self, do: str, **arguments) -> tuple[dict, int]:
        """The same as `ask`, with the most anonymous memory meanwhile."""
        seen, done = [self.anonymous()], threading.Event()

        def watch() -> None:
            while not done.wait(0.002):
                seen.append(self.anonymous())

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            answer = self.ask(do, **arguments)
        finally:
            done.set()
            thread.join()
        return answer, max(seen)


# -- numbers -------------------------------------------------------------------


def record(
    context: Context, name: str, ours, reference=None, *, values=None, details=None
) -> dict:
    """A row as it is kept.

    ours, reference    one number a round, in the row's unit
    values             what the target is about, one a round; the ratio if left out
    """
    row = BY_NAME[name]
    ratios = None
    if reference is not None:
        ratios = [a / b for a, b in zip(ours, reference, strict=True)]
    values = ratios if values is None else values
    ratio = None if reference is None else median(ours) / median(reference)
    # The ratio of medians where that is the value, else the median of the values.
    value = ratio if values is ratios else median(values)
    limit, stretch = row.limits(context.column)
    return {
        "what": row.what, "unit": row.unit, "value_is": row.value,
        "ours": median(ours),
        "reference": None if reference is None else median(reference),
        "ratio": ratio, "value": value, "spread": [min(values), max(values)],
        "target": limit, "stretch": stretch, "higher_is_better": row.higher,
        "met": met(row, context.column, value), "rounds": len(ours),
        "rounds_ours": list(ours),
        "rounds_reference": None if reference is None else list(reference),
        "details": details or {},
    }  # fmt: skip


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def compare(ours: Side, theirs: Side, attention: str) -> dict:
    """How alike the logits are, how many tokens are equal, and the times.

    The logits of prefill and of the first step are compared, the least alike counts; a
    step only of rows whose first token is the same, since others have read another.
    """
    with tempfile.TemporaryDirectory() as place:
        a, b = (str(Path(place) / name) for name in ("ours.npy", "theirs.npy"))
        mine = ours.ask("answer", count=TOKENS, path=a)
        other = theirs.ask("answer", count=TOKENS, attention=attention, path=b)
        logits = np.load(a), np.load(b)  # [2, rows, vocabulary]
    pairs = [
        (x, y)
        for m, o in zip(mine["tokens"], other["tokens"], strict=True)
        for x, y in zip(m, o, strict=True)
    ]
    alike = [cosine(x, y) for x, y in zip(logits[0][0], logits[1][0], strict=True)]
    for row, (m, o) in enumerate(zip(mine["tokens"], other["tokens"], strict=True)):
        if m[0] == o[0]:
            alike.append(cosine(logits[0][1, row], logits[1][1, row]))
    return {
        "cosine": min(alike), "tokens_equal": sum(x == y for x, y in pairs),
        "tokens": len(pairs), "prefill": other["prefill"],
        "step": median(other["steps"]),
    }  # fmt: skip


def agree(ours: Side, theirs: Side, attention: str, exact: bool) -> dict:
    """The same, for sides that must compute the same; RuntimeError if they do not.

    exact    also every token; in bfloat16 near ties may fall either way
    """
    seen = compare(ours, theirs, attention)
    # bfloat16 keeps 8 bits: over 18 layers logits of random weights move by some
    # hundredths of their spread. A wrong mask or picture gives a cosine below 0.9.
    alike, equal, count = seen["cosine"], seen["tokens_equal"], seen["tokens"]
    if not alike > 0.99 or (exact and equal < count):
        raise RuntimeError(
            f"with {attention} attention the sides differ: cosine of the logits "
            f"{alike:.4f}, {equal} of {count} tokens equal"
        )
    return seen


def fastest(ours: Side, theirs: Side, exact: bool) -> tuple[dict, dict]:
    """The reference's better attention for prefill and for steps; what was seen.

    One that is wrong, or fails, is out.
    """
    seen, faults = {}, []
    for name in (ATTENTION[0], *reversed(ATTENTION)):  # the first pays for warming up
        try:
            seen[name] = agree(ours, theirs, name, exact)
        except RuntimeError as error:
            faults.append(str(error))
            seen.pop(name, None)
    if not seen:
        raise RuntimeError("; ".join(faults))
    best = {
        phase: min(seen, key=lambda name: seen[name][phase])
        for phase in ("prefill", "step")
    }
    return best, {"attention": best, "checks": seen, "faults": faults}


# -- the groups of rows --------------------------------------------------------


def theirs_once(side: Side, best: dict) -> tuple[float, float]:
    """Prefill and step of the reference, each under its better attention."""
    runs = {
        name: side.ask("answer", count=TOKENS, attention=name)
        for name in sorted(set(best.values()))
    }
    step = median(runs[best["step"]]["steps"])
    return runs[best["prefill"]]["prefill"], step


def once(side: Side) -> tuple[float, float]:
    """Prefill and step of one of ours."""
    run = side.ask("answer", count=TOKENS)
    return run["prefill"], median(run["steps"])


def columns(pairs: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [a for a, _ in pairs], [b for _, b in pairs]


def roofline(context, name: str, size: int, steps, reads, against) -> dict:
    """Bytes of a step over its seconds, against the best that reading gave."""
    best = max(reads)
    ours = [size / s / 1e9 for s in steps]
    theirs = [size / s / 1e9 for s in against]
    shares = [v * 1e9 / best for v in ours]
    details = {
        "bytes": size, "read_bandwidth": best, "read_bandwidth_rounds": reads,
        "least_seconds": size / best, "seconds": median(steps),
    }  # fmt: skip
    return record(context, name, ours, theirs, values=shares, details=details)


def half(context: Context) -> Iterator[tuple[str, dict]]:
    """bfloat16 and int8: all sides map one file."""
    yield from side_by_side(context, "bfloat16", "bf16")


def single(context: Context) -> Iterator[tuple[str, dict]]:
    """float32: both sides map one file, of 11.7 GB at full size."""
    yield from side_by_side(context, "float32", "float32")


def side_by_side(context, dtype: str, short: str) -> Iterator[tuple[str, dict]]:
    """Prefill, steps and roofline of one dtype; int8 and batches with bfloat16."""
    names = [f"{what}_{short}" for what in ("prefill", "decode", "roofline")]
    int8 = dtype == "bfloat16" and context.wants("prefill_int8", "decode_int8")
    batch = dtype == "bfloat16" and context.wants("batch4")
    with ExitStack() as stack:
        ours, theirs = (
            stack.enter_context(Side(kind, context)) for kind in ("ours", "reference")
        )
        if int8:
            small = stack.enter_context(Side("ours", context))
        if context.wants(names[2]):
            probe = stack.enter_context(Side("ours", context))
        theirs.ask("load", folder=context.folder(dtype), dtype=None)
        tokens = theirs.ask("prompt", rows=1)["tokens"]
        rows = [1, tokens, *([4] if batch else [])]
        job = {"folder": context.folder(dtype), "dtype": None, "rows": rows}
        loaded = ours.ask("load", **job, precision=dtype)
        ours.ask("prompt", rows=1)
        best, details = fastest(ours, theirs, exact=dtype == "float32")
        details["prepared"] = loaded["chosen"]
        details["prepare_seconds"] = loaded["prepare_seconds"]
        if int8:
            try:
                held = small.ask(
                    "load", **job | {"rows": [1, tokens]}, precision="int8"
                )
                small.ask("prompt", rows=1)
                alike = compare(small, theirs, best["step"])["cosine"]
            except RuntimeError as error:
                int8 = False
                for name in ("prefill_int8", "decode_int8"):
                    yield name, {"error": str(error)}
        if context.wants(*names) or int8:
            a, b, c, reads = [], [], [], []
            for r in range(context.rounds):
                a.append(once(ours))
                b.append(theirs_once(theirs, best))
                if int8:
                    c.append(once(small))
                if context.wants(names[2]):
                    reads.append(probe.ask("bandwidth", **context.probe)["best"])
                context.say(f"  {r + 1}/{context.rounds}: {told(a, b, c)}")
            (pa, sa), (pb, sb) = columns(a), columns(b)
            yield names[0], record(context, names[0], pa, pb, details=details)
            yield names[1], record(context, names[1], sa, sb, details=details)
            if reads:
                # half of the steps come later than this one, half earlier
                place = {"length": tokens + TOKENS // 2, "dtype": dtype}
                size = ours.ask("step_bytes", **place)["bytes"]
                yield names[2], roofline(context, names[2], size, sa, reads, sb)
        if int8:
            pc, sc = columns(c)
            held = {"prepared": held["chosen"], "cosine": alike}
            yield "prefill_int8", record(context, "prefill_int8", pc, pb, details=held)
            held = held | {"own_bf16": median(sa), "own_bf16_rounds": sa}
            shares = [x / y for x, y in zip(sc, sa, strict=True)]
            found = record(context, "decode_int8", sc, sb, values=shares, details=held)
            yield "decode_int8", found
        if batch:
            held = {"prepared": loaded["chosen"], "attention": best}
            yield "batch4", batch4(context, ours, theirs, best, held)


def told(a, b, c=()) -> str:
    """One round in words: the last of each."""
    words = [f"ours {a[-1][0]:.3g} + {a[-1][1]:.3g} s a token"]
    words.append(f"reference {b[-1][0]:.3g} + {b[-1][1]:.3g}")
    words += [f"int8 {c[-1][0]:.3g} + {c[-1][1]:.3g}"] if c else []
    return ", ".join(words)


def batch4(context, ours: Side, theirs: Side, best: dict, details: dict) -> dict:
    """Four pictures and prompts in one batch: the whole of a short answer."""
    for side in (ours, theirs):
        side.ask("prompt", rows=4)
    details = details | {"checks": agree(ours, theirs, best["prefill"], exact=False)}
    a, b = [], []
    for r in range(context.rounds):
        a.append(once(ours))
        b.append(theirs_once(theirs, best))
        context.say(f"  four prompts, {r + 1}/{context.rounds}: {told(a, b)}")
    whole = [[p + (TOKENS - 1) * s for p, s in side] for side in (a, b)]
    phases = {
        "prefill_ratio": median(x[0] for x in a) / median(x[0] for x in b),
        "step_ratio": median(x[1] for x in a) / median(x[1] for x in b),
    }
    return record(context, "batch4", *whole, details=details | phases)


def read_through(path: Path) -> None:
    """Bring a file into the system's cache."""
    with path.open("rb", buffering=0) as file:
        block = bytearray(1 << 24)
        while file.readinto(block):
            pass


def load(context: Context) -> Iterator[tuple[str, dict]]:
    """Fresh processes: loading, the first prefill, memory while generating."""
    folder = context.folder("bfloat16")
    got = {"ours": [], "reference": []}
    for r in range(context.rounds):
        for kind, rows in got.items():
            read_through(Path(folder) / "model.safetensors")
            with Side(kind, context) as side:
                before = side.ask("hello")["anonymous"]
                done = side.ask("load", folder=folder, dtype=None)
                side.ask("prompt", rows=1)
                run, peak = side.peak("answer", count=TOKENS)
            rows.append(
                {
                    "seconds": done["seconds"],
                    "memory": (done["anonymous"] - before) / 1e9,
                    "first": run["prefill"],
                    "peak": (peak - before) / 1e9,
                }
            )
        last = got["ours"][-1]
        context.say(
            f"  {r + 1}/{context.rounds}: loads in {last['seconds']:.2f} s with "
            f"{last['memory']:.3f} GB, first prefill {last['first']:.3g} s, "
            f"peak {last['peak']:.3f} GB"
        )

    def pair(key: str) -> tuple[list[float], list[float]]:
        return [x[key] for x in got["ours"]], [x[key] for x in got["reference"]]

    for name, key in (
        ("load_seconds", "seconds"), ("load_ratio", "seconds"),
        ("load_memory", "memory"), ("first_prefill", "first"), ("peak_memory", "peak"),
    ):  # fmt: skip
        ours, theirs = pair(key)
        by_ratio = name in ("load_ratio", "first_prefill")
        values = None if by_ratio else ours
        yield name, record(context, name, ours, theirs, values=values)


def questions(side: Side, place: Path, count: int) -> list[tuple[str, str]]:
    """Pictures of scenes and prompts about them, four to a scene."""
    asked = []
    for seed in range(count):
        path = str(place / f"{seed}.png")
        kind = side.ask("scene", seed=seed, path=path)["kind"]
        prompts = ("caption en", f"detect {kind}", f"segment {kind}")
        asked += [(p, path) for p in (*prompts, f"answer en how many {kind}?")]
    return asked


def mini(context: Context) -> Iterator[tuple[str, dict]]:
    """The shipped model: whole answers, from the picture to the text."""
    with (
        tempfile.TemporaryDirectory() as place,
        Side("ours", context) as ours,
        Side("ours", context) as fast,
        Side("reference", context) as theirs,
    ):
        folder = ours.ask("load", folder="mini", dtype="float32")["folder"]
        fast.ask("load", folder="mini", dtype="float32", precision="float32")
        theirs.ask("load", folder=folder, dtype="float32")
        asked = questions(ours, Path(place), 2)
        ids = [ours.ask("prompt_ids", prompt=prompt)["ids"] for prompt, _ in asked]

        def mine(side: Side) -> list[dict]:
            return [side.ask("text", prompt=p, picture=x, tokens=64) for p, x in asked]

        def other(attention: str) -> list[dict]:
            return [
                theirs.ask("text", prompt=i, picture=x, tokens=64, attention=attention)
                for i, (_, x) in zip(ids, asked, strict=True)
            ]

        mine(fast)
        said, seen, texts = mine(ours), {}, []
        for name in ATTENTION:
            other(name)  # warm up
            answers = other(name)
            texts = [ours.ask("decode", ids=row["ids"])["text"] for row in answers]
            if texts == [row["text"] for row in said]:
                seen[name] = sum(row["seconds"] for row in answers)
        if not seen:
            raise RuntimeError(f"the answers differ: {texts}, {said}")
        best = min(seen, key=seen.get)
        a, b, prepared = [], [], []
        for r in range(context.rounds):
            a.append([row["seconds"] for row in mine(ours)])
            b.append([row["seconds"] for row in other(best)])
            prepared.append(sum(row["seconds"] for row in mine(fast)))
            context.say(
                f"  {r + 1}/{context.rounds}: {len(asked)} answers in {sum(a[-1]):.3g} "
                f"s, reference {sum(b[-1]):.3g} s"
            )
        details = {
            "answers": [row["text"] for row in said], "attention": best,
            "prompts": [prompt for prompt, _ in asked],
            "prepared_seconds": median(prepared),
            "ratios": [
                median(x) / median(y)
                for x, y in zip(zip(*a, strict=True), zip(*b, strict=True), strict=True)
            ],
        }  # fmt: skip
        sums = [sum(row) for row in a], [sum(row) for row in b]
        yield "mini_answer", record(context, "mini_answer", *sums, details=details)


def preprocess(context: Context) -> Iterator[tuple[str, dict]]:
    """A picture of 640 x 480 to 224 x 224, the same bits on both sides."""
    count = 20 if context.size == "full" else 5
    with (
        tempfile.TemporaryDirectory() as place,
        Side("ours", context) as ours,
        Side("reference", context) as theirs,
    ):
        path = str(Path(place) / "picture.png")
        ours.ask("scene", seed=0, path=path, size=[640, 480])
        job = {"picture": path, "size": 224, "count": count}
        a, b = ours.ask("preprocess", **job), theirs.ask("preprocess", **job)
        if a["digest"] != b["digest"]:
            raise RuntimeError("the two sides give different pixels")
        rows = {"ours": [], "theirs": [], "resize": []}
        for _ in range(context.rounds):
            rows["ours"].append(median(ours.ask("preprocess", **job)["seconds"]))
            rows["theirs"].append(median(theirs.ask("preprocess", **job)["seconds"]))
            rows["resize"].append(median(ours.ask("resize", **job)["seconds"]))
        details = {"resize_alone": median(rows["resize"]), "bit_exact": True}
        yield (
            "preprocess",
            record(
                context, "preprocess", rows["ours"], rows["theirs"], details=details
            ),
        )


def imports(context: Context) -> Iterator[tuple[str, dict]]:
    """Whole processes: `import pali` and a first load, against `import torch`."""

    def seconds(code: str) -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], env=context.env, check=True)
        return time.perf_counter() - began

    codes = ("import pali; pali.load('mini')", "import torch")
    for code in codes:
        seconds(code)  # files into the cache
    a, b = [], []
    for r in range(context.rounds):
        a.append(seconds(codes[0]))
        b.append(seconds(codes[1]))
        context.say(f"  {r + 1}/{context.rounds}: {a[-1]:.2f} s, torch {b[-1]:.2f} s")
    more = [x - y for x, y in zip(a, b, strict=True)]
    yield "import_load", record(context, "import_load", a, b, values=more)


def growth(context: Context) -> Iterator[tuple[str, dict]]:
    """What a step costs late in an answer, and a prefill of many patches."""
    folder = context.folder("bfloat16")
    if context.wants("growth_decode"):
        with Side("ours", context) as ours:
            ours.ask("load", folder=folder, dtype=None, precision="bfloat16")
            ours.ask("prompt", rows=1)
            rounds = []
            for r in range(context.rounds):
                seen = ours.ask("at_lengths", lengths=LENGTHS, count=4)["seconds"]
                rounds.append({int(n): median(s) for n, s in seen.items()})
                context.say(f"  {r + 1}/{context.rounds}: {compact(rounds[-1])}")
        steps = {n: median(r[n] for r in rounds) for n in LENGTHS}
        change = [max(abs(r[n] / r[1] - 1) for n in LENGTHS) for r in rounds]
        found = record(
            context, "growth_decode", [r[LENGTHS[-1]] for r in rounds], values=change,
            details={"seconds": steps, "rounds": rounds},
        )  # fmt: skip
        # of the medians: a single round's largest of five is mostly noise
        found["value"] = max(abs(steps[n] / steps[1] - 1) for n in LENGTHS)
        found["met"] = met(BY_NAME["growth_decode"], context.column, found["value"])
        yield "growth_decode", found
    if context.wants("growth_prefill"):
        yield "growth_prefill", growth_prefill(context, folder)


def compact(seconds: dict) -> str:
    return ", ".join(f"{n}: {1e3 * s:.3g} ms" for n, s in seconds.items())


def growth_prefill(context: Context, folder: str) -> dict:
    """Three and two layers of the two towers: time beside the arithmetic."""
    sides = [32, 64, 128] if context.size == "tiny" else [224, 448, 896]
    with Side("ours", context) as ours:
        ours.ask("load_curve", folder=folder, sides=sides, layers=[3, 2])
        rounds = []
        for r in range(context.rounds):
            rounds.append(ours.ask("curve")["rows"])
            seen = {row["patches"]: row["seconds"] for row in rounds[-1]}
            context.say(f"  {r + 1}/{context.rounds}: {compact(seen)}")
    rate = [[row["seconds"] / row["flop"] for row in rows] for rows in rounds]
    curve = [
        {
            "patches": row["patches"], "flop": row["flop"],
            "seconds": median(rows[i]["seconds"] for rows in rounds),
        }
        for i, row in enumerate(rounds[0])
    ]  # fmt: skip
    return record(
        context, "growth_prefill", [rows[-1]["seconds"] for rows in rounds],
        values=[row[-1] / row[0] for row in rate],
        details={"curve": curve, "layers": {"vision": 3, "decoder": 2}},
    )  # fmt: skip


def quality(context: Context) -> Iterator[tuple[str, dict]]:
    """int8 on the shipped model's test scenes."""
    scenes = 40 if context.size == "full" else 2
    with Side("ours", context) as ours:
        seen = ours.ask("agreement", folder="mini", precision="int8", scenes=scenes)
    details = seen | {"scenes": scenes}
    for name, key in (("int8_agreement", "agreement"), ("int8_cosine", "cosine")):
        found = record(context, name, [seen[key]], values=[seen[key]], details=details)
        yield name, found


def steps(context: Context) -> Iterator[tuple[str, dict]]:
    """The usual loop, then one idea after another, on a third of the layers."""
    from baseline import IDEAS

    folder, names = context.folder("bfloat16"), list(IDEAS)
    chosen = [names[:i] for i in range(len(names) + 1)]
    labels = ["as usual", *names, "ours", "prepared"]
    layers, count = [9, 6], 5
    with Side("ours", context) as plain, Side("ours", context) as fast:
        plain.ask("load", folder=folder, dtype=None, layers=layers)
        plain.ask("prompt", rows=1)
        done = fast.ask(
            "load", folder=folder, dtype=None, layers=layers, precision="bfloat16"
        )
        fast.ask("prompt", rows=1)
        rounds = []
        for r in range(context.rounds + 1):
            runs = [plain.ask("baseline", ideas=i, count=count) for i in chosen]
            runs.append(plain.ask("answer", count=count))
            runs.append(fast.ask("answer", count=count))
            if r == 0:  # warm up, and look whether they agree
                tokens = [run["tokens"] for run in runs]
                continue
            rounds.append([(x["prefill"], median(x["steps"])) for x in runs])
            seen = [f"{label} {s:.3g}" for label, (_, s) in zip(labels, rounds[-1])]  # noqa: B905
            context.say(f"  {r}/{context.rounds}: {', '.join(seen)}")
    details = {
        "layers": {"vision": 9, "decoder": 6}, "prepared": done["chosen"],
        "ideas": IDEAS,
        "steps": [
            {
                "name": label,
                "prefill": median(row[i][0] for row in rounds),
                "token": median(row[i][1] for row in rounds),
                "same_tokens": tokens[i] == tokens[0],
            }
            for i, label in enumerate(labels)
        ],
    }  # fmt: skip
    whole = [[p + (count - 1) * s for p, s in row] for row in rounds]
    yield (
        "steps",
        record(
            context, "steps", [row[-1] for row in whole], [row[0] for row in whole],
            details=details,
        ),
    )  # fmt: skip


RUNNERS = {
    "half": half, "single": single, "load": load, "mini": mini,
    "preprocess": preprocess, "import": imports, "growth": growth,
    "quality": quality, "steps": steps,
}  # fmt: skip


# -- the run -------------------------------------------------------------------


def bf16_unit() -> bool:
    from pali.__main__ import bf16_unit

    return bf16_unit()


def choose_column(asked: str | None) -> str:
    """The column of this machine, or the one that stands in for another."""
    own = "unit" if bf16_unit() else "none"
    if asked in (None, own):
        return own
    if asked == "masked" and own == "unit":
        return "masked"
    raise ValueError(
        f"--column {asked} cannot be measured here: this machine has "
        f"{'a' if own == 'unit' else 'no'} unit for bfloat16"
    )


def environment(column: str, threads: int | None) -> dict[str, str]:
    """What the sides run under."""
    env = dict(os.environ) | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    env.pop("ONEDNN_MAX_CPU_ISA", None)
    if column == "masked":
        env["ONEDNN_MAX_CPU_ISA"] = MASK
    if threads is not None:
        env["OMP_NUM_THREADS"] = str(threads)
    return env


def instructions(env: dict[str, str]) -> str:
    """What oneDNN says it uses, in its own words."""
    code = (
        "import torch; a = torch.ones(256, 256).bfloat16(); "
        "torch.nn.functional.linear(a, a)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=env | {"ONEDNN_VERBOSE": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    for line in done.stdout.splitlines():
        if "cpu,isa:" in line:
            return line.partition("cpu,isa:")[2].strip()
    return "not said"


def describe(context: Context) -> dict:
    """This machine; ValueError if the bf16 unit is in use where it must not be."""
    with Side("ours", context) as side:
        found = side.ask("machine", side=256 if context.size == "tiny" else 2048)
    found["onednn"] = instructions(context.env)
    used = "bfloat16" in found["onednn"] or "AMX" in found["onednn"]
    if used != (context.column == "unit"):
        raise ValueError(
            f"the column is {context.column!r}, but oneDNN uses "
            f"{found['onednn']!r}: the mask did not take effect"
        )
    return found


def folders(context: Context) -> list[str]:
    """The dtypes of the random checkpoints that the wanted rows need."""
    groups = {BY_NAME[name].group for name in context.names}
    needs = {
        "bfloat16": {"half", "load", "growth", "steps"} & groups,
        "float32": {"single"} & groups,
    }
    return [dtype for dtype, groups in needs.items() if groups]


def prepare_folder(context: Context, dtype: str) -> None:
    """Write a random checkpoint, unless it is there already."""
    folder = Path(context.folder(dtype))
    if is_complete(folder, context.size, dtype):
        return
    context.cache.mkdir(parents=True, exist_ok=True)
    need = {"full": 2.93e9, "slice": 0.29e9, "tiny": 1e6}[context.size]
    need *= 2 if dtype == "bfloat16" else 4
    if shutil.disk_usage(context.cache).free < 1.05 * need:
        raise OSError(
            f"{context.cache} has no room for a checkpoint of {need / 1e9:.1f} GB: "
            "name another folder with --cache"
        )
    context.say(f"writing {need / 1e9:.1f} GB of random weights to {folder}")
    script = [sys.executable, str(HERE / "checkpoint.py"), str(folder)]
    subprocess.run(
        [*script, context.size, dtype], env=context.env, check=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip


def measure(context: Context, keep: Callable[[str, dict], None]) -> None:
    """Run every group that a wanted row needs; `keep` gets each row as it is there."""
    groups = [
        g for g in GROUPS if context.wants(*(r.name for r in ROWS if r.group == g))
    ]
    for i, group in enumerate(groups, 1):
        names = [r.name for r in ROWS if r.group == group and r.name in context.names]
        expected = f", about {SECONDS[group]} s" if context.size == "full" else ""
        expected = expected if context.column == "unit" else ""
        context.say(f"[{i}/{len(groups)}] {group}: {', '.join(names)}{expected}")
        began, missing = time.perf_counter(), set(names)
        try:
            for name, found in RUNNERS[group](context):
                if name in missing:
                    missing.discard(name)
                    keep(name, found)
            why = f"the group {group} did not measure it"
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            why = " ".join(str(error).split())
        for name in [name for name in names if name in missing]:
            keep(name, {"error": why})
            context.say(f"  {name} failed: {why}")
        context.say(f"  {time.perf_counter() - began:.0f} s")


def read_results(path: Path, column: str) -> dict:
    """Rows that are kept already."""
    if not path.is_file():
        return {"format": 1, "column": column, "rows": {}}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["column"] != column:
            raise ValueError(f"holds the column {found['column']!r}, not {column!r}")
        return found | {"rows": dict(found["rows"])}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no file of results: {error}") from error


def write_results(path: Path, results: dict) -> None:
    """All rows in the order of the table, whole or not at all."""
    from pali._export import write_atomically

    order = [row.name for row in ROWS if row.name in results["rows"]]
    rows = {name: results["rows"][name] for name in order}
    text = json.dumps(results | {"rows": rows}, indent=1, ensure_ascii=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text + "\n")


def is_measured(row: dict | None, context: Context) -> bool:
    """Whether a kept row is of this size and machine, and no failure."""
    if row is None or "error" in row or row["size"] != context.size:
        return False
    keys = context.machine.keys() - {"matmul_peak"}  # which varies a little
    return all(row["machine"].get(k) == context.machine[k] for k in keys)


def number(x: float | None) -> str:
    return "-" if x is None else f"{x:.3g}"


def goal(row: Row, column: str) -> str:
    limit, stretch = row.limits(column)
    sign = ">=" if row.higher else "<="
    words = [] if limit is None else [f"{sign} {limit:g}"]
    words += [] if stretch is None else [f"stretch {stretch:g}"]
    return ", ".join(words) or "reported"


def table(rows: dict[str, dict], column: str) -> str:
    """What was measured, a line a row."""
    head = ("row", "ours", "reference", "ratio", "value", "target", "met", "spread")
    lines = [head]
    for row in ROWS:
        found = rows.get(row.name)
        if found is None:
            continue
        if "error" in found:
            lines.append((row.name, *"-----", "error", found["error"]))
            continue
        low, high = found["spread"]
        verdict = {True: "yes", False: "NO", None: "-"}[found["met"]]
        lines.append(
            (
                row.name,
                f"{number(found['ours'])} {row.unit}",
                number(found["reference"]),
                number(found["ratio"]),
                number(found["value"]),
                goal(row, column),
                verdict,
                f"{number(low)} to {number(high)}",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(7)]
    return "\n".join(
        "  ".join(
            [*(w.ljust(n) for w, n in zip(line[:7], widths, strict=True)), line[7]]
        )
        for line in lines
    )


def list_rows() -> str:
    """Every row, what it is about, and how long its group takes at full size."""
    return "\n".join(
        f"{row.name:17} {row.what:42} group {row.group}, about {SECONDS[row.group]} s"
        for row in ROWS
    )


def command_of(options) -> str:
    """The command that measures the same again."""
    words = ["python -m pali bench", f"--size {options.size}"]
    words += [f"--rounds {options.rounds}"]
    if options.column:
        words.append(f"--column {options.column}")
    if options.threads:
        words.append(f"--threads {options.threads}")
    return " ".join(words)


def run(options) -> int:
    """What `python -m pali bench` does; exit code 1 if a row failed."""
    if options.list:
        print(list_rows())
        return 0
    if options.rounds < 1 or (options.threads is not None and options.threads < 1):
        raise ValueError("--rounds and --threads must be 1 or more")
    column, names = choose_column(options.column), wanted(options.only)
    path = Path(options.out) if options.out else None
    if path is None and options.size == "full":
        path = RESULTS / f"{column}.json"
    results = {"format": 1, "column": column, "rows": {}}
    if path is not None:
        results = read_results(path, column)
    kept = results["rows"]
    cache = Path(options.cache) if options.cache else default_cache()
    context = Context(
        options.size, options.rounds, column, cache, names, command_of(options),
        environment(column, options.threads),
    )  # fmt: skip
    measured = {}

    def keep(name: str, found: dict) -> None:
        about = {"size": context.size, "command": f"{context.command} --only {name}"}
        measured[name] = found | about | {"machine": context.machine}
        if path is not None:
            kept[name] = measured[name]
            write_results(path, results)

    context.machine = describe(context)
    if options.resume:
        names[:] = [n for n in names if not is_measured(kept.get(n), context)]
    if names:
        if context.size == "full":
            total = sum(SECONDS[g] for g in {BY_NAME[n].group for n in names})
            slow = "" if column == "unit" else ", several times that without one"
            context.say(f"about {total / 60:.0f} minutes with a bf16 unit{slow}")
        for dtype in folders(context):
            prepare_folder(context, dtype)
        measure(context, keep)
    print(table(measured if measured else kept, column))
    if path is not None:
        print(f"kept in {path}")
    return 1 if any("error" in found for found in measured.values()) else 0
