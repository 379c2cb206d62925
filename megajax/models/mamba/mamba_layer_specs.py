"""Layer specs of Mamba-2 and hybrid models: what each symbol of a pattern stands for."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from megajax.backends import BackendSpecProvider
from megajax.models.gpt.gpt_layer_specs import get_mlp_module_spec, get_moe_module_spec, get_self_attention_spec
from megajax.spec import Builder, ModuleSpec
from megajax.ssm.hybrid_layer_allocation import ATTENTION, MAMBA, MLP, MOE
from megajax.ssm.mamba_config import MambaConfig
from megajax.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megajax.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megajax.transformer.layer import TransformerLayer, TransformerLayerSubmodules


@dataclasses.dataclass(unsafe_hash=True, kw_only=True)
class MambaStackSubmodules:
    """The layer of each kind, each one sublayer. Megatron: `MambaStackSubmodules` of `core/ssm/mamba_block.py`."""

    mamba_layer: Builder
    attention_layer: Builder
    mlp_layer: Builder
    moe_layer: Builder

    def layers(self, pattern: str) -> tuple[Builder, ...]:
        """One builder for each symbol of `pattern`."""
        kinds: Mapping[str, Builder] = {
            MAMBA: self.mamba_layer,
            ATTENTION: self.attention_layer,
            MLP: self.mlp_layer,
            MOE: self.moe_layer,
        }
        return tuple(kinds[symbol] for symbol in pattern)


def get_mamba_layer_spec(config: MambaConfig, backend: BackendSpecProvider) -> ModuleSpec:
    """One Mamba-2 layer."""
    mixer = MambaMixerSubmodules(
        in_proj=backend.column_parallel_linear(),
        core=backend.state_space(),
        out_proj=backend.row_parallel_linear(),
    )
    return ModuleSpec(
        MambaLayer, MambaLayerSubmodules(norm=backend.layer_norm(config), mixer=ModuleSpec(MambaMixer, mixer))
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
    )
