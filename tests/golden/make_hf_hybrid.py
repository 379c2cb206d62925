"""Writes the folders of tests/golden/hf_options/ whose models are Mamba-2 or hybrids; see make_hf.py.

python tests/golden/make_hf_hybrid.py [CASE ...]
"""

# SPDX-License-Identifier: Apache-2.0
import sys

import make_hf
import torch  # pyright: ignore[reportMissingImports]

TINY = {"vocab_size": 32, "hidden_size": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
MAMBA2 = {"num_hidden_layers": 2, "num_heads": 4, "head_dim": 8, "state_size": 6, "n_groups": 2, "chunk_size": 16}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "intermediate_size": 24}
NEMOTRON_H = ATTENTION | {
    "head_dim": 6,
    "mamba_num_heads": 6,
    "mamba_head_dim": 4,
    "ssm_state_size": 6,
    "n_groups": 3,
    "chunk_size": 8,
}
BAMBA = ATTENTION | {
    "num_hidden_layers": 3,
    "attn_layer_indices": [1],
    "mamba_n_heads": 4,
    "mamba_n_groups": 2,
    "mamba_d_state": 6,
    "mamba_chunk_size": 8,
}
ZAMBA2 = {
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "intermediate_size": 24,
    "mamba_d_state": 6,
    "n_mamba_heads": 4,
    "chunk_size": 8,
    "adapter_rank": 5,
}


def _layers(pattern: str) -> dict:
    kinds = ["hybrid" if symbol == "S" else "linear_attention" for symbol in pattern]
    return {"num_hidden_layers": len(kinds), "layers_block_type": kinds}


NARROW = {"time_step_limit": [0.3, 0.9]}
# case: (class, config arguments, changes that must matter, edits of config.json)
make_hf.SMALL = TINY
make_hf.WITH_GRADIENTS = {"zamba2", "zamba2_two_blocks"}
make_hf.CASES = {
    "mamba2_bias_limit": (
        "Mamba2ForCausalLM",
        MAMBA2 | NARROW | {"use_bias": True, "conv_kernel": 3, "layer_norm_epsilon": 1e-2},
        {"time_step_limit": [0.0, 9.0]},
    ),
    "mamba2_tied": (
        "Mamba2ForCausalLM",
        MAMBA2 | {"tie_word_embeddings": True, "use_conv_bias": False, "n_groups": 1},
        {"layer_norm_epsilon": 1e-1},
    ),
    "nemotron_h_experts": (
        "NemotronHForCausalLM",
        NEMOTRON_H
        | {
            "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
            "n_routed_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "moe_shared_expert_intermediate_size": 20,
            "routed_scaling_factor": 1.5,
        },
        {"routed_scaling_factor": 1.0},
    ),
    "nemotron_h_old_spelling": (
        "NemotronHForCausalLM",
        NEMOTRON_H
        | {
            "layers_block_type": ["linear_attention", "mlp", "full_attention"],
            "time_step_min": 0.6,
            "time_step_max": 0.9,
        },
        {"time_step_min": 0.001},
        {
            "layers_block_type": ...,
            "hybrid_override_pattern": "M-*",
            "num_hidden_layers": 3,
            "rms_norm_eps": 1e-5,
            "time_step_rank": 1,
            "mamba_proj_bias": False,
            "attention_bias": False,
        },
    ),
    "zamba2": (
        "Zamba2ForCausalLM",
        ZAMBA2 | _layers("MSMS") | {"mamba_ngroups": 2},
        {"adapter_rank": 5, "hidden_act": "silu"},
    ),
    "zamba2_two_blocks": (
        "Zamba2ForCausalLM",
        ZAMBA2
        | _layers("SMSS")
        | {"num_mem_blocks": 2, "use_shared_attention_adapter": True}
        | {"use_mem_rope": True, "add_bias_linear": True, "hidden_act": "silu"}
        | make_hf.rope("default"),
        make_hf.rope("default", theta=5.0),
    ),
    "bamba": ("BambaForCausalLM", BAMBA | NARROW, {"time_step_limit": [0.0, 9.0]}),
    "bamba_bias": (
        "BambaForCausalLM",
        BAMBA
        | {
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "attention_bias": True,
            "mlp_bias": True,
            "mamba_proj_bias": True,
            "tie_word_embeddings": True,
        }
        | make_hf.rope("default"),
        make_hf.rope("default", theta=5.0),
    ),
}


if __name__ == "__main__":
    torch.manual_seed(3)
    for wanted in sys.argv[1:] or make_hf.CASES:
        make_hf.make(wanted)
