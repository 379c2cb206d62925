"""Zamba2's layers: one transformer block that many layers share, each with adapters of its own (arXiv:2411.15242).

With delayed scaling in fp8 a layer has scales of its own as well, also of linears that are shared: what one reads, and
the gradient of what it returns, differ from layer to layer.
"""

# SPDX-License-Identifier: Apache-2.0
# B batch, S sequence, D hidden, E = 2 D, F ffn hidden
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from megajax.ops.activations import ACTIVATIONS
from megajax.ops.attention import AttentionMask
from megajax.ops.rope import Rotary
from megajax.parallel.gradient_sums import is_fp8_meta
from megajax.parallel.sharding import constrain, merge_tokens
from megajax.spec import Builder
from megajax.ssm.mamba_config import MambaConfig
from megajax.transformer.layer import BiasDropoutAdd
from megajax.transformer.recompute import recomputed

Array = jax.Array
Tree = Any
_ADAPTER = "adapter_"
"""What the names of a layer's own maps in the block start with; those of everything else are shared."""


class SharedContext(NamedTuple):
    """What every layer that runs a shared block needs: the embedded tokens [B, S, D], and each block's weights."""

    embedded: Array
    weights: tuple[Tree, ...]


class AdaptedLinear(nn.Module):
    """`x @ kernel + bias` plus what passes `shared_adapter_rank` features. linear: builder of each of the maps."""

    config: MambaConfig
    features: int
    axis: str
    use_bias: bool
    linear: Builder

    @nn.compact
    def __call__(self, x: Array) -> Array:
        cfg, own = self.config, {"config": self.config, "use_bias": False}
        y = self.linear(config=cfg, features=self.features, axis=self.axis, use_bias=self.use_bias, name="linear")(x)
        low = self.linear(features=cfg.shared_adapter_rank, axis="whole", name="adapter_down", **own)(x)
        return y + self.linear(features=self.features, axis=self.axis, name="adapter_up", **own)(low)


@dataclasses.dataclass(unsafe_hash=True, kw_only=True)
class AdaptedMLPSubmodules:
    """Slots of `AdaptedMLP`."""

    linear_fc1: Builder
    linear_fc2: Builder


class AdaptedMLP(nn.Module):
    """`fc2(act(gate(x)) * fc1(x))`, gate and fc1 with one adapter for both. x [B, S, D] -> [B, S, D]."""

    config: MambaConfig
    submodules: AdaptedMLPSubmodules

    @nn.compact
    def __call__(self, x_BSD: Array) -> Array:
        cfg, sub, x_TD = self.config, self.submodules, merge_tokens(x_BSD)

        def project(x: Array, name: str, bias: bool | None) -> Array:
            linear = sub.linear_fc1(config=cfg, features=cfg.ffn_hidden_size, axis="mlp", use_bias=bias, name=name)
            return constrain(linear(x).reshape(*x_BSD.shape[:2], -1), "batch", "seq", "act_mlp")

        low = sub.linear_fc1(
            config=cfg, features=cfg.shared_adapter_rank, axis="whole", use_bias=False, name="adapter_down"
        )(x_TD)
        gate_BSF = project(x_TD, "linear_gate", cfg.add_mlp_bias) + project(low, "adapter_gate", False)
        up_BSF = project(x_TD, "linear_fc1", cfg.add_mlp_bias) + project(low, "adapter_fc1", False)
        h_BSF = ACTIVATIONS[cfg.activation_func](gate_BSF) * up_BSF
        y_BSD = sub.linear_fc2(
            config=cfg, features=cfg.hidden_size, axis="mlp", use_bias=cfg.add_mlp_bias, name="linear_fc2"
        )(h_BSF)
        return constrain(y_BSD, "batch", "residual_seq", "act_embed")


@dataclasses.dataclass(unsafe_hash=True, kw_only=True)
class SharedBlockSubmodules:
    """Slots of `SharedBlock`."""

    input_layernorm: Builder
    self_attention: Builder
    pre_mlp_layernorm: Builder
    mlp: Builder


class SharedBlock(nn.Module):
    """mlp(norm(attention(norm([x, embedded])))): no residuals, and attention as wide as both inputs together.

    x, embedded [B, S, D] -> [B, S, D].
    """

    config: MambaConfig
    submodules: SharedBlockSubmodules

    @nn.compact
    def __call__(
        self,
        x_BSD: Array,
        embedded_BSD: Array,
        *,
        mask: AttentionMask,
        rotary: Rotary | None = None,
        decode: bool = False,
        deterministic: bool = True,
    ) -> Array:
        cfg, sub = self.config, self.submodules
        dtype = jnp.dtype(cfg.compute_dtype)
        both_BSE = jnp.concatenate([x_BSD, embedded_BSD.astype(x_BSD.dtype)], axis=-1)
        both_BSE = sub.input_layernorm(config=cfg, name="input_layernorm")(both_BSE).astype(dtype)
        attention = sub.self_attention(config=cfg, name="self_attention")
        y_BSD = attention(both_BSE, mask=mask, rotary=rotary, decode=decode, deterministic=deterministic)
        y_BSD = sub.pre_mlp_layernorm(config=cfg, name="pre_mlp_layernorm")(y_BSD).astype(dtype)
        return recomputed(sub.mlp(config=cfg, name="mlp"), "mlp", cfg)(y_BSD)


def _part(params: Mapping[str, Tree], *, shared: bool) -> Tree:
    """Of a `SharedBlock`'s parameters what is shared, or what each layer has of its own."""
    flat = flatten_dict(params)
    return unflatten_dict({path: leaf for path, leaf in flat.items() if _is_shared(path) == shared})


def _is_shared(path: tuple[str, ...]) -> bool:
    return not is_fp8_meta(path) and not any(name.startswith(_ADAPTER) for name in path)


def _tree_of_params(module: nn.Module, name: str, init: Callable[[Array], Tree]) -> Tree:
    """A parameter that is a tree; not always `self.param`, which would trace `init` again to compare shapes."""
    if module.is_initializing():
        return module.param(name, jax.jit(init))
    return module.get_variable("params", name)


class SharedWeights(nn.Module):
    """The weights of one shared block; called, it gives them, to be handed to the layers."""

    config: MambaConfig
    block: Builder

    @nn.compact
    def __call__(self, x_BSD: Array) -> Tree:
        block = self.block(config=self.config, parent=None)

        def init(key: Array) -> Tree:
            return _part(block.init(key, x_BSD, x_BSD, mask=AttentionMask())["params"], shared=True)

        return _tree_of_params(self, "weights", init)


@dataclasses.dataclass(unsafe_hash=True, kw_only=True)
class SharedMambaLayerSubmodules:
    """Slots of `SharedMambaLayer`."""

    shared_block: Builder
    linear: Builder
    norm: Builder
    mixer: Builder
    mamba_bda: Builder = BiasDropoutAdd


class SharedMambaLayer(nn.Module):
    """x + mixer(norm(x + linear(block(x, embedded)))). Called as `TransformerLayer` is.

    Attributes:
      block: which of the shared blocks it runs.
    """

    config: MambaConfig
    submodules: SharedMambaLayerSubmodules
    block: int = 0

    @nn.compact
    def __call__(
        self,
        x_BSD: Array,
        *,
        mask: AttentionMask,
        rotary: Rotary | None = None,
        context: SharedContext,
        context_mask: AttentionMask | None = None,
        aux_weight: Array | None = None,
        decode: bool = False,
        deterministic: bool = True,
    ) -> Array:
        """x [B, S, D] -> [B, S, D]. What concerns experts and cross-attention alone is ignored."""
        del context_mask, aux_weight
        cfg, sub = self.config, self.submodules
        y_BSD = self._shared(x_BSD, context, mask, rotary, decode, deterministic)
        y_BSD = sub.linear(config=cfg, features=cfg.hidden_size, axis="whole", use_bias=False, name="linear")(y_BSD)
        y_BSD = recomputed(sub.norm(config=cfg, name="norm"), "layernorm", cfg)(x_BSD + y_BSD)
        y_BSD = constrain(y_BSD, "batch", "residual_seq", "act_embed")
        y_BSD = y_BSD.astype(jnp.dtype(cfg.compute_dtype))
        y_BSD = sub.mixer(config=cfg, name="mixer")(y_BSD, mask=mask, decode=decode, deterministic=deterministic)
        return sub.mamba_bda(config=cfg, name="mamba_bda")(y_BSD, x_BSD, deterministic=deterministic)

    def _shared(
        self,
        x_BSD: Array,
        context: SharedContext,
        mask: AttentionMask,
        rotary: Rotary | None,
        decode: bool,
        deterministic: bool,
    ) -> Array:
        """The block as a pure function of its weights, which the model holds, and of the layer's own, held here."""
        block = self.submodules.shared_block(config=self.config, parent=None)

        def init(key: Array) -> Tree:
            return _part(block.init(key, x_BSD, x_BSD, mask=AttentionMask())["params"], shared=False)

        adapters = flatten_dict(_tree_of_params(self, "adapters", init))
        params = unflatten_dict({**flatten_dict(context.weights[self.block]), **adapters})
        inputs = {"mask": mask, "rotary": rotary, "deterministic": deterministic}
        if not deterministic:
            inputs["rngs"] = {"dropout": self.make_rng("dropout")}
        if not decode:
            return block.apply({"params": params}, x_BSD, context.embedded, **inputs)
        variables = {"params": params}
        if self.has_variable("cache", "shared"):
            variables["cache"] = self.get_variable("cache", "shared")
        y_BSD, updated = block.apply(variables, x_BSD, context.embedded, decode=True, mutable=["cache"], **inputs)
        cache = updated["cache"]
        self.put_variable("cache", "shared", jax.tree.map(jnp.zeros_like, cache) if self.is_initializing() else cache)
        return y_BSD
