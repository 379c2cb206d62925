"""A layer that is a Mamba-2 mixer: norm, mixer, add."""

# SPDX-License-Identifier: Apache-2.0
# B batch, S sequence, D hidden
import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from megajax.ops.attention import AttentionMask
from megajax.ops.rope import Rotary
from megajax.parallel.sharding import constrain
from megajax.spec import Builder
from megajax.ssm.mamba_config import MambaConfig
from megajax.transformer.layer import BiasDropoutAdd
from megajax.transformer.recompute import recomputed

Array = jax.Array


@dataclasses.dataclass(unsafe_hash=True, kw_only=True)
class MambaLayerSubmodules:
    """Slots of `MambaLayer`."""

    norm: Builder
    mixer: Builder
    mamba_bda: Builder = BiasDropoutAdd


class MambaLayer(nn.Module):
    """x + mixer(norm(x)). Called as `TransformerLayer` is. Megatron: `core/ssm/mamba_layer.py`."""

    config: MambaConfig
    submodules: MambaLayerSubmodules

    @nn.compact
    def __call__(
        self,
        x_BSD: Array,
        *,
        mask: AttentionMask,
        rotary: Rotary | None = None,
        context: Array | None = None,
        context_mask: AttentionMask | None = None,
        aux_weight: Array | None = None,
        decode: bool = False,
        deterministic: bool = True,
    ) -> Array:
        """x [B, S, D] -> [B, S, D]. What concerns attention and experts alone is ignored; see `MambaMixer`."""
        del rotary, context, context_mask, aux_weight
        cfg, sub = self.config, self.submodules
        y_BSD = recomputed(sub.norm(config=cfg, name="norm"), "layernorm", cfg)(x_BSD)
        y_BSD = constrain(y_BSD, "batch", "residual_seq", "act_embed")  # its gradient is scattered where it is summed
        y_BSD = y_BSD.astype(jnp.dtype(cfg.compute_dtype))
        y_BSD = sub.mixer(config=cfg, name="mixer")(y_BSD, mask=mask, decode=decode, deterministic=deterministic)
        return sub.mamba_bda(config=cfg, name="mamba_bda")(y_BSD, x_BSD, deterministic=deterministic)
