"""A layer of GPT in the pieces of a tick, so that one microbatch's exchange of tokens runs beside another's arithmetic.

Megatron: `core/models/gpt/fine_grained_callables.py`. One after the other the pieces are the layer.
"""

# SPDX-License-Identifier: Apache-2.0
# B batch, S sequence, D hidden
from __future__ import annotations

from typing import Any, NamedTuple

import jax
from flax import linen as nn

from megajax.config import ConfigError, TransformerConfig
from megajax.models.common.model_chunk_schedule_plan import LayerPieces
from megajax.parallel.expert_exchange import Sent
from megajax.transformer.block import LayerInputs
from megajax.transformer.layer import TransformerLayer
from megajax.transformer.multi_token_prediction import MultiTokenPredictionLayer

Array = jax.Array
Params = Any


class Attended(NamedTuple):
    """Between attention and MLP. residual [B, S, D]; tokens: what the MLP reads, [B, S, D], or what the experts do."""

    residual: Array
    tokens: Any


class Away(NamedTuple):
    """While tokens are with their experts. residual, and shared, the output of the shared experts, [B, S, D]."""

    residual: Array
    shared: Array | None
    sent: Sent


class Prediction(NamedTuple):
    """What a layer of multi-token prediction reads: hidden states of the depth before, embeddings of the tokens that
    come next, both [B, S, D]."""

    hidden: Array
    embedded: Array


def get_fine_grained_func(layer: nn.Module) -> LayerPieces:
    """The pieces of a `TransformerLayer`, or of a `MultiTokenPredictionLayer`, as pure functions.

    | piece | with experts | without |
    |---|---|---|
    | attn | attention, norm, router, shared experts | attention |
    | moe_dispatch | tokens to their experts | |
    | mlp | the experts | norm, MLP, residual |
    | moe_combine | results back, residual | |
    | mtp_post_process | of a layer of multi-token prediction: the final norm | |

    Raises:
      ConfigError: the layer has no MLP, or recomputes what the pieces would cut through.
    """
    if isinstance(layer, MultiTokenPredictionLayer):
        return _of_prediction(layer)
    assert isinstance(layer, TransformerLayer)
    _check(layer.config, layer)
    return _with_experts(layer) if layer.config.num_moe_experts is not None else _dense(layer)


def _check(config: TransformerConfig, layer: TransformerLayer) -> None:
    if layer.submodules.mlp is None:
        raise ConfigError("a layer without an MLP has no pieces to overlap; schedule it whole")
    recomputed = config.recompute_granularity
    if recomputed == "full" or (recomputed == "selective" and "mlp" in config.recompute_modules):
        raise ConfigError(
            f"recompute_granularity={recomputed!r} recomputes what is overlapped; leave it out, or 'mlp' out of"
            " recompute_modules"
        )


def _call(layer: nn.Module, params: Params, key: Array | None, method: Any, *args: Any, **kwargs: Any) -> Any:
    rngs = None if key is None else {"dropout": key}
    return layer.apply({"params": params}, *args, rngs=rngs, method=method, **kwargs)


def _attend(layer: TransformerLayer, x_BSD: Array, inputs: LayerInputs, deterministic: bool) -> Array:
    given = {name: value for name, value in inputs._asdict().items() if value is not None and name != "aux_weight"}
    x_BSD, _ = layer.attend(x_BSD, deterministic=deterministic, **given)
    return x_BSD


def _dense(layer: TransformerLayer) -> LayerPieces:
    def mlp_of(layer: TransformerLayer, x_BSD: Array, deterministic: bool) -> Array:
        y_BSD, residual_BSD = layer.before_mlp(x_BSD)
        return layer.after_mlp(layer.mlp(y_BSD), residual_BSD, deterministic=deterministic)

    def attn(params: Params, x_BSD: Array, inputs: LayerInputs, key: Array | None) -> Array:
        return _call(layer, params, key, _attend, x_BSD, inputs, key is None)

    def mlp(params: Params, x_BSD: Array, inputs: LayerInputs, key: Array | None) -> Array:
        del inputs
        return _call(layer, params, key, mlp_of, x_BSD, key is None)

    return LayerPieces(attn, _nothing, mlp, _nothing, _nothing)


def _nothing(params: Params, state: Any, inputs: LayerInputs, key: Array | None) -> Any:
    del params, inputs, key
    return state


def _with_experts(layer: TransformerLayer) -> LayerPieces:
    cfg = layer.config
    width = cfg.moe_latent_size or cfg.hidden_size

    def like(residual_BSD: Array) -> jax.ShapeDtypeStruct:
        """Of what the experts read and return."""
        return jax.ShapeDtypeStruct((*residual_BSD.shape[:2], width), cfg.compute_dtype)

    def attend_and_route(layer: Any, x_BSD: Array, inputs: LayerInputs, deterministic: bool) -> Attended:
        y_BSD, residual_BSD = layer.before_mlp(_attend(layer, x_BSD, inputs, deterministic))
        routed = layer.mlp.route(y_BSD, aux_weight=inputs.aux_weight, deterministic=deterministic)
        return Attended(residual_BSD, routed)

    def send(layer: Any, state: Attended) -> Away:
        routed = state.tokens
        return Away(state.residual, routed.shared, layer.mlp.experts.send(routed.x, routed.ids, routed.weights))

    def compute(layer: Any, state: Away) -> Away:
        return state._replace(sent=layer.mlp.experts.compute(state.sent, like(state.residual)))

    def combine(layer: Any, state: Away, deterministic: bool) -> Array:
        y_BSL = layer.mlp.experts.collect(state.sent, like(state.residual))
        y_BSD = layer.mlp.join(y_BSL, state.shared)
        return layer.after_mlp(y_BSD, state.residual, deterministic=deterministic)

    def attn(params: Params, x_BSD: Array, inputs: LayerInputs, key: Array | None) -> Attended:
        return _call(layer, params, key, attend_and_route, x_BSD, inputs, key is None)

    def moe_dispatch(params: Params, state: Attended, inputs: LayerInputs, key: Array | None) -> Away:
        del inputs
        return _call(layer, params, key, send, state)

    def mlp(params: Params, state: Away, inputs: LayerInputs, key: Array | None) -> Away:
        del inputs
        return _call(layer, params, key, compute, state)

    def moe_combine(params: Params, state: Away, inputs: LayerInputs, key: Array | None) -> Array:
        del inputs
        return _call(layer, params, key, combine, state, key is None)

    return LayerPieces(attn, moe_dispatch, mlp, moe_combine, _nothing)


def _of_prediction(layer: MultiTokenPredictionLayer) -> LayerPieces:
    cfg = layer.config
    inner = layer.layer_spec(config=cfg.for_layer(cfg.num_layers - 1), parent=None)
    assert isinstance(inner, TransformerLayer)
    pieces = get_fine_grained_func(inner)

    def before(layer: Any, x: Prediction) -> Array:
        return layer.before_layer(x.hidden, x.embedded)

    def after(layer: Any, x_BSD: Array) -> Array:
        return layer.after_layer(x_BSD)

    def attn(params: Params, x: Prediction, inputs: LayerInputs, key: Array | None) -> Any:
        x_BSD = _call(layer, params, None, before, x)
        return pieces.attn(params["transformer_layer"], x_BSD, inputs, key)

    def within(piece: Any) -> Any:
        return lambda params, state, inputs, key: piece(params["transformer_layer"], state, inputs, key)

    def mtp_post_process(params: Params, x_BSD: Array, inputs: LayerInputs, key: Array | None) -> Array:
        del inputs, key
        return _call(layer, params, None, after, x_BSD)

    return LayerPieces(
        attn, within(pieces.moe_dispatch), within(pieces.mlp), within(pieces.moe_combine), mtp_post_process
    )
