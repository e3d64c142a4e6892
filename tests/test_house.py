"""The rules of the house that can be read from the source: who imports whom, and what nobody may do."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.imports import PACKAGE, ROOMS, ROOT, SOURCES, files_imported, imports, imports_of, loops, room, tree

EVERYTHING = sorted(
    path
    for folder in ("moewright", "scripts", "experiments", "benchmarks", "tests")
    for path in (ROOT / folder).rglob("*.py")
)

BANNED_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
BANNED_CALLS = {
    "torch.load",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "eval",
    "exec",
    "os.system",
    "os.popen",
}
BANNED_ARGUMENTS = {("shell", True), ("allow_pickle", True), ("trust_remote_code", True), ("weights_only", False)}


def test_imports_follow_the_order_of_the_rooms() -> None:
    wrong = [
        f"{where}: {room(path)} imports {target}, which comes after it"
        for path in SOURCES
        if path != PACKAGE / "__init__.py"
        for where, module in imports(path)
        if (target := room_of_module(module)) is not None and ROOMS.index(target) > ROOMS.index(room(path))
    ]
    assert not wrong, "\n".join(wrong)


def test_no_files_import_one_another_in_a_loop() -> None:
    graph = {name_of(path): {name_of(file) for file in files_imported(path)} for path in SOURCES}
    assert graph["moewright/cli.py"], "the reader of imports finds what the command line imports"
    assert loops(graph) == []


@pytest.mark.parametrize(
    ("graph", "expected"),
    [
        ({"a": "b", "b": "c", "c": ""}, []),
        ({"a": "b", "b": "a", "c": "ab"}, [["a", "b"]]),
        ({"a": "a"}, [["a"]]),
        ({"a": "b", "b": "c", "c": "d", "d": "b", "e": "f", "f": "e"}, [["b", "c", "d"], ["e", "f"]]),
    ],
)
def test_the_rule_sees_every_loop(graph: dict[str, str], expected: list[list[str]]) -> None:
    assert loops(graph) == expected


def test_the_package_itself_imports_nothing() -> None:
    assert not list(imports(PACKAGE / "__init__.py"))


@pytest.mark.parametrize(
    ("line", "target"),
    [
        ("import moewright.train.loop", "train"),
        ("from moewright.train import loop", "train"),
        ("from moewright import train", "train"),
        ("from ..train.loop import train_step", "train"),
        ("def f():\n    from moewright.cli import main", "cli"),
        ("from moewright import __version__", None),
        ("import torch.moewright", None),
    ],
)
def test_the_reader_sees_every_form_of_import(line: str, target: str | None) -> None:
    modules = [module for _, module in imports_of(ast.parse(line), package="moewright.moe")]
    assert [room_of_module(module) for module in modules if module != "moewright"] == [target]


def test_moe_knows_no_transformers_and_makes_no_process_group() -> None:
    wrong = [
        f"{where}: imports {module}"
        for path in SOURCES
        if room(path) == "moe"
        for where, module in imports(path)
        if module.split(".")[0] == "transformers"
        or module in ("torch.distributed.distributed_c10d", "torch.distributed.device_mesh", "torch.distributed.tensor")
    ]
    # It is handed a group, and adds over it; it neither makes nor looks one up.
    wrong += [
        f"{path.relative_to(ROOT)}:{node.lineno}: takes {name.name} from torch.distributed"
        for path in SOURCES
        if room(path) == "moe"
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ImportFrom) and node.module == "torch.distributed"
        for name in node.names
        if name.name not in ("ProcessGroup", "all_reduce")
    ]
    assert not wrong, "\n".join(wrong)


def test_only_checkpoint_opens_weight_files() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {what}"
        for path in SOURCES
        if room(path) != "checkpoint"
        for line, what in opens_weights(tree(path))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "line",
    [
        "from safetensors.torch import load_file",
        "import safetensors",
        "from moewright.checkpoint.tensorfile import read_tensor",
        "from moewright.checkpoint import tensorfile",
        "import moewright.checkpoint.tensorfile",
        "(folder / 'model.safetensors').open('rb')",
        "folder.glob(f'{name}.safetensors')",
    ],
)
def test_the_rule_sees_who_opens_weights(line: str) -> None:
    assert len(list(opens_weights(ast.parse(line)))) == 1


def test_the_rule_lets_a_name_of_a_class_and_a_sentence_pass() -> None:
    source = '"""Writes model.safetensors."""\nfrom moewright.checkpoint.tensorfile import LazyTensor, TensorInfo\n'
    assert list(opens_weights(ast.parse(source))) == []


def test_private_torch_names_live_in_one_file() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {name}"
        for path in SOURCES
        if path != PACKAGE / "parallel" / "_torch.py"
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute) and is_private_torch(name := dotted(node))
    ]
    wrong += [
        f"{where}: {module}"
        for path in SOURCES
        if path != PACKAGE / "parallel" / "_torch.py"
        for where, module in imports(path)
        if is_private_torch(module)
    ]
    assert not wrong, "\n".join(wrong)


def test_only_the_command_line_prints_and_exits() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {name}"
        for path in SOURCES
        if room(path) not in {"cli", "__main__"}
        for node in ast.walk(tree(path))
        if (
            isinstance(node, ast.Call)
            and (name := dotted(node.func)) in {"print", "exit", "quit", "sys.exit", "os._exit"}
        )
        or (isinstance(node, ast.Name) and (name := node.id) == "SystemExit")
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", EVERYTHING, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_runs_foreign_code(path: Path) -> None:
    assert list(banned(tree(path))) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from dill import loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "from yaml import load as safe_load",
        "eval('1')",
        "exec(code)",
        "subprocess.run('ls', shell=True)",
        "numpy.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
    ],
)
def test_the_ban_sees_what_it_bans(line: str) -> None:
    assert len(list(banned(ast.parse(line)))) == 1


def test_the_ban_lets_a_model_be_put_in_evaluation_mode() -> None:
    assert list(banned(ast.parse("model.eval(); safetensors.torch.load(b'')"))) == []


@pytest.mark.parametrize("module", ["moewright", "moewright.errors", "moewright.cli"])
def test_importing_is_cheap(module: str) -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'tyro', 'rich', 'numpy'}"
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_files_and_functions_stay_short() -> None:
    long = [
        f"{path.relative_to(ROOT)}: {n} lines" for path in SOURCES if (n := len(path.read_text().splitlines())) > 400
    ]
    long += [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {lines} lines"
        for path in SOURCES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > 60
    ]
    assert not long, "\n".join(long)


def room_of_module(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "moewright" and len(parts) > 1 and parts[1] in ROOMS else None


def dotted(node: ast.expr) -> str:
    """``a.b.c`` of a chain of names, else the empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (head := dotted(node.value)):
        return f"{head}.{node.attr}"
    return ""


def opens_weights(module: ast.Module) -> Iterator[tuple[int, str]]:
    """Imports that can read or write a tensor file, and the name of such a file outside of a docstring."""
    harmless = {f"moewright.checkpoint.tensorfile.{name}" for name in ("LazyTensor", "TensorInfo")}
    for line, name in imports_of(module, package=""):
        if name.split(".")[0] == "safetensors" or (
            name.startswith("moewright.checkpoint.tensorfile") and name not in harmless
        ):
            yield line, f"imports {name}"
    sentences = {id(node.value) for node in ast.walk(module) if isinstance(node, ast.Expr)}
    for node in ast.walk(module):
        if isinstance(node, ast.Constant) and str(node.value).endswith(".safetensors") and id(node) not in sentences:
            yield node.lineno, f"names {node.value}"


def is_private_torch(name: str) -> bool:
    first, *rest = name.split(".")
    return first == "torch" and any(part.startswith("_") and not part.startswith("__") for part in rest)


def banned(module: ast.Module) -> Iterator[str]:
    for line, name in imports_of(module, package=""):
        if name.split(".")[0] in BANNED_MODULES or name in BANNED_CALLS:
            yield f"line {line}: import of {name}"
    for node in ast.walk(module):
        if not isinstance(node, ast.Call):
            continue
        if (name := dotted(node.func)) in BANNED_CALLS:
            yield f"line {node.lineno}: call of {name}"
        for keyword in node.keywords:
            if isinstance(keyword.value, ast.Constant) and (keyword.arg, keyword.value.value) in BANNED_ARGUMENTS:
                yield f"line {node.lineno}: {keyword.arg}={keyword.value.value}"


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))
