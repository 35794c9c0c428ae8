"""What a YAML file may hold, where its defaults stand, and how it is read: recipes and the cards of data sets."""

from finetune.recipe.card import Card, HubSource, ItemsSection
from finetune.recipe.loading import dump_recipe, load_document, load_recipe, recipe_json_schema
from finetune.recipe.schema import (
    SCHEMA_VERSION,
    AdapterSection,
    EarlyStopSection,
    EvaluateSection,
    HubSection,
    ModelSection,
    Recipe,
    Section,
    SplitSection,
    TaskSection,
    TrainSection,
)
from finetune.recipe.shipped import ShippedRecipe, find_recipe, list_recipes, shipped_folder

__all__ = [
    "SCHEMA_VERSION",
    "AdapterSection",
    "Card",
    "EarlyStopSection",
    "EvaluateSection",
    "HubSection",
    "HubSource",
    "ItemsSection",
    "ModelSection",
    "Recipe",
    "Section",
    "ShippedRecipe",
    "SplitSection",
    "TaskSection",
    "TrainSection",
    "dump_recipe",
    "find_recipe",
    "list_recipes",
    "load_document",
    "load_recipe",
    "recipe_json_schema",
    "shipped_folder",
]
