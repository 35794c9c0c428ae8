"""`finetune schema`."""

from __future__ import annotations

from finetune.cli.output import AsJson, print_json


def schema_command(as_json: AsJson = False) -> None:  # noqa: ARG001  (it speaks JSON either way)
    """Print the JSON schema of a recipe, for editors."""
    from finetune.recipe import recipe_json_schema

    print_json(recipe_json_schema())
