"""`--mesh` in the words of the trainer."""

# SPDX-License-Identifier: Apache-2.0
import pytest

from megajax.config import ConfigError
from megajax.planning.mesh_flags import mesh_flags


def test_words():
    assert mesh_flags(None, 8) == []
    words = mesh_flags("tp=8, pp=4,sp,zero=3,dp=2", 64)
    assert words == ["--tp", "8", "--pp", "4", "--sequence-parallel", "--zero", "3"]


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("tq=8", "there is no axis 'tq'; choose from tp, pp"),
        ("tp=eight", "tp=eight is not valid; expected a number"),
        ("tp", "expected a number"),
        ("sp=2", "write sp"),
        ("tp=4,dp=3", "dp=3 is not what 8 devices leave, 2"),
    ],
)
def test_mistakes(mesh: str, message: str):
    with pytest.raises(ConfigError, match=message):
        mesh_flags(mesh, 8)
