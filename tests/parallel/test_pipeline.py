"""Both engines of the pipeline against plain differentiation of the same small model: all schedules, stages, chunks."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from megajax.ops.cross_entropy import FusedLoss
from megajax.parallel.pipeline import Lockstep, pipeline_gradients
from megajax.parallel.pipeline_pieces import Params, Pieces, Work
from megajax.parallel.pipeline_table import table_gradients
from megajax.parallel.schedules import make_schedule

Tree = Any

VOCAB, WIDTH, SEQ, BATCH = 11, 8, 3, 2


def _embed(shared: Tree, batch: Any, key: Any) -> jax.Array:
    return shared["table"][batch["tokens"]]


def _layers(params: Tree, rows: Tree, x: jax.Array, batch: Any, weights: Any, key: Any) -> jax.Array:
    """Each layer mixes the sequence, uses the microbatch, and drops some of its activations by its own key."""

    def layer(x: jax.Array, row: Tree) -> tuple[jax.Array, None]:
        p, index = row
        keep = jax.random.bernoulli(jax.random.fold_in(key, index), 0.8, (BATCH, SEQ, 2 * WIDTH))
        hidden = jax.checkpoint(jax.nn.gelu)(x @ p["up"]) * keep
        mixed = jnp.einsum("bsd,st->btd", hidden @ p["down"], p["mix"]) * batch["scale"][..., None]
        return x + mixed + p["bias"], None

    return jax.lax.scan(layer, x, (params, rows["index"]))[0]


def _loss(shared: Tree, y: jax.Array, batch: Any, weights: jax.Array) -> FusedLoss:
    logits = y @ shared["table"].T
    per_token = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["tokens"][..., None], axis=-1)[..., 0]
    return FusedLoss(jnp.sum(per_token * weights), per_token)


PIECES = Pieces(_embed, (_layers,), _loss)


def _model(layers: int, microbatches: int) -> tuple[Params, Work]:
    """Layers in their order."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) / 3, jnp.float32)

    staged = {
        "up": normal(layers, WIDTH, 2 * WIDTH),
        "down": normal(layers, 2 * WIDTH, WIDTH),
        "mix": normal(layers, SEQ, SEQ),
        "bias": normal(layers, WIDTH),
    }
    tokens = jnp.asarray(rng.integers(VOCAB, size=(microbatches, BATCH, SEQ)), jnp.int32)
    scale = 1 + normal(microbatches, BATCH, SEQ)
    mask = jnp.asarray(rng.random(tokens.shape) < 0.7, jnp.float32)
    work = Work({"tokens": tokens, "scale": scale}, mask / mask.sum(), mask, jax.random.key(1))
    return Params((staged,), {"table": normal(VOCAB, WIDTH)}), work


@jax.jit
def _plain(params: Params, work: Work) -> tuple[Params, jax.Array]:
    rows = {"index": jnp.arange(params.staged[0]["bias"].shape[0])}

    def total(params: Params) -> tuple[jax.Array, jax.Array]:
        weighted = masked = jnp.float32(0)
        for microbatch in range(work.mask.shape[0]):
            one = work.at(jnp.int32(microbatch))
            x = _embed(params.shared, one.batch, one.key)
            losses = _loss(
                params.shared,
                _layers(params.staged[0], rows, x, one.batch, one.weights, one.key),
                one.batch,
                one.weights,
            )
            weighted, masked = weighted + losses.weighted_sum, masked + jnp.sum(losses.per_token * one.mask)
        return weighted, masked

    return jax.grad(total, has_aux=True)(params)


def _gradients(name: str, stages: int, chunks: int, params: Params, work: Work) -> tuple[Params, jax.Array]:
    """By an engine, perhaps with backwards in parts; layers lie chunk after chunk on each stage, two to a chunk."""
    microbatches = work.mask.shape[0]
    order = np.arange(2 * stages * chunks).reshape(chunks, stages, 2).swapaxes(0, 1).reshape(-1)
    placed = params._replace(staged=jax.tree.map(lambda a: a[order], params.staged))
    mesh = jax.make_mesh((stages,), ("pp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:stages])
    spec = PartitionSpec("pp")
    specs = Params(jax.tree.map(lambda _: spec, params.staged), {"table": PartitionSpec()})
    options = {"specs": specs, "gradient_specs": specs}
    run: Any
    schedule: Any
    if name in ("lockstep", "beside"):
        run, schedule = pipeline_gradients, Lockstep(stages, chunks, microbatches, beside=name == "beside")
    else:
        name, _, parts = name.partition(" in ")
        schedule = make_schedule(name, stages, microbatches, chunks)
        run = partial(table_gradients, parts=int(parts or 1))
    with jax.set_mesh(mesh), nn.logical_axis_rules(()):
        placed = jax.device_put(placed, jax.tree.map(lambda s: NamedSharding(mesh, s), specs))
        rows = ({"index": jnp.asarray(order, jnp.int32)},)
        gradients, loss = jax.jit(lambda p, w: run(PIECES, schedule, p, rows, w, **options))(placed, work)  # type: ignore[arg-type]
    back = np.argsort(order)
    return gradients._replace(staged=jax.tree.map(lambda a: np.asarray(a)[back], gradients.staged)), loss


@pytest.mark.parametrize(
    ("name", "stages", "chunks", "microbatches"),
    [
        ("lockstep", 2, 1, 5),
        ("lockstep", 2, 4, 3),
        pytest.param("lockstep", 4, 2, 6, marks=pytest.mark.slow),
        ("lockstep", 8, 1, 3),
        ("beside", 2, 1, 5),
        ("beside", 2, 2, 3),
        ("beside", 4, 1, 2),
        pytest.param("lockstep", 8, 2, 9, marks=pytest.mark.slow),
        ("1f1b", 2, 1, 5),
        ("1f1b", 2, 4, 3),
        ("1f1b", 4, 2, 6),
        ("1f1b", 8, 1, 10),
        pytest.param("1f1b", 8, 2, 9, marks=pytest.mark.slow),
        ("1f1b in 2", 4, 2, 6),
        ("1f1b in 2", 8, 1, 10),
        ("gpipe", 2, 2, 3),
        ("gpipe in 2", 4, 1, 5),
        ("gpipe", 4, 1, 5),
        ("zb-h1", 2, 1, 1),
        ("zb-h1", 2, 1, 5),
        ("zb-h1", 4, 1, 7),
        ("zb-h1", 8, 1, 9),
    ],
)
def test_gradients_are_those_of_the_plain_model(name, stages, chunks, microbatches):
    params, work = _model(2 * stages * chunks, microbatches)
    gradients, loss = _gradients(name, stages, chunks, params, work)
    wanted, wanted_loss = _plain(params, work)
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
    for found, right in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-5 * float(np.abs(right).max()))
