"""Writes tests/golden/mcore_encoders/: Megatron-Core's BERT and T5 with options that the other cases leave out.

    TORCHDYNAMO_DISABLE=1 python tests/golden/make_mcore_encoders.py

Run by hand where megatron-core and torch are installed; last made with megatron-core 0.16.1 on a CPU, local layers.
"""

# SPDX-License-Identifier: Apache-2.0
import contextlib
import json
import pathlib
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch.nn import functional  # pyright: ignore[reportMissingImports]

FOLDER = pathlib.Path(__file__).parent / "mcore_encoders"
SIZES = {"num_layers": 2, "hidden_size": 24, "num_attention_heads": 4, "ffn_hidden_size": 40}
LLAMA_LIKE = {
    "gated_linear_unit": True,
    "activation_func": functional.silu,
    "add_bias_linear": False,
    "normalization": "RMSNorm",
    "kv_channels": 8,
}
CASES: dict[str, tuple[dict, dict]] = {
    "bert_rope": (
        LLAMA_LIKE,
        {
            "num_tokentypes": 0,
            "position_embedding_type": "rope",
            "rotary_percent": 0.5,
            "share_embeddings_and_output_weights": False,
            "add_binary_head": False,
        },
    ),
    "bert_untied": (
        {},
        {"num_tokentypes": 3, "share_embeddings_and_output_weights": False, "add_binary_head": True},
    ),
    "t5_learned": (
        {},
        {"position_embedding_type": "learned_absolute", "share_embeddings_and_output_weights": True},
    ),
    "t5_rope": (LLAMA_LIKE, {"position_embedding_type": "rope", "share_embeddings_and_output_weights": False}),
}
ENCODER_LAYERS = 3


def set_up() -> None:
    """One process without a GPU."""
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    from megatron.core import parallel_state  # pyright: ignore[reportMissingImports]
    from megatron.core.tensor_parallel import random  # pyright: ignore[reportMissingImports]

    parallel_state.initialize_model_parallel(1, 1)
    random.CudaRNGStatesTracker.fork = lambda self, name=None: contextlib.nullcontext()


def config_of(fields: dict, **changes: Any) -> Any:
    from megatron.core.transformer.transformer_config import (  # pyright: ignore[reportMissingImports]
        TransformerConfig,
    )

    quiet = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "use_cpu_initialization": True}
    unfused = dict.fromkeys(
        ("bias_activation_fusion", "masked_softmax_fusion", "bias_dropout_fusion", "persist_layer_norm",
         "gradient_accumulation_fusion", "apply_rope_fusion", "perform_initialization"), False
    )  # fmt: skip
    return TransformerConfig(**SIZES | fields | quiet | unfused | changes)


def build(name: str, fields: dict, arguments: dict) -> Any:
    """Megatron's model."""
    from megatron.core.models.bert.bert_layer_specs import (  # pyright: ignore[reportMissingImports]
        bert_layer_local_spec,
    )
    from megatron.core.models.bert.bert_model import BertModel  # pyright: ignore[reportMissingImports]
    from megatron.core.models.T5 import t5_spec  # pyright: ignore[reportMissingImports]
    from megatron.core.models.T5.t5_model import T5Model  # pyright: ignore[reportMissingImports]
    from megatron.core.transformer.torch_norm import WrappedTorchNorm  # pyright: ignore[reportMissingImports]

    config = config_of(fields)
    if name.startswith("bert"):
        return BertModel(config=config, transformer_layer_spec=bert_layer_local_spec, **arguments)
    encoder = t5_spec.get_t5_encoder_with_local_block_spec(ENCODER_LAYERS)
    decoder = t5_spec.get_t5_decoder_with_local_block_spec(SIZES["num_layers"])
    encoder.layer_norm = decoder.layer_norm = WrappedTorchNorm  # which the local specs lose
    return T5Model(
        config=config,
        encoder_config=config_of(fields, num_layers=ENCODER_LAYERS),
        transformer_encoder_layer_spec=encoder,
        transformer_decoder_layer_spec=decoder,
        **arguments,
    )


def randomise(model: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            parameter.copy_(1 + 0.2 * noise if parameter.ndim == 1 and "weight" in name else 0.3 * noise)


def make(name: str) -> None:
    fields, options = CASES[name]
    arguments = {"vocab_size": 50, "max_sequence_length": 16} | options
    model = build(name, fields, arguments).eval()
    randomise(model)
    random = np.random.default_rng(0)
    tokens = random.integers(0, 50, (2, 12))
    kept = (np.arange(12)[None] < np.array([[12], [9]])).astype(np.int64)
    arrays = {"tokens": tokens, "mask": kept}
    with torch.no_grad():
        if name.startswith("bert"):
            arrays["types"] = random.integers(0, 2, (2, 12))
            types = torch.from_numpy(arrays["types"]) if options["num_tokentypes"] else None
            lm, binary = model(torch.from_numpy(tokens), torch.from_numpy(kept), types)
            arrays |= {"lm": lm.numpy()} | ({} if binary is None else {"binary": binary.numpy()})
        else:
            written = random.integers(0, 50, (2, 7))
            masked = torch.from_numpy(kept == 0)[:, None, None]
            causal = torch.ones(7, 7).triu(1).bool()[None, None].expand(2, 1, 7, 7)
            encoder_mask, cross_mask = masked.expand(2, 1, 12, 12), masked.expand(2, 1, 7, 12)
            lm = model(torch.from_numpy(tokens), torch.from_numpy(written), encoder_mask, causal, cross_mask)
            arrays |= {"written": written, "lm": lm.numpy()}
    tensors = {key: value.numpy() for key, value in model.state_dict().items() if torch.is_tensor(value)}
    FOLDER.mkdir(exist_ok=True)
    np.savez(FOLDER / f"{name}.npz", **arrays, **{f"model/{key}": value for key, value in tensors.items()})
    plain = {key: value.__name__ if callable(value) else value for key, value in fields.items()}
    settings = {"transformer_config": SIZES | plain, "model_args": arguments}
    (FOLDER / f"{name}.json").write_text(json.dumps(settings, indent=1))


if __name__ == "__main__":
    set_up()
    for case in CASES:
        make(case)
