"""Options of T5."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from typing import Literal

from megajax.config import TransformerConfig
from megajax.config_checks import require, require_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config(TransformerConfig):
    """An encoder and a decoder of like layers. Megatron: the arguments of its `T5Model`.

    `num_layers` is the decoder's. Where `add_decoder` is False the model is its encoder alone.
    """

    position_embedding_type: Literal["relative", "learned_absolute", "rope", "none"] = "relative"  # type: ignore[assignment]
    """"relative": a learned bias of attention scores by distance, in each stack one for all layers."""
    encoder_num_layers: int | None = None
    """None: as many as the decoder's."""
    add_decoder: bool = True
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    output_layer_bias: bool | None = None
    """None: only where the embedding is the output layer, as in Megatron."""
    scale_decoder_outputs: bool = False
    """Multiplies what the output layer reads by hidden_size^-0.5, as T5 1.0 does."""
    mask_prob: float = 0.15
    """In training, the share of the tokens that the decoder has to write."""
    short_seq_prob: float = 0.1
    """In training, the share of the samples that are shorter than they could be."""
    vocab_extra_ids: int = 100
    """In training, tokens that stand for a missing span; a text has no more spans than these."""
    decoder_seq_length: int | None = None
    """In training, the decoder's tokens; None: as many as the masked share and its sentinels may need."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._derive("encoder_num_layers", self.num_layers)
        self._derive("output_layer_bias", self.share_embeddings_and_output_weights)
        require_positive(self, "encoder_num_layers", "relative_attention_max_distance", "decoder_seq_length")
        require_positive(self, "vocab_extra_ids")
        require(not self.sandwich_norm, "sandwich_norm=True is not possible in this family; drop it")
        require(0 < self.mask_prob < 1, f"mask_prob={self.mask_prob} must be above 0 and below 1")
        require(0 <= self.short_seq_prob <= 1, f"short_seq_prob={self.short_seq_prob} must be from 0 to 1")
        require(
            self.relative_attention_num_buckets >= 4,
            f"relative_attention_num_buckets={self.relative_attention_num_buckets} must be at least 4",
        )
        require(
            not self.multi_latent_attention and self.num_moe_experts is None and not self.mtp_num_layers,
            "multi_latent_attention, num_moe_experts and mtp_num_layers are not possible in this family; drop them",
        )
        require(
            self.num_query_groups == self.num_attention_heads,
            f"num_query_groups={self.num_query_groups} must be num_attention_heads={self.num_attention_heads} in this"
            " family; drop it",
        )

    @property
    def encoder_config(self) -> T5Config:
        """The encoder's layers as a config of its own."""
        assert self.encoder_num_layers is not None
        return self.replace(num_layers=self.encoder_num_layers)
