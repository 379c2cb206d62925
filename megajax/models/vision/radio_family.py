"""The registry record of RADIO."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from megajax.config import Config, ConfigError, DataConfig, OptimizerConfig, TrainConfig
from megajax.models.family import Family, Finished, dropout_from
from megajax.models.vision import vision_data
from megajax.models.vision.clip_family import refuse_context_parallelism
from megajax.models.vision.radio_config import RADIOConfig
from megajax.models.vision.radio_presets import PRESETS
from megajax.models.vision.vision_flops import tower_flops

if TYPE_CHECKING:
    import jax
    from flax import linen as nn

    from megajax.backends import BackendSpecProvider
    from megajax.data.build import Datasets
    from megajax.data.tokenizers import Tokenizer
    from megajax.interop.hf_architecture import Architecture
    from megajax.models.family import Batch, MegatronWeights
    from megajax.ops.cross_entropy import FusedLoss

DEFAULT = Config(
    model_family="radio",
    model=RADIOConfig(
        num_layers=3,
        hidden_size=96,
        num_attention_heads=4,
        ffn_hidden_size=192,
        img_h=8,
        img_w=8,
        patch_dim=4,
        max_img_h=16,
        max_img_w=16,
        class_token_len=2,
        init_method_std=0.1,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        num_classes=10,
    ),
    optimizer=OptimizerConfig(
        optimizer="adam",
        lr=2e-3,
        min_lr=1e-5,
        lr_decay_style="cosine",
        lr_warmup_fraction=0.1,
        adam_beta2=0.98,
        weight_decay=0.1,
    ),
    data=DataConfig(seq_length=6),
    train=TrainConfig(train_iters=500, micro_batch_size=64, eval_iters=2),
)
"""RADIO is distilled from teachers whose weights nobody can carry along; the default trains the same tower, with its
cropped position embedding, to say which digit an image shows, by a linear head on its summary."""


def build_model(config: RADIOConfig, backend: BackendSpecProvider) -> nn.Module:
    """A `RADIOModel` of layers from `backend`."""
    from megajax.models.vision.radio import RADIOModel

    return RADIOModel(config, backend=backend)


def loss(
    model: nn.Module, params: Any, batch: Batch, weights: jax.Array, *, dropout_key: jax.Array | None
) -> FusedLoss:
    """Cross entropy of the class; see `megajax.models.family.LossFn`."""
    import jax
    import jax.numpy as jnp

    from megajax.ops.cross_entropy import CrossEntropyOptions, FusedLoss, cross_entropy

    logits = model.apply(
        {"params": params},
        batch["images"],
        **dropout_from(dropout_key),
        method="classify",
    )
    config = model.config  # pyright: ignore[reportAttributeAccessIssue]
    options = CrossEntropyOptions(config.num_classes, config.label_smoothing, config.z_loss_coeff)
    losses = cross_entropy(logits[:, None], batch["labels"], options)  # pyright: ignore
    return FusedLoss(jnp.sum(losses * weights), jax.lax.stop_gradient(losses))


def fit(config: Config, tokenizer: Tokenizer) -> Config:
    """The config with the length that images have as sequences, for the sake of tokens per second."""
    del tokenizer
    model = config.model
    assert isinstance(model, RADIOConfig)
    vision_data.refuse_text(config)
    refuse_context_parallelism(config)
    classes = len(vision_data.DIGIT_WORDS)
    if model.num_classes is not None and model.num_classes < classes:
        raise ConfigError(f"num_classes={model.num_classes} is less than the {classes} digits; raise it")
    model = model.replace(num_classes=model.num_classes or classes)
    tokens, tp = model.num_image_tokens, config.parallel.tensor_model_parallel_size
    if config.parallel.sequence_parallel and tokens % tp:
        raise ConfigError(
            f"sequence_parallel=True: the {tokens} tokens of an image are not divisible by"
            f" tensor_model_parallel_size={tp}; change class_token_len={model.class_token_len}, or drop the flag"
        )
    return dataclasses.replace(config, model=model, data=dataclasses.replace(config.data, seq_length=tokens))


def example_inputs(config: RADIOConfig, batch: int, seq_length: int) -> tuple[Any, ...]:
    """Images to initialise with."""
    import jax.numpy as jnp

    del seq_length
    return (jnp.zeros((batch, config.num_channels, config.img_h, config.img_w)),)


def flops(config: RADIOConfig, *, batch_size: int, seq_length: int) -> int:
    """Model FLOPs of a training step; seq_length: tokens of an image, class tokens included."""
    patches = seq_length - config.class_token_len
    head = 6 * (config.num_classes or 0) * len(config.summary_idxs) * config.hidden_size
    embedding = 6 * patches * config.patch_features * config.hidden_size
    return batch_size * (tower_flops(config, seq_length) + embedding + head)


def baseline(config: Config, datasets: Datasets) -> tuple[str, float]:
    """What a model loses that cannot tell digits apart."""
    del config, datasets
    return "chance", math.log(len(vision_data.DIGIT_WORDS))


def epilogue(finished: Finished) -> Iterable[str]:
    """Accuracy on digits never seen before, also at another size than that of training."""
    import jax
    import numpy as np

    config = finished.config.model
    assert isinstance(config, RADIOConfig)
    digits = vision_data.load_digits().test
    images = vision_data.at_size(digits.images, config.img_h, config.img_w)
    logits = jax.jit(finished.model.apply, static_argnames="method")(
        {"params": finished.params}, images, method="classify"
    )
    accuracy = np.mean(np.argmax(np.asarray(logits), axis=1) == digits.labels)
    yield f"accuracy {accuracy:.1%} on {len(digits.labels)} held-out digits; chance is 10%"


def hf() -> tuple[Architecture, ...]:
    """RADIO."""
    from megajax.models.vision.radio_hf import RADIO_HF

    return (RADIO_HF,)


def megatron() -> MegatronWeights:
    """Megatron's names of the weights."""
    from megajax.models.vision.radio_megatron import MEGATRON

    return MEGATRON


RADIO = Family(
    name="radio",
    config_type=RADIOConfig,
    default=DEFAULT,
    presets=PRESETS,
    build_model=build_model,
    loss=loss,
    example_inputs=example_inputs,
    fit=fit,
    datasets=vision_data.class_samples,
    default_data="scikit-learn's handwritten digits",
    batch_axes={
        "images": ("batch", None, None, None),
        "labels": ("batch", None),
        "loss_mask": ("batch", None),
    },
    flops=flops,
    baseline=baseline,
    epilogue=epilogue,
    adds_up_apart=("batch",),
    hf=hf,
    megatron=megatron,
)
