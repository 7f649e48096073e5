"""Settings: frozen dataclasses that define flags and the entries of checkpoints and reports.

    @dataclass(frozen=True)
    class Sampling(Settings):
        cfg: float = setting(1.0, "guidance scale; 1 is no guidance", type=finite)

Each field is defined once, with its default, its help text and whatever else its flag needs.
`add_flags` creates the flags, `from_flags` reads them back, and `asdict` gives the stored form.
"""

import dataclasses
from argparse import BooleanOptionalAction


def setting(default, help, flag=None, **details):
    """A field of a Settings class.

    help: help text of its flag. flag: name of the flag, if it differs from the field's; "" for no
    flag. details: `type`, `choices`, `metavar`, `nargs`, `action` as in argparse; `otherwise`, the
    meaning of None, in words; `both`, whether a flag that is on or off has a --no-… as well; any
    other is a property that the class documents, such as `fixed` of models.settings.Model.
    """
    return dataclasses.field(default=default, metadata={"help": help, "flag": flag, **details})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Base class of all settings: values by name; an unknown name raises ValueError."""

    @classmethod
    def fields(cls):
        """The dataclass fields."""
        return dataclasses.fields(cls)

    @classmethod
    def names(cls, **details):
        """Names of the fields, or of those with these details, as in names(fixed=True)."""
        return [
            field.name
            for field in cls.fields()
            if all(field.metadata.get(key) == value for key, value in details.items())
        ]

    @classmethod
    def of(cls, **values):
        """An instance; lists become tuples. Raises ValueError for a name that is no field."""
        unknown = [name for name in values if name not in cls.names()]
        if unknown:
            raise ValueError(
                f"{unknown[0]}: no such setting of {cls.__name__}, expected some of "
                f"{', '.join(cls.names())}"
            )
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    def but(self, **values):
        """A copy with some values replaced. Raises ValueError for a name that is no field."""
        return self.of(**{**self.asdict(), **values})

    def without(self, names):
        """A copy with the defaults in place of the values of these names, as far as it has them."""
        return self.but(**{f.name: f.default for f in self.fields() if f.name in names})

    def asdict(self):
        """Name -> value as plain data, the form stored in checkpoints and reports."""
        values = {name: getattr(self, name) for name in self.names()}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


_ARGPARSE = ("type", "choices", "metavar", "nargs", "action")


def add_flags(group, cls, only=None, unset=None, **defaults):
    """Add a flag for each field of a Settings class to an argparse group.

    only: names of the fields to add, instead of all. unset: if given, flags have no default, and
    the help states this text instead. defaults: override the defaults of the fields.
    """
    for field in cls.fields():
        details = field.metadata
        name = field.name if details["flag"] is None else details["flag"]
        if not name or (only is not None and field.name not in only):
            continue
        default = defaults.get(field.name, field.default)
        options = {key: details[key] for key in _ARGPARSE if key in details}
        words = details["help"]
        if unset:
            default = None
        if default is None and (meaning := unset or details.get("otherwise")):
            words = f"{words} (default: {meaning})"
        if details.get("both"):
            options["action"] = BooleanOptionalAction
        elif isinstance(field.default, bool):
            options["action"] = "store_false" if field.default else "store_true"
        group.add_argument(
            f"--{name}", dest=destination(field), default=default, help=words, **options
        )


def destination(field):
    """The attribute of parsed flags that holds a field; "" for a field without a flag."""
    flag = field.metadata["flag"]
    return field.name if flag is None or (flag and isinstance(field.default, bool)) else flag


def said_flags(cls, args):
    """Name -> value of the fields that are among the parsed flags."""
    fields = {field.name: destination(field) for field in cls.fields()}
    return {
        name: getattr(args, flag) for name, flag in fields.items() if flag and hasattr(args, flag)
    }


def from_flags(cls, args, **values):
    """The settings according to parsed flags; `values` override them."""
    return cls.of(**{**said_flags(cls, args), **values})


def to_flags(cls, values):
    """Yields the command line that says `values`, name -> value, but None and the defaults."""
    for field in cls.fields():
        flag, value = field.metadata["flag"], values.get(field.name)
        name = field.name if flag is None else flag
        value = tuple(value) if isinstance(value, list) else value
        if name and value not in (None, field.default):
            yield f"--{name}"
            if not isinstance(value, bool):
                yield from map(str, value if isinstance(value, tuple) else [value])
