"""Relative position bias: a learned number for each head and bucket of distances, added to attention scores."""

# SPDX-License-Identifier: Apache-2.0
# N heads, S query length, T key length
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from megajax.ops.relative_position import by_distance, relative_position_bucket
from megajax.parallel.sharding import constrain
from megajax.transformer.linear import normal_init

Array = jax.Array


class BiasTable(nn.Module):
    """A table [buckets, N]."""

    buckets: int
    heads: int
    std: float
    params_dtype: str

    @nn.compact
    def __call__(self) -> Array:
        init = normal_init(self.std, ("whole", "heads"))
        return self.param("embedding", init, (self.buckets, self.heads), jnp.dtype(self.params_dtype))  # type: ignore[return-value]


class RelativePositionEmbedding(nn.Module):
    """The bias of T5's attention (arXiv:1910.10683). Megatron: `models/common/embeddings/relative_pos_embedding.py`.

    Attributes:
      bidirectional: keys behind and in front of a query differ (encoder); else those in front are one (decoder).
      init_method_std: of the table [relative_attention_num_buckets, num_attention_heads].

    Example:
      >>> bias = RelativePositionEmbedding(bidirectional=True, num_attention_heads=8)
      >>> mask = AttentionMask(bias=bias.apply(variables, query_length, key_length))
    """

    bidirectional: bool
    num_attention_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    init_method_std: float = 0.02
    params_dtype: str = "float32"

    def setup(self) -> None:
        self.relative_attention_bias = BiasTable(
            self.relative_attention_num_buckets, self.num_attention_heads, self.init_method_std, self.params_dtype
        )

    def __call__(self, query_seq_length: int, key_seq_length: int, first_query: Array | int = 0) -> Array:
        """Bias fp32 [1, N, S, T] of queries first_query, first_query + 1, ... and keys 0 .. T - 1."""
        S, T = query_seq_length, key_seq_length
        known = isinstance(first_query, int)
        buckets = relative_position_bucket(
            np.arange(1 - S - first_query, T - first_query) if known else np.arange(2 - S - T, T),
            bidirectional=self.bidirectional,
            num_buckets=self.relative_attention_num_buckets,
            max_distance=self.relative_attention_max_distance,
        )
        values_LN = jnp.take(jnp.asarray(self.relative_attention_bias()), buckets, axis=0).astype(jnp.float32)
        if not known:  # of all distances that there may be, those that there are
            values_LN = jax.lax.dynamic_slice_in_dim(values_LN, T - 1 - first_query, S + T - 1)
        return constrain(by_distance(values_LN.T, S, T)[None], None, "act_heads", None, None)
