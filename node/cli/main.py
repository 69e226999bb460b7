"""The command line's frame: lazy commands, options that every command takes, exit codes and the form of errors.

A command raises; only `main` turns what was raised into an exit status. Exit codes: 0 ok, 1 failure, 2 usage, 3 config, 4 key or
auth, 5 network, 6 chain, 7 GPU or model, 8 funds, 9 doctor found problems, 130 interrupted.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from node.cli.commands import COMMANDS
from node.cli.output import Output
from node.errors import NodeError
from protocol.errors import GristmillError

if TYPE_CHECKING:
    from node.config import Config
    from node.keystore import Keystore

INTERRUPTED = 130
DEBUG = "GRISTMILL_DEBUG"
"""Set to anything: as `--debug`."""


@dataclass
class Shared:
    """What every command has as `ctx.obj`."""

    output: Output = field(default_factory=Output)
    flags: dict[str, object] = field(default_factory=dict)
    """Settings given on the command line, by dotted name. An option of a command that is a setting puts its value here."""
    config_file: Path | None = None
    """From `--config`: read instead of `gristmill.toml`."""
    password_fd: int | None = None
    """From `--password-fd`."""
    password: bytes | None = field(default=None, repr=False)
    """What was read from the descriptor or file: a descriptor can be read only once."""
    debug: bool = bool(os.environ.get(DEBUG))
    _config: Config | None = field(default=None, repr=False)

    @property
    def config(self) -> Config:
        """The configuration, made at first use and never again. Raises ConfigError."""
        if self._config is None:
            from node.config import load

            self._config = load(self.flags, project=self.config_file)
        return self._config

    @property
    def keystore(self) -> Keystore:
        from node.keystore import Keystore

        return Keystore(self.config.keys_dir, scrypt_n=self.config.keys.scrypt_n)


def _set_json(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        context.ensure_object(Shared).output.json = True


def _set_debug(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        context.ensure_object(Shared).debug = True


def _set_data_dir(context: click.Context, _parameter: click.Parameter, value: Path | None) -> None:
    if value is not None:
        context.ensure_object(Shared).flags["data_dir"] = value


def _set_file(context: click.Context, _parameter: click.Parameter, value: Path | None) -> None:
    if value is not None:
        context.ensure_object(Shared).config_file = value


def _set_settings(context: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> None:
    for pair in value:
        key, equals, text = pair.partition("=")
        if not equals:
            raise click.BadParameter(f"{pair!r} is not KEY=VALUE", context, parameter)
        context.ensure_object(Shared).flags[key.strip()] = text


def _common() -> list[click.Parameter]:
    """The options that stand before or after any command."""
    folder = click.Path(file_okay=False, path_type=Path)
    file = click.Path(dir_okay=False, path_type=Path)

    def option(*names: str, callback: Any, **given: Any) -> click.Option:
        return click.Option(names, expose_value=False, callback=callback, **given)

    return [
        option("--json", is_flag=True, callback=_set_json, help="Machine-readable output."),
        option("--data-dir", type=folder, callback=_set_data_dir, help="Keep everything in this folder."),
        option("--config", type=file, callback=_set_file, help="Read this file instead of ./gristmill.toml."),
        option("--set", multiple=True, metavar="KEY=VALUE", callback=_set_settings, help="Any setting; repeatable."),
        option("--debug", is_flag=True, callback=_set_debug, help="Show tracebacks."),
    ]


class Command(click.Command):
    """A command of ours: takes the common options, wherever they stand."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += _common()


class Group(click.Group):
    """A group of commands such as `models`."""

    command_class = Command

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += _common()


class LazyGroup(Group):
    """The root. Lists commands from the table, imports the one that runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module("node.cli." + cmd_name.replace("-", "_"))
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] == "help":  # `help x` is `x --help`; `help` alone is `--help`
            if len(args) == 1:
                click.echo(self.get_help(ctx))
                ctx.exit()
            args = [*args[1:], "--help"]
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    no_args_is_help=True,
)
@click.pass_context
def cli(ctx: click.Context) -> None:
    """An open market for AI inference: workers run models, clients pay per token, contracts settle."""
    ctx.ensure_object(Shared)


def leaves(error: BaseException) -> Iterable[BaseException]:
    """The errors inside an exception group: a nursery wraps what its tasks raise."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error


def blame(error: BaseException) -> BaseException:
    """The one error to report of a group: the first that a person can act on, else the first."""
    inside = list(leaves(error))
    for kind in (KeyboardInterrupt, click.ClickException, NodeError, GristmillError):
        for one in inside:
            if isinstance(one, kind):
                return one
    return inside[0]


def report(error: BaseException, shared: Shared) -> int:
    """Say what went wrong in the form of the house, and return the exit status. The one place where errors get theirs."""
    output = shared.output
    error = blame(error)
    if shared.debug and not isinstance(error, click.ClickException | click.exceptions.Exit | SystemExit):
        traceback.print_exception(error)
    match error:
        case click.exceptions.Exit():
            return error.exit_code
        case SystemExit():
            return error.code if isinstance(error.code, int) else int(error.code is not None)
        case click.Abort() | KeyboardInterrupt():
            output.error("interrupted", "interrupted")
            return INTERRUPTED
        case click.exceptions.NoArgsIsHelpError() if not output.json:
            output.say(error.format_message())
            return 2
        case click.UsageError():
            command = error.ctx.command_path if error.ctx else "gristmill"
            short = isinstance(error, click.exceptions.NoArgsIsHelpError)
            output.error("usage", "a command is missing" if short else error.format_message(), f"{command} --help")
            return 2
        case click.ClickException():
            output.error("failure", error.format_message())
            return error.exit_code
        case NodeError():
            output.error(error.code, error.message, error.hint, error.details())
            return error.exit_status
        case GristmillError():
            output.error("protocol", str(error))
            return 1
        case BrokenPipeError():
            # The reader of our stdout left (`| head`): nothing to say, and nobody to say it to.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        case OSError() if error.strerror:
            output.error("system", f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
            return 1
        case ModuleNotFoundError() if error.name and not error.name.startswith(("node.", "protocol.")):
            package = error.name.partition(".")[0]
            output.error("missing", f"the package {package} is not installed", "pip install 'gristmill[worker,devnet]'")
            return 1
        case _:
            output.error("internal", f"{type(error).__name__}: {error}", "--debug shows where; please report it")
            return 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status. `arguments` without the program's name; by default the process's."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    program = Path(sys.argv[0]).name
    ours = given[: given.index("--")] if "--" in given else given
    shared = Shared(Output(json="--json" in ours))  # now, because a usage error may come before the option is parsed
    shared.debug = shared.debug or "--debug" in ours
    try:
        from node.ownership import check_owners

        check_owners()
        result = cli.main(
            given,
            prog_name=program if program in {"gristmill", "node"} else "gristmill",
            standalone_mode=False,
            obj=shared,
        )
        return result if isinstance(result, int) else 0
    except BaseException as error:  # the boundary: everything becomes an exit status and a message
        return report(error, shared)
