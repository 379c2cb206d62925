"""Saving and restoring: values, meshes, vocabulary padding, which step, and what a mismatch says."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from megajax.checkpoint import CheckpointError, CheckpointStore
from megajax.config import CheckpointConfig, ConfigError

MODEL = {"vocab_size": 37, "hidden_size": 16, "ffn_hidden_size": 32}
EXTRAS = {"consumed_samples": 24, "iterator": {"epoch": 1, "at": [3, 4]}, "seed": 1234, "lr": 1e-3}


@pytest.fixture
def open_store(tmp_path: Path, axes: Any):
    """Opens `tmp_path/ck` for the small model; every store is closed at the end."""
    stores = []

    def open_(
        *, model: dict[str, Any] = MODEL, retain: int = 2, async_save: bool = True, family: str = "gpt", **kwargs: Any
    ) -> CheckpointStore:
        config = CheckpointConfig(save_retain=retain, async_save=async_save)
        kwargs = {"logical_axes": axes} | kwargs
        stores.append(CheckpointStore.open(tmp_path / "ck", config, family=family, model_config=model, **kwargs))
        return stores[-1]

    yield open_
    for store in stores:
        store.close()


@pytest.mark.parametrize("target", ["one", "dp8", "2x4"])
@pytest.mark.parametrize("source", ["dp8", "2x4"])
def test_any_mesh_restores_onto_any_other(open_store, make_state, abstract, assert_same, source, target):
    store = open_store()
    assert store.save(5, make_state(3, mesh=source), EXTRAS)
    wanted = make_state(3, mesh=target)
    state, extras = store.restore(abstract(wanted))
    assert_same(state, wanted)
    assert extras == EXTRAS


@pytest.mark.parametrize("padded", [37, 40, 48, 128])
def test_vocabulary_padding_may_change(open_store, make_state, abstract, assert_same, padded):
    store = open_store()
    store.save(5, make_state(3, padded=64, mesh="2x4"), {})
    mesh = "one" if padded == 37 else "dp8"
    wanted = make_state(3, padded=padded, mesh=mesh)
    assert_same(store.restore(abstract(wanted))[0], wanted)


def test_garbage_in_the_padding_is_not_stored(open_store, make_state, abstract):
    state = make_state(3, padded=40)
    rows = state.params["embedding"]["word_embeddings"]["embedding"].at[37:].set(jnp.nan)
    state.params["embedding"]["word_embeddings"]["embedding"] = rows
    store = open_store()
    store.save(5, state, {})
    restored = store.restore(abstract(state))[0].params["embedding"]["word_embeddings"]["embedding"]
    np.testing.assert_array_equal(restored[:37], rows[:37])
    np.testing.assert_array_equal(restored[37:], 0)


def test_arrays_on_disk_are_the_logical_ones(open_store, make_state, read_raw):
    state = make_state(3, mesh="2x4")
    store = open_store()
    store.save(5, state, EXTRAS)
    store.wait()
    folder = store.directory / "step_00000005"
    embedding = np.asarray(state.params["embedding"]["word_embeddings"]["embedding"])
    for name, expected in {
        "params/embedding/word_embeddings/embedding": embedding[:37],
        "params/output_layer/kernel": np.asarray(state.params["output_layer"]["kernel"])[:, :37],
        "opt_state/0/mu/output_layer/kernel": np.asarray(state.opt_state[0].mu["output_layer"]["kernel"])[:, :37],
        "params/decoder/layers/mlp/linear_fc1/kernel": state.params["decoder"]["layers"]["mlp"]["linear_fc1"]["kernel"],
        "half/bf16": state.half["bf16"],
        "rng": state.rng,
        "samples": state.samples,
    }.items():
        found = read_raw(folder, name)
        assert found.dtype == expected.dtype, name
        np.testing.assert_array_equal(found, expected, err_msg=name)
    tree = ocp.PyTreeCheckpointer().restore(folder)  # Orbax alone can open a step
    np.testing.assert_array_equal(tree["opt_state"]["0"]["nu"]["output_layer"]["kernel"].shape, (16, 37))
    assert json.loads((folder / "extras.json").read_text()) == EXTRAS
    config = json.loads((folder / "config.json").read_text())
    assert (config["family"], config["step"], config["model_config"]) == ("gpt", 5, MODEL)


def test_no_device_holds_a_whole_unpadded_table(make_state):
    from megajax.checkpoint.tree import Leaf, unpad

    kernel = make_state(3, padded=40, mesh="2x4").params["embedding"]["word_embeddings"]["embedding"]
    cut = unpad(kernel, Leaf((37, 16), "float32", ("vocab", "embed")))  # 37 rows do not divide by tp=4
    assert cut.shape == (37, 16)
    assert {shard.data.size for shard in cut.addressable_shards} == {37 * 16 // 8}


def test_buffers_may_be_donated_while_the_save_runs(open_store, make_state, abstract, assert_same):
    update = jax.jit(lambda state: jax.tree.map(lambda x: x + x, state), donate_argnums=0)
    store = open_store(retain=100)
    for step in range(1, 6):
        state = make_state(step, mesh="2x4").replace(note=None)
        state = state.replace(half={**state.half, "mask": jnp.zeros(3)})
        store.save(step, state, {})
        for _ in range(3):
            state = update(state)  # overwrites the donated buffers
    for step in range(1, 6):
        expected = make_state(step, mesh="2x4").replace(note=None)
        expected = expected.replace(half={**expected.half, "mask": jnp.zeros(3)})
        assert_same(store.restore(abstract(expected), step=step)[0], expected)


def test_numpy_and_python_leaves_come_back_as_such(open_store):
    state = {"params": {"w": np.arange(3.0)}, "flag": True, "count": 2**40, "rate": 0.1, "none": None, "empty": {}}
    store = open_store(logical_axes=None)
    store.save(1, state, {})
    restored, _ = store.restore({**state, "count": 0, "rate": 0.0, "flag": False, "params": {"w": np.zeros(3)}})
    assert restored.pop("params")["w"].tolist() == [0.0, 1.0, 2.0]
    assert restored == {"flag": True, "count": 2**40, "rate": 0.1, "none": None, "empty": {}}


def test_a_saved_python_scalar_may_be_restored_as_an_array(open_store):
    store = open_store(logical_axes=None)
    store.save(1, {"count": 3, "rate": 0.5}, {})
    restored, _ = store.restore({"count": jax.ShapeDtypeStruct((), jnp.int32), "rate": jnp.float32(0)})
    assert (int(restored["count"]), restored["count"].dtype) == (3, jnp.int32)
    assert (float(restored["rate"]), restored["rate"].dtype) == (0.5, jnp.float32)


def test_a_bug_is_not_reported_as_a_full_disk(open_store, monkeypatch):
    def broken() -> None:
        raise TypeError("a bug")

    store = open_store(async_save=False)
    monkeypatch.setattr(store, "_complete_folder", broken)
    with pytest.raises(TypeError, match="a bug"):
        store.save(1, {"count": np.int32(3)}, {})
    assert _steps(store) == []


def test_floats_may_change_precision(open_store, make_state):
    store = open_store(logical_axes=None, model={})
    store.save(1, {"params": {"w": jnp.arange(6.0) / 7}}, {})
    target = {"params": {"w": jax.ShapeDtypeStruct((6,), jnp.bfloat16)}}
    restored = store.restore(target)[0]["params"]["w"]
    np.testing.assert_array_equal(restored, (np.arange(6.0, dtype=np.float32) / 7).astype(jnp.bfloat16))


def test_finetune_takes_only_the_weights(open_store, make_state, abstract, assert_same):
    open_store(async_save=False).save(5, make_state(3, mesh="dp8"), {})
    # The other store has no logical axes of a state: it knows the vocabulary from the stored ones.
    wanted = make_state(3, padded=64, mesh="2x4").params
    reader = open_store(read_only=True, logical_axes=None)
    assert_same(reader.restore_params(abstract(wanted)), wanted)
    with pytest.raises(CheckpointError, match="read only"):
        reader.save(6, make_state(3), {})


def test_keeps_the_newest(open_store, make_state):
    store = open_store(retain=2)
    for step in (10, 20, 30, 40):
        store.save(step, make_state(step), {})
    store.wait()
    assert _steps(store) == ["step_00000030", "step_00000040"]
    assert store.latest_step() == 40


def _steps(store: CheckpointStore) -> list[str]:
    return sorted(name for name in os.listdir(store.directory) if name != ".lock")


def test_a_step_is_saved_once_unless_forced(open_store, make_state, abstract, assert_same):
    store = open_store(async_save=False)
    assert store.save(5, make_state(1), {})
    assert not store.save(5, make_state(2), {})
    assert_same(store.restore(abstract(make_state(1)))[0], make_state(1))
    assert store.save(5, make_state(2), {}, force=True)
    assert_same(store.restore(abstract(make_state(2)))[0], make_state(2))
    assert _steps(store) == ["step_00000005"]


def test_a_fresh_run_does_not_overwrite_another_runs_steps(open_store, make_state):
    with open_store() as store:
        store.save(100, make_state(1), {})
    with pytest.raises(CheckpointError, match="holds step 100 of another run, newer than step 5"):
        open_store().save(5, make_state(2), {})


def test_going_back_to_an_older_step_leaves_the_newer_ones_behind(open_store, make_state, abstract):
    with open_store(retain=3) as store:
        for step in (10, 20, 30):
            store.save(step, make_state(step), {})
    store = open_store(retain=3)
    store.restore(abstract(make_state()), step=10)
    assert store.latest_step() == 30  # nothing is lost before there is something new
    store.save(15, make_state(15), {})
    assert store.latest_step() == 15
    assert _steps(store) == ["step_00000010", "step_00000015"]


def test_another_shape_names_the_parameter_both_shapes_and_the_fix(open_store, make_state, abstract):
    open_store(async_save=False).save(5, make_state(), {})
    state = abstract(make_state())
    state.params["decoder"]["layers"]["mlp"]["linear_fc1"]["kernel"] = jax.ShapeDtypeStruct((4, 16, 64), jnp.float32)
    with pytest.raises(ConfigError) as caught:
        open_store(model={**MODEL, "ffn_hidden_size": 64}).restore(state)
    message = str(caught.value)
    assert "params/decoder/layers/mlp/linear_fc1/kernel is float32[4,16,32] there and float32[4,16,64] here" in message
    assert "ffn_hidden_size=32 there, 64 here" in message
    assert "config.json" in message
    assert "\n" not in message


def test_another_vocabulary_is_another_model(open_store, make_state, abstract):
    open_store(async_save=False).save(5, make_state(), {})
    with pytest.raises(CheckpointError, match=r"embedding is float32\[37,16\] there and float32\[39,16\] here"):
        open_store(model={**MODEL, "vocab_size": 39}).restore(abstract(make_state()))


def test_another_family_names_what_is_absent(open_store, make_state, abstract):
    open_store(async_save=False).save(5, make_state(), {})
    state = abstract(make_state())
    state.params["pooler"] = {"kernel": jax.ShapeDtypeStruct((16, 16), jnp.float32)}
    with pytest.raises(CheckpointError, match=r"params/pooler/kernel is absent there.*model gpt there, bert here"):
        open_store(family="bert").restore(state)


def test_another_optimizer_is_told_from_another_model(open_store, make_state, abstract):
    open_store(async_save=False).save(5, make_state(), {})
    state = abstract(make_state())
    momentum = optax.TraceState(trace=state.params)
    with pytest.raises(CheckpointError, match=r"opt_state/0/trace/.* is absent there.*optimizer settings"):
        open_store().restore(state.replace(opt_state=(momentum, optax.EmptyState())))


def test_none_and_an_array_differ(open_store, make_state, abstract):
    open_store(async_save=False).save(5, make_state(), {})
    state = abstract(make_state()).replace(loss_scale=jax.ShapeDtypeStruct((), jnp.float32))
    with pytest.raises(CheckpointError, match=r"loss_scale is None there and float32\[\] here"):
        open_store().restore(state)


def test_settings_that_leave_the_shapes_alone_are_reported(open_store, make_state, abstract, caplog):
    open_store(async_save=False, model={**MODEL, "rotary_base": 1e4}).save(5, make_state(), {})
    with caplog.at_level(logging.WARNING, "megajax.checkpoint"):
        open_store(model={**MODEL, "rotary_base": 5e5, "of_a_later_version": True}).restore(abstract(make_state()))
    [record] = [r for r in caplog.records if r.name == "megajax.checkpoint"]
    assert record.getMessage().endswith("other settings: rotary_base=10000.0 there, 500000.0 here")


def test_extras_that_json_cannot_keep_are_refused_before_anything_is_written(open_store, make_state):
    store = open_store()
    with pytest.raises(TypeError, match="extras holds a bytes"):
        store.save(5, make_state(), {"iterator": b"\0"})
    assert _steps(store) == []


def test_a_typed_key_is_refused_by_name(open_store):
    with pytest.raises(CheckpointError, match="rng is a typed PRNG key"):
        open_store(logical_axes=None).save(1, {"rng": jax.random.key(0)}, {})


def test_saving_inside_a_mesh_context(open_store, make_state, abstract, assert_same):
    state = make_state(3, mesh="2x4")
    store = open_store()
    with jax.set_mesh(state.params["output_layer"]["kernel"].sharding.mesh):
        store.save(5, state, {})
        restored, _ = store.restore(abstract(state))
    assert_same(restored, state)


def test_orbax_is_quiet(open_store, make_state, abstract, capfd):
    store = open_store()
    store.save(5, make_state(), {})
    store.restore(abstract(make_state()))
    assert capfd.readouterr() == ("", "")


def test_the_package_does_not_import_orbax_until_it_is_needed(tmp_path):
    import subprocess
    import sys

    code = (
        "import sys; from megajax.checkpoint import CheckpointStore; from megajax.config import CheckpointConfig;"
        f"s = CheckpointStore.open({str(tmp_path / 'x')!r}, CheckpointConfig(), family='gpt', model_config={{}});"
        "assert s.latest_step() is None; s.close(); assert not any(m.startswith('orbax') for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env={**os.environ, "JAX_PLATFORMS": "cpu"})
