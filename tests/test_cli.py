"""The command line: what it accepts, what it refuses and in which words."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from megajax import cli, cli_flags
from megajax.config import (
    Config,
    ConfigError,
    HeterogeneousLayer,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
    TransformerConfig,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TasteConfig(TransformerConfig):
    """A family with a field of its own."""

    # Taste
    num_tastes: int = 5
    """How many tastes there are."""


@dataclasses.dataclass(frozen=True)
class Family:
    """A record as the registry has them."""

    name: str
    config_type: type[TransformerConfig]
    default: Config
    presets: Mapping[str, Callable[[], TransformerConfig]]


def _llama() -> TransformerConfig:
    return TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=96,
        position_embedding_type="rope",
        activation_func="silu",
        gated_linear_unit=True,
        add_bias_linear=False,
        normalization="RMSNorm",
    )


SMALL = TransformerConfig(num_layers=2, hidden_size=48, num_attention_heads=4, hidden_dropout=0.0)
DEFAULT = Config(model_family="gpt", model=SMALL, train=TrainConfig(train_iters=7))
FAMILIES = {
    "gpt": Family("gpt", TransformerConfig, DEFAULT, {"llama-tiny": _llama}),
    "taste": Family(
        "taste",
        TasteConfig,
        Config(model_family="taste", model=TasteConfig(num_layers=1, hidden_size=32, num_attention_heads=2)),
        {},
    ),
}


def parse(line: str) -> Config:
    return cli.parse(line.split(), prog="train", families=FAMILIES)


def model(**changes: Any) -> Config:
    return dataclasses.replace(DEFAULT, model=SMALL.replace(**changes))


def group(name: str, **changes: Any) -> Config:
    return dataclasses.replace(DEFAULT, **{name: dataclasses.replace(getattr(DEFAULT, name), **changes)})


LLAMA = dataclasses.replace(DEFAULT, model=_llama())

# Defaults that a user's own values push aside.
TUNED = dataclasses.replace(
    FAMILIES["gpt"].default,
    model=SMALL.replace(ffn_hidden_size=128, gated_linear_unit=True, activation_func="silu", bf16=True),
    optimizer=OptimizerConfig(lr=1e-2, min_lr=1e-3, lr_warmup_fraction=0.1),
    train=TrainConfig(train_samples=100),
)


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("--lr 1e-4", {"lr": 1e-4, "min_lr": 0.0}),
        ("--lr 1e-4 --min-lr 1e-5", {"lr": 1e-4, "min_lr": 1e-5}),
        ("--min-lr 1e-5", {"lr": 1e-2, "min_lr": 1e-5}),
        ("--lr-warmup-iters 3", {"lr_warmup_iters": 3, "lr_warmup_fraction": None}),
        ("--lr-warmup-samples 3", {"lr_warmup_samples": 3, "lr_warmup_fraction": None}),
        ("--fp16", {"fp16": True, "bf16": False}),
        ("--no-fp16", {"fp16": False, "bf16": True}),
        ("--train-iters 9", {"train_iters": 9, "train_samples": None}),
        ("--num-layers 3", {"ffn_hidden_size": 128}),
        ("--hidden-size 96", {"ffn_hidden_size": 256}),
        ("--hidden-size 96 --ffn-hidden-size None", {"ffn_hidden_size": 384}),
        ("--hidden-size 96 --no-gated-linear-unit", {"ffn_hidden_size": 384}),
        ("--preset llama-tiny --hidden-size 32", {"ffn_hidden_size": 96}),
    ],
)
def test_a_flag_takes_back_defaults_that_do_not_go_with_it(line: str, values: dict[str, Any]) -> None:
    families = {"gpt": dataclasses.replace(FAMILIES["gpt"], default=TUNED)}
    config = cli.parse(line.split(), prog="train", families=families)
    flags = cli_flags.flags_of(TransformerConfig)
    assert {name: getattr(getattr(config, flags[name].group), name) for name in values} == values
    assert cli.from_json(cli.to_json(config), families=families) == config


GOOD = [
    ("", DEFAULT),
    ("--model gpt", DEFAULT),
    ("--model taste --num-tastes 3", dataclasses.replace(
        FAMILIES["taste"].default,
        model=TasteConfig(num_layers=1, hidden_size=32, num_attention_heads=2, num_tastes=3),
    )),
    ("--num-layers 3", model(num_layers=3)),
    ("--num_layers 3", model(num_layers=3)),
    ("--num-layers=3", model(num_layers=3)),
    ("--num-layers 9 --num-layers 3", model(num_layers=3)),
    ("--bf16", model(bf16=True)),
    ("--bf16 --no-bf16", DEFAULT),
    ("--bf16=true", model(bf16=True)),
    ("--no-add-mlp-bias", model(add_mlp_bias=False)),
    ("--window-size 127 0", model(window_size=(127, 0))),
    ("--window-size -1 0", model(window_size=(-1, 0))),
    ("--window-size 8 0 --window-attn-skip-freq 2", model(window_size=(8, 0), window_attn_skip_freq=2)),
    ("--window-size 8 0 --window-attn-skip-freq 1 0", model(window_size=(8, 0), window_attn_skip_freq=(1, 0))),
    ("--norm-epsilon 1e-6", model(layernorm_epsilon=1e-6)),
    ("--max-position-embeddings 64", model(max_sequence_length=64)),
    ("--untie-embeddings-and-output-weights", model(share_embeddings_and_output_weights=False)),
    # int(8 * 48 / 3 / 64) * 64
    ("--swiglu", model(gated_linear_unit=True, activation_func="silu", ffn_hidden_size=128)),
    ("--swiglu --hidden-size 96", model(
        hidden_size=96, gated_linear_unit=True, activation_func="silu", ffn_hidden_size=256
    )),
    ("--swiglu --ffn-hidden-size 80", model(gated_linear_unit=True, activation_func="silu", ffn_hidden_size=80)),
    ("--swiglu --glu-linear-offset 1", model(
        gated_linear_unit=True, activation_func="silu", ffn_hidden_size=128, glu_linear_offset=1.0
    )),
    ("--preset llama-tiny --swiglu", LLAMA),
    ("--preset llama-tiny --swiglu --ffn-hidden-size None", dataclasses.replace(
        LLAMA, model=_llama().replace(ffn_hidden_size=128)
    )),
    ("--squared-relu", model(activation_func="squared_relu")),
    ("--quick-geglu", model(activation_func="quick_gelu", gated_linear_unit=True)),
    ("--disable-bias-linear --add-qkv-bias", model(add_bias_linear=False, add_qkv_bias=True)),
    ("--disable-bias-linear", model(add_bias_linear=False, add_mlp_bias=False, add_attention_proj_bias=False)),
    ("--group-query-attention --num-query-groups 2", model(num_query_groups=2)),
    ("--preset llama-tiny --group-query-attention", LLAMA),
    ("--position-embedding-type rope --no-position-embedding --use-rope-scaling", model(
        position_embedding_type="rope", rope_scaling_type="llama3"
    )),
    ("--use-rotary-position-embeddings --rotary-seq-len-interpolation-factor 4", model(
        position_embedding_type="rope", seq_len_interpolation_factor=4.0
    )),
    ("--apply-layernorm-1p", model(layernorm_zero_centered_gamma=True)),
    ("--recompute-activations", model(recompute_granularity="selective")),
    ("--recompute-activations --recompute-granularity selective", model(recompute_granularity="selective")),
    ("--recompute-activations --recompute-modules core_attn mlp", model(
        recompute_granularity="selective", recompute_modules=("core_attn", "mlp")
    )),
    ("--position-embedding-type yarn --yarn-mscale None", model(position_embedding_type="yarn", yarn_mscale=None)),
    ("--hidden-size 96", model(hidden_size=96, ffn_hidden_size=384, kv_channels=24)),
    ("--num-attention-heads 8", model(num_attention_heads=8, num_query_groups=8, kv_channels=6)),
    ("--preset llama-tiny", LLAMA),
    ("--preset llama-tiny --hidden-size 32", dataclasses.replace(LLAMA, model=_llama().replace(hidden_size=32))),
    ("--preset llama-tiny --ffn-hidden-size None", dataclasses.replace(
        LLAMA, model=_llama().replace(ffn_hidden_size=256)
    )),
    ("--tp 2 --sequence-parallel", dataclasses.replace(
        DEFAULT, parallel=ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    )),
    ("--zero 3", group("parallel", zero=3)),
    ("--use-distributed-optimizer", group("parallel", zero=1)),
    ("--pp 1 --context-parallel-size 1 --ep 1", DEFAULT),
    ("--optimizer lion --lion-beta1 0.8", group("optimizer", optimizer="lion", lion_beta1=0.8)),
    ("--optimizer muon --adam-beta2 0.95", group("optimizer", optimizer="muon", adam_beta2=0.95)),
    ("--optimizer adam --no-muon-use-nesterov", DEFAULT),
    ("--lr 1e-4 --min-lr 1e-5 --lr-warmup-iters 10 --clip-grad 0", group(
        "optimizer", lr=1e-4, min_lr=1e-5, lr_warmup_iters=10, clip_grad=0.0
    )),
    ("--fp16 --loss-scale 128", dataclasses.replace(
        model(fp16=True), optimizer=OptimizerConfig(loss_scale=128.0)
    )),
    ("--data-path a.txt 0.5 b.jsonl --json-key body", group("data", data=("a.txt", "0.5", "b.jsonl"), json_key="body")),
    ("--tokenizer-type HuggingFaceTokenizer --tokenizer-model t.json", group("data", tokenizer="t.json")),
    ("--dataloader-type single", DEFAULT),
    ("--split=98,2,0 --seq-length 64", group("data", split="98,2,0", seq_length=64)),
    ("--save here --load there --save-interval 5", group("checkpoint", save="here", load="there", save_interval=5)),
    ("--train-steps 9 --seed 3", group("train", train_iters=9, seed=3)),
    ("--global-batch-size 8 --rampup-batch-size 2 2 100", group(
        "train", global_batch_size=8, rampup_batch_size=(2, 2, 100)
    )),
    ("--sample-prompt=--what", group("train", sample_prompt="--what")),
]  # fmt: skip


@pytest.mark.parametrize(("line", "expected"), GOOD, ids=[line for line, _ in GOOD])
def test_good_lines(line: str, expected: Config, capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(line) == expected
    assert capsys.readouterr() == ("", "")


BAD = [
    ("--num-layer 3", "--num-layer is unknown; did you mean --num-layers?"),
    ("--qwertyuiop", "--qwertyuiop is unknown; see --help"),
    ("--no-bf61", "--no-bf61 is unknown; did you mean --no-bf16?"),
    ("-lr 3", "-lr is not a flag; flags start with two hyphens (text may follow as --flag=-lr)"),
    ("stray", "'stray' follows no flag; flags start with two hyphens, see --help"),
    ("--num-layers", "--num-layers needs a value: INT"),
    ("--num-layers two", "--num-layers two is not valid: expected INT"),
    ("--num-layers 2 3", "--num-layers 2 3 is not valid: expected INT"),
    ("--num-layers 1.5", "--num-layers 1.5 is not valid: expected INT"),
    ("--lr fast", "--lr fast is not valid: expected FLOAT"),
    ("--lr=", "--lr '' is not valid: expected FLOAT"),
    ("--lr nan", "--lr nan is not valid: expected FLOAT"),
    ("--window-size 127", "--window-size 127 is not valid: expected INT INT"),
    ("--window-attn-skip-freq 1.5", "--window-attn-skip-freq 1.5 is not valid: expected INT ..."),
    ("--optimizer admw", "--optimizer admw is not valid: expected adam|sgd|lion|muon; did you mean adam?"),
    ("--zero 4", "--zero 4 is not valid: expected 0|1|2|3"),
    ("--bf16 maybe", "--bf16 maybe is not valid: --bf16 takes no value; write --bf16 or --no-bf16"),
    ("--no-bf16 true", "--no-bf16 true is not valid: --no-bf16 takes no value; write --bf16 or --no-bf16"),
    ("--swiglu 3", "--swiglu 3 is not valid: --swiglu takes no value; drop '3'"),
    ("--model gtp", "--model gtp is unknown; there is gpt, taste; did you mean gpt?"),
    ("--model", "--model is not valid: --model takes one value"),
    (
        "--preset llama-tini",
        "--preset llama-tini is unknown; --model gpt has llama-tiny; did you mean llama-tiny?",
    ),
    ("--model taste --preset x", "--preset x is unknown; --model taste has none"),
    ("--num-tastes 3", "--num-tastes has no effect on --model gpt; it belongs to --model taste"),
    ("--config nowhere.json", "nowhere.json cannot be read: No such file or directory"),
    # The config groups' own errors, with the flags for the fields.
    (
        "--hidden-size 50",
        "--hidden-size=50 is not divisible by --num-attention-heads=4; change one of them",
    ),
    ("--bf16 --fp16", "--bf16=True excludes --fp16=True; set one of them"),
    ("--lr -1", "--lr=-1.0 must not be negative"),
    ("--finetune", "--finetune=True needs --load=FOLDER with the weights"),
    (
        "--lr-warmup-iters 1 --lr-warmup-samples 2",
        "--lr-warmup-iters=1 excludes --lr-warmup-samples=2; set one of them",
    ),
    (
        "--lr-warmup-iters 1 --lr-warmup-fraction 0.1",
        "--lr-warmup-fraction=0.1 excludes --lr-warmup-iters and --lr-warmup-samples",
    ),
    # Contradictions between flags.
    ("--swiglu --squared-relu", "--swiglu and --squared-relu disagree about gated_linear_unit; drop one"),
    ("--swiglu --activation-func relu", "--swiglu and --activation-func relu disagree about activation_func; drop one"),
    (
        "--tp 2 --tensor-model-parallel-size 4",
        "--tp 2 and --tensor-model-parallel-size 4 disagree about tensor_model_parallel_size; drop one",
    ),
    # Not built.
    ("--moe-router-force-load-balancing", "--moe-router-force-load-balancing is not supported yet; drop it"),
    ("--num-experts 4 --moe-router-topk 8", "--moe-router-topk=8 exceeds --num-moe-experts=4; lower it"),
    (
        "--tokenizer-type GPT2BPETokenizer",
        "--tokenizer-type GPT2BPETokenizer is not supported; give --tokenizer byte, or the path of a tokenizer.json,"
        " sentencepiece or tiktoken file",
    ),
    ("--mock-data", "--mock-data is not supported; without --data the text that ships inside Python is used"),
    # No effect.
    ("--rotary-base 5e5", "--rotary-base 5e5 has no effect: it needs --position-embedding-type rope or yarn"),
    (
        "--use-rope-scaling",
        "--use-rope-scaling has no effect: it needs --position-embedding-type rope",
    ),
    (
        "--position-embedding-type rope --yarn-beta-fast 3",
        "--yarn-beta-fast 3 has no effect: it needs --position-embedding-type yarn",
    ),
    (
        "--position-embedding-type rope --rope-low-freq-factor 2",
        "--rope-low-freq-factor 2 has no effect: it needs --position-embedding-type rope and"
        " --rope-scaling-type llama3",
    ),
    (
        "--no-yarn-correction-range-round-to-int",
        "--no-yarn-correction-range-round-to-int has no effect: it needs --position-embedding-type yarn",
    ),
    ("--group-query-attention", "--group-query-attention has no effect: it needs --num-query-groups"),
    (
        "--no-position-embedding",
        "--no-position-embedding has no effect: it needs --position-embedding-type rope, yarn or none",
    ),
    (
        "--add-qkv-bias",
        "--add-qkv-bias has no effect: every linear layer has a bias already; add --no-add-bias-linear",
    ),
    ("--glu-linear-offset 1", "--glu-linear-offset 1 has no effect: it needs --gated-linear-unit"),
    ("--recompute-modules mlp", "--recompute-modules mlp has no effect: it needs --recompute-granularity selective"),
    (
        "--optimizer sgd --adam-beta1 0.8",
        "--adam-beta1 0.8 has no effect: it needs --optimizer adam, or muon with --muon-scalar-optimizer adam",
    ),
    ("--muon-momentum 0.9", "--muon-momentum 0.9 has no effect: it needs --optimizer muon"),
    ("--sgd-momentum 0.8", "--sgd-momentum 0.8 has no effect: it needs --optimizer sgd"),
    ("--loss-scale 128", "--loss-scale 128 has no effect: it needs --fp16"),
    (
        "--fp16 --loss-scale 128 --hysteresis 3",
        "--hysteresis 3 has no effect: --loss-scale makes the scale constant; drop one",
    ),
    (
        "--lr-decay-style constant --min-lr 1e-5",
        "--min-lr 1e-5 has no effect: --lr-decay-style constant never decays; drop one",
    ),
    (
        "--lr-warmup-init 1e-7",
        "--lr-warmup-init 1e-7 has no effect: it needs --lr-warmup-iters, --lr-warmup-samples or --lr-warmup-fraction",
    ),
    (
        "--train-iters 3 --train-samples 9",
        "--train-iters 3 has no effect: --train-samples already says how long to train; drop one",
    ),
    (
        "--tokenizer-type TikTokenizer",
        "--tokenizer-type TikTokenizer has no effect: it needs --tokenizer-model, the path of its file",
    ),
    ("--data a.txt --json-key b", "--json-key b has no effect: it needs a .jsonl file in --data"),
]


@pytest.mark.parametrize(("line", "message"), BAD, ids=[line for line, _ in BAD])
def test_bad_lines(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(line)
    assert str(caught.value) == message
    assert capsys.readouterr() == ("", "")


def test_flags_of_pytorch_machinery_are_ignored_with_one_warning(capsys: pytest.CaptureFixture[str]) -> None:
    line = "--no-masked-softmax-fusion --manual-gc-interval 100 --num-layers 3 --use-flash-attn"
    line += " --overlap-grad-reduce"
    assert parse(line) == model(num_layers=3)
    assert capsys.readouterr().err == (
        "warning: ignored, because JAX has no use for it: --no-masked-softmax-fusion, --manual-gc-interval,"
        " --use-flash-attn, --overlap-grad-reduce\n"
    )


BLOCKS = {
    "block_configs": [{"attention": {"no_op": True}, "ffn": {"ffn_mult": 4}}, {"attention": {"n_heads_in_group": 2}}]
}


def test_heterogeneous_layers_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "blocks.json"
    file.write_text(json.dumps(BLOCKS))
    config = parse(f"--heterogeneous-layers-config-path {file} --hidden-size 96")
    # 2 * 4 * 96 / 3 = 256 features; 4 heads in groups of 2 are 2 groups.
    assert config.model.heterogeneous_layers == (
        HeterogeneousLayer(attention="no_op", ffn_hidden_size=256),
        HeterogeneousLayer(num_query_groups=2),
    )
    assert cli.from_json(cli.to_json(config), families=FAMILIES) == config


@pytest.mark.parametrize("line", [line for line, _ in GOOD])
def test_json_round_trip(line: str) -> None:
    config = parse(line)
    again = cli.from_json(json.loads(json.dumps(cli.to_json(config))), families=FAMILIES)
    assert again == config
    assert again.model._derived == config.model._derived
    assert hash(again) == hash(config)


def test_config_file_lies_between_flags_and_preset(tmp_path: Path) -> None:
    first = parse("--preset llama-tiny --num-layers 3 --lr 0.5 --ffn-hidden-size None")
    (tmp_path / "config.json").write_text(json.dumps(cli.to_json(first)))
    assert parse(f"--config {tmp_path / 'config.json'}") == first
    assert parse(f"--config {tmp_path}") == first
    changed = parse(f"--config {tmp_path} --lr 0.25 --hidden-size 128")
    assert changed.optimizer.lr == 0.25
    assert (changed.model.num_layers, changed.model.ffn_hidden_size, changed.model.kv_channels) == (3, 512, 32)
    with pytest.raises(ConfigError, match=r"--preset llama-tiny has no effect: --config .* describes the whole model"):
        parse(f"--config {tmp_path} --preset llama-tiny")
    (tmp_path / "part.json").write_text('{"model": {"num_layers": 5}}')
    part = parse(f"--preset llama-tiny --config {tmp_path / 'part.json'}")
    assert part.model == _llama().replace(num_layers=5)
    (tmp_path / "taste.json").write_text('{"model_family": "taste", "model": {"num_tastes": 2}}')
    assert parse(f"--config {tmp_path / 'taste.json'}").model == FAMILIES["taste"].default.model.replace(num_tastes=2)
    with pytest.raises(ConfigError, match="--model gpt differs from model_family=taste of --config; drop --model"):
        parse(f"--model gpt --config {tmp_path / 'taste.json'}")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"model_": {}}, "config: model_ is unknown; did you mean model?"),
        ({"model": {"hiden_size": 4}}, "config: model.hiden_size is unknown; did you mean hidden_size?"),
        ({"model": {"hidden_size": "4"}}, 'config: model.hidden_size="4" is not valid: expected INT'),
        ({"model": {"hidden_size": True}}, "config: model.hidden_size=true is not valid: expected INT"),
        ({"model": {"hidden_size": None}}, "config: model.hidden_size=null is not valid: expected INT"),
        ({"model": {"bf16": 1}}, "config: model.bf16=1 is not valid: expected true or false"),
        ({"model": {"window_size": [1]}}, "config: model.window_size=[1] is not valid: expected INT INT"),
        ({"parallel": {"zero": 4}}, "config: parallel.zero=4 is not valid: expected 0|1|2|3"),
        ({"train": 3}, "config: train must be a JSON object, not 3"),
        ({"model_family": "tastes"}, "model_family=tastes is unknown; there is gpt, taste; did you mean taste?"),
        ({"optimizer": {"lr": -1}}, "lr=-1 must not be negative"),
        (
            {"model": {"heterogeneous_layers": [{"attentoin": "no_op"}]}},
            "config: model.heterogeneous_layers[0].attentoin is unknown; did you mean attention?",
        ),
    ],
)
def test_bad_json(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cli.from_json(data, families=FAMILIES)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("content", "message"), [("{", "is not JSON: "), ("[1]", "must hold a JSON object, not list"), ("\xff", "not text")]
)
def test_unreadable_config_file(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=message):
        parse(f"--config {tmp_path / 'c.json'}")
