"""`finetune chat`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.text import Text

from finetune.cli.output import AsJson, Engine, RunArgument, make_printable, print_note, show_outcomes

if TYPE_CHECKING:
    from finetune.applications.support.assistant import Assistant, Reply
    from finetune.applications.support.dialogue import Session
    from finetune.applications.support.turn_log import TurnLog

MAX_LINE_CHARACTERS = 1_000_000
COMMANDS = {
    "/why": "why the last reply, and what else was considered",
    "/sources": "what the last reply quotes",
    "/help": "this list",
    "/quit": "end the conversation",
}
STYLES = {"template": "green", "passage": "cyan", "question": "yellow", "handover": "magenta"}
TITLES = {"template": "answer", "passage": "from the knowledge", "question": "question", "handover": "hand-over"}


def chat_command(
    run: RunArgument,
    knowledge: Annotated[
        Path | None, typer.Option("--knowledge", help="Answer from this file of entries (id, title, text) instead.")
    ] = None,
    reply: Annotated[
        str | None, typer.Option("--reply", help="extract quotes an entry, generate writes an answer out of it.")
    ] = None,
    writer: Annotated[
        str | None, typer.Option("--writer", help="The run that writes, such as runs/support_writer.")
    ] = None,
    engine: Engine = None,
    replay: Annotated[
        Path | None, typer.Option("--replay", help="Answer the customer's turns of recorded dialogues, one a line.")
    ] = None,
    log: Annotated[
        Path | None, typer.Option("--log", help="Append every turn to this file, with personal data masked.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Talk to a trained customer-service assistant.

    With --json it reads {"text": ..., "session": ...} a line and writes one reply a line.
    """
    from contextlib import nullcontext

    from finetune.applications.support.build import build_assistant, is_built
    from finetune.applications.support.load import load_assistant
    from finetune.applications.support.turn_log import TurnLog

    if not is_built(run):  # a missed gate ends `finetune run` before it
        print_note("building the assistant: index, threshold on validation, the test questions end to end")
        build_assistant(run)
    with nullcontext() if log is None else TurnLog(log) as turns:
        assistant = load_assistant(run, knowledge, reply=reply, writer=writer, engine=engine)
        if replay is not None:
            _replay(assistant, replay, turns, as_json)
        elif as_json:
            _serve_lines(assistant, turns)
        else:
            _talk(assistant, turns)


def _replay(assistant: Assistant, path: Path, log: TurnLog | None, as_json: bool) -> None:
    from finetune.applications.support.dialogue import load_dialogues, replay
    from finetune.applications.support.evaluate import OUT_OF_SCOPE, judge_turn, summarize
    from finetune.recipe.schema import EvaluateSection

    console, judged = Console(), []
    for dialogue in load_dialogues(path, [*assistant.reader.intents, OUT_OF_SCOPE]):
        if not as_json:
            console.rule(Text(make_printable(dialogue.id)), align="left")
        for turn, reply in replay(dialogue, assistant.reply):
            if log:
                log.write(dialogue.id, turn.text, reply)
            if answered := judge_turn(dialogue, turn, reply):
                judged.append(answered)
            if as_json:
                expected = {"expected_intent": turn.intent, "judgement": answered.judgement if answered else None}
                _print_line({"session": dialogue.id, "message": turn.text} | expected | reply.to_json())
            else:
                console.print(Text.assemble(("you  ", "bold"), make_printable(turn.text)))
                _show_reply(console, reply)
    if judged and not as_json:
        section = EvaluateSection()
        shares = summarize(judged, confidence=section.confidence, resamples=section.resamples, seed=0)
        show_outcomes(shares, "labelled turns", "the recorded dialogues, each turn behind those before it")


def _serve_lines(assistant: Assistant, log: TurnLog | None) -> None:
    """One reply a line for each line; a line that is no message is answered with an error, and the next one is read."""
    from finetune.applications.support.dialogue import Session, Sessions

    sessions, own = Sessions(), Session().id
    for number, line in _read_lines():
        try:
            text, name = _read_message(line, own)
        except ValueError as error:
            _print_line({"error": f"line {number}: {error}"})
            continue
        reply = assistant.reply(text, sessions.find(name))
        if log:
            log.write(name, text, reply)
        _print_line({"session": name} | reply.to_json())


def _read_lines() -> Iterator[tuple[int, str]]:
    """The lines of standard input that hold anything; bytes that are no UTF-8 are replaced."""
    for number, line in enumerate(sys.stdin.buffer, start=1):
        if line.strip():
            yield number, line.decode("utf-8", "replace")


def _read_message(line: str, own: str) -> tuple[str, str]:
    """Text and session of one line.

    Raises:
        ValueError: the line is no message; in words.
    """
    from finetune.data.files import quote_reason

    if len(line) > MAX_LINE_CHARACTERS:
        raise ValueError(f"must have at most {MAX_LINE_CHARACTERS:,} characters, got {len(line):,}.")
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f'must be a JSON object such as {{"text": "..."}}, got {quote_reason(error)}.') from None
    if not isinstance(message, dict) or not isinstance(message.get("text"), str):
        raise ValueError('must be a JSON object with text, such as {"text": "..."}, got another value.')
    name = message.get("session")
    if name is not None and not isinstance(name, str):
        raise ValueError("session must be text, got another value.")
    # Half of a surrogate pair is allowed in JSON and in no file.
    text, name = (value.encode("utf-8", "replace").decode() for value in (message["text"], name or own))
    return text, name


def _print_line(content: dict[str, Any]) -> None:
    """One JSON value on a line, at once: the other program waits for it."""
    sys.stdout.write(json.dumps(content, ensure_ascii=True, allow_nan=False) + "\n")
    sys.stdout.flush()


def _talk(assistant: Assistant, log: TurnLog | None) -> None:
    from finetune.applications.support.dialogue import Session

    console, session = Console(), Session()
    _remember_input()
    console.print("Ask away. /help lists the commands, /quit ends.", style="dim")
    last: Reply | None = None
    while (text := _ask()) is not None:
        command = text.strip().lower()
        if command in ("/quit", "/exit"):
            break
        if command.startswith("/"):
            _obey(console, command, last)
            continue
        last = _answer(assistant, session, text)
        if log:
            log.write(session.id, text, last)
        _show_reply(console, last)


def _answer(assistant: Assistant, session: Session, text: str) -> Reply:
    return assistant.reply(text.encode("utf-8", "replace").decode(), session)


def _remember_input() -> None:
    """Arrow keys go through what was typed; where Python has no readline, only Enter works."""
    if sys.stdin.isatty():
        try:
            import readline
        except ImportError:
            return
        readline.set_auto_history(True)


def _ask() -> str | None:
    """A line of the customer's; None at the end of input."""
    try:
        # `input` itself, for only it brings readline's editing along.
        return input("you  " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def _obey(console: Console, command: str, last: Reply | None) -> None:
    if command not in COMMANDS:
        console.print(
            f"{escape(make_printable(command))} is no command. /help lists them.", style="yellow", highlight=False
        )
    elif command == "/help":
        for name, meaning in COMMANDS.items():
            console.print(f"  {name:10}{meaning}", highlight=False)
    elif last is None:
        console.print("Nothing was said so far.", style="dim")
    elif command == "/why":
        _show_reason(console, last)
    else:
        _show_sources(console, last)


def _show_reply(console: Console, reply: Reply) -> None:
    """The text as text: markup and control characters in an entry or a slot do nothing."""
    title = f"{TITLES[reply.kind]} · {reply.confidence:.0%}"
    footer = ", ".join(f"{source.id} {source.score:.0%}" for source in reply.sources) or None
    body = Text(make_printable(reply.text))
    for note in reply.notes:
        body.append(f"\n{note}", style="dim")
    console.print(
        Panel(
            body,
            title=title,
            title_align="left",
            subtitle=Text(make_printable(footer)) if footer else None,
            subtitle_align="right",
            border_style=STYLES[reply.kind],
        )
    )


def _show_reason(console: Console, reply: Reply) -> None:
    lines = [reply.reason]
    if reply.considered:
        lines.append(f"out of scope {reply.considered.outside:.0%}")
        lines += [f"intent {name} {score:.0%}" for name, score in reply.considered.intents]
        lines += [f"entry {name} {score:.0%}" for name, score in reply.considered.entries]
    for line in lines:
        console.print(Text(make_printable(line), style="dim"))


def _show_sources(console: Console, reply: Reply) -> None:
    if not reply.sources:
        console.print("The last reply quotes nothing.", style="dim")
    for source in reply.sources:
        console.print(Text(make_printable(f"{source.id}  {source.score:.0%}  {source.title}"), style="bold"))
        console.print(Text(make_printable(source.quote)))
