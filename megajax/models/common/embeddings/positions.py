"""Positions of tokens, and the rotary embedding that a config asks for."""

# SPDX-License-Identifier: Apache-2.0
# B batch, S sequence
import jax
import jax.numpy as jnp

from megajax.config import TransformerConfig
from megajax.models.common.embeddings.rotary_pos_embedding import MultimodalRotaryEmbedding, RotaryEmbedding
from megajax.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding

Array = jax.Array


def packed_positions(segment_ids: Array) -> Array:
    """segment_ids int [B, S] -> positions int [B, S] that restart at 0 where the segment changes."""
    index = jnp.arange(segment_ids.shape[1])[None, :]
    starts = jnp.concatenate(
        [jnp.zeros_like(segment_ids[:, :1], dtype=bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1
    )
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def rotary_embedding(
    config: TransformerConfig,
) -> RotaryEmbedding | YarnRotaryEmbedding | MultimodalRotaryEmbedding | None:
    """The rotary embedding of `position_embedding_type`, None for the types that are not rotary."""
    channels = config.qk_pos_emb_head_dim if config.multi_latent_attention else config.kv_channels
    assert channels is not None
    if config.position_embedding_type == "rope":
        return RotaryEmbedding(
            kv_channels=channels,
            rotary_percent=config.rotary_percent,
            rotary_interleaved=config.rotary_interleaved,
            seq_len_interpolation_factor=config.seq_len_interpolation_factor,
            rotary_base=config.rotary_base,
            rope_scaling=config.rope_scaling_type,
            rope_scaling_factor=config.rope_scaling_factor,
            low_freq_factor=config.rope_low_freq_factor,
            high_freq_factor=config.rope_high_freq_factor,
            original_max_position_embeddings=config.rope_original_max_position_embeddings,
            short_factor=config.rope_short_factor,
            long_factor=config.rope_long_factor,
            attention_factor=config.rope_attention_factor,
        )
    if config.position_embedding_type == "mrope":
        assert config.mrope_section is not None
        return MultimodalRotaryEmbedding(
            kv_channels=channels,
            mrope_section=config.mrope_section,
            rotary_percent=config.rotary_percent,
            rotary_base=config.rotary_base,
            seq_len_interpolation_factor=config.seq_len_interpolation_factor,
        )
    if config.position_embedding_type == "yarn":
        return YarnRotaryEmbedding(
            kv_channels=channels,
            rotary_percent=config.rotary_percent,
            rotary_base=config.rotary_base,
            scaling_factor=config.yarn_rotary_scaling_factor,
            original_max_position_embeddings=config.yarn_original_max_position_embeddings,
            beta_fast=config.yarn_beta_fast,
            beta_slow=config.yarn_beta_slow,
            mscale=config.yarn_mscale,
            mscale_all_dim=config.yarn_mscale_all_dim,
            correction_range_round_to_int=config.yarn_correction_range_round_to_int,
            attention_factor=config.rope_attention_factor,
        )
    return None
