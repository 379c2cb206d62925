"""The registry record of T5."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from megajax.config import Config, ConfigError, DataConfig, OptimizerConfig, TrainConfig
from megajax.models import language
from megajax.models.family import Family, Finished, dropout_from
from megajax.models.t5 import t5_data
from megajax.models.t5.t5_config import T5Config
from megajax.models.t5.t5_presets import PRESETS

if TYPE_CHECKING:
    import jax
    import numpy as np
    from flax import linen as nn

    from megajax.backends import BackendSpecProvider
    from megajax.data.build import Datasets
    from megajax.data.tokenizers import Tokenizer
    from megajax.interop.hf_architecture import Architecture
    from megajax.models.family import Batch, MegatronWeights
    from megajax.ops.cross_entropy import FusedLoss
    from megajax.parallel.pipeline_pieces import Pieces
    from megajax.transformer.stack import Segment

DEFAULT = Config(
    model_family="t5",
    model=T5Config(
        num_layers=2,
        hidden_size=128,
        num_attention_heads=4,
        ffn_hidden_size=384,
        make_vocab_size_divisible_by=128,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func="gelu_tanh",
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        vocab_extra_ids=32,
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
    train=TrainConfig(train_iters=600, micro_batch_size=32),
)
_HELD_OUT = 256
"""Samples that the epilogue looks at."""
_TOGETHER = 16


def build_model(config: T5Config, backend: BackendSpecProvider) -> nn.Module:
    """A `T5Model` of layers from `backend`."""
    from megajax.models.t5.t5_layer_specs import get_t5_decoder_spec, get_t5_encoder_spec
    from megajax.models.t5.t5_model import T5Model

    encoder = config.encoder_config
    encoder_specs = tuple(get_t5_encoder_spec(encoder.for_layer(i), backend) for i in range(encoder.num_layers))
    decoder_specs = tuple(get_t5_decoder_spec(config.for_layer(i), backend) for i in range(config.num_layers))
    return T5Model(config, encoder_specs, decoder_specs, backend=backend)


def config_of(model: nn.Module) -> T5Config:
    """The config with the model's own arguments put in."""
    from megajax.models.t5.t5_model import T5Model

    assert isinstance(model, T5Model)
    return model.resolved_config


def loss(
    model: nn.Module, params: Any, batch: Batch, weights: jax.Array, *, dropout_key: jax.Array | None
) -> FusedLoss:
    """Cross entropy of what the decoder writes; see `megajax.models.family.LossFn`."""
    return model.apply(  # type: ignore[return-value]
        {"params": params},
        batch["encoder_input"],
        batch["decoder_input"],
        batch["labels"],
        weights,
        encoder_mask=batch["encoder_mask"],
        decoder_mask=batch["decoder_mask"],
        **dropout_from(dropout_key),
        method="loss_sum",
    )


def pipeline_pieces(model: nn.Module) -> Pieces:
    """Embedding, both stacks and loss; see `megajax.models.family.Family.pipeline_pieces`."""
    from megajax.parallel.pipeline_pieces import Pieces

    def embed(shared: Any, batch: Batch, key: jax.Array | None) -> Any:
        arguments = (batch["encoder_input"], batch["decoder_input"])
        return model.apply({"params": shared}, *arguments, method="embed", **dropout_from(key))

    def encoder(params: Any, rows: Any, x: Any, batch: Batch, weights: jax.Array, key: jax.Array | None) -> Any:
        del weights
        mask = batch["encoder_mask"]
        return model.apply({"params": params}, x, rows, encoder_mask=mask, method="run_encoder", **dropout_from(key))

    def decoder(params: Any, rows: Any, x: Any, batch: Batch, weights: jax.Array, key: jax.Array | None) -> Any:
        del weights
        masks = {name: batch[name] for name in ("encoder_mask", "decoder_mask")}
        return model.apply({"params": params}, x, rows, **masks, method="run_decoder", **dropout_from(key))

    def loss(shared: Any, x: Any, batch: Batch, weights: jax.Array) -> Any:
        return model.apply({"params": shared}, x, batch["labels"], weights, method="loss_sum_of_stream")

    read_by = (
        (("encoder_relative_pos_emb",),),
        (("decoder_relative_pos_emb",), ("encoder", "final_layernorm")),
    )
    return Pieces(embed, (encoder, decoder), loss, read_by)


def layer_segments(model: nn.Module) -> Mapping[tuple[str, ...], tuple[Segment, ...]]:
    """How the layers of both stacks are stacked."""
    from megajax.models.t5.t5_model import T5Model
    from megajax.transformer.block import stack_layout

    assert isinstance(model, T5Model)
    config = model.resolved_config
    return {
        ("encoder",): stack_layout(config.encoder_config, model.encoder_layer_specs),
        ("decoder",): stack_layout(config, model.layer_specs),
    }


def example_inputs(config: T5Config, batch: int, seq_length: int) -> tuple[Any, ...]:
    """Texts to initialise with."""
    import jax.numpy as jnp

    written = min(seq_length, config.decoder_seq_length or seq_length)
    return jnp.zeros((batch, seq_length), jnp.int32), jnp.zeros((batch, written), jnp.int32)


def prompt(config: T5Config, requests: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Texts to read, as long as what is written about them may become."""
    import jax

    del config
    shapes = {"encoder_input": (length, "int32"), "encoder_mask": (length, "bool"), "decoder_input": (1, "int32")}
    return {name: jax.ShapeDtypeStruct((requests, n), dtype) for name, (n, dtype) in shapes.items()}


def fit(config: Config, tokenizer: Tokenizer) -> Config:
    """The config with the vocabulary that tokenizer and special tokens need, and the decoder's length."""
    from megajax.data.sentences import refuse_packing

    refuse_packing(config)
    model, parallel = config.model, config.parallel
    assert isinstance(model, T5Config)
    if not model.add_decoder:
        raise ConfigError("add_decoder=False leaves nothing to train; drop it")
    if parallel.context_parallel_size > 1:
        raise ConfigError(
            f"context_parallel_size={parallel.context_parallel_size}: --model {config.model_family} does not divide its"
            " sequences; set it to 1"
        )
    model = t5_data.check_lengths(model, config.data.seq_length)
    if parallel.sequence_parallel and (model.decoder_seq_length or 0) % parallel.tensor_model_parallel_size:
        raise ConfigError(
            f"decoder_seq_length={model.decoder_seq_length} is not divisible by tensor_model_parallel_size="
            f"{parallel.tensor_model_parallel_size}, as sequence_parallel=True needs it; change one"
        )
    needed = t5_data.t5_tokens(tokenizer, model.vocab_extra_ids).vocab_size
    if model.vocab_size is not None and model.vocab_size < needed:
        raise ConfigError(
            f"vocab_size={model.vocab_size} is less than the {needed} ids of tokenizer={config.data.tokenizer!r} and of"
            " the special tokens; raise it or leave it out"
        )
    model = model.replace(vocab_size=model.vocab_size or needed)
    return dataclasses.replace(config, model=language.fit_positions(config, model))


def flops(config: T5Config, *, batch_size: int, seq_length: int) -> int:
    """Model FLOPs of a training step: matrix products, forward and twice backward, as `megajax.training.flops`."""
    assert config.kv_channels is not None
    assert config.ffn_hidden_size is not None
    assert config.encoder_num_layers is not None
    T, S = seq_length, config.decoder_seq_length or seq_length
    hidden, width = config.hidden_size, config.kv_channels * config.num_attention_heads
    layer = 4 * hidden * width + hidden * config.ffn_hidden_size * (3 if config.gated_linear_unit else 2)
    encoder = config.encoder_num_layers * (T * layer + 2 * T * T * width)
    cross = 2 * hidden * width * (S + T) + 2 * S * T * width
    decoder = config.num_layers * (S * layer + S * S * width + cross)  # causal attention is half of it
    return 6 * batch_size * (encoder + decoder + S * hidden * config.padded_vocab_size)


def baseline(config: Config, datasets: Datasets) -> tuple[str, float]:
    """Nats per token of the best model that ignores both texts."""
    from megajax.data.sources import unigram_entropy

    assert config.model.vocab_size is not None
    frequencies = datasets.train.token_frequencies(config.model.vocab_size)
    return "unigram entropy of what is written", unigram_entropy(frequencies)


def epilogue(finished: Finished) -> Iterable[str]:
    """Tokens of missing spans found in held-out text, against the best without context; a text filled in."""
    import jax
    import numpy as np

    config, tokenizer = finished.config, finished.tokenizer
    dataset = finished.datasets.validation or finished.datasets.test or finished.datasets.train
    apply = jax.jit(finished.model.apply)
    counts: Any = np.zeros(tokenizer.vocab_size, np.int64)
    hits = total = 0
    size = min(len(dataset), _HELD_OUT)
    for start in range(0, size - size % _TOGETHER or size, _TOGETHER):
        samples = [dataset[min(i, len(dataset) - 1)] for i in range(start, start + _TOGETHER)]
        batch = {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}
        masks = {"encoder_mask": batch["encoder_mask"], "decoder_mask": batch["decoder_mask"]}
        logits: Any = apply({"params": finished.params}, batch["encoder_input"], batch["decoder_input"], **masks)
        labels = batch["labels"]
        text = (batch["loss_mask"] > 0) & (labels < tokenizer.vocab_size)  # sentinels and the end are no text
        hits, total = hits + int(((np.asarray(logits).argmax(-1) == labels) & text).sum()), total + int(text.sum())
        counts += np.bincount(labels[text], minlength=len(counts))
    total = max(total, 1)
    yield (
        f"span accuracy {hits / total:.1%} on {total} held-out tokens;"
        f" the most frequent token scores {counts.max() / total:.1%}"
    )
    yield f"\nfilled in, in [brackets]:\n{_filled_in(finished, dataset[0], config)}\n"


def _filled_in(finished: Finished, sample: dict[str, np.ndarray], config: Config) -> str:
    """A text with what the model writes for its missing spans, in brackets."""
    import jax.numpy as jnp
    import numpy as np

    from megajax.inference.generate import Sampling, generate

    model: Any = config.model
    special = t5_data.t5_tokens(finished.tokenizer, model.vocab_extra_ids).ids
    prompt = {name: jnp.asarray(sample[name])[None] for name in ("encoder_input", "encoder_mask")}
    prompt["decoder_input"] = jnp.full((1, 1), special["bos"], jnp.int32)
    length, greedy = model.decoder_seq_length, Sampling(temperature=0)
    written = generate(finished.model, finished.params, prompt, num_tokens=length, sampling=greedy)
    sentinels = {special[f"sentinel_{i}"] for i in range(model.vocab_extra_ids)}
    spans: dict[int, list[int]] = {}
    current: list[int] = []
    for token in np.asarray(written[0]).tolist():
        if token == special["eos"]:
            break
        if token in sentinels:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    text, piece = "", []
    for token in sample["encoder_input"][sample["encoder_mask"]].tolist():
        if token in sentinels:
            text += finished.tokenizer.detokenize(piece) + f"[{finished.tokenizer.detokenize(spans.get(token, []))}]"
            piece = []
        else:
            piece.append(token)
    return text + finished.tokenizer.detokenize(piece)


def hf() -> tuple[Architecture, ...]:
    """T5 and mT5."""
    from megajax.models.t5.t5_hf import ARCHITECTURES

    return ARCHITECTURES


def megatron() -> MegatronWeights:
    """Megatron's names of the weights."""
    from megajax.models.t5.t5_megatron import MEGATRON

    return MEGATRON


T5 = Family(
    name="t5",
    config_type=T5Config,
    default=DEFAULT,
    presets=PRESETS,
    build_model=build_model,
    config_of=config_of,
    loss=loss,
    example_inputs=example_inputs,
    fit=fit,
    datasets=t5_data.datasets,
    flops=flops,
    baseline=baseline,
    epilogue=epilogue,
    ask=t5_data.ask,
    prompt=prompt,
    adds_up_apart=("batch",),
    pipeline_pieces=pipeline_pieces,
    layer_segments=layer_segments,
    hf=hf,
    megatron=megatron,
)
