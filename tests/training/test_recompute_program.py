"""What the program for GPUs holds of activations that are to be computed again, where layers make no loop, too."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from megajax import cli
from megajax.models.registry import FAMILIES
from megajax.parallel.aot import absent_gpus
from megajax.training.setup import build_program, on_mesh

pytestmark = pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is None, reason="needs the extra aot")
SEQ, ROWS, HEADS = 1024, 4, 4
FLAGS = f"""--model mamba --hybrid-override-pattern *M-* --hidden-size 64 --num-attention-heads {HEADS} --vocab-size 128
 --seq-length {SEQ} --max-sequence-length {SEQ} --micro-batch-size {ROWS} --global-batch-size {ROWS} --hidden-dropout 0
 --attention-dropout 0 --optimizer sgd --attention-backend local"""


def temporary(*flags: str) -> int:
    config: Any = cli.parse([*FLAGS.split(), *flags], prog="test", families=FAMILIES)
    program = build_program(config, FAMILIES["mamba"], devices=absent_gpus(1))
    kinds = {"tokens": jnp.int32, "labels": jnp.int32, "position_ids": jnp.int32, "loss_mask": jnp.float32}
    batch = {name: jax.ShapeDtypeStruct((1, ROWS, SEQ), kind) for name, kind in kinds.items()}
    with on_mesh(program):
        step: Any = program.train_step
        return step.lower(program.abstract_state, batch).compile().memory_analysis().temp_size_in_bytes


def test_scores_of_layers_that_do_not_repeat_are_computed_again() -> None:
    """Two attentions keep the probabilities of all pairs of tokens, fp32, or make them again, one after the other."""
    probabilities = 4 * ROWS * HEADS * SEQ**2
    assert temporary() - temporary("--recompute-granularity", "selective") > 2 * probabilities
