"""Options of BERT."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses

from megajax.config import Activation, TransformerConfig
from megajax.config_checks import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig(TransformerConfig):
    """An encoder with the heads that it is pretrained with. Megatron: the arguments of its `BertModel`.

    Megatron's BERT normalises the input of each sublayer. The published one (arXiv:1810.04805) normalises the sum after
    each sublayer, embeddings included. That is the same network with `apply_residual_connection_post_layernorm`: what
    stands there after the embeddings, and after layer i, is here the first norm of layer 0, and of layer i + 1.
    """

    num_tokentypes: int = 2
    """Kinds of tokens, such as those of a first and a second text; 0 for none."""
    add_lm_head: bool = True
    """Logits of the masked tokens; without, the model ends with the states of its tokens."""
    transform_lm_head: bool = True
    """A dense layer, `lm_head_activation` and a norm before the output layer (Megatron `apply_lm_head`)."""
    lm_head_activation: Activation = "gelu"
    output_layer_bias: bool = True
    add_binary_head: bool = True
    """Two logits for whether two texts follow each other."""
    add_pooler: bool | None = None
    """The first token's state through a dense layer and tanh; None follows `add_binary_head`, which needs it."""

    mask_prob: float = 0.15
    """In training, the share of the tokens that are to be found."""
    short_seq_prob: float = 0.1
    """In training, the share of the samples that are shorter than they could be."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.num_tokentypes >= 0, f"num_tokentypes={self.num_tokentypes} must not be negative")
        self._derive("add_pooler", self.add_binary_head)
        require(not self.sandwich_norm, "sandwich_norm=True is not possible in this family; drop it")
        require(
            bool(self.add_pooler) or not self.add_binary_head, "add_binary_head=True needs the pooler; drop add_pooler"
        )
        require(0 < self.mask_prob < 1, f"mask_prob={self.mask_prob} must be above 0 and below 1")
        require(0 <= self.short_seq_prob <= 1, f"short_seq_prob={self.short_seq_prob} must be from 0 to 1")
        require(
            not self.multi_latent_attention and self.num_moe_experts is None and not self.mtp_num_layers,
            "multi_latent_attention, num_moe_experts and mtp_num_layers are not possible in this family; drop them",
        )
