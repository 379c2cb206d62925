"""Writes tests/golden/hf_options/<case>/: tiny random checkpoints of Hugging Face models and what these compute.

    python tests/golden/make_hf.py [CASE ...]
    python tests/golden/make_hf.py --check FOLDER CASE   # FOLDER: the case, loaded and saved again by megajax

Run by hand where torch and transformers are installed; last made with transformers 5.23 and torch 2.13 on a CPU. Each
folder is what `save_pretrained` wrote, with config.json edited where a case is about how older versions spelled it, and
expected.npz: input_ids int32 [2, 40] and logits fp32 (hidden states for models without a head). Where a case is a model
of its own, also loss and, for each tensor of the file, the norm of its gradient and its product with sin(0.7 i + 0.3).
The weights are large
(1/sqrt(fan in), norms 1 +- 0.2, biases +- 0.2) and the rotary base small, so that every option moves the logits; the
change that each case's option makes is printed. The folders hf_gpt2, hf_llama, hf_llama3_rope and hf_qwen3 beside it
were made in the same way, with the same versions, and hold gradients, padded and packed inputs and greedy decoding.
"""

# SPDX-License-Identifier: Apache-2.0
import copy
import json
import pathlib
import shutil
import sys

import numpy as np
import safetensors.numpy
import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]

FOLDER = pathlib.Path(__file__).parent / "hf_options"
SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
GPT2 = {
    "vocab_size": 32,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 48,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def rope(kind: str, theta: float = 100.0, **options) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **options}}


LONGROPE: dict = {"short_factor": [1.0, 1.5, 2.5, 4.0], "long_factor": [1.2, 2.5, 4.0, 8.0]}
SMALLER_HEAD = {"head_dim": 8}
LATENT = {
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "moe_intermediate_size": 12,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}
# case: (class, config arguments, changes that must matter, old spelling or other edits of config.json)
CASES: dict[str, tuple] = {
    "llama_linear": ("LlamaForCausalLM", SMALLER_HEAD | rope("linear", factor=4.0), rope("default")),
    "llama_dynamic": (
        "LlamaForCausalLM",
        SMALLER_HEAD | {"max_position_embeddings": 16} | rope("dynamic", factor=4.0),
        rope("default"),
    ),
    "llama_yarn": (
        "LlamaForCausalLM",
        SMALLER_HEAD | rope("yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=2.0),
        rope("default"),
    ),
    "llama_yarn_factor": (
        "LlamaForCausalLM",
        SMALLER_HEAD
        | rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=16,
            attention_factor=0.75,
            truncate=False,
            beta_slow=0.3,
        ),
        rope("yarn", factor=4.0, original_max_position_embeddings=16),
    ),
    "llama_yarn_mscale": (
        "LlamaForCausalLM",
        SMALLER_HEAD | rope("yarn", factor=8.0, original_max_position_embeddings=8, mscale=2.0, mscale_all_dim=0.5),
        rope("yarn", factor=8.0, original_max_position_embeddings=8),
    ),
    "llama_longrope_short": (
        "LlamaForCausalLM",
        SMALLER_HEAD | rope("longrope", factor=4.0, original_max_position_embeddings=40, **LONGROPE),
        rope("default"),
    ),
    "llama_longrope_long": (
        "LlamaForCausalLM",
        SMALLER_HEAD | rope("longrope", original_max_position_embeddings=16, **LONGROPE),
        rope("longrope", original_max_position_embeddings=40, **LONGROPE),
    ),
    "llama_longrope_factor": (
        "LlamaForCausalLM",
        SMALLER_HEAD
        | rope("longrope", factor=2.0, attention_factor=1.5, original_max_position_embeddings=16, **LONGROPE),
        rope("longrope", factor=2.0, original_max_position_embeddings=16, **LONGROPE),
    ),
    "llama3_old_spelling": (
        "LlamaForCausalLM",
        SMALLER_HEAD
        | rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
        rope("default"),
        {
            "rope_parameters": ...,
            "rope_theta": 100.0,
            "rope_scaling": {
                "type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
            "head_dim": 8,
            "dtype": ...,
            "torch_dtype": "float32",
        },
    ),
    "llama_bias_tied": (
        "LlamaForCausalLM",
        rope("default")
        | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 12}
        | {"hidden_act": "gelu", "rms_norm_eps": 0.01, "num_key_value_heads": 1},
        {"hidden_act": "gelu_new"},
    ),
    "llama_base": ("LlamaModel", rope("default"), {"hidden_act": "gelu"}),
    "mistral_window": (
        "MistralForCausalLM",
        {"sliding_window": 7, "head_dim": 8} | rope("default"),
        {"sliding_window": 8},
    ),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 12, "num_hidden_layers": 4}
        | {"shared_expert_intermediate_size": 20, "decoder_sparse_step": 2, "mlp_only_layers": [3], "head_dim": 8}
        | rope("default"),
        {"norm_topk_prob": True},
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "norm_topk_prob": True}
        | {"mlp_only_layers": [0], "num_hidden_layers": 3, "head_dim": 8}
        | rope("default"),
        {"norm_topk_prob": False},
    ),
    "qwen2_moe_window": (
        "Qwen2MoeForCausalLM",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "num_hidden_layers": 4}
        | {"shared_expert_intermediate_size": 8, "decoder_sparse_step": 4, "head_dim": 4, "intermediate_size": 12}
        | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}
        | rope("default"),
        {"max_window_layers": 3},
        {"layer_types": ...},
    ),
    "qwen3_moe_window": (
        "Qwen3MoeForCausalLM",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "num_hidden_layers": 2}
        | {"use_sliding_window": True, "sliding_window": 5, "head_dim": 4}
        | rope("default"),
        {"use_sliding_window": False},
    ),
    "mixtral_window": (
        "MixtralForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 3, "sliding_window": 6, "head_dim": 8} | rope("default"),
        {"sliding_window": None},
    ),
    "deepseek_v3_yarn": (
        "DeepseekV3ForCausalLM",
        {"n_routed_experts": 8, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "moe_intermediate_size": 12}
        | {"n_shared_experts": 1, "first_k_dense_replace": 1, "num_hidden_layers": 3, "num_key_value_heads": 4}
        | {"q_lora_rank": None, "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "v_head_dim": 10}
        | rope("yarn", factor=8.0, original_max_position_embeddings=8, mscale=1.0, mscale_all_dim=1.0),
        rope("default"),
    ),
    "deepseek_v2_groups": (
        "DeepseekV2ForCausalLM",
        LATENT
        | {"num_experts_per_tok": 4, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 3}
        | {"q_lora_rank": 9, "attention_bias": True, "routed_scaling_factor": 4.0, "rms_norm_eps": 1e-2}
        | rope("yarn", factor=8.0, original_max_position_embeddings=8, mscale=0.707, mscale_all_dim=0.707),
        {"topk_group": 4},
    ),
    "deepseek_v2_lite": (
        "DeepseekV2ForCausalLM",
        LATENT | {"num_experts_per_tok": 3, "q_lora_rank": None, "tie_word_embeddings": True} | rope("default"),
        {"routed_scaling_factor": 2.0},
    ),
    "deepseek_v3_halves": (
        "DeepseekV3ForCausalLM",
        LATENT
        | {"num_experts_per_tok": 3, "n_group": 2, "topk_group": 1, "q_lora_rank": 9, "rope_interleave": False}
        | {"norm_topk_prob": False, "attention_bias": True, "rms_norm_eps": 1e-2}
        | rope("yarn", factor=8.0, original_max_position_embeddings=8, mscale_all_dim=0.707),
        {"rope_interleave": True},
    ),
    "qwen2_window": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "num_hidden_layers": 3}
        | rope("default"),
        {"max_window_layers": 2},
        {"layer_types": ...},
    ),
    "qwen2_full_tied": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": False, "sliding_window": 4, "max_window_layers": 1, "tie_word_embeddings": True}
        | rope("default"),
        {"use_sliding_window": True, "sliding_window": 4},
        {"sliding_window": 4, "layer_types": ...},
    ),
    "qwen3_window": (
        "Qwen3ForCausalLM",
        {
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_hidden_layers": 4,
            "head_dim": 8,
            "attention_bias": True,
        }
        | rope("default"),
        {"layer_types": ["full_attention", "sliding_attention"] * 2},
    ),
    "gemma": ("GemmaForCausalLM", {"head_dim": 8} | rope("default"), {"hidden_act": "relu"}),
    "gemma2": (
        "Gemma2ForCausalLM",
        {"num_hidden_layers": 4, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 5, "rms_norm_eps": 0.01}
        | {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0}
        | rope("default"),
        {"attn_logit_softcapping": None},
        {"layer_types": ..., "hidden_act": "gelu_pytorch_tanh"},
    ),
    "gemma2_uncapped": (
        "Gemma2ForCausalLM",
        {"num_hidden_layers": 3, "head_dim": 8, "layer_types": ["full_attention"] * 2 + ["sliding_attention"]}
        | {"sliding_window": 5, "attn_logit_softcapping": None, "final_logit_softcapping": None}
        | {"query_pre_attn_scalar": 8, "attention_bias": True}
        | rope("default"),
        {"final_logit_softcapping": 1.0},
    ),
    "nemotron": (
        "NemotronForCausalLM",
        {"attention_bias": True, "mlp_bias": True, "norm_eps": 0.01, "head_dim": 8}
        | rope("default", partial_rotary_factor=0.5),
        rope("default", partial_rotary_factor=1.0),
    ),
    "nemotron_old_spelling": (
        "NemotronForCausalLM",
        {"head_dim": 8, "num_key_value_heads": 4} | rope("linear", factor=2.0, partial_rotary_factor=0.25),
        rope("linear", factor=2.0, partial_rotary_factor=0.5),
        {
            "rope_parameters": ...,
            "rope_theta": 100.0,
            "rope_scaling": {"type": "linear", "factor": 2.0},
            "partial_rotary_factor": 0.25,
        },
    ),
    "smollm3": (
        "SmolLM3ForCausalLM",
        {"no_rope_layer_interval": 2, "num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 6}
        | rope("default"),
        {"no_rope_layers": [1, 1, 1, 0]},
        {"layer_types": ...},
    ),
    "gpt2_gelu": (
        "GPT2LMHeadModel",
        {"activation_function": "gelu", "n_inner": 40, "scale_attn_weights": False, "layer_norm_epsilon": 0.01},
        {"activation_function": "gelu_new"},
    ),
    "gpt2_scaled_by_layer": (
        "GPT2LMHeadModel",
        {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True, "n_layer": 3, "n_embd": 8},
        {"scale_attn_by_inverse_layer_idx": False},
    ),
    "gpt2_untied": ("GPT2LMHeadModel", {"tie_word_embeddings": False}, {"activation_function": "relu"}),
    "gpt2_base": ("GPT2Model", {}, {"scale_attn_weights": False}),
}
SHARDED = ("mistral_window",)
WITH_GRADIENTS = {"deepseek_v2_groups", "deepseek_v2_lite", "deepseek_v3_halves", "gemma", "gemma2"}
WITH_GRADIENTS |= {"gpt2_scaled_by_layer"}


def randomise(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(11)
    centre = 0.0 if type(model).__name__.startswith(("Nemotron", "Gemma")) else 1.0
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            value = 0.2 * noise if name.endswith("bias") else centre + 0.2 * noise
        elif "Zamba2" in type(model).__name__:  # calmer, since its shared blocks have no residual around them
            value = noise * (0.4 if "embed" in name else 0.6 * parameter.shape[-1] ** -0.5)
        elif "embed_tokens" in name or ".wte" in name or ".wpe" in name:
            value = 0.3 * noise
        else:
            value = noise / parameter.shape[0 if "c_" in name else 1] ** 0.5
        parameter.data.copy_(value)


def run(folder: pathlib.Path, ids: np.ndarray, changes: dict | None = None) -> np.ndarray:
    config = transformers.AutoConfig.from_pretrained(folder)
    name = config.architectures[0]
    if changes:
        stale = {"layer_types", "no_rope_layers", "hybrid_layer_ids"} & set(config.to_dict())
        config = type(config)(**{k: v for k, v in config.to_dict().items() if k not in stale} | changes)
    model = getattr(transformers, name).from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return model.eval()(torch.from_numpy(ids).long())[0].numpy()


def gradients(model: torch.nn.Module, ids: np.ndarray, folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Loss, and two numbers of each tensor's gradient, by the names that the tensors have in the file."""
    tokens = torch.from_numpy(ids).long()
    loss = model(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    copy_of = copy.deepcopy(model)
    with torch.no_grad():
        for target, source in zip(copy_of.parameters(), model.parameters(), strict=True):
            target.copy_(torch.zeros_like(source) if source.grad is None else source.grad)
    copy_of.save_pretrained(folder / "gradients")
    tensors = safetensors.numpy.load_file(folder / "gradients" / "model.safetensors")
    shutil.rmtree(folder / "gradients")
    names = sorted(name for name in tensors if "e_score" not in name)  # a buffer
    flat = [tensors[name].astype(np.float64).ravel() for name in names]
    stats = [[np.linalg.norm(g), g @ np.sin(0.7 * np.arange(g.size) + 0.3)] for g in flat]
    return {"loss": loss.detach().numpy(), "gradient_names": np.array(names), "gradients": np.array(stats)}


def make(case: str) -> None:
    name, options, changes, *edits = CASES[case]
    arguments = (GPT2 if "GPT2" in name else SMALL) | {"resid_pdrop": 0.0} | options
    arguments = {k: v for k, v in arguments.items() if k != "resid_pdrop" or "GPT2" in name}
    model = getattr(transformers, name)(getattr(transformers, name).config_class(**arguments))
    randomise(model)
    folder = FOLDER / case
    shutil.rmtree(folder, ignore_errors=True)
    model.eval().set_attn_implementation("eager")
    model.save_pretrained(folder, max_shard_size="8KB" if case in SHARDED else "5GB")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for field, value in (edits[0] if edits else {}).items():
        if value is ...:
            config.pop(field, None)
        else:
            config[field] = value
    path.write_text(json.dumps(config, indent=2) + "\n")
    ids = np.random.default_rng(5).integers(0, 32, (2, 40)).astype(np.int32)
    logits = run(folder, ids)
    more: dict = gradients(model, ids, folder) if case in WITH_GRADIENTS else {}
    np.savez_compressed(folder / "expected.npz", input_ids=ids, logits=logits, **more)
    moved = np.abs(run(folder, ids, changes) - logits).max()
    print(f"{case}: logits up to {np.abs(logits).max():.2f}, moved by {moved:.3f}")
    assert moved > 1e-3, "the option of this case does not matter"  # a hundred times the tolerance


def check(folder: pathlib.Path, case: str) -> None:
    """Compares what transformers computes with a folder that megajax saved."""
    expected = np.load(FOLDER / case / "expected.npz")
    worst = np.abs(run(folder, expected["input_ids"]) - expected["logits"]).max()
    print(f"{case}: {folder} differs by {worst:.1e}")
    assert worst < 2e-5


if __name__ == "__main__":
    if sys.argv[1:2] == ["--check"]:
        check(pathlib.Path(sys.argv[2]), sys.argv[3])
    else:
        for wanted in sys.argv[1:] or CASES:
            make(wanted)
