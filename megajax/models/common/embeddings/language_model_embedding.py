"""Token and learned position embeddings."""

# SPDX-License-Identifier: Apache-2.0
# B batch, S sequence, D hidden, V rows of the vocabulary table
import jax
import jax.numpy as jnp
from flax import linen as nn

from megajax.config import ConfigError, TransformerConfig
from megajax.parallel.sharding import constrain
from megajax.parallel.vocab import embedding, rows_here, vocab_parallel_embedding
from megajax.transformer.dropout import Dropout
from megajax.transformer.linear import normal_init

Array = jax.Array


class Embedding(nn.Module):
    """A table [num, D] of vectors, looked up by ids [B, S]. Its rows carry logical axis `axis`."""

    num: int
    features: int
    axis: str
    std: float
    params_dtype: str

    def setup(self) -> None:
        init = normal_init(self.std, (self.axis, "embed"))
        num = rows_here(self.num) if self.axis == "vocab" else self.num
        self.embedding = self.param("embedding", init, (num, self.features), jnp.dtype(self.params_dtype))

    def __call__(self, ids: Array) -> Array:
        """ids int [...] -> [..., D]."""
        # Only the rows of a vocabulary are divided over the mesh.
        lookup = vocab_parallel_embedding if self.axis == "vocab" else embedding
        return lookup(self.embedding, ids)


class LanguageModelEmbedding(nn.Module):
    """Word embedding, times `embedding_multiplier`, plus learned positions when `position_embedding_type` is
    "learned_absolute", plus token types if there are any, then dropout.

    Megatron: `core/models/common/embeddings/language_model_embedding.py`.
    """

    config: TransformerConfig
    num_tokentypes: int = 0

    def setup(self) -> None:
        cfg = self.config
        std = cfg.embedding_init_method_std or cfg.init_method_std
        hidden, dtype = cfg.hidden_size, cfg.params_dtype
        self.word_embeddings = Embedding(cfg.padded_vocab_size, hidden, "vocab", std, dtype)
        if cfg.position_embedding_type == "learned_absolute":
            if cfg.max_sequence_length is None:
                raise ConfigError("max_sequence_length=None; learned positions need the longest sequence")
            self.position_embeddings = Embedding(cfg.max_sequence_length, hidden, "positions", std, dtype)
        if self.num_tokentypes:
            self.tokentype_embeddings = Embedding(self.num_tokentypes, hidden, "positions", std, dtype)
        self.dropout = Dropout(cfg.hidden_dropout)

    def __call__(
        self, tokens: Array, position_ids: Array, *, tokentype_ids: Array | None = None, deterministic: bool = True
    ) -> Array:
        """tokens int [B, S], position_ids int [B or 1, S] -> [B, S, D] in the dtype of the residual stream.

        tokentype_ids: int [B, S]; default: all of type 0.
        """
        cfg = self.config
        x_BSD = self.word_embeddings(tokens)
        if cfg.embedding_multiplier != 1.0:
            x_BSD = x_BSD * jnp.asarray(cfg.embedding_multiplier, x_BSD.dtype)
        if cfg.position_embedding_type == "learned_absolute":
            if tokens.shape[1] > (cfg.max_sequence_length or 0):
                raise ConfigError(
                    f"a sequence of {tokens.shape[1]} tokens exceeds max_sequence_length={cfg.max_sequence_length}, the"
                    " number of learned positions; raise it or shorten the sequence"
                )
            x_BSD = x_BSD + self.position_embeddings(position_ids)
        if self.num_tokentypes:
            x_BSD = x_BSD + self.tokentype_embeddings(
                jnp.zeros_like(tokens) if tokentype_ids is None else tokentype_ids
            )
        x_BSD = x_BSD.astype(jnp.dtype("float32" if cfg.fp32_residual_connection else cfg.compute_dtype))
        x_BSD = constrain(x_BSD, "batch", "residual_seq", "act_embed")
        return self.dropout(x_BSD, deterministic=deterministic)
