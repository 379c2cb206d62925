"""Writes tests/golden/hf_encoders/<case>/: tiny random BERT and T5 checkpoints of transformers and what these compute.

    python tests/golden/make_hf_encoders.py [CASE ...]

Run by hand where torch and transformers are installed; last made with transformers 5.23 and torch 2.13 on a CPU. Each
folder is what `save_pretrained` wrote, and expected.npz: the call's arguments and its outputs in fp32. Weights are
large (1/sqrt(fan in), norms 1 +- 0.2, biases +- 0.2), so that every option moves the outputs.
"""

# SPDX-License-Identifier: Apache-2.0
import pathlib
import shutil
import sys

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]

FOLDER = pathlib.Path(__file__).parent / "hf_encoders"
BERT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
T5 = {
    "vocab_size": 40,
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
CASES: dict[str, tuple[str, dict]] = {
    "bert_masked_lm": ("BertForMaskedLM", BERT | {"hidden_act": "gelu_new", "type_vocab_size": 3}),
    "bert_untied": ("BertForPreTraining", BERT | {"tie_word_embeddings": False, "hidden_act": "relu"}),
    "bert_model": ("BertModel", BERT | {"num_hidden_layers": 1}),
    "megatron_bert": ("MegatronBertForPreTraining", BERT),
    "megatron_bert_masked_lm": ("MegatronBertForMaskedLM", BERT | {"num_hidden_layers": 3}),
    "megatron_bert_model": ("MegatronBertModel", BERT),
    "t5_v1_1": ("T5ForConditionalGeneration", T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "t5_v1_1_untied": (
        "T5ForConditionalGeneration",
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "t5_gated_silu": ("T5ForConditionalGeneration", T5 | {"feed_forward_proj": "gated-silu"}),
    "t5_encoder": ("T5EncoderModel", T5 | {"feed_forward_proj": "gated-gelu"}),
}


def randomise(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            if parameter.ndim == 1 and "bias" not in name:
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.2 * noise)
            elif "embedding" in name or "shared" in name or "relative" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)


def make(case: str) -> None:
    name, arguments = CASES[case]
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**arguments)).eval().float()
    if case == "t5_v1_1_untied":  # which transformers 5 does not make, but loads and saves
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    randomise(model)
    random = np.random.default_rng(3)
    B, S = 2, 20
    inputs = {"input_ids": random.integers(1, 40, (B, S))}
    inputs["attention_mask"] = (np.arange(S)[None, :] < np.array([[S], [13]])).astype(np.int64)
    if "Bert" in name:
        inputs["token_type_ids"] = (np.arange(S)[None, :] >= np.array([[7], [5]])).astype(np.int64)
    elif name == "T5ForConditionalGeneration":
        inputs["decoder_input_ids"] = random.integers(1, 40, (B, 11))
    with torch.no_grad():
        output = model(**{key: torch.from_numpy(value) for key, value in inputs.items()})
    lm = next(output[k] for k in ("prediction_logits", "logits", "last_hidden_state") if output.get(k) is not None)
    binary = next((output[k] for k in ("seq_relationship_logits", "pooler_output") if output.get(k) is not None), None)
    expected = inputs | {"lm": lm.numpy()} | ({} if binary is None else {"binary": binary.numpy()})
    folder = FOLDER / case
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    np.savez(folder / "expected.npz", **expected)  # pyright: ignore


if __name__ == "__main__":
    for chosen in sys.argv[1:] or CASES:
        make(chosen)
