"""`import megajax` is light: it costs little beside JAX and touches no device."""

# SPDX-License-Identifier: Apache-2.0
import statistics
import subprocess
import sys
import time

import pytest

BACKENDS = "jax = sys.modules.get('jax._src.xla_bridge'); assert jax is None or not jax._backends, jax._backends"


def _run(code: str) -> float:
    """Seconds that a fresh interpreter takes for `code`."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return time.perf_counter() - start


def test_import_takes_less_than_a_second_more_than_jax() -> None:
    rounds = [(_run("import jax"), _run("import jax, megajax")) for _ in range(3)]
    jax_alone, with_megajax = (statistics.median(times) for times in zip(*rounds, strict=True))
    assert with_megajax - jax_alone < 1.0, f"import jax: {jax_alone:.2f} s, with megajax: {with_megajax:.2f} s"


@pytest.mark.parametrize("module", ["megajax", "megajax.config"])
def test_import_touches_no_device(module: str) -> None:
    _run(f"import sys, {module}; {BACKENDS}")


def test_config_does_not_import_jax() -> None:
    _run("import sys, megajax.config; assert 'jax' not in sys.modules, 'megajax.config imports jax'")
