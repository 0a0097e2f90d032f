"""Names of a package looked up in its source, by syntax trees."""

from __future__ import annotations

import ast
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_MAX_HOPS = 8  # from a name that a module imports to where it is defined


class Found(NamedTuple):
    """Where a name is defined.

    Attributes:
        node: a module, class, function or assignment.
        place: file and line, from the folder that holds the package.
    """

    node: ast.AST
    module: str
    place: str


class Tree:
    """The source of packages below a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        # Parsing is most of the work, and most names share their module with others.
        self._parse = lru_cache(maxsize=None)(self._parse_file)

    def find(self, module: str, path: str) -> Found | None:
        """What a name of a module stands for, wherever it is defined; None if nothing.

        Args:
            path: of the name in the module, such as "Class.method" or
                "Class.attribute"; empty for the module itself.
        """
        return self._find(module, path.split(".") if path else [], _MAX_HOPS)

    def lines(self, found: Found) -> list[tuple[int, str]]:
        """The source lines of what was found, numbered."""
        file = self._file(found.module)
        assert file is not None
        text = file.read_text().splitlines()
        first = getattr(found.node, "lineno", 1)
        last = getattr(found.node, "end_lineno", None) or len(text)
        return list(enumerate(text[first - 1 : last], start=first))

    def _find(self, module: str, names: list[str], hops: int) -> Found | None:
        tree = self._parse(module)
        if tree is None or not hops:
            return None
        node: ast.AST = tree
        for i, name in enumerate(names):
            inner = _members(node).get(name)
            if isinstance(inner, ast.ImportFrom):
                return self._follow(module, inner, name, names[i + 1 :], hops)
            if inner is None and isinstance(node, ast.ClassDef):
                inner = _attributes(node).get(name)
                if inner is None:
                    return self._find_in_bases(module, node, names[i:], hops)
            if inner is None:
                as_module = self._find(f"{module}.{name}", names[i + 1 :], hops - 1)
                return as_module if node is tree else None
            node = inner
        line = getattr(node, "lineno", 1)
        file = self._file(module)
        assert file is not None
        return Found(node, module, f"{file.relative_to(self.root)}:{line}")

    def _follow(
        self, module: str, node: ast.ImportFrom, name: str, rest: list[str], hops: int
    ) -> Found | None:
        real = next(a.name for a in node.names if (a.asname or a.name) == name)
        origin = node.module or ""
        if node.level:
            parts = module.split(".")
            file = self._file(module)
            is_package = file is not None and file.name == "__init__.py"
            kept = len(parts) - node.level + is_package
            origin = ".".join(parts[:kept] + ([origin] if origin else []))
        return self._find(origin, [real, *rest], hops - 1)

    def _find_in_bases(
        self, module: str, node: ast.ClassDef, names: list[str], hops: int
    ) -> Found | None:
        for base in node.bases:
            text = ast.unparse(base).partition("[")[0]
            found = self._find(module, [*text.split("."), *names], hops - 1)
            if found is not None:
                return found
        return None

    def _parse_file(self, module: str) -> ast.Module | None:
        file = self._file(module)
        return None if file is None else ast.parse(file.read_text())

    def _file(self, module: str) -> Path | None:
        base = self.root.joinpath(*module.split("."))
        for file in (base.with_suffix(".py"), base / "__init__.py"):
            if file.is_file():
                return file
        return None


def parameters(node: ast.AST) -> tuple[set[str], bool] | None:
    """A function's parameters, or a class's constructor's where it has one.

    Returns:
        Their names, and whether it takes any others as well; None if that cannot be
        read here, as of a dataclass.
    """
    if isinstance(node, ast.ClassDef):
        init = _members(node).get("__init__")
        return parameters(init) if isinstance(init, _Function) else None
    if not isinstance(node, _Function):
        return None
    named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return {argument.arg for argument in named}, node.args.kwarg is not None


def _members(node: ast.AST) -> dict[str, ast.AST]:
    """What a module's or a class's body defines, in whatever branch.

    The last definition counts, but one of another branch only if there is no other: of
    a failed import it is a makeshift.
    """
    found: dict[str, ast.AST] = {}
    branches: list[ast.AST] = []
    for inner in getattr(node, "body", ()):
        if isinstance(inner, _Function | ast.ClassDef):
            found[inner.name] = inner
        elif isinstance(inner, ast.Assign | ast.AnnAssign):
            targets = inner.targets if isinstance(inner, ast.Assign) else [inner.target]
            found |= {t.id: inner for t in targets if isinstance(t, ast.Name)}
        elif isinstance(inner, ast.ImportFrom):
            found |= {alias.asname or alias.name: inner for alias in inner.names}
        elif isinstance(inner, ast.If | ast.Try):
            handlers = getattr(inner, "handlers", ())
            otherwise = ast.Module(body=inner.orelse, type_ignores=[])
            branches += [inner, otherwise, *handlers]
    for branch in branches:
        found = _members(branch) | found
    return found


def _attributes(node: ast.ClassDef) -> dict[str, ast.AST]:
    """What a class's methods assign to `self`."""
    found: dict[str, ast.AST] = {}
    for inner in ast.walk(node):
        if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
            if isinstance(inner.value, ast.Name) and inner.value.id == "self":
                found.setdefault(inner.attr, inner)
    return found
