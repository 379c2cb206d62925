"""A mixture of experts in place of an MLP: router, experts, and what all tokens share."""

# SPDX-License-Identifier: Apache-2.0
# B batch, S sequence, D hidden, E experts, K experts a token, F ffn hidden of an expert, L latent width
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from megajax import kernels
from megajax.config import TransformerConfig
from megajax.config_kernels import Fp8
from megajax.kernels import Choice
from megajax.ops.activations import ACTIVATIONS, activate, gated
from megajax.ops.attach import attach
from megajax.ops.grouped import LOOP, GroupedKernel, Groups, expert_counts, grouped_bias, grouped_matmul
from megajax.ops.router import Routing, load_balancing_loss, route, sinkhorn_route, z_loss
from megajax.parallel.expert import Dispatcher, ExpertSteps, dispatch
from megajax.parallel.expert_exchange import Sent
from megajax.parallel.gradient_sums import FP8_META
from megajax.parallel.noise import uniform
from megajax.parallel.replicas import across, axes_apart, parts_apart
from megajax.parallel.sharding import constrain, summed_as_it_lies
from megajax.spec import Builder
from megajax.transformer.fp8 import meta_shape, scales_of
from megajax.transformer.linear import init_std, normal_init, output_init_std, zeros_init

Array = jax.Array


@dataclasses.dataclass(unsafe_hash=True, kw_only=True)
class MoESubmodules:
    """Slots of `MoELayer`. linear_fc1, linear_fc2: the maps to and from the latent space."""

    router: Builder
    experts: Builder
    shared_experts: Builder
    linear_fc1: Builder
    linear_fc2: Builder


def routing(config: TransformerConfig) -> Routing:
    """The rule that a config describes."""
    score = config.moe_router_score_function
    return Routing(
        top_k=config.moe_router_topk,
        score="pre_softmax" if score == "softmax" and config.moe_router_pre_softmax else score,
        groups=config.moe_router_num_groups,
        group_top_k=config.moe_router_group_topk,
        group_score_top_k=config.group_score_topk or 1,
        normalize=config.moe_router_norm_topk_prob,
        scaling_factor=config.moe_router_topk_scaling_factor,
    )


class Router(nn.Module):
    """x [B, S, D] -> (experts int32 [B, S, K], weights fp32 [B, S, K]), in fp32 throughout.

    The losses that balance the experts, and the bias that does so without one, get their gradients by `attach`, so
    that nothing of them has to find its way out of the stack of layers. The "gradient" of the bias is how many tokens
    chose each expert; the optimizer turns it into a step (`megajax.training.optimizer`).
    Megatron: `TopKRouter` in `transformer/moe/router.py`.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, x_BSD: Array, *, aux_weight: Array | None = None, decode: bool = False, deterministic: bool = True
    ) -> tuple[Array, Array]:
        """aux_weight: what the balancing losses are multiplied by; None is no training."""
        cfg, rule = self.config, routing(self.config)
        E, x_BSD = cfg.num_moe_experts or 0, x_BSD.astype(jnp.float32)
        if cfg.moe_input_jitter_eps and not deterministic:
            low, high = 1 - cfg.moe_input_jitter_eps, 1 + cfg.moe_input_jitter_eps
            x_BSD *= uniform(
                self.make_rng("dropout"), x_BSD.shape, "batch", "residual_seq", "act_embed", low=low, high=high
            )
        kernel: Any = self.param("kernel", normal_init(init_std(cfg), ("embed", "whole")), (x_BSD.shape[-1], E))
        logits_BSE = x_BSD @ summed_as_it_lies(kernel.astype(jnp.float32), "embed", "whole")
        if cfg.add_bias_linear:
            bias: Any = self.param("bias", zeros_init(("whole",)), (E,))
            logits_BSE += bias.astype(jnp.float32)
        balance = None
        if cfg.moe_router_enable_expert_bias:
            balance = self.param("expert_bias", zeros_init(("expert_bias",)), (E,), jnp.float32)
        if any(kind == "sinkhorn" for kind, _ in cfg.balancing) and not decode:
            flat = sinkhorn_route(logits_BSE.reshape(-1, E), rule.top_k)
            ids_BSK, weights_BSK = (a.reshape(*logits_BSE.shape[:2], -1) for a in flat)
        else:
            ids_BSK, weights_BSK = route(logits_BSE, rule, balance)
        if aux_weight is not None:
            weights_BSK = self._with_losses(weights_BSK, logits_BSE, rule, aux_weight)
            if balance is not None:
                counts = expert_counts(ids_BSK.reshape(-1, rule.top_k), E).astype(jnp.float32)
                weights_BSK = attach(weights_BSK, balance, counts)
        return ids_BSK, weights_BSK

    def _with_losses(self, weights_BSK: Array, logits_BSE: Array, rule: Routing, aux_weight: Array) -> Array:
        cfg = self.config
        for kind, coefficient in cfg.balancing:
            if coefficient and kind in ("aux_loss", "seq_aux_loss", "global_aux_loss"):
                by_sequence = kind == "seq_aux_loss"
                loss = load_balancing_loss(logits_BSE, rule, per_sequence=by_sequence, across=across())
                weights_BSK = attach(weights_BSK, loss, aux_weight * coefficient)
                self.sow("intermediates", kind, loss)
        if cfg.moe_z_loss_coeff:
            loss = z_loss(logits_BSE, across=across())
            weights_BSK = attach(weights_BSK, loss, aux_weight * cfg.moe_z_loss_coeff)
            self.sow("intermediates", "z_loss", loss)
        return weights_BSK


class ExpertLinear(nn.Module):
    """The kernels [E, I, O] (and biases [E, O]) of one linear map of each expert; called, it gives them.

    axes: logical axes of I and O. Where replicas divide the experts, or an expert, those are the kernels of one. fp8:
    how products are computed in it; with delayed scaling it gives their scales, too, [E, 3], made of its `fp8_meta`.
    """

    config: TransformerConfig
    shape: tuple[int, int, int]
    axes: tuple[str, str]
    std: float
    fp8: Fp8 | None = None

    @nn.compact
    def __call__(self) -> dict[str, Any]:
        dtype, names = jnp.dtype(self.config.params_dtype), ("experts", *self.axes)
        shape = tuple(size // parts_apart(name) for size, name in zip(self.shape, names, strict=True))
        weights = {"kernel": self.param("kernel", normal_init(self.std, names), shape, dtype)}
        if self.config.add_mlp_bias:
            axes, shape = ("experts", self.axes[1]), (shape[0], shape[2])
            weights["bias"] = self.param("bias", zeros_init(axes), shape, dtype)
        meta = None if self.fp8 is None else meta_shape(self.fp8)
        if meta is not None:
            init = zeros_init(("experts", "whole", "whole"))
            weights[FP8_META] = scales_of(self.param(FP8_META, init, (shape[0], *meta), jnp.float32), weights["kernel"])
        return weights


def _devices(axes: tuple[str, ...]) -> int:
    """Devices along mesh axes."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape.get(axis, 1) for axis in axes)


class Experts(nn.Module):
    """The MLPs of all experts, each token through its own: x [B, S, D], experts and weights [B, S, K] -> [B, S, D].

    A weight multiplies what enters fc2, as in Megatron (`transformer/moe/experts.py`), so it multiplies fc2's bias too.
    """

    config: TransformerConfig

    def setup(self) -> None:
        cfg = self.config
        E, F, D = cfg.num_moe_experts, cfg.moe_ffn_hidden_size, cfg.moe_latent_size or cfg.hidden_size
        assert E is not None
        assert F is not None
        inwards, outwards = ("expert_embed", "expert_mlp"), ("expert_mlp", "expert_embed")
        fp8 = self.in_fp8()
        if cfg.gated_linear_unit:
            self.linear_gate = ExpertLinear(cfg, (E, D, F), inwards, init_std(cfg), fp8)
        self.linear_fc1 = ExpertLinear(cfg, (E, D, F), inwards, init_std(cfg), fp8)
        self.linear_fc2 = ExpertLinear(cfg, (E, F, D), outwards, output_init_std(cfg), fp8)

    def __call__(self, x_BSD: Array, ids_BSK: Array, weights_BSK: Array) -> Array:
        params = self.weights()
        return dispatch(x_BSD, ids_BSK, weights_BSK, params, **self._how(x_BSD, params))

    def in_fp8(self) -> Fp8 | None:
        """How products are computed in fp8, if they are."""
        return None

    def kernel(self, dispatcher: Dispatcher, dtype: Any, widths: tuple[int, int]) -> GroupedKernel:
        """What computes the products of groups. widths: D and F on a device."""
        del dtype, widths
        kernels.record(Choice("experts", "plain" if dispatcher.pads else "blocks"))
        return LOOP

    # The same in three steps, for a schedule that overlaps them with other work.

    def send(self, x_BSD: Array, ids_BSK: Array, weights_BSK: Array) -> Sent:
        """Tokens to the devices of their experts."""
        return self._steps(x_BSD, self.weights()).send(x_BSD, ids_BSK, weights_BSK)

    def compute(self, sent: Sent, like: Any) -> Sent:
        """Through the experts. like: shape and dtype of x."""
        params = self.weights()
        return self._steps(like, params).compute(params, sent, top_k=self.config.moe_router_topk)

    def collect(self, sent: Sent, like: Any) -> Array:
        """Results back to their tokens, and summed, [B, S, D]."""
        steps = self._steps(like, self.weights())
        return steps.collect(sent, like.shape, top_k=self.config.moe_router_topk)

    def weights(self) -> dict[str, Any]:
        """The kernels, and biases, of all linear maps."""
        gate = {"linear_gate": self.linear_gate()} if self.config.gated_linear_unit else {}
        return gate | {"linear_fc1": self.linear_fc1(), "linear_fc2": self.linear_fc2()}

    def _steps(self, like: Any, params: dict[str, Any]) -> ExpertSteps:
        return ExpertSteps.of(like, params, **self._how(like, params))

    def _how(self, like: Any, params: dict[str, Any]) -> dict[str, Any]:
        """Arguments of `dispatch`."""
        cfg, rules = self.config, dict(nn.get_logical_axis_rules())
        assert cfg.num_moe_experts is not None

        def axes(name: str) -> tuple[str, ...]:
            found = rules.get(name) or ()
            return axes_apart(name) + ((found,) if isinstance(found, str) else tuple(found))

        ep, etp = axes("experts"), axes("expert_mlp")

        def spec(path: Any, leaf: Array) -> PartitionSpec:
            del leaf
            name, kind = path[0].key, path[1].key
            if kind == FP8_META:
                return PartitionSpec(ep, None)
            if kind == "bias":
                return PartitionSpec(ep, None if name == "linear_fc2" else etp)
            return PartitionSpec(ep, etp, None) if name == "linear_fc2" else PartitionSpec(ep, None, etp)

        tokens = like.shape[0] * like.shape[1] * parts_apart("batch") * parts_apart("residual_seq")
        parts, dispatcher = _devices(etp), self._dispatcher(tokens)
        D, F = params["linear_fc1"]["kernel"].shape[1:]
        kernel = self.kernel(dispatcher, like.dtype, (D, F * parts_apart("expert_mlp") // parts))
        return {
            "expert_fn": functools.partial(self._mlp, parts=parts, kernel=kernel),
            "num_experts": cfg.num_moe_experts,
            "dispatcher": dataclasses.replace(
                dispatcher, block=max(dispatcher.block, kernel.least_rows), most_rows=kernel.most_rows
            ),
            "token_spec": PartitionSpec(axes("batch"), axes("residual_seq")),
            "ep": ep,
            "etp": etp,
            "param_specs": jax.tree_util.tree_map_with_path(spec, params),
        }

    def _dispatcher(self, tokens: int) -> Dispatcher:
        cfg = self.config
        rows = tokens * cfg.moe_router_topk // (cfg.num_moe_experts or 1)
        return Dispatcher(
            cfg.moe_token_dispatcher_type,
            capacity_factor=cfg.moe_expert_capacity_factor,
            drop_policy=cfg.moe_token_drop_policy,
            pad_to_capacity=cfg.moe_pad_expert_input_to_capacity,
            # What is rounded up is computed in vain: few tokens, small blocks, but for what a GPU multiplies at once.
            block=min(128, max(16, 1 << math.ceil(math.log2(max(rows, 1))))),
        )

    def _mlp(
        self, params: Any, x: Array, weights: Array, groups: Groups | None, *, parts: int, kernel: GroupedKernel
    ) -> Array:
        """parts: devices that share an expert; what they return is summed."""
        cfg = self.config
        activation = ACTIVATIONS[cfg.activation_func]
        weights = weights[..., None].astype(x.dtype)

        def product(name: str, x: Array) -> Array:
            return grouped_matmul(x, params[name]["kernel"], groups, kernel, params[name].get(FP8_META))

        def linear(name: str, x: Array) -> Array:
            y = product(name, x)
            return y + grouped_bias(params[name]["bias"], x, groups) if cfg.add_mlp_bias else y

        def project(x: Array) -> Array:
            y = product("linear_fc2", x)
            if not cfg.add_mlp_bias:
                return y
            bias = grouped_bias(params["linear_fc2"]["bias"], x, groups) / parts
            return y + (bias if cfg.moe_apply_probs_on_input else bias * weights)

        if cfg.moe_apply_probs_on_input:
            x = x * weights
        if cfg.gated_linear_unit:
            clamp, offset = cfg.activation_func_clamp_value, cfg.glu_linear_offset
            h = gated(
                linear("linear_gate", x), linear("linear_fc1", x), activation=activation, clamp=clamp, offset=offset
            )
        else:
            h = activate(linear("linear_fc1", x), activation=activation)
        return project(h if cfg.moe_apply_probs_on_input else h * weights)


class SharedExpertGate(nn.Module):
    """sigmoid(x g) for each token, [B, S, 1] (Qwen2-MoE)."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x_BSD: Array) -> Array:
        init = normal_init(init_std(self.config), ("embed", "whole"))
        kernel: Any = self.param("kernel", init, (x_BSD.shape[-1], 1), jnp.dtype(self.config.params_dtype))
        return jax.nn.sigmoid(x_BSD @ kernel.astype(x_BSD.dtype))


class Routed(NamedTuple):
    """What the experts are given: x [B, S, D] (or [B, S, L]), experts and weights [B, S, K]; and what needs none of
    them, the output of the shared experts [B, S, D] or None."""

    x: Array
    ids: Array
    weights: Array
    shared: Array | None


class MoELayer(nn.Module):
    """Each token through K of E experts, their results weighted and summed, and through the shared experts.

    x [B, S, D] -> [B, S, D]. Megatron: `transformer/moe/moe_layer.py`.
    """

    config: TransformerConfig
    submodules: MoESubmodules

    def setup(self) -> None:
        cfg, sub = self.config, self.submodules
        self.router = sub.router(config=cfg)
        self.experts = sub.experts(config=cfg)
        if cfg.moe_latent_size is not None:
            latent = {"config": cfg, "axis": "whole", "use_bias": cfg.add_mlp_bias}
            self.fc1_latent_proj = sub.linear_fc1(features=cfg.moe_latent_size, **latent)
            self.fc2_latent_proj = sub.linear_fc2(features=cfg.hidden_size, **latent)
        if cfg.moe_shared_expert_intermediate_size is not None:
            shared = cfg.replace(ffn_hidden_size=cfg.moe_shared_expert_intermediate_size, add_mlp_bias=False)
            self.shared_experts = sub.shared_experts(config=shared)
            if cfg.moe_shared_expert_gate:
                self.shared_expert_gate = SharedExpertGate(cfg)

    def __call__(
        self, x_BSD: Array, *, aux_weight: Array | None = None, decode: bool = False, deterministic: bool = True
    ) -> Array:
        """See `Router` for the arguments."""
        routed = self.route(x_BSD, aux_weight=aux_weight, decode=decode, deterministic=deterministic)
        return self.join(self.experts(routed.x, routed.ids, routed.weights), routed.shared)

    def route(
        self, x_BSD: Array, *, aux_weight: Array | None = None, decode: bool = False, deterministic: bool = True
    ) -> Routed:
        """All that comes before the experts."""
        cfg = self.config
        x_BSD = constrain(x_BSD, "batch", "residual_seq", "act_embed")
        ids_BSK, weights_BSK = self.router(x_BSD, aux_weight=aux_weight, decode=decode, deterministic=deterministic)
        x_BSL = x_BSD if cfg.moe_latent_size is None else self.fc1_latent_proj(x_BSD)
        shared_BSD = None
        if cfg.moe_shared_expert_intermediate_size is not None:
            shared_BSD = self.shared_experts(x_BSD)
            if cfg.moe_shared_expert_gate:
                shared_BSD *= self.shared_expert_gate(x_BSD)
        return Routed(x_BSL, ids_BSK, weights_BSK, shared_BSD)

    def join(self, y_BSL: Array, shared_BSD: Array | None) -> Array:
        """All that comes after them, [B, S, D]."""
        y_BSD = y_BSL if self.config.moe_latent_size is None else self.fc2_latent_proj(y_BSL)
        if shared_BSD is not None:
            y_BSD += shared_BSD
        return constrain(y_BSD, "batch", "residual_seq", "act_embed")
