"""The registry record of LLaVA."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from megajax.config import Config, ConfigError, DataConfig, OptimizerConfig, TrainConfig
from megajax.models import language
from megajax.models.family import Family, Finished, dropout_from
from megajax.models.gpt.gpt_family import GPT
from megajax.models.mamba import mamba_family
from megajax.models.multimodal import llava_data
from megajax.models.multimodal.llava_config import LanguageModelType, LLaVAConfig
from megajax.models.multimodal.llava_presets import PRESETS
from megajax.models.vision import vision_data
from megajax.models.vision.vision_flops import tower_flops
from megajax.ssm.mamba_config import MambaConfig

if TYPE_CHECKING:
    import jax
    from flax import linen as nn

    from megajax.backends import BackendSpecProvider
    from megajax.data.build import Datasets
    from megajax.data.tokenizers import Tokenizer
    from megajax.interop.hf_architecture import Architecture
    from megajax.models.family import Batch, MegatronWeights
    from megajax.ops.cross_entropy import FusedLoss
    from megajax.parallel.pipeline_pieces import Pieces
    from megajax.transformer.stack import Segment

LANGUAGE_FAMILIES: Mapping[LanguageModelType, Family] = {"gpt": GPT, "mamba": mamba_family.HYBRIDS}

DEFAULT = Config(
    model_family="llava",
    model=LLaVAConfig(
        num_layers=2,
        hidden_size=96,
        num_attention_heads=4,
        ffn_hidden_size=192,
        make_vocab_size_divisible_by=128,
        position_embedding_type="rope",
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func="silu",
        add_bias_linear=False,
        init_method_std=0.1,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        img_h=8,
        img_w=8,
        patch_dim=4,
        vision_num_layers=2,
        vision_hidden_size=96,
        vision_num_attention_heads=4,
        vision_ffn_hidden_size=192,
        drop_vision_class_token=True,
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
    train=TrainConfig(train_iters=500, micro_batch_size=32, eval_iters=4),
)


def build_model(config: LLaVAConfig, backend: BackendSpecProvider) -> nn.Module:
    """A `LLaVAModel` of layers from `backend`."""
    from megajax.models.multimodal.llava_model import LLaVAModel

    return LLaVAModel(config, backend=backend)


def loss(
    model: nn.Module, params: Any, batch: Batch, weights: jax.Array, *, dropout_key: jax.Array | None
) -> FusedLoss:
    """Cross entropy of the text; frozen parts have no gradient. See `megajax.models.family.LossFn`."""
    return model.apply(  # type: ignore[return-value]
        {"params": _frozen(model, params)},
        batch["images"],
        batch["tokens"],
        batch["labels"],
        weights,
        segment_ids=batch.get("segment_ids"),
        num_image_tiles=batch.get("num_image_tiles"),
        **dropout_from(dropout_key),
        method="loss_sum",
    )


def _frozen(model: nn.Module, params: Any) -> Any:
    """The parameters, or some of them; those that the config freezes have no gradient."""
    import jax

    names = model.config.frozen_parameters  # pyright: ignore[reportAttributeAccessIssue]
    return {name: jax.lax.stop_gradient(tree) if name in names else tree for name, tree in params.items()}


def _text(batch: Batch) -> dict[str, jax.Array]:
    names = ("tokens", "segment_ids", "num_image_tiles")
    return {name: batch[name] for name in names if name in batch}


def pipeline_pieces(model: nn.Module) -> Pieces:
    """Images and embedding, the language model's layers, loss; see `megajax.models.family.Family.pipeline_pieces`."""
    from megajax.parallel.pipeline_pieces import Pieces

    def embed(shared: Any, batch: Batch, key: jax.Array | None) -> Any:
        arguments = (batch["images"], _text(batch), batch["loss_mask"].shape[1])
        return model.apply({"params": _frozen(model, shared)}, *arguments, method="embed", **dropout_from(key))

    def layers(params: Any, rows: Any, x: jax.Array, batch: Batch, weights: jax.Array, key: jax.Array | None) -> Any:
        arguments = (x, rows, batch["images"], _text(batch), weights)
        return model.apply({"params": _frozen(model, params)}, *arguments, method="run_layers", **dropout_from(key))

    def loss(shared: Any, x: jax.Array, batch: Batch, weights: jax.Array) -> Any:
        arguments = (x, batch["images"], _text(batch), batch["labels"], weights)
        return model.apply({"params": _frozen(model, shared)}, *arguments, method="loss_sum_of_stream")

    return Pieces(embed, (layers,), loss)


def layer_segments(model: nn.Module) -> Mapping[tuple[str, ...], tuple[Segment, ...]]:
    """How the language model's layers are stacked."""
    from megajax.models.multimodal.llava_model import LLaVAModel
    from megajax.transformer.block import stack_layout

    assert isinstance(model, LLaVAModel)
    reader: Any = model.build_language_model()
    return {("language_model", "decoder"): stack_layout(reader.resolved_config, reader.layer_specs)}


def fit(config: Config, tokenizer: Tokenizer) -> Config:
    """The config with the vocabulary and the positions that the questions need."""
    model = config.model
    assert isinstance(model, LLaVAConfig)
    vision_data.refuse_text(config)
    frozen = model.frozen_parameters
    if len(frozen) == 3:
        raise ConfigError(f"freeze_{', freeze_'.join(frozen)}: nothing is left to train; drop one")
    if isinstance(text := model.language_config, MambaConfig):
        mamba_family.check(text, config.parallel)
    config = dataclasses.replace(config, model=language.fit_vocabulary(config, tokenizer))
    return dataclasses.replace(config, model=language.fit_positions(config, config.model))


def example_inputs(config: LLaVAConfig, batch: int, seq_length: int) -> tuple[Any, ...]:
    """Images and tokens to initialise with."""
    import jax.numpy as jnp

    images = jnp.zeros((batch, config.vision_num_channels, config.img_h, config.img_w))
    return images, jnp.zeros((batch, seq_length), jnp.int32)


def prompt(config: LLaVAConfig, requests: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Texts with an image each, which fill a cache."""
    import jax

    image = 0 if config.image_placeholders == "each" else config.img_seq_len - 1
    if length <= image + 1:
        raise ConfigError(f"a cache of {length} tokens has no room for an image, which takes {image + 1}; raise it")
    pixels = (requests, 1, config.vision_num_channels, config.img_h, config.img_w)
    tokens = jax.ShapeDtypeStruct((requests, length - image), "int32")
    return {"images": jax.ShapeDtypeStruct(pixels, "float32"), "tokens": tokens}


def flops(config: LLaVAConfig, *, batch_size: int, seq_length: int) -> int:
    """Model FLOPs of a training step with one tile a sample; seq_length: what the language model sees."""
    tower, projection = config.vision_config, config.projection_config
    used = config.vision_layers_used
    of_images = tower_flops(tower, tower.num_image_tokens, num_layers=None if used is None else max(used))
    of_images += 6 * tower.num_patches * tower.patch_features * tower.hidden_size
    width = tower.hidden_size * len(used or (0,)) * (4 if config.pixel_shuffle else 1)
    assert projection.ffn_hidden_size is not None
    if config.vision_projection_type == "mlp":
        width = projection.ffn_hidden_size * (width * (2 if projection.gated_linear_unit else 1) + config.hidden_size)
    else:
        width *= config.hidden_size
    of_images += 6 * config.img_seq_len * width
    of_text = LANGUAGE_FAMILIES[config.language_model_type].flops
    return batch_size * of_images + of_text(config.language_config, batch_size=batch_size, seq_length=seq_length)


def baseline(config: Config, datasets: Datasets) -> tuple[str, float]:
    """What a model loses that knows the answers but does not look."""
    del config, datasets
    tokens = sum(len(word) + 1 for word in vision_data.DIGIT_WORDS) / len(vision_data.DIGIT_WORDS)
    return "guessing a digit, spelled in bytes", math.log(len(vision_data.DIGIT_WORDS)) / tokens


def epilogue(finished: Finished) -> Iterable[str]:
    """How many digits never seen before are read right, to the letter."""
    import jax
    import numpy as np

    from megajax.models.multimodal.llava_model import LLaVAModel

    config, model = finished.config, finished.model
    assert isinstance(config.model, LLaVAConfig) and isinstance(model, LLaVAModel)
    slots = config.data.seq_length
    words = vision_data.DIGIT_WORDS
    texts = [llava_data.question_and_answer(config.model, finished.tokenizer, word, slots) for word in words]
    digits = vision_data.load_digits().test
    images = vision_data.at_size(digits.images, config.model.img_h, config.model.img_w)[:, None]
    tokens, labels, masks = (np.stack([text[i] for text in texts])[digits.labels] for i in range(3))

    @jax.jit
    def chosen(params: Any) -> Any:
        # Greedy decoding gives just the answer if, and only if, each of its tokens is the likeliest after the others.
        logits = model.apply({"params": params}, images, tokens, sequence_length=slots)
        return logits.argmax(axis=-1)  # type: ignore[union-attr]

    right = np.asarray(chosen(finished.params)) == _shifted_labels(labels, masks.shape[1])
    exact = np.mean(np.all(right | (masks == 0), axis=1))
    question = llava_data.QUESTION.strip()
    yield f"exact answers to {question!r}: {exact:.1%} of {len(images)} held-out digits; chance is 10%"


def _shifted_labels(labels: Any, slots: int) -> Any:
    """labels [B, T], whose images all stand in front, as what the last slots of [B, slots] predict."""
    import numpy as np

    return np.pad(labels, ((0, 0), (slots - labels.shape[1], 0)), mode="edge")


def hf() -> tuple[Architecture, ...]:
    """LLaVA 1.5 and its like."""
    from megajax.models.multimodal.llava_hf import LLAVA_HF

    return (LLAVA_HF,)


def megatron() -> MegatronWeights:
    """Megatron's names of the weights."""
    from megajax.models.multimodal.llava_megatron import MEGATRON

    return MEGATRON


LLAVA = Family(
    name="llava",
    config_type=LLaVAConfig,
    default=DEFAULT,
    presets=PRESETS,
    build_model=build_model,
    loss=loss,
    example_inputs=example_inputs,
    fit=fit,
    datasets=llava_data.samples,
    default_data="scikit-learn's handwritten digits, with questions",
    batch_axes={
        "images": ("batch", None, None, None, None),
        "tokens": ("batch", None),
        "labels": ("batch", None),
        "segment_ids": ("batch", None),
        "num_image_tiles": ("batch", None),
    },
    flops=flops,
    baseline=baseline,
    epilogue=epilogue,
    ask=llava_data.ask,
    prompt=prompt,
    adds_up_apart=("batch", "seq"),
    pipeline_pieces=pipeline_pieces,
    layer_segments=layer_segments,
    hf=hf,
    megatron=megatron,
)
