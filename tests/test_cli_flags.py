"""The tables of flags: every field has one flag, every flag sets its field, and the help shows them all."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, get_args

import pytest

from megajax import cli, cli_effects, cli_flags
from megajax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    DistributedConfig,
    KernelConfig,
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
    """How many tastes there are. And what they are."""


@dataclasses.dataclass(frozen=True)
class Family:
    """A record as the registry has them."""

    name: str
    config_type: type[TransformerConfig]
    default: Config
    presets: Mapping[str, Callable[[], TransformerConfig]]


DEFAULT = Config(model_family="gpt", model=TransformerConfig(num_layers=2, hidden_size=48, num_attention_heads=4))
TASTE = Config(model_family="taste", model=TasteConfig(num_layers=1, hidden_size=32, num_attention_heads=2))


def _preset() -> TransformerConfig:
    return DEFAULT.model.replace(ffn_hidden_size=96)


FAMILIES = {
    "gpt": Family("gpt", TransformerConfig, DEFAULT, {"narrow": _preset}),
    "taste": Family("taste", TasteConfig, TASTE, {}),
}


@pytest.mark.parametrize("config_type", [TransformerConfig, TasteConfig])
def test_flags_are_unique(config_type: type[TransformerConfig]) -> None:
    names = Counter(
        field.name
        for owner in cli_flags.group_types(config_type).values()
        for field in dataclasses.fields(owner)
        if field.init
    )
    assert [name for name, count in names.items() if count > 1] == []
    flags = [cli_flags.spell(name) for name in names]
    flags += ["--no-" + f.name.replace("_", "-") for f in cli_flags.flags_of(config_type).values() if f.is_bool]
    others = [*cli_flags.CONTROL, *cli_flags.ALIASES, *cli_flags.SWITCHES, *cli_flags.RECORD_FILES]
    assert [flag for flag, count in Counter(flags + others).items() if count > 1] == []


def test_tables_name_fields_that_exist() -> None:
    flags = cli_flags.flags_of(TransformerConfig)
    named = {*cli_flags.ALIASES.values(), *cli_flags.RECORD_FILES.values()}
    named |= {name for one, others in cli_flags.REPLACES.items() for name in (one, *others)}
    named |= {field for changes in cli_flags.SWITCHES.values() for field in changes}
    named |= {name for row in cli_effects.NO_EFFECT for name in row.names if not name.startswith("--")}
    assert named - flags.keys() == set()


# Words for each type, with what they mean; other fields may be needed to make the value legal.
SAMPLES = {int: ("6", 6), float: ("0.5", 0.5), str: ("words", "words")}
SPECIAL = {
    "window_size": ("3 0", (3, 0)),
    "window_attn_skip_freq": ("1 0", (1, 0)),
    "no_rope_freq": ("2", 2),
    "rope_short_factor": ("1 2 3", (1.0, 2.0, 3.0)),
    "rope_long_factor": ("1 2 3", (1.0, 2.0, 3.0)),
    "recompute_modules": ("mlp layernorm", ("mlp", "layernorm")),
    "coordinator": ("node0:8476", "node0:8476"),
    "split": ("1,1,1", "1,1,1"),
    "data": ("a b", ("a", "b")),
    "rampup_batch_size": ("1 2 3", (1, 2, 3)),
    "spike_factor": ("2", 2.0),
    "num_attention_heads": ("8", 8),
    "num_query_groups": ("2", 2),
    "hidden_size": ("96", 96),
    "num_layers": ("4", 4),
    "moe_router_load_balancing_type": ("seq_aux_loss", "seq_aux_loss"),
    "moe_router_num_groups": ("4", 4),
    "moe_router_group_topk": ("2", 2),
    "moe_layer_freq": ("2", 2),
    "rope_scaling_type": ("llama3", "llama3"),
    "recompute_granularity": ("full", "full"),
}


def _sample(flag: cli_flags.Flag) -> tuple[list[str], Any]:
    """Words that set the field to something else than its default, and that value."""
    if flag.name in SPECIAL:
        words, value = SPECIAL[flag.name]
        return [cli_flags.spell(flag.name), *words.split()], value
    if flag.is_bool:
        old = getattr(getattr(DEFAULT, flag.group), flag.name)
        return [cli_flags.spell(flag.name).replace("--", "--no-" if old else "--", 1)], not old
    choices = [choice for part in (flag.annotation, *get_args(flag.annotation)) for choice in get_args(part)]
    plain = next((kind for kind in SAMPLES if kind in (flag.annotation, *get_args(flag.annotation))), None)
    words, value = SAMPLES[plain] if plain else (str(choices[-1]), choices[-1])
    return [cli_flags.spell(flag.name), words], value


ENABLERS = {
    "--position-embedding-type rope": (
        "rotary_base rotary_percent rotary_interleaved seq_len_interpolation_factor rope_scaling_type no_rope_freq"
    ),
    "--position-embedding-type rope --rope-scaling-type llama3": (
        "rope_scaling_factor rope_low_freq_factor rope_high_freq_factor rope_original_max_position_embeddings"
    ),
    "--position-embedding-type rope --rope-scaling-type longrope --rotary-percent 0.5 --rope-short-factor 3 2 1": (
        "rope_long_factor"
    ),
    "--position-embedding-type rope --rope-scaling-type longrope --rotary-percent 0.5 --rope-long-factor 3 2 1": (
        "rope_short_factor"
    ),
    "--position-embedding-type yarn": (
        "rope_attention_factor yarn_rotary_scaling_factor yarn_original_max_position_embeddings yarn_beta_fast"
        " yarn_beta_slow yarn_mscale yarn_mscale_all_dim yarn_correction_range_round_to_int"
    ),
    "--num-experts 8": (
        "expert_model_parallel_size expert_tensor_parallel_size moe_layer_freq moe_ffn_hidden_size moe_router_topk"
        " moe_router_score_function moe_router_pre_softmax moe_router_topk_scaling_factor"
        " moe_router_load_balancing_type moe_aux_loss_coeff grouped_gemm_backend"
        " moe_z_loss_coeff moe_input_jitter_eps moe_token_dispatcher_type moe_expert_capacity_factor"
        " moe_token_drop_policy moe_shared_expert_intermediate_size moe_shared_expert_gate moe_latent_size"
    ),
    "--num-experts 8 --moe-router-topk 4 --moe-router-group-topk 2": "moe_router_num_groups",
    "--num-experts 8 --moe-router-topk 4 --moe-router-num-groups 4": "moe_router_group_topk",
    "--num-experts 16 --moe-router-topk 4 --moe-router-num-groups 2 --moe-router-group-topk 1": (
        "moe_router_group_score_topk"
    ),
    "--num-experts 8 --moe-router-score-function sigmoid": "moe_router_enable_expert_bias moe_router_norm_topk_prob",
    "--num-experts 8 --moe-router-score-function sigmoid --moe-router-enable-expert-bias": (
        "moe_router_bias_update_rate"
    ),
    "--num-experts 8 --moe-expert-capacity-factor 2": "moe_pad_expert_input_to_capacity",
    "--num-experts 8 --moe-router-topk 1 --moe-router-pre-softmax": "moe_apply_probs_on_input",
    "--multi-latent-attention": (
        "q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim qk_pos_emb_interleaved"
        " latent_layernorm_epsilon"
    ),
    "--fp8-format hybrid": "fp8_recipe first_last_layers_bf16",
    "--fp8-format hybrid --fp8-recipe delayed": ("fp8_margin fp8_amax_history_len fp8_amax_compute_algo fp8_wgrad"),
    "--fp8-format hybrid --first-last-layers-bf16": "num_layers_at_start_in_bf16 num_layers_at_end_in_bf16",
    "--mtp-num-layers 1": "mtp_loss_scaling_factor",
    "--window-size 3 0": "window_attn_skip_freq",
    "--disable-bias-linear": "add_qkv_bias",
    "--swiglu": "glu_linear_offset activation_func_clamp_value",
    "--fp16": "fp32_residual_connection loss_scale initial_loss_scale min_loss_scale loss_scale_window hysteresis",
    "--recompute-method uniform --recompute-num-layers 1": "recompute_granularity",
    "--recompute-granularity full --recompute-num-layers 1": "recompute_method",
    "--recompute-granularity full --recompute-method block": "recompute_num_layers",
    "--recompute-activations": "recompute_modules",
    "--qk-layernorm": "apply_wd_to_qk_layernorm",
    "--tp 2": "sequence_parallel",
    "--pp 2": (
        "num_virtual_stages_per_pipeline_rank pipeline_model_parallel_layout decoder_first_pipeline_num_layers"
        " decoder_last_pipeline_num_layers pipeline_schedule pipeline_engine"
    ),
    "--pp 2 --pipeline-engine table": "microbatch_group_size_per_vp_stage",
    "--pp 2 --ep 2 --num-experts 2": "overlap_moe_expert_parallel_comm",
    "--optimizer sgd": "sgd_momentum",
    "--optimizer lion": "lion_beta1 lion_beta2",
    "--optimizer muon": (
        "muon_momentum muon_use_nesterov muon_num_ns_steps muon_coefficient_type muon_scale_mode"
        " muon_extra_scale_factor muon_scalar_optimizer"
    ),
    "--lr 1": "min_lr",
    "--lr-warmup-iters 2": "lr_warmup_init",
    "--lr-decay-style WSD": "lr_wsd_decay_iters lr_wsd_decay_samples",
    "--lr-wsd-decay-iters 3": "lr_decay_style",
    "--lr-wsd-decay-iters 3 --lr-decay-style WSD": "lr_wsd_decay_style",
    "--decoupled-lr 1": "decoupled_min_lr",
    "--start-weight-decay 0.1 --end-weight-decay 0.2": "weight_decay_incr_style",
    "--weight-decay-incr-style linear --end-weight-decay 0.2": "start_weight_decay",
    "--weight-decay-incr-style linear --start-weight-decay 0.1": "end_weight_decay",
    "--data a.jsonl": "json_key",
    "--load there": "finetune",
    "--profile-step-start 1": "profile_step_end",
}
"""What the command line must also say -> the fields that do something only then."""


REACHABLE = [
    name
    for name, flag in cli_flags.flags_of(TransformerConfig).items()
    if not flag.is_record and name not in ("cp_comm_type", "hierarchical_context_parallel_sizes", "mrope_section")
]


def test_context_parallelism_in_two_ways_at_once() -> None:
    line = "--cp 6 --cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 2 3"
    parallel = cli.parse(line.split(), prog="train", families=FAMILIES).parallel
    assert (parallel.ulysses_size, parallel.ring_size) == (2, 3)


@pytest.mark.parametrize("name", REACHABLE)
def test_every_field_is_reachable(name: str) -> None:
    flag = cli_flags.flags_of(TransformerConfig)[name]
    words, value = _sample(flag)
    also = [word for line, names in ENABLERS.items() if name in names.split() for word in line.split()]
    config = cli.parse([*also, *words], prog="train", families=FAMILIES)
    assert getattr(getattr(config, flag.group), name) == value


@pytest.mark.parametrize("line", ["--help", "-h", "--preset narrow --help", "--model taste --help"])
def test_help(line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as caught:
        cli.parse(line.split(), prog="train", families=FAMILIES)
    assert caught.value.code == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert len(lines) <= 340
    assert max(map(len, lines)) <= 120
    for heading in ("program", "model: attention", "parallel", "optimizer", "data", "checkpoint", "train"):
        assert heading in lines
    config_type = FAMILIES["taste" if "taste" in line else "gpt"].config_type
    for name, flag in cli_flags.flags_of(config_type).items():
        assert flag.is_record or cli_flags.spell(name)[2:] in text
    width = {"--help": "[192]", "-h": "[192]", "--preset narrow --help": "[96]", "--model taste --help": "[128]"}
    assert next(row for row in lines if "--ffn-hidden-size" in row).endswith(width[line])
    assert ("model: taste" in lines) == ("taste" in line)
    headings = [row for row in lines if row and not row.startswith((" ", "usage", "A flag"))]
    assert len(set(headings)) == len(headings), "no section in two pieces"
    assert headings[1] == ("model: taste" if "taste" in line else "model: shape"), "what a family adds comes first"
    assert "Key/value heads (GQA); 1 is MQA [" in text


def test_groups_of_the_default_are_the_config_classes() -> None:
    groups = cli_flags.group_types(TransformerConfig)
    assert groups == {
        "model": TransformerConfig,
        "parallel": ParallelConfig,
        "kernels": KernelConfig,
        "distributed": DistributedConfig,
        "optimizer": OptimizerConfig,
        "data": DataConfig,
        "checkpoint": CheckpointConfig,
        "train": TrainConfig,
    }
