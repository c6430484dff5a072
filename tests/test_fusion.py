"""Fusion against a slow loop, and the checks that see a picture fade or slip."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pali.fusion import Projector, place_features
from tiny import IMAGE_ID, PATCHES, tiny_model, tiny_pixels, tiny_rows


def place_by_loop(x, is_image, features):
    """One row at a time, in the order in which a person would count."""
    out, stock = x.clone(), iter(features.reshape(-1, features.shape[-1]))
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            if is_image[b, t]:
                out[b, t] = next(stock)
    return out


@given(
    counts=st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(any),
    patches=st.integers(1, 5),
    seed=st.integers(0, 2**16),
)
def test_each_feature_stands_where_the_loop_puts_it(counts, patches, seed):
    generator = torch.Generator().manual_seed(seed)
    B, T, D = len(counts), 3 * patches + 4, 3
    is_image = torch.zeros(B, T, dtype=torch.bool)
    for b, count in enumerate(counts):  # pictures anywhere in the row, not in front
        places = torch.randperm(T, generator=generator)[: count * patches]
        is_image[b, places] = True
    x = torch.randn(B, T, D, generator=generator)
    features = torch.randn(sum(counts), patches, D, generator=generator)
    got = place_features(x, is_image, features)
    assert got.equal(place_by_loop(x, is_image, features))  # moved, not computed


def test_projector_is_a_matrix_and_a_bias():
    torch.manual_seed(0)
    projector = Projector(7, 5)
    x = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(1))
    weight, bias = (p.detach().double().numpy() for p in projector.parameters())
    want = np.einsum("bnv,dv->bnd", x.double().numpy(), weight) + bias
    got = projector(x).detach().double().numpy()
    # worst of 300 draws: 3.5e-7; without the bias 0.1 and more
    np.testing.assert_allclose(got, want, rtol=0, atol=4e-6)


@pytest.mark.parametrize("places", [0, 5, 7, 12])
def test_a_wrong_number_of_placeholders_is_refused(places):
    is_image = torch.arange(12)[None] < places
    with pytest.raises(ValueError, match=f"reserve {places} .* give 6 features"):
        place_features(torch.zeros(1, 12, 4), is_image, torch.ones(2, 3, 4))


@pytest.mark.parametrize("shape", [(1, 6, 8), (1, 6, 2), (6, 4), (1, 2, 3, 4)])
def test_features_of_another_width_or_form_are_refused(shape):
    is_image = torch.arange(12)[None] < 6
    with pytest.raises(ValueError, match=r"\[pictures, patches, 4\]"):
        place_features(torch.zeros(1, 12, 4), is_image, torch.ones(shape))


def test_features_take_the_type_of_the_words():
    x = torch.zeros(1, 3, 2, dtype=torch.bfloat16)
    is_image = torch.tensor([[True, False, False]])
    out = place_features(x, is_image, torch.full((1, 1, 2), 1 / 3))
    assert out.dtype == torch.bfloat16
    assert out[0, 0].equal(torch.full((2,), 1 / 3).bfloat16())


def test_gradients_reach_features_and_words_but_not_placeholders():
    x = torch.zeros(1, 4, 2, requires_grad=True)
    features = torch.zeros(1, 2, 2, requires_grad=True)
    is_image = torch.tensor([[True, True, False, False]])
    place_features(x, is_image, features).sum().backward()
    assert features.grad.equal(torch.ones(1, 2, 2))
    assert x.grad[0, :, 0].tolist() == [0, 0, 1, 1]


def entering_rows(model, features):
    """What enters block 0: image rows and text rows of one prompt."""
    ids, _ = tiny_rows([6])
    trace = {}
    model(None, ids, features=features, trace=trace)
    x = trace["decoder.embedded"][0]
    return ids[0], x[:PATCHES], x[PATCHES:]


def test_words_are_scaled_by_the_root_of_the_width_and_features_are_not():
    model = tiny_model()
    features = model.encode(tiny_pixels(1))
    ids, image, text = entering_rows(model, features)
    assert image.equal(features[0])
    want = model.decoder.embedding[ids[PATCHES:]] * 32**0.5
    torch.testing.assert_close(text, want, rtol=1e-6, atol=0)


def test_the_two_bars_notice_features_divided_by_the_root_of_the_width():
    model = tiny_model()
    features = model.encode(tiny_pixels(1))

    def bar(rows):
        return rows.square().mean().sqrt()

    _, image, text = entering_rows(model, features)
    _, faded, same = entering_rows(model, features / 32**0.5)
    assert bar(same) == bar(text)
    assert bar(image) / bar(faded) > 5  # sqrt(32) = 5.7


def test_both_bookkeepings_of_the_scale_agree():
    # divide the features, then multiply the whole sequence: the way of older programs
    model, root = tiny_model(), 32**0.5
    ids, _ = tiny_rows([6, 6])
    features, is_image = model.encode(tiny_pixels(2)), ids == IMAGE_ID
    ours = place_features(model.decoder.embed(ids), is_image, features)
    words = model.decoder.embedding[ids.masked_fill(is_image, 0)]
    theirs = place_features(words, is_image, features / root) * root
    # worst of 100 draws: 2.4e-7; a forgotten half moves them by 1.6 and more
    torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-6)


def answers(model, ids, features):
    return model(None, ids, features=features, last_only=True)[:, 0]


def test_permuting_pictures_permutes_answers():
    model = tiny_model()
    ids = tiny_rows([6])[0].expand(4, -1)
    features, order = model.encode(tiny_pixels(4)), torch.tensor([2, 0, 3, 1])
    p, q = answers(model, ids, features), answers(model, ids, features[order])
    # equal in 100 draws; another picture moves the logits by 0.03 and more
    torch.testing.assert_close(q, p[order], rtol=0, atol=2e-6)
    assert (p[:, None] - p[None]).abs().amax(dim=-1)[~torch.eye(4).bool()].min() > 1e-3


def test_the_blindfold_is_noticed():
    model = tiny_model()
    ids = tiny_rows([6])[0].expand(3, -1)
    features = model.encode(tiny_pixels(3))
    blind = answers(model, ids, features[:1].expand_as(features))
    assert (blind - blind[:1]).abs().max() < 1e-6
    seeing = answers(model, ids, features)
    assert (seeing - seeing[:1]).abs().amax(dim=-1)[1:].min() > 1e-3


def test_rows_take_as_many_pictures_as_they_have_places_for():
    model = tiny_model()
    features = model.encode(tiny_pixels(3))
    ids, valid = tiny_rows([6, 6 + PATCHES])
    ids[1, PATCHES : 2 * PATCHES] = IMAGE_ID  # the longer row holds two pictures
    rows = model.embed(ids, features)
    assert rows[0, PATCHES : 2 * PATCHES].equal(features[0])  # behind 16 of padding
    assert rows[1, : 2 * PATCHES].equal(features[1:].flatten(0, 1))
