"""The shape of the package, read from its syntax trees: floors, budgets, names, and habits that hide mistakes.

Each test collects `file:line: what is wrong` and fails with the whole list. docs: CONTRIBUTING.md, "House style".
"""

# SPDX-License-Identifier: Apache-2.0
import ast
import dataclasses
import re
import sys
import tomllib
import warnings
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "megajax"

# Imports go down or stay level. A name is that of a module or a package of the first level.
FLOORS = {
    "config": 0,
    "config_checks": 0,
    "config_distributed": 0,
    "config_heterogeneous": 0,
    "config_kernels": 0,
    "config_moe": 0,
    "config_optimizer": 0,
    "config_parallel": 0,
    "config_positions": 0,
    "config_run": 0,
    "cli": 0,
    "cli_effects": 0,
    "cli_flags": 0,
    "cli_help": 0,
    "cli_json": 0,
    "status_line": 0,
    "xla_flags": 0,
    "spec": 1,
    "kernels": 1,
    "ops": 2,
    "parallel": 2,
    "backends": 3,
    "transformer": 3,
    "ssm": 3,
    "models": 4,
    "training": 5,
    "checkpoint": 5,
    "data": 5,
    "inference": 5,
    "interop": 5,
    "launch": 6,
    "train": 6,
    "generate": 6,
    "reshard": 6,
    "convert": 6,
    "plan": 6,
    "planning": 6,
    "doctor": 6,
}
# What plugs a family into the programs stands on their floor: its record, data, writing, and weights elsewhere.
PLUGS = ("_family", "_data", "_generate", "_hf", "_megatron")
PLUG_MODULES = ("models.family", "models.language", "models.registry", "models.request")
PLUG_FLOOR = 5
NO_FLAX = ("ops", "data")

MAX_FILE_LINES, WISHED_FILE_LINES = 500, 400
MAX_FUNCTION_LINES, WISHED_FUNCTION_LINES = 100, 60

# Where a family may be called by its name, beside the registry and interop/, whose adapters are each for one family.
FAMILY_HOMES = {
    "gpt": ("models/gpt/", "models/mamba/", "models/multimodal/"),  # hybrids and those that see are GPTs, too
    "bert": ("models/bert/",),
    "t5": ("models/t5/",),
    "mamba": ("models/mamba/", "models/multimodal/", "ssm/"),  # the mixer bears the name of its paper
    "llava": ("models/multimodal/",),
    "clip": ("models/vision/", "models/multimodal/"),
    "radio": ("models/vision/", "models/multimodal/"),
    "retro": ("models/retro/",),
}
REGISTRY = "models/registry.py"
# Megatron's own words that hold a family's name: the datasets and tokenizers of every decoder, flags that are refused,
# and the table of all its settings.
MEGATRON_WORDS = re.compile(r"GPTDataset(Config)?|gpt_dataset|GPTSentencePieceTokenizer|--mamba-\*")
MEGATRON_FILES = ("data/gpt_dataset.py",)

PRINTERS = (
    "status_line.py",
    "cli.py",
)  # speaks for the programs

# Settings that only these read have no effect on a run.
NOT_READERS = ("config", "cli", "interop/")


@dataclasses.dataclass(frozen=True)
class Module:
    """One Python file of the package, parsed."""

    path: Path
    source: str
    tree: ast.Module

    @property
    def relative(self) -> str:
        """Path inside the package, such as `ops/norms.py`."""
        return self.path.relative_to(ROOT / PACKAGE).as_posix()

    @property
    def name(self) -> str:
        """Dotted name, such as `megajax.ops.norms`."""
        parts = self.path.relative_to(ROOT).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def at(self, node: ast.AST, message: str) -> str:
        """`file:line: message`."""
        return f"{PACKAGE}/{self.relative}:{node.lineno}: {message}"  # pyright: ignore[reportAttributeAccessIssue]


@cache
def modules() -> tuple[Module, ...]:
    """Every module of the package."""
    files = sorted((ROOT / PACKAGE).rglob("*.py"))
    sources = [file.read_text() for file in files]
    return tuple(
        Module(file, source, ast.parse(source, file)) for file, source in zip(files, sources, strict=True) if source
    )


@cache
def module_names() -> frozenset[str]:
    """Dotted names of every module of the package."""
    return frozenset(module.name for module in modules())


def fail_with(faults: Iterable[str], rule: str) -> None:
    """Fails when there are faults, with all of them."""
    listed = list(faults)
    if listed:
        pytest.fail(f"{rule} ({len(listed)}):\n  " + "\n  ".join(listed), pytrace=False)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports(module: Module, *, at_run_time: bool = False) -> Iterator[tuple[ast.AST, str]]:
    """(node, dotted name) of every import; `from a import b` is `a.b` where that is a module of ours, else `a`."""
    pending: list[ast.AST] = [module.tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.name.split(".") if module.path.name == "__init__.py" else module.name.split(".")[:-1]
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                deeper = f"{source}.{alias.name}"
                yield node, deeper if deeper in module_names() else source
        elif not (at_run_time and _is_type_checking(node)):
            pending.extend(ast.iter_child_nodes(node))


def _floor(name: str) -> int | None:
    parts = name.split(".")
    within = ".".join(parts[1:])
    if within in PLUG_MODULES or (parts[1:2] == ["models"] and within.endswith(PLUGS)):
        return PLUG_FLOOR
    return FLOORS.get(parts[1]) if len(parts) > 1 else 0


def test_imports_only_go_down() -> None:
    faults = []
    for module in modules():
        own = _floor(module.name)
        if own is None:
            faults.append(f"{PACKAGE}/{module.relative}: has no floor; give it one in FLOORS")
            continue
        for node, name in imports(module):
            floor = _floor(name) if name.split(".")[0] == PACKAGE else None
            if floor is not None and floor > own:
                faults.append(module.at(node, f"floor {own} imports {name} of floor {floor}"))
    fail_with(faults, "Imports go down, never up")


def test_no_import_cycles() -> None:
    graph = {
        module.name: {name for _, name in imports(module, at_run_time=True) if name in module_names()} - {module.name}
        for module in modules()
    }
    # Leaves go first; what never becomes a leaf lies on a cycle or above one.
    while leaves := {name for name, targets in graph.items() if not targets}:
        graph = {name: targets - leaves for name, targets in graph.items() if name not in leaves}
    above = graph
    while tops := set(above) - set().union(*above.values()):
        above = {name: targets for name, targets in above.items() if name not in tops}
    fail_with((f"{name} -> {', '.join(sorted(t & set(above)))}" for name, t in sorted(above.items())), "Import cycle")


@pytest.mark.parametrize("package", NO_FLAX)
def test_does_not_import_flax(package: str) -> None:
    faults = [
        module.at(node, f"imports {name}")
        for module in modules()
        if module.relative.startswith(f"{package}/")
        for node, name in imports(module)
        if name.split(".")[0] == "flax"
    ]
    fail_with(faults, f"{package}/ is pure JAX or plain Python")


IMPORT_NAMES = {"orbax-checkpoint": "orbax", "absl-py": "absl", "ml-dtypes": "ml_dtypes", "scikit-learn": "sklearn"}
IMPORT_NAMES |= {"pillow": "PIL"}


def _distributions(requirements: list[str]) -> set[str]:
    names = {re.split(r"[^A-Za-z0-9_-]", requirement)[0] for requirement in requirements}
    return {IMPORT_NAMES.get(name, name) for name in names}


def test_imports_are_declared_dependencies() -> None:
    """Modules import the base install at their top; extras where they are used. Nothing is declared in vain."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base = _distributions(project["dependencies"])
    users_extras = [names for extra, names in project["optional-dependencies"].items() if extra not in ("test", "dev")]
    extras = _distributions([name for names in users_extras for name in names])
    faults, used = [], set()
    for module in modules():
        at_top = {id(node) for node in module.tree.body}
        for node, name in imports(module):
            top = name.split(".")[0]
            used.add(top)
            if top in sys.stdlib_module_names or top == PACKAGE or top in base:
                continue
            if top in extras and id(node) not in at_top:
                continue
            where = "at the top of a module" if top in extras else "but no dependency"
            faults.append(module.at(node, f"{top} is imported {where}"))
    faults += [f"pyproject.toml: {name} is a dependency that nothing imports" for name in sorted(base - used)]
    fail_with(faults, "Imports and dependencies agree")


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def _sizes() -> Iterator[tuple[str, int, int, int]]:
    """(what, lines, hard limit, wished limit) of every file and function of the package and its tests."""
    for file in [*sorted((ROOT / PACKAGE).rglob("*.py")), *sorted((ROOT / "tests").rglob("*.py"))]:
        source, where = file.read_text(), file.relative_to(ROOT).as_posix()
        yield where, len(source.splitlines()), MAX_FILE_LINES, WISHED_FILE_LINES
        for function in _functions(ast.parse(source, file)):
            lines = (function.end_lineno or function.lineno) - function.lineno + 1
            yield f"{where}:{function.lineno}: {function.name}", lines, MAX_FUNCTION_LINES, WISHED_FUNCTION_LINES


def test_budgets() -> None:
    sizes = list(_sizes())
    long = [f"{what}: {lines} lines, wished {wish}" for what, lines, limit, wish in sizes if wish < lines <= limit]
    if long:
        warnings.warn("Longer than wished:\n  " + "\n  ".join(long), stacklevel=1)
    too_long = [f"{what}: {lines} lines, limit {limit}" for what, lines, limit, _ in sizes if lines > limit]
    fail_with(too_long, "Files and functions fit a reader's head")


def _calls(tree: ast.AST, name: str) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name:
            yield node


def test_no_guessing_and_no_global_state() -> None:
    faults = []
    for module in modules():
        faults += [module.at(node, "hasattr") for node in _calls(module.tree, "hasattr")]
        faults += [
            module.at(node, "getattr with a default") for node in _calls(module.tree, "getattr") if len(node.args) > 2
        ]
        faults += [
            module.at(node, f"{type(node).__name__.lower()} {', '.join(node.names)}")
            for node in ast.walk(module.tree)
            if isinstance(node, ast.Global)
        ]
    fail_with(faults, "Attributes are known, state is passed")


def test_only_programs_print() -> None:
    faults = [
        module.at(node, "print")
        for module in modules()
        if 'if __name__ == "__main__":' not in module.source and module.relative not in PRINTERS
        for node in _calls(module.tree, "print")
    ]
    fail_with(faults, "Only programs print")


def _family_pattern(family: str) -> re.Pattern[str]:
    """`family` as a word of an identifier (snake or camel case) or of a message; `clip` is also a verb."""
    capital = rf"(?<![A-Z])({family.upper()}|{family.capitalize()})(?![a-z])"
    if family == "clip":
        return re.compile(r"(?<![A-Z])CLIP(?![a-z_])|^'clip'$|clip_(vit|vision|model)")
    return re.compile(rf"(?<![A-Za-z0-9]){family}(?![a-z])|{capital}")


def _docstrings(tree: ast.AST) -> set[int]:
    """Strings that stand alone: docstrings, of fields too."""
    return {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def _words(module: Module) -> Iterator[tuple[ast.AST, str]]:
    """Identifiers and strings of the code, docstrings left out."""
    prose = _docstrings(module.tree)
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Name):
            yield node, node.id
        elif isinstance(node, ast.Attribute):
            yield node, node.attr
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node, node.name
        elif isinstance(node, ast.arg | ast.keyword):
            yield node, node.arg or ""
        elif isinstance(node, ast.Import | ast.ImportFrom):
            source = node.module if isinstance(node, ast.ImportFrom) else None
            yield from ((node, name) for name in [source or "", *(alias.name for alias in node.names)])
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node, repr(node.value)


def _may_name(module: Module, family: str) -> bool:
    allowed = module.relative.startswith("interop/") or module.relative == REGISTRY or module.relative in MEGATRON_FILES
    return allowed or module.relative.startswith(FAMILY_HOMES[family])


def test_families_are_named_only_at_home() -> None:
    faults = set()
    for family in FAMILY_HOMES:
        pattern = _family_pattern(family)
        for module in modules():
            if not _may_name(module, family):
                words = ((node, MEGATRON_WORDS.sub("", word)) for node, word in _words(module))
                faults |= {module.at(node, word) for node, word in words if pattern.search(word)}
    fail_with(sorted(faults), "A family is named in its folder and the registry only")


@pytest.mark.parametrize(
    ("family", "word", "found"),
    [
        ("gpt", "GPTModel", True),
        ("gpt", "get_gpt_layer_spec", True),
        ("gpt", "gptq", False),
        ("bert", "BertModel", True),
        ("bert", "roberta", False),
        ("t5", "T5Model", True),
        ("t5", "part5", False),
        ("clip", "clip_grad", False),
        ("clip", "CLIPVisionTransformer", True),
        ("retro", "RetroConfig", True),
        ("retro", "retrospect", False),
    ],
)
def test_family_pattern(family: str, word: str, found: bool) -> None:
    assert bool(_family_pattern(family).search(word)) is found


def test_licence_and_purpose_stand_on_top() -> None:
    faults = []
    for file in [*(ROOT / PACKAGE).rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        lines = file.read_text().splitlines()
        if not lines:
            continue
        tree, where = ast.parse("\n".join(lines)), file.relative_to(ROOT).as_posix()
        if not ast.get_docstring(tree):
            faults.append(f"{where}: no module docstring")
            continue
        below = next((line for line in lines[tree.body[0].end_lineno :] if line.strip()), "")
        if below != "# SPDX-License-Identifier: Apache-2.0":
            faults.append(f"{where}: no SPDX line under the docstring")
    fail_with(sorted(faults), "A file says what it is for, then its licence")


def _public_definitions(module: Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Public functions and classes at the top of a module, and the public methods of those classes."""
    pending: list[ast.stmt] = list(module.tree.body)
    for node in pending:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                pending += node.body


def test_public_names_have_docstrings() -> None:
    """A method needs none where it is one statement, or where its module documents another of that name."""
    faults = []
    for module in modules():
        methods = {child for node in module.tree.body if isinstance(node, ast.ClassDef) for child in node.body}
        definitions = list(_public_definitions(module))
        documented = {node.name for node in definitions if ast.get_docstring(node)} | {"setup"}
        faults += [
            module.at(node, node.name)
            for node in definitions
            if not ast.get_docstring(node)
            if node not in methods or (len(node.body) > 1 and node.name not in documented)
        ]
    fail_with(faults, "Public functions and classes have docstrings")


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def _config_classes() -> Iterator[tuple[Module, ast.ClassDef]]:
    for module in modules():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef) and _is_dataclass(node):
                yield from [(module, node)] if module.relative == "config.py" or node.name.endswith("Config") else []


def _attributes_read(tree: ast.AST) -> set[str]:
    return {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}


def _is_check(name: str) -> bool:
    return name.startswith("_validate") or name in ("__post_init__", "replace")


def _reads_through(class_node: ast.ClassDef) -> Iterator[tuple[str, set[str]]]:
    """(name, what it reads) of the methods of a config that derive a value; checks do not count as reading."""
    for function in _functions(class_node):
        if not _is_check(function.name):
            yield function.name, _attributes_read(function)
        for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
            if ast.unparse(call.func) == "self._derive" and isinstance(call.args[0], ast.Constant):
                yield str(call.args[0].value), _attributes_read(call)


def test_every_setting_is_read() -> None:
    configs = list(_config_classes())
    read: set[str] = set()
    for module in modules():
        if not module.relative.startswith(NOT_READERS):
            read |= _attributes_read(module.tree)
    derived = [pair for _, node in configs for pair in _reads_through(node)]
    while more := set().union(*(reads for name, reads in derived if name in read)) - read:
        read |= more
    faults = [
        module.at(field, f"{node.name}.{field.target.id}")
        for module, node in configs
        for field in node.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if not field.target.id.startswith("_") and field.target.id not in read
    ]
    fail_with(faults, "Every setting is read by something that acts on it")
