"""Layers and the norm after them: scanned, recomputed as asked, their parameters stacked [L, ...] or each by itself."""

# SPDX-License-Identifier: Apache-2.0
# B batch, S sequence, D hidden
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from megajax.config import ConfigError, TransformerConfig
from megajax.ops.attention import AttentionMask
from megajax.ops.recompute import backward_apart
from megajax.ops.rope import Rotary
from megajax.parallel.sharding import is_box
from megajax.parallel.skipped import run_if
from megajax.spec import Builder
from megajax.transformer.cache import CacheRow, is_cache
from megajax.transformer.layer import WithContext
from megajax.transformer.stack import Segment, Stack, fold_layers

Array = jax.Array
Tree = Any


def stack_layout(config: TransformerConfig, layer_specs: Sequence[Builder]) -> tuple[Segment, ...]:
    """Which layers share a stack: those whose spec and whose resolved config are equal."""
    return fold_layers([(spec, config.for_layer(i)) for i, spec in enumerate(layer_specs)])


class LayerInputs(NamedTuple):
    """What every layer of a block receives beside the residual stream; see `TransformerLayer`.

    context: what cross-attention reads, [B, T, E]; or whatever else the layers of a model need, any tree of arrays.
    """

    mask: AttentionMask
    rotary: Rotary | None = None
    context: Any = None
    context_mask: AttentionMask | None = None
    aux_weight: Array | None = None


class StackRows(NamedTuple):
    """The rows of a stack that one pipeline stage holds: what its parameters' leading dim means.

    index: int [n], the layer of each row. wanted: bool [n]; False is padding, which passes its input on and is not
    computed; None: none is. masked: False for padding as well, which is computed and dropped: where devices of several
    stages take part in a collective of a layer, all have to come to it.
    """

    index: Array
    wanted: Array | None = None
    masked: Array | None = None


class TransformerBlock(nn.Module):
    """Layers `layer_specs[0]`, `layer_specs[1]`, ... and a final norm. x [B, S, D] -> [B, S, D].

    The layers' parameters are held here, stacked, and each layer is applied as a pure function of its slice. So the
    order of execution (scan, recomputation in groups, a pipeline) is free and the parameter tree is not touched
    by it. Layer i draws its dropout from a key folded with i, whatever runs it. Where nothing is
    trained, a tuple of the layers' own trees may stand in the place of a stack (`megajax.inference.layers`).

    Attributes:
      layer_specs: one builder for each layer.
      layer_norm: builder of the final norm, or None.
      stacked_axis: logical axis of the stacks. That of a block inside a layer is another one, "inner_layers".
    """

    config: TransformerConfig
    layer_specs: tuple[Builder, ...]
    layer_norm: Builder | None = None
    stacked_axis: str = "layers"

    @nn.compact
    def __call__(
        self,
        x_BSD: Array,
        inputs: LayerInputs,
        *,
        decode: bool = False,
        deterministic: bool = True,
        rows: Mapping[str, StackRows] | None = None,
        final_norm: bool = True,
        num_layers: int | None = None,
        first_layer: int = 0,
    ) -> Array:
        """Runs all layers and the final norm; or, for a pipeline, a part of it.

        Args:
          num_layers: stop after so many layers, without the norm; the others have no gradient. None: all.
          first_layer: with num_layers, the layer to begin with.
          rows: for each stack, which of its layers the parameters given to `apply` hold; {} runs no layer.
          final_norm: False leaves the norm out.
        """
        cfg = self.config
        if len(self.layer_specs) != cfg.num_layers:
            raise ConfigError(f"{len(self.layer_specs)} layer specs for num_layers={cfg.num_layers}; give one a layer")
        run = _Run(
            inputs=inputs,
            decode=decode,
            deterministic=deterministic,
            dropout_key=None if deterministic else self.make_rng("dropout"),
            recorded=self.is_mutable_collection("intermediates") and not self.is_initializing(),
            rows=rows,
        )
        for segment in stack_layout(cfg, self.layer_specs):
            if rows is not None and segment.stacks[0].name not in rows:
                continue
            layers = [self._layer(stack) for stack in segment.stacks]
            variables = tuple(
                self._variables(stack, layer, x_BSD, run) for stack, layer in zip(segment.stacks, layers, strict=True)
            )
            if self.is_initializing():
                continue  # parameters do not depend on the activations; their shapes are all that init needs
            if num_layers is not None:
                segment, variables = _layers_between(segment, variables, first_layer, num_layers)
            x_BSD, (caches, outputs, contexts) = _run_segment(segment, layers, variables, x_BSD, run, cfg)
            run = run.behind(contexts)
            for stack, cache, output in zip(segment.stacks, caches, outputs, strict=True):
                if decode:
                    self.put_variable("cache", stack.name, cache)
                self.sow("intermediates", stack.name, output)
        if not final_norm or num_layers is not None:
            return x_BSD
        if self.layer_norm is not None:
            x_BSD = self.layer_norm(config=cfg, name="final_layernorm")(x_BSD)
        return x_BSD.astype(jnp.dtype(cfg.compute_dtype))

    def _layer(self, stack: Stack) -> nn.Module:
        return self.layer_specs[stack.first](config=self.config.for_layer(stack.first), parent=None)

    def _variables(self, stack: Stack, layer: nn.Module, x_BSD: Array, run: "_Run") -> dict[str, Tree]:
        def init_one(key: Array) -> Tree:
            return layer.init(key, x_BSD, **run.layer_arguments())

        def add_axis(leaf: Any) -> Any:
            return leaf.replace(names=(self.stacked_axis, *leaf.names)) if is_box(leaf) else leaf

        def init(key: Array, collection: str) -> Tree:
            keys = jax.vmap(partial(jax.random.fold_in, key))(_layer_indices(stack))
            # Under jit the forward passes that init runs are dead code.
            stacked = jax.jit(jax.vmap(lambda k: init_one(k).get(collection, {})))(keys)
            return jax.tree.map(add_axis, stacked, is_leaf=is_box)

        if self.is_initializing():
            variables = {"params": self.param(stack.name, init, "params")}
        else:  # not `self.param`, which would trace `init` again to compare shapes; the layers compare theirs
            variables = {"params": self.get_variable("params", stack.name)}
        if run.decode:
            key = self.make_rng("params") if self.is_initializing() else None
            cache = self.variable("cache", stack.name, init, key, "cache")
            variables["cache"] = cache.value
        return variables


class _Run(NamedTuple):
    """How the layers are called this time."""

    inputs: LayerInputs
    decode: bool
    deterministic: bool
    dropout_key: Array | None
    recorded: bool
    rows: Mapping[str, StackRows] | None

    def of_row(self, masked: Array | None) -> "_Run":
        """For a row that may be padding and is computed, whose routers must not count."""
        weight = self.inputs.aux_weight
        if masked is None or weight is None:
            return self
        return self._replace(inputs=self.inputs._replace(aux_weight=weight * masked))

    def behind(self, contexts: tuple[Array | None, ...]) -> "_Run":
        """For the layers after a segment whose layers made these contexts [repeats, ...]."""
        made = [context for context in contexts if context is not None]
        if not made:
            return self
        if len(contexts) > 1 or len(made[0]) > 1:
            raise ConfigError("a layer that makes the context of others repeats in its stack; let one layer do it")
        return self._replace(inputs=self.inputs._replace(context=made[0][0]))

    def layer_arguments(self) -> dict[str, Any]:
        given = {name: value for name, value in self.inputs._asdict().items() if value is not None}
        return given | {"decode": self.decode, "deterministic": self.deterministic}


def _layer_indices(stack: Stack) -> Array:
    return stack.first + stack.period * jnp.arange(stack.repeats)


def _apply_layer(
    layer: nn.Module, run: _Run, variables: Tree, x_BSD: Array, row: StackRows
) -> tuple[Array, Tree, Array | None]:
    """(x, cache, context that it made)."""
    run, index = run.of_row(row.masked), row.index
    rngs = None if run.dropout_key is None else {"dropout": jax.random.fold_in(run.dropout_key, index)}
    result: Any
    cache = None
    if run.decode:
        result, updated = layer.apply(variables, x_BSD, rngs=rngs, mutable=["cache"], **run.layer_arguments())
        cache = updated.get("cache", {})  # not every layer has one
    else:
        result = layer.apply(variables, x_BSD, rngs=rngs, **run.layer_arguments())
    x_BSD, context = result if isinstance(result, WithContext) else (result, None)
    return x_BSD, cache, context


def _layers_between(
    segment: Segment, variables: tuple[Tree, ...], start: int, stop: int
) -> tuple[Segment, tuple[Tree, ...]]:
    """The part of a segment, and of its variables, that lies in layers [start, stop) of the whole stack."""
    first, width = segment.stacks[0].first, len(segment.stacks)

    def repeats_before(layer: int) -> int:
        repeats = min(segment.repeats, -(-max(0, layer - first) // width))
        if repeats < segment.repeats and repeats * width != max(0, layer - first):
            raise ConfigError(f"num_layers={layer} would end within a pattern of {width} layers; choose a multiple")
        return repeats

    begin, end = repeats_before(start), repeats_before(stop)
    stacks = tuple(
        stack._replace(first=stack.first + begin * stack.period, repeats=end - begin) for stack in segment.stacks
    )
    return Segment(stacks, end - begin), jax.tree.map(lambda a: a[begin:end], variables)


Step = Callable[[Array, Tree], tuple[Array, Tree]]
"""One period of a segment.

(x, (variables, `StackRows`) of each of its layers) -> (x, (caches, outputs, contexts)).
"""


def _run_segment(
    segment: Segment, layers: Sequence[nn.Module], variables: Tree, x_BSD: Array, run: _Run, config: TransformerConfig
) -> tuple[Array, Tree]:
    def step(x_BSD: Array, period: Tree, apply: "_Apply" = _apply_layer) -> tuple[Array, Tree]:
        caches, outputs, contexts = [], [], []
        for stack, layer, layer_variables, row in zip(segment.stacks, layers, *period, strict=True):
            x_BSD, cache, context = _apply_row(stack, partial(apply, layer, run), layer_variables, x_BSD, row)
            caches.append(cache)
            outputs.append(x_BSD if run.recorded else None)
            contexts.append(context)
        return x_BSD, (tuple(caches), tuple(outputs), tuple(contexts))

    rows = tuple(run.rows[stack.name] if run.rows else StackRows(_layer_indices(stack)) for stack in segment.stacks)
    xs, width = (variables, rows), len(segment.stacks)
    if isinstance(variables[0]["params"], tuple):
        return _run_in_turn(step, x_BSD, variables, rows)
    if run.decode:
        return _scan_in_place(step, x_BSD, variables, rows)
    # Stages of a pipeline run forward and backward in loops of their own, of however many turns.
    scan = jax.lax.scan if run.rows or config.recompute_granularity is None else _scan
    if config.recompute_granularity != "full":
        return scan(step, x_BSD, xs)
    asked = config.recompute_num_layers or 1
    again: Step = jax.checkpoint(step, prevent_cse=False)
    if width == 1 and rows[0].wanted is not None:
        again = partial(step, apply=_recomputed_layer)  # in the branch that computes the layer, not around it
    if config.recompute_method == "uniform":
        return _scan_in_groups(scan, step, again, x_BSD, xs, group=max(1, asked // width))
    # "block": the first layers of the whole stack (of each pipeline stage) are recomputed, the others keep activations.
    before = 0 if run.rows else segment.stacks[0].first
    first = -(-max(0, asked - before) // width)
    return _scan_parts(scan, x_BSD, xs, [(again, first), (step, segment.repeats)])


Scan = Callable[[Step, Array, Tree], tuple[Array, Tree]]
"""`jax.lax.scan`, or the same."""


def _scan(step: Step, x_BSD: Array, xs: Tree) -> tuple[Array, Tree]:
    """`jax.lax.scan` whose recomputation stays one: XLA makes no loop of a single turn, and would find in the forward
    pass what the backward pass is to compute again, so that it would be kept."""
    alone = jax.tree.leaves(xs)[0].shape[0] == 1
    return jax.lax.scan(backward_apart(step) if alone else step, x_BSD, xs)


def _run_in_turn(step: Step, x_BSD: Array, variables: Tree, rows: Tree) -> tuple[Array, Tree]:
    """Periods one after the other, each layer with arrays of its own; a scan would copy each out of a stack."""
    kept = []
    for index in range(len(rows[0].index)):
        layers = tuple({name: tree[index] for name, tree in stack.items()} for stack in variables)
        x_BSD, made = step(x_BSD, (layers, jax.tree.map(lambda stack, index=index: stack[index], rows)))
        kept.append(made)
    caches = tuple(zip(*(made[0] for made in kept), strict=True))
    outputs, contexts = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(made[1:] for made in kept))
    return x_BSD, (caches, outputs, contexts)


def _scan_in_place(step: Step, x_BSD: Array, variables: Tree, rows: Tree) -> tuple[Array, Tree]:
    """Scans with the caches carried along, each layer writing to its own row. As inputs and outputs of the scan they
    would be two arrays, one copied to the other for each token.
    """
    params = tuple({"params": layer["params"]} for layer in variables)
    caches = tuple(layer["cache"] for layer in variables)

    def in_place(carry: tuple[Array, Tree], period: Tree) -> tuple[tuple[Array, Tree], Tree]:
        (x_BSD, caches), (period_params, period_rows, index) = carry, period
        here = jax.tree.map(lambda stack: CacheRow(stack, index), caches)
        layers = tuple(p | {"cache": c} for p, c in zip(period_params, here, strict=True))
        x_BSD, (written, outputs, contexts) = step(x_BSD, (layers, period_rows))
        caches = jax.tree.map(lambda row: row.stack, written, is_leaf=is_cache)
        return (x_BSD, caches), (outputs, contexts)

    periods = jnp.arange(len(rows[0].index))
    (x_BSD, caches), (outputs, contexts) = jax.lax.scan(in_place, (x_BSD, caches), (params, rows, periods))
    return x_BSD, (caches, outputs, contexts)


def rows_of(stack: str) -> str:
    """What the branches that rows of a stack run in are called in a compiled program."""
    return f"rows_of_{stack}"


_Apply = Callable[[nn.Module, _Run, Tree, Array, StackRows], tuple[Array, Tree, Array | None]]


def _recomputed_layer(
    layer: nn.Module, run: _Run, variables: Tree, x_BSD: Array, row: StackRows
) -> tuple[Array, Tree, Array | None]:
    return jax.checkpoint(partial(_apply_layer, layer, run), prevent_cse=False)(variables, x_BSD, row)


def _apply_row(
    stack: Stack,
    layer: Callable[[Tree, Array, StackRows], tuple[Array, Tree, Array | None]],
    variables: Tree,
    x_BSD: Array,
    row: StackRows,
) -> tuple[Array, Tree, Array | None]:
    """A layer, or nothing where its row is padding."""
    if row.wanted is not None:
        shapes = jax.eval_shape(layer, variables, x_BSD, row)
        _, *others = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return run_if(row.wanted, layer, variables, x_BSD, row, otherwise=(x_BSD, *others), name=rows_of(stack.name))
    y_BSD, cache, context = layer(variables, x_BSD, row)
    return (y_BSD if row.masked is None else jnp.where(row.masked, y_BSD, x_BSD)), cache, context


def _scan_in_groups(scan: Scan, step: Step, again: Step, x_BSD: Array, xs: Tree, *, group: int) -> tuple[Array, Tree]:
    """Scans with only the input of every `group` periods kept; the rest is recomputed. again: a recomputed step."""
    length = jax.tree.leaves(xs)[0].shape[0]
    group = min(group, length)
    if group == 1:
        # What is kept of the parameters is then the stack itself, which a pipeline knows as its own.
        return scan(again, x_BSD, xs)

    def run_group(x_BSD: Array, inner: Tree) -> tuple[Array, Tree]:
        return jax.checkpoint(lambda x, i: jax.lax.scan(step, x, i), prevent_cse=False)(x_BSD, inner)

    whole = length - length % group
    folded = jax.tree.map(lambda a: a[:whole].reshape(whole // group, group, *a.shape[1:]), xs)
    x_BSD, ys = jax.lax.scan(run_group, x_BSD, folded)
    ys = jax.tree.map(lambda a: a.reshape(whole, *a.shape[2:]), ys)
    if whole == length:
        return x_BSD, ys
    x_BSD, last = run_group(x_BSD, jax.tree.map(lambda a: a[whole:], xs))
    return x_BSD, _concatenate([ys, last])


def _scan_parts(scan: Scan, x_BSD: Array, xs: Tree, parts: Sequence[tuple[Step, int]]) -> tuple[Array, Tree]:
    """Scans consecutive parts of xs, each (step, its end), with their own step."""
    start, results = 0, []
    for step, end in parts:
        end = min(max(end, start), jax.tree.leaves(xs)[0].shape[0])
        if end > start:
            x_BSD, ys = scan(step, x_BSD, jax.tree.map(lambda a, s=start, e=end: a[s:e], xs))
            results.append(ys)
        start = end
    return x_BSD, _concatenate(results)


def _concatenate(trees: Sequence[Tree]) -> Tree:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)
