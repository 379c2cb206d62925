"""The registry record of RETRO."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from megajax.config import Config, ConfigError, DataConfig, OptimizerConfig, TrainConfig
from megajax.models import language
from megajax.models.family import Family, Finished, dropout_from
from megajax.models.retro import retro_data
from megajax.models.retro.config import RetroConfig
from megajax.models.retro.retro_presets import PRESETS

if TYPE_CHECKING:
    import jax
    import numpy as np
    from flax import linen as nn

    from megajax.backends import BackendSpecProvider
    from megajax.data.tokenizers import Tokenizer
    from megajax.models.family import Batch, MegatronWeights
    from megajax.ops.cross_entropy import FusedLoss

DEFAULT = Config(
    model_family="retro",
    model=RetroConfig(
        num_layers=6,
        hidden_size=64,
        num_attention_heads=2,
        ffn_hidden_size=192,
        make_vocab_size_divisible_by=128,
        position_embedding_type="rope",
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func="silu",
        qk_layernorm=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=0.04,
        retro_chunk_length=8,
        retro_num_neighbors=1,
        retro_align_neighbors=True,
        retro_encoder_num_layers=1,
        retro_encoder_rotary=True,
        retro_cross_attention_rotary=True,
        retro_encoder_hidden_dropout=0.0,
        retro_encoder_attention_dropout=0.0,
        post_layer_norm=True,
    ),
    optimizer=OptimizerConfig(
        optimizer="muon",
        muon_use_nesterov=True,
        lr=3.5e-3,  # at twice that the model forgets again how to read
        min_lr=4e-4,
        lr_decay_style="cosine",
        lr_warmup_fraction=0.05,
        adam_beta2=0.95,
        weight_decay=0.1,
    ),
    data=DataConfig(seq_length=256, split="900,99,1"),  # enough held-out text to tell what retrieval is worth
    train=TrainConfig(train_iters=1200, micro_batch_size=4),
)
_HELD_OUT = 256
"""Samples that the epilogue looks at."""
_TOGETHER = 16


def build_model(config: RetroConfig, backend: BackendSpecProvider) -> nn.Module:
    """A `RETROModel` of layers from `backend`."""
    from megajax.models.retro.decoder_spec import get_retro_decoder_block_spec
    from megajax.models.retro.model import RETROModel

    return RETROModel(config, get_retro_decoder_block_spec(config, backend), backend=backend)


def config_of(model: nn.Module) -> RetroConfig:
    """The config with the model's own arguments put in."""
    from megajax.models.retro.model import RETROModel

    assert isinstance(model, RETROModel)
    return model.resolved_config


def loss(
    model: nn.Module, params: Any, batch: Batch, weights: jax.Array, *, dropout_key: jax.Array | None
) -> FusedLoss:
    """Next-token cross entropy; see `megajax.models.family.LossFn`."""
    return model.apply(  # type: ignore[return-value]
        {"params": params},
        batch["tokens"],
        batch["context_tokens"],
        batch["labels"],
        weights,
        position_ids=batch["position_ids"],
        **dropout_from(dropout_key),
        method="loss_sum",
    )


def example_inputs(config: RetroConfig, batch: int, seq_length: int) -> tuple[Any, ...]:
    """A text and its neighbours to initialise with."""
    import jax.numpy as jnp

    chunks = -(-seq_length // config.retro_chunk_length)
    neighbors = (batch, chunks, config.retro_num_neighbors, config.retro_retrieved_length)
    return jnp.zeros((batch, seq_length), jnp.int32), jnp.zeros(neighbors, jnp.int32)


def fit(config: Config, tokenizer: Tokenizer) -> Config:
    """The config with the vocabulary that the tokenizer needs, and room for sequences, neighbours and the sample."""
    model, data = config.model, config.data
    assert isinstance(model, RetroConfig)
    assert model.retro_layer_numbers
    for name in ("reset_position_ids", "reset_attention_mask"):
        if getattr(data, name):
            raise ConfigError(
                f"{name}=True is not possible for --model {config.model_family}, whose chunks may have parts of two"
                " documents; drop it"
            )
    if config.parallel.context_parallel_size > 1:
        raise ConfigError(
            f"context_parallel_size={config.parallel.context_parallel_size}: --model {config.model_family} does not"
            " divide its sequences; set it to 1"
        )
    if data.seq_length % model.retro_chunk_length:
        raise ConfigError(
            f"seq_length={data.seq_length} is not a multiple of retro_chunk_length={model.retro_chunk_length}; change"
            " one of them"
        )
    longest = max(data.seq_length, model.retro_retrieved_length)
    if model.position_embedding_type == "learned_absolute":
        if (model.max_sequence_length or longest) < longest:
            raise ConfigError(
                f"max_sequence_length={model.max_sequence_length} is less than the {longest} tokens of a sequence"
                f" (seq_length={data.seq_length}) or a neighbour (retro_num_retrieved_chunks="
                f"{model.retro_num_retrieved_chunks} of {model.retro_chunk_length}); raise it or leave it out"
            )
        model = model.replace(max_sequence_length=model.max_sequence_length or longest)
    return language.fit(dataclasses.replace(config, model=model), tokenizer)


def flops(config: RetroConfig, *, batch_size: int, seq_length: int) -> int:
    """Model FLOPs of a training step: those of a decoder, of the layers that read neighbours, and of the encoder."""
    assert config.kv_channels is not None
    assert config.ffn_hidden_size is not None
    S, M, R = seq_length, config.retro_chunk_length, config.retro_retrieved_length
    T = -(-S // M) * config.retro_num_neighbors * R  # tokens of all neighbours
    hidden, width = config.hidden_size, config.kv_channels * config.num_attention_heads
    cross = 2 * hidden * width * (S + T) + 2 * S * config.retro_num_neighbors * R * width
    layer = 4 * hidden * width + hidden * config.ffn_hidden_size * (3 if config.gated_linear_unit else 2)
    encoder = config.retro_encoder_num_layers * T * (layer + 2 * R * width)
    reading = 2 * hidden * width * (S + T) + 2 * T * M * width  # its first layer reads the chunk
    decoder = language.flops(config, batch_size=batch_size, seq_length=seq_length)
    return decoder + 6 * batch_size * (len(config.retro_layer_numbers) * cross + encoder + reading)


def epilogue(finished: Finished) -> Iterable[str]:
    """The loss on held-out text with its neighbours and with those of other chunks; a sample of text."""
    yield "{} {:.4f}".format(*language.baseline(finished.config, finished.datasets))
    losses = neighbor_losses(finished)
    yield (
        f"held-out loss {losses.found:.4f} with the neighbors that were found, {losses.others:.4f} with those of other"
        f" chunks: retrieval is worth {losses.gain:+.4f}, standard error {losses.error:.4f}"
    )
    if finished.config.train.sample_tokens:
        yield f"\nsample, with retrieval:\n{_sample(finished)}\n"


class NeighborLosses(NamedTuple):
    """Nats per held-out token.

    found: given the neighbours of each chunk. others: given those of another chunk, drawn at random. error: standard
    error of the difference, from how it varies between samples; NaN for one sample.
    """

    found: float
    others: float
    error: float

    @property
    def gain(self) -> float:
        """What retrieval is worth."""
        return self.others - self.found


def neighbor_losses(finished: Finished) -> NeighborLosses:
    """What the neighbours of held-out text are worth, on each of its tokens once."""
    import jax
    import numpy as np

    datasets = finished.datasets
    dataset: Any = datasets.validation or datasets.test or datasets.train
    dataset = dataset.once()
    samples = [dataset[index] for index in range(min(len(dataset), _HELD_OUT))]
    texts = {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}
    context = texts["context_tokens"]
    contexts = (context, _of_other_chunks(context, seed=finished.config.train.seed))
    apply = jax.jit(finished.model.apply)
    sums_2N = np.zeros((2, len(samples)))
    for start in range(0, len(samples), _TOGETHER):
        rows = np.arange(start, min(start + _TOGETHER, len(samples)))
        at = np.resize(rows, _TOGETHER)  # the last batch is filled up
        for which, neighbors in enumerate(contexts):
            losses: Any = apply(
                {"params": finished.params}, texts["tokens"][at], neighbors[at], labels=texts["labels"][at]
            )
            sums_2N[which, rows] = (np.asarray(losses) * texts["loss_mask"][at]).sum(axis=1)[: len(rows)]
    return compared(sums_2N, texts["loss_mask"].sum(axis=1, dtype=np.float64))


def compared(sums_2N: np.ndarray, tokens_N: np.ndarray) -> NeighborLosses:
    """From the loss of each sample, summed over its tokens: with its neighbours, and with those of other chunks."""
    count, total = len(tokens_N), float(tokens_N.sum())
    found, others = (sums_2N.sum(axis=1) / total).tolist()
    # The difference is a ratio of two sums over samples.
    apart_N = sums_2N[1] - sums_2N[0] - (others - found) * tokens_N
    error = math.sqrt(count / (count - 1) * float(apart_N @ apart_N)) / total if count > 1 else math.nan
    return NeighborLosses(found, others, error)


def _of_other_chunks(context_BLKR: np.ndarray, *, seed: int) -> np.ndarray:
    """The same neighbours, those of each chunk in the place of another one's."""
    import numpy as np

    flat = context_BLKR.reshape(-1, *context_BLKR.shape[2:])
    order = np.random.default_rng(seed).permutation(len(flat))
    others = np.empty_like(flat)
    others[order] = flat[np.roll(order, 1)]  # so no chunk keeps its own
    return others.reshape(context_BLKR.shape)


def _sample(finished: Finished) -> str:
    """The prompt and its continuation by the model, which looks neighbours up as it goes."""
    import jax

    from megajax.inference.generate import Sampling, sample_token
    from megajax.models.retro.model import RETROModel
    from megajax.models.retro.retro_generate import generate

    config, tokenizer, model = finished.config, finished.tokenizer, finished.model
    assert isinstance(model, RETROModel)
    prompt = language.prompt_tokens(config, tokenizer)
    sampling, key = Sampling(temperature=0.6, top_p=0.95), jax.random.key(config.train.seed)
    new = generate(
        model,
        finished.params,
        prompt,
        finished.datasets.train.chunks.database,
        num_tokens=min(config.train.sample_tokens, config.data.seq_length - len(prompt)),
        choose=lambda logits, place: sample_token(logits, jax.random.fold_in(key, place), sampling),
    )
    if tokenizer.eod in new:
        new = new[: new.index(tokenizer.eod)]
    return tokenizer.detokenize([*prompt, *new])


def megatron() -> MegatronWeights:
    """Megatron's names of the weights."""
    from megajax.models.retro.retro_megatron import MEGATRON

    return MEGATRON


RETRO = Family(
    name="retro",
    config_type=RetroConfig,
    default=DEFAULT,
    presets=PRESETS,
    build_model=build_model,
    config_of=config_of,
    loss=loss,
    example_inputs=example_inputs,
    fit=fit,
    datasets=retro_data.datasets,
    batch_axes={"context_tokens": ("batch", None, None, None)},
    flops=flops,
    epilogue=epilogue,
    adds_up_apart=("batch",),
    megatron=megatron,
)
