"""Writes tests/golden/mcore_retro_options/: Megatron-Core's RETRO with options that the case mcore_retro leaves out.

    TORCHDYNAMO_DISABLE=1 python tests/golden/make_mcore_retro.py

Run by hand where megatron-core 0.15.3, the last with RETRO, and torch are installed; a CPU will do. Local layers.
"""

# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
import contextlib
import json
import os
import pathlib
from typing import Any

import numpy as np
import torch
from torch.nn import functional

FOLDER = pathlib.Path(__file__).parent / "mcore_retro_options"
VOCAB, LONGEST = 40, 32
SIZES = {"num_layers": 6, "hidden_size": 16, "num_attention_heads": 2, "ffn_hidden_size": 24}
CASES: dict[str, tuple[int, bool, dict, dict]] = {
    # Tokens, a norm after the last layer, fields of the config, arguments of the model.
    "short_first_chunk": (
        27,
        False,
        {"retro_chunk_length": 8, "retro_num_neighbors": 3, "retro_num_retrieved_chunks": 1,
         "retro_encoder_num_layers": 1},
        {"position_embedding_type": "learned_absolute", "share_embeddings_and_output_weights": True},
    ),
    "llama_like": (
        12,
        True,
        {"num_layers": 9, "retro_chunk_length": 4, "retro_num_neighbors": 1, "retro_num_retrieved_chunks": 3,
         "retro_encoder_num_layers": 3, "gated_linear_unit": True, "activation_func": functional.silu,
         "add_bias_linear": False, "add_qkv_bias": True, "normalization": "RMSNorm", "kv_channels": 12},
        {"position_embedding_type": "rope", "rotary_percent": 0.5, "share_embeddings_and_output_weights": False},
    ),
    "deep": (
        9,
        True,
        {"num_layers": 18, "hidden_size": 8, "ffn_hidden_size": 12, "retro_chunk_length": 5, "retro_num_neighbors": 2},
        {"position_embedding_type": "learned_absolute", "share_embeddings_and_output_weights": True},
    ),
}  # fmt: skip


def set_up() -> None:
    """One process without a GPU and without Transformer Engine."""
    os.environ["NVTE_FLASH_ATTN"] = os.environ["NVTE_FUSED_ATTN"] = "0"
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    from megatron.core import parallel_state
    from megatron.core.models.retro import config
    from megatron.core.tensor_parallel import random

    config.is_te_min_version = lambda *_: False
    parallel_state.initialize_model_parallel(1, 1)
    random.CudaRNGStatesTracker.fork = lambda self, name=None: contextlib.nullcontext()


def build(final_norm: bool, fields: dict, arguments: dict) -> Any:
    """Megatron's model."""
    from megatron.core.models.retro import RetroConfig, RetroModel, get_retro_decoder_block_spec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    quiet = dict.fromkeys(
        ("hidden_dropout", "attention_dropout", "retro_encoder_hidden_dropout", "retro_encoder_attention_dropout"), 0.0
    )
    unfused = dict.fromkeys(
        ("bias_activation_fusion", "masked_softmax_fusion", "bias_dropout_fusion", "persist_layer_norm",
         "gradient_accumulation_fusion", "apply_rope_fusion"), False
    )  # fmt: skip
    config = RetroConfig(
        **SIZES | fields | quiet | unfused, retro_split_preprocessing="98,2,0", use_cpu_initialization=True
    )
    spec = get_retro_decoder_block_spec(config, use_transformer_engine=False)
    if final_norm:
        spec.layer_norm = WrappedTorchNorm
    return RetroModel(
        config=config, transformer_layer_spec=spec, vocab_size=VOCAB, max_sequence_length=LONGEST, **arguments
    )


def randomise(model: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            parameter.copy_(1 + 0.2 * noise if parameter.ndim == 1 and "weight" in name else 0.3 * noise)


def make(name: str) -> None:
    length, final_norm, fields, arguments = CASES[name]
    model = build(final_norm, fields, arguments).eval()
    randomise(model)
    random, config = np.random.default_rng(0), model.config
    chunks = -(-length // config.retro_chunk_length)
    tokens, labels = random.integers(0, VOCAB, (2, 2, length))
    context = random.integers(0, VOCAB, (2 * chunks * config.retro_num_neighbors, config.retro_retrieved_length))

    def positions(array: np.ndarray) -> Any:
        return torch.arange(array.shape[1])[None].expand(*array.shape)

    given = [torch.from_numpy(tokens), positions(tokens), torch.ones(length, length).triu(1).bool()[None, None]]
    neighbors = {"context_input_ids": torch.from_numpy(context), "context_position_ids": positions(context)}
    logits = model(*given, **neighbors)
    loss = model(*given, **neighbors, labels=torch.from_numpy(labels)).mean()
    loss.backward()
    gradients = {key: p.grad.double().numpy().ravel() for key, p in model.named_parameters()}
    stats = [[np.linalg.norm(g), g @ np.sin(0.7 * np.arange(g.size) + 0.3)] for g in gradients.values()]
    tensors = {key: value.numpy() for key, value in model.state_dict().items() if torch.is_tensor(value)}
    FOLDER.mkdir(exist_ok=True)
    np.savez_compressed(
        FOLDER / f"{name}.npz",
        tokens=tokens, labels=labels, context_tokens=context, logits=logits.detach().numpy(), loss=loss.item(),
        gradient_names=np.array(list(gradients)), gradient_stats=np.array(stats),
        **{f"model/{key}": value for key, value in tensors.items()},
    )  # fmt: skip
    plain = {key: value.__name__ if callable(value) else value for key, value in fields.items()}
    settings = {
        "transformer_config": SIZES | plain | {"retro_split_preprocessing": "98,2,0"},
        "model_args": {"vocab_size": VOCAB, "max_sequence_length": LONGEST} | arguments,
    }
    (FOLDER / f"{name}.json").write_text(json.dumps(settings, indent=1) + "\n")


if __name__ == "__main__":
    set_up()
    for case in CASES:
        make(case)
