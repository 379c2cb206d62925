"""Text from a model that writes: a cache of what it has read, one prefill, then one token at a time."""

# SPDX-License-Identifier: Apache-2.0
# B batch, P prompt length, V vocabulary
from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from megajax.config import ConfigError
from megajax.inference.layers import alike
from megajax.parallel.mesh import gpu_capability
from megajax.parallel.sharding import is_box
from megajax.xla_flags import gpu_options, options_in_force

Array = jax.Array
Prompt = Mapping[str, Any]
"""What a model reads before it writes: arrays [B, ...] by name, or their shapes."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0 takes the likeliest; top_k 0 and top_p 0 mean all tokens."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ConfigError(f"temperature={self.temperature} must not be negative")
        if self.top_k < 0:
            raise ConfigError(f"top_k={self.top_k} must not be negative")
        if not 0 <= self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must be between 0 and 1")
        if self.top_k and self.top_p:
            raise ConfigError(f"top_k={self.top_k} excludes top_p={self.top_p}; set one of them")


def sample_token(logits_BV: Array, key: Array, sampling: Sampling) -> Array:
    """logits fp32 [B, V] -> ids int32 [B]. Megatron: `inference/text_generation_controllers`."""
    if sampling.temperature == 0 or sampling.top_k == 1:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k:
        kth = jax.lax.top_k(logits_BV, min(sampling.top_k, logits_BV.shape[-1]))[0][:, -1:]
        logits_BV = jnp.where(logits_BV < kth, -jnp.inf, logits_BV)
    if sampling.top_p:
        ordered = jnp.flip(jnp.sort(logits_BV, axis=-1), axis=-1)
        probs = jax.nn.softmax(ordered, axis=-1)
        # The first token that crosses top_p stays: only what came before it counts.
        kept = jnp.cumsum(probs, axis=-1) - probs < sampling.top_p
        lowest = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < lowest, -jnp.inf, logits_BV)
    return jax.random.categorical(key, logits_BV, axis=-1).astype(jnp.int32)


def boxed_cache(model: Any, params: Any, prompt: Prompt, *, length: int) -> Any:
    """Shapes of what every layer keeps of `length` positions, in boxes that hold their logical axes as well.

    prompt: or its shapes.
    """
    make = partial(model.init, length=length, method="reserve")
    return alike(jax.eval_shape(make, jax.random.key(0), prompt)["cache"], params)


def init_cache(model: Any, params: Any, prompt: Prompt, *, length: int) -> Any:
    """Empty keys and values, or states, for `length` positions of every layer; stacked as the parameters are."""
    shapes = boxed_cache(model, params, prompt, length=length)
    return jax.tree.map(lambda box: jnp.zeros(box.value.shape, box.value.dtype), shapes, is_leaf=is_box)


class Decoding(NamedTuple):
    """Texts on their way: the cache, the last token of each, int32 [B], which is not in it yet, and its index."""

    cache: Any
    token: Array
    position: Array


def prefill(model: Any, params: Any, cache: Any, prompt: Prompt, key: Array, sampling: Sampling) -> Decoding:
    """Reads the prompts into an empty cache and chooses the token after each."""
    logits_BV, cache = _apply(model, "read", params, cache, prompt)
    return Decoding(cache, sample_token(logits_BV, key, sampling), jnp.int32(model.prompt_slots(prompt)))


def decode(model: Any, params: Any, state: Decoding, key: Array, sampling: Sampling) -> Decoding:
    """One token more."""
    logits_BV, cache = _apply(model, "read_on", params, state.cache, state.token, state.position)
    return Decoding(cache, sample_token(logits_BV, key, sampling), state.position + 1)


def _apply(model: Any, method: str, params: Any, cache: Any, *inputs: Any) -> tuple[Array, Any]:
    """(logits [B, V], cache)."""
    variables = {"params": params, "cache": cache}
    logits_BV, updated = model.apply(variables, *inputs, method=method, mutable=["cache"])
    return logits_BV, updated["cache"]


def generate(
    model: Any,
    params: Any,
    prompt: Array | Prompt,
    *,
    num_tokens: int,
    sampling: Sampling = Sampling(),
    key: Array | None = None,
) -> Array:
    """Continues each prompt by `num_tokens` tokens.

    Args:
      model: with `prompt_slots`, `reserve`, `read` and `read_on`, as `GPTModel` has them.
      params: the model's, its layers stacked or apart (`megajax.inference.layers`).
      prompt: int [B, P], P at least 1; or arrays by name, as the model reads them.
      key: needed unless sampling.temperature is 0.

    Returns:
      The new tokens, int32 [B, num_tokens].
    """
    prompt = prompt if isinstance(prompt, Mapping) else {"tokens": prompt}
    if any(array.size == 0 for array in prompt.values()):
        raise ConfigError("the prompt is empty; give at least one token")
    if key is None:
        if sampling.temperature > 0:
            raise ConfigError(f"temperature={sampling.temperature} samples at random, which needs a key")
        key = jax.random.key(0)
    cache = init_cache(model, params, prompt, length=model.prompt_slots(prompt) + num_tokens)
    on_gpu = gpu_capability(jax.devices()[0]) is not None
    return _program(on_gpu)(model, params, cache, prompt, key, num_tokens, sampling)


@cache
def _program(on_gpu: bool) -> Any:
    options = options_in_force(gpu_options(fp8=False, generation=True), os.environ) if on_gpu else ()
    return jax.jit(_write, static_argnums=(0, 5, 6), compiler_options={o.name: o.value for o in options})


def _write(
    model: Any, params: Any, cache: Any, prompt: Prompt, key: Array, num_tokens: int, sampling: Sampling
) -> Array:
    def one(state: Decoding, index: Array) -> tuple[Decoding, Array]:
        state = decode(model, params, state, jax.random.fold_in(key, index), sampling)
        return state, state.token

    state = prefill(model, params, cache, prompt, jax.random.fold_in(key, 0), sampling)
    _, rest = jax.lax.scan(one, state, jnp.arange(1, num_tokens))
    return jnp.concatenate([state.token[:, None], rest.T], axis=1)
