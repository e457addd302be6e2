"""Reading vLLM's source, a folder that holds `vllm`: where a name is defined, what a class has."""

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef
# Of classes that are not vLLM's: what they give those that inherit from them, but dunder methods.
GIVEN = {"ABC": (), "Generic": (), "object": (), "Protocol": (), "Enum": ("name", "value")}


@dataclass(frozen=True)
class Symbol:
    """Where a name of vLLM is defined; a module stands for itself."""

    module: str
    node: ast.AST
    is_instance: bool = False


@cache
def parse(root: Path, module: str) -> tuple[ast.Module, bool] | None:
    """A module, and whether it is a package."""
    stem = root / module.replace(".", "/")
    for file, package in ((stem / "__init__.py", True), (stem.with_suffix(".py"), False)):
        if file.is_file():
            return ast.parse(file.read_text()), package
    return None


def version_of(root: Path) -> tuple[int, ...]:
    """For comparisons; empty where the source does not say."""
    parsed = parse(root, "vllm._version")
    said = re.search(r"\bversion = '([\d.]+)", ast.unparse(parsed[0])) if parsed else None
    return tuple(int(part) for part in said[1].strip(".").split(".")) if said else ()


@cache
def find(root: Path, module: str, name: str, depth: int = 0) -> Symbol | None:
    """`module.name`, through re-exports."""
    parsed = parse(root, module)
    if parsed is None or depth > 6:
        return None
    tree, package = parsed
    stars = []
    for node in statements(tree.body):
        if isinstance(node, Function | ast.ClassDef | ast.Assign | ast.AnnAssign):
            overload = isinstance(node, Function) and "overload" in decorators(node)
            if name in bound(node) and not overload:
                return Symbol(module, node)
        elif isinstance(node, ast.Import):
            if any((alias.asname or alias.name) == name for alias in node.names):
                return Symbol(module, node)
        elif isinstance(node, ast.ImportFrom):
            source = absolute(node, module, package)
            for alias in node.names:
                if alias.name == "*":
                    stars.append(source)
                elif (alias.asname or alias.name) == name:
                    read = source.split(".")[0] in ("vllm", "vllm_longspec")
                    return find(root, source, alias.name, depth + 1) if read else Symbol("", node)
    found = (find(root, source, name, depth + 1) for source in stars)
    if (hit := next(filter(None, found), None)) is not None:
        return hit
    for key, value in literal_items(tree):  # vLLM's lazy exports: {"LLM": ".entrypoints.llm:LLM"}
        if key == name and value.startswith(".") and ":" in value:
            source, leaf = value.split(":")
            return find(root, module + source, leaf, depth + 1)
    submodule = parse(root, f"{module}.{name}")
    return Symbol(f"{module}.{name}", submodule[0]) if submodule else None


def resolve(root: Path, dotted: str) -> Symbol | None:
    """A module, a name in one, or a method of a class in one."""
    if (parsed := parse(root, dotted)) is not None:
        return Symbol(dotted, parsed[0])
    owner, _, leaf = dotted.rpartition(".")
    if parse(root, owner) is not None:
        return find(root, owner, leaf)
    module, _, name = owner.rpartition(".")
    symbol = find(root, module, name) if module else None
    found = method(root, symbol, leaf) if symbol else None
    return Symbol(module, found) if found else None


def statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """With those under `if` and `try`."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from statements([*node.body, *node.orelse])
        if isinstance(node, ast.Try):
            yield from statements(s for handler in node.handlers for s in handler.body)


def bound(node: ast.AST) -> set[str]:
    """The names that a definition or an assignment binds, `self.name` among them."""
    if isinstance(node, Function | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    names = {t.id for t in targets if isinstance(t, ast.Name)}
    return names | {t.attr for t in targets if isinstance(t, ast.Attribute) and is_of_self(t)}


def is_of_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def decorators(node: Function | ast.ClassDef) -> set[str]:
    return set(re.findall(r"\w+", " ".join(map(ast.unparse, node.decorator_list))))


def absolute(node: ast.ImportFrom, module: str, package: bool) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + package]
    return ".".join([*parts, *([node.module] if node.module else [])])


def literal_items(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Constant):
                    yield str(key.value), str(value.value)


def classes(root: Path, symbol: Symbol) -> Iterator[Symbol]:
    """A class and those under this root that it inherits from, nearest first."""
    if isinstance(symbol.node, ast.ClassDef):
        yield symbol
        for base in symbol.node.bases:
            parent = find(root, symbol.module, base_name(base))
            if parent is not None:
                yield from classes(root, parent)


def base_name(base: ast.expr) -> str:
    return ast.unparse(base.value if isinstance(base, ast.Subscript) else base)


def method(root: Path, symbol: Symbol, name: str) -> Function | None:
    for parent in classes(root, symbol):
        for node in statements(parent.node.body):
            if isinstance(node, Function) and node.name == name:
                return node
    return None


@cache
def attributes(root: Path, symbol: Symbol) -> frozenset[str] | None:
    """None where a class that is not vLLM's may bring more."""
    names: set[str] = set()
    for parent in classes(root, symbol):
        for base in map(base_name, parent.node.bases):
            hit = find(root, parent.module, base)
            if hit is None or not isinstance(hit.node, ast.ClassDef):
                given = GIVEN.get(base.split(".")[-1])
                if given is None:
                    return None
                names.update(given)
        names |= own_attributes(parent.node)
    return frozenset(names)


def own_attributes(node: ast.AST) -> set[str]:
    kinds = Function | ast.ClassDef | ast.Assign | ast.AnnAssign
    return {name for child in ast.walk(node) if isinstance(child, kinds) for name in bound(child)}


def names_of(node: Function) -> list[str]:
    return [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]


def required(node: Function) -> set[str]:
    a = node.args
    by_position = [x.arg for x in (*a.posonlyargs, *a.args)]
    by_keyword = {x.arg for x, d in zip(a.kwonlyargs, a.kw_defaults, strict=True) if d is None}
    return by_keyword | set(by_position[: len(by_position) - len(a.defaults)])


def fields(root: Path, symbol: Symbol) -> Function | None:
    """The constructor of a dataclass as far as its names go."""
    if not any({"dataclass", "config"} & decorators(c.node) for c in classes(root, symbol)):
        return None
    names = ", ".join(f"{name}=None" for name in sorted(attributes(root, symbol) or ()))
    return ast.parse(f"def __init__(self, *args, {names}): ...").body[0] if names else None


def num_given(target: Function | None, of_instance: bool) -> int:
    """How many parameters a method has before those of a call: self or cls."""
    kinds = decorators(target) if target else set()
    return int("staticmethod" not in kinds and (of_instance or "classmethod" in kinds))


def switches_of(root: Path) -> dict[str, set[str]]:
    """What a user can set: fields of EngineArgs and AsyncEngineArgs, variables of `vllm.envs`,
    fields of SamplingParams."""

    def annotated(module: str, name: str) -> set[str]:
        symbol = find(root, module, name)
        body = symbol.node.body if symbol and isinstance(symbol.node, ast.ClassDef) else []
        return {ast.unparse(node.target) for node in body if isinstance(node, ast.AnnAssign)}

    module, variables = "vllm.engine.arg_utils", set()
    table = find(root, "vllm.envs", "environment_variables")
    if table is not None and isinstance(getattr(table.node, "value", None), ast.Dict):
        variables = {ast.literal_eval(key) for key in table.node.value.keys if key is not None}
    return {
        "arguments": annotated(module, "EngineArgs") | annotated(module, "AsyncEngineArgs"),
        "variables": variables,
        "parameters": annotated("vllm.sampling_params", "SamplingParams"),
    }
