"""Rows -> train, validation and test: every row once, the same on every machine and in every order of the file."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from finetune.data.cleaning import normalize_for_duplicates
from finetune.data.rows import SPLITS, Row, Splits
from finetune.errors import DataError
from finetune.recipe.messages import suggest
from finetune.recipe.schema import SplitSection

MAX_LISTED = 5  # rows that a message names


SPARE_RATIO = 0.25
"""What a group may add to a split beyond its share of rows, where another split has room for it."""


@dataclass(frozen=True)
class _Group:
    """Rows that must not be parted."""

    rows: list[Row]
    rank: str
    """A hash of the seed and the first row's id: the random order."""
    label: str | None


def split_rows(
    rows: Sequence[Row], section: SplitSection, *, seed: int, columns: Mapping[str, str] | None = None
) -> Splits:
    """Sort rows into train, validation and test, as `section.by` says.

    - auto: see `settle_split`.
    - random: stratified by label, where there is one. Rows with the same text (see `normalize_for_duplicates`) stay
      together, so that no text is in two splits. A class of at least three texts is in all three.
    - group: no value of `section.column` is in two splits; the seed decides which are where, large ones too.
    - time: the oldest rows train, the newest test; rows of one moment stay together.
    - order: the first of `rows` train, the last test.
    - given: by `row.split`; a missing validation split is cut from train as in `random`.

    But for `order`, the result depends on the rows and the seed, not on the order of `rows`.

    Args:
        rows: what is split.
        section: the recipe's `split`.
        seed: of what is random.
        columns: role -> the data's own name of its column; `section.column` may be either.

    Raises:
        DataError: a column or a split is missing, a value cannot be read, or a split would be empty.
    """
    section = settle_split(rows, section)
    shares = {
        "train": 1 - section.validation - section.test,
        "validation": section.validation,
        "test": section.test,
    }
    if section.by == "order":
        return _check_sizes(_cut([[row] for row in rows], shares))
    rows = sorted(rows, key=_file_order)
    if section.by == "given":
        splits = _split_given(rows, section.validation, seed)
    elif section.by == "random":
        splits = _split_stratified(rows, shares, seed)
    else:
        column = _find_column(rows, section, columns or {})
        split_by = _split_by_group if section.by == "group" else _split_by_time
        splits = split_by(rows, column, shares, seed)
    return {name: sorted(part, key=_file_order) for name, part in _check_sizes(splits).items()}


def settle_split(rows: Sequence[Row], section: SplitSection) -> SplitSection:
    """The section with `given` or `random` in the place of `auto`: nobody's test rows are to be learned from unasked.

    Rows that are all of train, as many data sets on the Hub have them, are no split.
    """
    if section.by != "auto":
        return section
    by = "given" if any(row.split in ("validation", "test") for row in rows) else "random"
    return section.model_copy(update={"by": by})


def keep_shots(splits: Splits, shots: int, *, seed: int) -> Splits:
    """Make few-shot splits: of each class at most `shots` rows in train and as many in validation; all of test.

    The kept rows of a class are of different texts (see `normalize_for_duplicates`; the first row of a text stands for
    it) and stay in their order. Which they are depends on the rows and the seed, not on the order of the rows.

    Args:
        splits: rows whose `label` is a class name.
        shots: rows of a class, at least 1; a class with fewer keeps those that it has.
        seed: of the choice.
    """
    return {name: rows if name == "test" else _choose_shots(rows, shots, seed) for name, rows in splits.items()}


def _choose_shots(rows: Sequence[Row], shots: int, seed: int) -> list[Row]:
    texts: dict[str | None, dict[str, Row]] = defaultdict(dict)
    for row in sorted(rows, key=_file_order):
        texts[_label(row)].setdefault(_text_key(row), row)
    kept = {
        row.id
        for of_class in texts.values()
        # Not the rank that dealt the rows out to the splits: the choice is to be independent of it.
        for row in sorted(of_class.values(), key=lambda row: _rank(seed, f"shots {row.id}"))[:shots]
    }
    return [row for row in rows if row.id in kept]


def _check_sizes(splits: Splits) -> Splits:
    sizes = {name: len(splits[name]) for name in SPLITS}
    if empty := [name for name, size in sizes.items() if not size]:
        got = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise DataError(
            f"split: every split must hold rows, got {got} of {sum(sizes.values())} rows."
            f" Give more rows, or a larger share to {' and '.join(empty)}; rows of one text stay together."
        )
    return {name: splits[name] for name in SPLITS}


def _file_order(row: Row) -> tuple[str, int, str]:
    prefix, _, number = row.id.rpartition(":")
    return prefix, int(number) if number.isdecimal() else 0, row.id


def _rank(seed: int, key: str) -> str:
    return hashlib.sha256(f"{seed}\n{key}".encode()).hexdigest()


def _split_stratified(rows: Sequence[Row], shares: Mapping[str, float], seed: int) -> Splits:
    strata: dict[str | None, list[_Group]] = defaultdict(list)
    for group in _group_by(rows, _text_key, seed):
        strata[group.label].append(group)
    splits: Splits = {name: [] for name in shares}
    surplus = dict.fromkeys(shares, 0.0)
    for label in sorted(strata, key=lambda label: (label is None, label or "")):
        # What rounding took from a split in one class it gets back in the next, so that many small classes keep the
        # shares; at most one row, so that no class pays for another.
        parts, surplus = _allocate(strata[label], shares, surplus)
        for name, groups in parts.items():
            splits[name] += [row for group in groups for row in group.rows]
        surplus = {name: min(1.0, max(-1.0, rows_left)) for name, rows_left in surplus.items()}
    return splits


def _text_key(row: Row) -> str:
    text = normalize_for_duplicates(str(row.values.get("text") or ""))
    return f"text {text}" if text else f"row {row.id}"


def _group_by(rows: Sequence[Row], key: Callable[[Row], str], seed: int) -> list[_Group]:
    members: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        members[key(row)].append(row)
    return [_Group(part, _rank(seed, part[0].id), _label(part[0])) for part in members.values()]


def _label(row: Row) -> str | None:
    label = row.values.get("label")  # of any type where it is no role of the task but another column
    return None if label is None else str(label)


def _allocate(
    groups: Sequence[_Group], shares: Mapping[str, float], surplus: Mapping[str, float]
) -> tuple[dict[str, list[_Group]], dict[str, float]]:
    """Give each group, large ones first, to the split that lacks most rows; then fill splits that got none.

    Returns:
        Split -> groups, and split -> rows still missing (negative: too many).
    """
    total = sum(len(group.rows) for group in groups)
    missing = {name: share * total + surplus[name] for name, share in shares.items()}
    parts: dict[str, list[_Group]] = {name: [] for name in shares}
    for group in sorted(groups, key=lambda group: (-len(group.rows), group.rank)):
        name = max(missing, key=lambda name: missing[name])
        parts[name].append(group)
        missing[name] -= len(group.rows)
    if len(groups) >= len(shares):
        for name in shares:
            if not parts[name]:
                donor = max(parts, key=lambda name: len(parts[name]))
                group = parts[donor].pop()  # the smallest, as they are sorted
                parts[name].append(group)
                missing[donor] += len(group.rows)
                missing[name] -= len(group.rows)
    return parts, missing


def _split_by_group(rows: Sequence[Row], column: str, shares: Mapping[str, float], seed: int) -> Splits:
    groups = _group_by(rows, lambda row: str(row.values[column]), seed)
    if len(groups) < len(shares):
        fix = "Split by another column, or by: random."
        raise DataError(f"split: column {column!r} must have at least 3 values, got {len(groups)}. {fix}")
    # Not as `_allocate` deals groups out, large ones first: the largest would be in train whatever the seed.
    missing = {name: share * len(rows) for name, share in shares.items()}
    splits: Splits = {name: [] for name in shares}
    dealt = sorted(groups, key=lambda group: group.rank)
    for number, group in enumerate(dealt):
        empty = [name for name in shares if not splits[name]]
        among = empty if len(dealt) - number == len(empty) else list(shares)  # the last groups, one for each
        spare = {name: len(group.rows) - missing[name] for name in among}  # rows too many with this group
        room = [
            name for name in among if spare[name] <= min(len(group.rows) / 2, SPARE_RATIO * shares[name] * len(rows))
        ]
        if room:
            name = max(room, key=lambda name: missing[name] / shares[name])
        else:
            name = max(among, key=lambda name: missing[name])
        splits[name] += group.rows
        missing[name] -= len(group.rows)
    return splits


def _split_by_time(rows: Sequence[Row], column: str, shares: Mapping[str, float], seed: int) -> Splits:
    del seed  # time alone decides
    moments: dict[float, list[Row]] = defaultdict(list)
    for row, moment in zip(rows, _parse_moments(rows, column), strict=True):
        moments[moment].append(row)
    if len(moments) < len(SPLITS):
        fix = "Split by another column, or by: random."
        raise DataError(f"split: column {column!r} must have at least 3 moments, got {len(moments)}. {fix}")
    return _cut([moments[moment] for moment in sorted(moments)], shares)


def _cut(ordered: Sequence[list[Row]], shares: Mapping[str, float]) -> Splits:
    """Cut twice between two of the lists, where the splits come nearest to their shares and none is empty."""
    if len(ordered) < len(SPLITS):
        return dict(zip(SPLITS, [*ordered, [], [], []], strict=False))
    before = [0]  # rows before each list
    for part in ordered:
        before.append(before[-1] + len(part))
    train_rows = shares["train"] * before[-1]
    train_end = min(range(1, len(ordered) - 1), key=lambda edge: abs(before[edge] - train_rows))
    seen_rows = (shares["train"] + shares["validation"]) * before[-1]
    seen_end = min(range(train_end + 1, len(ordered)), key=lambda edge: abs(before[edge] - seen_rows))
    parts = (ordered[:train_end], ordered[train_end:seen_end], ordered[seen_end:])
    return {name: [row for rows in part for row in rows] for name, part in zip(SPLITS, parts, strict=True)}


def _parse_moments(rows: Sequence[Row], column: str) -> list[float]:
    """Numbers when every value is one, else ISO 8601; a time without a zone counts as UTC."""
    values = [str(row.values[column]).strip() for row in rows]
    try:
        return _check_finite([float(value) for value in values])
    except ValueError:
        pass
    moments, unread = [], []
    for row, value in zip(rows, values, strict=True):
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            unread.append(f"{row.id} {value!r}")
            continue
        moments.append((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())
    if unread:
        raise DataError(
            f"split: column {column!r} must hold ISO 8601 times or only numbers, got {_listed(unread)}."
            " Write times such as 2020-04-09 or 2020-04-09T16:00:00."
        )
    return moments


def _check_finite(numbers: list[float]) -> list[float]:
    if any(number - number != 0 for number in numbers):  # inf - inf and nan - nan are nan
        raise ValueError
    return numbers


def _split_given(rows: Sequence[Row], validation_share: float, seed: int) -> Splits:
    splits: Splits = {name: [row for row in rows if row.split == name] for name in SPLITS}
    given = [name for name in SPLITS if splits[name]]
    unsplit = [row.id for row in rows if row.split is None]
    if unsplit:
        got = f"{len(unsplit):,} rows without a split"
        raise DataError(f"split: by: given must find a split for every row, got {got}. Set split: {{by: random}}.")
    if lacking := [name for name in ("train", "test") if not splits[name]]:
        fix = f"Add a file for {' and '.join(lacking)}, or set split: {{by: random}}."
        raise DataError(f"split: by: given must find train and test, got {', '.join(given) or 'no rows'}. {fix}")
    if not splits["validation"]:
        if validation_share == 0:
            raise DataError(
                "split: validation must be above 0 when the data brings no validation split, got 0."
                " Early stopping and calibration need one: set split.validation: 0.1."
            )
        shares = {"train": 1 - validation_share, "validation": validation_share}
        splits |= _split_stratified(splits["train"], shares, seed)
    return splits


def _find_column(rows: Sequence[Row], section: SplitSection, columns: Mapping[str, str]) -> str:
    """The name in `Row.values` of the column to split by, where a role's column has the name of the role."""
    column = section.column or ""
    there = {name: None for row in rows for name in row.values}
    if column not in there:
        roles = [role for role, own in columns.items() if own == column]
        if not roles:
            names = {**there, **dict.fromkeys(columns.values())}
            raise DataError(
                f"split: column {column!r} must exist to split by {section.by}, got columns {', '.join(names)}."
                f"{suggest(column, names)}"
            )
        column = roles[0]
    if empty := [row.id for row in rows if row.values.get(column) in (None, "")]:
        raise DataError(f"split: column {column!r} must have a value in every row, is empty in {_listed(empty)}.")
    return column


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MAX_LISTED:,} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more
