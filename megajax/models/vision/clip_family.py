"""The registry record of CLIP."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from megajax.config import Config, ConfigError, DataConfig, OptimizerConfig, TrainConfig
from megajax.models import language
from megajax.models.family import Family, Finished, dropout_from
from megajax.models.vision import vision_data
from megajax.models.vision.clip_config import CLIPConfig
from megajax.models.vision.clip_presets import PRESETS
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
    model_family="clip",
    model=CLIPConfig(
        num_layers=2,
        hidden_size=96,
        num_attention_heads=4,
        ffn_hidden_size=192,
        img_h=8,
        img_w=8,
        patch_dim=4,
        ln_pre=True,
        ln_post="pooled",
        pooler="class_token",
        activation_func="quick_gelu",
        init_method_std=0.1,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        text_num_layers=2,
        projection_dim=64,
        make_vocab_size_divisible_by=128,
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
    data=DataConfig(seq_length=32),
    train=TrainConfig(train_iters=400, micro_batch_size=64, eval_iters=2),
)


def build_model(config: CLIPConfig, backend: BackendSpecProvider) -> nn.Module:
    """Both towers, or one alone, projected or not, as the config says; or a classifier of images."""
    from megajax.models.vision.clip_model import (
        CLIPModel,
        CLIPTextModelWithProjection,
        CLIPTextTransformer,
        CLIPVisionModelWithProjection,
    )
    from megajax.models.vision.clip_vit_model import CLIPVisionTransformer
    from megajax.models.vision.image_classifier import ImageClassifier

    if config.text_only:
        alone = CLIPTextTransformer if config.projection_dim is None else CLIPTextModelWithProjection
        return alone(config, backend)
    if config.num_classes is not None:
        return ImageClassifier(config, backend)
    if config.text_num_layers is not None:
        return CLIPModel(config, backend)
    if config.projection_dim is not None:
        return CLIPVisionModelWithProjection(config, backend)
    return CLIPVisionTransformer(config, backend=backend)


def loss(
    model: nn.Module, params: Any, batch: Batch, weights: jax.Array, *, dropout_key: jax.Array | None
) -> FusedLoss:
    """The contrastive loss over a microbatch of all data-parallel shards together; see `LossFn`."""
    return model.apply(  # type: ignore[return-value]
        {"params": params},
        batch["images"],
        batch["tokens"],
        weights,
        **dropout_from(dropout_key),
        method="loss_sum",
    )


def fit(config: Config, tokenizer: Tokenizer) -> Config:
    """The config with the vocabulary and the positions that the captions need."""
    model = config.model
    assert isinstance(model, CLIPConfig)
    if model.text_num_layers is None:
        raise ConfigError("text_num_layers=None leaves nothing to compare images with; give the text tower's layers")
    if model.text_only:
        raise ConfigError("text_only=True leaves nothing to compare texts with; drop it")
    vision_data.refuse_text(config)
    refuse_context_parallelism(config)
    config = dataclasses.replace(config, model=language.fit_vocabulary(config, tokenizer))
    config = dataclasses.replace(config, model=language.fit_positions(config, config.model))
    if model.text_pooling == "highest" and tokenizer.eod != tokenizer.vocab_size - 1:
        model = config.model.replace(text_pooling="eos", eos_token_id=tokenizer.eod)  # type: ignore[call-arg]
        config = dataclasses.replace(config, model=model)
    return config


def refuse_context_parallelism(config: Config) -> None:
    """Raises ConfigError: images are not divided."""
    size = config.parallel.context_parallel_size
    if size > 1:
        raise ConfigError(
            f"context_parallel_size={size}: --model {config.model_family} does not divide its sequences; set it to 1"
        )


def example_inputs(config: CLIPConfig, batch: int, seq_length: int) -> tuple[Any, ...]:
    """Images, and texts if there is a tower for them, to initialise with."""
    import jax.numpy as jnp

    images = jnp.zeros((batch, config.num_channels, config.img_h, config.img_w))
    texts = jnp.zeros((batch, seq_length), jnp.int32)
    if config.text_only:
        return (texts,)
    return (images,) if config.text_num_layers is None else (images, texts)


def flops(config: CLIPConfig, *, batch_size: int, seq_length: int) -> int:
    """Model FLOPs of a training step: both towers, the projections, the comparison of all with all."""
    per_pair = tower_flops(config, config.num_image_tokens) + config.patch_features * config.hidden_size * (
        6 * config.num_patches
    )
    E = config.embedding_dim
    if config.projection_dim is not None:
        per_pair += 6 * E * config.hidden_size
    if config.text_num_layers is not None:
        text = config.text_config
        per_pair += tower_flops(text, seq_length, causal=config.text_causal)
        per_pair += 6 * E * (text.hidden_size + batch_size)
    return batch_size * per_pair


def baseline(config: Config, datasets: Datasets) -> tuple[str, float] | None:
    """What a model that cannot tell pairs apart loses."""
    del datasets
    assert isinstance(config.model, CLIPConfig)
    if config.model.contrastive_loss == "sigmoid":
        return None
    size = config.train.global_batch_size or config.train.micro_batch_size
    return "chance", math.log(min(size, config.train.micro_batch_size))


def epilogue(finished: Finished) -> Iterable[str]:
    """Zero-shot accuracy: the caption that each digit never seen before is nearest to."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    config, length = finished.config, finished.config.data.seq_length
    assert isinstance(config.model, CLIPConfig)
    prompts = [vision_data.CAPTIONS[0].format(word) for word in vision_data.DIGIT_WORDS]
    texts = np.stack([vision_data.caption_tokens(finished.tokenizer, prompt, length) for prompt in prompts])
    digits = vision_data.load_digits().test
    images = vision_data.at_size(digits.images, config.model.img_h, config.model.img_w)
    output = jax.jit(finished.model.apply)({"params": finished.params}, images, texts)
    guesses = np.asarray(jnp.argmax(output.logits_per_image, axis=1))  # pyright: ignore
    accuracy = np.mean(guesses == digits.labels)
    yield f"zero-shot accuracy {accuracy:.1%} on {len(guesses)} held-out digits, by captions; chance is 10%"
    for digit, guess in list(zip(digits.labels, guesses, strict=True))[:4]:
        yield f'a "{digit}" is nearest to "{prompts[guess]}"'


def hf() -> tuple[Architecture, ...]:
    """CLIP, SigLIP and ViT."""
    from megajax.models.vision.clip_hf import ARCHITECTURES
    from megajax.models.vision.clip_text_hf import TEXT_TOWERS
    from megajax.models.vision.vit_hf import VIT, VIT_CLASSIFIER

    return (*ARCHITECTURES, *TEXT_TOWERS, VIT, VIT_CLASSIFIER)


def megatron() -> MegatronWeights:
    """Megatron's names of the image tower's weights."""
    from megajax.models.vision.clip_megatron import MEGATRON

    return MEGATRON


CLIP = Family(
    name="clip",
    config_type=CLIPConfig,
    default=DEFAULT,
    presets=PRESETS,
    build_model=build_model,
    loss=loss,
    example_inputs=example_inputs,
    fit=fit,
    datasets=vision_data.caption_samples,
    default_data="scikit-learn's handwritten digits, with captions",
    batch_axes={"images": ("batch", None, None, None), "loss_mask": ("batch", None)},
    flops=flops,
    baseline=baseline,
    epilogue=epilogue,
    adds_up_apart=("batch",),
    hf=hf,
    megatron=megatron,
)
