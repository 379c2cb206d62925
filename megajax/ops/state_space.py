"""What lies between the projections of a Mamba-2 mixer: convolution and state space, on one device."""

# SPDX-License-Identifier: Apache-2.0
# B batch, S sequence, H heads, G groups, P head size, N state size, E = H P, M = G N, F features, K tokens of the
# convolution
from typing import NamedTuple

import jax
import jax.numpy as jnp

from megajax.ops.ssd import causal_conv1d, ssd_scan, ssd_step

Array = jax.Array


class Projected(NamedTuple):
    """What the mixer makes of its input: x [B, S, E], b and c [B, S, M], step sizes dt fp32 [B, S, H]."""

    x: Array
    b: Array
    c: Array
    dt: Array


class Convolution(NamedTuple):
    """Parameters of a depthwise convolution: kernel [K, 1, F], bias [F]."""

    kernel: Array
    bias: Array | None


class Dynamics(NamedTuple):
    """The rest of the parameters: convolutions of x, b and c; A [H], below 0; D [H, 1 or P]. fp32."""

    x: Convolution
    b: Convolution
    c: Convolution
    A: Array
    D: Array


class Sizes(NamedTuple):
    """Groups G, head size P, and how many tokens are computed at once."""

    groups: int
    head_dim: int
    chunk_size: int


class Window(NamedTuple):
    """The last K - 1 inputs of the convolutions: [B, K - 1, F] each."""

    x: Array
    b: Array
    c: Array


class Mixed(NamedTuple):
    """y [B, S, H, P] in x's dtype, the window and the state fp32 [B, H, P, N] after it, and c after its convolution."""

    y: Array
    window: Window
    state: Array
    c: Array


def document_starts(segment_ids_BS: Array, window_BW: Array | None = None, *, back: int) -> Array:
    """bool [B, back + S]: which of the tokens, and of the `back` ones before them, are of another document than the one
    before.

    window: the documents of W tokens before the first, at least `back` of them and one; None: there were none.
    """
    if window_BW is None:
        window_BW = jnp.repeat(segment_ids_BS[:, :1], max(back, 1), axis=1)
    ids = jnp.concatenate([window_BW, segment_ids_BS], axis=1)
    starts = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)))
    return starts[:, window_BW.shape[1] - back :]


def empty_window(projected: Projected, dynamics: Dynamics) -> Window:
    """Zeros: what came before the first token of a sequence."""
    back = dynamics.x.kernel.shape[0] - 1
    return Window(*(jnp.zeros((a.shape[0], back, a.shape[2]), a.dtype) for a in projected[:3]))


def mix(
    projected: Projected,
    dynamics: Dynamics,
    sizes: Sizes,
    *,
    window: Window | None = None,
    state: Array | None = None,
    starts: Array | None = None,
) -> Mixed:
    """Convolutions over x, b and c, the recurrence, and the skip connection D.

    Args:
      window, state: what the tokens before left behind; None: there were none.
      starts: bool [B, K - 1 + S], True where a document starts, the tokens of the window included.
    """
    B, S, H = projected.dt.shape
    back = dynamics.x.kernel.shape[0] - 1
    window = empty_window(projected, dynamics) if window is None else window
    longer = [jnp.concatenate([w, a], axis=1) for w, a in zip(window, projected[:3], strict=True)]
    x, b, c = (
        causal_conv1d(a, convolution.kernel, convolution.bias, starts)
        for a, convolution in zip(longer, dynamics[:3], strict=True)
    )
    x_BSHP = x.reshape(B, S, H, sizes.head_dim)
    b_BSGN, c_BSGN = (a.reshape(B, S, sizes.groups, -1) for a in (b, c))
    if S == 1 and state is not None and starts is None:
        y, state = ssd_step(x_BSHP[:, 0], projected.dt[:, 0], dynamics.A, b_BSGN[:, 0], c_BSGN[:, 0], state)
        y = y[:, None]
    else:
        chunk_size, starts = sizes.chunk_size, None if starts is None else starts[:, back:]
        y, state = ssd_scan(x_BSHP, projected.dt, dynamics.A, b_BSGN, c_BSGN, state, starts, chunk_size=chunk_size)
    y = (y + dynamics.D * x_BSHP.astype(jnp.float32)).astype(x.dtype)
    return Mixed(y, Window(*(a[:, a.shape[1] - back :] for a in longer)), state, c_BSGN)
