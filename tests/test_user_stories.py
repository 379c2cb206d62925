"""Four ways in which researchers use the package, as they would write them."""

# SPDX-License-Identifier: Apache-2.0
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from megajax.backends import LocalSpecProvider, TESpecProvider
from megajax.config import TransformerConfig
from megajax.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megajax.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from megajax.models.gpt.gpt_layer_specs import get_gpt_layer_spec
from megajax.models.gpt.gpt_model import GPTModel
from megajax.transformer.fused_attention import FusedAttention

CONFIG = TransformerConfig(
    num_layers=2, hidden_size=16, num_attention_heads=4, vocab_size=32, position_embedding_type="rope",
    init_method_std=0.2,
)  # fmt: skip
TOKENS = np.arange(12).reshape(2, 6)

LAYER_SPECS = """
from megajax.models.gpt.gpt_layer_specs import get_gpt_layer_spec

def get_parrot_layer_spec(config, backend):
    return get_gpt_layer_spec(config, backend).replace(mlp=None, pre_mlp_layernorm=None)
"""
MODEL = """
from flax import linen as nn
from megajax.config import TransformerConfig
from megajax.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megajax.models.common.language_module.language_module import language_model_logits, language_model_loss
from megajax.ops.attention import AttentionMask
from megajax.transformer.block import LayerInputs, TransformerBlock
import jax.numpy as jnp

class ParrotModel(nn.Module):
    config: TransformerConfig
    transformer_layer_spec: object

    def setup(self):
        self.embedding = LanguageModelEmbedding(self.config)
        self.decoder = TransformerBlock(self.config, (self.transformer_layer_spec,) * self.config.num_layers)

    def __call__(self, tokens, *, labels=None):
        x = self.embedding(tokens, jnp.arange(tokens.shape[1])[None])
        x = self.decoder(x, LayerInputs(AttentionMask(causal=True)))
        logits = language_model_logits(x, self.embedding.word_embeddings.embedding.T, self.config)
        return logits if labels is None else language_model_loss(logits, labels, self.config)
"""
RECORD = """
import dataclasses
from megajax.models.gpt.gpt_family import GPT
from parrot_layer_specs import get_parrot_layer_spec
from parrot_model import ParrotModel

PARROT = dataclasses.replace(
    GPT, name="parrot", presets={}, build_model=lambda c, b: ParrotModel(c, get_parrot_layer_spec(c, b))
)
"""


def test_a_new_model_is_three_small_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("parrot_layer_specs", LAYER_SPECS), ("parrot_model", MODEL), ("parrot_family", RECORD)):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    family = __import__("parrot_family").PARROT
    model = family.build_model(CONFIG, LocalSpecProvider())
    params = model.init(jax.random.key(0), TOKENS)["params"]
    assert set(params["decoder"]["layers"]) == {"input_layernorm", "self_attention"}

    @jax.jit
    def step(params: Any) -> Any:
        loss, gradients = jax.value_and_grad(lambda p: model.apply({"params": p}, TOKENS, labels=TOKENS).mean())(params)
        return loss, jax.tree.map(lambda p, g: p - 0.3 * g, params, gradients)

    losses = []
    for _ in range(15):
        loss, params = step(params)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("fused", [False, True])
def test_the_backend_is_chosen_in_one_line(fused: bool) -> None:
    backend = TESpecProvider() if fused else LocalSpecProvider()
    spec = get_gpt_layer_spec(CONFIG, backend)
    core = spec.submodules.self_attention.submodules.core_attention
    assert isinstance(core(config=CONFIG), FusedAttention) == fused
    model = GPTModel(CONFIG, transformer_layer_spec=spec)
    loss, _ = model.init_with_output(jax.random.key(0), TOKENS, labels=TOKENS)
    assert jnp.isfinite(loss).all()  # here in plain JAX, for want of a GPU


def test_rotary_embeddings_are_usable_alone() -> None:
    angles = RotaryEmbedding(kv_channels=8, rotary_percent=1.0)(max_seq_len=5)
    np.testing.assert_allclose(angles[3, 0], 3.0)
    scaled, concentration = YarnRotaryEmbedding(kv_channels=8, scaling_factor=4.0)(max_seq_len=5)
    assert scaled.shape == angles.shape == (5, 8)
    assert concentration == pytest.approx(1 + 0.1 * np.log(4.0))


class MeanAttention(nn.Module):
    """Every token sees the mean of the tokens up to it."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x_BSD: Any, **inputs: Any) -> Any:
        del inputs
        return jnp.cumsum(x_BSD, axis=1) / (1 + jnp.arange(x_BSD.shape[1]))[:, None]


class UniformCore(nn.Module):
    """A core attention that ignores the queries."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, q: Any, k: Any, v: Any, *, mask: Any, deterministic: bool = True) -> Any:
        del k, mask, deterministic
        v = jnp.cumsum(v, axis=1) / (1 + jnp.arange(v.shape[1]))[:, None, None]
        return jnp.repeat(v, q.shape[2] // v.shape[2], axis=2)


def test_a_part_is_swapped_in_place() -> None:
    spec = get_gpt_layer_spec(CONFIG, LocalSpecProvider())
    spec.submodules.self_attention = MeanAttention
    model = GPTModel(CONFIG, transformer_layer_spec=spec)
    params = model.init(jax.random.key(0), TOKENS)["params"]
    assert set(params["decoder"]["layers"]) == {"input_layernorm", "pre_mlp_layernorm", "mlp"}
    assert spec.submodules.self_attention is MeanAttention
    assert get_gpt_layer_spec(CONFIG, LocalSpecProvider()).submodules.self_attention is not MeanAttention


def test_a_nested_part_is_swapped_in_a_copy() -> None:
    spec = get_gpt_layer_spec(CONFIG, LocalSpecProvider())
    uniform = spec.replace(**{"self_attention.core_attention": UniformCore})
    assert uniform != spec
    models: list[Any] = [GPTModel(CONFIG, transformer_layer_spec=s) for s in (spec, uniform)]
    variables = models[0].init(jax.random.key(0), TOKENS)
    assert jax.tree.structure(variables) == jax.tree.structure(models[1].init(jax.random.key(0), TOKENS))
    assert not np.allclose(*(model.apply(variables, TOKENS) for model in models))
    with pytest.raises(ValueError, match=r"SelfAttention has no slot 'core'"):
        spec.replace(**{"self_attention.core": UniformCore})
