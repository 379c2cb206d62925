"""A model that a user has changed meets the mesh: parameters without axes, and large ones that it would not divide."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from typing import Any

import jax
import pytest
from flax import linen as nn

from megajax.config import Config, ConfigError, DataConfig, ParallelConfig, TrainConfig, TransformerConfig
from megajax.models.gpt.gpt_layer_specs import get_gpt_layer_spec
from megajax.models.gpt.gpt_model import GPTModel
from megajax.models.registry import FAMILIES
from megajax.parallel.mesh import make_abstract_mesh
from megajax.training.blueprint import draw_up
from megajax.training.setup import build_program

LAYOUTS = [
    {},
    {"tensor_model_parallel_size": 2, "zero": 3},
    {"pipeline_model_parallel_size": 2},
    {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Et|tttL"},
]


class Mixer(nn.Module):
    """Attention replaced by one matrix over the features of all heads, created with `init`."""

    config: TransformerConfig
    init: Any

    @nn.compact
    def __call__(self, q, k, v, *, mask, deterministic=True):
        flat = q.reshape(*q.shape[:2], -1)
        return nn.Dense(flat.shape[-1], use_bias=False, kernel_init=self.init)(flat).reshape(q.shape)


def arguments(axes: tuple[str | None, ...] | None, *, hidden_size: int = 32, **parallel: Any) -> tuple[Config, Any]:
    init = nn.initializers.lecun_normal()
    if axes is not None:
        init = nn.with_logical_partitioning(init, axes)  # type: ignore[arg-type]

    def build_model(config: TransformerConfig, backend: Any) -> nn.Module:
        spec = get_gpt_layer_spec(config, backend)
        changed = spec.replace(**{"self_attention.core_attention": lambda **kw: Mixer(init=init, **kw)})
        return GPTModel(config, changed, backend=backend)

    model = TransformerConfig(
        num_layers=4,
        hidden_size=hidden_size,
        num_attention_heads=4,
        vocab_size=64,
        make_vocab_size_divisible_by=64,
        position_embedding_type="rope",
    )
    config = Config(
        model_family="gpt",
        model=model,
        parallel=ParallelConfig(**parallel),
        data=DataConfig(seq_length=16),
        train=TrainConfig(micro_batch_size=1, global_batch_size=8),
    )
    return config, dataclasses.replace(FAMILIES["gpt"], build_model=build_model)


@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
def test_a_parameter_without_axes_is_refused_in_one_line(parallel):
    with pytest.raises(ConfigError) as caught:
        build_program(*arguments(None, **parallel))
    assert str(caught.value).startswith(
        "decoder/layers/self_attention/core_attention/Dense_0/kernel: has no logical axes; create it with"
        " nn.with_logical_partitioning("
    )
    assert "\n" not in str(caught.value)


def test_a_large_parameter_that_the_mesh_does_not_divide_is_refused():
    parallel = LAYOUTS[1]
    with pytest.raises(ConfigError, match=r"Dense_0/kernel: \[4, 512, 512\] \(8% of the .* repeated over tp=2; name"):
        build_program(*arguments((None, None), hidden_size=512, **parallel))
    build_program(*arguments((None, None), hidden_size=32, **parallel))
    build_program(*arguments(("embed", "heads"), hidden_size=512, **parallel))
    build_program(*arguments(("whole", "whole"), hidden_size=512, **parallel))


def test_a_mesh_without_devices():
    """The parts are those of the real mesh."""
    parallel = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "zero": 3}
    config, family = arguments(("embed", "heads"), **parallel)
    drawn = draw_up(config, family, make_abstract_mesh(config.parallel, 8))
    program = build_program(config, family, devices=jax.devices()[:8])
    real = jax.tree.leaves(program.abstract_state)
    assert [leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(drawn.abstract_state)] == [
        leaf.sharding.shard_shape(leaf.shape) for leaf in real
    ]
    draw_up(config, family, make_abstract_mesh(config.parallel, 64))
