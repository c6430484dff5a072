"""The mean of two models' weights, as a model folder.

    python tools/mix_models.py FIRST SECOND OUT --share 0.5

Both must have the same shapes and the same tokenizer: a run and the one it went on
from. The mean of such weights often does better than either (Wortsman et al. 2022).
"""

import argparse

import torch

import pali
from pali.weights import save_model


@torch.no_grad()
def mixed(first, second, share: float):
    """(1 - share) of the first model's weights plus share of the second's.

    returns   the second model, changed in place, float32
    raises    ValueError if the weights differ in names or shapes, or share is not
              from 0 to 1
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is from 0 to 1, not {share}")
    a, b = first.state_dict(), second.float().state_dict()
    if {k: v.shape for k, v in a.items()} != {k: v.shape for k, v in b.items()}:
        raise ValueError("the two models have other names or shapes of weights")
    for name, weight in b.items():
        weight.copy_((1 - share) * a[name].float() + share * weight)
    return second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("first", help="a model folder")
    parser.add_argument("second", help="a model folder that went on from it")
    parser.add_argument("out", help="where to write the mean")
    parser.add_argument("--share", type=float, default=0.5, help="of the second")
    options = parser.parse_args()
    first, before = pali.load(options.first)
    second, processor = pali.load(options.second)
    if before.tokenizer.path.read_bytes() != processor.tokenizer.path.read_bytes():
        raise SystemExit("error: the two models have different tokenizers")
    model = mixed(first, second, options.share)
    save_model(model.half(), options.out, processor)


if __name__ == "__main__":
    main()
