"""MambaModel: a language model of Mamba-2 layers, or of these and others."""

# SPDX-License-Identifier: Apache-2.0
from typing import Any

import jax

from megajax.models.gpt.gpt_model import GPTModel
from megajax.models.mamba.mamba_layer_specs import MambaStackSubmodules, get_mamba_stack_spec, get_shared_block_spec
from megajax.spec import Builder
from megajax.ssm.hybrid_layer_allocation import SHARED
from megajax.ssm.mamba_config import MambaConfig
from megajax.ssm.shared_block import SharedContext, SharedWeights


class MambaModel(GPTModel):
    """A decoder-only language model whose layers are what `hybrid_override_pattern` says, called as `GPTModel` is.

    Its rotary embedding, if it has one, is that of its attention layers. With a cache, `cache_position` 0 begins a new
    sequence. Megatron: `core/models/mamba/mamba_model.py`.

    Attributes:
      config: architecture. The fields below, and those of `GPTModel`, replace the config's fields of the same name.
      transformer_layer_spec: one builder for each layer; None: those of the pattern.
      mamba_stack_spec: the layer of each kind; None is `get_mamba_stack_spec(config, backend)`.

    Example:
      >>> config = MambaConfig(num_layers=4, hidden_size=64, num_attention_heads=4, mamba_head_dim=16)
      >>> model = MambaModel(config, vocab_size=100, hybrid_override_pattern="M-M*")
      >>> params = model.init(jax.random.key(0), tokens)
      >>> logits = model.apply(params, tokens)
    """

    config: MambaConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    mamba_stack_spec: MambaStackSubmodules | None = None
    hybrid_override_pattern: str | None = None
    hybrid_attention_ratio: float | None = None
    hybrid_mlp_ratio: float | None = None

    def setup(self) -> None:
        super().setup()
        config = self.resolved_config
        assert isinstance(config, MambaConfig)
        if SHARED in config.layer_pattern:
            block = get_shared_block_spec(config, self.backend)
            self.shared_block = [SharedWeights(config, block) for _ in range(config.num_shared_blocks)]

    def layer_context(self, x_BSD: jax.Array) -> Any:
        """The shared transformer blocks, if there are any, and what they read beside the residual stream."""
        config = self.resolved_config
        assert isinstance(config, MambaConfig)
        if SHARED not in config.layer_pattern:
            return None
        return SharedContext(x_BSD, tuple(weights(x_BSD) for weights in self.shared_block))

    @property
    def layer_specs(self) -> tuple[Builder, ...]:
        """One builder for each layer."""
        if isinstance(self.transformer_layer_spec, tuple):
            return self.transformer_layer_spec
        config = self.resolved_config
        assert isinstance(config, MambaConfig)
        config.require_experts_and_their_layers()
        stack = self.mamba_stack_spec or get_mamba_stack_spec(config, self.backend)
        return stack.layers(config.layer_pattern)
