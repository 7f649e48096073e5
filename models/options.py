"""Passes options to the part of a model whose constructor names them."""

from inspect import signature

from models.settings import HEADS


def options_of(part):
    """Name of each option of a class -> argument of its constructor: those with a default.

    A class may have `aliases`, option -> argument, for options whose names differ.
    """
    parameters = signature(part).parameters.items()
    plain = {name: name for name, p in parameters if p.default is not p.empty}
    return {**plain, **getattr(part, "aliases", {})}


def named_by(options, *parts):
    """Argument -> value, for the options (name -> value) that one of the parts names."""
    arguments = {}
    for part in parts:
        names = options_of(part)
        arguments |= {names[name]: value for name, value in options.items() if name in names}
    return arguments


def check_options(model, options, *parts):
    """Raises ValueError for an option that belongs neither to the parts nor to any head."""
    parts += tuple(head for _, head in HEADS.rows()) if parts else ()
    known = {name for part in parts for name in options_of(part)}
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"{name} {value!r}: {type(model).__name__} has no such argument")
