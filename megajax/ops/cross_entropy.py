"""Cross entropy of the next token, from logits or straight from hidden states without ever holding all logits."""

# SPDX-License-Identifier: Apache-2.0
# B batch, S sequence, C one chunk of it, D hidden, V vocabulary (rows of the table, padding included)
import dataclasses
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from megajax.ops.attention import soft_cap, soft_cap_slope

Array = jax.Array

LOGITS_PER_CHUNK = 2**22
"""Logits held at once by the fused loss: 16 MB in fp32, a size that stays near the caches and far from the peak."""


@dataclasses.dataclass(frozen=True)
class CrossEntropyOptions:
    """vocab_size: ids from here on are padding and get no probability. label_smoothing: Megatron's, `a V / (V - 1)`.
    z_loss_coeff: adds `z_loss_coeff * logsumexp^2` (arXiv:2204.02311)."""

    vocab_size: int
    label_smoothing: float = 0.0
    z_loss_coeff: float = 0.0

    @property
    def smoothing(self) -> float:
        """The weight of the uniform target."""
        return self.label_smoothing * self.vocab_size / (self.vocab_size - 1) if self.label_smoothing else 0.0


def mask_padded_vocab(logits: Array, vocab_size: int) -> Array:
    """Logits [..., V] with those of padding ids at the lowest finite number."""
    if logits.shape[-1] == vocab_size:
        return logits
    return jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, jnp.finfo(logits.dtype).min)


def cross_entropy(logits: Array, labels: Array, options: CrossEntropyOptions) -> Array:
    """logits [..., V] of any dtype, labels int [...] -> loss of each token [...], fp32.

    A label outside 0..V-1 (such as -100) selects no logit: its loss is `logsumexp - max`, finite, and has to be masked
    by the caller, as in Megatron (`core/tensor_parallel/cross_entropy.py`).
    """
    logits = mask_padded_vocab(logits.astype(jnp.float32), options.vocab_size)
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    shifted = logits - top
    log_sum = jnp.log(jnp.sum(jnp.exp(shifted), axis=-1))
    # A masked sum rather than a gather: it stays local when the vocabulary is sharded.
    target = jnp.sum(jnp.where(_is_label(labels, logits.shape[-1]), shifted, 0.0), axis=-1)
    loss = log_sum - target
    if options.smoothing:
        real = jnp.arange(logits.shape[-1]) < options.vocab_size
        mean_log_prob = jnp.sum(jnp.where(real, shifted, 0.0), axis=-1) / options.vocab_size - log_sum
        loss = (1.0 - options.smoothing) * loss - options.smoothing * mean_log_prob
    if options.z_loss_coeff:
        loss = loss + options.z_loss_coeff * jnp.square(log_sum + top[..., 0])
    return loss


def _is_label(labels: Array, V: int) -> Array:
    return labels[..., None] == jnp.arange(V)


class FusedLoss(NamedTuple):
    """weighted_sum: fp32 scalar, differentiable. per_token: fp32 [B, S], for reporting only, carries no gradient."""

    weighted_sum: Array
    per_token: Array


class LossGradients(NamedTuple):
    """The fused loss and its gradients. weighted_sum fp32 scalar, per_token fp32 [B, S], d_x like x, d_kernel and
    d_bias fp32; d_bias None where there is no bias."""

    weighted_sum: Array
    per_token: Array
    d_x: Array
    d_kernel: Array
    d_bias: Array | None


@dataclasses.dataclass(frozen=True)
class LinearCrossEntropy:
    """`cross_entropy(soft_cap(x @ kernel + bias), labels)` with logits only ever held for a chunk of the sequence.

    Attributes:
      options: what the loss is made of.
      softcap: of the logits (`megajax.ops.attention.soft_cap`).
      vocab_axes: inside a manual region, the mesh axes that divide the columns of the kernel, in this order. Losses are
        then those of the whole vocabulary; d_x and d_kernel are this device's part of a sum.
    """

    options: CrossEntropyOptions
    vocab_axes: tuple[str, ...] = ()
    softcap: float | None = None

    def losses(
        self, x_BSD: Array, kernel_DV: Array, bias_V: Array | None, labels_BS: Array, weights_BS: Array
    ) -> FusedLoss:
        """Without gradients, for evaluation."""
        kernel = kernel_DV.astype(x_BSD.dtype)

        def one(total: Array, chunk: tuple[Array, Array, Array]) -> tuple[Array, Array]:
            x_BCD, labels_BC, weights_BC = chunk
            logits = soft_cap(_logits(x_BCD, kernel, bias_V), self.softcap)
            loss_BC, _ = self._token_losses(logits, labels_BC)
            return total + jnp.sum(loss_BC * weights_BC), loss_BC

        chunks = num_chunks(x_BSD.shape[0], x_BSD.shape[1], kernel.shape[1])
        total, per_token = jax.lax.scan(one, jnp.float32(0), _split((x_BSD, labels_BS, weights_BS), chunks))
        return FusedLoss(total, _join(per_token))

    def with_gradients(
        self, x_BSD: Array, kernel_DV: Array, bias_V: Array | None, labels_BS: Array, weights_BS: Array
    ) -> LossGradients:
        """With the gradients of weighted_sum, computed while a chunk's logits exist: no logit is computed twice."""
        kernel = kernel_DV.astype(x_BSD.dtype)
        D, V = kernel_DV.shape

        def one(carry: tuple[Array, Array, Array | None], chunk: tuple[Array, Array, Array]) -> Any:
            total, d_kernel, d_bias = carry
            x_BCD, labels_BC, weights_BC = chunk
            logits = soft_cap(_logits(x_BCD, kernel, bias_V), self.softcap)
            loss_BC, gradient = self._token_losses(logits, labels_BC)
            if self.softcap is not None:
                gradient *= soft_cap_slope(logits, self.softcap)
            d_logits = (gradient * weights_BC[..., None]).astype(x_BSD.dtype).reshape(-1, V)
            d_kernel += jnp.dot(x_BCD.reshape(-1, D).T, d_logits, preferred_element_type=jnp.float32)
            d_x = jnp.dot(d_logits, kernel.T).reshape(x_BCD.shape)
            d_bias = None if d_bias is None else d_bias + jnp.sum(d_logits, axis=0, dtype=jnp.float32)
            return (total + jnp.sum(loss_BC * weights_BC), d_kernel, d_bias), (loss_BC, d_x)

        chunks = num_chunks(x_BSD.shape[0], x_BSD.shape[1], V)
        no_bias = None if bias_V is None else jnp.zeros(V, jnp.float32)
        start = (jnp.float32(0), jnp.zeros((D, V), jnp.float32), no_bias)
        carry, (per_token, d_x) = jax.lax.scan(one, start, _split((x_BSD, labels_BS, weights_BS), chunks))
        total, d_kernel, d_bias = carry
        return LossGradients(total, _join(per_token), _join(d_x), d_kernel, d_bias)

    def _token_losses(self, logits: Array, labels: Array) -> tuple[Array, Array]:
        """logits fp32 [..., V], this device's columns -> (loss of each token [...], its gradient [..., V])."""
        options, axes = self.options, self.vocab_axes
        ids = jnp.arange(logits.shape[-1])
        if axes:
            ids += jax.lax.axis_index(axes) * logits.shape[-1]
        real, hit = ids < options.vocab_size, labels[..., None] == ids
        logits = jnp.where(real, logits, jnp.finfo(logits.dtype).min)
        top = jnp.max(logits, axis=-1)
        top = jax.lax.pmax(top, axes) if axes else top
        shifted = logits - top[..., None]
        weights = jnp.exp(shifted)
        sums = [jnp.sum(weights, axis=-1), jnp.sum(jnp.where(hit, shifted, 0.0), axis=-1)]
        if options.smoothing:
            sums.append(jnp.sum(jnp.where(real, shifted, 0.0), axis=-1))
        if axes:  # one message for all of them
            sums = list(jax.lax.psum(jnp.stack(sums), axes))
        log_sum = jnp.log(sums[0])
        a, z = options.smoothing, options.z_loss_coeff
        loss = log_sum - (1.0 - a) * sums[1]
        gradient = weights / sums[0][..., None]
        if z:
            loss = loss + z * jnp.square(log_sum + top)
            gradient = gradient * (1.0 + 2.0 * z * (log_sum + top))[..., None]
        gradient = gradient - jnp.where(hit, 1.0 - a, 0.0)
        if a:
            loss = loss - a * sums[2] / options.vocab_size
            gradient = gradient - jnp.where(real, a / options.vocab_size, 0.0)
        return loss, gradient


class LossComputation(Protocol):
    """What `fused_linear_cross_entropy` runs: `LinearCrossEntropy`, or one that divides it over a mesh. Hashable."""

    def losses(
        self, x_BSD: Array, kernel_DV: Array, bias_V: Array | None, labels_BS: Array, weights_BS: Array
    ) -> FusedLoss:
        """See `LinearCrossEntropy.losses`."""
        ...

    def with_gradients(
        self, x_BSD: Array, kernel_DV: Array, bias_V: Array | None, labels_BS: Array, weights_BS: Array
    ) -> LossGradients:
        """See `LinearCrossEntropy.with_gradients`."""
        ...


def fused_linear_cross_entropy(
    x_BSD: Array,
    kernel_DV: Array,
    labels_BS: Array,
    weights_BS: Array,
    computation: LossComputation,
    *,
    bias_V: Array | None = None,
) -> FusedLoss:
    """`sum(weights * cross_entropy(x @ kernel + bias, labels))`, never holding all logits.

    The gradients are computed in the forward pass, while a chunk's logits exist, and only scaled in the backward one.
    That is why this function takes the weights and returns their sum. In fp16 the loss scale belongs into the weights:
    the gradient of a logit is rounded to x's dtype before the backward pass.
    """
    losses: Any = _fused(x_BSD, kernel_DV, bias_V, labels_BS, weights_BS.astype(jnp.float32), computation)
    return FusedLoss(losses[0], jax.lax.stop_gradient(losses[1]))


def num_chunks(B: int, S: int, V: int) -> int:
    """The smallest divisor of S that keeps a chunk's logits within `LOGITS_PER_CHUNK`."""
    wanted = max(1, -(-B * S * V // LOGITS_PER_CHUNK))
    return next((n for n in range(wanted, S) if S % n == 0), S) if wanted < S else S


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _fused(
    x_BSD: Array,
    kernel_DV: Array,
    bias_V: Array | None,
    labels_BS: Array,
    weights_BS: Array,
    computation: LossComputation,
) -> tuple[Array, Array]:
    weighted_sum, per_token = computation.losses(x_BSD, kernel_DV, bias_V, labels_BS, weights_BS)
    return weighted_sum, per_token


def _fused_forward(
    x_BSD: Array,
    kernel_DV: Array,
    bias_V: Array | None,
    labels_BS: Array,
    weights_BS: Array,
    computation: LossComputation,
) -> Any:
    found = computation.with_gradients(x_BSD, kernel_DV, bias_V, labels_BS, weights_BS)
    d_bias = None if bias_V is None or found.d_bias is None else found.d_bias.astype(bias_V.dtype)
    d_x, d_kernel = found.d_x.astype(x_BSD.dtype), found.d_kernel.astype(kernel_DV.dtype)
    return (found.weighted_sum, found.per_token), (d_x, d_kernel, d_bias, found.per_token)


def _fused_backward(computation: LossComputation, residuals: Any, cotangents: Any) -> Any:
    del computation
    *gradients, per_token = residuals
    scale, _ = cotangents  # per_token is for reporting; its cotangent is zero
    d_x, d_kernel, d_bias = (None if d is None else d * scale.astype(d.dtype) for d in gradients)
    return d_x, d_kernel, d_bias, None, per_token * scale


_fused.defvjp(_fused_forward, _fused_backward)


def _logits(x_BCD: Array, kernel_DV: Array, bias_V: Array | None) -> Array:
    flat = x_BCD.reshape(-1, x_BCD.shape[-1])
    logits = jnp.dot(flat, kernel_DV, preferred_element_type=jnp.float32)
    logits = logits if bias_V is None else logits + bias_V.astype(jnp.float32)
    return logits.reshape(*x_BCD.shape[:-1], kernel_DV.shape[-1])


def _split(arrays: tuple[Array, ...], chunks: int) -> Any:
    # Along the sequence, so that a batch sharded over devices stays evenly spread in every chunk.
    def split(a: Array) -> Array:
        return jnp.moveaxis(a.reshape(a.shape[0], chunks, a.shape[1] // chunks, *a.shape[2:]), 1, 0)

    return tuple(split(a) for a in arrays)


def _join(a: Array) -> Array:
    a = jnp.moveaxis(a, 0, 1)
    return a.reshape(a.shape[0], a.shape[1] * a.shape[2], *a.shape[3:])
