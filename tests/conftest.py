"""What every test runs under: two threads, no display, laws checked without a clock."""

import os

os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may fetch anything

import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "local")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
