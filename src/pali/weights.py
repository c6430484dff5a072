"""Weights: the same code runs the official checkpoints.

Generated from notebooks/15_weights.ipynb: edit the notebook, then run `make export`.
Each block names the cell it comes from.
"""

import json
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pali.decoder import DecoderConfig
from pali.paligemma import PaliGemma, PaliGemmaConfig
from pali.tokens import BOS, EOS, PAD, Processor, Tokenizer
from pali.vision import VisionConfig

__all__ = [
    "CODES",
    "DECODER_BLOCKS",
    "GEMMA2_BLOCK",
    "GEMMA_BLOCK",
    "LINE",
    "NoDraws",
    "TOP",
    "VISION_BLOCK",
    "check_architecture",
    "check_device",
    "check_dtype",
    "check_expressible",
    "checkpoint_name",
    "config_json",
    "decoder_config",
    "decoder_json",
    "drop_tied_head",
    "empty_model",
    "find_folder",
    "gemma2_config",
    "json_writer",
    "load",
    "load_model",
    "load_processor",
    "match_weights",
    "plain_name",
    "preprocessor_json",
    "read_config",
    "read_json",
    "read_tensors",
    "real",
    "released_name",
    "released_tensors",
    "save_model",
    "tokenizer_json",
    "vision_config",
    "weight_files",
    "whole",
    "write_files",
    "write_tensors",
]


# cell aa3a797d
TOP = {
    "vision.patch.weight": "vision_tower.embeddings.patch_embedding.weight",
    "vision.patch.bias": "vision_tower.embeddings.patch_embedding.bias",
    "vision.position": "vision_tower.embeddings.position_embedding.weight",
    "vision.norm.weight": "vision_tower.post_layernorm.weight",
    "vision.norm.bias": "vision_tower.post_layernorm.bias",
    "projector.linear.weight": "multi_modal_projector.linear.weight",
    "projector.linear.bias": "multi_modal_projector.linear.bias",
    "decoder.embedding": "language_model.embed_tokens.weight",
    "decoder.norm.weight": "language_model.norm.weight",
}
VISION_BLOCK = {
    "attention_norm": "layer_norm1",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.out_proj",
    "mlp_norm": "layer_norm2",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
}
GEMMA_BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
GEMMA2_BLOCK = GEMMA_BLOCK | {
    # the same name, another norm
    "attention_out_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
}
DECODER_BLOCKS = {"gemma": GEMMA_BLOCK, "gemma2": GEMMA2_BLOCK}


# cell f3417e77
def checkpoint_name(name: str, architecture: str) -> str:
    """Our name of a weight -> its name in a checkpoint, levels left
    out.

    name            such as "decoder.blocks.3.mlp.gate.weight"
    architecture    "gemma" or "gemma2"
    """
    if name in TOP:
        return TOP[name]
    part, _, layer, rest = name.split(".", 3)
    stem, kind = rest.rsplit(".", 1)
    if part == "vision":
        stem = VISION_BLOCK[stem]
        return f"vision_tower.encoder.layers.{layer}.{stem}.{kind}"
    stem = DECODER_BLOCKS[architecture][stem]
    return f"language_model.layers.{layer}.{stem}.{kind}"


# cell 266fa845
def plain_name(name: str) -> str:
    """A name in any published layout -> the same name without optional
    levels.

    Four layouts exist on disk; they differ in a leading "model." and in
    the levels "vision_model" and "model" inside the two towers.
    """
    name = name.removeprefix("model.")
    name = name.replace(
        "vision_tower.vision_model.", "vision_tower.", 1
    )
    return name.replace("language_model.model.", "language_model.", 1)


# cell 758e005f
def released_name(name: str) -> str:
    """The inverse of `plain_name` for the layout of the released
    folders."""
    name = name.replace(
        "vision_tower.", "vision_tower.vision_model.", 1
    )
    return name.replace("language_model.", "language_model.model.", 1)


# cell 44847dff
def read_json(path: Path) -> dict:
    """A JSON object from a file; one sentence if it is missing or
    broken."""
    if not path.is_file():
        raise ValueError(
            f"{path} is missing, so {path.parent} is no checkpoint "
            "folder"
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is not valid JSON: {error}"
        ) from error
    if not isinstance(data, dict):
        raise ValueError(
            f"{path} must hold a JSON object, "
            f"not a {type(data).__name__}"
        )
    return data


# cell 0cd313e1
def whole(data: dict, key: str, default: int | None = None) -> int:
    """A size from a config: a whole number from 1.

    raises    KeyError if it is omitted and has no default, ValueError
              if it is something else
    """
    value = data.get(key)
    if value is None and default is None:
        raise KeyError(key)
    value = default if value is None else value
    if type(value) is not int or value < 1:
        raise ValueError(
            f"{key} must be a whole number from 1, not {value!r}"
        )
    return value


# cell 36d7a893
def real(data: dict, key: str, default: float) -> float | None:
    """A factor from a config: a number above 0, or None where null is
    written."""
    value = data.get(key, default)
    if value is None:
        return None
    if type(value) not in (int, float) or not value > 0:
        raise ValueError(
            f"{key} must be a number above 0, not {value!r}"
        )
    return float(value)


# cell f62f878a
def vision_config(data: dict) -> VisionConfig:
    """The vision part of a config.json; what it omits has SigLIP's
    value."""
    return VisionConfig(
        image_size=whole(data, "image_size", 224),
        patch_size=whole(data, "patch_size"),
        channels=whole(data, "num_channels", 3),
        width=whole(data, "hidden_size"),
        num_layers=whole(data, "num_hidden_layers"),
        num_heads=whole(data, "num_attention_heads"),
        mlp_width=whole(data, "intermediate_size"),
        norm_eps=real(data, "layer_norm_eps", 1e-6),
    )


# cell 92f1c210
def gemma2_config(config: DecoderConfig, data: dict) -> DecoderConfig:
    """The same, with what only Gemma 2 has."""
    window = data.get("sliding_window", 4096)
    return replace(
        config,
        query_scale=real(data, "query_pre_attn_scalar", 256) ** -0.5,
        attention_cap=real(data, "attn_logit_softcapping", 50.0),
        logit_cap=real(data, "final_logit_softcapping", 30.0),
        sliding_window=window and whole(data, "sliding_window", 4096),
    )


# cell 49753c7a
def decoder_config(data: dict) -> DecoderConfig:
    """The decoder's part of a config.json; what it omits has Gemma's
    value."""
    second = data["model_type"] == "gemma2"
    head_dim = whole(data, "head_dim", 256)
    # transformers 5, or earlier
    rope = data.get("rope_parameters") or data
    config = DecoderConfig(
        architecture=data["model_type"],
        vocab_size=whole(data, "vocab_size"),
        width=whole(data, "hidden_size"),
        num_layers=whole(data, "num_hidden_layers"),
        num_heads=whole(data, "num_attention_heads"),
        num_kv_heads=whole(data, "num_key_value_heads"),
        head_dim=head_dim,
        mlp_width=whole(data, "intermediate_size"),
        norm_eps=real(data, "rms_norm_eps", 1e-6),
        rope_base=real(rope, "rope_theta", 10_000.0),
        query_scale=head_dim**-0.5,
        max_positions=whole(data, "max_position_embeddings", 8192),
    )
    return gemma2_config(config, data) if second else config


# cell 910f5f47
def check_architecture(data: dict, path: Path) -> None:
    """One sentence for a model that this book does not build."""
    kind, text = data.get("model_type"), data.get("text_config")
    vision = data.get("vision_config")
    parts = isinstance(text, dict) and isinstance(vision, dict)
    if kind != "paligemma" or not parts:
        raise ValueError(
            f"{path} describes the architecture {kind!r}, not "
            "'paligemma' with a text_config and a vision_config"
        )
    if text.get("model_type") not in DECODER_BLOCKS:
        raise ValueError(
            f"{path}: the text model {text.get('model_type')!r} is "
            f"unknown; this book builds {' and '.join(DECODER_BLOCKS)}"
        )


# cell 88519965
def read_config(folder: str | Path) -> PaliGemmaConfig:
    """The configuration in a checkpoint folder's config.json.

    raises    ValueError naming the file and the key that is missing or
              foreign
    """
    path = Path(folder) / "config.json"
    data = read_json(path)
    check_architecture(data, path)
    old, new = "image_token_index", "image_token_id"
    key = old if old in data else new
    try:
        return PaliGemmaConfig(
            vision_config(data["vision_config"]),
            decoder_config(data["text_config"]),
            whole(data, key, 257_152),
        )
    except KeyError as error:
        raise ValueError(f"{path} lacks the key {error}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path} holds a value of a wrong kind: {error}"
        ) from error


# cell 4131a5fc
def weight_files(folder: Path) -> dict[str, list[str]]:
    """The weight files of a folder and the keys that its index
    promises.

    note      a folder with both is read as transformers reads it: the
              single file counts
    """
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return {"model.safetensors": []}
    if not index.is_file():
        raise ValueError(
            f"{folder} has neither model.safetensors nor {index.name}"
        )
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(
            f"{index} lacks the key 'weight_map', or it is empty"
        )
    files = defaultdict(list)
    for key, name in places.items():
        if not isinstance(name, str) or not (folder / name).is_file():
            raise ValueError(
                f"{folder / str(name)} is missing: {index.name} puts "
                f"{key} there"
            )
        files[name].append(key)
    return files


# cell 3cbdcc0e
def read_tensors(folder: Path) -> dict[str, tuple[Path, Tensor]]:
    """Every tensor of a checkpoint, mapped rather than read, by plain
    name.

    raises    ValueError naming the file, and the key where one is to
              blame
    """
    found = {}
    for name, promised in weight_files(folder).items():
        path = folder / name
        try:
            with safe_open(path, framework="pt") as file:
                keys = list(file.keys())
                tensors = {key: file.get_tensor(key) for key in keys}
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ValueError(
                f"{path} cannot be read: {error}"
            ) from error
        lacking = sorted(set(promised) - set(keys))
        if lacking:
            raise ValueError(
                f"{path} lacks {lacking[0]}, which the index promises"
            )
        for key, tensor in tensors.items():
            if not tensor.is_floating_point():
                raise ValueError(
                    f"{path}: {key} holds {tensor.dtype}, not floats"
                )
            if plain_name(key) in found:
                raise ValueError(f"{path}: {key} comes a second time")
            found[plain_name(key)] = path, tensor
    return found


# cell 53f2f1b8
def drop_tied_head(found: dict[str, tuple[Path, Tensor]]) -> None:
    """Take a stored head out, after checking that it is the
    embedding."""
    embedding = found.get("language_model.embed_tokens.weight")
    for key in ("lm_head.weight", "language_model.lm_head.weight"):
        path, head = found.pop(key, (None, None))
        if head is None or embedding is None:
            continue
        if head.shape != embedding[1].shape or not torch.equal(
            head, embedding[1]
        ):
            raise ValueError(
                f"{path}: {key} differs from the embedding; PaliGemma "
                "ties them"
            )


# cell 30af65e2
def match_weights(
    model: PaliGemma, found: dict, folder: Path
) -> dict[str, Tensor]:
    """Our names for the tensors of a checkpoint: none missing, none
    left over.

    raises    ValueError that lists what is missing, left over or of
              wrong shape
    """
    state, faults = {}, []
    architecture = model.config.decoder.architecture
    for name, weight in model.state_dict().items():
        key = checkpoint_name(name, architecture)
        path, tensor = found.pop(key, (None, None))
        if tensor is None:
            faults.append(f"{key} is missing")
        elif tensor.shape != weight.shape:
            faults.append(
                f"{key} in {path.name} has shape {list(tensor.shape)}, "
                f"config.json asks for {list(weight.shape)}"
            )
        else:
            state[name] = tensor
    faults += [
        f"{key} in {path.name} has no place"
        for key, (path, _) in found.items()
    ]
    if faults:
        more = (
            f" (and {len(faults) - 6} more)" if len(faults) > 6 else ""
        )
        raise ValueError(f"{folder}: {'; '.join(faults[:6])}{more}")
    return state


# cell b4fbecf7
def check_dtype(dtype: torch.dtype | None) -> None:
    """Weights are float32, bfloat16 or float16; None keeps the stored
    dtype."""
    known = (
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float64,
        None,
    )
    if dtype not in known:
        raise ValueError(
            f"dtype must be a torch float dtype or None, not {dtype!r}"
        )


# cell 49f04afb
def check_device(device: str | torch.device) -> None:
    """One sentence for a device that this machine or torch does not
    have."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {device!r} cannot be used: {error}"
        ) from error


# cell a05f5831
class NoDraws(TorchFunctionMode):
    """While it is active, `torch.nn.init` leaves tensors as they are.

    note      for models whose numbers come from a file
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


# cell 3f75c17c
def empty_model(config: PaliGemmaConfig, folder: Path) -> PaliGemma:
    """A model without memory: names and shapes, no numbers ("meta"
    device).

    raises    ValueError if the sizes in config.json do not fit together
    """
    try:
        with torch.device("meta"), NoDraws():
            return PaliGemma(config)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"{folder / 'config.json'}: {error}"
        ) from error


# cell 88b8d50b
def find_folder(folder: str | Path) -> Path:
    """A checkpoint folder; the name "mini" stands for the shipped
    model."""
    mini = Path(str(resources.files("pali"))) / "mini"
    path = mini if folder == "mini" else Path(folder)
    if not path.is_dir():
        raise ValueError(f"there is no checkpoint folder {path}")
    return path


# cell b1b09c2a
def load_model(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
) -> PaliGemma:
    """The model of a checkpoint folder: PaliGemma 1 or 2, any size and
    layout.

    folder    "mini" for the shipped model, or a folder with config.json
              and safetensors files
    dtype     the weights are converted to it; None keeps the stored one
              and maps the file instead of copying it
    raises    ValueError with one sentence that names the file and the
              key
    """
    check_dtype(dtype)
    check_device(device)
    folder = find_folder(folder)
    model = empty_model(read_config(folder), folder)
    found = read_tensors(folder)
    drop_tied_head(found)
    state = match_weights(model, found, folder)
    if dtype is not None:
        state = {k: t.to(dtype, copy=True) for k, t in state.items()}
    model.load_state_dict(state, strict=True, assign=True)
    return model.to(device).eval()


# cell e693d007
def load_processor(folder: str | Path) -> Processor:
    """The tokenizer and the picture settings of a checkpoint folder.

    raises    ValueError if a file is missing or two of them disagree
    """
    folder = find_folder(folder)
    config = read_config(folder)
    path = folder / "tokenizer.model"
    if not path.is_file():
        raise ValueError(f"{folder} has no tokenizer.model")
    size, patches = config.vision.image_size, config.vision.num_patches
    settings = folder / "preprocessor_config.json"
    if settings.is_file():
        stated = read_json(settings).get("size", size)
        if isinstance(stated, dict):
            stated = stated.get("height", size)
        if stated != size:
            raise ValueError(
                f"{settings} asks for {stated} px, config.json for "
                f"{size} px"
            )
    tokenizer = Tokenizer(path)
    if tokenizer.size > config.decoder.vocab_size:
        raise ValueError(
            f"{path} has {tokenizer.size} pieces, config.json room for "
            f"only {config.decoder.vocab_size} (vocab_size)"
        )
    return Processor(tokenizer, size, patches, config.image_id)


# cell 1e9afc20
def load(
    folder: str | Path = "mini",
    *,
    dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
) -> tuple[PaliGemma, Processor]:
    """Model and processor of a checkpoint folder, or of the shipped
    "mini"."""
    processor = load_processor(folder)  # first: it is quick to fail
    return load_model(folder, dtype=dtype, device=device), processor


# cell a7f92830
def decoder_json(d: DecoderConfig, num_patches: int) -> dict:
    """The text_config of a config.json."""
    text = {
        "model_type": d.architecture, "vocab_size": d.vocab_size,
        "hidden_size": d.width, "num_hidden_layers": d.num_layers,
        "num_attention_heads": d.num_heads,
        "num_key_value_heads": d.num_kv_heads,
        "head_dim": d.head_dim, "intermediate_size": d.mlp_width,
        "rms_norm_eps": d.norm_eps, "rope_theta": d.rope_base,
        "max_position_embeddings": d.max_positions,
        "hidden_activation": "gelu_pytorch_tanh",
        "num_image_tokens": num_patches,
    }  # fmt: skip
    if d.architecture == "gemma2":
        scalar = round(d.query_scale**-2, 6)
        # transformers insists that a whole number be written as one
        text |= {
            "query_pre_attn_scalar": int(scalar)
            if scalar % 1 == 0
            else scalar,
            "attn_logit_softcapping": d.attention_cap,
            "final_logit_softcapping": d.logit_cap,
            "sliding_window": d.sliding_window,
        }
    return text


# cell e9047b0d
def config_json(config: PaliGemmaConfig, dtype: torch.dtype) -> dict:
    """The configuration in the words of the released config.json
    files."""
    v, d = config.vision, config.decoder
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": v.width,
        "num_hidden_layers": v.num_layers,
        "num_attention_heads": v.num_heads,
        "intermediate_size": v.mlp_width, "image_size": v.image_size,
        "patch_size": v.patch_size, "num_channels": v.channels,
        "layer_norm_eps": v.norm_eps, "num_image_tokens": v.num_patches,
        "projection_dim": d.width, "vision_use_head": False,
    }  # fmt: skip
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "model_type": "paligemma", "image_token_index": config.image_id,
        "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
        "projection_dim": d.width, "hidden_size": d.width,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "text_config": decoder_json(d, v.num_patches),
        "vision_config": vision,
    }  # fmt: skip


# cell a9ac7d7a
def check_expressible(config: DecoderConfig, text: dict) -> None:
    """What config.json cannot say would be lost without a word.

    text      the text_config that is about to be written
    """
    again = decoder_config(text)
    for name, value in vars(config).items():
        read = getattr(again, name)
        same = name == "query_scale" and math.isclose(
            read, value, rel_tol=1e-6
        )
        if read != value and not same:
            raise ValueError(
                f"config.json has no word for {name} = {value} of a "
                f"{config.architecture} decoder: it would be read as "
                f"{read}"
            )


# cell cc5e7174
def preprocessor_json(processor: Processor) -> dict:
    """The picture settings in the words of preprocessor_config.json."""
    side = processor.image_size
    return {
        "image_processor_type": "SiglipImageProcessor",
        "processor_class": "PaliGemmaProcessor",
        "image_seq_length": processor.num_patches,
        "size": {"height": side, "width": side},
        "resample": 3, "do_resize": True, "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True, "rescale_factor": 1 / 255,
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip


# cell 86b090df
def tokenizer_json(processor: Processor) -> dict:
    """What tokenizer_config.json adds to tokenizer.model: how it is
    used, and the tokens that the file lacks."""
    tokenizer = processor.tokenizer
    pieces, lacking = tokenizer.pieces, dict(tokenizer.names)
    lacking[processor.image_id] = "<image>"
    plain = {
        "lstrip": False, "rstrip": False, "normalized": False,
        "single_word": False,
    }  # fmt: skip
    return {
        "tokenizer_class": "GemmaTokenizer",
        "processor_class": "PaliGemmaProcessor",
        "add_bos_token": True, "add_eos_token": False,
        "bos_token": pieces.IdToPiece(BOS),
        "eos_token": pieces.IdToPiece(EOS),
        "pad_token": pieces.IdToPiece(PAD),
        "unk_token": pieces.IdToPiece(pieces.unk_id()),
        "added_tokens_decoder": {
            str(i): plain | {"content": name, "special": name == "<image>"}
            for i, name in sorted(lacking.items())
            if i >= pieces.GetPieceSize()
        },
    }  # fmt: skip


# cell c1816cb7
def write_files(folder: Path, files: dict) -> None:
    """Write files beside their place and move them there, whole or not
    at all.

    files     name -> function that writes to the path it is given
    raises    OSError if that fails; what stood in the folder stays as
              it was
    """
    folder.mkdir(parents=True, exist_ok=True)
    beside = {name: folder / f".{name}.part" for name in files}
    try:
        for name, write in files.items():
            beside[name].touch()
            mode = beside[name].stat().st_mode
            write(beside[name])
            # safetensors would leave it private
            beside[name].chmod(mode)
        for name, path in beside.items():
            os.replace(path, folder / name)
    except SafetensorError as error:
        raise OSError(f"{folder} cannot be written: {error}") from error
    finally:
        for path in beside.values():
            path.unlink(missing_ok=True)


# cell b576f0fa
def released_tensors(model: PaliGemma) -> dict[str, Tensor]:
    """The weights of a model under the names of a released folder."""
    architecture, found = model.config.decoder.architecture, {}
    for name, tensor in model.state_dict().items():
        key = released_name(checkpoint_name(name, architecture))
        found[key] = tensor.detach()
    return found


# cell ea57edb0
def json_writer(data: dict) -> Callable[[Path], object]:
    """A function that writes `data` to the path it is given."""
    text = json.dumps(data, indent=2) + "\n"
    return lambda path: path.write_text(text, encoding="utf-8")


# cell 3429c15b
LINE = 64  # bytes that a processor fetches at once
CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file whose tensors begin on 64-byte lines.

    tensors   name -> float tensor, on any device
    note      an odd size would shift all that follows, so tensors whose
              bytes do not fill whole lines come last
    """

    def rank(key: str):
        tensor = tensors[key]
        return tensor.nbytes % LINE > 0, -tensor.itemsize, key

    order, header, end = sorted(tensors, key=rank), {}, 0
    for key in order:
        tensor, start = tensors[key], end
        end += tensor.nbytes
        header[key] = {
            "dtype": CODES[tensor.dtype], "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }  # fmt: skip
    header["__metadata__"] = {"format": "pt"}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % LINE)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            flat = tensors[key].detach().cpu().flatten()
            file.write(flat.view(torch.uint8).numpy())


# cell c8aad687
def save_model(
    model: PaliGemma,
    folder: str | Path,
    processor: Processor | None = None,
) -> None:
    """Write a checkpoint folder in the layout of the released ones.

    processor    with it, `pali.load(folder)` works on the result, and
                 `AutoProcessor` of transformers
    raises       OSError if the folder cannot be written; nothing
                 half-written; ValueError if config.json has no words
                 for the configuration
    """
    data = config_json(model.config, model.decoder.embedding.dtype)
    check_expressible(model.config.decoder, data["text_config"])
    tensors = released_tensors(model)
    files = {
        "model.safetensors": lambda p: write_tensors(p, tensors),
        "config.json": json_writer(data),
    }
    if processor is not None:
        source = processor.tokenizer.path
        files |= {
            "preprocessor_config.json": json_writer(
                preprocessor_json(processor)
            ),
            "tokenizer_config.json": json_writer(
                tokenizer_json(processor)
            ),
            "tokenizer.model": lambda p: shutil.copyfile(source, p),
        }
    write_files(Path(folder), files)
