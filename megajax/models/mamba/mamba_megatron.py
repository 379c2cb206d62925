"""Weights of Mamba-2 and hybrid models in Megatron's checkpoints."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from megajax.config import ConfigError
from megajax.interop.megatron_config import config_arguments, megatron_settings
from megajax.interop.megatron_fields import FIELDS, MODEL_ARGUMENTS, Mapped, Plumbing, Refused, Rule
from megajax.interop.megatron_layouts import Path, Tensor, layer_tensors, outer_tensors
from megajax.interop.megatron_tables import fitted_to_tables, with_sizes_of_tables
from megajax.models.family import MegatronWeights
from megajax.models.mamba.mamba_model import MambaModel
from megajax.ssm.hybrid_layer_allocation import MOE, SHARED, allocate_layers
from megajax.ssm.mamba_config import MambaConfig

_SIZES = ("mamba_state_dim", "mamba_head_dim", "mamba_num_groups", "mamba_num_heads")
PATTERN_ARGUMENTS = ("hybrid_override_pattern", "hybrid_attention_ratio", "hybrid_mlp_ratio")
_MIXER = {
    "chunk_size": "mamba_chunk_size",
    "d_conv": "mamba_d_conv",
    "expand": "mamba_expand",
    "D_has_hdim": "mamba_d_has_hdim",
    "rmsnorm": "mamba_rmsnorm",
    "conv_bias": "mamba_conv_bias",
    "conv_init": "mamba_conv_init",
    "A_init_range": "mamba_a_init_range",
    "dt_min": "mamba_dt_min",
    "dt_max": "mamba_dt_max",
    "dt_init_floor": "mamba_dt_init_floor",
}
"""Arguments of Megatron's MambaMixer -> options."""


def _as(name: str) -> Mapped:
    return Mapped(lambda value, _: {name: tuple(value) if isinstance(value, list) else value})


def _main_pattern(value: str | None, fields: Mapping[str, Any]) -> dict[str, Any]:
    del fields
    return {} if value is None else {"hybrid_override_pattern": value.replace("|", "")}  # only says where stages end


FIELD_RULES: Mapping[str, Rule] = {
    **FIELDS,
    **{name: _as(name) for name in _SIZES},
    "is_hybrid_model": Plumbing(),  # of the first weights only
    "mamba_training_ssm_states_dtype": Plumbing(),
    "moe_layer_freq": Mapped(lambda value, _: {}),  # the pattern says it
}
OWN_ARGUMENTS: Mapping[str, Rule] = {
    **{name: _as(name) for name in PATTERN_ARGUMENTS},
    "hybrid_layer_pattern": Mapped(_main_pattern),
    **{name: _as(option) for name, option in _MIXER.items()},
    **{name: Plumbing() for name in ("mamba_stack_spec", "hybrid_stack_spec", "use_mem_eff_path")},
    **{name: Plumbing() for name in ("d_state", "headdim", "ngroups")},  # Megatron reads its config instead
    **{name: Plumbing() for name in ("dt_init", "dt_scale")},
    **{name: Refused((False,)) for name in ("bias", "norm_before_gate")},
}
"""Arguments that Megatron's other models do not have."""
_NOT_THERE: Mapping[str, Any] = {
    "mamba_proj_bias": False,
    "mamba_norm_epsilon": 1e-5,
    "mamba_dt_clamp_min": 0.0,
    "mamba_dt_clamp_max": None,
}
"""Options that Megatron's mixer has in this form only."""
_SPLIT = re.compile(r"\.mixer\.(in_proj|conv1d)_(\w+)\.")
_ORDER = ("z", "x", "B", "C", "dt")


def read_config(
    fields: Mapping[str, Any], model_kwargs: Mapping[str, Any], tensors: dict[str, np.ndarray]
) -> MambaConfig:
    """See `MegatronWeights.read_config`. Arguments of its `MambaMixer` may stand beside those of its `MambaModel`."""
    positions = {} if fields.get("position_embedding_type") else {"position_embedding_type": "none"}
    given = config_arguments(
        fields,
        with_sizes_of_tables(positions | dict(model_kwargs), tensors),
        family="mamba",
        field_rules=FIELD_RULES,
        argument_rules={**MODEL_ARGUMENTS, **OWN_ARGUMENTS},
    )
    given = {name: value for name, value in given.items() if not (name in PATTERN_ARGUMENTS and value is None)}
    attention, mlp = given.get("hybrid_attention_ratio", 0.0), given.get("hybrid_mlp_ratio", 0.0)
    pattern = allocate_layers(given["num_layers"], attention, mlp, given.get("hybrid_override_pattern"))
    if MOE not in pattern:  # Megatron does not read these options then
        given = {name: value for name, value in given.items() if not name.startswith(("moe_", "num_moe_"))}
    given.pop("moe_layer_freq", None)
    return fitted_to_tables(MambaConfig(**given), tensors)


def write_config(config: MambaConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The inverse of `read_config`.

    Raises:
      ConfigError: Megatron has no such option.
    """
    for name, only in _NOT_THERE.items():
        if getattr(config, name) != only:
            raise ConfigError(
                f"{name}={getattr(config, name)!r} cannot be expressed in a Megatron config, which has {only!r}"
            )
    if SHARED in config.layer_pattern:
        raise ConfigError(
            f"hybrid_override_pattern={config.layer_pattern!r} cannot be expressed in a Megatron config, which has no"
            f" {SHARED}"
        )
    fields, arguments = megatron_settings(config)
    fields |= {name: getattr(config, name) for name in _SIZES} | {"is_hybrid_model": True}
    arguments |= {"hybrid_override_pattern": config.layer_pattern}
    for name, option in _MIXER.items():
        value = getattr(config, option)
        arguments[name] = list(value) if isinstance(value, tuple) else value
    for name in ("rope_scaling", "rope_scaling_factor"):
        if not arguments.get("rope_scaling"):
            arguments.pop(name, None)
    return fields, arguments


def tensors(config: MambaConfig, model: Any, params: Mapping[Path, Any]) -> Iterator[Tensor]:
    """Megatron's tensors in the order of its modules."""
    yield from outer_tensors(params, [path for path in params if path[0] == "embedding"])
    yield from _fused(layer_tensors(config, model.layer_specs, params))
    for tensor in outer_tensors(params, [path for path in params if path[:2] == ("decoder", "final_layernorm")]):
        yield tensor._replace(name=tensor.name.replace("final_layernorm", "final_norm"))
    yield from outer_tensors(params, [path for path in params if path[0] == "output_layer"])


def _fused(layers: Iterable[Tensor]) -> Iterator[Tensor]:
    """Puts together what Megatron's mixer holds in one tensor: the rows of z, x, B, C and the step sizes."""
    fused: dict[str, list[tuple[int, Tensor]]] = {}
    for tensor in layers:
        found = _SPLIT.search(tensor.name)
        name = _SPLIT.sub(r".mixer.\1.", tensor.name)
        fused.setdefault(name, []).append((0 if found is None else _ORDER.index(found[2]), tensor))
    for name, members in fused.items():
        members.sort(key=lambda member: member[0])
        parts = tuple(part for _, tensor in members for part in tensor.parts)
        yield members[0][1]._replace(name=name, parts=parts)


MEGATRON = MegatronWeights(read_config, write_config, MambaModel, tensors)
