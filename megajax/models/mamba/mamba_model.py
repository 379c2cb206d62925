"""MambaModel: a language model of Mamba-2 layers, or of these and others."""

# SPDX-License-Identifier: Apache-2.0
from megajax.models.gpt.gpt_model import GPTModel
from megajax.models.mamba.mamba_layer_specs import MambaStackSubmodules, get_mamba_stack_spec
from megajax.spec import Builder
from megajax.ssm.mamba_config import MambaConfig


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
