"""What the docstring of a public thing is to say, and what is missing there.

Of a function: each parameter, by its name in backticks (or "as for `another`", which
has it); what it returns, in a section of its own where the first word is a verb; each
class of errors that it raises. Of a class: what it is made with, each field, and of
each public method the same as of a function. All is read off the source.
"""

import ast
import functools
import importlib
import pathlib
import re
import types

import gradflow as gf

_VERB = re.compile(r"[A-Z][a-z]+s\b")  # as "Runs", "Splits"; a noun has an article
_AS = re.compile(r"(?:as|as for|those of) \[?`(?:gradflow\.)?([\w.]+)`")
_STAR = re.compile(r"(?<=[^\W_])\*(?=[^\w*]|$)")  # which Markdown takes for emphasis
_FAILS = {"fail_unless_reached", "only_if_successful", "unless_failed"}


def missing(name):
    """What the docstring of `gradflow.name` leaves out, one line each."""
    thing = functools.reduce(getattr, name.split("."), gf)
    if isinstance(thing, type):
        yield from _of_class(thing, name)
    elif isinstance(thing, types.FunctionType) or hasattr(thing, "__wrapped__"):
        yield from of_function(*found(thing), name)
    elif not isinstance(thing, types.ModuleType):
        told = dict(_field(*pair) for pair in _pairs(_home(name).body))
        if not told.get(name.split(".")[-1]):
            yield f"{name}: no docstring"


@functools.cache
def _tree(module):
    file = importlib.import_module(module).__file__
    return ast.parse(pathlib.Path(file).read_text(encoding="utf-8"))


def found(thing):
    """The module of a function or class, and its node there."""
    node = _tree(thing.__module__)
    for part in thing.__qualname__.split("."):
        node = next(x for x in node.body if getattr(x, "name", None) == part)
    return thing.__module__, node


def _home(name):
    """The file in which a constant is written, from the one that exports it."""
    module, _, last = f"gradflow.{name}".rpartition(".")
    for node in _tree(module).body:
        names = [alias.name for alias in getattr(node, "names", [])]
        if isinstance(node, ast.ImportFrom) and last in names:
            inner = "." * node.level + (node.module or "")
            return _tree(importlib.util.resolve_name(inner, module))
    return _tree(module)


def of_function(module, node, name, around=""):
    """`around`: the docstring of its class, which may tell what a parameter is."""
    text = ast.get_docstring(node) or ""
    if not text:
        yield f"{name}: no docstring"
        return
    yield from _wording(text, name)
    for parameter in _parameters(node):
        if not _says(text + around, parameter):
            yield f"{name}: `{parameter}` is not described"
    yields = node.returns is not None and ast.unparse(node.returns) != "None"
    if yields and _VERB.match(text) and "**Returns:**" not in text:
        yield f"{name}: what it returns"
    yield from _errors(module, [node], text + around, name)


def _of_class(cls, name):
    module, node = found(cls)
    text = ast.get_docstring(node) or ""
    if not text:
        yield f"{name}: no docstring"
    methods = {x.name: x for x in node.body if isinstance(x, ast.FunctionDef)}
    makes = methods.get("__init__")
    text += (makes and ast.get_docstring(makes)) or ""
    yield from _wording(text, name)
    made = _parameters(makes) if makes else []
    if not makes:
        made = [field for field, told in _fields(node.body) if field and not told]
    for one in made:
        if not _says(text, one):
            yield f"{name}: `{one}` is not described"
    checks = [methods[x] for x in ("__init__", "__check_init__") if x in methods]
    yield from _errors(module, checks, text, name)
    for method in methods.values():
        own = ast.get_docstring(method)
        known = any(method.name in vars(base) for base in cls.__mro__[1:])
        if not method.name.startswith("_") and (own or not known):
            yield from of_function(module, method, f"{name}.{method.name}", text)


def _parameters(node):
    given = node.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    every += [x for x in (given.vararg, given.kwarg) if x is not None]
    return [x.arg for x in every if x.arg not in ("self", "cls")]


def _pairs(body):
    return zip(body, [*body[1:], None], strict=True)


def _field(one, after):
    """The public name that a statement gives a value to, and its docstring."""
    target = getattr(one, "target", None) or getattr(one, "targets", [None])[0]
    name = getattr(target, "id", "_")
    value = getattr(after, "value", None) if isinstance(after, ast.Expr) else None
    return None if name.startswith("_") else name, getattr(value, "value", None)


def _fields(body):
    """Those of a class, each with its docstring. What all of a class share is none."""
    for one, after in _pairs(body):
        if isinstance(one, ast.AnnAssign) and "ClassVar" not in ast.unparse(one):
            yield _field(one, after)


def _says(text, word):
    """Whether a docstring, or one that it refers to, has a word in backticks."""
    if re.search(rf"`\**{word}[`=]", text):
        return True
    return any(word in _words(other) for other in _AS.findall(text))


@functools.cache
def _words(name):
    """All that stands in backticks in the docstring of a public thing."""
    rooms = [gf, *(x for x in vars(gf).values() if isinstance(x, types.ModuleType))]
    for room in rooms:
        try:
            thing = functools.reduce(getattr, name.split("."), room)
        except AttributeError:
            continue
        text = thing.__doc__ or ""
        if isinstance(thing, type):
            text += thing.__init__.__doc__ or ""
        return set(re.findall(r"`\**(\w+)", text))
    return set()


def _wording(text, name):
    plain = re.sub(r"`[^`]*`|\*\*", "", text)
    for star in _STAR.finditer(plain):
        yield f"{name}: a star, {plain[star.start() - 9 : star.end() + 9]!r}; write ⋆"


def _errors(module, nodes, text, name):
    for error in sorted(_raised(module, nodes, set())):
        if f"`{error}`" not in text:
            yield f"{name}: that it raises {error}"


def _raised(module, nodes, seen):
    """The classes of what is raised in functions, and in what they call: private ones
    of their file, and all that check."""
    out = set()
    for node in (x for one in nodes for x in ast.walk(one)):
        if isinstance(node, ast.Raise) and node.exc is not None:
            made = getattr(node.exc, "func", node.exc)
            error = getattr(made, "id", getattr(made, "attr", ""))
            out.add(error if error[0].isupper() else _returned(module, error))
        called = node.func if isinstance(node, ast.Call) else None
        called = getattr(called, "id", getattr(called, "attr", ""))
        if called in _FAILS:
            out.add("RuntimeError")
        if called not in seen and re.match("_[a-z]|check", called):
            seen.add(called)
            where = getattr(importlib.import_module(module), called, None)
            if isinstance(where, types.FunctionType):
                inner, body = found(where)
                out |= _raised(inner, [body], seen)
    return out - {None}


def _returned(module, name):
    """The class of the errors that a function makes; `None` where there is no such."""
    thing = getattr(importlib.import_module(module), name, None)
    tree = _tree(thing.__module__ if thing else module)
    nodes = (x for x in ast.walk(tree) if isinstance(x, ast.FunctionDef))
    found = (x.returns for x in nodes if x.name == name)
    return getattr(next(found, None), "id", None)
