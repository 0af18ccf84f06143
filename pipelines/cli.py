"""The ``tunesmith`` command: a table of names; a command's module is imported when the command is called."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
from typing import NoReturn

import click

from infra.errors import TunesmithError, UsageError

# name -> (module:command, one line of help). The order is the order of `tunesmith --help`.
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("pipelines.commands:demo", "Everything once, on the interpreter's own documentation."),
    "up": ("infra.commands:up", "Start the local stack."),
    "down": ("infra.commands:down", "Stop the local stack."),
    "status": ("infra.commands:status", "What runs, and where."),
    "doctor": ("infra.commands:doctor", "Check this machine and say what to mend."),
    "validate": ("pipelines.commands:validate", "Check a pipeline file."),
    "run": ("pipelines.commands:run", "Run a pipeline: prepare, search, evaluate, register."),
    "schedule": ("pipelines.commands:schedule", "Make a run recur."),
    "study": ("pipelines.commands:study", "Look into a running search, and act on it."),
    "evaluate": ("pipelines.commands:evaluate", "Judge a version again."),
    "apply": ("pipelines.commands:apply", "Watch, price and retrain a model as its file says, without a run."),
    "retrain": ("pipelines.commands:retrain", "Start the retrain flow by hand."),
    "models": ("registry.commands:models", "List models."),
    "versions": ("registry.commands:versions", "List a model's versions."),
    "show": ("registry.commands:show", "Show one version."),
    "compare": ("registry.commands:compare", "Compare two versions."),
    "lineage": ("pipelines.lineage:lineage", "What a version was made of; which versions saw a row."),
    "reproduce": ("pipelines.reproduction:reproduce", "Train a version again, and say how close it came."),
    "verify": ("registry.commands:verify", "Check a version's files and the ledger's chain."),
    "import": ("registry.commands:import_", "Bring in a version made elsewhere."),
    "export": ("registry.commands:export", "Write a version to a folder."),
    "sign": ("registry.commands:sign", "Sign a version's files."),
    "approve": ("registry.commands:approve", "Agree that a version may serve."),
    "promote": ("registry.commands:promote", "Make a version serve."),
    "rollback": ("registry.commands:rollback", "Take the last promotion back."),
    "delete": ("registry.commands:delete", "Delete a version that never served."),
    "canary": ("registry.commands:canary", "Give a version a share of the traffic."),
    "rollout": ("registry.commands:rollout", "A canary in steps, by what it shows."),
    "shadow": ("registry.commands:shadow", "Send a version copies of the traffic."),
    "history": ("registry.commands:history", "Who changed what serves, when and why."),
    "monitor": ("monitoring.commands:monitor", "Latency, errors, tokens and cost."),
    "replay": ("monitoring.commands:replay", "Send a version what people asked the champion, and compare."),
    "drift": ("monitoring.commands:drift", "Has the traffic moved away from what the version knows?"),
    "rescore": ("pipelines.rescoring:rescore", "Ask what serves its golden set again."),
    "cost": ("monitoring.commands:cost", "What a model costs."),
    "alerts": ("monitoring.commands:alerts", "Open alerts."),
    "erase": ("monitoring.records:erase", "Erase one person's data."),
    "silence": ("monitoring.commands:silence", "Have nobody told of a model's alerts for a while."),
    "feedback": ("monitoring.records:feedback", "Send corrections in bulk."),
    "table": ("monitoring.records:table", "Write a table to a CSV or Parquet file."),
    "limit": ("deploy.commands:limit", "What a key or a model may use."),
    "limits": ("deploy.commands:limits", "All limits, and what is taken of them."),
    "upstream": ("deploy.commands:upstream", "Addresses of hosted models."),
    "keys": ("deploy.commands:keys", "Create, list and revoke API keys."),
    "serve": ("monitoring.processes:serve", "The gateway and the console, one process."),
    "engine": ("deploy.commands:engine", "One base and its adapters, one process."),
    "watch": ("monitoring.processes:watch", "The watcher, one process."),
    "worker": ("pipelines.commands:worker", "A search worker, one process."),
}


class Table(click.Group):
    """A click group over COMMANDS that imports a command's module only when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.command(cls=Table, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="tunesmith")
def tunesmith() -> None:
    """From a team's examples to a fine-tuned language model: searched for, judged, registered, served, watched."""


def main() -> NoReturn:
    """Run the command line; every exit code is the contract's (design: Contracts)."""
    os.environ.setdefault("PYTHONSAFEPATH", "1")  # children must not take a user's ./pipelines for ours
    signal.signal(signal.SIGTERM, _interrupt)
    as_json = "--json" in sys.argv
    try:
        _check_arguments()
        code = tunesmith.main(standalone_mode=False, prog_name="tunesmith")
        sys.exit(code if isinstance(code, int) else 0)  # click gives a command's Exit(6) back as 6
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _fail(as_json, "interrupted", "Interrupted.", "The same command goes on where it stopped.")
        sys.exit(130)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f"See `{context.command_path} --help`." if context else ""
        _fail(as_json, "usage", error.format_message(), hint)
        sys.exit(2)
    except TunesmithError as error:
        if as_json:
            _print_json(error.as_json())
        else:
            _fail(False, error.code, error.message, error.hint)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left, as with `| head`
        sys.exit(1)
    except Exception as error:
        if os.environ.get("TUNESMITH_DEBUG"):
            raise
        sys.exit(_unforeseen(as_json, error))


def _check_arguments() -> None:
    for argument in sys.argv[1:]:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise UsageError(f"The argument {argument!a} is not UTF-8.", hint="Give it in UTF-8.") from None


def _unforeseen(as_json: bool, error: Exception) -> int:
    """An error that no code of ours expected, in a sentence all the same; returns the exit code."""
    code, message, hint = "failed", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}", ""
    if isinstance(error, PermissionError | NotADirectoryError | IsADirectoryError) and error.filename:
        code, message, hint = "usage", f"{error.filename}: {error.strerror}.", "Let this user read and write there."
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        message, hint = f"{error.filename or 'the disk'}: {error.strerror}.", "Free some disk and try again."
    _fail(as_json, code, message, hint or "Nobody foresaw this; TUNESMITH_DEBUG=1 shows where it is.")
    return 2 if code == "usage" else 1


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def _fail(as_json: bool, code: str, message: str, hint: str) -> None:
    if as_json:
        _print_json({"error": {"code": code, "message": message, "hint": hint}})
    else:
        from infra.console import safe

        # Messages quote what people wrote, in files too, and a terminal obeys what it is shown
        text = f"error: {message}\n" + (f"       {hint}\n" if hint else "")
        sys.stderr.write("".join(safe(line) + "\n" for line in text.splitlines()))


def _print_json(value: dict[str, object]) -> None:
    from infra.console import print_json

    print_json(value)


if __name__ == "__main__":
    main()
