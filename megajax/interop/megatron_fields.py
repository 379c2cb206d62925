"""The one table of Megatron's config fields: what each becomes here, which are ignored, which are refused."""

# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megajax.config import Activation, ConfigError, heterogeneous_layers_from_json, to_tuple
from megajax.interop.megatron_expert_fields import LATENT_DEFAULTS, MOE_FIELDS, expert_arguments, latent_arguments

Fields = Mapping[str, Any]
Convert = Callable[[Any, Fields], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Mapped:
    """The field decides fields of `TransformerConfig`: `convert(value, all fields)` says which."""

    convert: Convert


@dataclasses.dataclass(frozen=True)
class Plumbing:
    """The field steers processes, kernels, memory or logging, not what a model computes: ignored."""


@dataclasses.dataclass(frozen=True)
class Refused:
    """The field asks for something that is not supported, unless it holds one of these values."""

    defaults: tuple[Any, ...]


Rule = Mapped | Plumbing | Refused


def _same(name: str) -> Mapped:
    return Mapped(lambda value, _: {name: to_tuple(value)})


def _nothing(value: Any, fields: Fields) -> dict[str, Any]:
    """For fields that are read by the conversion of another one."""
    del value, fields
    return {}


ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": "gelu",
    "fast_gelu": "gelu_tanh",
    "gelu_impl": "gelu_tanh",
    "openai_gelu": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "squared_relu": "squared_relu",
    "quick_gelu": "quick_gelu",
}
"""Names of the functions that Megatron's `activation_func` may be."""


def _activation_name(value: Any) -> Activation:
    text = value.__name__ if callable(value) else str(value)
    named = [word for word in re.findall(r"\w+", text) if word in ACTIVATIONS]
    if len(named) != 1:
        raise ConfigError(f"activation_func={text!r} is not supported; use one of {', '.join(ACTIVATIONS)}")
    tanh = named == ["gelu"] and "tanh" in text
    return "gelu_tanh" if tanh else ACTIVATIONS[named[0]]


def _fused_activation(fields: Fields) -> bool:
    return bool(fields.get("bias_activation_fusion") or fields.get("use_te_activation_func"))


def _activation(value: Any, fields: Fields) -> dict[str, Any]:
    name = _activation_name(value)
    # Megatron's fused kernels compute gelu by its tanh approximation; unfused it is exact.
    return {"activation_func": "gelu_tanh" if name == "gelu" and _fused_activation(fields) else name}


def _clamp(value: float | None, fields: Fields) -> dict[str, Any]:
    # The fused swiglu and geglu kernels know no clamp.
    ignored = _fused_activation(fields) and _activation_name(fields.get("activation_func", "gelu")) != "quick_gelu"
    return {} if ignored else {"activation_func_clamp_value": value}


def _dtype(value: Any, fields: Fields) -> dict[str, Any]:
    del fields
    found = re.search(r"bfloat16|float16|float32", str(value))
    if found is None:
        raise ConfigError(f"params_dtype={value} is not supported; use float32, bfloat16 or float16")
    return {"params_dtype": found[0]}


def _window_size(value: Any, fields: Fields) -> dict[str, Any]:
    del fields
    return {"window_size": to_tuple(value) or None}


def _window_skip(value: Any, fields: Fields) -> dict[str, Any]:
    return {"window_attn_skip_freq": to_tuple(value)} if fields.get("window_size") else {}


def _heterogeneous_json(value: str, fields: Fields) -> dict[str, Any]:
    if not value:
        return {}
    try:
        data = json.loads(value)
    except ValueError:
        raise ConfigError("heterogeneous_layers_config_encoded_json is not valid JSON; fix it") from None
    layers = heterogeneous_layers_from_json(
        data, hidden_size=fields["hidden_size"], num_attention_heads=fields["num_attention_heads"]
    )
    return {"heterogeneous_layers": layers}


def _heterogeneous_path(value: str, fields: Fields) -> dict[str, Any]:
    if not value or fields.get("heterogeneous_layers_config_encoded_json"):
        return {}
    try:
        return _heterogeneous_json(Path(value).read_text(encoding="utf-8"), fields)
    except OSError as error:
        raise ConfigError(f"heterogeneous_layers_config_path={value}: {error.strerror}") from None


def _heterogeneous_flag(value: bool, fields: Fields) -> dict[str, Any]:
    sources = ("heterogeneous_layers_config_encoded_json", "heterogeneous_layers_config_path")
    if value and not any(fields.get(name) for name in sources):
        raise ConfigError(f"heterogeneous_block_specs=True needs {sources[0]} or {sources[1]}; give one")
    return {}


def _rope_scaling(value: bool, fields: Fields) -> dict[str, Any]:
    del fields
    return {"rope_scaling_type": "llama3" if value else "none"}


def _rules(names: str, rule: Callable[[str], Rule]) -> dict[str, Rule]:
    return {name: rule(name) for name in names.split()}


def _refused(defaults: Mapping[str, Any]) -> dict[str, Rule]:
    """`{"a b": value}`: fields a and b are refused unless they are `value`, or one of them if it is a tuple."""
    return {
        name: Refused(value if isinstance(value, tuple) else (value,))
        for names, value in defaults.items()
        for name in names.split()
    }


FIELDS: Mapping[str, Rule] = {
    # What a dense model computes.
    **_rules(
        """
        num_layers hidden_size num_attention_heads num_query_groups kv_channels ffn_hidden_size softmax_scale
        softmax_type hidden_dropout attention_dropout fp32_residual_connection layernorm_epsilon
        layernorm_zero_centered_gamma add_bias_linear gated_linear_unit glu_linear_offset
        rotary_interleaved normalization qk_layernorm qk_l2_norm attention_output_gate no_rope_freq init_method_std
        embedding_init_method_std apply_query_key_layer_scaling attention_softmax_in_fp32 fp16 bf16
        yarn_rotary_scaling_factor yarn_original_max_position_embeddings yarn_beta_fast yarn_beta_slow yarn_mscale
        yarn_mscale_all_dim yarn_correction_range_round_to_int
        """,
        _same,
    ),
    # Multi-latent attention does not read it.
    "add_qkv_bias": Mapped(lambda value, fields: {"add_qkv_bias": value and not fields.get("multi_latent_attention")}),
    "params_dtype": Mapped(_dtype),
    "activation_func": Mapped(_activation),
    "activation_func_clamp_value": Mapped(_clamp),
    "bias_activation_fusion": Mapped(_nothing),
    "use_te_activation_func": Mapped(_nothing),
    "mrope_section": Mapped(lambda value, _: {"mrope_section": to_tuple(value) if value else None}),
    "window_size": Mapped(_window_size),
    "window_attn_skip_freq": Mapped(_window_skip),
    "heterogeneous_layers_config_encoded_json": Mapped(_heterogeneous_json),
    "heterogeneous_layers_config_path": Mapped(_heterogeneous_path),
    "heterogeneous_block_specs": Mapped(_heterogeneous_flag),
    # Megatron's command line sets these on the config beside the constructor's arguments; see `megatron_config`.
    "position_embedding_type": Mapped(_nothing),
    "rotary_base": Mapped(_nothing),
    "rotary_percent": Mapped(_nothing),
    "num_moe_experts": Mapped(expert_arguments),
    "multi_latent_attention": Mapped(latent_arguments),
    **{name: Mapped(_nothing) for name in (*MOE_FIELDS[1:], *LATENT_DEFAULTS)},
    "mtp_num_layers": Mapped(lambda value, _: {"mtp_num_layers": value or None}),
    "mtp_loss_scaling_factor": Mapped(lambda value, _: {} if value is None else {"mtp_loss_scaling_factor": value}),
    # Layout over processes, kernels, memory, communication, logging. apply_residual_connection_post_layernorm is here
    # because Megatron-Core's layers do not read it.
    **_rules(
        """
        apply_residual_connection_post_layernorm account_for_embedding_in_pipeline_split
        account_for_loss_in_pipeline_split activation_func_fp8_input_store activation_offload_fraction
        async_tensor_model_parallel_allreduce attention_backend autocast_dtype barrier_with_L1_time
        batch_invariant_backend batch_invariant_mode batch_p2p_comm batch_p2p_sync bias_dropout_fusion
        apply_rope_fusion calculate_per_token_loss clone_scatter_output_in_embedding config_logger_dir
        context_parallel_size cp_comm_type cpu_offloading cpu_offloading_activations
        cpu_offloading_double_buffering cpu_offloading_num_layers cpu_offloading_retain_pinned_cpu_buffers
        cpu_offloading_weights _cpu_offloading_context cross_entropy_fusion_impl cross_entropy_loss_fusion
        cuda_graph_impl cuda_graph_modules cuda_graph_retain_backward_graph cuda_graph_scope
        cuda_graph_use_single_mempool cuda_graph_warmup_steps deallocate_pipeline_outputs
        defer_embedding_wgrad_compute delay_offload_until_cuda_graph delay_wgrad_compute
        delta_offload_bytes_across_pp_ranks deterministic_mode disable_bf16_reduced_precision_matmul
        disable_parameter_transpose_cache distribute_saved_activations embedding_init_method enable_autocast
        enable_cuda_graph ep_overlap_early_attn_memory_release expert_gtp_weight_remat_size
        expert_model_parallel_size expert_tensor_parallel_num_weight_shards expert_tensor_parallel_size
        external_cuda_graph finalize_model_grads_func fine_grained_activation_offloading
        fine_grained_offloading_max_inflight_offloads flash_attention_version flash_decode fused_residual_rmsnorm
        fused_single_qkv_rope grad_scale_func grad_sync_func gradient_accumulation_fusion gtp_remat_opt_in_modules
        gtp_weight_remat_size hetereogenous_dist_checkpoint hierarchical_context_parallel_sizes
        high_priority_a2a_comm_stream hybrid_context_parallel inference_cuda_graph_scope
        inference_disable_triton_nvls_kernels inference_fuse_tp_communication inference_grouped_gemm_backend
        inference_moe_disable_fused_quant_kernels inference_moe_token_dispatcher_type inference_rng_tracker
        inference_sampling_seed init_method init_model_with_meta_device log_max_attention_logit
        masked_softmax_fusion max_seqlen_per_dp_cp_rank memory_efficient_layer_norm
        microbatch_group_size_per_vp_stage min_offloaded_tensor_size mlp_chunks_for_prefill mlp_chunks_for_training
        nccl_all_reduce_for_prefill no_sync_func num_layers_in_first_pipeline_stage
        num_layers_in_last_pipeline_stage num_microbatches_with_partial_activation_checkpoints offload_modules
        output_layer_init_method overlap_dispatch_backward_with_experts_wgrad overlap_moe_expert_parallel_comm
        overlap_p2p_comm overlap_p2p_comm_warmup_flush param_sync_func per_block_parameters perform_initialization
        persist_layer_norm pipeline_dtype pipeline_model_parallel_comm_backend pipeline_model_parallel_layout
        pipeline_model_parallel_size qk_clip_alpha qk_clip_threshold quant_recipe recompute_granularity
        recompute_method recompute_modules recompute_num_layers sequence_parallel symmetric_ar_type
        tensor_model_parallel_size tensor_parallel_num_weight_shards test_mode timers tp_comm_atomic_ag
        tp_comm_atomic_rs tp_comm_bootstrap_backend tp_comm_bulk_dgrad tp_comm_bulk_wgrad tp_comm_overlap
        tp_comm_overlap_ag tp_comm_overlap_disable_fc1 tp_comm_overlap_disable_qkv tp_comm_overlap_rs
        tp_comm_overlap_rs_dgrad tp_comm_split_ag tp_comm_split_rs transformer_impl use_cpu_initialization
        use_fused_weighted_squared_relu use_inference_optimized_layers use_mamba_mem_eff_path
        use_ring_exchange_p2p use_te_rng_tracker use_transformer_engine_op_fuser variable_seq_lengths
        virtual_pipeline_model_parallel_size wgrad_deferral_limit
        moe_router_dtype moe_router_force_biased moe_shared_expert_glu_interleave_size moe_mlp_glu_interleave_size
        moe_flex_dispatcher_num_sms moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute
        moe_grad_scale_func moe_shared_expert_overlap moe_grouped_gemm moe_use_legacy_grouped_gemm moe_token_dropping
        moe_router_padding_for_quantization moe_router_padding_for_fp8 moe_use_grouped_tensor
        moe_single_grouped_weight moe_single_grouped_bias moe_enable_deepep moe_permute_fusion_into_hybridep
        moe_hybridep_pad_uneven_dispatch_inputs moe_per_layer_logging moe_pad_experts_for_cuda_graph_inference
        moe_layer_recompute moe_permute_fusion moe_router_fusion moe_ncclep_zero_copy moe_paged_stash
        use_grouped_gemm_for_shared_expert use_grouped_gemm_for_dense_mlp moe_paged_stash_buffer_size_factor_cpu
        moe_flex_dispatcher_backend moe_deepep_num_sms moe_hybridep_num_sms moe_hybridep_num_sms_preprocessing
        moe_dispatch_fwd_dtype moe_combine_bwd_dtype moe_paged_stash_page_size moe_paged_stash_buffer_size_factor_cuda
        mla_down_proj_fusion
        """,
        lambda _: Plumbing(),
    ),
    **_refused(
        {
            # Mixture of experts
            "moe_router_topk_limited_devices moe_expert_rank_capacity_factor": None,
            """
            moe_router_force_load_balancing moe_enable_routing_replay moe_extended_tp cache_mla_latents
            """: False,
            "moe_router_quantile_balancing_ema": 0.0,
            # Multi-token prediction, sparse and linear attention, maximal update parametrisation, hyper-connections
            "mtp_hybrid_override_pattern mtp_grad_scale_func": None,
            "mtp_use_repeated_layer mtp_detach_heads mtp_hsm mtp_standalone": False,
            """
            experimental_attention_variant experimental_attention_variant_loss_scale_func dsa_indexer_n_heads
            dsa_indexer_head_dim dsa_indexer_topk dsa_indexer_loss_coeff dsa_indexer_k_norm_epsilon
            linear_attention_freq mup_base_hidden_size mup_base_head_dim mhc_recompute_layer_num
            """: None,
            "dsa_indexer_use_sparse_loss dsa_indexer_rope_interleaved dsa_indexer_k_norm_fp32 use_mup": False,
            "dsa_indexer_rotate_activation dsa_indexer_scoring_relu": True,
            "dsa_indexer_topk_freq": 1,
            "dsa_indexer_skip_topk_offset": 0,
            "dsa_kernel_backend": "none",
            "linear_conv_kernel_dim": 4,
            "linear_key_head_dim linear_value_head_dim": 128,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "mup_width_mult mup_embedding_mult mup_output_mult mup_attn_scale_power": 1.0,
            "enable_mhc_connections qk_clip": False,
            "mhc_num_residual_streams": 4,
            "mhc_sinkhorn_iterations": 20,
            "mhc_init_gating_factor": 0.01,
            # State space and hybrid models, multimodal positions
            "mamba_num_heads mamba_training_ssm_states_dtype": None,
            "is_hybrid_model gdp_cutedsl_kernel": False,
            "mamba_state_dim": 128,
            "mamba_head_dim": 64,
            "mamba_num_groups": 8,
            "gdp_num_householder": 3,
            "gdp_num_chunk_states_to_recompute": 2,
            # 8- and 4-bit arithmetic
            "fp8 fp8_quantizer_factory fp4 fp4_quantizer_factory": None,
            """
            fp8_param fp8_output_proj fp8_dot_product_attention fp8_multi_head_attention tp_only_amax_red
            first_last_layers_bf16 use_kitchen use_kitchen_attention fp4_param
            """: False,
            "fp8_wgrad": True,
            "fp8_recipe": "delayed",
            "fp8_margin": 0,
            "fp8_interval fp8_amax_history_len num_layers_at_start_in_bf16 num_layers_at_end_in_bf16": 1,
            "fp8_amax_compute_algo": "most_recent",
            "kitchen_attention_backend": "sdpa",
            "fp4_recipe": "nvfp4",
        }
    ),
}
"""Every field of Megatron-Core's TransformerConfig (0.15 to 0.19), and those of its subclasses that concern GPT."""

MODEL_ARGUMENTS: Mapping[str, Rule] = {
    **_rules(
        """
        vocab_size max_sequence_length position_embedding_type rotary_percent rotary_base rope_scaling_factor
        seq_len_interpolation_factor share_embeddings_and_output_weights qk_layernorm qk_l2_norm
        """,
        _same,
    ),
    "rope_scaling": Mapped(_rope_scaling),
    **_rules(
        """
        pre_process post_process parallel_output fp16_lm_cross_entropy scatter_embedding_sequence_parallel
        pg_collection vp_stage transformer_layer_spec normalization use_transformer_engine prefill mtp_block_spec
        num_experts moe_grouped_gemm multi_latent_attention
        """,
        lambda _: Plumbing(),
    ),
    **_refused(
        {
            "logit_dtype fp8": None,
            "use_te_op_fuser use_kitchen": False,
        }
    ),
}
"""Arguments of GPTModel's constructor and of the functions that build its layer spec."""
