"""Patterns made from ratios against Megatron's (tests/golden/mcore_hybrid_allocation)."""

# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

from megajax.ssm.hybrid_layer_allocation import allocate_layers, layer_maps
from megajax.ssm.mamba_config import MambaConfig

TABLE = Path(__file__).parents[1] / "golden" / "mcore_hybrid_allocation" / "table.json"


def test_every_row_of_megatrons_table():
    rows = json.loads(TABLE.read_text())["rows"]
    assert len(rows) > 50
    for layers, attention, mlp, pattern in rows:
        assert allocate_layers(layers, attention, mlp) == pattern, (layers, attention, mlp)


def test_an_override_that_agrees_with_the_ratios():
    assert allocate_layers(8, 0.25, 0.25, "*M-M*M-M") == "*M-M*M-M"
    assert allocate_layers(1, 1.0, 0.0) == "*"


def test_the_index_of_a_layer_among_its_kind():
    assert layer_maps("M*-MEM") == {"M": {0: 0, 3: 1, 5: 2}, "*": {1: 0}, "-": {2: 0}, "E": {4: 0}, "S": {}}


def test_equal_layers_have_equal_configs():
    config = MambaConfig(
        num_layers=6, hidden_size=32, num_attention_heads=4, hybrid_override_pattern="M*M-*-", mamba_head_dim=8
    )
    layers = [config.for_layer(i) for i in range(6)]
    assert layers[0] == layers[2]
    assert layers[1] == layers[4]
    assert layers[3] == layers[5]
    assert len(set(layers)) == 3
