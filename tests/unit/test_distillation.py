"""Learning from a teacher: the loss by hand, and which teachers and recipes are refused."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

import finetune
from finetune.data.batches import Examples, collate, list_inputs
from finetune.errors import RecipeError, UsageError
from finetune.recipe import load_recipe
from finetune.recipe.schema import DistillSection
from finetune.tasks import TextClassification
from finetune.tasks.distillation import compute_distilled_losses

TEACHER = np.array([[2.0, 0.0, -1.0], [0.5, 0.5, 3.0]], dtype=np.float32)
PUPIL = np.array([[1.0, 1.0, 0.0], [0.0, -2.0, 1.0]], dtype=np.float32)


class Fixed(torch.nn.Module):
    """Says the same whatever it reads."""

    def forward(self, **_: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.from_numpy(PUPIL))


@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 1.0), (4.0, 0.25), (2.0, 0.0)])
def test_the_loss_is_the_divergence_of_softened_scores_and_the_task_s_own(temperature, weight):
    batch = {"labels": torch.tensor([0, 1]), "teacher_logits": torch.from_numpy(TEACHER)}
    section = DistillSection(teacher="runs/t", temperature=temperature, weight=weight)
    found = compute_distilled_losses(TextClassification(["a", "b", "c"], {}), section, Fixed(), batch, 0.0)
    wanted, given = (softmax(logits / temperature, axis=1) for logits in (TEACHER, PUPIL))
    hard = -np.log(softmax(PUPIL, axis=1)[[0, 1], [0, 1]])
    expected = weight * temperature**2 * rel_entr(wanted, given).sum(1) + (1 - weight) * hard
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


def test_rows_bring_what_their_teacher_says_and_no_model_reads_it(tmp_path):
    examples = Examples.build([[1, 2], [3], [4, 5, 6]], [0, 1, 2])
    taught = Examples(examples.input_ids, examples.starts, examples.labels, teacher_logits=np.eye(3, dtype=np.float32))
    taught.save(tmp_path / "rows.safetensors")
    batch = collate(Examples.load(tmp_path / "rows.safetensors"), np.array([2, 0]), None)
    assert batch["teacher_logits"].tolist() == [[0, 0, 1], [1, 0, 0]]
    assert batch["teacher_logits"].dtype == torch.float32
    assert set(list_inputs(batch)) == {"input_ids", "position_ids"}


def test_a_recipe_may_name_a_teacher(finished_run, write_recipe, tmp_path):
    train = {"epochs": 1, "distill": {"teacher": str(finished_run.parent), "weight": 1.0}}
    run = finetune.run(write_recipe(tmp_path / "in", train=train), runs=tmp_path / "runs", quiet=True)
    assert load_recipe(run.folder.recipe).train.distill.teacher == str(finished_run / "model")
    taught = Examples.load(run.folder.examples("train"))
    teacher = finetune.load(finished_run)
    said = teacher.task.compute_outputs(teacher.model, taught, None)  # both read with the base's tokenizer
    np.testing.assert_allclose(taught.teacher_logits, said, atol=1e-5)


def test_a_teacher_for_other_classes(finished_run, write_recipe, tmp_path):
    path = write_recipe(tmp_path / "in", train={"distill": {"teacher": str(finished_run)}})
    path.write_text(path.read_text().replace("- negative\n    - neutral", "- neutral\n    - negative"))
    words = r"train\.distill\.teacher: must have the classes neutral, negative, positive, in this order, got negative"
    with pytest.raises(UsageError, match=words):
        finetune.run(path, runs=tmp_path / "runs", quiet=True)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": {"few_shot": "contrastive"}}, "train.distill: must be left out when train.few_shot is contrastive"),
        ({"tasks": {"tone": {"type": "causal_lm", "labels": None}}}, "must be left out unless the recipe has one task"),
    ],
)
def test_recipes_that_have_no_place_for_a_teacher(write_recipe, tmp_path, changes, words):
    changes = {"train": {}} | changes
    changes["train"] |= {"distill": {"teacher": "runs/tiny"}}
    with pytest.raises(RecipeError, match=words):
        load_recipe(write_recipe(tmp_path, **changes))
