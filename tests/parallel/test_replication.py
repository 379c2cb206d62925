"""Which large parameters may lie whole on every device, and which are refused."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from megajax.config import ConfigError, ParallelConfig, TransformerConfig
from megajax.parallel.mesh import make_abstract_mesh
from megajax.parallel.replication import refuse_accidental_copies
from megajax.parallel.sharding import axis_rules

TP, ZERO0 = {"tensor_model_parallel_size": 2}, {"zero": 0}


def check(
    axes: tuple[str | None, ...],
    shape: tuple[int, ...],
    *,
    devices: int = 8,
    others: int = 0,
    groups: int = 8,
    **parallel: Any,
) -> None:
    """Checks a parameter `odd/kernel` beside `others` well-divided ones of 4 MiB."""

    def box(names: tuple[str | None, ...], sizes: tuple[int, ...]) -> Any:
        return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(sizes, jnp.float32), names)  # type: ignore[arg-type]

    params = {f"layer_{i}": {"kernel": box(("embed", "mlp"), (1024, 1024))} for i in range(others)}
    model = TransformerConfig(num_layers=2, hidden_size=1024, num_attention_heads=8, num_query_groups=groups)
    asked = ParallelConfig(**parallel)
    mesh = make_abstract_mesh(asked, devices)
    refuse_accidental_copies(
        params | {"odd": {"kernel": box(axes, shape)}}, axis_rules(asked, model, devices), asked, mesh
    )


SQUARE = (1024, 1024)
DIVIDED = "vocab or heads or kv_heads or mlp or ssm_heads or ssm_groups or expert_mlp"


@pytest.mark.parametrize(
    ("axes", "settings", "axis", "names"),
    [
        (("embed", None), TP, "tp=2", DIVIDED),
        (("norm", "head_dim"), TP | ZERO0, "tp=2", DIVIDED),
        ((None, None), TP | {"zero": 3}, "tp=2", DIVIDED),
        ((None, None), {"zero": 3}, "dp=8", "embed or expert_embed"),
        (("heads", None), {"zero": 1}, "dp=8", "embed or expert_embed"),
        ((None, None), {"context_parallel_size": 8}, "cp=8", "embed or expert_embed"),
        (("heads", "mlp"), {"zero": 2, "num_distributed_optimizer_instances": 2}, "dp=4", "embed or expert_embed"),
        (("layers", "mlp"), {"zero": 1, "pipeline_model_parallel_size": 2}, "dp=4", "embed or expert_embed"),
    ],
)
def test_a_copy_that_nobody_asked_for_is_refused(axes, settings, axis, names):
    with pytest.raises(ConfigError) as caught:
        check(axes, SQUARE, others=4, **settings)
    message = str(caught.value)
    assert message.startswith("odd/kernel: [1024, 1024] (20% of the parameters) has the logical axes (")
    assert f", repeated over {axis}; name a dim {names}, or 'whole' if that is meant" in message
    assert " P(" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("axes", "shape", "settings"),
    [
        (("embed", "mlp"), SQUARE, TP | {"zero": 3}),
        (("embed", None), SQUARE, {}),  # ZeRO divides its optimizer state; there is no tensor parallelism
        (("heads", None), SQUARE, ZERO0),
        ((None, None), SQUARE, {"devices": 1}),
        (("embed", None), SQUARE, {"context_parallel_size": 8}),  # so it does where devices share samples
        (("embed", "whole"), SQUARE, TP),
        (("whole", "whole"), SQUARE, TP | {"zero": 3}),
        (("positions", "embed"), SQUARE, TP),
        (("embed", "kv_heads"), SQUARE, {"tensor_model_parallel_size": 4, "groups": 2}),
        (("embed", None), (511, 512), TP),  # below 1 MiB
        (("embed", None), SQUARE, TP | {"others": 100}),  # below 1 %
    ],
)
def test_what_is_divided_small_or_meant_passes(axes, shape, settings):
    check(axes, shape, **{"others": 4, **settings})


def test_more_key_value_heads_than_shards_are_divided():
    with pytest.raises(ConfigError, match="tp=4"):
        check(("embed", None), SQUARE, groups=8, tensor_model_parallel_size=4)
