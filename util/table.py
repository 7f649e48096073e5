"""Tables of names: a flag chooses from them, and a new row is available everywhere."""

from importlib import import_module

_ROOT = __name__.removesuffix("util.table")  # "" unless hubconf.py gave our modules a prefix


class Table(dict):
    """Name -> object. A row may be the text "module:attribute", imported when it is looked up.

    Flags thus know all names before torch is imported, which takes seconds. kind: noun for the
    rows in the ValueError that an unknown name raises.
    """

    def __init__(self, kind, rows):
        super().__init__(rows)
        self.kind = kind

    def __getitem__(self, name):
        row = self.get(name)
        if row is None:
            raise ValueError(f"{self.kind} {name!r}: expected one of {', '.join(self)}")
        if isinstance(row, str):
            module, _, attribute = row.partition(":")
            row = self[name] = getattr(import_module(_ROOT + module), attribute)
        return row

    def rows(self):
        """(name, object) of every row."""
        return [(name, self[name]) for name in self]
