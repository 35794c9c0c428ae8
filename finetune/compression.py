"""The story of a compression: a finished run -> smaller models that learn from it -> a frontier -> the one that fits.

Every size is a run of its own, trained and not judged on test. Their frontier is drawn on validation, and the test
split is opened for the chosen one alone.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune import fitting, layout, runner
from finetune.artifact.assess import choose_evaluation
from finetune.artifact.card import find_hub_base
from finetune.artifact.export.parity import Answers, Judged, compare_answers, count_bytes
from finetune.artifact.export.speed import Contender, describe_machine, measure
from finetune.artifact.load import load
from finetune.artifact.predictor import Predictor
from finetune.artifact.run_folder import SETTINGS, RunFolder, find_run, load_json, now, save_json
from finetune.artifact.save import save_model
from finetune.artifact.saved import compute_model_fingerprint, open_saved
from finetune.artifact.smaller import LEAST_TOKENS, Size, Whole, list_sizes
from finetune.artifact.teacher import add_teacher_logits
from finetune.errors import GateError, Interrupted, RecipeError, UsageError
from finetune.evaluation.budget import Budget
from finetune.evaluation.compression_page import write_page
from finetune.models.base import resolve_base
from finetune.recipe import Recipe, dump_recipe, load_recipe
from finetune.recipe.schema import AdapterSection, DistillSection, HubSection
from finetune.tasks import TextClassification
from finetune.tasks.preparation import Part, Prepared

RESULTS, PAGE = "compress.json", "compress.html"
LEARNING_RATE = 3e-4
SETTLED = ("train.seed", "train.few_shot", "train.distill", "train.distill.teacher")
"""Keys that the run has settled: another seed would split its rows in another way, and let test rows into train."""
LEAST_EPOCHS = 8
"""A cut model has more to find again than an adapter has to learn."""


@dataclass(frozen=True)
class _Work:
    """A run that is made smaller, and everything that its sizes share.

    Args:
        run: finished.
        recipe: of it.
        predictor: of it, on the CPU.
        prepared: its rows, for the trimmed tokenizer.
        whole: what is cut.
        judged: how answers are scored.
        before: what the run says of validation.
        root: where the smaller runs lie.
        overrides: of their recipes.
        tell: told what comes next.
    """

    run: RunFolder
    recipe: Recipe
    predictor: Predictor
    prepared: Prepared
    whole: Whole
    judged: Judged
    before: Answers
    root: Path
    overrides: Sequence[str]
    tell: Callable[[str], None]

    def learn(self, size: Size) -> RunFolder:
        """The run of one size, trained; only what is missing is done."""
        tokens = len(self.whole.vocabulary.tokenizer)
        start = self.root / "starts" / self.run.path.name / f"{size.name}-{tokens}"
        if not (start / SETTINGS).exists():
            start.parent.mkdir(parents=True, exist_ok=True)
            settings = open_saved(self.run.model).own_settings
            save_model(self.whole.cut(size), self.whole.vocabulary.tokenizer, start, settings)
        recipe = self._build_recipe(size, start)
        folder = self._find(recipe)
        if folder is None:
            ready = resolve_base(str(start)), self.prepared
            folder = layout.start(recipe, dump_recipe(recipe).encode(), self.run.recipe_folder, ready, self.root.parent)
            save_json(folder.lock, load_json(folder.lock) | {"parent": self._describe_parent() | {"size": size.name}})
        if folder.load_status()["state"] not in ("trained", "finished"):
            fitting.search(folder, quiet=True)
        shutil.rmtree(folder.checkpoints, ignore_errors=True)  # three times the weights, and nothing goes on from them
        return folder

    def _describe_parent(self) -> dict[str, Any]:
        """The run, its weights, and the base on the Hub that all of them come from, where there is one."""
        base = find_hub_base(load_json(self.run.lock))
        return {"run": self.run.name, "base": base, "sha256": compute_model_fingerprint(self.run.model)}

    def _build_recipe(self, size: Size, start: Path) -> Recipe:
        """The run's recipe for a model that is there already and learns from the run."""
        whole = self.recipe
        model = {"base": str(start.resolve()), "adapters": [], "architecture": "triad", "quantize": "none"}
        train = {
            "epochs": max(whole.train.epochs, LEAST_EPOCHS),
            "learning_rate": LEARNING_RATE,
            "head_learning_rate": LEARNING_RATE,
            "few_shot": "none",
            "distill": DistillSection(teacher=str(self.run.model.resolve())),
        }
        # Frozen features of a base that was trained on the task say nothing about the task.
        baselines = [name for name in whole.evaluate.baselines if name != "frozen_logreg"]
        recipe = whole.model_copy(
            update={
                "name": self.root.name,
                "description": f"{self.run.name} made smaller: {size.layers} layers, {size.width:.0%} of the heads and "
                "channels of each, and the tokens that it needs.",
                "model": whole.model.model_copy(update=model),
                "adapter": AdapterSection(method="full"),
                "train": whole.train.model_copy(update=train),
                "evaluate": whole.evaluate.model_copy(update={"baselines": baselines}),
                "assistant": None,
                "monitor": None,
                "hub": HubSection(private=whole.hub.private),
            }
        )
        path = start.with_name(f"{start.name}.yaml")
        path.write_text(dump_recipe(recipe), encoding="utf-8")
        return load_recipe(path, self.overrides)

    def _find(self, recipe: Recipe) -> RunFolder | None:
        """The latest run of just this recipe."""
        for path in sorted(self.root.glob("*/status.json"), reverse=True):
            folder = RunFolder(path.parent)
            try:
                if load_recipe(folder.recipe).to_dict() == recipe.to_dict():
                    return folder
            except RecipeError:  # of another version of the toolkit
                continue
        return None

    def look_at(self, size: Size, folder: RunFolder) -> tuple[dict[str, Any], Contender]:
        """What a trained size has come to on validation, without its speed; and the model."""
        made = load(folder.model)
        assert isinstance(made, Predictor)
        model: Any = made.model.cpu()
        examples = self.prepared.examples["validation"]
        outputs = self.judged.task.compute_outputs(model, examples, None)
        compared = compare_answers(self.judged, self.before, Answers(outputs, examples.labels))
        score = compared["metrics"][self.judged.section.metrics[0]]
        point = {
            "run": str(folder.path),
            "layers": size.layers,
            "width": size.width,
            "heads": model.config.num_attention_heads,
            "channels": model.config.intermediate_size,
            "tokens": model.config.vocab_size,
            **_weigh(model),
            "score": score["after"],
            "lost": score["lost"],
            "equal_decisions": compared["equal_decisions"],
            "metrics": compared["metrics"],
            "seconds": folder.load_status()["training"]["seconds"],
        }
        return point, Contender(model, made.tokenizer)


def compress(  # noqa: PLR0913  (as the command takes them)
    reference: str | Path,
    *,
    max_drop: float | None = None,
    min_speedup: float | None = None,
    output: str | Path | None = None,
    sizes: Sequence[str] = (),
    tokens: int | None = None,
    overrides: Sequence[str] = (),
    quiet: bool = False,
) -> dict[str, Any]:
    """Make a finished run smaller and faster; what is there already of the same run is not done again.

    Args:
        reference: the run, with one task of type text_classification on a Triad.
        max_drop: the most that the chosen model may lose of the headline on validation; default .01.
        min_speedup: in its place: how many times the run's rows per second it must reach.
        output: where runs are kept; default beside the run's own. The smaller runs lie in `<name>-compressed`.
        sizes: such as `3x0.5`, three layers with half of their heads and channels; default about nine.
        tokens: of the smaller vocabulary, at least: those of the train rows, then the commonest others; default 8,000.
        overrides: `train.<key>=value` for the smaller runs.
        quiet: no words on standard error.

    Returns:
        What is in compress.json, and `page`.

    Raises:
        UsageError: a run that cannot be made smaller, a budget or a size that cannot be meant.
        GateError: no size keeps the budget, or the chosen one misses a gate of the recipe; all was written.
        Interrupted: stopped; the same call goes on.
    """
    budget = Budget.build(max_drop, min_speedup)
    _check_overrides(overrides)
    run = find_run(reference)
    recipe = load_recipe(run.recipe)
    _check_run(run, recipe)
    tokens = LEAST_TOKENS if tokens is None else tokens
    if tokens < 0:
        raise UsageError(f"--tokens: must be at least 0, got {tokens}. 0 keeps those of the train rows alone.")
    wanted = [Size.parse(size) for size in sizes]
    root = (Path(output) if output is not None else run.path.parent.parent) / f"{recipe.name[:53]}-compressed"
    root.mkdir(parents=True, exist_ok=True)
    held = RunFolder(root).hold()
    try:
        work = _open(run, recipe, root, tokens, overrides, (lambda _text: None) if quiet else _write_line)
        results = _draw_frontier(work, wanted or list_sizes(work.whole.model.config.num_hidden_layers), budget)
        _write(root, results)
        if results["chosen"] is None:
            raise GateError(_describe_miss(budget, results, root))
        chosen = RunFolder(Path(results["points"][results["chosen"]]["run"]))
        work.tell(f"judging {results['chosen']} on test")
        try:
            if chosen.load_status()["state"] != "finished":
                runner.resume(chosen.path, quiet=True)
        finally:
            if chosen.load_status()["state"] == "finished":  # a missed gate too
                results |= {"test": _read_tests(run, chosen, root, results["points"])}
                _write(root, results)
    except (Interrupted, KeyboardInterrupt):
        raise Interrupted(
            f"stopped; what is done is kept. Go on with: finetune compress {reference} and the same options"
        ) from None
    finally:
        held.release()
    return results | {"page": str(root / PAGE)}


def _write_line(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def _check_overrides(overrides: Sequence[str]) -> None:
    for override in overrides:
        key = override.partition("=")[0].strip()
        if not key.startswith("train.") or key in SETTLED:
            raise UsageError(
                f"compress: --set must change how the smaller models are trained, train.<key> but "
                f"{', '.join(SETTLED)}, got {override!r}."
            )


def _check_run(run: RunFolder, recipe: Recipe) -> None:
    types = [task.type for task in recipe.tasks.values()]
    if types != ["text_classification"]:
        got = types[0] if len(types) == 1 else f"{len(types)} tasks"
        raise UsageError(f"compress: must get a run with one task, text_classification, got {got} in {run.path}.")
    if recipe.model.architecture != "triad":
        raise UsageError(
            f"compress: must get a run on a Triad, got model.architecture: {recipe.model.architecture} in {run.path}, "
            "whose own class says nothing of what can be cut. Train it with model: {architecture: triad}."
        )


def _open(
    run: RunFolder, recipe: Recipe, root: Path, tokens: int, overrides: Sequence[str], tell: Callable[[str], None]
) -> _Work:
    """Load the run, read its rows again, and encode them for the trimmed tokenizer."""
    tell(f"reading {run.name}")
    _, prepared = layout.prepare_again(run, recipe)
    ((name, part),) = prepared.parts.items()
    predictor = load(run.model)
    assert isinstance(predictor, Predictor)
    assert isinstance(predictor.task, TextClassification)
    model: Any = predictor.model.cpu()
    if hasattr(model, "peft_config"):
        method = recipe.adapter.method
        raise UsageError(
            f"compress: the adapter must be merged into plain layers, got {method} in {run.path}, which cannot be. "
            "Train with adapter: {method: lora}."
        )
    section = choose_evaluation(recipe, name)
    judged = Judged(part.task, section, predictor.temperature, recipe.train.seed)
    validation = part.examples["validation"]
    before = Answers(predictor.task.compute_outputs(model, validation, None), validation.labels)
    whole = Whole(
        model=model,
        tokenizer=predictor.tokenizer,
        task=predictor.task,
        train=part.examples["train"],
        max_length=predictor.max_length,
        seed=recipe.train.seed,
        least_tokens=tokens,
    )
    own = add_teacher_logits(_encode_again(prepared, name, part, whole), whole.logits)
    return _Work(run, recipe, predictor, own, whole, judged, before, root, overrides, tell)


def _encode_again(prepared: Prepared, name: str, part: Part, whole: Whole) -> Prepared:
    """The same rows for the trimmed tokenizer."""
    tokenizer = whole.vocabulary.tokenizer
    examples = {
        split: whole.task.build_examples(rows, tokenizer, whole.max_length) for split, rows in part.splits.items()
    }
    return replace(
        prepared, parts={name: replace(part, examples=examples)}, examples=dict(examples), tokenizer=tokenizer
    )


def _draw_frontier(work: _Work, sizes: Sequence[Size], budget: Budget) -> dict[str, Any]:
    """Train every size, hold it against the run, time all together, and choose."""
    metric, section = work.judged.section.metrics[0], work.judged.section
    points: dict[str, dict[str, Any]] = {}
    contenders = {"run": Contender(work.whole.model, work.whole.tokenizer)}
    for place, size in enumerate(dict.fromkeys(sizes), start=1):
        point, contender = work.look_at(size, work.learn(size))
        points[size.name], contenders[size.name] = point, contender
        lost = point["lost"]["value"]
        words = "no score" if lost is None else f"{metric} lost {lost:+.4f}"
        work.tell(f"{place} of {len(sizes)}  {size.name}: {point['bytes'] / 1e6:,.1f} MB, {words}")
    work.tell("measuring speed")
    part = next(iter(work.prepared.parts.values()))
    validation = work.whole.task.build_examples(part.splits["validation"], work.whole.tokenizer, work.whole.max_length)
    speed = measure(work.whole.task, contenders, validation, work.whole.max_length, reference="run")
    for name, point in points.items():
        point |= {"speed": speed[name], "speedup": speed["ratios"][name]}
    chosen, nearest = budget.choose(points)
    any_point = next(iter(points.values()))
    return {
        "name": work.root.name,
        "created": now(),
        "run": {
            "name": work.run.name,
            "layers": work.whole.model.config.num_hidden_layers,
            "tokens": work.whole.model.config.vocab_size,
            **_weigh(work.whole.model),
            "score": any_point["metrics"][metric]["before"],
            "speed": speed["run"],
        },
        "metric": metric,
        "rows": len(validation),
        "confidence": section.confidence,
        "resamples": section.resamples,
        "budget": {"max_drop": budget.max_drop, "min_speedup": budget.min_speedup},
        "points": points,
        "chosen": chosen,
        "nearest": nearest,
        "pipeline": {"speed": speed["pipeline"], "speedup": speed["ratios"]["pipeline"]},
        "timed": {key: speed[key] for key in ("rows", "tokens_per_row")},
        "machine": describe_machine(),
    }


def _weigh(model: Any) -> dict[str, int]:
    return {"parameters": sum(parameter.numel() for parameter in model.parameters()), "bytes": count_bytes(model)}


def _write(root: Path, results: Mapping[str, Any]) -> None:
    save_json(root / RESULTS, results)
    write_page(root / PAGE, results)


def _read_tests(run: RunFolder, chosen: RunFolder, root: Path, points: Mapping[str, Any]) -> dict[str, Any]:
    """The test scores of the run and of the chosen size, and which other sizes' test splits were ever opened."""
    names = {Path(point["run"]).name: name for name, point in points.items()}
    opened = [path.parent.parent.name for path in sorted(root.glob("*/evaluation/test.json"))]
    found: dict[str, Any] = {"others": [names.get(name, name) for name in opened if name != chosen.path.name]}
    for key, each in (("run", run), ("chosen", chosen)):
        test = load_json(each.evaluation / "test.json")
        found[key] = {"opened": test["opened"], "metrics": test["metrics"]}
    return found


def _describe_miss(budget: Budget, results: Mapping[str, Any], root: Path) -> str:
    point = results["points"][results["nearest"]]
    lost = point["lost"]["value"]
    loses = "has no score" if lost is None else f"loses {lost:.4f}"
    return (
        f"compress: a size must {budget.describe()}, got none. Nearest: {results['nearest']}, which {loses} of "
        f"{results['metric']} and is {point['speedup']['rows_per_second']:g} times as fast. The test "
        f"split stayed closed; the frontier is in {root / PAGE}. Allow more, or try other sizes with --size."
    )
