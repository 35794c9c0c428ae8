"""`finetune schema`."""

from __future__ import annotations

from finetune.cli.output import print_json


def schema_command() -> None:
    """Print the JSON schema of a recipe, for editors."""
    from finetune.recipe import recipe_json_schema

    print_json(recipe_json_schema())
