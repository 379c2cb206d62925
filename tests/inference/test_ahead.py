"""Steps of generation on a mesh, layers apart, write what one device writes, layers stacked."""

# SPDX-License-Identifier: Apache-2.0
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn

from megajax import cli
from megajax.config import Config
from megajax.data.tokenizers import build_tokenizer
from megajax.inference.ahead import build_inference_program
from megajax.inference.generate import Sampling, generate, init_cache
from megajax.inference.layers import apart
from megajax.models.family import Family
from megajax.models.multimodal.llava_model import DEFAULT_IMAGE_TOKEN_INDEX
from megajax.models.registry import FAMILIES
from megajax.training.setup import fit_config

SIZES = ["--num-layers", "4", "--hidden-size", "64", "--num-attention-heads", "4", "--seq-length", "32"]
SPREAD = ["--init-method-std", "0.3"]
GREEDY = Sampling(temperature=0)
CASES = {
    "dense": ("gpt", "--num-query-groups 2 --tp 2"),
    "latents and experts": (
        "gpt",
        "--multi-latent-attention --q-lora-rank 16 --kv-lora-rank 16 --qk-head-dim 16 --qk-pos-emb-head-dim 8"
        " --v-head-dim 16 --num-moe-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 32 --ep 2 --tp 2",
    ),
    "hybrid": (
        "mamba",
        "--hybrid-override-pattern M*M- --mamba-num-heads 8 --mamba-head-dim 16 --mamba-num-groups 2 --tp 2",
    ),
    "encoder and decoder": ("t5", "--tp 2"),
    "images": ("llava", "--tp 2 --vision-num-layers 1"),
}


def _config(family: str, flags: str) -> Config:
    words = ["--model", family, *SIZES, *SPREAD, *flags.split()]
    config = cli.parse(words, prog="test", families=FAMILIES)
    return fit_config(config, FAMILIES[family], build_tokenizer("byte"))


def _prompt(config: Config, family: Family, requests: int, length: int) -> dict[str, Any]:
    """Random texts, the second half of the last one hidden where texts have masks; an image at the start of each."""
    assert family.prompt is not None
    random, arrays = np.random.default_rng(0), {}
    for name, like in family.prompt(config.model, requests, length).items():
        kind = np.dtype(like.dtype).kind
        values: Any = random.integers(1, 96, like.shape) if kind == "i" else random.normal(size=like.shape)
        arrays[name] = np.ones(like.shape, bool) if kind == "b" else values.astype(like.dtype)
        if kind == "b":
            arrays[name][-1, length // 2 :] = False
    if "images" in arrays:
        arrays["tokens"][:, 0] = DEFAULT_IMAGE_TOKEN_INDEX
    return arrays


@pytest.mark.parametrize("case", CASES)
def test_a_mesh_writes_what_one_device_writes(case: str) -> None:
    family, flags = CASES[case]
    B, P, new = 8, 5, 6
    config = _config(family, flags)
    prompt = _prompt(config, FAMILIES[family], B, P)
    program: Any = build_inference_program(
        config, FAMILIES[family], inference_max_requests=B, inference_max_seq_length=P + new, sampling=GREEDY
    )
    variables = program.model.init(jax.random.key(1), prompt, P + new, method="reserve")
    params = nn.unbox(variables)["params"]
    expected = generate(program.model, params, prompt, num_tokens=new, sampling=GREEDY)

    def placed(tree: Any, like: Any) -> Any:
        return jax.tree.map(lambda array, shape: jax.device_put(np.asarray(array), shape.sharding), tree, like)

    segments: Any = FAMILIES[family].layer_segments
    params = apart(params, segments(program.model))
    empty = init_cache(program.model, params, prompt, length=P + new)
    params, cache = placed(params, program.params), placed(empty, program.cache)
    key = jax.random.key(0)
    with jax.set_mesh(program.mesh), nn.logical_axis_rules(tuple(program.rules.table.items())):
        state = program.prefill(params, cache, prompt, key)
        tokens = [np.asarray(state.token)]
        for _ in range(1, new):
            before = jax.tree.leaves(state.cache)
            state = program.decode(params, state, key)
            assert all(array.is_deleted() for array in before), "the cache is donated"
            tokens.append(np.asarray(state.token))
    assert int(state.position) == program.model.prompt_slots(prompt) + new - 1
    np.testing.assert_array_equal(np.stack(tokens, axis=1), expected)
