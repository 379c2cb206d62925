"""The registry record of BERT."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from megajax.config import Config, ConfigError, DataConfig, OptimizerConfig, TrainConfig
from megajax.models import language
from megajax.models.bert import bert_data
from megajax.models.bert.bert_config import BertConfig
from megajax.models.bert.bert_presets import PRESETS
from megajax.models.family import Family, Finished, dropout_from

if TYPE_CHECKING:
    import jax
    import numpy as np
    from flax import linen as nn

    from megajax.backends import BackendSpecProvider
    from megajax.data.tokenizers import Tokenizer
    from megajax.interop.hf_architecture import Architecture
    from megajax.models.family import Batch, MegatronWeights
    from megajax.ops.cross_entropy import FusedLoss
    from megajax.parallel.pipeline_pieces import Pieces
    from megajax.transformer.stack import Segment

DEFAULT = Config(
    model_family="bert",
    model=BertConfig(
        num_layers=2,
        hidden_size=128,
        num_attention_heads=4,
        ffn_hidden_size=512,
        make_vocab_size_divisible_by=128,
        position_embedding_type="rope",
        hidden_dropout=0.0,
        attention_dropout=0.0,
    ),
    optimizer=OptimizerConfig(
        optimizer="muon",
        muon_use_nesterov=True,
        lr=4e-3,
        min_lr=4e-4,
        lr_decay_style="cosine",
        lr_warmup_fraction=0.05,
        adam_beta2=0.95,
        weight_decay=0.1,
    ),
    data=DataConfig(seq_length=128),
    train=TrainConfig(train_iters=500, micro_batch_size=32),
)
_HELD_OUT = 256
"""Samples that the epilogue looks at."""
_TOGETHER = 16


def build_model(config: BertConfig, backend: BackendSpecProvider) -> nn.Module:
    """A `BertModel` of layers from `backend`."""
    from megajax.models.bert.bert_layer_specs import get_bert_layer_spec
    from megajax.models.bert.bert_model import BertModel

    specs = tuple(get_bert_layer_spec(config.for_layer(i), backend) for i in range(config.num_layers))
    return BertModel(config, specs, backend=backend)


def config_of(model: nn.Module) -> BertConfig:
    """The config with the model's own arguments put in."""
    from megajax.models.bert.bert_model import BertModel

    assert isinstance(model, BertModel)
    return model.resolved_config


def loss(
    model: nn.Module, params: Any, batch: Batch, weights: jax.Array, *, dropout_key: jax.Array | None
) -> FusedLoss:
    """Cross entropy of the masked tokens, and of the order of the two texts; see `megajax.models.family.LossFn`."""
    return model.apply(  # type: ignore[return-value]
        {"params": params},
        batch["tokens"],
        batch["labels"],
        weights,
        is_random=batch["is_random"],
        **_inputs(batch),
        **dropout_from(dropout_key),
        method="loss_sum",
    )


def _inputs(batch: Any) -> dict[str, Any]:
    return {name: batch[name] for name in ("attention_mask", "tokentype_ids", "position_ids")}


def pipeline_pieces(model: nn.Module) -> Pieces:
    """Embedding, layers and losses; see `megajax.models.family.Family.pipeline_pieces`."""
    from megajax.parallel.pipeline_pieces import Pieces

    def embed(shared: Any, batch: Batch, key: jax.Array | None) -> Any:
        arguments = (batch["tokens"], batch["position_ids"], batch["tokentype_ids"])
        return model.apply({"params": shared}, *arguments, method="embed", **dropout_from(key))

    def layers(params: Any, rows: Any, x: jax.Array, batch: Batch, weights: jax.Array, key: jax.Array | None) -> Any:
        del weights
        inputs = model.apply({}, batch["position_ids"], batch["attention_mask"], method="layer_inputs")
        return model.apply({"params": params}, x, inputs, rows, method="run_layers", **dropout_from(key))

    def loss(shared: Any, x: jax.Array, batch: Batch, weights: jax.Array) -> Any:
        arguments = (x, batch["labels"], weights)
        return model.apply({"params": shared}, *arguments, is_random=batch["is_random"], method="loss_sum_of_stream")

    return Pieces(embed, (layers,), loss)


def layer_segments(model: nn.Module) -> Mapping[tuple[str, ...], tuple[Segment, ...]]:
    """How the encoder's layers are stacked."""
    from megajax.models.bert.bert_model import BertModel
    from megajax.transformer.block import stack_layout

    assert isinstance(model, BertModel)
    return {("encoder",): stack_layout(model.resolved_config, model.layer_specs)}


def example_inputs(config: BertConfig, batch: int, seq_length: int) -> tuple[Any, ...]:
    """Tokens to initialise with."""
    import jax.numpy as jnp

    del config
    return (jnp.zeros((batch, seq_length), jnp.int32),)


def fit(config: Config, tokenizer: Tokenizer) -> Config:
    """The config with the vocabulary that tokenizer and special tokens need, and positions for the sequences."""
    from megajax.data.sentences import refuse_packing

    refuse_packing(config)
    model = config.model
    assert isinstance(model, BertConfig)
    if not model.add_lm_head:
        raise ConfigError("add_lm_head=False leaves nothing to train; drop it")
    if model.add_binary_head and model.num_tokentypes < 2:
        raise ConfigError(f"num_tokentypes={model.num_tokentypes} cannot tell two texts apart; give 2")
    needed = bert_data.bert_tokens(tokenizer).vocab_size
    if model.vocab_size is not None and model.vocab_size < needed:
        raise ConfigError(
            f"vocab_size={model.vocab_size} is less than the {needed} ids of tokenizer={config.data.tokenizer!r} and of"
            " the special tokens; raise it or leave it out"
        )
    model = model.replace(vocab_size=model.vocab_size or needed)
    return dataclasses.replace(config, model=language.fit_positions(config, model))


def flops(config: BertConfig, *, batch_size: int, seq_length: int) -> int:
    """Model FLOPs of a training step: as a decoder's, but attention is whole, and one more matrix before the logits."""
    assert config.kv_channels is not None
    further = seq_length**2 * config.num_layers * config.kv_channels * config.num_attention_heads
    if config.transform_lm_head:
        further += seq_length * config.hidden_size**2
    if config.add_pooler:
        further += config.hidden_size**2
    return language.flops(config, batch_size=batch_size, seq_length=seq_length) + 6 * batch_size * further


def epilogue(finished: Finished) -> Iterable[str]:
    """Masked tokens and orders of texts found in held-out text, against the best that context has no part in."""
    import jax
    import numpy as np

    dataset = finished.datasets.validation or finished.datasets.test or finished.datasets.train
    size = min(len(dataset), _HELD_OUT)
    apply = jax.jit(finished.model.apply)
    hits, masks, orders, pairs, common = 0, 0, 0, 0, 0
    vocab_size = finished.config.model.vocab_size
    assert vocab_size is not None
    favourite = int(np.argmax(finished.datasets.train.token_frequencies(vocab_size)))
    shown = None
    for start in range(0, size - size % _TOGETHER or size, _TOGETHER):
        samples = [dataset[min(i, len(dataset) - 1)] for i in range(start, start + _TOGETHER)]
        batch = {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}
        output: Any = apply({"params": finished.params}, batch["tokens"], **_inputs(batch))
        guesses, mask = np.asarray(output.lm).argmax(-1), batch["loss_mask"] > 0
        hits, masks = hits + int(((guesses == batch["labels"]) & mask).sum()), masks + int(mask.sum())
        common += int(((batch["labels"] == favourite) & mask).sum())
        known = batch["is_random"] >= 0
        if output.binary is not None:
            orders += int(((np.asarray(output.binary).argmax(-1) == batch["is_random"]) & known).sum())
            pairs += int(known.sum())
        shown = (batch["tokens"][0], guesses[0], mask[0]) if shown is None else shown
    masks = max(masks, 1)
    yield (
        f"masked accuracy {hits / masks:.1%} on {masks} held-out tokens;"
        f" the most frequent token scores {common / masks:.1%}"
    )
    if pairs:
        yield f"order of two texts right in {orders / pairs:.1%} of {pairs} held-out pairs; chance is 50%"
    assert shown is not None
    yield f"\nfilled in, in [brackets]:\n{_filled_in(finished.tokenizer, *shown)}\n"


def _filled_in(tokenizer: Tokenizer, tokens: np.ndarray, guesses: np.ndarray, mask: np.ndarray) -> str:
    """The text, with runs of guesses in brackets."""
    text, start = "", 0
    for end in range(1, len(tokens) + 1):
        if end == len(tokens) or mask[end] != mask[start]:
            chosen = guesses if mask[start] else tokens
            piece = tokenizer.detokenize(int(i) for i in chosen[start:end])
            text += f"[{piece}]" if mask[start] else piece
            start = end
    return text


def hf() -> tuple[Architecture, ...]:
    """BERT and Megatron-BERT."""
    from megajax.models.bert.bert_hf import ARCHITECTURES

    return ARCHITECTURES


def megatron() -> MegatronWeights:
    """Megatron's names of the weights."""
    from megajax.models.bert.bert_megatron import MEGATRON

    return MEGATRON


BERT = Family(
    name="bert",
    config_type=BertConfig,
    default=DEFAULT,
    presets=PRESETS,
    build_model=build_model,
    config_of=config_of,
    loss=loss,
    example_inputs=example_inputs,
    fit=fit,
    datasets=bert_data.datasets,
    adds_up_apart=("batch", "seq"),
    batch_axes={"is_random": ("batch",)},
    flops=flops,
    epilogue=epilogue,
    pipeline_pieces=pipeline_pieces,
    layer_segments=layer_segments,
    hf=hf,
    megatron=megatron,
)
