"""Gradients of a step's loss over its microbatches: accumulated one after the other, or in a pipeline."""

# SPDX-License-Identifier: Apache-2.0
# M microbatches, B batch, S sequence
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from megajax.config import Config, ConfigError
from megajax.models.family import Family
from megajax.parallel import sharding
from megajax.parallel.in_place import added_in_place
from megajax.parallel.pipeline import Lockstep, pipeline_gradients, pipeline_loss
from megajax.parallel.pipeline_pieces import BlockFn, Params, Path, Pieces, Work
from megajax.parallel.pipeline_table import table_gradients
from megajax.parallel.replicas import ALIKE, Replicas
from megajax.parallel.schedules import make_schedule
from megajax.parallel.sharding import AxisRules
from megajax.training.pipeline_engine import choose_engine
from megajax.training.stages import Stages
from megajax.training.state import TrainState

Array = jax.Array
Batch = Mapping[str, Array]
GradientsFn = Callable[[TrainState, Batch], tuple[Any, Array]]
"""`(state, batch) -> (gradients of the scaled loss, sum of the masked token losses)`; arrays [M, B, ...]."""
EvalStep = Callable[[Any, Batch], tuple[Array, Array]]
"""`(params, batch) -> (sum of token losses, number of tokens)`; arrays [M, B, ...]."""


def loss_weights(loss_mask_MBS: Array, *, per_token: bool, data_parallel_size: int) -> Array:
    """What each token's loss is multiplied by; over a step the weights sum to 1.

    loss_mask: fp32 [M, B, ...]. per_token weighs all tokens alike. Otherwise as Megatron does by default: each
    microbatch of each data-parallel shard counts the same, however many tokens of it are masked.
    """
    mask = loss_mask_MBS.astype(jnp.float32)
    if per_token:
        return mask / jnp.maximum(jnp.sum(mask), 1.0)
    M, B = mask.shape[:2]
    shards = mask.reshape(M, data_parallel_size, B // data_parallel_size, -1)
    tokens = jnp.maximum(jnp.sum(shards, axis=(2, 3), keepdims=True), 1.0)
    return (shards / tokens / (M * data_parallel_size)).reshape(mask.shape)


def _scaled_weights(state: TrainState, mask: Array, config: Config, data_parallel_size: int) -> Array:
    weights = loss_weights(mask, per_token=config.train.calculate_per_token_loss, data_parallel_size=data_parallel_size)
    # The loss scale goes here, so that the first gradient of all, that of the logits, is already scaled in fp16.
    return weights if state.loss_scale is None else weights * state.loss_scale.scale


def _dropout_key(state: TrainState, config: Config) -> Array | None:
    """The step's key, which each microbatch's index is folded into."""
    if not config.model.draws_noise:
        return None
    return jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)


def accumulated_gradients(
    model: nn.Module,
    family: Family,
    config: Config,
    *,
    data_parallel_size: int,
    constrain: Callable[[Any], Any] = lambda gradients: gradients,
    replicas: Replicas = ALIKE,
    computed_with: Callable[[Any], Any] = lambda params: params,
) -> GradientsFn:
    """One microbatch after the other. `constrain` lays out the gradients (ZeRO-2 divides them); `replicas` add up
    their own; `computed_with` makes of the state's parameters what the model gets.
    """

    def microbatch_loss(params: Any, batch: Batch, weights: Array, key: Array | None) -> tuple[Array, Array]:
        losses = family.loss(model, params, batch, weights, dropout_key=key)
        return losses.weighted_sum, losses.per_token

    def microbatch_gradients(
        params: Any, step_key: Array | None, index: Array | int, batch: Batch, weights: Array
    ) -> tuple[Any, Array]:
        key = None if step_key is None else jax.random.fold_in(step_key, index)
        grads, per_token = jax.grad(microbatch_loss, has_aux=True)(params, batch, weights, key)
        return grads, jnp.sum(per_token * batch["loss_mask"])

    def gradients(state: TrainState, batch: Batch) -> tuple[Any, Array]:
        weights = _scaled_weights(state, batch["loss_mask"], config, data_parallel_size)
        step_key = _dropout_key(state, config)
        inputs: tuple[Batch, Array] = (dict(batch), weights)
        M = weights.shape[0]
        if M == 1:  # no accumulator to hold beside the gradients
            microbatch = jax.tree.map(lambda a: a[0], inputs)
            grads, loss_sum = microbatch_gradients(computed_with(state.params), step_key, 0, *microbatch)
            grads = jax.tree.map(lambda gradient, param: gradient.astype(param.dtype), constrain(grads), state.params)
            return grads, loss_sum

        def all_microbatches(params: Any, inputs: tuple[Batch, Array], step_key: Array | None) -> tuple[Any, Array]:
            def accumulate(carry: tuple[Any, Array], indexed: tuple[Array, Any]) -> tuple[tuple[Any, Array], None]:
                index, (microbatch, weights) = indexed
                args, (totals, loss_total) = (params, step_key, index, microbatch, weights), carry
                grads, loss_sum = added_in_place(microbatch_gradients, args, totals)
                return (constrain(grads), loss_total + loss_sum), None

            zeros = constrain(jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))
            (grads, loss_sum), _ = jax.lax.scan(accumulate, (zeros, jnp.float32(0)), (jnp.arange(M), inputs))
            return grads, loss_sum

        return replicas.each(all_microbatches)(computed_with(state.params), inputs, step_key)

    return gradients


class PipelineProgram:
    """Gradients and evaluation of a model whose layers lie on pipeline stages."""

    def __init__(
        self,
        pieces: Pieces,
        stages: Stages,
        config: Config,
        rules: AxisRules,
        param_axes: Any,
        *,
        data_parallel_size: int,
        replicas: Replicas = ALIKE,
        computed_with: Callable[[Any], Any] = lambda params: params,
    ) -> None:
        """`computed_with` makes of the state's parameters what the model gets."""
        self._computed_with = computed_with
        self._pieces, self._stages, self._config = pieces._replace(blocks=_with_what_they_read(pieces)), stages, config
        self._axes, self._data_parallel_size = param_axes, data_parallel_size
        self._specs = self._specs_of(rules.table)
        self._gradient_specs = self._specs_of(rules.gradient_table)
        self._replicas = dataclasses.replace(
            replicas, parameters=self._specs, specs=self._specs_of(rules.optimizer_table)
        )
        self._engine(config.parallel.pipeline_model_parallel_size)  # refuses at the start what no schedule can do

    def _specs_of(self, table: Mapping[str, tuple[str, ...]]) -> Params:
        axes = self._stages.split(self._axes, self._pieces.reads, lambda names: ("layers", *names))
        staged = tuple(sharding.specs_of_axes(block, table) for block in axes.staged)
        return Params(staged, sharding.specs_of_axes(axes.shared, table))

    def _split(self, params: Any) -> Params:
        def each(leaf: Array) -> Array:
            return jnp.broadcast_to(leaf, (self._stages.chunks, *leaf.shape))

        return self._stages.split(params, self._pieces.reads, each)

    @property
    def _chunks(self) -> int:
        """Of a stage, all blocks together."""
        return self._config.parallel.num_virtual_stages_per_pipeline_rank * len(self._pieces.blocks)

    def _lockstep(self, microbatches: int) -> Lockstep:
        parallel = self._config.parallel
        return Lockstep(parallel.pipeline_model_parallel_size, self._chunks, microbatches, beside=parallel.runs_beside)

    def _engine(self, microbatches: int) -> Callable[..., tuple[Params, Array]]:
        """Of the arguments of `pipeline_gradients` the ones after the schedule."""
        parallel, several = self._config.parallel, len(self._pieces.blocks) > 1
        if several and parallel.pipeline_engine == "lockstep":
            raise ConfigError(
                f"pipeline_engine='lockstep' runs one stack of layers, and --model {self._config.model_family} has"
                f" {len(self._pieces.blocks)}; leave it out"
            )
        if several and parallel.pipeline_schedule == "zb-h1":
            raise ConfigError(
                f"pipeline_schedule='zb-h1' runs one chunk a stage, and --model {self._config.model_family} has one for"
                f" each of its {len(self._pieces.blocks)} stacks; use 1f1b"
            )
        engine = choose_engine(self._stages, self._config)
        if engine.name == "lockstep":
            return partial(pipeline_gradients, self._pieces, self._lockstep(microbatches))
        schedule = make_schedule(
            parallel.pipeline_schedule,
            parallel.pipeline_model_parallel_size,
            microbatches,
            self._chunks,
            group=parallel.microbatch_group_size_per_vp_stage,
        )
        return partial(table_gradients, self._pieces, schedule, parts=engine.parts)

    def gradients(self, state: TrainState, batch: Batch) -> tuple[Any, Array]:
        """See `GradientsFn`."""
        weights = _scaled_weights(state, batch["loss_mask"], self._config, self._data_parallel_size)
        work = Work(dict(batch), weights, batch["loss_mask"], _dropout_key(state, self._config))
        grads, loss_sum = self._engine(weights.shape[0])(
            self._split(self._computed_with(state.params)),
            self._stages.rows(),
            work,
            specs=self._specs,
            gradient_specs=self._gradient_specs,
            replicas=self._replicas,
        )
        return self._stages.merge(grads, self._pieces.reads), loss_sum

    def evaluate(self, params: Any, batch: Batch) -> tuple[Array, Array]:
        """See `EvalStep`."""
        mask = batch["loss_mask"]
        loss_sum = pipeline_loss(
            self._pieces,
            self._lockstep(mask.shape[0]),
            self._split(self._computed_with(params)),
            self._stages.rows(),
            Work(dict(batch), mask, mask, None),
            specs=self._specs,
        )
        return loss_sum, jnp.sum(mask)


def _with_what_they_read(pieces: Pieces) -> tuple[BlockFn, ...]:
    """The blocks as the engines call them: what a block reads beside its layers comes as its chunk's only row."""

    def of_block(block: BlockFn, read: tuple[Path, ...]) -> BlockFn:
        def run(params: Any, *rest: Any) -> Any:
            named: dict[Path, Array] = flatten_dict(params)  # type: ignore[assignment]
            is_read = {path: any(path[: len(name)] == name for name in read) for path in named}
            params = unflatten_dict({path: leaf[0] if is_read[path] else leaf for path, leaf in named.items()})
            return block(params, *rest)

        return run if read else block

    return tuple(of_block(*pair) for pair in zip(pieces.blocks, pieces.reads, strict=True))


def make_eval_step(
    model: nn.Module, family: Family, computed_with: Callable[[Any], Any] = lambda params: params
) -> EvalStep:
    """Without a pipeline. `computed_with` makes of the state's parameters what the model gets."""

    def step(params: Any, batch: Batch) -> tuple[Array, Array]:
        params = computed_with(params)

        def microbatch_loss(microbatch: Batch) -> Array:
            mask = microbatch["loss_mask"]
            return jnp.sum(family.loss(model, params, microbatch, mask, dropout_key=None).per_token * mask)

        return jnp.sum(jax.lax.map(microbatch_loss, dict(batch))), jnp.sum(batch["loss_mask"])

    return step
