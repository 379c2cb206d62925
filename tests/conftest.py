"""What every test runs on: eight simulated CPU devices, full fp32 products, compiled programs kept between runs."""

# SPDX-License-Identifier: Apache-2.0
import gc
import hashlib
import os
import platform
import re
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

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
if version("jaxlib").startswith("0.10."):
    # XLA's older code for fusions, which later versions lack, takes half as long to compile. The newer one is that of
    # the programs that tests start, and of all tests where JAX is newer.
    XLA_FLAGS |= {"--xla_cpu_use_fusion_emitters": "false", "--xla_cpu_parallel_codegen_split_count": "1"}
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
import jax.numpy as jnp  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")
# Tracing makes millions of small objects, few of them garbage: with Python's threshold of 700, to look for it takes a
# sixth of a test.
gc.set_threshold(50_000)


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
def sums_of_53_bits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every number that is not fp8 is a float64.

    Layouts add up in other orders, and a sum that differs in its last bit may round to its other neighbour in fp8,
    1/16 away, from which on nothing is alike. So near to the middle between two neighbours lies one number in 10^6 of
    those with 24 bits, and hardly ever one of 53: then layouts agree to the last bits, or scale a tensor otherwise.
    """
    monkeypatch.setattr(jnp, "float32", jnp.float64)
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def pallas_kernel() -> Any:
    """The Pallas kernels, interpreted, in blocks so small that short sequences are of several."""
    from functools import partial

    from megajax.ops import pallas_attention
    from megajax.ops.flash_attention import FlashKernel
    from megajax.ops.pallas_attention import Blocks, Tuning

    options: Any = {"tuning": Tuning(Blocks(16, 32), Blocks(32, 16), Blocks(16, 16), Blocks(32, 16)), "interpret": True}
    forward, backward = pallas_attention.forward, pallas_attention.backward
    return FlashKernel(partial(forward, **options), partial(backward, **options), any_part=True)


@pytest.fixture(scope="session")
def reference_kernel() -> Any:
    """What a flash kernel has to compute, in plain JAX and fp32: stands in for those that need a GPU."""
    from megajax.ops.flash_attention import FlashKernel

    def scores(q, k, bias, mask, scale):
        k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
        s = jnp.einsum("BSNK,BTNK->BSNT", q.astype(jnp.float32), k.astype(jnp.float32)) * scale
        s += 0 if bias is None else bias.astype(jnp.float32).transpose(0, 2, 1, 3)
        keep = mask.dense(q.shape[1], k.shape[1])
        return s if keep is None else jnp.where(keep.transpose(0, 2, 1, 3), s, -jnp.inf), k

    def forward(q, k, v, bias, mask, scale):
        s, _ = scores(q, k, bias, mask, scale)
        lse = jax.nn.logsumexp(s, axis=-1)
        probs = jnp.exp(s - jnp.where(jnp.isneginf(lse), 0.0, lse)[..., None])
        v = jnp.repeat(v, q.shape[2] // v.shape[2], axis=2).astype(jnp.float32)
        return jnp.einsum("BSNT,BTNV->BSNV", probs, v).astype(q.dtype), lse

    def backward(q, k, v, bias, mask, scale, y, lse, dy):
        B, T, G, _ = k.shape
        s, k = scores(q, k, bias, mask, scale)
        probs, dy = jnp.exp(s - lse[..., None]), dy.astype(jnp.float32)
        wide_v = jnp.repeat(v, q.shape[2] // G, axis=2).astype(jnp.float32)
        dprobs = jnp.einsum("BSNV,BTNV->BSNT", dy, wide_v)
        ds = probs * (dprobs - jnp.sum(dy * y.astype(jnp.float32), -1, keepdims=True))
        dq = jnp.einsum("BSNT,BTNK->BSNK", ds, k.astype(jnp.float32)) * scale
        dk = jnp.einsum("BSNT,BSNK->BTNK", ds, q.astype(jnp.float32)) * scale
        dv = jnp.einsum("BSNT,BSNV->BTNV", probs, dy)
        dk, dv = (x.reshape(B, T, G, -1, x.shape[-1]).sum(3) for x in (dk, dv))
        dbias = None
        if bias is not None:
            dbias = ds.transpose(0, 2, 1, 3)
            dbias = (dbias.sum(0, keepdims=True) if bias.shape[0] == 1 else dbias).astype(bias.dtype)
        return dq.astype(q.dtype), dk.astype(q.dtype), dv.astype(q.dtype), dbias

    return FlashKernel(forward, backward)


@pytest.fixture(scope="session")
def said() -> Callable[[str], str]:
    """What a program wrote to stderr, less what JAX's CUDA wheels (the extra `aot`) report where no driver is."""
    reports = re.compile(
        r"^(\[\d+\] )?(WARNING: All log messages before absl::|[IWE]\d{4} .*\bcudart_stub\.cc:).*\n", re.MULTILINE
    )
    return lambda stderr: reports.sub("", stderr)


@pytest.fixture
def program_env() -> dict[str, str]:
    """Environment for a program in a subprocess as a user would start it: one CPU device, optimized code."""
    ours = {f"{flag}={value}" for flag, value in XLA_FLAGS.items()}
    kept = [flag for flag in os.environ["XLA_FLAGS"].split() if flag not in ours]
    return {**os.environ, "XLA_FLAGS": " ".join(kept)}


@pytest.fixture
def ptx_of(tmp_path: Path) -> Iterator[Callable[[Any], tuple[Any, list[str]]]]:
    """Compiles what was lowered for a GPU: (the executable, the assembly of those of its kernels that multiply on
    tensor cores). A program of the cache has none, so it is left alone."""

    def compiled(lowered: Any) -> tuple[Any, list[str]]:
        executable = lowered.compile(compiler_options={"xla_dump_to": str(tmp_path)})
        kernels = (file.read_text() for file in sorted(tmp_path.glob("*.ptx")))
        return executable, [text for text in kernels if "mma" in text]

    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield compiled
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()
