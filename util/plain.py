"""Numbers in plain data, as from JSON, that anyone may have written."""

import sys


def is_count(value, low=0, high=2**53):
    """Whether a value is an integer in this range."""
    return type(value) is int and low <= value <= high


def is_number(value):
    """Whether a value is a finite number, an integer only if it fits into a float."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max
