"""The search for a mesh: what is possible, what is compiled, and what comes first."""

# SPDX-License-Identifier: Apache-2.0
import importlib.util
import json
import math

import pytest

from megajax import cli
from megajax.config import Config, ConfigError
from megajax.models.registry import FAMILIES
from megajax.parallel.aot import TARGETS
from megajax.planning import search
from megajax.planning.text import format_search, ranked_json

needs_aot = pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is None, reason="needs the extra aot")


def parsed(*words: str) -> Config:
    flags = ["--model", "gpt", "--bf16", "--num-layers", "4", "--optimizer", "adam", "--micro-batch-size", "1", *words]
    return cli.parse(flags, prog="test", families=FAMILIES)


def candidates(devices: int, *words: str) -> list[search.Candidate]:
    config = search.fitted(parsed(*words), FAMILIES["gpt"])
    return list(search.candidates(config, FAMILIES["gpt"], TARGETS["h100"], devices))


def test_candidates_are_what_the_trainer_accepts():
    found = candidates(8, "--global-batch-size", "8")
    meshes = {one.mesh for one in found}
    assert len(meshes) == len(found) and "dp=8 zero=1" in meshes and "dp=8 zero=3 recompute=full" in meshes
    for one in found:
        parallel = one.config.parallel
        sizes = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
        assert 4 % sizes[1] == 0 and 8 % (math.prod(sizes) * parallel.context_parallel_size) == 0
        again = parsed("--global-batch-size", "8", *one.flags)
        assert (again.parallel, again.model.recompute_granularity) == (parallel, one.config.model.recompute_granularity)


def test_arithmetic_weighs_memory_and_work():
    found = {one.mesh: one for one in candidates(8, "--global-batch-size", "8")}
    assert found["dp=8 zero=3"].memory < found["dp=8 zero=1"].memory
    assert found["dp=8 zero=1 recompute=full"].seconds > found["dp=8 zero=1"].seconds


def test_a_batch_that_nothing_divides():
    assert not [one for one in candidates(8, "--global-batch-size", "7") if "dp" in one.mesh]


@needs_aot
def test_the_best_is_compiled_and_fits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(search, "COMPILED", 2)
    said = []
    ranked = search.search(
        parsed("--global-batch-size", "8"), FAMILIES["gpt"], "h100", 2, lambda *progress: said.append(progress)
    )
    assert [one.report is not None for one in ranked[:3]] == [True, True, False] and ranked[0].fits
    times = [one.report.seconds for one in ranked if one.report is not None]
    assert times == sorted(times)
    assert [done for done, _, _ in said] == [0, 0, 1] and said[1][2] in {one.candidate.mesh for one in ranked}
    text = "\n".join(format_search(ranked))
    assert ranked[0].candidate.mesh in text and f"{len(ranked)} meshes are possible" in text
    rows = json.loads(json.dumps(ranked_json(ranked)))
    assert rows[0]["compiled"]["fits"] and rows[2]["compiled"] is None


@needs_aot
def test_no_mesh_at_all():
    config = parsed("--global-batch-size", "8", "--micro-batch-size", "8")
    monkey = pytest.MonkeyPatch()
    monkey.setattr(search, "candidates", lambda *_: iter(()))
    with monkey.context(), pytest.raises(ConfigError, match="no mesh of 8 devices"):
        search.search(config, FAMILIES["gpt"], "h100", 8, lambda *_: None)
    monkey.undo()
