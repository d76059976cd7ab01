"""The modules of the library that a notebook's code brings in, found by reading them, and a hash of each.

A module that is imported brings all that it imports at top level. What a function or class imports inside its body
counts once the name analysis reaches it: from the names that the notebook uses, through the bodies of what they stand
for, to the names used there. A method counts once its class is reached and any attribute of its name is used, whatever
it belongs to: too much rather than too little. Of a class with bases all methods count, since a base may call them.
"""

from __future__ import annotations

import ast
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from smaflib import files

PACKAGE = Path(__file__).parents[1]

AROUND = ("", "errors", "explorer", "report", "runs")
"""Parts of the package that show results or keep a run in order, ``""`` for its own ``__init__``: after a change there
a notebook is executed again, but no network is trained and no map or mask made again."""

EVERYTHING = "*"
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def imported_modules(sources: Iterable[str], package: Path = PACKAGE) -> dict[str, str]:
    """The modules of a package that some code imports, directly or through one another, with their hashes.

    Args:
        sources: the code, a text per cell; what is no Python, such as a magic, is left out.
        package: the package's folder.
    """
    cells = [cell for source in sources if (cell := _parse(source)) is not None]
    closure = _Closure(package)
    closure.follow(_read_block(_Block(), [node for cell in cells for node in cell.body], "", inside=True))
    return {name: closure.module(name).code for name, inner in sorted(closure.reached) if not inner}


def is_around(module: str) -> bool:
    """Whether a module belongs to :data:`AROUND`."""
    return (module.split(".") + [""])[1] in AROUND


def library_hash() -> str:
    """SHA-256 of the library's own sources."""
    return files.tree_hash([path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts], PACKAGE)


def code_only(source: str) -> str:
    """Code without comments, docstrings and layout; what is no Python, such as a magic, as it is."""
    tree = _parse(source)
    return source if tree is None else _dump(tree)


def _parse(source: str) -> ast.Module | None:
    try:
        return ast.parse(source)
    except SyntaxError:
        return None


def _dump(tree: ast.Module) -> str:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, *_FUNCTIONS)):
            node.body = [line for line in node.body if not (isinstance(line, ast.Expr) and _text(line.value))]
    return ast.dump(tree)


def _text(node: ast.AST | None) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _name(node: ast.AST) -> str:
    """``f`` of ``f`` and of ``module.f``."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


@dataclass
class _Block:
    """What a piece of code refers to.

    Attributes:
        imports: local name, module, and the name there; ``""`` for the module itself.
        uses: names that are read, each with its attribute, such as ``("files", "write_text")``; ``*`` without one.
        attributes: all names behind a dot.
    """

    imports: set[tuple[str, str, str]] = field(default_factory=set)
    uses: set[tuple[str, str]] = field(default_factory=set)
    attributes: set[str] = field(default_factory=set)


@dataclass
class _Module:
    """A module.

    Attributes:
        code: its hash.
        blocks: its functions, classes, methods (``Class.method``) and constants by name; ``""`` is its top level.
        texts: its tables of texts, such as those from which a ``__getattr__`` imports: (key, value).
    """

    code: str = ""
    blocks: dict[str, _Block] = field(default_factory=lambda: defaultdict(_Block))
    texts: set[tuple[str, str]] = field(default_factory=set)


class _Closure:
    """Collects the names of modules that some code reaches; the name ``""`` of a module means that it is imported."""

    def __init__(self, package: Path) -> None:
        self.package, self.reached, self._todo = package, set[tuple[str, str]](), list[tuple[str, _Block]]()
        self._attributes, self._methods = set[str](), list[tuple[str, str]]()  # seen; not called so far
        self._path, self.module = cache(self._find), cache(self._read)  # each asks the disk

    def follow(self, block: _Block) -> None:
        """Reach all that some code refers to, and so on."""
        self._todo.append(("", block))
        while self._todo:
            module, block = self._todo.pop()
            known = self.module(module).blocks
            for _, target, name in block.imports:
                self._load(target)
                self._load(f"{target}.{name}")
            for name, attribute in block.uses:
                for local, target, original in known[""].imports | block.imports:
                    if local == name:
                        inner = f"{target}.{original}".rstrip(".")
                        self._reach(*((inner, attribute) if self._path(inner) else (target, original)))
                if name in known:
                    self._reach(module, name)
            if new := block.attributes - self._attributes:
                self._attributes |= new
                for of, method in [waiting for waiting in self._methods if waiting[1].partition(".")[2] in new]:
                    self._reach(of, method)

    def _reach(self, module: str, name: str) -> None:
        """Reach a name of a module, wherever the module itself has it from."""
        if self._path(module) is None or (module, name) in self.reached:
            return
        self._load(module)
        self.reached.add((module, name))
        blocks, texts = self.module(module).blocks, self.module(module).texts
        imported = {local for local, _, _ in blocks[""].imports}
        if name == EVERYTHING:
            for inner in blocks.keys() | imported:
                self._reach(module, inner)
        elif name in blocks:
            self._todo.append((module, blocks[name]))
            methods = [block for block in blocks if block.startswith(f"{name}.")]
            self._methods += [(module, method) for method in methods]
            for method in methods:
                if method.partition(".")[2] in self._attributes:
                    self._reach(module, method)
        elif name in imported:
            self._todo.append((module, _Block(uses={(name, EVERYTHING)})))
        elif self._path(f"{module}.{name}"):
            self._reach(f"{module}.{name}", EVERYTHING)
        else:  # a name that __getattr__ imports, by a table at best
            for home in (home for key, home in texts if key == name):
                self._reach(home if self._path(home) else f"{module}.{home}", name)

    def _load(self, module: str) -> None:
        """Import a module, if it is one, and the packages on the way to it."""
        parts = module.split(".") if self._path(module) else ()
        for name in (".".join(parts[: count + 1]) for count in range(len(parts))):
            if self._path(name) and (name, "") not in self.reached:
                self.reached.add((name, ""))
                self._todo.append((name, self.module(name).blocks[""]))

    def _find(self, module: str) -> Path | None:
        first, *parts = module.split(".")
        if first != self.package.name or not all(part.isidentifier() for part in parts):
            return None
        path = self.package.joinpath(*parts)
        return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)

    def _read(self, module: str) -> _Module:
        path = self._path(module)
        if path is None:  # the code that all begins with
            return _Module()
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        return _read_module(path, package, path.stat().st_mtime_ns)


@cache
def _read_module(path: Path, package: str, _changed: int) -> _Module:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    module = _Module(hashlib.sha256(_dump(tree).encode()).hexdigest()[:16])
    _read_block(module.blocks[""], tree.body, package, inside=False)
    for node in (inner for statement in tree.body for inner in _nodes(statement, inside=False)):
        names: list[str] = []
        if isinstance(node, ast.Dict):
            module.texts |= {(_text(key), _text(value)) for key, value in zip(node.keys, node.values, strict=True)}
        elif isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
            names = [node.name]
            if node.decorator_list:  # what decorates it may call it
                module.blocks[""].uses.add((node.name, EVERYTHING))
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
        parts: dict[str, list[ast.AST]] = {name: [node] for name in names}
        if isinstance(node, ast.ClassDef) and not node.bases:
            parts = {node.name: list(node.decorator_list)}
            for part in node.body:
                method = part.name if isinstance(part, _FUNCTIONS) and not part.name.startswith("__") else ""
                parts.setdefault(f"{node.name}.{method}".strip("."), []).append(part)
        for name, nodes in parts.items():
            _read_block(module.blocks[name], nodes, package, inside=True)
    return module


def _read_block(block: _Block, nodes: Iterable[ast.AST], package: str, inside: bool) -> _Block:
    """Add to a block what some statements refer to; with ``inside`` also bodies of functions."""
    for node in (inner for statement in nodes for inner in _nodes(statement, inside)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                block.imports.add((alias.asname or alias.name, alias.name, ""))
                if not alias.asname:  # its uses are attributes of attributes
                    block.uses.add((alias.name, EVERYTHING))
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".") if node.level else []
            parents = parents[: len(parents) - node.level + 1]
            source = ".".join([*parents, *filter(None, [node.module])])
            for alias in node.names:
                block.imports.add((alias.asname or alias.name, source, alias.name))
                if alias.name == EVERYTHING:
                    block.uses.add((EVERYTHING, EVERYTHING))
        elif isinstance(node, ast.Attribute):
            block.attributes.add(node.attr)
            if isinstance(node.value, ast.Name):
                block.uses.add((node.value.id, node.attr))
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            block.uses.add((node.id, EVERYTHING))
        elif isinstance(node, ast.Call) and node.args and _name(node.func) in ("import_module", "__import__"):
            module = _text(node.args[0])
            block.imports.add((module, module, ""))
            block.uses.add((module, EVERYTHING))
        elif isinstance(node, ast.Call) and len(node.args) > 1 and _name(node.func) == "getattr":
            block.attributes.add(_text(node.args[1]))
    return block


def _nodes(node: ast.AST, inside: bool) -> Iterator[ast.AST]:
    """A node and those below it, without what only type checkers see; bodies of functions only with ``inside``."""
    yield node
    children: Iterable[ast.AST] = ast.iter_child_nodes(node)
    if isinstance(node, ast.If) and _name(node.test) == "TYPE_CHECKING":
        children = node.orelse
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        children = ()  # as a pair, so that of a module only this attribute counts
    elif isinstance(node, _FUNCTIONS):
        defaults = [default for default in [*node.args.defaults, *node.args.kw_defaults] if default]
        children = [*node.decorator_list, *defaults, *(node.body if inside else ())]
    for child in children:
        yield from _nodes(child, inside)
