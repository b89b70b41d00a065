"""The program sd-unlearn: parses the command line, runs a command, and turns errors into exit codes."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import cyclopts

from sd_unlearn.commands import COMMANDS, app
from sd_unlearn.config.help import ShortHelp
from sd_unlearn.config.paths import expanded
from sd_unlearn.config.unknown_options import explain_unknown
from sd_unlearn.errors import UnlearnError, UsageError, reason
from sd_unlearn.io.noise import SHOW, silence_warnings
from sd_unlearn.io.reading import read_options
from sd_unlearn.io.run_folder import TRAINING
from sd_unlearn.io.schema import with_no
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
    ShortHelp.show_all = "--help_all" in tokens
    tokens = ["--help" if token == "--help_all" else token for token in tokens if token != "--debug"]
    _replace_unprintable()
    options: dict[str, Any] = {}
    try:
        _check_unicode(tokens)
        options, source = _config_file(tokens)
        app.config = _as_config(options, source)
        debug = debug or options.get("debug") is True
        if debug:
            os.environ[SHOW] = "1"
        silence_warnings()
        share_cores()
        app(tokens, exit_on_error=False, print_error=False)
        if sys.stdout:  # None if it is closed
            sys.stdout.flush()
    except cyclopts.CycloptsError as error:
        return _fail(UsageError(_usage_message(error)), debug)
    except UnlearnError as error:
        return _fail(_out_of_memory(error) or error, debug)
    except KeyboardInterrupt as interrupt:
        print(f"\nInterrupted. {_how_to_resume(tokens, options, str(interrupt))}", file=sys.stderr)
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


def _config_file(tokens: Sequence[str]) -> tuple[dict[str, Any], str]:
    """The options in the command's --config file, and its name. Flags take precedence over them.

    Raises:
        UsageError: the file cannot be read, or has an unknown key.
    """
    known: dict[str, Any] = paper.COMMANDS if tokens[:1] == ["paper"] else COMMANDS
    command = next((t for t in tokens if t in known), None)
    path = next((t.partition("=")[2] for t in tokens if t.startswith("--config=")), None)
    if "--config" in tokens[:-1]:
        path = tokens[tokens.index("--config") + 1]
    if command is None or path is None:
        return {}, ""
    kind = known[command]
    return with_no(kind, read_options(Path(expanded(path)), [f.name for f in fields(kind)])), path


def _as_config(options: dict[str, Any], source: str) -> tuple[cyclopts.config.Dict, ...]:
    """The options of a --config file for `App.config`."""
    return (cyclopts.config.Dict(options, use_commands_as_keys=False, source=source),) if options else ()


def _usage_message(error: cyclopts.CycloptsError) -> str:
    """One line; a value out of range reads as when `check_ranges` refuses it."""
    if isinstance(error, cyclopts.ValidationError) and error.argument is not None:
        return f"{error.argument.name} {error.exception_message}"
    if isinstance(error, cyclopts.UnusedCliTokensError):
        return _unexpected(error.unused_tokens or [], " ".join(error.command_chain or ()))
    if isinstance(error, cyclopts.UnknownOptionError) and error.token.source == "cli":
        known = [name for argument in error.argument_collection for name in argument.names]
        option, command = error.token.keyword or error.token.value, " ".join(error.command_chain or ())
        name = option.partition("=")[0].removeprefix("--")
        owners = [other for other, kind in COMMANDS.items() if other != command and _has_option(kind, name)]
        return explain_unknown(option, known, command, owners)
    return " ".join(str(error).split())


def _has_option(config: Any, name: str) -> bool:
    return any(field.name == name for field in fields(config))


def _unexpected(tokens: Sequence[str], command: str) -> str:
    """The message for arguments that the command does not take; of a run folder, which option takes it."""
    message = f"unexpected argument: {' '.join(tokens)}"
    if command in COMMANDS and _has_option(COMMANDS[command], "run") and (Path(tokens[0]) / TRAINING).is_file():
        message += f". Did you mean --run {shlex.quote(tokens[0])}?"
    return message


def _how_to_resume(tokens: Sequence[str], options: Mapping[str, Any], saved: str) -> str:
    """What to do after Ctrl-C.

    Args:
        options: Those of the --config file.
        saved: What is left of a training or sweep that had begun; "" for anything else.
    """
    given = {t.partition("=")[0][2:] for t in tokens if t.startswith("--")} | {k for k, v in options.items() if v}
    overwrite, again = "overwrite" in given, "Run the same command again"
    if tokens[:1] == ["train"] and "beta_sweep" not in given and "resume_from_checkpoint" not in given:
        instead = "Replace --overwrite with" if overwrite else "Add"
        again = f"{instead} --resume_from_checkpoint latest"
    elif overwrite:
        again += " without --overwrite"
    return f"{saved} {again} to continue." if saved else "Run the same command again to continue."


def _fail(error: UnlearnError, debug: bool) -> int:
    """Print the error in one line on stderr; returns its exit code."""
    if debug and not isinstance(error, UsageError):
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
