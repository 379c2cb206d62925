"""The collectives of a training step are those that the papers count, on every kind of parallelism, and no others.

The compiled step of a small Llama-like GPT is counted: M microbatches, L layers. Tensor parallelism has two all-reduces
a layer forward and two backward (arXiv:1909.08053). With sequence parallelism these are two all-gathers and two
reduce-scatters, and the inputs of both halves are gathered again for the gradients of weights (arXiv:2205.05198). A
ring of n devices passes keys and values n - 1 times, backward their gradients, too (arXiv:2310.01889). Ulysses trades
queries, keys and values, here in one, then the output (arXiv:2309.14509). ZeRO-1 gathers the parameters once a step,
ZeRO-3 those of each layer, forward and backward (arXiv:1910.02054). A pipeline passes one activation each way a tick.

Two things XLA:CPU does not do, so that the tests on the CPU count otherwise and only `test_on_h100` as the papers: it
makes no reduce-scatter of an all-reduce of which each device needs a part (those written as such in JAX stay), and it
reduces before it adds: the gradients of q, k and v, and of gate and fc1, arrive as three and two arrays, not as one.

With ZeRO-0 and 1, gradients of all microbatches add up before they are reduced, once a step, as in Megatron; otherwise
once a layer and microbatch, for XLA moves no all-reduce of a kernel out of a loop.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import functools
import importlib.util
import os
import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from megajax.config import Config, DataConfig, OptimizerConfig, ParallelConfig, TrainConfig, TransformerConfig
from megajax.models.registry import FAMILIES
from megajax.parallel.aot import absent_gpus
from megajax.parallel.census import Collective, census
from megajax.parallel.hlo import dot_flops
from megajax.parallel.sharding import spec_of
from megajax.training.setup import build_program, on_mesh

SEQ, BATCH, M, L = 16, 8, 2, 4
HIDDEN_BYTES, VOCAB = 32 * 4, 64
KERNELS, NORMS = 7, 2  # of a layer

TP: dict[str, Any] = {"tensor_model_parallel_size": 2}
SP = TP | {"sequence_parallel": True}
PP = {"pipeline_model_parallel_size": 2, "pipeline_engine": "lockstep"}


class Compiled(NamedTuple):
    """A step's text for each of `mesh.size` devices, and what the compiler had to say."""

    text: str
    mesh: Mesh
    messages: str


def _config(devices: int, microbatches: int, parallel: dict[str, Any]) -> Config:
    data_parallel = devices // ParallelConfig(**parallel).context_parallel_size
    data_parallel //= parallel.get("tensor_model_parallel_size", 1) * parallel.get("pipeline_model_parallel_size", 1)
    return Config(
        model_family="gpt",
        model=TransformerConfig(
            num_layers=L,
            hidden_size=32,
            num_attention_heads=4,
            ffn_hidden_size=64,
            vocab_size=VOCAB,
            make_vocab_size_divisible_by=VOCAB,
            position_embedding_type="rope",
            normalization="RMSNorm",
            gated_linear_unit=True,
            activation_func="silu",
            add_bias_linear=False,
            share_embeddings_and_output_weights=False,
            hidden_dropout=0.0,
            attention_dropout=0.0,
        ),
        parallel=ParallelConfig(**parallel),
        optimizer=OptimizerConfig(optimizer="sgd", lr=0.1, lr_decay_style="constant"),
        data=DataConfig(seq_length=SEQ),
        train=TrainConfig(micro_batch_size=BATCH // microbatches // data_parallel, global_batch_size=BATCH),
    )


@contextmanager
def _stderr_of_the_process() -> Iterator[list[str]]:
    """Collects what is written to file descriptor 2, by C++ as well."""
    said: list[str] = []
    with tempfile.TemporaryFile() as file:
        usual = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(usual, 2)
            os.close(usual)
            file.seek(0)
            said.append(file.read().decode(errors="replace"))


def _compile(devices: tuple[Any, ...], microbatches: int, parallel: dict[str, Any]) -> Compiled:
    program = build_program(_config(len(devices), microbatches, parallel), FAMILIES["gpt"], devices=list(devices))
    place = NamedSharding(program.mesh, spec_of((None, "batch", "seq"), program.rules.table))
    dtypes = {"tokens": jnp.int32, "labels": jnp.int32, "position_ids": jnp.int32, "loss_mask": jnp.float32}
    shape = (microbatches, BATCH // microbatches, SEQ)
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=place) for name, dtype in dtypes.items()}
    with on_mesh(program), _stderr_of_the_process() as said:
        lowered = program.train_step.lower(program.abstract_state, batch)  # pyright: ignore[reportFunctionMemberAccess]
        text = lowered.compile().as_text()
    return Compiled(text, program.mesh, said[0])


@functools.cache
def _on_cpu(devices: int, microbatches: int = M, **parallel: Any) -> Compiled:
    return _compile(tuple(jax.devices()[:devices]), microbatches, parallel)


def _place(collective: Collective) -> str:
    backward = "transpose(" in collective.op_name
    places = {(M, L): "backward" if backward else "forward", (M,): "microbatch", (): "step"}
    return places.get(collective.loops, f"in loops {collective.loops}")


def _counts(collectives: tuple[Collective, ...]) -> dict[str, Counter[str]]:
    """Arrays that are communicated, by place: in a layer forward or backward, in a microbatch, once in the step."""
    found: dict[str, Counter[str]] = {}
    for collective in collectives:
        axes = "+".join(collective.axes) if collective.axes is not None else "?"
        found.setdefault(_place(collective), Counter())[f"{collective.kind} {axes}"] += collective.arrays
    return found


def _expected(counts: tuple[str, ...]) -> dict[str, Counter[str]]:
    rows = {place: row.split(",") for place, row in zip(PLACES, counts, strict=True) if row}
    split = {place: [part.strip().split(" ", 1) for part in row] for place, row in rows.items()}
    return {place: Counter({what: int(count) for count, what in row}) for place, row in split.items()}


LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"devices": 2, **TP},
    "tp2-sp": {"devices": 2, **SP},
    "ring4": {"devices": 4, "context_parallel_size": 4},
    "ulysses2": {"devices": 2, "context_parallel_size": 2, "cp_comm_type": "a2a"},
    "allgather2": {"devices": 2, "context_parallel_size": 2, "cp_comm_type": "all_gather"},
    "zero0": {"devices": 2, "zero": 0},
    "zero1": {"devices": 2, "zero": 1},
    "zero2": {"devices": 2, "zero": 2},
    "zero3": {"devices": 4, "zero": 3},
    "ring2-tp2-sp-zero3": {"devices": 8, **SP, "context_parallel_size": 2, "zero": 3},
}

PLACES = ("forward", "backward", "microbatch", "step")

ON_CPU = {
    "tp2": (
        "2 all-reduce tp",
        "5 all-reduce tp",  # of q, k, v; of gate, fc1
        "4 all-reduce tp",  # the embedding; maximum and sums of the softmax; gradient of the last hidden state
        "9 all-reduce tp",  # the norms of the divided gradients
    ),
    "tp2-sp": (
        "2 all-gather tp, 2 all-reduce tp",
        "4 all-gather tp, 7 all-reduce tp",  # 5, and the gradients of two norms
        "2 reduce-scatter tp, 2 all-gather tp, 3 all-reduce tp",  # with that of the last norm
        "9 all-reduce tp",
    ),
    "ring4": (
        "3 collective-permute cp",
        "6 collective-permute cp",
        "",
        "9 reduce-scatter cp, 9 all-gather cp, 15 all-reduce cp",  # as ZeRO-1 over dp, see below
    ),
    "ulysses2": (
        "2 all-to-all ulysses",
        "2 all-to-all ulysses",
        "",
        "9 reduce-scatter ulysses, 9 all-gather ulysses, 15 all-reduce ulysses",
    ),
    # Gradients of three norms, which are whole, are summed whole; the loss; the norms of all; tokens, twice.
    "zero1": ("", "", "", "9 reduce-scatter dp, 9 all-gather dp, 15 all-reduce dp"),
    "zero3": (
        "7 all-gather dp",
        "7 all-gather dp, 9 all-reduce dp",
        "2 reduce-scatter dp, 2 all-reduce dp",
        "2 all-gather dp, 11 all-reduce dp",  # embedding and head stay gathered for all microbatches
    ),
    "ring2-tp2-sp-zero3": (
        "7 all-gather dp+cp, 2 all-gather tp, 2 all-reduce tp, 1 collective-permute cp",
        "7 all-gather dp+cp, 4 all-gather tp, 5 all-reduce tp, 2 collective-permute cp,"
        "7 all-reduce dp+cp, 2 all-reduce cp+tp, 2 all-reduce dp",  # gradients of kernels, and of norms
        "2 reduce-scatter tp, 2 all-gather tp, 2 all-reduce tp, 2 reduce-scatter dp+cp,"
        "1 all-reduce cp, 1 all-reduce cp+tp, 2 all-reduce dp",
        "2 all-gather dp+cp, 9 all-reduce dp+cp, 9 all-reduce tp, 2 all-reduce dp, 2 all-reduce cp",
    ),
}

# XLA:GPU packs small gradients, and the squares of all, into one array each.
ON_H100 = {
    "tp2": ("2 all-reduce tp", "2 all-reduce tp", "4 all-reduce tp", "1 all-reduce tp"),
    "tp2-sp": (
        "2 all-gather tp, 2 reduce-scatter tp",
        "4 all-gather tp, 2 reduce-scatter tp",
        "2 reduce-scatter tp, 2 all-gather tp, 3 all-reduce tp",
        "1 all-reduce tp",
    ),
    "ring4": (
        "3 collective-permute cp",
        "6 collective-permute cp",
        "",
        "9 reduce-scatter cp, 9 all-gather cp, 2 all-reduce cp",
    ),
    "ulysses2": (
        "2 all-to-all ulysses",
        "2 all-to-all ulysses",
        "",
        "9 reduce-scatter ulysses, 9 all-gather ulysses, 2 all-reduce ulysses",
    ),
    # Keys and values are gathered together.
    "allgather2": (
        "1 all-gather cp",
        "1 reduce-scatter cp",
        "",
        "9 reduce-scatter cp, 9 all-gather cp, 2 all-reduce cp",
    ),
    "zero0": ("", "", "", "2 all-reduce dp"),
    "zero1": ("", "", "", "9 reduce-scatter dp, 9 all-gather dp, 2 all-reduce dp"),
    "zero2": ("", "7 reduce-scatter dp", "2 reduce-scatter dp, 1 all-reduce dp", "9 all-gather dp, 2 all-reduce dp"),
    "zero3": (
        "7 all-gather dp",
        "7 all-gather dp, 7 reduce-scatter dp",
        "2 all-gather dp, 2 reduce-scatter dp, 1 all-reduce dp",
        "2 all-reduce dp",
    ),
    "ring2-tp2-sp-zero3": (
        "7 all-gather dp+cp, 2 all-gather tp, 2 reduce-scatter tp, 1 collective-permute cp",
        "7 all-gather dp+cp, 4 all-gather tp, 2 reduce-scatter tp, 2 collective-permute cp, 7 reduce-scatter dp+cp",
        "2 reduce-scatter tp, 2 all-gather tp, 2 all-reduce tp, 2 all-gather dp+cp, 2 reduce-scatter dp+cp,"
        "1 all-reduce dp+cp+tp",
        "2 all-reduce dp+cp, 1 all-reduce dp+cp+tp",
    ),
}


@pytest.mark.parametrize("layout", ON_CPU)
def test_on_cpu(layout):
    step = _on_cpu(**LAYOUTS[layout])
    found = census(step.text, step.mesh)
    assert _counts(found) == _expected(ON_CPU[layout]), "\n".join(map(str, found))


def test_sizes():
    """What tensor parallelism sends in a layer are whole activations of a microbatch, what ZeRO-1 gathers are all
    parameters but the norms."""
    step = _on_cpu(**LAYOUTS["tp2"])
    for collective in census(step.text, step.mesh):
        if _place(collective) in ("forward", "backward"):
            assert collective.operand_bytes == collective.arrays * (BATCH // M) * SEQ * HIDDEN_BYTES
    step = _on_cpu(**LAYOUTS["zero1"])
    gathered = sum(c.result_bytes for c in census(step.text, step.mesh) if c.kind == "all-gather")
    attention, mlp = 4 * 32, 3 * 64
    assert gathered == HIDDEN_BYTES * (L * (attention + mlp) + 2 * VOCAB)


def _check_pipeline(step: Compiled, p: int, m: int, norms: int) -> None:
    """m + p - 1 ticks have a forward, as many a backward, and each sends one activation; that of the last is left out
    where there is but one cool-down tick. All stages share embedding and loss, in up to six all-reduces: of the
    embedding; of the last hidden state, to bring it to all; of maximum and sums of the softmax; of its gradient; and of
    the embedding's. Once in the step, the norms of gradients."""
    found = census(step.text, step.mesh)
    times = Counter[tuple[str, bool]]()
    for collective in found:
        assert collective.axes == ("pp",)
        times[collective.kind, collective.conditional] += collective.times * collective.arrays
    ticks = m + p - 1
    assert times == {
        ("collective-permute", False): 2 * ticks - (p == 2),
        ("all-reduce", True): 6 * ticks,
        ("all-reduce", False): norms,
    }, "\n".join(map(str, found))
    activation = BATCH // m * SEQ * HIDDEN_BYTES
    assert {c.operand_bytes // c.arrays for c in found if c.kind == "collective-permute"} == {activation}


def test_pipeline():
    _check_pipeline(_on_cpu(2, 8, **PP), 2, 8, norms=KERNELS + NORMS + 2)


def test_no_product_is_computed_twice():
    """Products of all devices together are those of one. But a pipeline computes for nothing in p - 1 of m + p - 1
    ticks; and of n devices in a ring, each with two of 2 n parts of the sequence, causality hides all but 2 n + 1 of
    4 n pairs of parts, while the backward pass makes the scores again: five products a pair of tokens instead of four.
    """
    one = dot_flops(_on_cpu(1).text)
    product = 2 * SEQ**2 * 32 * BATCH * L
    for name, step in _steps():
        expected = one
        if name.startswith("ring"):
            n = int(name[4])
            expected += (2 + 5) * product * (2 * n + 1) / (4 * n) - (2 + 4) * product
        assert dot_flops(step.text) * step.mesh.size == expected, name
    p, m = 2, 8
    pipelined = dot_flops(_on_cpu(p, m, **PP).text) * p * m / (m + p - 1)
    assert pipelined == pytest.approx(one, rel=0.05)


def _steps() -> Iterator[tuple[str, Compiled]]:
    for name in ON_CPU:
        yield name, _on_cpu(**LAYOUTS[name])


REMATERIALIZED = "nvoluntary full rematerialization"


def test_nothing_is_rematerialized():
    """XLA's partitioner never had to replicate an array to get from one sharding to another. It says so only when it
    compiles: programs that come from the cache passed here when they were compiled."""
    said = {name: step.messages for name, step in [*_steps(), ("pp2", _on_cpu(2, 8, **PP))]}
    assert {name: text for name, text in said.items() if REMATERIALIZED in text} == {}


def test_rematerialization_would_be_seen():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    [before, after] = [NamedSharding(mesh, PartitionSpec(*axes)) for axes in [(("a", "b"),), (None, "b", "a")]]

    def f(x):
        return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(2 * x, before) - 1, after)

    # Of random size: what comes from the cache says nothing.
    lowered = jax.jit(f).lower(jax.ShapeDtypeStruct((8, 8, 8 * random.randrange(1, 10**6)), jnp.float32))
    with _stderr_of_the_process() as said:
        lowered.compile()
    assert REMATERIALIZED in said[0]


on_h100 = pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is None, reason="needs the extra aot")


def _on_h100(devices: int, microbatches: int = M, **parallel: Any) -> Compiled:
    return _compile(tuple(absent_gpus(devices)), microbatches, parallel)


@on_h100
@pytest.mark.slow
@pytest.mark.parametrize("layout", ON_H100)
def test_on_h100(layout):
    step = _on_h100(**LAYOUTS[layout])
    found = census(step.text, step.mesh)
    assert _counts(found) == _expected(ON_H100[layout]), "\n".join(map(str, found))
    assert REMATERIALIZED not in step.messages
    if not layout.startswith("ring"):
        assert dot_flops(step.text) * step.mesh.size == dot_flops(_on_cpu(1).text)
    if layout == "tp2-sp":
        whole = (BATCH // M) * SEQ * HIDDEN_BYTES
        for c in (c for c in found if _place(c) in ("forward", "backward")):
            assert max(c.operand_bytes, c.result_bytes) == c.arrays * whole


@on_h100
@pytest.mark.slow
@pytest.mark.parametrize("p", [2, 4])
def test_pipeline_on_h100(p):
    _check_pipeline(_on_h100(p, 8, **PP | {"pipeline_model_parallel_size": p}), p, 8, norms=1)
