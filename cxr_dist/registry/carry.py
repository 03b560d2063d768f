"""The modules that a logged model takes along, under a package name of their own.

A model that carried its code as `cxr_dist` would be read by whatever `cxr_dist` a process has already imported, would hide
an installed one from later imports, and two models of different versions could not live in one process. So the package is
renamed after a hash of its own sources: `cxr_model_<hash>`. Which modules go along is not listed but followed: from the
entry module through every import of this project, those inside functions too.
"""

import ast
import hashlib
import re
from pathlib import Path

import cxr_dist
from cxr_dist.errors import RunError

__all__ = ["ENTRY", "PREFIX", "carried", "write_code"]

PACKAGE = "cxr_dist"
PREFIX = "cxr_model_"
ENTRY = f"{PACKAGE}.serve.model"
HEAVY = ("ray", "mlflow.tracking", "pyarrow", "scipy", "sklearn", "torchvision", "matplotlib")
"""What no carried module may import: a model's environment has none of it."""


def carried(entry: str = ENTRY) -> dict[str, str]:
    """Path below the package to source, of the entry module and all that it imports of this project.

    RunError for an import that cannot be renamed, or that a model's environment would not have.
    """
    sources: dict[str, str] = {}
    waiting = [entry]
    while waiting:
        module = waiting.pop()
        path = _path(module)
        if path is None or path in sources:
            continue
        sources[path] = (_root() / path).read_text()
        parents = [".".join(module.split(".")[:depth]) for depth in range(1, module.count(".") + 1)]
        waiting += parents + _imports(sources[path], path)
    return dict(sorted(sources.items()))


def write_code(folder: Path) -> str:
    """Write the package into a folder; the name of its entry module."""
    sources = carried()
    digest = hashlib.sha256("".join(f"{path}\n{text}\n" for path, text in sources.items()).encode()).hexdigest()
    package = f"{PREFIX}{digest[:12]}"
    for path, text in sources.items():
        where = folder / package / path
        where.parent.mkdir(parents=True, exist_ok=True)
        where.write_text(_renamed(text, package))
    return package + ENTRY.removeprefix(PACKAGE)


def _imports(source: str, path: str) -> list[str]:
    """Modules of this project that a source may import; of `from a.b import c` both a.b and a.b.c."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        modules = [str(node.module)] if isinstance(node, ast.ImportFrom) else names
        if heavy := [name for name in modules if any(f"{name}.".startswith(f"{one}.") for one in HEAVY)]:
            raise RunError(
                f"{path}: found an import of {heavy[0]}, expected none in what a model carries; import it elsewhere"
            )
        ours = [name for name in modules if name.split(".")[0] == PACKAGE]
        if ours and isinstance(node, ast.Import):
            raise RunError(f"{path}: found 'import {ours[0]}', expected 'from … import …', which can be renamed")
        found += ours + [f"{module}.{name}" for module in ours for name in names]
    return found


def _renamed(source: str, package: str) -> str:
    """The source with its own package's imports under another name, line by line."""
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == PACKAGE:
            lines[node.lineno - 1] = re.sub(rf"\bfrom {PACKAGE}\b", f"from {package}", lines[node.lineno - 1], count=1)
    return "".join(lines)


def _path(module: str) -> str | None:
    """Path of a module below the package; None if it is none (a name in a module)."""
    inside = module.split(".")[1:]
    for path in ("/".join([*inside, "__init__.py"]), "/".join(inside) + ".py"):
        if (_root() / path).is_file():
            return path
    return None


def _root() -> Path:
    return Path(str(cxr_dist.__file__)).parent
