"""From a run to an assistant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from finetune.applications.support.assistant import Assistant
from finetune.applications.support.decision import NEVER, Costs, choose_threshold, load_threshold, save_decision
from finetune.applications.support.evaluate import (
    Question,
    collect_evidence_of,
    collect_intent_evidence_of,
    collect_outcomes,
)
from finetune.applications.support.index import BUILD_AGAIN, KnowledgeIndex
from finetune.applications.support.links import Links, fit_exponents
from finetune.applications.support.reader import Reader
from finetune.applications.support.relevance import fit_relevance, load_relevance, save_relevance
from finetune.applications.support.templates import load_intents
from finetune.applications.support.trained import build_reader
from finetune.applications.support.writer import Writer, load_reply_writer
from finetune.artifact.run_folder import RunFolder, find_run
from finetune.data.knowledge import Entry, load_knowledge
from finetune.errors import FinetuneError, UsageError
from finetune.recipe import load_recipe
from finetune.recipe.files import write_file_atomically

_INDEX, _INTENTS, _DECISION, _RELEVANCE = "index", "intents.jsonl", "decision.json", "relevance.json"


def load_assistant(
    run: str | Path,
    knowledge: Path | None = None,
    *,
    reply: str | None = None,
    writer: str | Path | None = None,
    engine: str | None = None,
) -> Assistant:
    """The assistant of a finished run.

    Args:
        run: the run's folder, or runs/<name> for its latest finished run.
        knowledge: a file of entries to answer from instead of the run's own; it is read by the model now, and nothing
            is trained or written.
        reply: extract or generate; None for what the recipe says.
        writer: the run that writes where `reply` is generate; None for the recipe's.
        engine: the format of an export of the run that reads in its place.

    Raises:
        UsageError: no such run, one that trained no assistant, one whose index belongs to another model, or no run that
            can write.
        DataError: a file of entries or intents that cannot be trusted.
        ResourceError: a file is missing or damaged.
    """
    folder = find_run(run)
    reader = build_reader(folder, engine)
    support = find_support_folder(folder)
    if not support.is_dir():
        raise UsageError(f"{folder.path}: must hold an assistant in {support.name}/, got none. {BUILD_AGAIN}")
    if knowledge is None:
        index = KnowledgeIndex.load(support / _INDEX, reader)
    else:
        index = KnowledgeIndex.build(load_knowledge(str(knowledge)), reader, _load_own_index(support, reader))
    intents = load_intents(support / _INTENTS, reader.intents)
    relevance = load_relevance(support / _RELEVANCE)
    author = _load_writer(folder, reply, writer)
    return Assistant(reader, index, intents, load_threshold(support / _DECISION), relevance, author)


def save_assistant(
    folder: Path,
    reader: Reader,
    entries: Sequence[Entry],
    intents: Path,
    questions: Mapping[str, Sequence[Question]],
    costs: Costs,
) -> Assistant:
    """Build the index, weigh the evidence and choose the threshold, and write what `load_assistant` reads.

    Args:
        folder: as `find_support_folder` gives it.
        reader: the trained model.
        entries: what it answers from.
        intents: the file of intents and templates, which is copied.
        questions: those of train say which intents ask for which entries; weights and the threshold are chosen on those
            of validation.
        costs: what a wrong answer costs against a hand-over.

    Raises:
        DataError: intents that are not the model's, or no questions.
    """
    checked = load_intents(intents, reader.intents)
    links = Links.count(reader.intents, [(question.intent, question.entries) for question in questions["train"]])
    index = KnowledgeIndex.build(entries, reader, links=links)
    held_out = questions["validation"]
    own, linked = fit_exponents(*collect_intent_evidence_of(index, reader, held_out))
    index.links = replace(links, own=own, linked=linked)
    relevance = fit_relevance(*collect_evidence_of(index, reader, held_out))
    outcomes = collect_outcomes(Assistant(reader, index, checked, NEVER, relevance), held_out)
    sure = choose_threshold(outcomes, costs)
    index.save(folder / _INDEX)
    write_file_atomically(folder / _INTENTS, intents.read_bytes())
    save_relevance(folder / _RELEVANCE, relevance)
    save_decision(folder / _DECISION, sure, costs, outcomes)
    return Assistant(reader, index, checked, sure, relevance)


def find_support_folder(run: RunFolder) -> Path:
    """Where the assistant of a run lies."""
    return run.path / "support"


def _load_writer(folder: RunFolder, reply: str | None, writer: str | Path | None) -> Writer | None:
    """The writer that was asked for, or that the recipe has."""
    if reply not in (None, "extract", "generate"):
        raise UsageError(f"--reply: must be extract or generate, got {reply!r}.")
    section = load_recipe(folder.recipe).assistant
    said = reply or ("generate" if writer else section.reply if section else "extract")
    if said == "extract":
        if writer is not None:
            raise UsageError("--writer: must come with --reply generate, got extract. Leave one of them out.")
        return None
    run = writer or (section.writer if section else None)
    if run is None:
        raise UsageError(
            "--reply generate: must have a run that writes, got none. Add --writer RUN; finetune run support_writer "
            "trains one."
        )
    return load_reply_writer(run)


def _load_own_index(support: Path, reader: Reader) -> KnowledgeIndex | None:
    """The run's own index, whose features serve again; a damaged one is no reason to refuse other entries."""
    try:
        return KnowledgeIndex.load(support / _INDEX, reader)
    except FinetuneError:
        return None
