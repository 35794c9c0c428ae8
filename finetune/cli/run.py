"""`finetune run`, `check` and `resume`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune.cli.output import (
    AsJson,
    Overrides,
    RecipeArgument,
    Runs,
    print_findings,
    print_json,
    print_note,
    print_table,
    print_text,
    show_outcomes,
)

if TYPE_CHECKING:
    from finetune.runner import Run

Processes = Annotated[
    int, typer.Option("--processes", min=1, help="Training processes: one per GPU, or several on a CPU.")
]
VERBS = {"assistant": "chat", "monitor": "monitor"}
"""Application -> the verb that uses it, and builds it where it is not there."""
SHOWN_CLASSES = 12
NoTest = Annotated[
    bool, typer.Option("--no-test", help="Stop after training; the test split stays closed until `finetune resume`.")
]


def run_command(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    processes: Processes = 1,
    runs: Runs = None,
    no_test: NoTest = False,
    as_json: AsJson = False,
) -> None:
    """Train and judge a recipe: check, split, train, evaluate, report, model card."""
    from finetune.runner import run

    options: dict[str, Any] = {"processes": processes, "quiet": as_json, "open_test": not no_test}
    with _showing_missed(as_json):
        done = run(recipe, overrides or (), runs=runs, **options)
    _show(done, as_json)


def resume_command(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder; runs/NAME means its latest run.")],
    processes: Processes = 1,
    no_test: NoTest = False,
    as_json: AsJson = False,
) -> None:
    """Go on with a stopped run, from its last good checkpoint."""
    from finetune.runner import resume

    with _showing_missed(as_json):
        done = resume(run, processes=processes, quiet=as_json, open_test=not no_test)
    _show(done, as_json)


def check_command(recipe: RecipeArgument, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check recipe, data, leaks and sizes; loads no weights."""
    from finetune.runner import check

    plan = check(recipe, overrides or ())
    if as_json:
        print_json(plan)
        return
    print_text(f"{plan['recipe']}: good.")
    print_text(f"base  {plan['base']['reference']} ({plan['base']['origin']})")
    for name, task in plan["tasks"].items():
        print_text(f"data  {task['data']}" + (f", for {name}" if len(plan["tasks"]) > 1 else ""))
        print_table(
            ["split", "rows", "tokens"],
            [[split, f"{part['rows']:,}", f"{part['tokens']:,}"] for split, part in task["splits"].items()],
        )
        if classes := task["classes"]:
            print_text(f"classes  {_list_classes(classes)}")
    print_findings(plan["findings"])
    trained, total = plan["parameters"]["trained"], plan["parameters"]["total"]
    print_text(
        f"{trained:,} of {total:,} parameters would be trained ({trained / total:.2%}), in about {plan['steps']:,} "
        f"steps; weights, gradients and optimizer take {plan['memory_mb']:,} MB, activations come on top."
    )


def _list_classes(classes: Mapping[str, int]) -> str:
    """`3: Billing 110, Refund 70, Other 20`; of many the largest, and the smallest."""
    sizes = [f"{name} {count:,}" for name, count in classes.items()]
    shown = sizes if len(sizes) <= SHOWN_CLASSES else [*sizes[: SHOWN_CLASSES - 1], "...", sizes[-1]]
    return f"{len(sizes):,}: {', '.join(shown)}"


@contextmanager
def _showing_missed(as_json: bool) -> Iterator[None]:
    """Show the scores of a run that missed its gates before the error says which; --json has the error alone.

    No application is built on such a run before somebody asks for it.
    """
    from finetune.errors import GateError

    try:
        yield
    except GateError as error:
        if error.run is not None and not as_json:
            from finetune.applications.registry import list_applications
            from finetune.artifact.run_folder import RunFolder
            from finetune.recipe import load_recipe
            from finetune.runner import Run

            folder = RunFolder(error.run)
            show_all_scores(Run(folder).tests)
            for application in list_applications(load_recipe(folder.recipe)):
                verb = VERBS[application.name]
                print_note(
                    f"{application.name}: not built, as a gate was missed; finetune {verb} {folder.path} builds it"
                )
        raise


def _show(run: Run, as_json: bool) -> None:
    from finetune.runner import take_only
    from finetune.training.processes import is_main_process

    if not is_main_process():
        return
    places = run.folder.evaluations()
    if not all((place / "test.json").exists() for place in places.values()):
        _show_trained(run, as_json)
        return
    tests, reports = run.tests, {name: str(place / "report.html") for name, place in places.items()}
    built = _build_applications(run, as_json)
    if as_json:
        content = {"run": str(run.folder.path), "report": take_only(reports), "test": take_only(tests)}
        print_json(content | built)
        return
    show_all_scores(tests)
    for application, figures in built.items():
        {"assistant": _show_assistant, "monitor": _show_monitor}[application](figures)
    for report in reports.values():
        print_text(f"report  {report}")
    print_text(f"card    {run.folder.card}")
    name = run.folder.path.parent
    for application in built:
        uses = {
            "assistant": f"talk    finetune chat {name}",
            "monitor": f"watch   finetune monitor {name} --input FILE --alerts alerts.jsonl",
        }
        print_text(uses[application])
    if built:
        return
    print_text(
        {
            "text_classification": f'predict finetune predict {name} "some text"',
            "multi_task": f'predict finetune predict {name} "some text"',
            "masked_lm": f"next    finetune run RECIPE --set model.base={name}",
            "retrieval": f'use     finetune.load("{name}").embed([text])',
            "reranking": f'use     finetune.load("{name}").score_pairs(question, entries)',
            "recommendation": f"use     finetune recommend {name} --history ID,ID,ID",
            "question_answering": f"answer  finetune.load({str(name)!r}).answer(question, passage)  in Python",
        }.get(run.task_type, f'write   finetune generate {name} --prompt "some text"')
    )


def _build_applications(run: Run, quiet: bool) -> dict[str, dict[str, Any]]:
    """The figures of each system that the recipe asks for, by the name of its section."""
    from finetune.applications.registry import list_applications
    from finetune.recipe import load_recipe

    built = {}
    recipe = load_recipe(run.folder.recipe)
    for application in list_applications(recipe):
        for note in [] if quiet else [f"{application.name}: {application.steps}", *application.list_notes(recipe)]:
            print_note(note)
        built[application.name] = application.build(run.folder.path)
    return built


def _show_assistant(figures: dict[str, Any]) -> None:
    show_outcomes(figures, "questions", "assistant, test, end to end")


def _show_monitor(figures: dict[str, Any]) -> None:
    from finetune.evaluation.wording import format_number, format_share

    rows = [
        [name, f"{part['windows']:,}", *(format_number(part[key]) for key in errors), format_share(part["coverage"])]
        for name, part, errors in (
            (words, figures.get(key), ("corrected", "counted"))
            for key, words in (("artificial", "artificial"), ("windows", "by topic and time"))
        )
        if part
    ]
    head = ["windows", "number", "error, corrected", "error, counted", "intervals that hold"]
    print_table(head, rows, title="monitor, test: mean absolute error of the negative share")


def show_all_scores(tests: dict[str, dict[str, Any]]) -> None:
    """The scores of a run's tasks; the name of a task where there are several."""
    for name, scored in tests.items():
        show_scores(scored, f"{name}, " if len(tests) > 1 else "")


def _show_trained(run: Run, as_json: bool) -> None:
    """A run that was told to keep its test split closed."""
    if as_json:
        print_json({"run": str(run.folder.path), "training": run.folder.load_status()["training"]})
    else:
        print_text(f"{run.folder.path}: trained; the test split is closed. Judge it: finetune resume {run.folder.path}")


def show_scores(scored: dict[str, Any], of: str = "") -> None:
    """The table of a scored split: the model above its baselines."""
    from finetune.evaluation.wording import decimals_of, describe_tested, format_score

    metrics = scored["metrics"]
    rows = [
        [name, *(format_score(system["metrics"].get(metric, {}), decimals_of(metric)) for metric in metrics)]
        for name, system in [("model", scored), *scored["baselines"].items()]
    ]
    is_one = scored["rows"] == 1
    intervals = "no intervals" if is_one else f"{scored['confidence']:.0%} bootstrap intervals"
    print_table(["", *metrics], rows, title=f"{of}{scored['split']}: {describe_tested(scored)}, {intervals}")
    if is_one:
        print_findings([{"severity": "warning", "message": "One row shows nothing of chance. Score more rows."}])
