"""Every chapter emptied, the book's bodies put back, and checked as a reader would.

    python tests/workbooks.py [CHAPTER ...]

Runs the cells of each chapter, so it takes minutes; `test_workbook.py` does the same
for short ones. Prints a line a chapter; exit code 1 if a part differs.
"""

import sys
import tempfile
import time
from pathlib import Path

from pali import workbook
from test_workbook import EXPORTING, refilled, saved


def main(names: list[str]) -> int:
    wrong = 0
    for path in EXPORTING:
        if names and path.stem[3:] not in names:
            continue
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            made = saved(Path(folder), path.name, refilled(path))
            found = workbook.check_file(made, quick=True)
        seconds = time.perf_counter() - started
        differ = {n: r.line() for n, r in found.items() if r.differs or r.unwritten}
        silent = [n for n, r in found.items() if not r.agreed and n not in differ]
        print(f"{path.stem:<20} {len(found):3} parts {seconds:6.1f} s", end="  ")
        print("never called:" if silent else "", ", ".join(silent), flush=True)
        for name, line in differ.items():
            print(f"    {name}  {line}")
        wrong += bool(differ)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
