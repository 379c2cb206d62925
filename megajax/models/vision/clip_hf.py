"""CLIP and SigLIP in Hugging Face's format: towers alone, and pairs of towers."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from megajax.interop.codec import Codec
from megajax.interop.hf_architecture import Architecture, Part, Row, Tensor, layer_plan, rows_plan
from megajax.models.vision.clip_config import CLIPConfig
from megajax.models.vision.clip_fields_hf import (
    CLIP_TOWER_DEFAULTS,
    SIGLIP_TOWER_DEFAULTS,
    read_clip,
    read_clip_tower,
    read_projected_tower,
    read_siglip,
    read_siglip_tower,
    write_clip,
    write_clip_tower,
    write_projected_tower,
    write_siglip,
    write_siglip_tower,
)
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
        read=read_projected_tower, write=write_projected_tower, build=CLIPVisionModelWithProjection,
        plan=_projected_plan, ignored=r"vision_model\.embeddings\.position_ids",
    ),
    vision_architecture(
        "CLIPModel", "clip", read=read_clip, write=write_clip, build=CLIPModel, plan=_pair_plan,
        defaults={"vision_config": None, "text_config": None, "projection_dim": 512, "initializer_factor": 1.0,
                  "logit_scale_init_value": 2.6592},
        ignored=r"(vision|text)_model\.embeddings\.position_ids",
    ),
    vision_architecture(
        "SiglipModel", "siglip", read=read_siglip, write=write_siglip, build=CLIPModel, plan=_pair_plan,
        defaults={"vision_config": None, "text_config": None, "initializer_factor": 1.0},
    ),
)  # fmt: skip
