"""What is wrong with split rows, before anything is trained on them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from finetune.data.cleaning import normalize_for_duplicates
from finetune.data.duplicates import find_near_duplicates
from finetune.data.rows import SPLITS, Row, Splits
from finetune.errors import DataError
from finetune.recipe.messages import count_of, suggest

Severity = Literal["error", "warning", "note"]

MAX_ROWS = 20
SOME = 3  # of them are named in a message
IMBALANCE_RATIO = 20
CUT_WARNING_RATIO = 0.01


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing worth knowing about the rows."""

    kind: str
    """What was checked, such as `leak` or `unknown_label`."""
    severity: Severity
    """`error`: the rows cannot be used. `warning`: scores may mislead. `note`: for information."""
    split: str
    """The split of the listed rows; `all` when they are in several."""
    count: int
    """How many rows (classes for `absent_class`, `few_rows`, `imbalance` and `similar_classes`, texts for
    `conflicting_labels`)."""
    message: str
    rows: tuple[str, ...] = ()
    """Ids of at most 20 of them."""


def check_rows(
    splits: Splits,
    labels: Sequence[str] | None,
    *,
    leaks: Literal["fail", "warn", "drop"],
    texts: Sequence[str] = ("text",),
    same: Sequence[str] = ("text",),
    out_of_scope: str | None = None,
) -> tuple[Splits, list[Finding]]:
    """Look for rows that cannot be trained on and for texts that are in two splits.

    Texts are compared as `normalize_for_duplicates` gives them; near duplicates as `find_near_duplicates` says.

    Args:
        splits: rows whose `label` is a class name, where the task has labels.
        labels: the classes; None for a task without labels, whose rows may hold anything as `label`.
        leaks: `fail`: a text in two splits is an error, a near duplicate a warning. `warn`: both are warnings, and the
            rows stay. `drop`: both are removed from the split that comes first of train, validation, test, and the
            number of rows removed is a warning.
        texts: the roles that no row may leave empty.
        same: the roles that together make two rows the same text, for leaks and repetitions.
        out_of_scope: the label of rows that belong to none of `labels`.

    Returns:
        The splits without the dropped rows, and the findings, errors first. Nothing is raised: see `raise_on_errors`.
    """
    entries = [
        _Entry(name, row, normalize_for_duplicates(" ".join(_text(row, role) for role in same)))
        for name, rows in splits.items()
        for row in rows
    ]
    findings = [finding for role in texts for finding in _check_texts(splits, role)]
    if labels is not None:
        findings += _check_labels(splits, [*labels, *([out_of_scope] if out_of_scope else [])])
    exact = _find_exact_leaks(entries)
    near = _find_near_leaks(entries, skip={leak.entry for leak in exact})
    findings += _report_leaks("leak", exact, leaks, "error" if leaks == "fail" else "warning")
    findings += _report_leaks("near_leak", near, leaks, "warning")
    if leaks == "drop":
        dropped = {leak.entry for leak in [*exact, *near]}
        entries = [entry for entry in entries if entry not in dropped]
        splits = {name: [entry.row for entry in entries if entry.split == name] for name in splits}
    same_texts = _group_same_texts(entries)
    if labels is not None:
        findings += [*_check_classes(splits, labels), *_check_spelling(labels), *_check_conflicts(same_texts)]
    findings += _check_duplicates(same_texts)
    order = ("error", "warning", "note")
    return splits, sorted(findings, key=lambda finding: order.index(finding.severity))


def set_apart(splits: Splits, out_of_scope: str | None, *, is_exposed: bool) -> tuple[Splits, list[Finding]]:
    """Take the rows that belong to no class out of train: what they have in common is only what they are not.

    Args:
        splits: rows whose `label` is a class name, or `out_of_scope`.
        out_of_scope: None where every row has a class.
        is_exposed: leave them in train, where the loss takes them for what they are.

    Returns:
        The splits, validation and test as they were, and the findings.
    """
    if out_of_scope is None:
        return splits, []
    outside = {name: [row for row in rows if row.values.get("label") == out_of_scope] for name, rows in splits.items()}
    findings = []
    if is_exposed and not outside["train"]:
        message = (
            f"train: must have rows labelled {out_of_scope!r} for outlier_exposure, got none. Add some, or set it to 0."
        )
        findings.append(Finding("out_of_scope", "error", "train", 0, message))
    if not is_exposed and (left_out := [row.id for row in outside["train"]]):
        message = (
            f"train: left out {_rows(len(left_out))} labelled {out_of_scope!r}, which no class is learned from"
            f" ({_some(left_out)})."
        )
        findings.append(Finding("out_of_scope", "note", "train", len(left_out), message, _shown(left_out)))
    for split, why in (("validation", "no probability can be fitted"), ("test", "nothing says how well they are told")):
        if not outside[split]:
            message = f"{split}: must have rows labelled {out_of_scope!r} for out_of_scope, got none: {why}. Add some."
            findings.append(Finding("out_of_scope", "warning", split, 0, message))
        elif len(outside[split]) == len(splits[split]):
            message = f"{split}: must have rows with a class, got only rows labelled {out_of_scope!r}. Add some."
            findings.append(Finding("out_of_scope", "error", split, len(splits[split]), message))
    train = [row for row in splits["train"] if is_exposed or row.values.get("label") != out_of_scope]
    return splits | {"train": train}, findings


def check_given_test(splits: Splits) -> list[Finding]:
    """Rows of a given test split that are learned from, where a recipe splits such data anew."""
    total = sum(row.split == "test" for rows in splits.values() for row in rows)
    learned = [row.id for row in splits["train"] if row.split == "test"]
    if not learned:
        return []
    message = (
        f"train: {len(learned):,} of {_rows(total)} of the given test split are now in train ({_some(learned)}). Set"
        " split: {by: given} to keep that split."
    )
    return [Finding("given_test", "warning", "train", len(learned), message, _shown(learned))]


def check_lengths(lengths: Mapping[str, npt.ArrayLike], max_length: int) -> list[Finding]:
    """Count the rows that `max_length` cuts; above 1 % of a split it is a warning.

    Args:
        lengths: split -> tokens of each row before cutting, special tokens included.
        max_length: tokens after which a text is cut.
    """
    findings = []
    for split, tokens in lengths.items():
        is_cut = np.asarray(tokens) > max_length
        count, share = int(is_cut.sum()), float(is_cut.mean()) if is_cut.size else 0.0
        if count:
            message = (
                f"{split}: {_rows(count)} of {is_cut.size:,} ({share:.1%}) must be cut to {max_length} tokens."
                f" Raise model.max_length if the end of a text matters."
            )
            severity: Severity = "warning" if share > CUT_WARNING_RATIO else "note"
            findings.append(Finding("cut_text", severity, split, count, message))
    return findings


def check_shots(rows: Sequence[Row], labels: Sequence[str], shots: int) -> list[Finding]:
    """Name the classes that have fewer than `shots` of the rows that `keep_shots` left."""
    counts = Counter(row.values["label"] for row in rows)
    few = [f"{label!r} ({counts[label]})" for label in labels if counts[label] < shots]
    if not few:
        return []
    message = (
        f"train: every class must have {shots} different texts for split.shots, got fewer of {_some(few)}. All of them"
        " are kept. Add rows, or lower split.shots."
    )
    return [Finding("few_rows", "warning", "train", len(few), message)]


def raise_on_errors(findings: Sequence[Finding], origin: str) -> None:
    """Raise one error that lists every finding of severity `error` with its rows, and every warning below.

    Raises:
        DataError: there is at least one error; it holds all findings.
    """
    errors = [finding for finding in findings if finding.severity == "error"]
    if not errors:
        return
    lines = [f"{origin}: {count_of(len(errors), 'problem')}"]
    for finding in errors:
        lines.append(f"  {finding.message}")
        if len(finding.rows) > SOME:  # the message names those
            more = f" and {finding.count - len(finding.rows):,} more" if finding.count > len(finding.rows) else ""
            lines.append(f"    rows: {', '.join(finding.rows)}{more}")
    lines += [f"  warning: {finding.message}" for finding in findings if finding.severity == "warning"]
    error = DataError("\n".join(lines))
    error.findings = findings_to_json(findings)
    raise error


def findings_to_json(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """The findings as plain JSON types."""
    return [asdict(finding) | {"rows": list(finding.rows)} for finding in findings]


# Texts and labels


def _check_texts(splits: Splits, role: str) -> Iterator[Finding]:
    for split, rows in splits.items():
        empty = [row.id for row in rows if not _text(row, role).strip()]
        if empty:
            message = (
                f"{split}: {role} must not be empty, is in {_rows(len(empty))} ({_some(empty)}). Fill or remove them."
            )
            yield Finding(f"empty_{role}", "error", split, len(empty), message, _shown(empty))


def _check_labels(splits: Splits, labels: Sequence[str]) -> Iterator[Finding]:
    for split, rows in splits.items():
        missing = [row.id for row in rows if row.values.get("label") is None]
        if missing:
            message = (
                f"{split}: every row must have a label, {_rows(len(missing))} {_verb(missing, 'has', 'have')} none"
                f" ({_some(missing)}). Label or remove them."
            )
            yield Finding("missing_label", "error", split, len(missing), message, _shown(missing))
        unknown = [row for row in rows if row.values.get("label") not in (None, *labels)]
        if unknown:
            counts = Counter(str(row.values["label"]) for row in unknown)
            values = ", ".join(f"{value!r} ({_rows(count)})" for value, count in counts.most_common(10))
            ids = [row.id for row in unknown]
            message = (
                f"{split}: label must be one of {_names(labels)}, got {values}: {_some(ids)}."
                f"{suggest(counts.most_common(1)[0][0], labels)} Correct the rows, or tasks.<name>.labels."
            )
            yield Finding("unknown_label", "error", split, len(unknown), message, _shown(ids))


def _check_classes(splits: Splits, labels: Sequence[str]) -> Iterator[Finding]:
    counts = {
        split: Counter(str(row.values["label"]) for row in rows if row.values.get("label") is not None)
        for split, rows in splits.items()
    }
    for split in splits:
        absent = [label for label in labels if not counts[split][label]]
        if absent:
            severity: Severity = "error" if split == "train" else "warning"
            why = "nothing can be learned about it" if split == "train" else "its score there says nothing"
            message = f"{split}: every class must have rows, got none of {_names(absent)}: {why}. Add rows of it."
            yield Finding("absent_class", severity, split, len(absent), message)
    present = {label: count for label, count in counts.get("train", Counter()).items() if label in labels}
    if present:
        large, small = max(present, key=lambda label: present[label]), min(present, key=lambda label: present[label])
        ratio = present[large] / present[small]
        if ratio > IMBALANCE_RATIO:
            message = (
                f"train: class {large!r} has {ratio:.0f} times the rows of {small!r} ({present[large]:,} and"
                f" {present[small]:,}). Consider train.class_weights: sqrt_balanced, and judge by macro_f1."
            )
            yield Finding("imbalance", "note", "train", len(present), message)


def _check_spelling(labels: Sequence[str]) -> Iterator[Finding]:
    same: dict[str, list[str]] = defaultdict(list)
    for label in labels:
        same[" ".join(label.casefold().split())].append(label)
    if alike := [names for names in same.values() if len(names) > 1]:
        listed = "; ".join(", ".join(map(repr, names)) for names in alike[:3]) + ("; ..." if len(alike) > 3 else "")
        first = alike[0][0]
        mapped = ", ".join(f"{name!r}: {first!r}" for name in alike[0])
        message = (
            f"Classes must differ by more than case and spaces, got {listed}. If they mean the same, correct the rows,"
            f" or name every label's class: tasks.<name>.labels: {{{mapped}, ...}}."
        )
        yield Finding("similar_classes", "warning", "all", sum(map(len, alike)), message)


# Repeated texts


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    """A row in its split with its normalised text; compared as an object, for ids may repeat across data sets."""

    split: str
    row: Row
    text: str


@dataclass(frozen=True, slots=True)
class _Leak:
    """A row whose text is also in a later split."""

    entry: _Entry
    other: _Entry


def _group_same_texts(entries: Sequence[_Entry]) -> list[list[_Entry]]:
    rows_of: dict[str, list[_Entry]] = defaultdict(list)
    for entry in entries:
        if entry.text:
            rows_of[entry.text].append(entry)
    return list(rows_of.values())


def _check_conflicts(same_texts: Sequence[list[_Entry]]) -> Iterator[Finding]:
    conflicts = [same for same in same_texts if len({entry.row.values.get("label") for entry in same} - {None}) > 1]
    if conflicts:
        ids = [entry.row.id for same in conflicts for entry in same]
        message = (
            f"{count_of(len(conflicts), 'text')} must have one label, got several ({_some(ids)})."
            " Decide on one: they cannot both be learned."
        )
        yield Finding("conflicting_labels", "warning", "all", len(conflicts), message, _shown(ids))


def _check_duplicates(same_texts: Sequence[list[_Entry]]) -> Iterator[Finding]:
    in_train = ([entry.row.id for entry in same if entry.split == "train"] for same in same_texts)
    again = [row_id for ids in in_train for row_id in ids[1:]]
    if again:
        message = (
            f"train: {_rows(len(again))} {_verb(again, 'repeats', 'repeat')} the text of another row ({_some(again)})."
        )
        yield Finding("duplicates", "note", "train", len(again), message, _shown(again))


def _find_exact_leaks(entries: Sequence[_Entry]) -> list[_Leak]:
    last: dict[str, _Entry] = {}  # text -> a row of the last split that has it
    for entry in entries:
        if entry.text and (entry.text not in last or _place(entry) > _place(last[entry.text])):
            last[entry.text] = entry
    same = ((entry, last.get(entry.text)) for entry in entries)
    return [_Leak(entry, other) for entry, other in same if other and _place(other) > _place(entry)]


def _find_near_leaks(entries: Sequence[_Entry], skip: set[_Entry]) -> list[_Leak]:
    kept = [entry for entry in entries if entry not in skip]
    found = find_near_duplicates([entry.text for entry in kept], [_place(entry) for entry in kept])
    return [_Leak(kept[pair.index], kept[pair.other]) for pair in found]


def _place(entry: _Entry) -> int:
    return SPLITS.index(entry.split)


def _report_leaks(kind: str, leaks: Sequence[_Leak], action: str, severity: Severity) -> Iterator[Finding]:
    pairs: dict[tuple[str, str], list[_Leak]] = defaultdict(list)
    for leak in leaks:
        pairs[leak.entry.split, leak.other.split].append(leak)
    for (split, other), found in pairs.items():
        ids = [leak.entry.row.id for leak in found]
        also = f"{'almost the' if kind == 'near_leak' else 'the'} same text in {other}"
        examples = ", ".join(f"{leak.entry.row.id} = {leak.other.row.id}" for leak in found[:3])
        if action == "drop":
            message = f"{split}: dropped {_rows(len(found))} with {also} ({examples})."
            yield Finding(kind, "warning", split, len(found), message, _shown(ids))
        else:
            message = (
                f"{split}: must not share texts with {other}, {_rows(len(found))} {_verb(ids, 'has', 'have')} {also}"
                f" ({examples}). {advise_on_leaks(split)}"
            )
            yield Finding(kind, severity, split, len(found), message, _shown(ids))


def advise_on_leaks(split: str) -> str:
    """What a recipe can do about rows of a split that lie in a later one too."""
    return f"Set split.leaks: drop to remove them from {split}."


# Words


def _text(row: Row, role: str = "text") -> str:
    return str(row.values.get(role) or "")


def _shown(ids: Sequence[str]) -> tuple[str, ...]:
    return tuple(ids[:MAX_ROWS])


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:SOME]) + (", ..." if len(ids) > SOME else "")


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _rows(count: int) -> str:
    return count_of(count, "row")


def _verb(ids: Sequence[str], singular: str, plural: str) -> str:
    return singular if len(ids) == 1 else plural
