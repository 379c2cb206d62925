"""What a token of LLaVA may see: what lies before it in its own document, images and all, and nothing else."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from megajax.models.multimodal.llava_config import LLaVAConfig
from megajax.models.multimodal.llava_model import LLaVAModel
from megajax.models.registry import FAMILIES

VOCAB, IMAGE, PATCHES = 60, -200, 4
CONFIG = LLaVAConfig(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=48,
    vocab_size=VOCAB,
    init_method_std=0.3,
    position_embedding_type="rope",
    normalization="RMSNorm",
    add_bias_linear=False,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    img_h=8,
    img_w=8,
    patch_dim=4,
    vision_num_layers=1,
    vision_hidden_size=16,
    vision_num_attention_heads=4,
    vision_ffn_hidden_size=32,
    drop_vision_class_token=True,
    image_token_index=IMAGE,
)
MODEL = LLaVAModel(CONFIG)


@functools.cache
def params() -> Any:
    example = FAMILIES["llava"].example_inputs(CONFIG, 1, 8)
    return nn.unbox(jax.jit(MODEL.init)(jax.random.key(0), *example))["params"]


def texts() -> tuple[np.ndarray, np.ndarray]:
    """Two images, and a text with one after two words and one after six."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(VOCAB, size=(1, 10)).astype(np.int32)
    tokens[0, 2] = tokens[0, 6] = IMAGE
    return rng.normal(size=(2, 3, 8, 8)).astype(np.float32), tokens


@jax.jit
def logits(images: Any, tokens: Any, segments: Any = None) -> Any:
    length = tokens.shape[1] + len(images) * (PATCHES - 1)
    return MODEL.apply({"params": params()}, images, tokens, segment_ids=segments, sequence_length=length)


def test_a_slot_depends_on_what_lies_before_it_only() -> None:
    images, tokens = texts()
    length = tokens.shape[1] + 2 * (PATCHES - 1)
    second = 6 + PATCHES - 1  # the first slot of the second image

    def seen(images: Any, table: Any) -> Any:
        language = params()["language_model"]
        changed = {**params(), "language_model": {**language, "embedding": {"word_embeddings": {"embedding": table}}}}
        out: Any = MODEL.apply({"params": changed}, images, tokens, sequence_length=length)
        return jnp.abs(out).sum((0, 2))  # of each slot

    table = params()["language_model"]["embedding"]["word_embeddings"]["embedding"]
    of_images = jax.jit(jax.jacrev(seen))(jnp.asarray(images), table)
    reach = np.abs(np.asarray(of_images)).max((2, 3, 4))  # [slots, images]
    assert (reach[:2, 0] == 0).all() and (reach[2:, 0] > 0).all()
    assert (reach[:second, 1] == 0).all() and (reach[second:, 1] > 0).all()


def test_packed_documents_are_as_if_alone() -> None:
    images, tokens = texts()
    segments = np.array([[0] * 4 + [1] * 6], np.int32)
    packed = logits(images, tokens, segments)
    first, second = logits(images[:1], tokens[:, :4]), logits(images[1:], tokens[:, 4:])
    np.testing.assert_allclose(packed, np.concatenate([first, second], axis=1), atol=2e-5, rtol=1e-5)
    assert np.abs(logits(images, tokens) - packed)[:, 4 + PATCHES - 1 :].max() > 0.1, "they would see each other"
