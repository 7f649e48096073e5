"""Settings and tables of names. Run: python -m pytest tests/test_settings.py"""

import dataclasses
import json
import sys

import pytest

from models.settings import Model, Sampling
from util.recipe import Recipe
from util.settings import Settings, setting
from util.table import Table


@dataclasses.dataclass(frozen=True)
class Cooking(Settings):
    """Settings to try."""

    minutes: int = setting(5, "time in water", fixed=True)
    salt: float = setting(0.1, "grams per egg", approximates=True)
    turns: tuple = setting((1, 2), "when to turn", nargs=2)


def test_values_by_name():
    """Defaults where nothing is said."""
    assert Cooking() == Cooking.of() == Cooking.of(minutes=5)
    assert Cooking.of(minutes=7).minutes == 7
    assert Cooking.names() == ["minutes", "salt", "turns"]
    assert Cooking.names(fixed=True) == ["minutes"]
    assert Cooking.names(approximates=True) == ["salt"]
    assert Cooking.names(fixed=True, approximates=True) == []


@pytest.mark.parametrize("make", [Cooking.of, Cooking().but])
def test_unknown_names(make):
    """An error at once, which says what exists."""
    with pytest.raises(ValueError, match="pepper: no such .* Cooking, expected .* minutes, salt"):
        make(minutes=3, pepper=1)


def test_replacing_values():
    """`but` leaves the original, and what is not named, alone."""
    first = Cooking.of(salt=0.2)
    second = first.but(minutes=9)
    assert (first.minutes, first.salt) == (5, 0.2) and (second.minutes, second.salt) == (9, 0.2)
    assert first.but() == first
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.minutes = 8


@pytest.mark.parametrize("kind", [Cooking, Model, Sampling, Recipe])
def test_there_and_back(kind):
    """`asdict` is plain data, of which the same settings can be made again."""
    values = kind().asdict()
    assert list(values) == kind.names()
    assert json.loads(json.dumps(values)) == values
    assert kind.of(**values) == kind()
    assert hash(kind.of(**values)) == hash(kind())


@pytest.mark.parametrize("kind", [Model, Sampling, Recipe])
def test_every_field_is_documented(kind):
    """With help that a flag can show."""
    for field in kind.fields():
        assert field.metadata["help"].strip(), field.name


@pytest.fixture
def kitchen(tmp_path, monkeypatch):
    """A module that cannot be imported twice without notice."""
    (tmp_path / "kitchen.py").write_text("made = []\ndef egg(): return 'egg'\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "kitchen"
    sys.modules.pop("kitchen", None)


def test_a_table_imports_a_row_when_it_is_looked_up(kitchen):
    """Names are known before; the object is then kept in the row's place."""
    table = Table("dish", {"egg": "kitchen:egg", "none": "nowhere:at_all", "soup": len})
    assert list(table) == ["egg", "none", "soup"] and "egg" in table and "tea" not in table
    assert table["soup"] is len
    assert "kitchen" not in sys.modules
    egg = table["egg"]
    assert "kitchen" in sys.modules and egg() == "egg"
    del sys.modules["kitchen"]
    assert table["egg"] is egg and "kitchen" not in sys.modules
    with pytest.raises(ModuleNotFoundError, match="nowhere"):
        table["none"]


def test_all_rows_of_a_table(kitchen):
    """(name, object), each imported, in the order of the table."""
    table = Table("dish", {"soup": len, "egg": "kitchen:egg"})
    (first, soup), (second, egg) = table.rows()
    assert (first, second) == ("soup", "egg") and soup is len and egg() == "egg"


def test_a_new_row():
    """Is there for whoever looks it up."""
    table = Table("dish", {})
    table["tea"] = str
    assert table["tea"] is str and table.rows() == [("tea", str)]


@pytest.mark.parametrize("name", ["tea", "", None, 3])
def test_a_row_that_does_not_exist(name):
    """A ValueError with the kind of row, the name and the names that exist."""
    table = Table("dish", {"soup": len, "egg": "kitchen:egg"})
    with pytest.raises(ValueError, match=f"dish {name!r}: expected one of soup, egg"):
        table[name]
