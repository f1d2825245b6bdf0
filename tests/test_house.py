"""The plan of the house: which file may know which, and by what names."""

import ast
import dataclasses
import graphlib
import importlib
import importlib.metadata
import inspect
import pathlib
import types

import equinox as eqx
import pytest

import gradflow as gf

ROOT = pathlib.Path(gf.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# From the ground up. What stands in one line may not know each other.
FLOORS = [
    "_typing _norms _version cache precision plot models _logits",
    "_checks",
    "_host",
    "losses results penalties data",
    "margin_losses population",
    "flow",
    "metrics drifts",
    "tasks solvers",
    "runs",
    "manifold sweeps",
    "theory saving",
]


def name_of(file):
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


MODULES = {name_of(file): ast.parse(file.read_text(encoding="utf-8")) for file in FILES}


def imported(module, file):
    """The modules, and the names from them, that a module of gradflow imports anywhere:
    inside of functions and for type checkers too."""
    package = (
        module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    )
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.Import):
            ours = [a.name for a in node.names if a.name.split(".")[0] == "gradflow"]
            assert not ours, f"{module} imports {ours} by absolute names"
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = package[: len(package) - node.level + 1]
        base = ".".join(base + (node.module.split(".") if node.module else []))
        for alias in node.names:
            inner = f"{base}.{alias.name}"
            yield (inner, None) if inner in MODULES else (base, alias.name)


GRAPH = {
    name_of(file): set(imported(name_of(file), file)) - {(name_of(file), None)}
    for file in FILES
}


def test_no_circle():
    arrows = {m: {to for to, _ in found} - {"gradflow"} for m, found in GRAPH.items()}
    assert sum(map(len, arrows.values())) > 300
    graphlib.TopologicalSorter(arrows).prepare()  # raises where there is one


def test_no_arrow_up():
    floor = {name: i for i, row in enumerate(FLOORS) for name in row.split()}
    folder = lambda module: module.split(".")[1]
    modules = [m for m in GRAPH if m != "gradflow"]
    assert {folder(m) for m in modules} == set(floor)
    for module in modules:
        for to, _ in GRAPH[module]:
            one, two = folder(module), folder(to)
            assert one == two or floor[two] < floor[one], f"{module} imports {to}"


def test_what_is_shared_has_no_underscore():
    shared = [
        (module, name)
        for module, found in GRAPH.items()
        for _, name in found
        if name and name.startswith("_") and not name.startswith("__")
    ]
    assert not shared


def test_no_module_is_hidden_by_a_function_of_its_name():
    for name in MODULES:
        package, _, last = name.rpartition(".")
        if package:
            seen = getattr(importlib.import_module(package), last)
            assert inspect.ismodule(seen), name


def test_what_is_exported_is_documented():
    for name in dir(gf):
        value = getattr(gf, name)
        if not name.startswith("_") and not isinstance(value, types.ModuleType):
            assert inspect.getdoc(value), name


def test_the_version_is_the_installed_one():
    try:
        version = importlib.metadata.version("gradflow-jax")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("run from its folder, not installed")
    assert gf.__version__ == version
    assert (ROOT / "py.typed").exists()


def test_a_class_is_abstract_or_final():
    """What one class of gradflow has written out, no child of it writes anew; and only
    abstract ones have children."""
    for name in MODULES:
        importlib.import_module(name)
    pairs = [
        (child, base)
        for child in descendants(eqx.Module)
        for base in child.__mro__[1:]
        if base in descendants(eqx.Module)
    ]
    assert len(pairs) > 100
    for child, base in pairs:
        both = written(child) & written(base)
        assert not both, f"{child.__qualname__} writes {both} of {base.__qualname__}"
    parents = {base.__name__ for _, base in pairs}
    assert not {name for name in parents if not name.lstrip("_").startswith("Abstract")}


def descendants(cls):
    """The classes of gradflow below `cls`."""
    below = {s for c in cls.__subclasses__() for s in {c} | descendants(c)}
    return {c for c in below if c.__module__.partition(".")[0] == "gradflow"}


def written(cls):
    """The names of the fields of a class, and of the methods in its source that are
    not abstract."""
    own = vars(cls).get("__annotations__", {})
    out = {field.name for field in dataclasses.fields(cls) if field.name in own}
    for name, value in vars(cls).items():
        method = inspect.unwrap(getattr(value, "fget", None) or value)
        code = getattr(method, "__code__", None)
        abstract = getattr(value, "__isabstractmethod__", False)
        if code and not abstract and code.co_filename.startswith(str(ROOT)):
            out.add(name)
    return out - {"__check_init__"}  # Equinox runs that of each class
