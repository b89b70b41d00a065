"""The program sd-unlearn: parses the command line, runs a command, and turns errors into exit codes."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import cyclopts

from sd_unlearn.commands import COMMANDS, app
from sd_unlearn.config.help import ShortHelp
from sd_unlearn.config.paths import expanded
from sd_unlearn.errors import UnlearnError, UsageError, reason
from sd_unlearn.io.noise import SHOW, silence_warnings
from sd_unlearn.io.reading import read_options
from sd_unlearn.launch import share_cores
from sd_unlearn.paper import commands as paper

BROKEN_PIPE = 141  # exit code, as that of a program that SIGPIPE ends


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    0 success, 1 failed, 2 wrong usage, 3 a --fail_if condition holds, 130 interrupted, 141 stdout was closed (as by
    `| head -1`).
    """
    tokens = [_underscored(t) for t in (sys.argv[1:] if arguments is None else arguments)]
    debug = "--debug" in tokens
    if debug:
        os.environ[SHOW] = "1"
    silence_warnings()
    share_cores()
    ShortHelp.show_all = "--help_all" in tokens
    tokens = ["--help" if token == "--help_all" else token for token in tokens]
    _replace_unprintable()
    try:
        _check_unicode(tokens)
        app.config = _config_file(tokens)
        app(tokens, exit_on_error=False, print_error=False)
        if sys.stdout:  # None if it is closed
            sys.stdout.flush()
    except cyclopts.CycloptsError as error:
        return _fail(UsageError(_usage_message(error)), debug)
    except UnlearnError as error:
        return _fail(_out_of_memory(error) or error, debug)
    except KeyboardInterrupt as interrupt:
        print(f"\nInterrupted. {_how_to_resume(tokens, str(interrupt))}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of stdout, e.g. head, has enough
        _discard_stdout()
        return BROKEN_PIPE
    except OSError as error:
        _discard_stdout()
        place = f" ({error.filename})" if error.filename else ""
        hint = "Free some space, or check the disk and its permissions."
        return _fail(UnlearnError(f"Cannot read or write{place}: {reason(error)}. {hint}"), debug)
    except Exception as error:
        hint = (
            "This is a bug in sd-unlearn. Run again with --debug, and report it with the output of sd-unlearn doctor."
        )
        bug = UnlearnError(f"{type(error).__name__}: {error}. {hint}")
        return _fail(_out_of_memory(error) or bug, debug)
    return 0


def _out_of_memory(error: Exception) -> UnlearnError | None:
    from sd_unlearn.models.memory_errors import shortage_behind

    return shortage_behind(error)


def _replace_unprintable() -> None:
    """Print "?" for what the terminal's encoding lacks, e.g. the dash of an interval in ASCII, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _discard_stdout() -> None:
    """Without this Python would try to write the rest of a broken stdout when it exits, and fail again."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _check_unicode(tokens: Sequence[str]) -> None:
    """Refuse arguments whose bytes are not UTF-8: they could not be written into the files of a run.

    Raises:
        UsageError: names the argument.
    """
    for token in tokens:
        if any("\ud800" <= character <= "\udfff" for character in token):
            raise UsageError(f"the argument {token!r} is not UTF-8 text. Rename the file or folder.")


def _underscored(token: str) -> str:
    """--train-batch-size -> --train_batch_size; values stay as they are."""
    if not token.startswith("--"):
        return token
    name, equals, value = token.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _config_file(tokens: Sequence[str]) -> tuple[Any, ...]:
    """The options in the command's --config file, for cyclopts. Flags take precedence over them.

    Raises:
        UsageError: the file cannot be read, or has an unknown key.
    """
    known: dict[str, Any] = paper.COMMANDS if tokens[:1] == ["paper"] else COMMANDS
    command = next((t for t in tokens if t in known), None)
    path = next((t.partition("=")[2] for t in tokens if t.startswith("--config=")), None)
    if "--config" in tokens[:-1]:
        path = tokens[tokens.index("--config") + 1]
    if command is None or path is None:
        return ()
    given = read_options(Path(expanded(path)), [f.name for f in fields(known[command])])
    return (cyclopts.config.Dict(given, use_commands_as_keys=False, source=path),)


def _usage_message(error: cyclopts.CycloptsError) -> str:
    """One line; a value out of range reads as when `check_ranges` refuses it."""
    if isinstance(error, cyclopts.ValidationError) and error.argument is not None:
        return f"{error.argument.name} {error.exception_message}"
    if isinstance(error, cyclopts.UnusedCliTokensError):
        return f"unexpected argument: {' '.join(error.unused_tokens or [])}"
    return " ".join(str(error).split())


def _how_to_resume(tokens: Sequence[str], saved: str) -> str:
    """What to do after Ctrl-C; `saved` says what a training has saved, if it was one."""
    if tokens[:1] == ["batch"] or not saved:
        return "Run the same command again to continue."
    resume = "Run the same command again" if tokens[:1] == ["paper"] else "Add --resume_from_checkpoint latest"
    return f"{saved} {resume} to continue."


def _fail(error: UnlearnError, debug: bool) -> int:
    """Print the error in one line on stderr; returns its exit code."""
    if debug and not isinstance(error.__context__, cyclopts.CycloptsError):
        import traceback

        traceback.print_exc()
    with contextlib.suppress(OSError):  # stderr may be full or closed, too
        print(f"Error: {' '.join(str(error).split())}", file=sys.stderr)
    return error.exit_code


def entry() -> None:
    """The console script `sd-unlearn`."""
    sys.exit(main())


if __name__ == "__main__":
    entry()
