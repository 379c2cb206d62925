"""Layer specs of Mamba-2 and hybrid models: what each symbol of a pattern stands for."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping

from megajax.backends import BackendSpecProvider
from megajax.models.gpt.gpt_layer_specs import get_mlp_module_spec, get_moe_module_spec, get_self_attention_spec
from megajax.spec import Builder, ModuleSpec
from megajax.ssm.hybrid_layer_allocation import ATTENTION, MAMBA, MLP, MOE, SHARED
from megajax.ssm.mamba_config import MambaConfig
from megajax.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megajax.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megajax.ssm.shared_block import (
    AdaptedLinear,
    AdaptedMLP,
    AdaptedMLPSubmodules,
    SharedBlock,
    SharedBlockSubmodules,
    SharedMambaLayer,
    SharedMambaLayerSubmodules,
)
from megajax.transformer.layer import TransformerLayer, TransformerLayerSubmodules


@dataclasses.dataclass(unsafe_hash=True, kw_only=True)
class MambaStackSubmodules:
    """The layer of each kind, each one sublayer. Megatron: `MambaStackSubmodules` of `core/ssm/mamba_block.py`.

    shared_layers: one for each shared block; the layers S take them in turn.
    """

    mamba_layer: Builder
    attention_layer: Builder
    mlp_layer: Builder
    moe_layer: Builder
    shared_layers: tuple[Builder, ...] = ()

    def layers(self, pattern: str) -> tuple[Builder, ...]:
        """One builder for each symbol of `pattern`."""
        kinds: Mapping[str, Builder] = {
            MAMBA: self.mamba_layer,
            ATTENTION: self.attention_layer,
            MLP: self.mlp_layer,
            MOE: self.moe_layer,
        }
        shared = itertools.cycle(self.shared_layers)
        return tuple(next(shared) if symbol == SHARED else kinds[symbol] for symbol in pattern)


def get_mamba_layer_spec(config: MambaConfig, backend: BackendSpecProvider) -> ModuleSpec:
    """One Mamba-2 layer."""
    return ModuleSpec(
        MambaLayer, MambaLayerSubmodules(norm=backend.layer_norm(config), mixer=get_mamba_mixer_spec(backend))
    )


def get_mamba_mixer_spec(backend: BackendSpecProvider) -> ModuleSpec:
    """The mixer of such a layer."""
    mixer = MambaMixerSubmodules(
        in_proj=backend.column_parallel_linear(),
        core=backend.state_space(),
        out_proj=backend.row_parallel_linear(),
    )
    return ModuleSpec(MambaMixer, mixer)


def get_shared_block_spec(config: MambaConfig, backend: BackendSpecProvider) -> ModuleSpec:
    """Zamba2's transformer block, with the adapters of one layer."""
    norm, column = backend.layer_norm(config), backend.column_parallel_linear()
    attention = get_self_attention_spec(config, backend)
    if config.shared_attention_adapter:
        attention = attention.replace(linear_qkv=ModuleSpec(AdaptedLinear, params={"linear": column}))
    mlp = ModuleSpec(AdaptedMLP, AdaptedMLPSubmodules(linear_fc1=column, linear_fc2=backend.row_parallel_linear()))
    return ModuleSpec(
        SharedBlock,
        SharedBlockSubmodules(input_layernorm=norm, self_attention=attention, pre_mlp_layernorm=norm, mlp=mlp),
    )


def get_shared_layer_specs(config: MambaConfig, backend: BackendSpecProvider) -> tuple[ModuleSpec, ...]:
    """A layer S for each of the shared blocks."""
    slots = SharedMambaLayerSubmodules(
        shared_block=get_shared_block_spec(config, backend),
        linear=backend.column_parallel_linear(),
        norm=backend.layer_norm(config),
        mixer=get_mamba_mixer_spec(backend),
    )
    return tuple(
        ModuleSpec(SharedMambaLayer, slots, params={"block": block}) for block in range(config.num_shared_blocks)
    )


def get_mamba_stack_spec(config: MambaConfig, backend: BackendSpecProvider) -> MambaStackSubmodules:
    """All kinds of layers. Megatron: `mamba_stack_spec` of `core/models/mamba/mamba_layer_specs.py`."""
    norm = backend.layer_norm(config)

    def mlp_layer(mlp: Builder) -> ModuleSpec:
        return ModuleSpec(TransformerLayer, TransformerLayerSubmodules(pre_mlp_layernorm=norm, mlp=mlp))

    attention = TransformerLayerSubmodules(
        input_layernorm=norm, self_attention=get_self_attention_spec(config, backend)
    )
    return MambaStackSubmodules(
        mamba_layer=get_mamba_layer_spec(config, backend),
        attention_layer=ModuleSpec(TransformerLayer, attention),
        mlp_layer=mlp_layer(get_mlp_module_spec(backend)),
        moe_layer=mlp_layer(get_moe_module_spec(backend)),
        shared_layers=get_shared_layer_specs(config, backend),
    )
