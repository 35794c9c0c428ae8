"""The command: its verbs, and how errors become words and exit codes."""

from __future__ import annotations

import signal
import sys
import traceback
from types import FrameType

import typer

from finetune import __version__
from finetune.cli import (
    adapters,
    chat,
    compare,
    compress,
    data,
    doctor,
    evaluate,
    export,
    generate,
    monitor,
    predict,
    push,
    recipes,
    recommend,
    run,
    schema,
    sweep,
)
from finetune.cli.output import fail, print_text
from finetune.errors import FinetuneError, Interrupted

BUG = 70
CTRL_C = 130  # what Typer makes of a KeyboardInterrupt

app = typer.Typer(
    name="finetune",
    help="From a labelled file to a small model you can trust.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("run")(run.run_command)
app.command("check")(run.check_command)
app.command("resume")(run.resume_command)
app.command("evaluate")(evaluate.evaluate_command)
app.command("compare")(compare.compare_command)
app.command("predict")(predict.predict_command)
app.command("push")(push.push_command)
app.command("export")(export.export_command)
app.command("compress")(compress.compress_command)
app.command("generate")(generate.generate_command)
app.command("chat")(chat.chat_command)
app.command("monitor")(monitor.monitor_command)
app.command("recommend")(recommend.recommend_command)
app.command("sweep")(sweep.sweep_command)
app.add_typer(recipes.app, name="recipes")
app.add_typer(data.app, name="data")
app.add_typer(adapters.app, name="adapters")
app.command("schema")(schema.schema_command)
app.command("doctor")(doctor.doctor_command)


def _show_version(asked: bool) -> None:
    if asked:
        print_text(f"finetune {__version__}")
        raise typer.Exit


@app.callback()
def root(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
    version: bool = typer.Option(False, "--version", help="Print the version.", callback=_show_version, is_eager=True),
) -> None:
    """Take options that every verb shares; `--debug` is read in `main`."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 only if all went well."""
    given = sys.argv[1:] if arguments is None else arguments
    debug, as_json = "--debug" in given, "--json" in given
    # Accepted anywhere on the line, as people type it.
    given = [*(["--debug"] if debug else []), *(word for word in given if word != "--debug")]
    received: list[str] = []

    def interrupt(number: int, _frame: FrameType | None) -> None:
        """SIGTERM outside the loop, which has a handler of its own: stop like Ctrl-C, by its own name."""
        received.append(signal.Signals(number).name)
        raise KeyboardInterrupt(received[0])

    signal.signal(signal.SIGTERM, interrupt)
    try:
        code = app(given, prog_name="finetune", standalone_mode=False)
    except FinetuneError as error:
        _trace(debug)
        fail(str(error), error.exit_code, as_json, getattr(error, "findings", ()))
    except typer.TyperException as error:
        words = error.format_message()
        if not words:  # Typer has printed the help instead
            sys.exit(error.exit_code)
        stop = "" if words.endswith((".", "?")) else "."
        verb = getattr(getattr(error, "ctx", None), "command_path", "finetune")
        fail(f"{words}{stop} See {verb} --help.", error.exit_code, as_json)
    except Exception as error:
        _trace(debug)
        fail(f"a bug: {type(error).__name__}: {error}. Run again with --debug and report what it prints.", BUG, as_json)
    if code == CTRL_C:
        fail(f"stopped by {received[0] if received else 'Ctrl-C'}.", Interrupted.exit_code, as_json)
    sys.exit(code if isinstance(code, int) else 0)


def _trace(debug: bool) -> None:
    if debug:
        traceback.print_exc()


if __name__ == "__main__":
    main()
