"""What each source file imports, read from its text: also inside functions and under TYPE_CHECKING."""

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "moewright"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# A room imports only from rooms that stand before it.
ROOMS = [
    *("errors", "report", "moe", "checkpoint", "family", "backbone", "auto", "data", "evaluate", "export", "convert"),
    *("grow", "upcycle", "surgery", "parallel", "optim", "distil", "plan", "train", "lens", "demo", "options", "cli"),
    "__main__",
]


def room(path: Path) -> str:
    """The room a source file belongs to; a file that stands in none fails here."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert first == "__init__" or first in ROOMS, f"{path.relative_to(ROOT)} is in no room of house order {ROOMS}"
    return first


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """Place (file:line) and absolute name of each import of a source file."""
    package = ".".join(path.relative_to(ROOT).parent.parts)
    for line, module in imports_of(tree(path), package=package):
        yield f"{path.relative_to(ROOT)}:{line}", module


def imports_of(module: ast.Module, *, package: str) -> Iterator[tuple[int, str]]:
    """Line and absolute name of each import, at whatever depth; ``from a import b`` counts as ``a.b``."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{stem}.{alias.name}") for alias in node.names)


def file_of(module: str) -> Path | None:
    """The source file that an imported name is, or stands in; None for what is not of the package."""
    path = ROOT.joinpath(*module.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if PACKAGE in candidate.parents and candidate.is_file():
            return candidate
    return file_of(module.rpartition(".")[0]) if "." in module else None


def files_imported(path: Path) -> set[Path]:
    """The source files of the package that a source file imports."""
    return {file for _, module in imports(path) if (file := file_of(module)) is not None} - {path}


def loops(graph: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """The groups of nodes that reach one another, each sorted; empty for a graph without a loop."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = list(graph.get(start, ()))
        while todo:
            if (node := todo.pop()) not in seen:
                seen.add(node)
                todo += graph.get(node, ())
        return seen

    reach = {node: reached(node) for node in graph}
    found = set()
    for node in graph:
        if node in reach[node]:
            found.add(tuple(sorted(other for other in reach[node] if node in reach.get(other, ()))))
    return [list(group) for group in sorted(found)]
