"""What the docstring of a public thing is to say, and what is missing there.

Of a function: each parameter, by its name in backticks, or by "as for `another`"; what
is returned, in a section of its own where the first word is a verb; and each class of
error that it raises. Of a class the same of its fields and of its public methods.
"""

import ast
import functools
import importlib
import pathlib
import re

import gradflow as gf

ROOT = pathlib.Path(gf.__file__).parent
_VERB = re.compile(r"[A-Z][a-z]+s\b")
_AS = r"(?:as|as for|those of) \[?`([\w.]+)`"
_TOLD = {
    "fail_unless_reached": "RuntimeError",
    "only_if_successful": "RuntimeError",
    "unless_failed": "RuntimeError",
}


def missing(name):
    """What the docstring of `gradflow.name` leaves out, one line each."""
    thing = functools.reduce(getattr, name.split("."), gf)
    if isinstance(thing, type):
        return list(_of_class(thing, name))
    if callable(thing):
        return list(_of_function(*_found(thing), name))
    return []


@functools.cache
def _tree(module):
    file = importlib.import_module(module).__file__
    return ast.parse(pathlib.Path(file).read_text(encoding="utf-8"))


def _found(thing):
    """The module of a function or class, and its node there."""
    body = _tree(thing.__module__).body
    for part in thing.__qualname__.split("."):
        (node, *_) = (x for x in body if getattr(x, "name", None) == part)
        body = node.body
    return thing.__module__, node


def _of_function(module, node, name, around=""):
    text = ast.get_docstring(node) or ""
    if not text:
        yield f"{name}: no docstring"
        return
    for parameter in _parameters(node):
        if not _says(text + around, parameter):
            yield f"{name}: `{parameter}` is not described"
    yields = node.returns is not None and ast.unparse(node.returns) != "None"
    if yields and _VERB.match(text) and "**Returns" not in text:
        yield f"{name}: what it returns"
    yield from _errors(module, [node], text + around, name)


def _of_class(cls, name):
    module, node = _found(cls)
    text = ast.get_docstring(node) or ""
    if not text:
        yield f"{name}: no docstring"
    methods = {x.name: x for x in node.body if isinstance(x, ast.FunctionDef)}
    init = methods.get("__init__")
    made = (init and ast.get_docstring(init)) or ""
    if init is not None:
        for parameter in _parameters(init):
            if not _says(text + made, parameter):
                yield f"{name}: `{parameter}` is not described"
    checks = [methods[x] for x in ("__init__", "__check_init__") if x in methods]
    yield from _errors(module, checks, text + made, name)
    for field, own in _fields(node):
        if not own and not _says(text + made, field):
            yield f"{name}: `{field}` is not described"
    for method in methods.values():
        if method.name.startswith("_"):
            continue
        if ast.get_docstring(method) is None:
            if not any(method.name in vars(base) for base in cls.__mro__[1:]):
                yield f"{name}.{method.name}: no docstring"
            continue
        yield from _of_function(module, method, f"{name}.{method.name}", text)


def _parameters(node):
    given = node.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    every += [x for x in (given.vararg, given.kwarg) if x is not None]
    return [x.arg for x in every if x.arg not in ("self", "cls")]


def _fields(node):
    """The public fields of a class, and whether each has a docstring of its own."""
    for one, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(one, ast.AnnAssign) and not one.target.id.startswith("_"):
            value = getattr(after, "value", None)
            told = isinstance(after, ast.Expr) and isinstance(value, ast.Constant)
            yield one.target.id, told


def _says(text, word):
    """Whether a docstring, or one that it refers to, has a word in backticks."""
    if re.search(rf"`\**{word}[`=]", text):
        return True
    return any(word in _words(other) for other in re.findall(_AS, text))


@functools.cache
def _words(name):
    """All that stands in backticks in the docstring of a public thing."""
    parts = name.removeprefix("gradflow.").split(".")
    for place in (gf, *(getattr(gf, r) for r in ("drifts", "manifold", "metrics", "plot", "data", "models", "tasks", "penalties"))):
        try:
            thing = functools.reduce(getattr, parts, place)
        except AttributeError:
            continue
        text = thing.__doc__ or ""
        if isinstance(thing, type):
            text += thing.__init__.__doc__ or ""
        return set(re.findall(r"`\**(\w+)", text))
    return set()


def _errors(module, nodes, text, name):
    for error in sorted(_raised(module, nodes)):
        if f"`{error}`" not in text:
            yield f"{name}: raises {error}"


def _raised(module, nodes, seen=None):
    """The classes of what is raised in functions, and in what they call: private ones
    of their file, and all that check."""
    seen = set() if seen is None else seen
    out = set()
    for node in (x for one in nodes for x in ast.walk(one)):
        if isinstance(node, ast.Raise) and node.exc is not None:
            error = getattr(node.exc, "func", node.exc)
            out.add(getattr(error, "id", "?"))
        if isinstance(node, ast.Call):
            called = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if called in _TOLD:
                out.add(_TOLD[called])
            if called in seen or not re.match("_[a-z]|check", called):
                continue
            seen.add(called)
            thing = getattr(importlib.import_module(module), called, None)
            if getattr(thing, "__module__", "").startswith("gradflow"):
                try:
                    where, inner = _found(thing)
                except ValueError:
                    continue
                out |= _raised(where, [inner], seen)
    return out
