"""Options of RETRO."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from typing import Self

from megajax.config import ConfigError, TransformerConfig
from megajax.config_checks import require, require_fraction, require_positive

_EVERY = 3
"""Layers from one that reads neighbours to the next."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetroConfig(TransformerConfig):
    """A decoder some of whose layers read the neighbours of each chunk of the text, and the encoder of the neighbours.

    The encoder is as wide as the decoder. Names are those of Megatron's `core/models/retro/config.py`.
    """

    retro_chunk_length: int = 64
    """Tokens of a chunk: what neighbours are looked for, and what the database is made of."""
    retro_num_neighbors: int = 2
    retro_num_retrieved_chunks: int = 2
    """Chunks that are read of each neighbour: itself and those after it."""
    retro_encoder_num_layers: int = 2
    retro_encoder_hidden_dropout: float = 0.1
    retro_encoder_attention_dropout: float = 0.1
    """Of the encoder's attention to itself; where it reads the chunk, `attention_dropout` counts."""
    retro_encoder_rotary: bool = False
    """A rotary embedding in the encoder's attention to itself, too. Megatron's has none: where positions are not
    learned, its encoder takes a neighbour for a bag of tokens."""
    retro_cross_attention_rotary: bool = False
    """A rotary embedding where neighbours read the chunk and where the text reads them: the places of a neighbour are
    those of the chunk and of what follows it, as the relative positions of arXiv:2112.04426, B.1, and unlike Megatron.
    """
    retro_align_neighbors: bool = False
    """Move each neighbour by less than a chunk to where most of its tokens are those of the chunk. Megatron's begin
    where chunks of the database do."""
    post_layer_norm: bool = False
    """A norm after the last layer. Megatron's RETRO has none."""
    retro_block_size: int = 8192
    """In training, chunks whose neighbours are searched for, and kept in `data_cache_path`, together."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "retro_chunk_length", "retro_num_neighbors", "retro_num_retrieved_chunks")
        require_positive(self, "retro_encoder_num_layers", "retro_block_size")
        require_fraction(self, "retro_encoder_hidden_dropout", "retro_encoder_attention_dropout")
        require(
            not self.multi_latent_attention and self.num_moe_experts is None and not self.mtp_num_layers,
            "multi_latent_attention, num_moe_experts and mtp_num_layers are not possible in this family; drop them",
        )
        require(
            self.num_query_groups == self.num_attention_heads,
            f"num_query_groups={self.num_query_groups} must be num_attention_heads={self.num_attention_heads} in this"
            " family; drop it",
        )
        for name in ("retro_encoder_rotary", "retro_cross_attention_rotary"):
            require(
                not getattr(self, name) or self.position_embedding_type in ("rope", "yarn"),
                f"{name}=True has no effect with position_embedding_type={self.position_embedding_type!r}; use 'rope'",
            )
        for name in ("window_size", "heterogeneous_layers"):
            require(getattr(self, name) is None, f"{name} is not possible in this family; drop it")

    @property
    def retro_retrieved_length(self) -> int:
        """Tokens that are read of each neighbour."""
        return self.retro_num_retrieved_chunks * self.retro_chunk_length

    @property
    def retro_layer_numbers(self) -> tuple[int, ...]:
        """The decoder's layers, counted from 1, that read neighbours. The first of them encodes them for all.

        Raises:
          ConfigError: there are none.
        """
        first = 6 if self.num_layers <= 15 else 9
        if self.num_layers < first:
            raise ConfigError(
                f"num_layers={self.num_layers} leaves no layer that reads neighbors; give {first} or more"
            )
        return tuple(range(first, self.num_layers + 1, _EVERY))

    @property
    def encoder_config(self) -> Self:
        """The encoder's layers as a config of its own."""
        return self.replace(
            num_layers=self.retro_encoder_num_layers,
            hidden_dropout=self.retro_encoder_hidden_dropout,
            attention_dropout=self.retro_encoder_attention_dropout,
            no_rope_freq=None,
        )

    @property
    def draws_noise(self) -> bool:
        """Whether training depends on random numbers beside the first weights."""
        encoder = max(self.retro_encoder_hidden_dropout, self.retro_encoder_attention_dropout)
        return super().draws_noise or encoder > 0
