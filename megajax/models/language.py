"""What the programs do with a language model that reads plain text: its data, its baseline, its sample."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from megajax.config import Config, ConfigError, TrainConfig

if TYPE_CHECKING:
    import jax
    from flax import linen as nn

    from megajax.config import TransformerConfig
    from megajax.data.build import Datasets, Sizes
    from megajax.data.tokenizers import Tokenizer
    from megajax.inference.generate import Sampling
    from megajax.models.family import Finished
    from megajax.models.request import Asked, Request


def fit(config: Config, tokenizer: Tokenizer) -> Config:
    """The config with the vocabulary that the tokenizer needs, and room for the sequences and the sample."""
    config = dataclasses.replace(config, model=fit_positions(config, fit_vocabulary(config, tokenizer)))
    prompt_tokens(config, tokenizer)
    return config


def fit_vocabulary(config: Config, tokenizer: Tokenizer) -> TransformerConfig:
    """The model's config with the tokenizer's vocabulary, unless a larger one is given."""
    given = config.model.vocab_size
    if given is not None and given < tokenizer.vocab_size:
        raise ConfigError(
            f"vocab_size={given} is less than the {tokenizer.vocab_size} ids of tokenizer={config.data.tokenizer!r};"
            " raise it or leave it out"
        )
    return config.model.replace(vocab_size=given or tokenizer.vocab_size)


def fit_positions(config: Config, model: TransformerConfig) -> TransformerConfig:
    """`model` with as many learned positions as the sequences have, unless more are given."""
    longest = model.max_sequence_length
    if model.position_embedding_type == "learned_absolute" and longest is None:
        longest = config.data.seq_length
    if longest is not None and config.data.seq_length > longest:
        raise ConfigError(
            f"seq_length={config.data.seq_length} exceeds max_sequence_length={longest}; change one of them"
        )
    return model.replace(max_sequence_length=longest)


def datasets(config: Config, tokenizer: Tokenizer, sizes: Sizes) -> Datasets:
    """Samples of consecutive tokens, in Megatron's order."""
    from megajax.data.build import build_datasets

    return build_datasets(
        config.data,
        tokenizer,
        train_samples=sizes.train,
        validation_samples=sizes.validation,
        test_samples=sizes.test,
        seed=config.train.seed,
    )


def flops(config: TransformerConfig, *, batch_size: int, seq_length: int) -> int:
    """Model FLOPs of a training step; see `megajax.training.flops`."""
    from megajax.training.flops import model_flops

    return model_flops(config, batch_size=batch_size, seq_length=seq_length)


def baseline(config: Config, datasets: Datasets) -> tuple[str, float]:
    """Nats per token of the best model that ignores context, on the training data."""
    from megajax.data.sources import unigram_entropy

    assert config.model.vocab_size is not None
    frequencies = datasets.train.token_frequencies(config.model.vocab_size)
    return "unigram entropy of the data", unigram_entropy(frequencies)


def epilogue(finished: Finished) -> Iterable[str]:
    """The entropy that the loss has to beat, and a sample of text."""
    yield "{} {:.4f}".format(*baseline(finished.config, finished.datasets))
    if finished.config.train.sample_tokens:
        yield f"\nsample:\n{sample_text(finished)}\n"


def prompt_tokens(config: Config, tokenizer: Tokenizer) -> list[int]:
    """The ids that the sample at the end of a run starts from; `eod` alone for an empty prompt.

    Raises:
      ConfigError: the prompt fills the sequence, or the tokenizer cannot read it.
    """
    prompt = config.train.sample_prompt
    try:
        ids = tokenizer.tokenize(prompt)
    except ConfigError as error:
        if prompt != TrainConfig.sample_prompt:
            raise ConfigError(f"sample_prompt={prompt!r}: {error}") from error
        ids = []  # the default is English, which is no text to a tokenizer of numbers
    room = config.data.seq_length - max(len(ids), 1)
    if config.train.sample_tokens and room < 1:
        raise ConfigError(
            f"sample_prompt={prompt!r} has {len(ids)} tokens and leaves no room in seq_length="
            f"{config.data.seq_length}; shorten it, or set sample_tokens=0"
        )
    return ids or [tokenizer.eod]


def prompt(config: TransformerConfig, requests: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Prompts that fill a cache."""
    import jax

    del config
    return {"tokens": jax.ShapeDtypeStruct((requests, length), "int32")}


def ask(config: TransformerConfig, tokenizer: Tokenizer, request: Request) -> Asked:
    """A text to continue; the end of a document in the place of an empty one."""
    import numpy as np

    from megajax.models.request import Asked

    del config
    refuse_images(request)
    ids = request.tokenize(request.text) or [tokenizer.eod]
    tokens = np.array([ids], np.int32)
    return Asked({"tokens": tokens}, tokenizer.eod, lambda new: tokenizer.detokenize([*ids, *new]))


def refuse_images(request: Request) -> None:
    """Raises ConfigError where there are some."""
    if request.images:
        raise ConfigError("--image: this model reads no images; drop it")


def write(
    model: nn.Module, params: Any, prompt: Sequence[int], *, num_tokens: int, sampling: Sampling, key: jax.Array
) -> list[int]:
    """The `num_tokens` ids that the model continues a prompt of at least one id with."""
    import jax.numpy as jnp
    import numpy as np

    from megajax.inference.generate import generate

    prompt_BP = jnp.asarray([prompt], jnp.int32)
    return np.asarray(generate(model, params, prompt_BP, num_tokens=num_tokens, sampling=sampling, key=key)[0]).tolist()


def sample_text(finished: Finished) -> str:
    """The prompt and its continuation by the model."""
    import jax

    from megajax.inference.generate import Sampling

    config, tokenizer = finished.config, finished.tokenizer
    prompt = prompt_tokens(config, tokenizer)
    new = write(
        finished.model,
        finished.params,
        prompt,
        num_tokens=min(config.train.sample_tokens, config.data.seq_length - len(prompt)),
        sampling=Sampling(temperature=0.6, top_p=0.95),
        key=jax.random.key(config.train.seed),
    )
    if tokenizer.eod in new:
        new = new[: new.index(tokenizer.eod)]
    return tokenizer.detokenize([*prompt, *new])
