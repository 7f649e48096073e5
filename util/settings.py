"""Settings: frozen dataclasses of which flags, checkpoints, reports and sweeps are made.

    @dataclass(frozen=True)
    class Sampling(Settings):
        cfg: float = setting(1.0, "guidance scale; 1 is no guidance", type=finite)

A field is written once, with its default, its help and what else a flag needs. `add_flags` makes
the flags, `from_flags` reads them back, `asdict` is what is stored.
"""

import dataclasses


def setting(default, help, flag=None, **details):
    """A field of a Settings class.

    help: of its flag. flag: the name of the flag where it is another than the field's; "" for none.
    details: `type`, `choices`, `metavar`, `nargs` as argparse takes them; `otherwise`, what None
    means, in words; any other is a property that the class documents, such as `fixed` of
    models.settings.Model.
    """
    return dataclasses.field(default=default, metadata={"help": help, "flag": flag, **details})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Base of all settings: values by name, an unknown name being a ValueError."""

    @classmethod
    def names(cls, **details):
        """Names of the fields, or of those with these details, as in names(fixed=True)."""
        return [
            field.name
            for field in dataclasses.fields(cls)
            if all(field.metadata.get(key) == value for key, value in details.items())
        ]

    @classmethod
    def of(cls, **values):
        """An instance. Raises ValueError for a name that is no field."""
        unknown = [name for name in values if name not in cls.names()]
        if unknown:
            raise ValueError(
                f"{unknown[0]} {values[unknown[0]]!r}: no such setting of {cls.__name__}, expected "
                f"some of {', '.join(cls.names())}"
            )
        return cls(**values)

    def but(self, **values):
        """The same with some values replaced. Raises ValueError for a name that is no field."""
        return self.of(**{**self.asdict(), **values})

    def asdict(self):
        """Name -> value, plain data."""
        return {name: getattr(self, name) for name in self.names()}

    def changed(self):
        """Name -> value of those that differ from their defaults."""
        plain = {field.name: field.default for field in dataclasses.fields(self)}
        return {name: value for name, value in self.asdict().items() if value != plain[name]}


_ARGPARSE = ("type", "choices", "metavar", "nargs")


def add_flags(group, cls, only=None, unset=None, **defaults):
    """Add a flag for each field of a Settings class to an argparse group.

    only: names of the fields, in place of all. unset: no flag has a default, and this is what the
    help says of one that is left out. defaults: in place of the fields' own.
    """
    for field in dataclasses.fields(cls):
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
        if isinstance(field.default, bool):
            options["action"] = "store_false" if field.default else "store_true"
        group.add_argument(f"--{name}", dest=field.name, default=default, help=words, **options)


def from_flags(cls, args, **values):
    """The settings that parsed flags ask for; `values` in place of some."""
    said = {name: getattr(args, name) for name in cls.names() if hasattr(args, name)}
    return cls.of(**{**said, **values})


def given_flags(cls, args):
    """Name -> value of the flags of a Settings class that are not None."""
    said = {name: getattr(args, name, None) for name in cls.names()}
    return {name: value for name, value in said.items() if value is not None}
