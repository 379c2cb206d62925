"""Devices to compile for."""

# SPDX-License-Identifier: Apache-2.0
import importlib.util

import pytest

from megajax.config import ConfigError
from megajax.parallel.aot import absent_gpus

INSTALLED = importlib.util.find_spec("jax_plugins") is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((8, "h900"), "choose from h100"), ((12,), "12 GPUs are no whole number of nodes of 8"), ((0,), "0 GPUs")],
)
def test_mistakes(arguments, message):
    with pytest.raises(ConfigError, match=message):
        absent_gpus(*arguments)


@pytest.mark.skipif(INSTALLED, reason="there is a compiler for GPUs")
def test_says_what_to_install():
    with pytest.raises(ConfigError, match=r"pip install 'megajax\[aot\]'"):
        absent_gpus(8)


@pytest.mark.skipif(not INSTALLED, reason="needs the extra aot")
@pytest.mark.parametrize("count", [2, 8, 32])
def test_devices(count):
    devices = absent_gpus(count)
    assert len(devices) == count
    assert {device.device_kind for device in devices} == {"NVIDIA H100 80GB HBM3"}
