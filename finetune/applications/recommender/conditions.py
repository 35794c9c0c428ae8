"""Conditions on the catalogue's columns: `price < 20`, `category == Crime`, `category in Crime, Poetry`."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune.data.interactions import Catalogue
from finetune.errors import UsageError
from finetune.recipe.messages import suggest

Mask = npt.NDArray[np.bool_]

COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}
FORM = re.compile(r"\s*(?P<column>.+?)\s*(?:(?P<sign><=|>=|==|!=|<|>)|\s(?P<word>in)\s)\s*(?P<value>.+?)\s*")
EXAMPLE = "Write one such as 'price < 20', 'category == Crime' or 'category in Crime, Poetry'."


def find_matching(conditions: Sequence[str], catalogue: Catalogue) -> Mask:
    """The items that meet every condition, (I,).

    An item without a value meets `!=` alone. A category of several kinds, such as `Comedy, Drama`, is each of them.

    Raises:
        UsageError: a condition that cannot be read, on a column that is not declared, or on a value that is not there.
    """
    found = np.ones(len(catalogue.ids), bool)
    for condition in conditions:
        found &= _match(condition, catalogue)
    return found


def _match(condition: str, catalogue: Catalogue) -> Mask:
    where = f"--filter {condition!r}"
    names = ", ".join(catalogue.columns) or "none"
    form = FORM.fullmatch(condition)
    if form is None:
        raise UsageError(f"{where}: must be a condition on a column ({names}), got another text. {EXAMPLE}")
    column, sign = form["column"], form["sign"] or form["word"]
    if column not in catalogue.columns:
        hint = suggest(column, catalogue.columns)
        raise UsageError(f"{where}: must name a declared column ({names}), got {column!r}.{hint}")
    values = catalogue.columns[column]
    given = [_unquote(part) for part in form["value"].strip("()[]").split(",")] if sign == "in" else [form["value"]]
    if column not in catalogue.numeric:
        return _match_kinds(values, sign, [_unquote(value) for value in given], where)
    return _match_numbers(values, sign, given, where)


def _match_numbers(values: Sequence[Any], sign: str, given: Sequence[str], where: str) -> Mask:
    numbers = np.array([np.nan if value is None else value for value in values], float)
    try:
        wanted = [float(value) for value in given]
    except ValueError:
        raise UsageError(f"{where}: must compare with a number, got {', '.join(given)}. {EXAMPLE}") from None
    if sign == "in":
        return np.isin(numbers, wanted)
    return np.asarray(COMPARISONS[sign](numbers, wanted[0]))


def _match_kinds(values: Sequence[Any], sign: str, given: Sequence[str], where: str) -> Mask:
    if sign not in ("==", "!=", "in"):
        raise UsageError(f"{where}: must compare a category by ==, != or in, got {sign}. {EXAMPLE}")
    kinds = [{value, *(part.strip() for part in value.split(","))} if value else set() for value in values]
    known = set().union(*kinds)
    if wrong := [value for value in given if value not in known]:
        shown = ", ".join(sorted(known)[:20]) + (", ..." if len(known) > 20 else "")
        raise UsageError(
            f"{where}: must name a value of the column ({shown}), got {wrong[0]!r}.{suggest(wrong[0], known)}"
        )
    found = np.array([not own.isdisjoint(given) for own in kinds])
    return ~found if sign == "!=" else found


def _unquote(text: str) -> str:
    text = text.strip()
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text
