"""CLIP and SigLIP in Hugging Face's format: towers alone, and pairs of towers."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from megajax.config import ConfigError
from megajax.interop.codec import Codec
from megajax.interop.hf_architecture import Architecture, Part, Row, Tensor, layer_plan, rows_plan
from megajax.interop.hf_fields import ACTIVATION_NAMES, Fields
from megajax.models.vision.clip_config import CLIPConfig
from megajax.models.vision.clip_megatron import patch_codec
from megajax.models.vision.clip_model import CLIPModel, CLIPVisionModelWithProjection, text_layer_specs
from megajax.models.vision.clip_vit_model import CLIPVisionTransformer

Shapes = Mapping[str, Any]


def example_inputs(config: CLIPConfig) -> tuple[Any, ...]:
    """Arguments of `model.init`."""
    images = jax.ShapeDtypeStruct((1, config.num_channels, config.img_h, config.img_w), jnp.float32)
    texts = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    if config.text_only:
        return (texts,)
    return (images,) if config.text_num_layers is None else (images, texts)


def linear_rows(name: str, part: str) -> tuple[Row, Row]:
    """A torch Linear with its bias."""
    return Row(f"{name}.weight", (f"{part}/kernel",), transposed=True), Row(f"{name}.bias", (f"{part}/bias",))


def norm_rows(name: str, part: str) -> tuple[Row, Row]:
    """A torch LayerNorm."""
    return Row(f"{name}.weight", (f"{part}/scale",)), Row(f"{name}.bias", (f"{part}/bias",))


def layer_rows(prefix: str, names: Mapping[str, str]) -> tuple[Row, ...]:
    """Rows of a layer; names: path of a part -> what the file calls it."""
    rows = [
        (norm_rows if part.endswith("layernorm") else linear_rows)(prefix + name, part) for part, name in names.items()
    ]
    return tuple(row for pair in rows for row in pair)


CLIP_LAYER = layer_rows(
    "encoder.layers.{i}.",
    {
        "input_layernorm": "layer_norm1",
        "self_attention/linear_q": "self_attn.q_proj",
        "self_attention/linear_k": "self_attn.k_proj",
        "self_attention/linear_v": "self_attn.v_proj",
        "self_attention/linear_proj": "self_attn.out_proj",
        "pre_mlp_layernorm": "layer_norm2",
        "mlp/linear_fc1": "mlp.fc1",
        "mlp/linear_fc2": "mlp.fc2",
    },
)
_TOWER_ROWS = (
    Row("embeddings.patch_embedding.bias", ("conv1/bias",)),
    Row("embeddings.position_embedding.weight", ("position_embeddings",)),
    *norm_rows("pre_layrnorm", "ln_pre"),  # the misspelling is the published files'
    *norm_rows("post_layernorm", "ln_post"),
    *linear_rows("head.attention.out_proj", "head/attention/linear_proj"),
    *norm_rows("head.layernorm", "head/layernorm"),
    *linear_rows("head.mlp.fc1", "head/mlp/linear_fc1"),
    *linear_rows("head.mlp.fc2", "head/mlp/linear_fc2"),
)
_TEXT_ROWS = (
    Row("embeddings.token_embedding.weight", ("embedding/word_embeddings/embedding",), vocabulary=True),
    Row("embeddings.position_embedding.weight", ("embedding/position_embeddings/embedding",)),
    *norm_rows("final_layer_norm", "decoder/final_layernorm"),
)


def reshaped(path: str, leaves: Shapes, shape: tuple[int, ...]) -> Tensor:
    """A tensor that holds one parameter, in another shape."""
    part = Part(path, None, leaves[path].shape)
    codec = Codec(shape, lambda arrays: arrays[0].reshape(shape), lambda array: [array.reshape(part.shape)])
    return Tensor((part,), False, None, np.dtype(leaves[path].dtype), codec)


def patch_kernel(path: str, leaves: Shapes, config: CLIPConfig) -> Tensor:
    """The kernel of a patch embedding as a convolution's."""
    part = Part(path, None, leaves[path].shape)
    return Tensor((part,), False, None, np.dtype(leaves[path].dtype), patch_codec(config))


def _attention_in_projection(leaves: Shapes, leaf: str) -> Tensor:
    """torch's MultiheadAttention keeps q, k and v in one tensor."""
    paths = [f"head/attention/linear_{name}/{leaf}" for name in "qkv"]
    parts = tuple(Part(path, None, leaves[path].shape) for path in paths)
    return Tensor(parts, leaf == "kernel", None, np.dtype(leaves[paths[0]].dtype))


def tower_plan(config: CLIPConfig, layer_specs: Sequence[Any], leaves: Shapes, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of an image tower as CLIP and SigLIP have them. leaves: by their paths in the tower."""
    plan = {f"{prefix}embeddings.patch_embedding.weight": patch_kernel("conv1/kernel", leaves, config)}
    if config.class_token_len:
        plan[f"{prefix}embeddings.class_embedding"] = reshaped("class_token", leaves, (config.hidden_size,))
    plan |= rows_plan(_TOWER_ROWS, leaves, config, prefix)
    if config.pooler == "attention":
        plan[f"{prefix}head.probe"] = reshaped("head/probe", leaves, (1, 1, config.hidden_size))
        plan[f"{prefix}head.attention.in_proj_weight"] = _attention_in_projection(leaves, "kernel")
        plan[f"{prefix}head.attention.in_proj_bias"] = _attention_in_projection(leaves, "bias")
    return plan | layer_plan(CLIP_LAYER, leaves, config, layer_specs, prefix)


def _projected_plan(
    architecture: Any, config: CLIPConfig, model: Any, leaves: Shapes, prefix: str
) -> dict[str, Tensor]:
    del architecture, prefix
    tower = CLIPVisionTransformer(config, backend=model.backend)
    plan = tower_plan(config, tower.layer_specs, below("vision_model/", leaves), "vision_model.")
    projection = rows_plan(linear_rows("visual_projection", "visual_projection"), leaves, config)
    return lifted("vision_model/", plan) | projection


def _tower_alone(architecture: Any, config: CLIPConfig, model: Any, leaves: Shapes, prefix: str) -> dict[str, Tensor]:
    del architecture
    return tower_plan(config, model.layer_specs, leaves, prefix)


def below(folder: str, leaves: Shapes) -> dict[str, Any]:
    """The parameters in `folder`, by their paths there."""
    return {path.removeprefix(folder): leaf for path, leaf in leaves.items() if path.startswith(folder)}


def lifted(folder: str, plan: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A plan of the parameters in `folder` as one of the whole tree."""
    return {
        name: tensor._replace(parts=tuple(part._replace(path=folder + part.path) for part in tensor.parts))
        for name, tensor in plan.items()
    }


def text_plan(config: CLIPConfig, layer_specs: Sequence[Any], leaves: Shapes, prefix: str) -> dict[str, Tensor]:
    """The tensors of a text tower. leaves: by their paths in the tower."""
    text = config.text_config
    plan = rows_plan(_TEXT_ROWS, leaves, text, prefix)
    return plan | layer_plan(CLIP_LAYER, leaves, text, layer_specs, prefix)


def _pair_plan(architecture: Any, config: CLIPConfig, model: Any, leaves: Shapes, prefix: str) -> dict[str, Tensor]:
    del prefix
    sigmoid = config.contrastive_loss == "sigmoid"
    tower = CLIPVisionTransformer(config, backend=model.backend)
    vision = tower_plan(config, tower.layer_specs, below("vision_model/", leaves), "vision_model.")
    text = text_plan(config, text_layer_specs(config, model.backend), below("text_model/", leaves), "text_model.")
    plan = lifted("vision_model/", vision) | lifted("text_model/", text)
    head = "text_model.head" if sigmoid else "text_projection"
    plan |= rows_plan(linear_rows(head, "text_projection"), leaves, config)
    plan |= rows_plan(linear_rows("visual_projection", "visual_projection"), leaves, config)
    shape = (1,) if sigmoid else ()
    names = [name for name in ("logit_scale", "logit_bias") if name in leaves]
    return plan | {name: reshaped(name, leaves, shape) for name in names}


def _sides(value: Any, name: str) -> tuple[int, int]:
    sides = tuple(value) if isinstance(value, list) else (value, value)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ConfigError(f"config.json: {name}={value!r} must be one or two whole numbers above 0")
    return sides


def read_tower(fields: Fields) -> dict[str, Any]:
    """What all towers' configs have in common."""
    height, width = _sides(fields.take("image_size"), "image_size")
    patch, other = _sides(fields.take("patch_size"), "patch_size")
    if patch != other:
        raise ConfigError(f"config.json: patch_size={[patch, other]} is not supported; patches must be squares")
    return {
        "num_layers": fields.size("num_hidden_layers"),
        "hidden_size": fields.size("hidden_size"),
        "num_attention_heads": fields.size("num_attention_heads"),
        "ffn_hidden_size": fields.size("intermediate_size"),
        "num_channels": fields.size("num_channels"),
        "img_h": height,
        "img_w": width,
        "patch_dim": patch,
        "crop_to_patches": height % patch > 0 or width % patch > 0,
        "activation_func": fields.activation("hidden_act"),
        "layernorm_epsilon": fields.number("layer_norm_eps"),
        "hidden_dropout": 0.0,
    }


def write_tower(config: CLIPConfig) -> dict[str, Any]:
    """Inverse of `read_tower`."""
    size = config.img_h if config.img_h == config.img_w else [config.img_h, config.img_w]
    return {
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.ffn_hidden_size,
        "num_channels": config.num_channels,
        "image_size": size,
        "patch_size": config.patch_dim,
        "hidden_act": ACTIVATION_NAMES[config.activation_func],
        "layer_norm_eps": config.layernorm_epsilon,
    }


def read_clip_tower(fields: Fields) -> dict[str, Any]:
    """config.json of a CLIPVisionModel -> arguments of CLIPConfig."""
    fields.optional("projection_dim")  # of the pair that the tower was a part of
    fields.number("initializer_factor")
    return read_tower(fields) | {
        "ln_pre": True,
        "ln_post": "pooled",
        "pooler": "class_token",
        "attention_dropout": fields.number("attention_dropout"),
        "init_method_std": fields.number("initializer_range"),
    }


def write_clip_tower(config: CLIPConfig) -> dict[str, Any]:
    """Inverse of `read_clip_tower`."""
    return write_tower(config) | {
        "attention_dropout": config.attention_dropout,
        "initializer_range": config.init_method_std,
        "initializer_factor": 1.0,
    }


def _read_projected_tower(fields: Fields) -> dict[str, Any]:
    size = fields.size("projection_dim")
    return read_clip_tower(fields) | {"projection_dim": size}


def _write_projected_tower(config: CLIPConfig) -> dict[str, Any]:
    return write_clip_tower(config) | {"projection_dim": config.projection_dim}


def read_siglip_tower(fields: Fields) -> dict[str, Any]:
    """config.json of a SiglipVisionModel -> arguments of CLIPConfig."""
    return read_tower(fields) | {
        "class_token_len": 0,
        "embedder_bias": True,
        "ln_post": "tokens",
        "pooler": "attention" if fields.flag("vision_use_head") else "none",
        "attention_dropout": fields.number("attention_dropout"),
    }


def write_siglip_tower(config: CLIPConfig) -> dict[str, Any]:
    """Inverse of `read_siglip_tower`."""
    head = {"vision_use_head": config.pooler == "attention", "attention_dropout": config.attention_dropout}
    return write_tower(config) | head


CLIP_TOWER_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "initializer_factor": 1.0,
}
SIGLIP_TOWER_DEFAULTS: dict[str, Any] = CLIP_TOWER_DEFAULTS | {
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "vision_use_head": True,
}
TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "initializer_factor": 1.0,
    "eos_token_id": 49407,
}
_SIGLIP_TEXT_DEFAULTS: dict[str, Any] = TEXT_DEFAULTS | {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "max_position_embeddings": 64,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "projection_size": None,
}


def part_of(fields: Fields, name: str, defaults: Mapping[str, Any]) -> Fields:
    """The config of one part, an object inside config.json."""
    values = fields.take(name)
    if values is not None and not isinstance(values, dict):
        raise ConfigError(f"config.json: {name} must be an object, not {values!r}")
    return Fields(values or {}, defaults)


def read_text(fields: Fields) -> dict[str, Any]:
    """config.json of a text tower -> arguments of CLIPConfig."""
    for name in ("attention_dropout", "initializer_range", "initializer_factor"):
        fields.number(name)  # of training; the image tower's count for both
    fields.optional("projection_dim")
    return {
        "text_num_layers": fields.size("num_hidden_layers"),
        "text_hidden_size": fields.size("hidden_size"),
        "text_num_attention_heads": fields.size("num_attention_heads"),
        "text_ffn_hidden_size": fields.size("intermediate_size"),
        "text_activation_func": fields.activation("hidden_act"),
        "text_layernorm_epsilon": fields.number("layer_norm_eps"),
        "vocab_size": fields.size("vocab_size"),
        "max_sequence_length": fields.size("max_position_embeddings"),
        "share_embeddings_and_output_weights": True,
    }


def write_text(config: CLIPConfig) -> dict[str, Any]:
    """Inverse of `read_text`."""
    if config.text_num_layers is None:
        raise ConfigError("text_num_layers=None: it needs a text tower")
    text = config.text_config
    return {
        "num_hidden_layers": text.num_layers,
        "hidden_size": text.hidden_size,
        "num_attention_heads": text.num_attention_heads,
        "intermediate_size": text.ffn_hidden_size,
        "hidden_act": ACTIVATION_NAMES[text.activation_func],
        "layer_norm_eps": text.layernorm_epsilon,
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.max_sequence_length,
        "attention_dropout": text.attention_dropout,
    }


def read_pooling(fields: Fields) -> dict[str, Any]:
    """Which token stands for a text."""
    eos = fields.take("eos_token_id")
    # Files that say 2 are older than the rule; their texts end with the highest id.
    return {"text_pooling": "highest"} if eos == 2 else {"text_pooling": "eos", "eos_token_id": eos}


def written_eos(config: CLIPConfig) -> int | None:
    """Inverse of `read_pooling`."""
    return 2 if config.text_pooling == "highest" else config.eos_token_id


def _read_clip(fields: Fields) -> dict[str, Any]:
    vision, text = (
        part_of(fields, name, defaults)
        for name, defaults in (("vision_config", CLIP_TOWER_DEFAULTS), ("text_config", TEXT_DEFAULTS))
    )
    for name in ("vision_config_dict", "text_config_dict"):
        fields.optional(name)  # repeats the objects above
    fields.number("initializer_factor")
    arguments = read_clip_tower(vision) | read_text(text)
    pooling = read_pooling(text)
    vision.finish()
    text.finish()
    scale = fields.number("logit_scale_init_value")
    return arguments | pooling | {"projection_dim": fields.size("projection_dim"), "logit_scale_init": scale}


def _write_clip(config: CLIPConfig) -> dict[str, Any]:
    eos = written_eos(config)
    projection = {"projection_dim": config.projection_dim}
    return {
        "vision_config": {"model_type": "clip_vision_model"} | write_clip_tower(config) | projection,
        "text_config": {"model_type": "clip_text_model"} | write_text(config) | projection | {"eos_token_id": eos},
        "logit_scale_init_value": config.logit_scale_init,
        **projection,
    }


def _read_siglip(fields: Fields) -> dict[str, Any]:
    vision = part_of(fields, "vision_config", SIGLIP_TOWER_DEFAULTS)
    text = part_of(fields, "text_config", _SIGLIP_TEXT_DEFAULTS)
    fields.number("initializer_factor")
    arguments = read_siglip_tower(vision) | read_text(text)
    size = text.take("projection_size")
    if size not in (None, arguments["hidden_size"]):
        raise ConfigError(
            f"config.json: projection_size={size} must be the vision tower's hidden_size={arguments['hidden_size']}"
        )
    text.optional("eos_token_id")
    vision.finish()
    text.finish()
    return arguments | {"text_causal": False, "text_pooling": "last", "contrastive_loss": "sigmoid"}


def _write_siglip(config: CLIPConfig) -> dict[str, Any]:
    text = write_text(config) | {"projection_size": config.hidden_size}
    return {
        "vision_config": {"model_type": "siglip_vision_model"} | write_siglip_tower(config),
        "text_config": {"model_type": "siglip_text_model"} | text,
    }


def vision_architecture(name: str, model_type: str, **parts: Any) -> Architecture:
    """An architecture without a head of words."""
    common = {"prefix": "", "head": None, "base": None, "config_type": CLIPConfig, "example_inputs": example_inputs}
    return Architecture(name=name, model_type=model_type, **(common | parts))


CLIP_TOWER = vision_architecture(
    "CLIPVisionModel", "clip_vision_model", defaults=CLIP_TOWER_DEFAULTS, read=read_clip_tower, write=write_clip_tower,
    build=CLIPVisionTransformer, plan=_tower_alone, older_names=((r"^vision_model\.", ""),),
    ignored=r"(vision_model\.)?embeddings\.position_ids",
)  # fmt: skip
SIGLIP_TOWER = vision_architecture(
    "SiglipVisionModel", "siglip_vision_model", defaults=SIGLIP_TOWER_DEFAULTS, read=read_siglip_tower,
    write=write_siglip_tower, build=CLIPVisionTransformer, plan=_tower_alone, older_names=((r"^vision_model\.", ""),),
)  # fmt: skip
ARCHITECTURES = (
    CLIP_TOWER,
    SIGLIP_TOWER,
    vision_architecture(
        "CLIPVisionModelWithProjection", "clip_vision_model", defaults=CLIP_TOWER_DEFAULTS | {"projection_dim": 512},
        read=_read_projected_tower, write=_write_projected_tower, build=CLIPVisionModelWithProjection,
        plan=_projected_plan, ignored=r"vision_model\.embeddings\.position_ids",
    ),
    vision_architecture(
        "CLIPModel", "clip", read=_read_clip, write=_write_clip, build=CLIPModel, plan=_pair_plan,
        defaults={"vision_config": None, "text_config": None, "projection_dim": 512, "initializer_factor": 1.0,
                  "logit_scale_init_value": 2.6592},
        ignored=r"(vision|text)_model\.embeddings\.position_ids",
    ),
    vision_architecture(
        "SiglipModel", "siglip", read=_read_siglip, write=_write_siglip, build=CLIPModel, plan=_pair_plan,
        defaults={"vision_config": None, "text_config": None, "initializer_factor": 1.0},
    ),
)  # fmt: skip
