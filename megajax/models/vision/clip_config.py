"""Options of CLIP: an image tower and, for contrastive training, a text tower."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from typing import Literal

from megajax.config import Activation, TransformerConfig
from megajax.config_checks import require, require_positive
from megajax.models.vision.vision_config import VisionConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPConfig(VisionConfig):
    """A `VisionConfig` with a text tower beside it, if `text_num_layers` is given.

    `vocab_size` and `max_sequence_length` are the text tower's; what has no text_ field of its own is shared.
    """

    text_num_layers: int | None = None
    """Layers of the text tower; None for none: the model is its image tower alone."""
    text_hidden_size: int | None = None
    text_num_attention_heads: int | None = None
    text_ffn_hidden_size: int | None = None
    text_activation_func: Activation | None = None
    text_layernorm_epsilon: float | None = None
    text_causal: bool = True
    """Tokens see only those before them (CLIP), or all (SigLIP)."""
    text_pooling: Literal["highest", "eos", "last"] = "highest"
    """The token whose state stands for the text: the one with the highest id, the first `eos_token_id`, or the last."""
    eos_token_id: int | None = None
    projection_dim: int | None = None
    """Size of the space that both are projected to, linearly, or, without a text tower, the images' features alone.
    None: texts are projected, with a bias, to the size of the images' features (SigLIP)."""
    contrastive_loss: Literal["softmax", "sigmoid"] = "softmax"
    """Cross entropy over the batch in both directions (arXiv:2103.00020), or of each pair alone (arXiv:2303.15343)."""
    logit_scale_init: float = 2.6592
    """Logarithm of the first temperature's inverse."""
    logit_bias_init: float = -10.0
    """For the sigmoid loss only."""

    text_only: bool = False
    """The model is its text tower alone, projected if there is a `projection_dim`; the image tower's options are not
    read."""
    num_classes: int | None = None
    """The model is its image tower with a linear head for so many classes on what is pooled."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "text_num_layers", "text_hidden_size", "text_num_attention_heads")
        require_positive(self, "text_ffn_hidden_size", "projection_dim", "num_classes")
        require(
            not self.text_only or self.text_num_layers is not None,
            "text_only=True needs a text tower; set text_num_layers",
        )
        alone = self.text_num_layers is None and self.projection_dim is None
        require(
            self.num_classes is None or (alone and self.pooler != "none"),
            f"num_classes={self.num_classes} needs an image tower alone, with a pooler; leave out text_num_layers and"
            " projection_dim, and set pooler",
        )
        if alone:
            return
        require(
            self.text_only or self.pooler != "none",
            "pooler='none' leaves no image features to compare with texts; choose another",
        )
        require(
            self.text_pooling != "eos" or self.eos_token_id is not None,
            "text_pooling='eos' needs eos_token_id; set it or use 'highest'",
        )

    @property
    def embedding_dim(self) -> int:
        """Size of the space in which images and texts are compared."""
        return self.projection_dim or self.hidden_size

    @property
    def text_config(self) -> TransformerConfig:
        """The text tower as a config of its own."""
        assert self.text_num_layers is not None
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(TransformerConfig) if f.init}
        size = self.text_hidden_size or self.hidden_size
        own = {
            "num_layers": self.text_num_layers,
            "hidden_size": size,
            "num_attention_heads": self.text_num_attention_heads or self.num_attention_heads,
            "num_query_groups": None,
            "kv_channels": None,
            "ffn_hidden_size": self.text_ffn_hidden_size or 4 * size,
            "activation_func": self.text_activation_func or self.activation_func,
            "layernorm_epsilon": self.text_layernorm_epsilon or self.layernorm_epsilon,
            "position_embedding_type": "learned_absolute",
        }
        return TransformerConfig(**(shared | own))
