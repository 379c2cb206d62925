"""Every option of megajax: frozen, validated dataclasses, one group per owner. Plain Python, touches no device.

Field names are Megatron's where Megatron has the option; the command line derives its flags from them.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from typing import Any, Literal, Self

from megajax.config_checks import (
    ConfigError,
    parse_split,
    require,
    require_divides,
    require_fraction,
    require_positive,
    to_tuple,
)
from megajax.config_distributed import DistributedConfig
from megajax.config_heterogeneous import HeterogeneousLayer, heterogeneous_layers_from_json
from megajax.config_kernels import Fp8LayersConfig, KernelConfig
from megajax.config_moe import LatentAttentionConfig, MoEConfig
from megajax.config_optimizer import OptimizerConfig
from megajax.config_parallel import ParallelConfig
from megajax.config_positions import PositionConfig, PositionEmbedding, RopeScaling
from megajax.config_run import CheckpointConfig, DataConfig, TrainConfig

__all__ = [
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DistributedConfig",
    "HeterogeneousLayer",
    "KernelConfig",
    "LatentAttentionConfig",
    "MoEConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PositionEmbedding",
    "RopeScaling",
    "TrainConfig",
    "TransformerConfig",
    "heterogeneous_layers_from_json",
    "parse_split",
    "to_tuple",
]

Activation = Literal["gelu", "gelu_tanh", "silu", "relu", "squared_relu", "quick_gelu"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig(MoEConfig, LatentAttentionConfig, PositionConfig, Fp8LayersConfig):
    """Architecture of a transformer stack and of the language model around it.

    Names and meaning follow Megatron-Core's `TransformerConfig` (`megatron/core/transformer/transformer_config.py`)
    and the arguments of its `GPTModel`. Fields left `None` that have a rule are filled in, as there:
    `kv_channels = hidden_size / num_attention_heads`, `ffn_hidden_size = 4 hidden_size`, `num_query_groups =
    num_attention_heads`. Change a config with `replace`, which fills them in again.

    Raises:
      ConfigError: a value is out of range, or two fields contradict each other.
    """

    # Shape
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int | None = None
    """Key/value heads (GQA); 1 is MQA."""
    kv_channels: int | None = None
    """Size of one attention head."""
    ffn_hidden_size: int | None = None

    # Vocabulary
    vocab_size: int | None = None
    make_vocab_size_divisible_by: int = 1
    """Pads the tables to a multiple of this; padded ids get no probability."""
    max_sequence_length: int | None = None
    share_embeddings_and_output_weights: bool = True
    embedding_multiplier: float = 1.0
    """What embedded words are multiplied by; Gemma: sqrt(hidden_size)."""

    # Attention
    softmax_scale: float | None = None
    scale_attn_by_inverse_layer_idx: bool = False
    """Layer i, from 1, divides its scores by i, too (and is compiled alone)."""
    attn_logit_softcapping: float | None = None
    """Scores become `cap * tanh(scores / cap)` (arXiv:2408.00118)."""
    softmax_type: Literal["vanilla", "off-by-one", "learnable"] = "vanilla"
    attention_softmax_in_fp32: bool = True
    apply_query_key_layer_scaling: bool = False
    window_size: tuple[int, int] | None = None
    """(left, right) keys visible beside the query's own; -1 = unlimited."""
    window_attn_skip_freq: int | tuple[int, ...] | None = None
    """int N: every N-th layer sees everything; or a 0/1 list, 1 = windowed."""
    qk_layernorm: bool = False
    qk_l2_norm: bool = False
    attention_output_gate: bool = False
    add_qkv_bias: bool = False
    add_attention_proj_bias: bool | None = None
    """Bias of `linear_proj`; None follows `add_bias_linear`."""

    # MLP
    activation_func: Activation = "gelu"
    gated_linear_unit: bool = False
    glu_linear_offset: float = 0.0
    activation_func_clamp_value: float | None = None
    add_mlp_bias: bool | None = None
    """Biases of the MLP; None follows `add_bias_linear`."""

    # Layer
    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    layernorm_epsilon: float = 1e-5
    layernorm_zero_centered_gamma: bool = False
    sandwich_norm: bool = False
    """A norm of what each sublayer gives, too (arXiv:2105.13290)."""
    add_bias_linear: bool = True
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    apply_residual_connection_post_layernorm: bool = False
    fp32_residual_connection: bool = False
    heterogeneous_layers: tuple[HeterogeneousLayer, ...] | None = None
    """Per-layer attention and MLP of a Nemotron-NAS model; read it with `heterogeneous_layers_from_json`."""

    # Initialisation
    init_method_std: float = 0.02
    embedding_init_method_std: float | None = None

    # Precision and memory
    bf16: bool = False
    fp16: bool = False
    params_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    recompute_granularity: Literal["full", "selective"] | None = None
    recompute_method: Literal["uniform", "block"] | None = None
    recompute_num_layers: int | None = None
    recompute_modules: tuple[Literal["core_attn", "mlp", "layernorm"], ...] = ("core_attn",)

    # Loss
    final_logit_softcapping: float | None = None
    """Logits become `cap * tanh(logits / cap)` (arXiv:2408.00118)."""
    label_smoothing: float = 0.0
    z_loss_coeff: float = 0.0
    """Adds z_loss_coeff * logsumexp(logits)^2 to the loss of each token."""
    mtp_num_layers: int | None = None
    """Modules that predict one token further each (arXiv:2404.19737, 2412.19437)."""
    mtp_loss_scaling_factor: float = 0.1

    _derived: frozenset[str] = dataclasses.field(default=frozenset(), init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        require_positive(self, "num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
        require_positive(self, "ffn_hidden_size", "vocab_size", "max_sequence_length", "make_vocab_size_divisible_by")
        if self.kv_channels is None:
            require_divides("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        self._derive("kv_channels", self.hidden_size // self.num_attention_heads)
        self._derive("num_query_groups", self.num_attention_heads)
        self._derive("ffn_hidden_size", 4 * self.hidden_size)
        self._derive("embedding_init_method_std", self.init_method_std)
        self._derive("add_attention_proj_bias", self.add_bias_linear)
        self._derive("add_mlp_bias", self.add_bias_linear)
        if self.num_moe_experts is not None:
            self._derive("moe_ffn_hidden_size", self.ffn_hidden_size)
        self._validate_attention()
        self._validate_latent_attention()
        self._validate_moe(self.num_layers)
        self._validate_positions(self.rotary_dim)
        self._validate_rest()

    def _derive(self, name: str, value: Any) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)
            object.__setattr__(self, "_derived", self._derived | {name})

    def _validate_attention(self) -> None:
        require_divides("num_attention_heads", self.num_attention_heads, "num_query_groups", self.num_query_groups or 0)
        require(
            not (self.qk_layernorm and self.qk_l2_norm), "qk_l2_norm=True excludes qk_layernorm=True; set one of them"
        )
        require(
            not (self.scale_attn_by_inverse_layer_idx and self.multi_latent_attention),
            "scale_attn_by_inverse_layer_idx=True is not possible with multi_latent_attention; drop one",
        )
        require_positive(self, "attn_logit_softcapping", "final_logit_softcapping", "embedding_multiplier")
        if self.window_size is not None:
            require(
                len(self.window_size) == 2 and min(self.window_size) >= -1,
                f"window_size={self.window_size} must be two numbers (left, right), each -1 or more",
            )
        if self.window_attn_skip_freq is not None:
            require(
                self.window_size is not None,
                f"window_attn_skip_freq={self.window_attn_skip_freq} has no effect without window_size; set it",
            )
        for name in ("window_attn_skip_freq", "no_rope_freq"):
            self._validate_layer_pattern(name)

    def _validate_layer_pattern(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, int):
            require(value > 0, f"{name}={value} must be at least 1")
        elif value is not None:
            require(
                len(value) == self.num_layers and set(value) <= {0, 1},
                f"{name} has {len(value)} entries; give num_layers={self.num_layers} zeros and ones",
            )
        if name == "no_rope_freq" and isinstance(value, int):
            require_divides("num_layers", self.num_layers, "no_rope_freq", value)

    def _validate_rest(self) -> None:
        require(not (self.bf16 and self.fp16), "bf16=True excludes fp16=True; set one of them")
        require_fraction(self, "hidden_dropout", "attention_dropout", "label_smoothing")
        if self.recompute_granularity == "full":
            require(self.recompute_method is not None, "recompute_granularity='full' needs recompute_method")
            require(
                self.recompute_num_layers is not None and self.recompute_num_layers > 0,
                "recompute_granularity='full' needs recompute_num_layers of at least 1",
            )
        else:
            require(
                self.recompute_method is None and self.recompute_num_layers is None,
                "recompute_method and recompute_num_layers need recompute_granularity='full'",
            )
        if self.heterogeneous_layers is not None:
            require(
                len(self.heterogeneous_layers) == self.num_layers,
                f"heterogeneous_layers has {len(self.heterogeneous_layers)} entries; give num_layers={self.num_layers}",
            )

    def replace(self, **changes: Any) -> Self:
        """A copy with `changes`; fields that were filled in from others are filled in again."""
        stale = {name: None for name in self._derived if name not in changes}
        return dataclasses.replace(self, **stale, **changes)

    @property
    def rotary_dim(self) -> int:
        """Features of each head that are rotated."""
        assert self.kv_channels is not None
        if self.multi_latent_attention:
            return int(self.qk_pos_emb_head_dim * self.rotary_percent)
        return int(self.kv_channels * self.rotary_percent)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table."""
        if self.vocab_size is None:
            raise ConfigError("vocab_size=None; a language model needs the size of its vocabulary")
        k = self.make_vocab_size_divisible_by
        return -(-self.vocab_size // k) * k

    @property
    def compute_dtype(self) -> str:
        """Name of the dtype of activations and matrix products."""
        return "bfloat16" if self.bf16 else "float16" if self.fp16 else self.params_dtype

    @property
    def mixed_precision(self) -> bool:
        """Whether the dtype of activations is not that of the parameters."""
        return self.compute_dtype != self.params_dtype

    def for_layer(self, index: int) -> Self:
        """The config of layer `index` (from 0): per-layer patterns resolved, so equal layers have equal configs."""
        changes: dict[str, Any] = {}
        number = index + 1  # Megatron counts layers from 1
        if self.window_attn_skip_freq is not None:
            freq = self.window_attn_skip_freq
            windowed = number % freq != 0 if isinstance(freq, int) else freq[index] == 1
            changes |= {"window_attn_skip_freq": None, "window_size": self.window_size if windowed else None}
        if self.scale_attn_by_inverse_layer_idx:
            scale = self.softmax_scale or (self.kv_channels or 1) ** -0.5
            changes |= {"scale_attn_by_inverse_layer_idx": False, "softmax_scale": scale / number}
        if self.no_rope_freq is not None:
            freq = self.no_rope_freq
            skipped = number % freq == 0 if isinstance(freq, int) else freq[index] == 1
            changes |= {"no_rope_freq": 1 if skipped else None}
        if self.heterogeneous_layers is not None:
            layer = self.heterogeneous_layers[index]
            changes |= {"heterogeneous_layers": None}
            changes |= {"num_query_groups": layer.num_query_groups} if layer.num_query_groups else {}
            changes |= {"ffn_hidden_size": layer.ffn_hidden_size} if layer.ffn_hidden_size else {}
        if self.num_moe_experts is not None:
            dense = {"num_moe_experts": None, "moe_ffn_hidden_size": None}
            changes |= {"moe_layer_freq": 1} | ({} if self.is_moe_layer(index) else dense)
        changes |= self._fp8_of_layer(index, self.num_layers)
        return dataclasses.replace(self, **changes)

    def for_further_layer(self, depth: int) -> Self:
        """The config of the layer of multi-token prediction `depth` (from 0).

        It is like the last one; `window_attn_skip_freq` as a number goes on counting, as in Megatron. It is none of
        `first_last_layers_bf16`.
        """
        alike = dataclasses.replace(self, first_last_layers_bf16=False)
        last, freq = alike.for_layer(self.num_layers - 1), self.window_attn_skip_freq
        if not isinstance(freq, int):
            return last
        windowed = (self.num_layers + depth + 1) % freq != 0
        return dataclasses.replace(last, window_size=self.window_size if windowed else None)

    @property
    def frozen_parameters(self) -> tuple[str, ...]:
        """Names at the top of the parameter tree below which training changes nothing."""
        return ()

    @property
    def residual_branches(self) -> int:
        """How often the layers add to the residual stream: their output weights start smaller by the root of it."""
        return 2 * self.num_layers

    @property
    def ssm_groups(self) -> int | None:
        """Groups of heads of a state space layer that share B and C; None: there is no such layer."""
        return None

    @property
    def draws_noise(self) -> bool:
        """Whether training depends on random numbers beside the first weights."""
        return max(self.hidden_dropout, self.attention_dropout, self.moe_input_jitter_eps or 0.0) > 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything one training run needs. `model_family` names an entry of `megajax.models.registry`."""

    model_family: str
    model: TransformerConfig
    parallel: ParallelConfig = ParallelConfig()
    kernels: KernelConfig = KernelConfig()
    distributed: DistributedConfig = DistributedConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataConfig = DataConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    train: TrainConfig = TrainConfig()
