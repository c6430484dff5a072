"""Fusion: pictures take their place among the words.

Generated from notebooks/13_fusion.ipynb: edit the notebook, then run `make export`.
Each block names the cell it comes from.
"""

from torch import Tensor, nn

__all__ = ["Projector", "place_features"]


# cell cc58abb1
class Projector(nn.Module):
    """One linear layer from the tower's width to the decoder's.

    x         float[B, N, vision width] -> float[B, N, decoder width]
    source    Beyer et al. 2024, section 3.1
    """

    def __init__(self, vision_width: int, decoder_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(vision_width, decoder_width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


# cell 2cd38f30
def place_features(
    x: Tensor, is_image: Tensor, features: Tensor
) -> Tensor:
    """Put image features where the `<image>` placeholders stand, in
    order.

    x           float[B, T, width], token embeddings, already scaled
    is_image    bool[B, T], True on placeholders
    features    float[M, N, width], M pictures in row order, not scaled
    returns     float[B, T, width]
    raises      ValueError if placeholders and features differ in
                number, or features have another width
    """
    if features.dim() != 3 or features.shape[-1] != x.shape[-1]:
        raise ValueError(
            "features must be float [pictures, patches, "
            f"{x.shape[-1]}], got {list(features.shape)}"
        )
    slots, patches = (
        int(is_image.sum()),
        features.shape[0] * features.shape[1],
    )
    if slots != patches:
        raise ValueError(
            f"the prompts reserve {slots} <image> tokens but the "
            f"pictures give {patches} features ({features.shape[0]} "
            f"pictures of {features.shape[1]}); build them with the "
            "model's own processor"
        )
    return x.masked_scatter(is_image[..., None], features.to(x.dtype))
