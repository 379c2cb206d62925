"""What every test runs on: eight simulated CPU devices, full fp32 products, compiled programs kept between runs."""

# SPDX-License-Identifier: Apache-2.0
import hashlib
import os
import platform
from importlib.metadata import version
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent

XLA_FLAGS = {
    "--xla_force_host_platform_device_count": "8",
    # Two workers share two cores: more threads per matrix product would only fight. Order of sums stays fixed, too.
    "--xla_cpu_multi_thread_eigen": "false",
    # Tests compile far longer than they compute; without LLVM's optimizer that time halves. HLO passes still all run.
    "--xla_backend_optimization_level": "0",
    # One order of collectives on every device, see megajax/training/setup.py.
    "--xla_cpu_enable_concurrency_optimized_scheduler": "false",
    # Eight device threads on a busy machine may keep each other waiting for long; that is no deadlock.
    "--xla_cpu_collective_call_terminate_timeout_seconds": "300",
}
CACHE_LIMIT_BYTES = 2 << 30


def _compilation_cache() -> Path:
    """One folder per JAX and kind of CPU, since compiled programs use the instructions of the CPU they were made on."""
    try:
        cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        cpu = platform.processor()
    key = hashlib.sha256(f"{version('jaxlib')} {platform.machine()} {cpu}".encode()).hexdigest()[:12]
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "megajax" / f"tests-{key}"


def _set_environment() -> None:
    """Must run before jax is imported. What the caller has set wins; subprocesses of tests inherit the result."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    given = os.environ.get("XLA_FLAGS", "")
    missing = [f"{flag}={value}" for flag, value in XLA_FLAGS.items() if flag not in given]
    os.environ["XLA_FLAGS"] = " ".join([given, *missing]).strip()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_compilation_cache()))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    for pool in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(pool, "1")


_set_environment()

import jax  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")


def pytest_configure(config: pytest.Config) -> None:
    """Drops the oldest compiled programs before the workers start. Workers need no lock: a half-written entry does
    not decompress, and JAX then compiles anew."""
    folder = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    if "PYTEST_XDIST_WORKER" in os.environ or not folder.is_dir():
        return
    entries = sorted(((e.stat().st_mtime, e.stat().st_size, e) for e in folder.iterdir() if e.is_file()), reverse=True)
    kept = 0
    for _, size, entry in entries:
        kept += size
        if kept > CACHE_LIMIT_BYTES:
            entry.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the numbers that other programs computed: `golden / case / file`."""
    return TESTS / "golden"


@pytest.fixture
def program_env() -> dict[str, str]:
    """Environment for a program in a subprocess as a user would start it: one CPU device, optimized code."""
    ours = {f"{flag}={value}" for flag, value in XLA_FLAGS.items()}
    kept = [flag for flag in os.environ["XLA_FLAGS"].split() if flag not in ours]
    return {**os.environ, "XLA_FLAGS": " ".join(kept)}
