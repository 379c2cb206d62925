"""The registry record of Mamba-2 and hybrids."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import TYPE_CHECKING

from megajax.config import Config, ConfigError, DataConfig, OptimizerConfig, ParallelConfig, TrainConfig
from megajax.models import language
from megajax.models.family import Family
from megajax.models.gpt import gpt_family
from megajax.models.mamba.mamba_presets import PRESETS
from megajax.ssm.hybrid_layer_allocation import ATTENTION, MAMBA, SHARED
from megajax.ssm.mamba_config import MambaConfig

if TYPE_CHECKING:
    from flax import linen as nn

    from megajax.backends import BackendSpecProvider
    from megajax.data.tokenizers import Tokenizer
    from megajax.interop.hf_architecture import Architecture
    from megajax.models.family import MegatronWeights
    from megajax.parallel.pipeline_pieces import Pieces

DEFAULT = Config(
    model_family="mamba",
    model=MambaConfig(
        num_layers=4,
        hybrid_override_pattern="M-M-",
        hidden_size=128,
        num_attention_heads=4,
        ffn_hidden_size=256,
        make_vocab_size_divisible_by=128,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func="silu",
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        mamba_state_dim=32,
        mamba_head_dim=32,
        mamba_num_groups=1,
        mamba_chunk_size=32,
    ),
    optimizer=OptimizerConfig(
        optimizer="muon",
        muon_use_nesterov=True,
        lr=1.5e-2,
        min_lr=1e-3,
        lr_decay_style="cosine",
        lr_warmup_fraction=0.05,
        adam_beta2=0.95,
        weight_decay=0.1,
    ),
    data=DataConfig(seq_length=128),
    train=TrainConfig(train_iters=900, micro_batch_size=8),
)


def build_model(config: MambaConfig, backend: BackendSpecProvider) -> nn.Module:
    """A `MambaModel` of layers from `backend`."""
    from megajax.models.mamba.mamba_model import MambaModel

    return MambaModel(config, backend=backend)


def fit(config: Config, tokenizer: Tokenizer) -> Config:
    """As for every language model; and heads that the mesh cannot divide are refused."""
    config = language.fit(config, tokenizer)
    assert isinstance(config.model, MambaConfig)
    check(config.model, config.parallel)
    return config


def check(model: MambaConfig, parallel: ParallelConfig) -> None:
    """Raises ConfigError for layers that the config does not describe, and for heads that the mesh cannot divide."""
    tp = parallel.tensor_model_parallel_size
    model.require_experts_and_their_layers()
    if {MAMBA, SHARED} & set(model.layer_pattern) and (model.mamba_num_heads or 0) % tp:
        raise ConfigError(
            f"mamba_num_heads={model.mamba_num_heads} is not divisible by tensor_model_parallel_size={tp}; change one"
            " of them"
        )


def pipeline_pieces(model: nn.Module) -> Pieces:
    """As GPT's; the blocks that layers share lie on every stage, beside its layers."""
    from megajax.models.mamba.mamba_model import MambaModel

    assert isinstance(model, MambaModel)
    return gpt_family.pipeline_pieces(model)._replace(read_by=(tuple((name,) for name in model.shared_blocks),))


def flops(config: MambaConfig, *, batch_size: int, seq_length: int) -> int:
    """Model FLOPs of a training step, as `megajax.training.flops.model_flops` counts them, a sublayer at a time.

    With T tokens, h = hidden_size, d = the mixer's inner size, N = mamba_state_dim and G = mamba_num_groups, a Mamba
    layer takes 6 T h (3 d + 2 G N + heads) for its projections and 21 T d N for the state space (Megatron's count,
    `num_floating_point_operations`).
    """
    from megajax.training.flops import PER_PARAMETER, attention_weights, mlp_weights, query_width

    tokens, hidden, inner = batch_size * seq_length, config.hidden_size, config.mamba_inner_size
    state = config.mamba_state_dim
    mixer = hidden * (3 * inner + 2 * config.mamba_num_groups * state + (config.mamba_num_heads or 0))
    total = PER_PARAMETER * tokens * hidden * config.padded_vocab_size
    for index, kind in enumerate(config.layer_pattern):
        if kind in (MAMBA, SHARED):
            total += PER_PARAMETER * tokens * mixer + 21 * tokens * inner * state
        if kind == SHARED:
            total += PER_PARAMETER * tokens * _shared_weights(config)
            total += PER_PARAMETER * batch_size * seq_length**2 * query_width(config)
        elif kind == ATTENTION:
            total += PER_PARAMETER * tokens * attention_weights(config, index)
            total += PER_PARAMETER * batch_size * seq_length**2 * query_width(config)
        elif kind != MAMBA:
            total += PER_PARAMETER * tokens * mlp_weights(config, index)
    return total


def _shared_weights(config: MambaConfig) -> int:
    """Weights that a token meets in a layer S beside the mixer's: block, adapters, and the map after them."""
    hidden, ffn, rank = config.hidden_size, config.ffn_hidden_size or 0, config.shared_adapter_rank or 0
    channels = config.kv_channels or 0
    queries, keys = channels * config.num_attention_heads, channels * (config.num_query_groups or 0)
    attention = 2 * hidden * (queries + 2 * keys) + queries * hidden
    if config.shared_attention_adapter:
        attention += rank * (3 * 2 * hidden + queries + 2 * keys)
    return attention + 3 * hidden * ffn + rank * (hidden + 2 * ffn) + hidden**2


def hf() -> tuple[Architecture, ...]:
    """Mamba-2, Nemotron-H, Bamba, Zamba2."""
    from megajax.models.mamba.bamba_hf import BAMBA
    from megajax.models.mamba.mamba2_hf import MAMBA2
    from megajax.models.mamba.nemotron_h_hf import NEMOTRON_H
    from megajax.models.mamba.zamba2_hf import ZAMBA2

    return (MAMBA2, BAMBA, NEMOTRON_H, ZAMBA2)


def megatron() -> MegatronWeights:
    """Megatron's names of the weights."""
    from megajax.models.mamba.mamba_megatron import MEGATRON

    return MEGATRON


HYBRIDS = Family(
    name="mamba",
    config_type=MambaConfig,
    default=DEFAULT,
    presets=PRESETS,
    build_model=build_model,
    config_of=gpt_family.config_of,
    loss=gpt_family.loss,
    example_inputs=gpt_family.example_inputs,
    ask=language.ask,
    prompt=language.prompt,
    fit=fit,
    flops=flops,
    adds_up_apart=("batch", "seq"),
    pipeline_pieces=pipeline_pieces,
    layer_segments=gpt_family.layer_segments,
    hf=hf,
    megatron=megatron,
)
