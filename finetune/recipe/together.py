"""Which keys of a recipe do not go together, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.recipe.recommendation import list_recommendation_problems
from finetune.recipe.reference import SCRATCH_BASE

if TYPE_CHECKING:
    from finetune.recipe.schema import Recipe, TaskSection

SEARCHING = ("retrieval", "reranking")
"""Task types that look for entries of a knowledge file."""
COMPARING = ("retrieval",)
"""Task types whose loss compares the rows of a batch."""
TYPED = ("text_classification", *SEARCHING)
"""Task types whose texts are what people type."""
WITH_HEAD = ("text_classification", "question_answering")
"""Task types whose models are a pretrained base and a head."""


def find_comparison(recipe: Recipe) -> str | None:
    """What of a recipe compares the rows of a batch, so that no batch can be split; None where nothing does."""
    if recipe.train.few_shot == "contrastive":
        return "train.few_shot: contrastive"
    return next(
        (f"tasks.{name}.type: {task.type}" for name, task in recipe.tasks.items() if task.type in COMPARING), None
    )


def list_problems(recipe: Recipe) -> list[str]:
    """Every problem of a recipe whose sections are good by themselves."""
    checks = (_check_base, _check_tasks, _check_several, _check_teacher, _check_outside_gates, _check_applications)
    return [problem for check in checks for problem in check(recipe)]


def _check_base(recipe: Recipe) -> list[str]:
    problems = []
    types = {task.type for task in recipe.tasks.values()}
    if recipe.model.normalize_features and recipe.model.architecture != "triad":
        problems.append(
            "model.normalize_features: must be false when model.architecture is native, got true: the family's own "
            "class reads its features as they are."
        )
    if recipe.model.base == SCRATCH_BASE:
        if pretrained := types & {*WITH_HEAD, *SEARCHING}:
            problems.append(
                f"model.base: must be a pretrained base for {max(pretrained)}, got 'scratch'. Pretrain one first: "
                "finetune run pretrain_mlm, then set model.base to that run."
            )
        if recipe.adapter.method != "full":
            problems.append(
                f"adapter.method: must be full when model.base is scratch, got {recipe.adapter.method!r}: random "
                "weights need training."
            )
        if recipe.model.architecture != "triad":
            problems.append(
                f"model.architecture: must be triad when model.base is scratch, got {recipe.model.architecture!r}."
            )
    if recipe.model.quantize != "none" and recipe.adapter.method != "lora":
        problems.append(
            f"model.quantize: must be none unless adapter.method is lora, got {recipe.model.quantize!r} with "
            f"{recipe.adapter.method!r}."
        )
    elif recipe.model.quantize != "none" and (recipe.adapter.dora or recipe.adapter.init != "default"):
        given = "dora" if recipe.adapter.dora else f"init {recipe.adapter.init}"
        problems.append(
            f"model.quantize: must be none with adapter.{given}, which reads the base's weights in full; got "
            f"{recipe.model.quantize!r}."
        )
    if recipe.model.adapters and recipe.adapter.method == "full":
        problems.append(
            "model.adapters: must be left out when adapter.method is full, got "
            f"{len(recipe.model.adapters)}: nothing would take their place."
        )
    if recipe.adapter.method == "head" and (without := types - set(WITH_HEAD)):
        headless = min(without)
        problems.append(
            f"adapter.method: must change the base for {headless}, got 'head': the task has no head of its own."
        )
    if "masked_lm" in types and recipe.adapter.method != "full":
        problems.append(
            f"adapter.method: must be full for masked_lm, got {recipe.adapter.method!r}: what it trains becomes the "
            "base of other recipes."
        )
    return problems


def _check_tasks(recipe: Recipe) -> list[str]:
    problems = []
    for name, task in recipe.tasks.items():
        where = f"tasks.{name}"
        problems += _list_foreign_keys(where, task)
        problems += _list_few_shot_problems(recipe, where, task)
        if task.type != "text_classification" and recipe.model.normalize_features:
            problems.append(f"model.normalize_features: must be false for {task.type}, got true.")
        if task.type == "question_answering":
            problems += _list_window_problems(recipe, where, task)
        problems += _list_search_problems(recipe, where, task)
        problems += list_recommendation_problems(recipe, where, task)
    others = [task.type for task in recipe.tasks.values() if task.type != "text_classification"]
    if len(others) == len(recipe.tasks):
        if recipe.train.class_weights != "none":
            problems.append(f"train.class_weights: must be none for {others[0]}, got {recipe.train.class_weights!r}.")
        if recipe.evaluate.calibrate != "none":
            problems.append(f"evaluate.calibrate: must be none for {others[0]}, got {recipe.evaluate.calibrate!r}.")
    return problems


def _list_foreign_keys(where: str, task: TaskSection) -> list[str]:
    """Keys that say nothing about a task of this type."""
    kind, problems = task.type, []
    if kind != "text_classification" and task.labels is not None:
        problems.append(f"{where}.labels: must be left out for {kind}, got {len(task.labels)} labels.")
    if kind != "text_classification" and task.out_of_scope is not None:
        problems.append(f"{where}.out_of_scope: must be left out for {kind}, got {task.out_of_scope!r}.")
    if task.out_of_scope is None and task.outlier_exposure:
        problems.append(f"{where}.outlier_exposure: must be 0 without out_of_scope, got {task.outlier_exposure:g}.")
    if kind != "question_answering" and task.stride is not None:
        problems.append(f"{where}.stride: must be left out for {kind}, got {task.stride}.")
    if kind != "causal_lm" and task.separator is not None:
        problems.append(f"{where}.separator: must be left out unless the type is causal_lm, got {kind}.")
    if kind != "completion" and task.prompt != "{text}":
        problems.append(f"{where}.prompt: must be left out unless the type is completion, got {kind}.")
    if kind not in TYPED and task.typos:
        problems.append(f"{where}.typos: must be 0 for {kind}, got {task.typos:g}.")
    if kind not in TYPED and task.subject_changes:
        problems.append(f"{where}.subject_changes: must be 0 for {kind}, got {task.subject_changes:g}.")
    return problems


def _list_search_problems(recipe: Recipe, where: str, task: TaskSection) -> list[str]:
    if task.type not in SEARCHING:
        given = task.knowledge
        return [f"{where}.knowledge: must be left out for {task.type}, got {given!r}."] if given else []
    problems = []
    if task.type in COMPARING and recipe.train.micro_steps > 1:
        problems.append(
            f"train.micro_steps: must be 1 for {task.type}, which compares the rows of a batch, got "
            f"{recipe.train.micro_steps}."
        )
    if task.type == "retrieval" and recipe.model.architecture != "triad":
        problems.append(
            f"model.architecture: must be triad for retrieval, got {recipe.model.architecture}: a family's own class "
            "does not pool."
        )
    if task.type == "reranking" and task.negatives == 0:
        problems.append(f"{where}.negatives: must be at least 1 for reranking, got 0: nothing could be compared.")
    return problems


def _list_window_problems(recipe: Recipe, where: str, task: TaskSection) -> list[str]:
    problems = []
    if task.clean:
        problems.append(
            f"{where}.clean: must be left out for question_answering, got {', '.join(task.clean)}: an answer is a "
            "place in the passage as it stands."
        )
    if task.stride is not None and task.stride >= recipe.model.max_length // 2:
        problems.append(
            f"{where}.stride: must be below half of model.max_length, {recipe.model.max_length // 2}, got "
            f"{task.stride}."
        )
    return problems


def _list_few_shot_problems(recipe: Recipe, where: str, task: TaskSection) -> list[str]:
    train = recipe.train
    if task.type != "text_classification":
        given = {
            f"{where}.class_names: must be ignore": task.class_names if task.class_names != "ignore" else None,
            f"{where}.split.shots: must be left out": task.split.shots,
            "train.few_shot: must be none": train.few_shot if train.few_shot != "none" else None,
        }
        because = f"for {task.type}, which has no classes"
        return [f"{what} {because}, got {value!r}." for what, value in given.items() if value is not None]
    if train.few_shot == "none":
        return []
    because = "when train.few_shot is contrastive, which compares the rows of a batch"
    tests = {
        f"{where}.split.shots: must be at least 2 {because}, got {task.split.shots}.": task.split.shots == 1,
        f"train.micro_steps: must be 1 {because}, got {train.micro_steps}.": train.micro_steps > 1,
        f"{where}.outlier_exposure: must be 0 {because}, got {task.outlier_exposure:g}.": task.outlier_exposure > 0,
        f"train.label_smoothing: must be 0 {because}, got {train.label_smoothing:g}.": train.label_smoothing > 0,
        "adapter.method: must change the base when train.few_shot is contrastive, got 'head'.": recipe.adapter.method
        == "head",
    }
    return [problem for problem, is_there in tests.items() if is_there]


def _check_several(recipe: Recipe) -> list[str]:
    """Several tasks on one base."""
    if len(recipe.tasks) == 1:
        return []
    problems = [
        f"tasks.{name}.type: must be text_classification, {' or '.join(SEARCHING)} where a recipe has several "
        f"tasks, got {task.type}. Give it a recipe of its own."
        for name, task in recipe.tasks.items()
        if task.type not in ("text_classification", *SEARCHING)
    ]
    problems += [
        f"tasks.{name}: must have no dot in its name where a recipe has several tasks; it names a head."
        for name in recipe.tasks
        if "." in name
    ]
    if recipe.model.architecture != "triad":
        problems.append(
            "model.architecture: must be triad for several tasks, got native: Hugging Face's own classes have one head."
        )
    if recipe.train.few_shot != "none":
        problems.append(f"train.few_shot: must be none for several tasks, got {recipe.train.few_shot!r}.")
    elif recipe.model.normalize_features:
        problems.append("model.normalize_features: must be false for several tasks, got true.")
    known = {gate for gate in recipe.evaluate.gates if "." in gate}
    problems += [
        f"evaluate.gates.{gate}: must begin with a task of this recipe ({', '.join(recipe.tasks)}) and a dot."
        for gate in sorted(known)
        if gate.partition(".")[0] not in recipe.tasks
    ]
    return problems


def _check_teacher(recipe: Recipe) -> list[str]:
    """A teacher has one head for classes."""
    if recipe.train.distill is None:
        return []
    types = [task.type for task in recipe.tasks.values()]
    problems = []
    if types != ["text_classification"]:
        problems.append(
            f"train.distill: must be left out unless the recipe has one task, text_classification, got "
            f"{', '.join(types)}."
        )
    if recipe.train.few_shot != "none":
        problems.append(
            f"train.distill: must be left out when train.few_shot is {recipe.train.few_shot}, whose head is fitted."
        )
    return problems


def _check_outside_gates(recipe: Recipe) -> list[str]:
    """A gate on rows of no class needs tasks that have them."""
    problems = []
    for gate in recipe.evaluate.gates:
        owner, _, metric = gate.rpartition(".")
        without = [name for name, task in recipe.tasks.items() if owner in ("", name) and task.out_of_scope is None]
        if metric.startswith("outside_") and without:
            problems.append(
                f"evaluate.gates.{gate}: must be for tasks with `out_of_scope`, got {', '.join(without)} without."
            )
    return problems


def _check_applications(recipe: Recipe) -> list[str]:
    sections = [section for section in (recipe.assistant, recipe.monitor) if section is not None]
    return [problem for section in sections for problem in section.list_problems(recipe.tasks)]
