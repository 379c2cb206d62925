"""Layer specs of vision transformers: attention and MLP; that all tokens see each other is the model's mask to say."""

# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
from flax import linen as nn

from megajax.backends import BackendSpecProvider, LocalSpecProvider
from megajax.config import TransformerConfig
from megajax.models.vision.vision_config import VisionConfig
from megajax.parallel.sharding import constrain
from megajax.spec import ModuleSpec
from megajax.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megajax.transformer.dropout import Dropout
from megajax.transformer.layer import TransformerLayer, TransformerLayerSubmodules
from megajax.transformer.mlp import MLP, MLPSubmodules

Array = jax.Array


class ScaledBiasDropoutAdd(nn.Module):
    """`residual + dropout(scale * x)` with a learned scale for each feature, a parameter [D] (arXiv:2103.17239)."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x_BSD: Array, residual_BSD: Array, *, deterministic: bool = True) -> Array:
        cfg = self.config
        assert cfg.layer_scale_init is not None
        init = nn.with_logical_partitioning(nn.initializers.constant(cfg.layer_scale_init), ("norm",))
        scale: Array = self.param("scale", init, (cfg.hidden_size,), jnp.dtype(cfg.params_dtype))  # type: ignore[assignment]
        x_BSD = Dropout(cfg.hidden_dropout, deterministic=deterministic)(x_BSD * scale.astype(x_BSD.dtype))
        return constrain(residual_BSD + x_BSD, "batch", "residual_seq", "act_embed")


def get_vit_layer_spec(config: VisionConfig, backend: BackendSpecProvider) -> ModuleSpec:
    """One layer of a vision transformer. Megatron: `core/models/vision/vit_layer_specs.py`."""
    spec = get_text_layer_spec(config, backend)
    scaled = {"self_attn_bda": ScaledBiasDropoutAdd, "mlp_bda": ScaledBiasDropoutAdd}
    return spec if config.layer_scale_init is None else spec.replace(**scaled)


def get_text_layer_spec(config: TransformerConfig, backend: BackendSpecProvider) -> ModuleSpec:
    """One layer of the text tower that goes with a vision transformer: the same layer."""
    norm, column, qk_norm = backend.layer_norm(config), backend.column_parallel_linear(), backend.qk_norm(config)
    row = backend.row_parallel_linear()
    attention = SelfAttentionSubmodules(
        linear_qkv=column,
        core_attention=backend.core_attention(),
        linear_proj=row,
        q_layernorm=qk_norm,
        k_layernorm=qk_norm,
    )
    return ModuleSpec(
        TransformerLayer,
        TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(SelfAttention, attention),
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(MLP, MLPSubmodules(linear_fc1=column, linear_fc2=row)),
        ),
    )


def get_vit_layer_local_spec(config: VisionConfig) -> ModuleSpec:
    """One layer in plain JAX."""
    return get_vit_layer_spec(config, LocalSpecProvider())
