"""For the reference: how a class without an `__init__` of its own is called.

Its fields are what it takes, as of any Equinox module. That is shown of classes that
have arguments to tell of; the others are results, which nobody makes by hand. And a
field is shown with its default alone.
"""

import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import griffe


class Constructors(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        for cls in _classes(pkg):
            for field in cls.attributes.values():
                field.value = _default(field.value)
            told = cls.docstring is not None and "**Arguments:**" in cls.docstring.value
            if told and "__init__" not in cls.members:
                cls.set_member("__init__", _constructor(cls))


def _classes(module: griffe.Module) -> Iterator[griffe.Class]:
    for member in list(module.members.values()):
        if isinstance(member, griffe.Module):
            yield from _classes(member)
        elif isinstance(member, griffe.Class):
            yield member


def _constructor(cls: griffe.Class) -> griffe.Function:
    made = getattr(importlib.import_module(cls.module.path), cls.name)
    parameters = [griffe.Parameter("self", kind=_KINDS["POSITIONAL_OR_KEYWORD"])]
    for one in inspect.signature(made).parameters.values():
        field = cls.all_members[one.name]
        assert isinstance(field, griffe.Attribute)
        kind = _KINDS[one.kind.name]
        told = {"annotation": field.annotation, "default": _default(field.value)}
        parameters.append(griffe.Parameter(one.name, kind=kind, **told))
    return griffe.Function("__init__", parameters=griffe.Parameters(*parameters))


def _default(value: str | griffe.Expr | None) -> str | griffe.Expr | None:
    """That of a field, without what else `eqx.field` is told."""
    if isinstance(value, griffe.ExprCall) and value.canonical_path == "equinox.field":
        named = {getattr(x, "name", ""): x for x in value.arguments}
        return getattr(named.get("default"), "value", None)
    return value


_KINDS = {kind.name.upper(): kind for kind in griffe.ParameterKind}
