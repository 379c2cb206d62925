"""The registry record of GPT."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megajax.config import Config, DataConfig, OptimizerConfig, TrainConfig, TransformerConfig
from megajax.models import language
from megajax.models.family import Family, dropout_from
from megajax.models.gpt.gpt_presets import PRESETS

if TYPE_CHECKING:
    import jax
    from flax import linen as nn

    from megajax.backends import BackendSpecProvider
    from megajax.interop.hf_architecture import Architecture
    from megajax.models.family import Batch, MegatronWeights
    from megajax.ops.cross_entropy import FusedLoss
    from megajax.parallel.pipeline_pieces import Pieces
    from megajax.transformer.stack import Segment

DEFAULT = Config(
    model_family="gpt",
    model=TransformerConfig(
        num_layers=2,
        hidden_size=128,
        num_attention_heads=4,
        ffn_hidden_size=384,
        make_vocab_size_divisible_by=128,
        position_embedding_type="rope",
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func="silu",
        qk_layernorm=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
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


def build_model(config: TransformerConfig, backend: BackendSpecProvider) -> nn.Module:
    """A `GPTModel` of layers from `backend`."""
    from megajax.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megajax.models.gpt.gpt_model import GPTModel

    return GPTModel(config, get_gpt_decoder_block_spec(config, backend), backend=backend)


def config_of(model: nn.Module) -> TransformerConfig:
    """The config with the model's own arguments put in."""
    from megajax.models.gpt.gpt_model import GPTModel

    assert isinstance(model, GPTModel)
    return model.resolved_config


def loss(
    model: nn.Module, params: Any, batch: Batch, weights: jax.Array, *, dropout_key: jax.Array | None
) -> FusedLoss:
    """Next-token cross entropy; see `megajax.models.family.LossFn`."""
    return model.apply(  # type: ignore[return-value]
        {"params": params},
        batch["tokens"],
        batch["labels"],
        weights,
        position_ids=batch["position_ids"],
        segment_ids=batch.get("segment_ids"),
        **dropout_from(dropout_key),
        method="loss_sum",
    )


def pipeline_pieces(model: nn.Module) -> Pieces:
    """Embedding, layers and loss; see `megajax.models.family.Family.pipeline_pieces`."""
    from megajax.parallel.pipeline_pieces import Pieces

    def embed(shared: Any, batch: Batch, key: jax.Array | None) -> Any:
        arguments = (batch["tokens"], batch["position_ids"])
        return model.apply({"params": shared}, *arguments, method="embed", **dropout_from(key))

    def layers(params: Any, rows: Any, x: jax.Array, batch: Batch, weights: jax.Array, key: jax.Array | None) -> Any:
        arguments = (batch["position_ids"], batch.get("segment_ids"))
        inputs = model.apply({}, *arguments, aux_weight=weights.sum(), method="layer_inputs")
        return model.apply({"params": params}, x, inputs, rows, method="run_layers", **dropout_from(key))

    def loss(shared: Any, x: jax.Array, batch: Batch, weights: jax.Array) -> Any:
        return model.apply(
            {"params": shared},
            x,
            batch["tokens"],
            batch["labels"],
            weights,
            position_ids=batch["position_ids"],
            segment_ids=batch.get("segment_ids"),
            method="loss_sum_of_stream",
        )

    further = config_of(model).mtp_num_layers or 0
    return Pieces(embed, (layers,), loss, apart=tuple((f"mtp_{depth}",) for depth in range(further)))


def layer_segments(model: nn.Module) -> Mapping[tuple[str, ...], tuple[Segment, ...]]:
    """How the decoder's layers are stacked."""
    from megajax.models.gpt.gpt_model import GPTModel
    from megajax.transformer.block import stack_layout

    assert isinstance(model, GPTModel)
    return {("decoder",): stack_layout(model.resolved_config, model.layer_specs)}


def hf() -> tuple[Architecture, ...]:
    """Llama and its like, those with experts, Gemma, GPT-2."""
    from megajax.models.gpt.deepseek_hf import DEEPSEEK
    from megajax.models.gpt.experts_hf import EXPERTS
    from megajax.models.gpt.gemma_hf import GEMMA
    from megajax.models.gpt.gpt2_hf import GPT2
    from megajax.models.gpt.llama_hf import LLAMA_LIKE

    return (*LLAMA_LIKE, *EXPERTS, *DEEPSEEK, *GEMMA, GPT2)


def megatron() -> MegatronWeights:
    """Megatron's names of the weights."""
    from megajax.models.gpt.gpt_megatron import MEGATRON

    return MEGATRON


def example_inputs(config: TransformerConfig, batch: int, seq_length: int) -> tuple[Any, ...]:
    """Tokens to initialise with."""
    import jax.numpy as jnp

    del config
    return (jnp.zeros((batch, seq_length), jnp.int32),)


GPT = Family(
    name="gpt",
    config_type=TransformerConfig,
    default=DEFAULT,
    presets=PRESETS,
    build_model=build_model,
    config_of=config_of,
    loss=loss,
    example_inputs=example_inputs,
    ask=language.ask,
    prompt=language.prompt,
    adds_up_apart=("batch", "seq"),
    pipeline_pieces=pipeline_pieces,
    layer_segments=layer_segments,
    hf=hf,
    megatron=megatron,
)
