"""The README is true: its table is generated, its code runs, its commands are those that the checks run."""

# SPDX-License-Identifier: Apache-2.0
import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_table_is_generated():
    spec = importlib.util.spec_from_file_location("readme_table", ROOT / "tests" / "readme_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.with_table(README) == README, "run python tests/readme_table.py"


def test_swapping_example_runs():
    code = re.search(r"```python\n(import jax.*?)```", README, re.DOTALL)
    assert code is not None
    names: dict = {}
    exec(code.group(1), names)
    assert names["logits"].shape == (1, 32, 100)


def test_test_command_is_what_the_checks_run():
    command = ".venv/bin/python -m pytest"
    assert command in README
    assert "-m pytest" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_linked_files_exist():
    for target in re.findall(r"\]\(([\w./]+)\)", README):
        assert (ROOT / target).exists(), target
