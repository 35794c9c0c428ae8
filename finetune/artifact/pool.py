"""Several adapters on one loaded base: chosen for each request, and mixed in one batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from finetune.adapters.frozen import UnroutableError, list_frozen_layers
from finetune.adapters.routing import can_route, load_several, route_rows
from finetune.artifact.load import build_predictor, choose_device
from finetune.artifact.predictor import Prediction, Predictor, check_texts
from finetune.artifact.saved import open_saved, resolve_shared_base
from finetune.data.batches import Batch, Examples, Indices, list_inputs
from finetune.errors import UsageError
from finetune.models.classifier import get_padding, load_saved_classifier_shape
from finetune.models.prediction import compute_by_row, compute_logits, scatter_rows
from finetune.tasks import TextClassification


class AdapterPool:
    """Classifiers that share the weights of their base; each has its own adapter, head, labels, cleaning, temperature.

    Rows of different adapters are computed in one batch, with LoRA, DoRA, bottlenecks, BitFit and heads alone: the base
    once for all, and to each token the update of its own adapter. Other methods, and models that give their layers
    something else than the batch's tokens, run once for each adapter of a request. The answers are those of each model
    loaded alone.

    A pool may be used from several threads; they take turns.
    """

    def __init__(self, model: nn.Module, members: Mapping[str, Predictor]) -> None:
        """Take what `load_adapters` made.

        Args:
            model: with the adapters "member-0", "member-1", ... in the order of the members.
            members: name -> its predictor, whose model is the pool's.
        """
        self._model: Any = model
        self._members = dict(members)
        # Names of modules may hold no dots; names of members may.
        self._adapters = {name: f"member-{i}" for i, name in enumerate(members)}
        self._mixes = can_route(model)
        self._layers = list_frozen_layers(model)
        self._lock = Lock()

    @property
    def names(self) -> list[str]:
        """The adapters, as they were given."""
        return list(self._members)

    @property
    def mixes(self) -> bool:
        """Whether rows of different adapters are computed together."""
        return self._mixes

    def get_labels(self, name: str) -> list[str]:
        """The classes of one adapter."""
        self._check_names([name])
        return self._members[name].labels

    def predict(self, texts: Iterable[str], adapters: str | Sequence[str]) -> list[Prediction]:
        """Score texts, in order.

        Args:
            texts: any number, as they come, none empty; each gets the cleaning of its adapter's recipe.
            adapters: a name for all texts, or one name for each.

        Raises:
            UsageError: an unknown name, another number of names than of texts, or an empty text.
        """
        texts = check_texts(texts)
        names = self._name_rows(texts, adapters)
        answers: dict[int, Prediction] = {}
        for member, rows, logits in self._answer(texts, names):
            answers.update(zip(rows, member.build_predictions(logits), strict=True))
        return [answers[i] for i in range(len(texts))]

    def compute_scores(self, texts: Iterable[str], adapters: str | Sequence[str]) -> list[npt.NDArray[np.float64]]:
        """Calibrated probabilities of each text, (K,) with the K of its adapter; arguments as in `predict`."""
        texts = check_texts(texts)
        scores: dict[int, npt.NDArray[np.float64]] = {}
        for member, rows, logits in self._answer(texts, self._name_rows(texts, adapters)):
            scores.update(zip(rows, member.calibrate(logits), strict=True))
        return [scores[i] for i in range(len(texts))]

    def _answer(
        self, texts: Sequence[str], names: Sequence[str]
    ) -> Iterator[tuple[Predictor, list[int], npt.NDArray[np.float32]]]:
        """Each adapter with the numbers of its texts and their logits, (N, K)."""
        places = {name: [i for i, given in enumerate(names) if given == name] for name in dict.fromkeys(names)}
        examples = {name: self._members[name].encode([texts[i] for i in rows]) for name, rows in places.items()}
        with self._lock:
            logits = self._compute_logits(examples)
        for name, rows in places.items():
            yield self._members[name], rows, logits[name]

    def _compute_logits(self, examples: Mapping[str, Examples]) -> dict[str, npt.NDArray[np.float32]]:
        """Logits (N, K) of each adapter's rows."""
        if self._mixes and len(examples) > 1:
            try:
                return self._compute_mixed(examples)
            except UnroutableError:
                self._mixes = False
        return {name: self._compute_alone(name, part) for name, part in examples.items()}

    def _compute_alone(self, name: str, examples: Examples) -> npt.NDArray[np.float32]:
        self._model.set_adapter(self._adapters[name], inference_mode=True)
        return compute_logits(self._model, examples, get_padding(self._model, self._members[name].tokenizer))

    def _compute_mixed(self, examples: Mapping[str, Examples]) -> dict[str, npt.NDArray[np.float32]]:
        owners = np.repeat(list(examples), [len(part) for part in examples.values()])
        width = max(len(self._members[name].labels) for name in examples)

        def compute(batch: Batch, rows: Indices) -> torch.Tensor:
            with route_rows(self._layers, [self._adapters[name] for name in owners[rows]], batch):
                logits: torch.Tensor = self._model(**list_inputs(batch)).logits
            return nn.functional.pad(logits, (0, width - logits.shape[-1]), value=-torch.inf)

        together = Examples.concatenate(list(examples.values()))
        padding = get_padding(self._model, self._members[next(iter(examples))].tokenizer)
        logits = scatter_rows(compute_by_row(self._model, together, padding, compute), len(together), width)
        return {name: logits[owners == name, : len(self._members[name].labels)] for name in examples}

    def _name_rows(self, texts: Sequence[str], adapters: str | Sequence[str]) -> list[str]:
        names = [adapters] * len(texts) if isinstance(adapters, str) else list(adapters)
        self._check_names([adapters] if isinstance(adapters, str) else names)
        if len(names) != len(texts):
            raise UsageError(
                f"predict: adapters must be one name, or one for each of the {len(texts)} texts, got {len(names)} "
                "names."
            )
        return names

    def _check_names(self, names: Sequence[str]) -> None:
        if unknown := [name for name in names if name not in self._members]:
            raise UsageError(f"adapters: must be among {', '.join(self._members)}, got {unknown[0]!r}.")


def load_adapters(runs: Mapping[str, str | Path]) -> AdapterPool:
    """Load several runs that were trained on one base, which is kept in memory once.

    Args:
        runs: name of your choice -> run (`runs/name`, its latest finished one) or `model/` folder. Their adapters share
            one method; ranks, targets and classes may differ.

    Raises:
        UsageError: no run, no such run; one that gives no labels or was tuned whole; another base, architecture or
            method.
        ModelError: a damaged folder, or the base is not at hand.
    """
    if not runs:
        raise UsageError("load_adapters: must get at least one run, got none. Give {name: run}.")
    saved = {name: open_saved(reference) for name, reference in runs.items()}
    tasks = [one.task for one in saved.values() if isinstance(one.task, TextClassification)]
    for name, one in saved.items():
        if one.task not in tasks:
            raise UsageError(f"{name}: must be a run that gives labels, got {one.task.type}. Load it alone.")
    base = resolve_shared_base(saved)
    first, task = next(iter(saved.values())), tasks[0]
    folders = {f"member-{i}": one.folder for i, one in enumerate(saved.values())}
    heads = {}
    for member, folder in folders.items():
        shape = load_saved_classifier_shape(folder)
        parts = task.list_modules(shape)[1]
        heads[member] = {part: shape.get_submodule(part).to_empty(device="cpu") for part in parts}
    model = load_several(task.load_model(first.folder, base), folders, heads)
    model = model.eval().to(choose_device())
    return AdapterPool(model, {name: build_predictor(one, model) for name, one in saved.items()})
