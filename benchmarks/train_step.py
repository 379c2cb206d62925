"""Tokens per second of megajax's training step beside a hand-written JAX step of the same model, in alternation.

The rival is the fast way to write it by hand, not the naive one: activations flattened to [tokens, features] around
every product, so that each weight gradient is one 2-D product, and the LM head with its cross entropy computed in
chunks of tokens, gradients included, so that the logits never exist whole. Same numbers in, same loss out (checked).

    python benchmarks/train_step.py                  # speed and temporary memory, in one alternated run
    python benchmarks/train_step.py --what compile   # compile time of 8 and of 64 layers
    python benchmarks/train_step.py --what start     # seconds from process start to the end of the first step
"""

# SPDX-License-Identifier: Apache-2.0
# B batch, S sequence, T tokens of a chunk, D hidden, N heads, K head size, V vocabulary
from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from megajax.config import Config, DataConfig, OptimizerConfig, ParallelConfig, TrainConfig, TransformerConfig
from megajax.models.registry import FAMILIES
from megajax.training.setup import build_program, on_mesh, place_batch

Array = jax.Array
LAYERS, D, N, F, V, S, B = 4, 256, 4, 1024, 8192, 256, 8
LR, DECAY, BETA1, BETA2, EPS = 1e-3, 0.1, 0.9, 0.95, 1e-8
HEAD_CHUNKS = 8


# --- the hand-written step


def norm(x: Array, scale: Array) -> Array:
    """RMS norm over the last dim."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * scale


def rope(x_BSNK: Array) -> Array:
    """Rotates halves by position."""
    K = x_BSNK.shape[-1]
    angle = jnp.arange(S)[:, None] * (1.0 / 10000 ** (jnp.arange(0, K, 2) / K))
    cos, sin = jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]
    first, second = jnp.split(x_BSNK, 2, -1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def layer(x: Array, p: dict[str, Array]) -> Array:
    """One layer on flattened tokens [B * S, D]."""
    y = norm(x, p["norm1"])
    q, k, v = ((y @ p[w]).reshape(B, S, N, D // N) for w in ("q", "k", "v"))
    q, k = rope(q), rope(k)
    scores = jnp.einsum("bsnk,btnk->bnst", q, k) / (D // N) ** 0.5
    scores = jnp.where(jnp.tri(S, dtype=bool), scores, -1e30)
    y = jnp.einsum("bnst,btnk->bsnk", jax.nn.softmax(scores, -1), v)
    x = x + y.reshape(-1, D) @ p["o"]
    y = norm(x, p["norm2"])
    return x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"]


@jax.custom_vjp
def head_loss(x: Array, w: Array, labels: Array) -> Array:
    """Mean cross entropy of x [B * S, D] @ w [D, V] in chunks of tokens."""
    return _head_loss(x, w, labels)[0]


def _head_loss(x: Array, w: Array, labels: Array):
    def one(carry: tuple[Array, Array], chunk: tuple[Array, Array]):
        total, dw = carry
        x_TD, labels_T = chunk
        logits = x_TD @ w
        lse = jax.nn.logsumexp(logits, -1)
        rows = jnp.arange(labels_T.shape[0])
        total += jnp.sum(lse - logits[rows, labels_T])
        d = jnp.exp(logits - lse[:, None]).at[rows, labels_T].add(-1.0) / (B * S)
        return (total, dw + x_TD.T @ d), d @ w.T

    chunks = (x.reshape(HEAD_CHUNKS, -1, D), labels.reshape(HEAD_CHUNKS, -1))
    (total, dw), dx = jax.lax.scan(one, (jnp.float32(0), jnp.zeros_like(w)), chunks)
    return total / (B * S), (dx.reshape(-1, D), dw)


head_loss.defvjp(_head_loss, lambda saved, g: (saved[0] * g, saved[1] * g, None))


def hand_loss(params: dict[str, Any], tokens: Array, labels: Array) -> Array:
    """The whole model."""
    x = params["embed"][tokens].reshape(-1, D)
    x, _ = jax.lax.scan(lambda x, p: (layer(x, p), None), x, params["layers"])
    return head_loss(norm(x, params["norm"]), params["head"], labels)


def hand_step(state: dict[str, Any], tokens: Array, labels: Array) -> tuple[dict[str, Any], Array]:
    """AdamW with clipping at norm 1."""
    loss, grads = jax.value_and_grad(hand_loss)(state["p"], tokens, labels)
    size = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads)))
    grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, 1.0 / (size + 1e-6)), grads)
    t = state["t"] + 1
    m = jax.tree.map(lambda m, g: BETA1 * m + (1 - BETA1) * g, state["m"], grads)
    v = jax.tree.map(lambda v, g: BETA2 * v + (1 - BETA2) * g * g, state["v"], grads)

    def update(path: Any, p: Array, m: Array, v: Array) -> Array:
        decay = 0.0 if "norm" in jax.tree_util.keystr(path) else DECAY
        return p - LR * (m / (1 - BETA1**t) / (jnp.sqrt(v / (1 - BETA2**t)) + EPS) + decay * p)

    return {"p": jax.tree_util.tree_map_with_path(update, state["p"], m, v), "m": m, "v": v, "t": t}, loss


# --- the same through megajax


def megajax_config(layers: int = LAYERS) -> Config:
    """The Llama-like model of the comparison."""
    return Config(
        model_family="gpt",
        model=TransformerConfig(
            num_layers=layers,
            hidden_size=D,
            num_attention_heads=N,
            ffn_hidden_size=F,
            vocab_size=V,
            position_embedding_type="rope",
            normalization="RMSNorm",
            gated_linear_unit=True,
            activation_func="silu",
            add_bias_linear=False,
            share_embeddings_and_output_weights=False,
            hidden_dropout=0.0,
            attention_dropout=0.0,
        ),
        parallel=ParallelConfig(),
        optimizer=OptimizerConfig(lr=LR, lr_decay_style="constant", weight_decay=DECAY, adam_beta2=BETA2),
        data=DataConfig(seq_length=S),
        train=TrainConfig(train_iters=10**6, micro_batch_size=B),
    )


def hand_params(p: dict[str, Any]) -> dict[str, Any]:
    """megajax's parameters as the hand-written step names them."""
    layers, attention = p["decoder"]["layers"], p["decoder"]["layers"]["self_attention"]
    return {
        "embed": p["embedding"]["word_embeddings"]["embedding"],
        "norm": p["decoder"]["final_layernorm"]["scale"],
        "head": p["output_layer"]["kernel"],
        "layers": {
            "norm1": layers["input_layernorm"]["scale"],
            "norm2": layers["pre_mlp_layernorm"]["scale"],
            **{
                short: attention[f"linear_{long}"]["kernel"]
                for short, long in zip("qkvo", ("q", "k", "v", "proj"), strict=True)
            },
            "gate": layers["mlp"]["linear_gate"]["kernel"],
            "up": layers["mlp"]["linear_fc1"]["kernel"],
            "down": layers["mlp"]["linear_fc2"]["kernel"],
        },
    }


def random_batch() -> dict[str, np.ndarray]:
    """Fixed random tokens."""
    tokens = np.random.default_rng(0).integers(0, V, (B, S + 1), dtype=np.int32)
    positions = np.broadcast_to(np.arange(S, dtype=np.int32), (B, S))
    mask = np.ones((B, S), np.float32)
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": mask, "position_ids": positions}


def compare_speed(rounds: int, steps: int) -> None:
    """Alternates rounds of both steps; prints medians, their ratio, and temporaries."""
    program = build_program(megajax_config(), FAMILIES["gpt"], devices=jax.devices()[:1])
    state = program.create_state()
    rows = random_batch()
    with on_mesh(program):
        batch = place_batch(program, rows, num_microbatches=1)
        ours = program.train_step.lower(state, batch).compile()
    params = jax.tree.map(jnp.array, hand_params(state.params))
    zeros = jax.tree.map(jnp.zeros_like, params)
    rival_state = {"p": params, "m": zeros, "v": jax.tree.map(jnp.zeros_like, params), "t": jnp.float32(0)}
    inputs = (jnp.asarray(rows["tokens"]), jnp.asarray(rows["labels"]))
    rival = jax.jit(hand_step, donate_argnums=0).lower(rival_state, *inputs).compile()

    times: dict[str, list[float]] = {"megajax": [], "by hand": []}
    losses: dict[str, list[float]] = {"megajax": [], "by hand": []}
    for _ in range(rounds):
        for name in times:
            for _ in range(steps):
                began = time.perf_counter()
                if name == "megajax":
                    state, metrics = ours(state, batch)
                    losses[name].append(float(metrics.loss))
                else:
                    rival_state, loss = rival(rival_state, *inputs)
                    losses[name].append(float(loss))
                times[name].append(time.perf_counter() - began)
    np.testing.assert_allclose(losses["megajax"][:4], losses["by hand"][:4], rtol=1e-4)
    temporaries = {"megajax": ours.memory_analysis(), "by hand": rival.memory_analysis()}
    print(f"{'':10} {'tokens/s':>10} {'ms (min median max)':>24} {'temporaries':>12}")
    for name, seconds in times.items():
        seconds = seconds[1:]
        low, mid, high = min(seconds), statistics.median(seconds), max(seconds)
        print(
            f"{name:10} {B * S / mid:10,.0f} {1e3 * low:8.0f} {1e3 * mid:7.0f} {1e3 * high:7.0f}"
            f" {temporaries[name].temp_size_in_bytes / 1e6:9.0f} MB"
        )
    ratio = statistics.median(times["by hand"][1:]) / statistics.median(times["megajax"][1:])
    print(f"megajax runs at {ratio:.3f} of the hand-written step's speed (ratio of medians, {rounds} x {steps} steps)")


def compare_compile() -> None:
    """Trace and compile time by depth."""
    seconds = {}
    for layers in (8, 64, 8, 64):
        program = build_program(megajax_config(layers), FAMILIES["gpt"], devices=jax.devices()[:1])
        with on_mesh(program):
            shapes = {k: jax.ShapeDtypeStruct((1, *a.shape), a.dtype) for k, a in random_batch().items()}
            began = time.perf_counter()
            program.train_step.lower(program.abstract_state, shapes).compile()
            seconds.setdefault(layers, []).append(time.perf_counter() - began)
    best = {layers: min(times) for layers, times in seconds.items()}
    print(f"8 layers {best[8]:.2f} s, 64 layers {best[64]:.2f} s: {best[64] / best[8]:.2f} times")


def measure_start() -> None:
    """From `python -m megajax.train` to the end of its first step, in a new process."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        command = [
            sys.executable,
            "-u",
            "-m",
            "megajax.train",
            "--model",
            "gpt",
            "--train-iters",
            "3",
            "--run-dir",
            folder,
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("step 1/"):
                    print(f"first step done {time.perf_counter() - began:.1f} s after the start")
            process.wait()


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", choices=("speed", "compile", "start"), default="speed")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    runs: dict[str, Callable[[], None]] = {
        "speed": partial(compare_speed, args.rounds, args.steps),
        "compile": compare_compile,
        "start": measure_start,
    }
    runs[args.what]()


if __name__ == "__main__":
    main()
