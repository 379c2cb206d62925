"""Writes tests/golden/megatron_options: what Megatron-Core computes with the options that published cases leave out.

Development only, on a CPU: `pip install torch megatron-core==0.16.1`, then run this file, with the names of the cases
that are to be made anew, or for all with none.
"""

# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["TORCHDYNAMO_DISABLE"] = "1"
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

torch.cuda.current_device = lambda: "cpu"
import megatron.core.fusions.fused_softmax as fused_softmax
import megatron.core.tensor_parallel.random as tp_random
import megatron.core.transformer.dot_product_attention as dpa
from megatron.core import parallel_state, tensor_parallel
from megatron.core.activations import quick_gelu, squared_relu
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs import get_gpt_heterogeneous_layer_spec
from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

FOLDER = Path(__file__).parent / "megatron_options"
FUNCTIONS = {
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
    "squared_relu": squared_relu,
    "quick_gelu": quick_gelu,
}
BASE = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 24,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "use_cpu_initialization": True,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "gated_linear_unit": True,
    "activation_func": "silu",
}
MODEL = {"vocab_size": 32, "max_sequence_length": 16, "position_embedding_type": "rope"}
LAYERNORM = {"normalization": "LayerNorm", "add_bias_linear": True}
UNGATED = {"gated_linear_unit": False, "add_bias_linear": True}
YARN = {
    "yarn_rotary_scaling_factor": 4.0,
    "yarn_original_max_position_embeddings": 32,
    "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0,
    "yarn_correction_range_round_to_int": True,
}
BLOCKS = [
    {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_hidden_size": 24}},
    {"attention": {"no_op": True, "n_heads_in_group": None}, "mlp": {"ffn_hidden_size": 40}},
    {"attention": {"num_query_groups": 4}, "mlp": {"no_op": True, "ffn_mult": None}},
    {"attention": {"replace_with_linear": True, "n_heads_in_group": None}, "mlp": {"ffn_mult": 3.0}},
    {"attention": {"num_query_groups": 1}, "mlp": {"replace_with_linear": True, "ffn_mult": None}},
]
LATENT = {
    "multi_latent_attention": True,
    "num_query_groups": 4,
    "q_lora_rank": 10,
    "kv_lora_rank": 8,
    "qk_head_dim": 6,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 7,
    "rope_type": "rope",
    "rotary_scaling_factor": 1.0,
}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "softmax_off_by_one": ({"softmax_type": "off-by-one"}, {}),
    "softmax_learnable": ({"softmax_type": "learnable"}, {}),
    "learnable_with_window": ({"softmax_type": "learnable", "window_size": [2, 0]}, {}),
    "qk_layernorm_rms": ({"qk_layernorm": True}, {}),
    "qk_layernorm": ({"qk_layernorm": True, **LAYERNORM}, {}),
    "qk_l2_norm": ({}, {"qk_l2_norm": True}),
    "no_rope_every_second": ({"num_layers": 4, "no_rope_freq": 2}, {}),
    "no_rope_list": ({"num_layers": 3, "no_rope_freq": [0, 1, 0]}, {}),
    "window_everywhere": ({"window_size": [3, 0]}, {}),
    "window_skip_every_second": ({"num_layers": 4, "window_size": [2, 0], "window_attn_skip_freq": 2}, {}),
    "output_gate": ({"attention_output_gate": True}, {}),
    "output_gate_bias": ({"attention_output_gate": True, "add_qkv_bias": True, "num_query_groups": 4}, {}),
    "softmax_scale": ({"softmax_scale": 0.2}, {}),
    "query_key_layer_scaling": ({"apply_query_key_layer_scaling": True}, {}),
    "squared_relu": ({"activation_func": "squared_relu", **UNGATED}, {}),
    "relu": ({"activation_func": "relu", **UNGATED}, {}),
    "gelu_exact": ({"activation_func": "gelu", **UNGATED}, {}),
    "gelu_fused": ({"activation_func": "gelu", "bias_activation_fusion": True, **UNGATED}, {}),
    "geglu_exact": ({"activation_func": "gelu"}, {}),
    "geglu_fused": ({"activation_func": "gelu", "bias_activation_fusion": True, "add_bias_linear": True}, {}),
    "swiglu_fused_ignores_clamp": ({"bias_activation_fusion": True, "activation_func_clamp_value": 0.3}, {}),
    "swiglu_clamp": ({"activation_func_clamp_value": 0.3}, {}),
    "quick_geglu_offset_clamp": (
        {"activation_func": "quick_gelu", "glu_linear_offset": 1.0, "activation_func_clamp_value": 0.5},
        {},
    ),
    "qkv_bias_only": ({"add_qkv_bias": True}, {}),
    "rotary_half": ({}, {"rotary_percent": 0.5, "rotary_base": 500}),
    "rotary_interleaved": ({"rotary_interleaved": True}, {}),
    "rotary_interpolation": ({}, {"seq_len_interpolation_factor": 2.5}),
    "rotary_llama3": ({}, {"rope_scaling": True, "rope_scaling_factor": 32.0, "rotary_base": 5e6}),
    "multi_query_wide_heads": ({"num_query_groups": 1, "kv_channels": 12}, {}),
    "fp32_residual": ({"fp32_residual_connection": True}, {}),
    "yarn": ({**YARN, "yarn_mscale": 0.8, "yarn_mscale_all_dim": 0.5}, {"position_embedding_type": "yarn"}),
    "yarn_no_mscale": ({**YARN, "yarn_mscale": None, "yarn_mscale_all_dim": None}, {"position_embedding_type": "yarn"}),
    "yarn_factor_with_rope": ({"yarn_rotary_scaling_factor": 4.0}, {}),
    "no_positions": ({}, {"position_embedding_type": "none"}),
    "learned_positions_tied": (
        LAYERNORM,
        {"position_embedding_type": "learned_absolute", "share_embeddings_and_output_weights": True},
    ),
    "post_layernorm_residual_is_ignored": ({"apply_residual_connection_post_layernorm": True, **LAYERNORM}, {}),
    "latent_half_rotary": (LATENT | {"rotary_percent": 0.5, "rotary_base": 500}, {}),
    "latent_without_qkv_bias": (LATENT | LAYERNORM | {"add_qkv_bias": True, "qk_layernorm": True}, {}),
    "heterogeneous": (
        {"num_layers": 5, "heterogeneous_layers_config_encoded_json": json.dumps({"block_configs": BLOCKS})},
        {},
    ),
}


class LatentCore(dpa.DotProductAttention):
    """The local core, told the size of values, which in latent attention differs from that of keys."""

    def __init__(self, *args: Any, k_channels: Any = None, v_channels: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if v_channels is not None:
            self.hidden_size_per_partition = v_channels * self.config.num_attention_heads


def shims() -> None:
    """Megatron-Core on a CPU, in one process, without Transformer Engine."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()

    class Tracker:
        @staticmethod
        def fork(*_: Any) -> Any:
            return contextlib.nullcontext()

    tracker = lambda: Tracker()  # noqa: E731
    for module in (tp_random, tensor_parallel, dpa.tensor_parallel):
        module.get_cuda_rng_tracker = tracker
    triu = lambda n: torch.triu(torch.ones(n, n), diagonal=1).bool()  # noqa: E731

    def window(sq: int, sk: int, size: tuple[int, int]) -> torch.Tensor:
        m = torch.ones(sq, sk, dtype=torch.bool)
        return ~torch.tril(torch.triu(m, diagonal=sk - sq - size[0]), diagonal=sk - sq + size[1])

    fused_softmax.get_default_causal_mask = triu
    fused_softmax.get_sliding_window_causal_mask = window
    import megatron.core.tensor_parallel.layers as layers

    layers.te_general_gemm = None
    import megatron.core.transformer.multi_latent_attention as mla

    mla.TELinear = mla.TEColumnParallelLinear = type("Absent", (), {})  # None, which it asks `isinstance` about
    reduce = layers.reduce_from_tensor_model_parallel_region
    layers.reduce_from_tensor_model_parallel_region = lambda x, *a, **k: reduce(x, *a, **k).clone()


def build(config: dict[str, Any], model: dict[str, Any]) -> GPTModel:
    declared = HeterogeneousTransformerConfig if "heterogeneous_layers_config_encoded_json" in config else None
    latent = config.get("multi_latent_attention", False)
    declared = declared or (MLATransformerConfig if latent else TransformerConfig)
    attributes = {name: value for name, value in config.items() if name.startswith("yarn_")}
    fields = {name: value for name, value in config.items() if name not in attributes}
    fields["activation_func"] = FUNCTIONS[fields["activation_func"]]
    cfg = declared(**fields)
    for name, value in attributes.items():
        setattr(cfg, name, value)
    arguments = {name: value for name, value in model.items() if name != "qk_l2_norm"}
    if declared is not HeterogeneousTransformerConfig:
        spec = get_gpt_layer_local_spec(
            qk_layernorm=cfg.qk_layernorm,
            multi_latent_attention=latent,
            normalization=cfg.normalization,
            qk_l2_norm=model.get("qk_l2_norm", False),
        )
        if latent:
            spec.submodules.self_attention.submodules.core_attention = LatentCore
    else:
        spec = get_gpt_heterogeneous_layer_spec(cfg, use_te=False)
    return GPTModel(cfg, spec, **arguments)


def random_weights(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """The weights of a case; the test has the same function."""
    rng, weights = np.random.RandomState(7), {}
    for name in sorted(shapes):
        value = rng.standard_normal(shapes[name])
        if len(shapes[name]) == 2:
            value = value * (0.5 if "embedding" in name else shapes[name][1] ** -0.5)
        elif name.endswith("bias"):
            value = 0.2 * value
        elif "norm" in name:
            value = 1 + 0.2 * value
        weights[name] = value.astype(np.float32)
    return weights


def main() -> None:
    """Runs every variant and writes its settings, logits, loss and gradient statistics."""
    shims()
    tokens = (np.arange(20).reshape(2, 10) * 7 + 3) % 32
    labels = (tokens * 5 + 1) % 32
    cases: dict[str, Any] = {}
    outputs: dict[str, Any] = {"tokens": tokens, "labels": labels}
    if sys.argv[1:]:
        cases |= json.loads((FOLDER / "cases.json").read_text())
        outputs |= np.load(FOLDER / "outputs.npz")
    for name in sys.argv[1:] or VARIANTS:
        fields, arguments = VARIANTS[name]
        config, model = BASE | fields, MODEL | arguments
        gpt = build(config, model)
        state = {key: list(v.shape) for key, v in gpt.state_dict().items() if "_extra_state" not in key}
        weights = random_weights(state)
        gpt.load_state_dict({key: torch.tensor(value) for key, value in weights.items()}, strict=False)
        positions = torch.arange(10)[None].expand(2, 10)
        mask = torch.triu(torch.ones(10, 10), diagonal=1).bool()[None, None]
        logits = gpt(torch.tensor(tokens), positions, mask)
        loss = gpt(torch.tensor(tokens), positions, mask, labels=torch.tensor(labels)).mean()
        loss.backward()
        stats = []
        parameters = dict(gpt.named_parameters())
        for key in sorted(state):
            grad = parameters[key].grad
            g = np.zeros(state[key]) if grad is None else grad.double().numpy()
            stats.append([np.linalg.norm(g), (g.ravel() * np.sin(0.7 * np.arange(g.size) + 0.3)).sum()])
        cases[name] = {"config": config, "model_kwargs": model, "shapes": state}
        outputs |= {f"{name}/logits": logits.detach().numpy(), f"{name}/loss": loss.detach().numpy()}
        outputs[f"{name}/gradients"] = np.array(stats)
        print(name, float(loss), file=sys.stderr)
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "cases.json").write_text(json.dumps(cases) + "\n")
    np.savez_compressed(FOLDER / "outputs.npz", **outputs)


if __name__ == "__main__":
    main()
