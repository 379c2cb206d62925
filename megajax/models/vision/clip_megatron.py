"""The image tower's weights in Megatron's checkpoints."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from megajax.config import ConfigError
from megajax.interop.codec import Codec
from megajax.interop.megatron_config import config_arguments, megatron_settings
from megajax.interop.megatron_fields import MODEL_ARGUMENTS, Mapped, Plumbing, Rule
from megajax.interop.megatron_layouts import Part, Path, Tensor, layer_tensors, outer_tensors
from megajax.models.family import MegatronWeights
from megajax.models.vision.clip_config import CLIPConfig
from megajax.models.vision.clip_vit_model import CLIPVisionTransformer
from megajax.models.vision.vision_config import SUBTYPES, VisionConfig

_PLUMBING = ("pg_collection", "vp_stage", "transformer_layer_spec", "ln_pre_impl", "ln_post_impl")


def same(name: str) -> Mapped:
    """An argument that is a field of the same name."""
    return Mapped(lambda value, _: {name: value})


def nothing() -> Mapped:
    """An argument that is read beside the others."""
    return Mapped(lambda value, _: {})


VISION_ARGUMENTS: Mapping[str, Rule] = {
    **{name: same(name) for name in ("img_h", "img_w", "patch_dim")},
    **{name: nothing() for name in ("class_token_len", "add_class_token", "model_subtype")},
    **{name: Plumbing() for name in _PLUMBING},
}


def subtype_of(model_kwargs: Mapping[str, Any]) -> str:
    """The `model_subtype`. Raises ConfigError for an unknown one."""
    subtype = model_kwargs.get("model_subtype", "clip")
    if subtype not in SUBTYPES:
        raise ConfigError(f"model_subtype={subtype!r} is not supported; use one of {', '.join(SUBTYPES)}")
    return subtype


def vision_arguments(
    fields: Mapping[str, Any], model_kwargs: Mapping[str, Any], rules: Mapping[str, Rule], family: str
) -> dict[str, Any]:
    """Arguments of a `VisionConfig` for Megatron's settings, class tokens and norms left out."""
    positions = {"position_embedding_type": "learned_absolute", **fields}
    return config_arguments(positions, model_kwargs, family=family, argument_rules={**MODEL_ARGUMENTS, **rules})


def read_config(
    fields: Mapping[str, Any], model_kwargs: Mapping[str, Any], tensors: dict[str, np.ndarray]
) -> CLIPConfig:
    """See `MegatronWeights.read_config`."""
    options = dict(SUBTYPES[subtype_of(model_kwargs)])
    length = model_kwargs.get("class_token_len", 1 if "class_token" in tensors else 0)
    if not model_kwargs.get("add_class_token", "class_token" in tensors):
        length = 0
    options["class_token_len"] = length
    arguments = vision_arguments(fields, model_kwargs, VISION_ARGUMENTS, "clip")
    return CLIPConfig(**(arguments | options))


def write_config(config: CLIPConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The inverse of `read_config`.

    Raises:
      ConfigError: Megatron's tower has no such options.
    """
    _require_tower_alone(config)
    fields = vision_fields(config)
    names = ("embedder_bias", "ln_pre", "ln_post")
    subtype = next((n for n, o in SUBTYPES.items() if all(getattr(config, k) == o[k] for k in names)), None)
    if subtype is None:
        stated = ", ".join(f"{name}={getattr(config, name)!r}" for name in names)
        raise ConfigError(f"{stated} cannot be expressed in Megatron's CLIP ViT; use the options of one model_subtype")
    arguments = {name: getattr(config, name) for name in ("img_h", "img_w", "patch_dim", "class_token_len")}
    return fields, arguments | {"model_subtype": subtype, "add_class_token": config.class_token_len > 0}


def _require_tower_alone(config: CLIPConfig) -> None:
    for name in ("text_num_layers", "projection_dim", "num_classes"):
        value = getattr(config, name)
        if value is not None:
            raise ConfigError(f"{name}={value} has no counterpart in Megatron, whose CLIP is an image tower alone")


def vision_fields(config: VisionConfig) -> dict[str, Any]:
    """Megatron's TransformerConfig fields of a tower. Raises ConfigError for options that its towers lack."""
    lacking = {"layer_scale_init": None, "image_mean": None, "num_channels": 3, "crop_to_patches": False}
    for name, only in lacking.items():
        if getattr(config, name) != only:
            raise ConfigError(
                f"{name}={getattr(config, name)!r} cannot be expressed in a Megatron config: it has {only}"
            )
    fields, _ = megatron_settings(config.replace(vocab_size=1))
    return fields


def tower_tensors(config: VisionConfig, model: Any, params: Mapping[Path, Any]) -> Iterator[Tensor]:
    """Megatron's tensors of an image tower."""
    D, length = config.hidden_size, config.class_token_len
    if length:
        yield whole("class_token", ("class_token",), params, (1, length, D))
    yield from outer_tensors(params, [path for path in params if path[0] in ("ln_pre", "ln_post")])
    yield patch_kernel("conv1.weight", ("conv1", "kernel"), config)
    yield from outer_tensors(params, [path for path in params if path == ("conv1", "bias")])
    shape = (config.num_image_tokens, D)
    yield whole("position_embeddings.weight", ("position_embeddings",), params, shape)
    yield from layer_tensors(config, model.layer_specs, params)


def whole(name: str, path: Path, params: Mapping[Path, Any], shape: tuple[int, ...]) -> Tensor:
    """A tensor that holds one parameter, in another shape."""
    part = Part(path, None, params[path].shape)
    codec = Codec(shape, lambda arrays: arrays[0].reshape(shape), lambda array: [array.reshape(part.shape)])
    return Tensor(name, (part,), codec=codec)


def patch_codec(config: VisionConfig) -> Codec:
    """A patch embedding's kernel [in, out] as that of a convolution [out, channels, rows, columns]."""
    size, D = config.patch_features, config.hidden_size
    shape = (D, config.num_channels, config.patch_dim, config.patch_dim)
    return Codec(shape, lambda arrays: arrays[0].T.reshape(shape), lambda array: [array.reshape(D, size).T])


def patch_kernel(name: str, path: Path, config: VisionConfig) -> Tensor:
    """The kernel of a patch embedding as a convolution's."""
    part = Part(path, None, (config.patch_features, config.hidden_size))
    return Tensor(name, (part,), codec=patch_codec(config))


def nested(prefix: str, params: Mapping[Path, Any]) -> dict[Path, Any]:
    """The parameters below `prefix`, by their paths there."""
    return {path[1:]: leaf for path, leaf in params.items() if path[0] == prefix}


def lifted(prefix: str, tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Tensors of a module as those of a part called `prefix` of a larger one, as it is called there, too."""
    for tensor in tensors:
        parts = tuple(part._replace(path=(prefix, *part.path)) for part in tensor.parts)
        yield tensor._replace(name=f"{prefix}.{tensor.name}", parts=parts)


def _tensors(config: CLIPConfig, model: Any, params: Mapping[Path, Any]) -> Iterator[Tensor]:
    _require_tower_alone(config)
    return tower_tensors(config, model, params)


MEGATRON = MegatronWeights(read_config, write_config, CLIPVisionTransformer, _tensors)
