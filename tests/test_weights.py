"""Checkpoint folders: every layout, every damage, and nothing copied that need not be.

The folders are written by `transformers` (layouts C and D are its own; A and B are its
names with the levels of the released files put back).
"""

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor
from transformers.models.siglip.image_processing_pil_siglip import (
    SiglipImageProcessorPil,
)

import pali
import pali.weights
from pali import scenes
from pali.decoder import DecoderConfig
from pali.paligemma import DECODERS, PaliGemmaConfig, published_config
from pali.tokens import Processor, Tokenizer
from pali.vision import VisionConfig
from pali.weights import (
    NoDraws,
    config_json,
    load_model,
    read_config,
    save_model,
    write_files,
    write_tensors,
)  # fmt: skip
from pieces import toy_pieces
from reference import (
    ATOL,
    PALIGEMMA_1,
    PALIGEMMA_2,
    assert_agree,
    folder,
    reference_logits,
    rows,
)
from tiny import tiny_model

SHAPES = {"gemma": PALIGEMMA_1, "gemma2": PALIGEMMA_2}
EMBEDDING = "language_model.model.embed_tokens.weight"
HEADS = {"A": "language_model.lm_head.weight", "B": "lm_head.weight"}
HEADS |= {"C": "lm_head.weight", "D": "lm_head.weight"}
transformers.utils.logging.disable_progress_bar()


@cache
def saved(kind: str) -> tuple[dict, str]:
    """Tensors as `transformers` 5 saves them (layout D), and its config.json."""
    place = folder(SHAPES[kind])
    tensors = load_file(place / "model.safetensors")
    return tensors, (place / "config.json").read_text()


def spell(key: str, layout: str) -> str:
    """A key of layout D in another layout."""
    if layout in "AB":
        key = key.replace("vision_tower.", "vision_tower.vision_model.", 1)
    if layout in "BC":
        key = "model." + key.replace("language_model.model.", "language_model.", 1)
    return key


def write(place: Path, tensors: dict, config: str, *, shards: int = 1) -> Path:
    """A checkpoint folder; more than one shard means an index."""
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.json").write_text(config)
    if shards == 1:
        save_file(tensors, place / "model.safetensors")
        return place
    keys, places = sorted(tensors), {}
    for i in range(shards):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {k: tensors[k] for k in keys[i::shards]}
        save_file(part, place / name)
        places |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": places}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    return place


@cache
def expected(kind: str) -> dict:
    """What loading must give, as checked below against the published logits."""
    return load_model(folder(SHAPES[kind])).state_dict()


@pytest.mark.parametrize("kind", SHAPES)
def test_loaded_weights_give_the_published_logits(kind):
    batch = rows(SHAPES[kind], suffix=3)
    model = load_model(folder(SHAPES[kind]))
    with torch.no_grad():
        ours = model(batch.pixels, batch.ids, valid=batch.valid, suffix=batch.suffix)
    assert_agree(ours, reference_logits(SHAPES[kind], batch), batch.valid)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", [False, True], ids=["tied", "head"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("layout", "ABCD")
@pytest.mark.parametrize("kind", SHAPES)
def test_every_layout_loads_equal(kind, layout, shards, head, stored, tmp_path):
    tensors, config = saved(kind)
    tensors = {spell(k, layout): t.to(stored) for k, t in tensors.items()}
    if head:
        tensors[HEADS[layout]] = tensors[spell(EMBEDDING, layout)].clone()
    place = write(tmp_path, tensors, config, shards=shards)
    got = load_model(place).state_dict()
    for name, want in expected(kind).items():
        assert got[name].equal(want.to(stored).float()), name


def test_the_names_that_transformers_holds_in_memory_are_layout_c():
    with torch.device("meta"):
        model = transformers.PaliGemmaForConditionalGeneration(
            transformers.AutoConfig.from_pretrained(folder(PALIGEMMA_2))
        )
    names = {spell(k, "C") for k in saved("gemma2")[0]} | {HEADS["C"]}
    assert set(model.state_dict()) == names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, None])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_come_in_the_type_asked_for(stored, dtype, tmp_path):
    tensors, config = saved("gemma")
    place = write(tmp_path, {k: t.to(stored) for k, t in tensors.items()}, config)
    got = load_model(place, dtype=dtype)
    for name, want in expected("gemma").items():
        value = got.state_dict()[name]
        assert value.dtype == (dtype or stored)
        assert value.equal(want.to(stored).to(dtype or stored))
    assert not got.training


def test_the_shipped_model_loads_by_name():
    model, processor = pali.load("mini")
    assert model.config.vision.image_size == processor.image_size == 128
    assert pali.load_model("mini", dtype=None).decoder.embedding.dtype == torch.float16


def test_a_folder_that_happens_to_be_called_mini_can_be_loaded(tmp_path, monkeypatch):
    write(tmp_path / "mini", *saved("gemma"))
    monkeypatch.chdir(tmp_path)
    assert load_model(Path("mini")).config.decoder.width == 32
    assert load_model("mini").config.decoder.width == 128


def test_a_single_file_counts_before_an_index_as_in_transformers(tmp_path):
    # what remains of an older, sharded model must not win over a newly saved one
    tensors, config = saved("gemma")
    write(tmp_path, {k: t + 1 for k, t in tensors.items()}, config, shards=2)
    write(tmp_path, tensors, config)
    got = load_model(tmp_path).state_dict()
    assert all(got[k].equal(t) for k, t in expected("gemma").items())


# Configurations


def released(name: str, size: int) -> dict:
    """A config.json as the released folders have it: what has its default is left out.

    Written down from the published files, not by our own writer.
    """
    vision = {
        "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
        "model_type": "siglip_vision_model", "num_attention_heads": 16,
        "num_image_tokens": (size // 14) ** 2, "patch_size": 14,
        "projector_hidden_act": "gelu_fast", "vision_use_head": False,
    }  # fmt: skip
    if size != 224:
        vision["image_size"] = size
    text = {
        "paligemma-3b": dict(
            model_type="gemma", hidden_size=2048, intermediate_size=16384,
            num_attention_heads=8, num_hidden_layers=18, num_key_value_heads=1,
        ),
        "paligemma2-3b": dict(
            model_type="gemma2", hidden_size=2304, intermediate_size=9216,
            num_attention_heads=8, num_hidden_layers=26, num_key_value_heads=4,
        ),
        "paligemma2-10b": dict(
            model_type="gemma2", hidden_size=3584, intermediate_size=14336,
            num_attention_heads=16, num_hidden_layers=42, num_key_value_heads=8,
            query_pre_attn_scalar=256, sliding_window=4096,
        ),
        "paligemma2-28b": dict(
            model_type="gemma2", hidden_size=4608, intermediate_size=36864,
            num_attention_heads=32, num_hidden_layers=46, num_key_value_heads=16,
            head_dim=128, query_pre_attn_scalar=144,
        ),
    }[name]  # fmt: skip
    return {
        "model_type": "paligemma", "bos_token_id": 2, "image_token_index": 257152,
        "text_config": text | {"vocab_size": 257216}, "vision_config": vision,
    }  # fmt: skip


@pytest.mark.parametrize("size", [224, 448, 896])
@pytest.mark.parametrize("name", DECODERS)
def test_released_configurations_read_right(name, size, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(released(name, size)))
    assert read_config(tmp_path) == published_config(name, size)


@pytest.mark.parametrize("name", DECODERS)
def test_configurations_rewritten_by_transformers_5_read_right(name, tmp_path):
    # rope_parameters for rope_theta, dtype for torch_dtype, image_token_id, all fields
    transformers.PaliGemmaConfig(**released(name, 448)).save_pretrained(tmp_path)
    assert "rope_parameters" in (tmp_path / "config.json").read_text()
    assert read_config(tmp_path) == published_config(name, 448)


@pytest.mark.parametrize("form", ["rope_theta", "rope_parameters"])
def test_the_base_of_rope_is_read_in_either_form(form, tmp_path):
    data = released("paligemma-3b", 224)
    base = {"rope_theta": 5e5}
    data["text_config"] |= base if form == "rope_theta" else {form: base}
    (tmp_path / "config.json").write_text(json.dumps(data))
    assert read_config(tmp_path).decoder.rope_base == 5e5


@pytest.mark.parametrize("key", ["attn_logit_softcapping", "final_logit_softcapping"])
def test_a_cap_written_as_null_is_no_cap(key, tmp_path):
    data = released("paligemma2-3b", 224)
    data["text_config"][key] = None
    (tmp_path / "config.json").write_text(json.dumps(data))
    decoder = read_config(tmp_path).decoder
    assert (decoder.attention_cap is None) == (key == "attn_logit_softcapping")
    assert (decoder.logit_cap is None) == (key == "final_logit_softcapping")


@settings(max_examples=30)
@given(
    name=st.sampled_from(sorted(DECODERS)),
    size=st.sampled_from([224, 448, 896]),
    scalar=st.integers(1, 512),
    image_id=st.integers(1, 300_000),
)
def test_a_configuration_survives_writing_and_reading(name, size, scalar, image_id):
    config = published_config(name, size)
    scale = config.decoder.head_dim**-0.5 if name == "paligemma-3b" else scalar**-0.5
    decoder = replace(config.decoder, query_scale=scale, max_positions=777)
    config = PaliGemmaConfig(config.vision, decoder, image_id)
    with tempfile.TemporaryDirectory() as place:
        text = json.dumps(config_json(config, torch.bfloat16))
        (Path(place) / "config.json").write_text(text)
        assert read_config(place) == config


# Damage


def edit_json(path: Path, change) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def in_text(**values):
    """Change text_config."""
    return lambda place: edit_json(
        place / "config.json", lambda d: d["text_config"].update(values)
    )


def without(part, key):
    """Take a key out of config.json."""
    return lambda place: edit_json(place / "config.json", lambda d: d[part].pop(key))


def in_weights(change):
    """Change the tensors of the single file."""

    def damage(place):
        tensors = load_file(place / "model.safetensors")
        change(tensors)
        save_file(tensors, place / "model.safetensors")

    return damage


def cut(place):
    path = place / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def header(change):
    """Change the header of the single file and leave the numbers alone."""

    def damage(place):
        path = place / "model.safetensors"
        raw = path.read_bytes()
        n = int.from_bytes(raw[:8], "little")
        data = json.loads(raw[8 : 8 + n])
        data.pop("__metadata__", None)
        change(data)
        text = json.dumps(data).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + n :])

    return damage


def lie_about_shape(data):
    data[EMBEDDING]["shape"] = [128, 320]


def lie_about_place(data):
    start, end = data[EMBEDDING]["data_offsets"]
    data[EMBEDDING]["data_offsets"] = [start, end + 10**9]


def lie_about_length(place):
    path = place / "model.safetensors"
    path.write_bytes((2**40).to_bytes(8, "little") + path.read_bytes()[8:])


def empty(place):
    shutil.rmtree(place)
    place.mkdir()


NORM = "language_model.model.norm.weight"
BIAS = "multi_modal_projector.linear.bias"
DAMAGE = {
    "key missing": (
        in_weights(lambda t: t.pop(NORM)),
        r"language_model.norm.weight is missing",
    ),
    "key left over": (
        in_weights(lambda t: t.update({"vision_tower.head.probe": torch.ones(2)})),
        r"vision_tower.head.probe in model.safetensors has no place",
    ),
    "wrong shape": (
        in_weights(lambda t: t.update({BIAS: torch.ones(31)})),
        rf"{BIAS} in model.safetensors has shape \[31\], config.json asks for \[32\]",
    ),
    "whole numbers": (
        in_weights(lambda t: t.update({BIAS: torch.ones(32, dtype=torch.int8)})),
        rf"model.safetensors: {BIAS} holds torch.int8, not floats",
    ),
    "one weight in two spellings": (
        in_weights(lambda t: t.update({"model." + BIAS: torch.ones(32)})),
        r"model.safetensors: .*projector.linear.bias comes a second time",
    ),
    "a head of its own": (
        in_weights(lambda t: t.update({"lm_head.weight": torch.ones(128, 32)})),
        r"model.safetensors: lm_head.weight differs from the embedding",
    ),
    "cut file": (cut, r"model.safetensors cannot be read"),
    "empty file": (
        lambda p: (p / "model.safetensors").write_bytes(b""),
        r"model.safetensors cannot be read",
    ),
    "header lies about a shape": (header(lie_about_shape), r"model.safetensors cannot"),
    "header lies about a place": (header(lie_about_place), r"model.safetensors cannot"),
    "header lies about its length": (lie_about_length, r"model.safetensors cannot"),
    "no weights": (
        lambda p: (p / "model.safetensors").unlink(),
        r"has neither model.safetensors nor model.safetensors.index.json",
    ),
    "empty folder": (empty, r"config.json is missing, so .* is no checkpoint folder"),
    "no folder": (shutil.rmtree, r"there is no checkpoint folder"),
    "broken config": (
        lambda p: (p / "config.json").write_text('{"model_type": '),
        r"config.json is not valid JSON",
    ),
    "config in another coding": (
        lambda p: (p / "config.json").write_bytes(b"\xff\xfe\x00{"),
        r"config.json is not valid JSON",
    ),
    "config a list": (
        lambda p: (p / "config.json").write_text("[1, 2]"),
        r"config.json must hold a JSON object, not a list",
    ),
    "other architecture": (
        lambda p: edit_json(p / "config.json", lambda d: d.update(model_type="llava")),
        r"config.json describes the architecture 'llava'",
    ),
    "no text_config": (
        lambda p: edit_json(p / "config.json", lambda d: d.pop("text_config")),
        r"config.json describes .* text_config",
    ),
    "other text model": (
        in_text(model_type="llama"),
        r"config.json: the text model 'llama' is unknown; .* gemma and gemma2",
    ),
    "size omitted": (
        without("text_config", "num_hidden_layers"),
        r"config.json lacks the key 'num_hidden_layers'",
    ),
    "patch omitted": (
        without("vision_config", "patch_size"),
        r"config.json lacks the key 'patch_size'",
    ),
    "size as text": (in_text(hidden_size="32"), r"config.json .* hidden_size"),
    "size below 1": (in_text(num_attention_heads=-4), r"json .* num_attention_heads"),
    "size not whole": (in_text(head_dim=16.5), r"config.json .* head_dim"),
    "epsilon as text": (in_text(rms_norm_eps="tiny"), r"config.json .* rms_norm_eps"),
    "more layers than weights": (
        in_text(num_hidden_layers=5),
        r"language_model.layers.4.* is missing",
    ),
    "fewer layers than weights": (
        in_text(num_hidden_layers=3),
        r"language_model.layers.3.* in model.safetensors has no place",
    ),
    "another width than the weights": (
        in_text(hidden_size=48),
        r"embed_tokens.weight in model.safetensors has shape \[128, 32\], config.json",
    ),
    "heads that do not share": (
        in_text(num_key_value_heads=3),
        r"config.json: 4 query heads cannot share 3",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_gets_one_sentence_with_file_and_key(name, tmp_path):
    damage, says = DAMAGE[name]
    place = write(tmp_path / "folder", *saved("gemma"))
    damage(place)
    with pytest.raises(ValueError, match=says) as caught:
        load_model(place)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00002.safetensors"


def promise(place):
    edit_json(place / INDEX, lambda d: d["weight_map"].update({"ghost.weight": SHARD}))


def misplace(place):
    # the key is there, in the other file
    def change(d):
        key = next(k for k, v in d["weight_map"].items() if v != SHARD)
        d["weight_map"][key] = SHARD

    edit_json(place / INDEX, change)


SHARD_DAMAGE = {
    "shard missing": (
        lambda p: (p / SHARD).unlink(),
        rf"{SHARD} is missing: {INDEX} puts \S+ there",
    ),
    "shard cut": (
        lambda p: (p / SHARD).write_bytes((p / SHARD).read_bytes()[:-8]),
        rf"{SHARD} cannot be read",
    ),
    "index names a key that is nowhere": (promise, rf"{SHARD} lacks ghost.weight"),
    "index names the wrong file": (misplace, rf"{SHARD} lacks \S+, which the index"),
    "broken index": (
        lambda p: (p / INDEX).write_text("{,}"),
        rf"{INDEX} is not valid JSON",
    ),
    "index without a map": (
        lambda p: (p / INDEX).write_text("{}"),
        rf"{INDEX} lacks the key 'weight_map'",
    ),
    "index with an odd map": (
        lambda p: (p / INDEX).write_text('{"weight_map": {"a.weight": 3}}'),
        rf"{INDEX} puts a.weight there",
    ),
}


@pytest.mark.parametrize("name", SHARD_DAMAGE)
def test_damage_among_shards_gets_one_sentence(name, tmp_path):
    damage, says = SHARD_DAMAGE[name]
    place = write(tmp_path / "folder", *saved("gemma"), shards=2)
    damage(place)
    with pytest.raises(ValueError, match=says) as caught:
        load_model(place)
    assert "\n" not in str(caught.value)


def test_weights_of_paligemma_2_are_refused_by_a_configuration_of_paligemma_1(tmp_path):
    # the fault of the chapter: nothing is missing, so a loose load is content
    tensors, config = saved("gemma2")
    place = write(tmp_path, tensors, config)
    in_text(model_type="gemma")(place)
    with pytest.raises(ValueError, match="feedforward_layernorm.weight .* no place"):
        load_model(place)
    model = pali.PaliGemma(read_config(place))
    names = {pali.weights.checkpoint_name(k, "gemma") for k in model.state_dict()}
    assert names < {pali.weights.plain_name(k) for k in tensors}


def test_all_faults_are_told_but_not_a_hundred(tmp_path):
    place = write(tmp_path, *saved("gemma"))
    in_weights(lambda t: [t.pop(k) for k in sorted(t)[:30]])(place)
    with pytest.raises(ValueError, match=r"is missing; .*\(and 24 more\)"):
        load_model(place)


@pytest.mark.parametrize("dtype", ["float32", torch.int8, torch.complex64, 16])
def test_a_type_that_weights_cannot_have_is_refused(dtype):
    with pytest.raises(ValueError, match="dtype must be a torch float dtype or None"):
        load_model("mini", dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "tpu"])
def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(ValueError, match="device .* cannot be used"):
        load_model("mini", device=device)


# The processor's part of a folder


def mini_copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(Path(pali.__file__).parent / "mini", tmp_path / "m"))


def test_the_processor_of_the_shipped_folder_has_the_sizes_of_its_config(tmp_path):
    processor = pali.load_processor(mini_copy(tmp_path))
    data = json.loads((tmp_path / "m" / "config.json").read_text())
    assert processor.image_size == data["vision_config"]["image_size"]
    assert processor.num_patches == data["vision_config"]["num_image_tokens"]
    assert processor.image_id == data["image_token_index"]


PROCESSOR_DAMAGE = {
    "no tokenizer": (
        lambda p: (p / "tokenizer.model").unlink(),
        "has no tokenizer.model",
    ),
    "an empty tokenizer": (
        lambda p: (p / "tokenizer.model").write_bytes(b""),
        "tokenizer.model is not a SentencePiece model",
    ),
    "another picture size": (
        lambda p: edit_json(
            p / "preprocessor_config.json",
            lambda d: d.update(size={"height": 224, "width": 224}),
        ),
        "preprocessor_config.json asks for 224 px, config.json for 128 px",
    ),
    "broken settings": (
        lambda p: (p / "preprocessor_config.json").write_text("{"),
        "preprocessor_config.json is not valid JSON",
    ),
    "more pieces than rows": (
        in_text(vocab_size=100),
        r"tokenizer.model has 2816 pieces, config.json room for only 100",
    ),
}


@pytest.mark.parametrize("name", PROCESSOR_DAMAGE)
def test_damage_to_the_processors_files_gets_one_sentence(name, tmp_path):
    damage, says = PROCESSOR_DAMAGE[name]
    place = mini_copy(tmp_path)
    damage(place)
    with pytest.raises(ValueError, match=says) as caught:
        pali.load(place)
    assert "\n" not in str(caught.value)


# Saving


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", SHAPES)
def test_what_we_save_is_layout_a_and_transformers_reads_it(kind, dtype, tmp_path):
    model = load_model(folder(SHAPES[kind]), dtype=dtype)
    save_model(model, tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert names == {spell(k, "A") for k in saved(kind)[0]}
    theirs, told = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager", dtype="auto"
    )
    assert not any(told.values()), told
    assert theirs.dtype == dtype
    batch = rows(SHAPES[kind], suffix=3)
    with torch.no_grad():
        ours = model.float()(
            batch.pixels, batch.ids, valid=batch.valid, suffix=batch.suffix
        )
        want = theirs.float()(
            input_ids=batch.ids, pixel_values=batch.pixels,
            attention_mask=batch.valid.long(), token_type_ids=batch.suffix.long(),
        ).logits  # fmt: skip
    assert_agree(ours, want, batch.valid, atol=ATOL)


@pytest.mark.parametrize("kind", SHAPES)
def test_saving_and_loading_changes_nothing(kind, tmp_path):
    model = load_model(folder(SHAPES[kind]))
    save_model(model, tmp_path / "new" / "folder")
    again = load_model(tmp_path / "new" / "folder")
    assert again.config == model.config
    state = model.state_dict()
    assert all(t.equal(state[k]) for k, t in again.state_dict().items())


def test_with_a_processor_the_whole_can_be_loaded_again(tmp_path):
    model, processor = pali.load("mini", dtype=None)
    pali.save_model(model, tmp_path, processor)
    _, again = pali.load(tmp_path)
    prompt = "detect cat"
    assert again.prompt_ids(prompt) == processor.prompt_ids(prompt)
    assert again.image_size == processor.image_size
    source = Tokenizer(tmp_path / "tokenizer.model")
    assert source.encode("two dogs") == processor.tokenizer.encode("two dogs")


def test_transformers_prepares_pictures_by_our_settings_as_we_do(tmp_path):
    model, processor = pali.load("mini", dtype=None)
    pali.save_model(model, tmp_path, processor)
    theirs = SiglipImageProcessorPil.from_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (90, 140, 3), dtype=np.uint8))
    want = theirs(images=[picture], return_tensors="pt")["pixel_values"]
    assert processor(picture, "").pixels.equal(want)


def saved_with_plain_gemma(folder: Path) -> Processor:
    """A folder whose tokenizer.model lacks places and outlines, as Gemma's does."""
    folder.mkdir()
    tokenizer = toy_pieces(folder / "plain.model")
    model = pali.load_model("mini", dtype=None)
    vision = model.config.vision
    processor = Processor(
        tokenizer, vision.image_size, vision.num_patches, tokenizer.size
    )
    rows = torch.zeros(tokenizer.size + 1, model.config.decoder.width)
    decoder = replace(model.config.decoder, vocab_size=len(rows))
    model.config = replace(model.config, decoder=decoder, image_id=tokenizer.size)
    model.decoder.config = decoder
    model.decoder.embedding = torch.nn.Parameter(rows.half())
    pali.save_model(model, folder / "saved", processor)
    return processor


@pytest.mark.parametrize("pieces", ["shipped", "plain Gemma"])
def test_autoprocessor_reads_our_folder_and_prepares_the_same(pieces, tmp_path):
    if pieces == "shipped":
        folder, processor = mini_copy(tmp_path), pali.load_processor("mini")
    else:
        processor = saved_with_plain_gemma(tmp_path / "plain")
        folder = tmp_path / "plain" / "saved"
    theirs = AutoProcessor.from_pretrained(folder)
    prompts = [
        "caption en",
        "detect cat ; dog",
        "answer en how many foxes are there?",
        "caption de ÄÖÜ 猫 é 12  spaces , and\ttabs",
        "",
    ]
    suffixes = [
        "a cat",
        "<loc0001><loc0500><loc0700><loc1023> cat",
        "0",
        "",
        "<seg007>",
    ]
    images = [scenes.scene(seed).image for seed in range(5)]
    ours = processor(images, prompts, suffixes, padding="right")
    want = theirs(
        images=[[image] for image in images],
        text=["<image>" + prompt for prompt in prompts],
        suffix=suffixes,
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    assert torch.equal(ours.ids, want["input_ids"])
    assert torch.equal(ours.labels, want["labels"])
    assert torch.equal(ours.pixels, want["pixel_values"])
    assert theirs.decode(ours.ids[1], skip_special_tokens=True).endswith(suffixes[1])


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("gemma", {"query_scale": 0.5}, "no word for query_scale = 0.5 of a gemma"),
        ("gemma", {"attention_cap": 50.0}, "no word for attention_cap"),
        ("gemma", {"sliding_window": 8}, "no word for sliding_window"),
    ],
)
def test_a_decoder_that_config_json_cannot_express_is_not_saved(
    kind, change, says, tmp_path
):
    with pytest.raises(ValueError, match=says):
        save_model(tiny_model(kind, **change), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_can_be_saved_onto_itself_while_it_is_mapped(tmp_path):
    write(tmp_path, *saved("gemma"))
    model = load_model(tmp_path, dtype=None)
    save_model(model, tmp_path)
    again = load_model(tmp_path).state_dict()
    assert all(again[k].equal(t) for k, t in expected("gemma").items())


def test_the_weight_file_can_be_read_by_whoever_can_read_the_config(tmp_path):
    save_model(load_model(folder(PALIGEMMA_1)), tmp_path)
    modes = {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()}
    umask = os.umask(0)
    os.umask(umask)
    assert modes == {0o666 & ~umask}


class Plug(Exception):
    """Something that nobody expects."""


FAILURES = {
    "disk full": (OSError("no space left on the device"), OSError),
    "safetensors fails": (pali.weights.SafetensorError("I/O error"), OSError),
    "plug pulled": (Plug(), Plug),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_save_that_fails_leaves_the_old_folder_whole(name, tmp_path, monkeypatch):
    error, raised = FAILURES[name]
    model = load_model(folder(PALIGEMMA_1))
    save_model(model, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(path, tensors):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(pali.weights, "write_tensors", fail)
    with pytest.raises(raised):
        save_model(model.bfloat16(), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.slow
def test_a_disk_that_is_full_is_an_oserror_and_leaves_nothing(tmp_path):
    # a real write that really fails: no file of this process may exceed 20 kB
    script = f"""
import resource, signal, sys
import pali
model = pali.load_model("mini", dtype=None)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    pali.save_model(model, {str(tmp_path / "new")!r})
except OSError as error:
    sys.exit(7)
"""
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == 7
    assert list((tmp_path / "new").iterdir()) == []


def entries(path: Path) -> tuple[int, dict]:
    """Where the numbers of a safetensors file begin, and what its header says."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    return 8 + length, header


ODD = {  # bytes that fill whole lines of 64, and bytes that do not
    "b": torch.ones(3, 5), "a": torch.ones(8, 16), "c": torch.ones(32).bfloat16(),
    "d": torch.ones(1).half(), "e": torch.ones(7).double(), "f": torch.ones(64, 2),
    "empty": torch.ones(0, 4),
}  # fmt: skip


def test_tensors_that_fill_whole_lines_begin_on_one(tmp_path):
    write_tensors(tmp_path / "x", ODD)
    start, header = entries(tmp_path / "x")
    assert start % 64 == 0
    for key, tensor in ODD.items():
        begins = start + header[key]["data_offsets"][0]
        if tensor.nbytes % 64 == 0:
            assert begins % 64 == 0, key
        assert begins % tensor.element_size() == 0, key


def test_every_matrix_of_the_released_sizes_would_begin_on_a_line(tmp_path):
    """The widths of PaliGemma 3B, whose fc1.bias of 4304 fills no whole line."""
    sizes = {"decoder": (256, 2048), "fc1.bias": (4304,), "fc1": (4304, 1152)}
    tensors = {
        f"{i}.{name}": torch.zeros(size, dtype=torch.bfloat16)
        for i in range(3) for name, size in sizes.items()
    }  # fmt: skip
    write_tensors(tmp_path / "x", tensors)
    start, header = entries(tmp_path / "x")
    off = {k for k, e in header.items() if (start + e["data_offsets"][0]) % 64}
    assert off <= {"1.fc1.bias", "2.fc1.bias"}


def test_safetensors_reads_what_we_write(tmp_path):
    generator = torch.Generator().manual_seed(0)
    turned = torch.randn(6, 4, generator=generator).T  # not in one piece
    tensors = {
        k: torch.randn(t.shape, generator=generator).to(t) for k, t in ODD.items()
    }
    tensors |= {"turned": turned, "part": torch.arange(9.0)[2:5], "ü": torch.ones(2)}
    write_tensors(tmp_path / "x", tensors)
    again = load_file(tmp_path / "x")
    assert again.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert again[key].dtype == tensor.dtype and again[key].equal(tensor), key
    with pali.weights.safe_open(tmp_path / "x", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}  # what transformers asks for


def test_mapped_weights_that_we_wrote_begin_on_a_line(tmp_path):
    save_model(load_model(folder(PALIGEMMA_1), dtype=torch.bfloat16), tmp_path)
    start, header = entries(tmp_path / "model.safetensors")
    model = load_model(tmp_path, dtype=None)
    matrices = [p for p in model.parameters() if p.nbytes % 64 == 0]
    assert len(matrices) > 40
    assert {p.data_ptr() % 64 for p in matrices} == {0}


def test_saving_where_a_file_stands_is_an_oserror(tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(OSError, match="taken"):
        save_model(load_model(folder(PALIGEMMA_1)), tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_saving_where_one_may_not_write_is_an_oserror(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError):
        save_model(load_model(folder(PALIGEMMA_1)), tmp_path / "new")
    tmp_path.chmod(0o700)
    assert list(tmp_path.iterdir()) == []


def test_several_files_move_into_place_only_when_all_are_written(tmp_path):
    (tmp_path / "a").write_text("old")

    def fail(path):
        raise OSError("no")

    with pytest.raises(OSError):
        write_files(tmp_path, {"a": lambda p: p.write_text("new"), "b": fail})
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "old")]


# Mapping


def own_memory_script(place: Path, dtype: str) -> str:
    return f"""
import torch, pali
from pathlib import Path
def anonymous():
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split("kB")[0]) * 1024
pali.load_model("mini", dtype=None)  # imports and thread pools do not count
before = anonymous()
model = pali.load_model({str(place)!r}, dtype={dtype})
loaded = anonymous()
logits = model(None, torch.tensor([[5, 6, 7]]), last_only=True)
assert logits.isfinite().all()
print((loaded - before) // 2**20, (anonymous() - before) // 2**20)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_keeping_the_stored_type_maps_the_file_and_copies_nothing(tmp_path):
    tensors, config = saved("gemma")
    tensors = dict(tensors)
    tensors[EMBEDDING] = torch.zeros(1_600_000, 32)  # 205 MB
    write(tmp_path, tensors, config)
    in_text(vocab_size=1_600_000)(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size >> 20
    assert size > 190

    def growth(dtype):
        out = subprocess.run(
            [sys.executable, "-c", own_memory_script(tmp_path, dtype)],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        return [int(n) for n in out.stdout.split()]

    # measured: 0 and 6 MB when mapped, 195 and 201 when copied
    loaded, used = growth("None")
    assert loaded < 10 and used < 40
    loaded, _ = growth("torch.float32")  # the measurement does see a copy
    assert loaded > 0.9 * size


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_generating_with_mapped_weights_stays_small(tmp_path):
    """A quarter of a gigabyte of weights at released widths, never in memory."""
    vision = replace(VisionConfig(), num_layers=1)
    decoder = replace(DecoderConfig(), vocab_size=4096, num_layers=1)
    config = PaliGemmaConfig(vision, decoder, image_id=4000)
    with torch.device("meta"):
        model = pali.PaliGemma(config)
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(w.shape, generator=generator).mul_(0.02).bfloat16()
        for name, w in model.state_dict().items()
    }
    model.load_state_dict(state, assign=True)
    small = pali.load_processor("mini")
    processor = pali.Processor(small.tokenizer, 224, 256, 4000)
    save_model(model, tmp_path, processor)
    size = (tmp_path / "model.safetensors").stat().st_size >> 20
    assert size > 250
    script = f"""
import threading, numpy, torch, pali
from pathlib import Path
def anonymous():
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split("kB")[0]) // 1024
picture = numpy.zeros((224, 224, 3), numpy.uint8)
pali.generate(*pali.load("mini"), picture, "caption en", max_new_tokens=2)
before, peak, done = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())
thread = threading.Thread(target=watch)
thread.start()
model, processor = pali.load({str(tmp_path)!r}, dtype=None)
loaded = anonymous() - before
pali.generate(model, processor, picture, "caption en", max_new_tokens=8)
done.set(); thread.join()
print(loaded, peak - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    loaded, peak = map(int, done.stdout.split())
    # measured: 0 and 27 MB; a copy of the weights would be 270
    assert loaded < 10 and peak < 100, (loaded, peak)


def test_loading_draws_no_numbers_and_no_compiler():
    """Drawing on "meta" would import torch's compiler: 4 s instead of 0.02 s once."""
    script = (
        "import pali, sys; pali.load('mini'); print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    assert done.stdout == "False\n"
    with NoDraws():
        weight = torch.nn.init.normal_(torch.zeros(3))
        assert torch.nn.init.uniform_(tensor=weight) is weight
        assert weight.tolist() == [0, 0, 0]  # left as it was
    assert torch.nn.init.ones_(weight).tolist() == [1, 1, 1]  # and only there
