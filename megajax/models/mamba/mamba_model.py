"""MambaModel: a language model of Mamba-2 layers, or of these and others."""

# SPDX-License-Identifier: Apache-2.0
# B batch, S sequence, D hidden
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from megajax.models.gpt.gpt_model import GPTModel
from megajax.models.mamba.mamba_layer_specs import MambaStackSubmodules, get_mamba_stack_spec, get_shared_block_spec
from megajax.ops.cross_entropy import FusedLoss
from megajax.spec import Builder
from megajax.ssm.hybrid_layer_allocation import SHARED
from megajax.ssm.mamba_config import MambaConfig
from megajax.ssm.shared_block import SharedContext, SharedWeights
from megajax.transformer.block import LayerInputs, StackRows

Array = jax.Array


class SharedStream(NamedTuple):
    """What goes from stage to stage of a pipeline with shared blocks: the residual stream, and what it began as, which
    the blocks read on every stage; both [B, S, D]."""

    x: Array
    embedded: Array


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
        if self.shared_blocks:
            config = self.resolved_config
            assert isinstance(config, MambaConfig)
            block = get_shared_block_spec(config, self.backend)
            self.shared_block = [SharedWeights(config, block) for _ in self.shared_blocks]

    @property
    def shared_blocks(self) -> tuple[str, ...]:
        """Names of the modules that hold the shared transformer blocks' weights."""
        config = self.resolved_config
        assert isinstance(config, MambaConfig)
        count = config.num_shared_blocks if SHARED in config.layer_pattern else 0
        return tuple(f"shared_block_{index}" for index in range(count))

    def layer_context(self, x_BSD: Array) -> Any:
        """The shared transformer blocks, if there are any, and what they read beside the residual stream."""
        if not self.shared_blocks:
            return None
        return SharedContext(x_BSD, tuple(weights(x_BSD) for weights in self.shared_block))

    def embed(self, tokens: Array, position_ids: Array, *, deterministic: bool) -> Any:
        """What the first stage of a pipeline takes in: [B, S, D], or with shared blocks a `SharedStream`."""
        x_BSD = super().embed(tokens, position_ids, deterministic=deterministic)
        return SharedStream(x_BSD, x_BSD) if self.shared_blocks else x_BSD

    def run_layers(self, x: Any, inputs: LayerInputs, rows: Mapping[str, StackRows], *, deterministic: bool) -> Any:
        """A stage's layers: x, as `embed` returns it, to the like."""
        if not isinstance(x, SharedStream):
            return super().run_layers(x, inputs, rows, deterministic=deterministic)
        inputs = inputs._replace(context=self.layer_context(x.embedded))
        return x._replace(x=super().run_layers(x.x, inputs, rows, deterministic=deterministic))

    def loss_sum_of_stream(self, x: Any, tokens: Array, labels: Array, weights: Array, **inputs: Any) -> FusedLoss:
        """`loss_sum` from what the last stage returns."""
        x_BSD = x.x if isinstance(x, SharedStream) else x
        return super().loss_sum_of_stream(x_BSD, tokens, labels, weights, **inputs)

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
