#!/usr/bin/env python3
"""Whether vllm-longspec fits a vLLM, by the source of both: nothing is imported, no GPU is needed.

    check_vllm.py               the vLLM installed here
    check_vllm.py FOLDER        a folder that holds `vllm`, such as a wheel unpacked
    check_vllm.py --newest      the newest release on the package registry, kept in build/vllm

Checked: what the package imports of vLLM; attributes of it; the arguments of calls into it; the
parameters of what `runtime/patches.py` replaces and of methods that our classes override; methods
that our classes override in the vLLM installed here and nobody calls in the other; arguments,
variables and parameters that `runtime/switches.py` does not name, which nobody read. What fits but
was changed since the installed one is listed, to be read. Exit status: 0 fits, 1 does not, 3 the
registry was not reached and nothing was checked.
"""

import argparse
import ast
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from vllm_releases import UnreachableError, newest, unpacked
from vllm_source import (
    Function,
    Symbol,
    attributes,
    base_name,
    classes,
    fields,
    find,
    is_of_self,
    method,
    names_of,
    num_given,
    own_attributes,
    parse,
    required,
    resolve,
    switches_of,
    version_of,
)

from vllm_longspec.runtime.switches import KINDS

PACKAGE = Path(__file__).resolve().parent.parent / "vllm_longspec"


@dataclass
class Check:
    root: Path
    reference: Path | None  # a vLLM that is known to fit
    problems: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)


def check(root: Path, reference: Path | None = None) -> Check:
    if reference is not None and version_of(reference) > version_of(root):
        reference = None  # an older vLLM need not have what a newer one has
    done = Check(root, reference)
    patches = literals(PACKAGE / "runtime/patches.py")
    for file in sorted(PACKAGE.rglob("*.py")):
        place = str(file.relative_to(PACKAGE.parent))
        tree = ast.parse(file.read_text())
        check_scope(done, tree, {}, place)
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and node.value != patches["REGISTRY"]:
                check_name(done, node, place)
    for name, expected in (patches["REPLACED"] | patches["OVERRIDDEN"]).items():
        symbol = resolve(root, name)
        if symbol is None or not isinstance(symbol.node, Function):
            done.problems.append(f"{name} is gone")
        elif (found := names_of(symbol.node)) != list(expected):
            said = f"has parameters {', '.join(found)}, not {', '.join(expected)}"
            done.problems.append(f"{name} {said}")
    for kind, names in switches_of(root).items():
        for name in sorted(names - KINDS[kind].names):
            done.problems.append(f"{name}, of vLLM's {kind}, is not in runtime/switches.py")
    done.problems = list(dict.fromkeys(done.problems))
    done.changed = list(dict.fromkeys(done.changed))
    return done


def literals(file: Path) -> dict:
    """The constants of a module."""
    found = {}
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant | ast.Dict):
            found[ast.unparse(node.targets[0])] = ast.literal_eval(node.value)
    return found


def check_name(done: Check, node: ast.Constant, place: str) -> None:
    """A string that is a dotted name in vLLM."""
    if not re.fullmatch(r"vllm(\.\w+){3,}", str(node.value)):
        return
    if resolve(done.root, node.value) is None:
        done.problems.append(f"{place}:{node.lineno}: {node.value} is gone")


def check_scope(done: Check, scope: ast.AST, outer: Mapping[str, Symbol], place: str) -> None:
    """A module or a function, with the functions in it. `outer`: what names stand for in vLLM."""
    known = dict(outer)
    if isinstance(scope, Function):
        a = scope.args
        for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs):
            kind = known.pop(arg.arg, None) and None
            if isinstance(arg.annotation, ast.Name) and (kind := outer.get(arg.annotation.id)):
                known[arg.arg] = replace(kind, is_instance=True)
    nodes = list(walk(scope))
    for node in nodes:
        for local, module, name in imports(node):
            symbol = find(done.root, module, name) if name else resolve(done.root, module)
            if symbol is None:
                said = f"{module}.{name}" if name else module
                done.problems.append(f"{place}:{node.lineno}: {said} is gone")
                continue
            known[local] = symbol
            old = find(done.reference, module, name) if done.reference and name else None
            if isinstance(symbol.node, Function) and old is not None:
                note_change(done, f"{module}.{name}", old.node, symbol.node)
    for node in nodes:
        if isinstance(node, Function):
            check_scope(done, node, known, place)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            check_attribute(done, node, known.get(node.value.id), place)
        elif isinstance(node, ast.Call):
            check_call(done, node, *called(done.root, node.func, known), place)
        elif isinstance(node, ast.ClassDef):
            for base in node.bases:
                symbol = known.get(base_name(base))
                if symbol is not None and isinstance(symbol.node, ast.ClassDef):
                    check_class(done, node, symbol, place)


def walk(scope: ast.AST) -> Iterator[ast.AST]:
    """All nodes in it, of functions in it only the function itself."""
    for node in ast.iter_child_nodes(scope):
        yield node
        if not isinstance(node, Function):
            yield from walk(node)


def imports(node: ast.AST) -> Iterator[tuple[str, str, str]]:
    """Of what is imported from vLLM: local name, module, name in it or "" for the module."""
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
        for alias in node.names:
            yield alias.asname or alias.name, node.module, alias.name
    elif isinstance(node, ast.Import):
        for alias in node.names:
            if alias.name.split(".")[0] == "vllm":
                yield alias.asname or "vllm", alias.name if alias.asname else "vllm", ""


def note_change(done: Check, name: str, old: ast.AST, new: ast.AST) -> None:
    if ast.unparse(old) != ast.unparse(new):
        done.changed.append(name)


def check_attribute(done: Check, use: ast.Attribute, owner: Symbol | None, place: str) -> None:
    if owner is None or use.attr.startswith("__"):
        return
    if isinstance(owner.node, ast.Module):
        is_gone = find(done.root, owner.module, use.attr) is None
    elif isinstance(owner.node, ast.ClassDef):
        names = attributes(done.root, owner)
        is_gone = names is not None and use.attr not in names
    else:
        return
    if is_gone:
        name = getattr(owner.node, "name", owner.module)
        done.problems.append(f"{place}:{use.lineno}: {name}.{use.attr} is gone")


def called(
    root: Path, function: ast.expr, known: Mapping[str, Symbol]
) -> tuple[ast.AST | None, int]:
    """What a call calls, and how many of its first parameters are not in the call."""
    if isinstance(function, ast.Name) and (symbol := known.get(function.id)):
        if isinstance(symbol.node, ast.ClassDef):
            return method(root, symbol, "__init__") or fields(root, symbol), 1
        return symbol.node, 0
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
        symbol = known.get(function.value.id)
        if symbol is not None and isinstance(symbol.node, ast.Module):
            found = find(root, symbol.module, function.attr)
            return found and found.node, 0
        if symbol is not None:
            target = method(root, symbol, function.attr)
            return target, num_given(target, symbol.is_instance)
    return None, 0


def check_call(
    done: Check, call: ast.Call, target: ast.AST | None, skipped: int, place: str
) -> None:
    keywords = {keyword.arg for keyword in call.keywords}
    starred = None in keywords or any(isinstance(arg, ast.Starred) for arg in call.args)
    if starred or not isinstance(target, Function):
        return
    a = target.args
    positions = [arg.arg for arg in (*a.posonlyargs, *a.args)]
    said = []
    if len(call.args) + skipped > len(positions) and a.vararg is None:
        said.append(f"takes {len(positions) - skipped} arguments by position")
    if a.kwarg is None and (unknown := keywords - set(names_of(target))):
        said.append(f"has no parameter {', '.join(sorted(unknown))}")
    if missing := required(target) - keywords - set(positions[: skipped + len(call.args)]):
        said.append(f"needs {', '.join(sorted(missing))}")
    where = f"{place}:{call.lineno}: {ast.unparse(call.func)}"
    done.problems += [f"{where} {sentence}" for sentence in said]


def check_class(done: Check, ours: ast.ClassDef, base: Symbol, place: str) -> None:
    """A class of ours that inherits from vLLM's."""
    name = f"{base.module}.{base.node.name}"
    old_base = resolve(done.reference, name) if done.reference else None
    for node in ours.body:
        if not isinstance(node, Function) or node.name in ("__init__", "__post_init__"):
            continue
        theirs = method(done.root, base, node.name)
        old = method(done.reference, old_base, node.name) if old_base else None
        where = f"{place}:{node.lineno}: {name}.{node.name}"
        if theirs is not None:
            check_override(done, node, theirs, where)
            note_change(done, f"{name}.{node.name}", old or theirs, theirs)
        elif old is not None:
            done.problems.append(f"{where} is gone, nobody calls the override")
    module = place.removesuffix(".py").replace("/", ".")
    family = classes(PACKAGE.parent, Symbol(module, ours))
    own = set().union(*(own_attributes(parent.node) for parent in family))
    for use in ast.walk(ours):
        if isinstance(use, ast.Call) and isinstance(use.func, ast.Attribute):
            is_super = ast.unparse(use.func.value) == "super()"
            if is_super or (is_of_self(use.func) and use.func.attr not in own):
                target = method(done.root, base, use.func.attr)
                check_call(done, use, target, num_given(target, True), place)
        elif isinstance(use, ast.Attribute) and is_of_self(use) and use.attr not in own:
            check_attribute(done, use, base, place)


def check_override(done: Check, ours: ast.AST, theirs: ast.AST, where: str) -> None:
    mine, their = names_of(ours), names_of(theirs)
    if ours.args.kwarg is None and ours.args.vararg is None:
        asked = [
            name for name in their
            if name not in mine
            and (name in required(theirs) or is_passed(done.root, ours.name, name))
        ]  # fmt: skip
        if asked:
            done.problems.append(f"{where} gets {', '.join(asked)} too")
    if extra := sorted(required(ours) - set(their)):
        done.problems.append(f"{where} gets no {', '.join(extra)}")
    if [name for name in mine if name in their] != [name for name in their if name in mine]:
        done.problems.append(f"{where} has its parameters in another order")


@cache
def is_passed(root: Path, name: str, parameter: str) -> bool:
    """Whether vLLM passes an optional parameter to a method of this name, but to its super()'s."""
    for file in (root / "vllm").rglob("*.py"):
        text = file.read_text()
        if f".{name}(" not in text or f"{parameter}=" not in text:
            continue
        for call in ast.walk(ast.parse(text)):
            if isinstance(call, ast.Call) and parameter in (k.arg for k in call.keywords):
                function = ast.unparse(call.func)
                if function.endswith(f".{name}") and not function.startswith("super()"):
                    return True
    return False


def installed() -> Path | None:
    spec = find_spec("vllm")
    return Path(spec.origin).parent.parent if spec and spec.origin else None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, help="a folder that holds `vllm`")
    parser.add_argument("--newest", action="store_true", help="the newest release")
    options = parser.parse_args()
    root, what = options.folder or installed(), "this vLLM"
    if options.newest:
        try:
            version = newest("vllm")
            root, what = unpacked("vllm", str(version)), f"vLLM {version}, the newest,"
        except UnreachableError as error:
            print(f"the newest vLLM was not checked: {error}")
            return 3
    if root is None or parse(root, "vllm") is None:
        parser.error(f"there is no vLLM in {root}")
    done = check(root, installed())
    for name in done.changed:
        print(f"changed, to be read: {name}")
    for problem in done.problems:
        print(problem)
    print(f"{what} {'does not fit' if done.problems else 'fits'} vllm-longspec ({root})")
    return bool(done.problems)


if __name__ == "__main__":
    sys.exit(main())
