"""`finetune generate`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune.cli.output import AsJson, RunArgument, print_json, print_written, suggest_output

if TYPE_CHECKING:
    from finetune.recipe.schema import GenerateSection


def generate_command(
    run: RunArgument,
    prompts: Annotated[
        list[str] | None, typer.Option("--prompt", help="A text to go on with, or to answer; repeatable.")
    ] = None,
    source: Annotated[
        Path | None, typer.Option("--input", help="A CSV, TSV, JSONL, Parquet or text file with a text column.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Where the rows of --input go, with a column `generated`.")
    ] = None,
    column: Annotated[
        str | None, typer.Option("--column", help="The text column of --input; default the run's own, else `text`.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", help="Tokens to write at most.")] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="Sample from logits / this; 0 takes the likeliest token.")
    ] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="Sample among so many likeliest tokens.")] = None,
    beams: Annotated[int | None, typer.Option("--beams", help="Search with so many beams.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seeds the sampling.")] = 0,
    values: Annotated[
        list[str] | None,
        typer.Option("--with", help="COLUMN=TEXT beside --prompt, where the recipe's prompt names more; repeatable."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Let a finished run write: go on with a prompt, or answer it. The recipe says how; options change that."""
    from finetune.errors import UsageError

    if bool(prompts) == bool(source):
        got, fix = ("both", "Leave one out.") if prompts else ("neither", 'Add --prompt "some text".')
        raise UsageError(f"generate: must get either --prompt TEXT or --input FILE, got {got}. {fix}")
    if source and not output:
        add = f"Add --output {suggest_output('generated', source)}"
        raise UsageError(f"generate: --input must come with --output, got none. {add}")
    if output and not source:
        raise UsageError("generate: --output must come with --input, got none. Add --input FILE, or leave it out.")
    if values and source:
        raise UsageError("generate: --with must come with --prompt, got --input, whose columns are read. Leave it out.")
    columns = dict(_read_value(value) for value in values or [])
    from finetune.artifact.load import load_writer
    from finetune.artifact.score_file import generate_file, list_text_columns

    predictor = load_writer(run)
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "beams": beams}
    given = {name: value for name, value in options.items() if value is not None}
    section = _build_section(predictor.writing, given)
    if not (source and output):
        generate = partial(predictor.generate, section=section, columns=[columns], seed=seed)
        stream = partial(predictor.stream, emit=_show, section=section, columns=columns, seed=seed)
        _answer_prompts(predictor.task.type, prompts or [], generate, stream, as_json)
        return
    generate = partial(predictor.generate, section=section, seed=seed)
    rows = generate_file(
        generate, source, output, columns=[column] if column else list_text_columns(run), quiet=as_json
    )
    if as_json:
        print_json({"output": str(output), "rows": rows})
    else:
        print_written(output, rows)


def _read_value(value: str) -> tuple[str, str]:
    from finetune.errors import UsageError

    column, equals, text = value.partition("=")
    if not (column and equals):
        raise UsageError(f"generate: --with must be COLUMN=TEXT, got {value!r}.")
    return column, text


def _answer_prompts(
    kind: str,
    prompts: list[str],
    generate: Callable[[list[str]], list[str]],
    stream: Callable[[str], None],
    as_json: bool,
) -> None:
    """One after another: a sampled text depends on what shares its batch."""
    from finetune.errors import UsageError

    goes_on = kind == "causal_lm"
    if not goes_on and not all(prompts):
        raise UsageError("generate: --prompt must hold a text to answer, got an empty one.")
    if as_json:
        written = [generate([prompt])[0] for prompt in prompts]
        print_json([{"prompt": prompt, "generated": text} for prompt, text in zip(prompts, written, strict=True)])
        return
    for number, prompt in enumerate(prompts):
        if goes_on:
            _show("\n" * (number > 0) + prompt)
        try:
            stream(prompt)
        finally:
            _show("\n")


def _build_section(default: GenerateSection, given: dict[str, Any]) -> GenerateSection:
    """The recipe's way to write, with what is given on the command line."""
    from finetune.errors import UsageError
    from finetune.recipe.messages import explain
    from finetune.recipe.schema import GenerateSection

    # Beams and sampling are two ways to choose tokens: who asks for one does not mean the recipe's other one too.
    if "beams" in given:
        given = {"temperature": None} | given
    if "temperature" in given:
        given = {"beams": 1} | given | {"temperature": given["temperature"] or None}
    try:
        section = GenerateSection(**default.model_dump() | given)
    except ValueError as error:  # Pydantic's own
        problems = explain(error.errors(), GenerateSection)  # type: ignore[attr-defined]
        named = [f"--{str(path[0]).replace('_', '-')} {sentence}" for path, sentence in problems]
        raise UsageError("generate: " + " ".join(named)) from error
    if given.get("top_k") and section.temperature is None:
        raise UsageError("generate: --top-k must come with --temperature, got none. Add --temperature 1.")
    return section


def _show(text: str) -> None:
    """Print a piece of text at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
