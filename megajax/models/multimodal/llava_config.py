"""Options of LLaVA: a language model, a vision tower, and the projection between them."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, Literal, Self

from megajax.config import Activation, ConfigError, PositionEmbedding, TransformerConfig
from megajax.config_checks import require, require_positive
from megajax.models.vision.clip_config import CLIPConfig
from megajax.models.vision.image_tokens import CLASS_TOKENS
from megajax.models.vision.radio_config import RADIOConfig
from megajax.models.vision.vision_config import SUBTYPES, FinalNorm, Pooler, VisionConfig
from megajax.ssm.mamba_config import MambaConfig

IMAGE_TOKEN = "<image>"
VisionModelType = Literal["clip", "siglip", "internvit", "internvit300M", "radio", "radio-g", "cradio-g"]
LanguageModelType = Literal["gpt", "mamba"]

LANGUAGE_CONFIGS: Mapping[LanguageModelType, type[TransformerConfig]] = {"gpt": TransformerConfig, "mamba": MambaConfig}
"""What the language model's options are a config of."""
_OF_HYBRIDS = tuple(
    name for name in MambaConfig.__dataclass_fields__ if name not in TransformerConfig.__dataclass_fields__
)

_SHARED = (
    *("hidden_dropout", "attention_dropout", "init_method_std", "bf16", "fp16", "params_dtype"),
    *("attention_softmax_in_fp32", "apply_query_key_layer_scaling", "fp32_residual_connection"),
    *("recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules"),
)
"""Options that tower and projection have from the language model."""
_NOT_OF_TOWERS = re.compile(
    "vocab_size|make_vocab.*|max_sequence_length|share_.*|position_embedding_type|rotary_.*|rope_.*|yarn_.*|mtp_.*"
    "|no_rope_freq|seq_len_.*|label_smoothing|z_loss_coeff|embedding_init_.*"
)
"""Options of `TransformerConfig` that no tower reads."""
_SIZES = ("img_h", "img_w", "patch_dim", "crop_to_patches")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LLaVAConfig(MambaConfig):
    """The fields of `MambaConfig` are the language model's, those that begin with vision_ the tower's.

    A GPT has those of `TransformerConfig` alone. `max_sequence_length` counts what the language model sees, images
    included.
    """

    # Language model
    language_model_type: LanguageModelType = "gpt"
    """A transformer, with experts or without, or what `hybrid_override_pattern` says."""
    position_embedding_type: PositionEmbedding = "learned_absolute"

    # Tower
    vision_model_type: VisionModelType = "clip"
    img_h: int = 336
    img_w: int = 336
    patch_dim: int = 14
    crop_to_patches: bool = False
    vision_num_layers: int = 24
    vision_hidden_size: int = 1024
    vision_num_attention_heads: int = 16
    vision_num_query_groups: int | None = None
    vision_kv_channels: int | None = None
    vision_ffn_hidden_size: int | None = None
    vision_activation_func: Activation = "quick_gelu"
    vision_gated_linear_unit: bool = False
    vision_normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    vision_layernorm_epsilon: float = 1e-5
    vision_add_bias_linear: bool = True
    vision_add_qkv_bias: bool = False
    vision_qk_layernorm: bool = False
    vision_class_token_len: int | None = None
    """Class tokens; None: as many as the type has."""
    vision_ln_pre: bool | None = None
    vision_ln_post: FinalNorm | None = None
    vision_embedder_bias: bool | None = None
    """Of these three, None is what the type has."""
    vision_pooler: Pooler = "none"
    vision_layer_scale_init: float | None = None
    vision_num_channels: int = 3
    vision_image_mean: tuple[float, ...] | None = None
    vision_image_std: tuple[float, ...] | None = None
    vision_max_img_h: int = 2048
    vision_max_img_w: int = 2048
    vision_has_cpe: bool = True
    vision_interpolate_align_corners: bool = True
    vision_use_mask_token: bool = False
    """The last five, of towers of type radio only; see `RADIOConfig`."""
    vision_feature_layer: int | tuple[int, ...] | None = None
    """Layers whose output is used: so many, or counted from the end, -1 being all; None: all and the final norm. Of
    several, the outputs stand side by side."""
    drop_vision_class_token: bool = False
    """Whether the language model sees only patches."""

    # Projection
    vision_projection_type: Literal["mlp", "affine"] = "mlp"
    projection_ffn_hidden_size: int | None = None
    """Hidden size of the projection's MLP; None: the language model's."""
    projection_activation_func: Activation = "gelu"
    projection_gated_linear_unit: bool = False
    projection_add_bias_linear: bool = True
    projection_normalization: Literal["none", "LayerNorm", "RMSNorm"] = "none"
    """A norm in front of the projection."""
    pixel_shuffle: bool = False
    """Makes one token of every four patches."""

    # Text
    image_token_index: int = -200
    """Id that stands in the text for an image."""
    image_placeholders: Literal["one", "each"] = "one"
    """How often it stands there: once an image (Megatron), or once for each of its embeddings (Hugging Face)."""
    tile_tags: tuple[tuple[int, ...], ...] | None = None
    """Token ids in front of tile 1, 2, ... of an image; the last are those of its last tile, the thumbnail."""

    # Training
    freeze_language_model: bool = False
    freeze_vision_model: bool = False
    freeze_vision_projection: bool = False

    def __post_init__(self) -> None:
        self._language_type.__post_init__(self)
        if self.language_model_type == "gpt":
            for name in _OF_HYBRIDS:
                value, default = getattr(self, name), MambaConfig.__dataclass_fields__[name].default
                require(value == default, f"{name}={value!r} has no effect without language_model_type='mamba'; set it")
        require_positive(self, "vision_hidden_size", "vision_num_attention_heads", "projection_ffn_hidden_size")
        self._derive("vision_kv_channels", self.vision_hidden_size // self.vision_num_attention_heads)
        self._derive("vision_num_query_groups", self.vision_num_attention_heads)
        self._derive("vision_ffn_hidden_size", 4 * self.vision_hidden_size)
        self._derive("projection_ffn_hidden_size", self.hidden_size)
        for name, value in self._options_of_type().items():
            self._derive(f"vision_{name}", value)
        require(self.mtp_num_layers is None, f"mtp_num_layers={self.mtp_num_layers} is not possible here; drop it")
        layers = self.vision_feature_layer
        require(layers != (), "vision_feature_layer=() names no layer; leave it out")
        require(
            all(0 <= count <= self.vision_num_layers for count in self.vision_layers_used or ()),
            f"vision_feature_layer={layers} is not among the outputs of vision_num_layers={self.vision_num_layers}",
        )
        tower = self.vision_config  # validates the tower
        tokens = tower.num_image_tokens - (tower.class_token_len if self.drop_vision_class_token else 0)
        if self.pixel_shuffle:
            side = math.isqrt(tokens)
            require(
                side * side == tokens and side % 2 == 0,
                f"pixel_shuffle=True needs an even square of tokens, not {tokens}; change img_h, img_w or patch_dim, or"
                " set drop_vision_class_token",
            )
        lengths = {len(tag) for tag in self.tile_tags or ()}
        require(len(lengths) <= 1, f"tile_tags have {sorted(lengths)} tokens; make them equally long")

    def _options_of_type(self) -> dict[str, Any]:
        kind = self.vision_model_type
        radio = {
            "class_token_len": CLASS_TOKENS[kind],
            "ln_pre": False,
            "ln_post": "tokens" if kind == "radio-g" else "none",
            "embedder_bias": kind == "radio-g",
        }
        return radio if self.is_radio else dict(SUBTYPES[kind])

    @property
    def _language_type(self) -> type[TransformerConfig]:
        return LANGUAGE_CONFIGS[self.language_model_type]

    @property
    def language_config(self) -> TransformerConfig:
        """The language model as a config of its own."""
        fields = [field.name for field in dataclasses.fields(self._language_type) if field.init]
        return self._language_type(**{name: getattr(self, name) for name in fields})

    @property
    def residual_branches(self) -> int:
        """How often the language model adds to its residual stream."""
        return self.language_config.residual_branches

    @property
    def ssm_groups(self) -> int | None:
        """Groups of heads that share B and C, if the language model has such."""
        return self.language_config.ssm_groups

    def is_moe_layer(self, index: int) -> bool:
        """Whether the language model's layer `index` (from 0) has experts."""
        return self._language_type.is_moe_layer(self, index)

    def for_layer(self, index: int) -> Self:
        """The config of a stack of layers like the language model's layer `index` (from 0)."""
        layer: Any = self._language_type.for_layer(self, index)
        return layer

    @property
    def vision_config(self) -> CLIPConfig | RADIOConfig:
        """The tower as a config of its own."""
        values: dict[str, Any] = {
            "img_h": self.img_h,
            "img_w": self.img_w,
            "patch_dim": self.patch_dim,
            "crop_to_patches": self.crop_to_patches,
            "num_layers": self.vision_num_layers,
            "hidden_size": self.vision_hidden_size,
            "num_attention_heads": self.vision_num_attention_heads,
            "num_query_groups": self.vision_num_query_groups,
            "kv_channels": self.vision_kv_channels,
            "ffn_hidden_size": self.vision_ffn_hidden_size,
            "activation_func": self.vision_activation_func,
            "gated_linear_unit": self.vision_gated_linear_unit,
            "normalization": self.vision_normalization,
            "layernorm_epsilon": self.vision_layernorm_epsilon,
            "add_bias_linear": self.vision_add_bias_linear,
            "add_qkv_bias": self.vision_add_qkv_bias,
            "qk_layernorm": self.vision_qk_layernorm,
            "class_token_len": self.vision_class_token_len,
            "ln_pre": self.vision_ln_pre,
            "ln_post": self.vision_ln_post,
            "embedder_bias": self.vision_embedder_bias,
            "pooler": self.vision_pooler,
            "layer_scale_init": self.vision_layer_scale_init,
            "num_channels": self.vision_num_channels,
            "image_mean": self.vision_image_mean,
            "image_std": self.vision_image_std,
        }
        values |= {name: getattr(self, name) for name in _SHARED}
        if not self.is_radio:
            return CLIPConfig(**values)
        return RADIOConfig(
            max_img_h=self.vision_max_img_h,
            max_img_w=self.vision_max_img_w,
            has_cpe=self.vision_has_cpe,
            interpolate_align_corners=self.vision_interpolate_align_corners,
            use_mask_token=self.vision_use_mask_token,
            summary_idxs=(0,) if self.vision_class_token_len else (),
            **values,
        )

    @property
    def is_radio(self) -> bool:
        """Whether the tower is a `RADIOModel`."""
        return "radio" in self.vision_model_type

    @property
    def projection_config(self) -> TransformerConfig:
        """The projection as a config of its own: that of an MLP whose input may have another width."""
        norm = self.projection_normalization
        return TransformerConfig(
            num_layers=1,
            hidden_size=self.hidden_size,
            num_attention_heads=1,
            ffn_hidden_size=self.projection_ffn_hidden_size,
            activation_func=self.projection_activation_func,
            gated_linear_unit=self.projection_gated_linear_unit,
            add_bias_linear=self.projection_add_bias_linear,
            normalization="LayerNorm" if norm == "none" else norm,
            layernorm_epsilon=self.layernorm_epsilon,
            **{name: getattr(self, name) for name in _SHARED},
        )

    @property
    def vision_layers_used(self) -> tuple[int, ...] | None:
        """After how many of the tower's layers its output is used, without its final norm; None: all, and the norm."""
        layers, end = self.vision_feature_layer, self.vision_num_layers + 1
        if layers is None:
            return None
        return tuple(
            layer if layer >= 0 else end + layer for layer in ((layers,) if isinstance(layers, int) else layers)
        )

    @property
    def img_seq_len(self) -> int:
        """Embeddings of one tile, as the language model sees them."""
        tower = self.vision_config
        count = tower.num_image_tokens - (tower.class_token_len if self.drop_vision_class_token else 0)
        count = count // 4 if self.pixel_shuffle else count
        return count + (len(self.tile_tags[0]) if self.tile_tags else 0)

    @property
    def frozen_parameters(self) -> tuple[str, ...]:
        """Parts that training leaves as they are."""
        flags = {
            "language_model": self.freeze_language_model,
            "vision_model": self.freeze_vision_model,
            "vision_projection": self.freeze_vision_projection,
        }
        return tuple(name for name, frozen in flags.items() if frozen)

    @property
    def draws_noise(self) -> bool:
        """Whether training depends on random numbers beside the first weights."""
        return super().draws_noise or self.vision_config.draws_noise


def language_arguments(language: TransformerConfig) -> dict[str, Any]:
    """The arguments of a `LLaVAConfig` whose language model is `language`.

    Raises:
      ConfigError: it is of a kind that LLaVA has not.
    """
    kind = next((name for name, config_type in LANGUAGE_CONFIGS.items() if type(language) is config_type), None)
    require(
        kind is not None, f"a language model of type {type(language).__name__} is not supported; use a GPT or hybrid"
    )
    fields = [
        field.name for field in dataclasses.fields(language) if field.init and field.name not in language._derived
    ]
    return {"language_model_type": kind, **{name: getattr(language, name) for name in fields}}


def tower_arguments(tower: VisionConfig, vision_model_type: VisionModelType) -> dict[str, Any]:
    """The arguments of a `LLaVAConfig` whose tower is `tower`.

    Raises:
      ConfigError: the tower has an option that LLaVA's do not have.
    """
    ours = {field.name for field in dataclasses.fields(LLaVAConfig)}
    kind = RADIOConfig if isinstance(tower, RADIOConfig) else VisionConfig  # whatever text tower stood beside it
    theirs = [field.name for field in dataclasses.fields(kind) if field.init]
    arguments: dict[str, Any] = {f"vision_{name}": getattr(tower, name) for name in theirs if f"vision_{name}" in ours}
    arguments |= {name: getattr(tower, name) for name in _SIZES}
    arguments["vision_model_type"] = vision_model_type
    shared = {name: getattr(tower, name) for name in _SHARED}
    text = {"num_layers": 1, "hidden_size": 1, "num_attention_heads": 1}
    rebuilt = LLaVAConfig(**text, **arguments, **shared).vision_config
    for name in theirs:
        if not _NOT_OF_TOWERS.fullmatch(name) and getattr(rebuilt, name) != getattr(tower, name):
            raise ConfigError(
                f"{name}={getattr(tower, name)!r} of the vision tower is not supported; it must be"
                f" {getattr(rebuilt, name)!r}"
            )
    return arguments
