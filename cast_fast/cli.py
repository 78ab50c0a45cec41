"""The command line: a table of commands, each in the module that does its work.

A command module has ``HELP`` (one line), ``add_arguments(parser)`` and ``main(args) -> int`` (the exit code). Modules
are imported only when their command is called, so that ``cast-fast --help`` needs neither torch nor DALI.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from cast_fast import __version__
from cast_fast.errors import UserError

COMMANDS: dict[str, tuple[str, str]] = {
    "demo-data": ("cast_fast.data.synthetic", "write a dataset of made scenes with saliency maps and labels"),
    "validate": ("cast_fast.data.validate", "decode every image and map of a dataset and list the faults"),
    "prepare": ("cast_fast.data.prepare", "pack images and maps into WebDataset shards"),
    "saliency": ("cast_fast.data.saliency_maps", "make saliency maps of images"),
    "crops": ("cast_fast.evaluate.crops", "draw constrained beside unconstrained crops, and measure what pairs share"),
    "doctor": ("cast_fast.doctor", "say what is installed, what will run where, and why"),
    "pretrain": ("cast_fast.train", "pretrain an encoder (also under torchrun)"),
    "launch": ("cast_fast.launch", "write (and submit) a Slurm job that pretrains on one or many nodes"),
    "grounding": ("cast_fast.evaluate.grounding", "show and measure where encoders look when they match two crops"),
    "probe": ("cast_fast.evaluate.probe", "classify with frozen features (kNN, linear) or by finetuning"),
    "downstream": ("cast_fast.evaluate.downstream", "compare where two classifiers look when one is right"),
    "backgrounds": (
        "cast_fast.evaluate.backgrounds",
        "measure classifiers on changed backgrounds (Backgrounds Challenge)",
    ),
    "backgrounds-make": ("cast_fast.evaluate.backgrounds_make", "make such a set from labelled images with maps"),
    "export": ("cast_fast.export", "write the encoder for torchvision, timm, detectron2 or safetensors"),
}
"""Name of the command → (module, one line for ``--help``)."""

EXIT_USER_ERROR = 2


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line on stderr and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USER_ERROR, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


class HelpWithDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Names the default of every flag that has one to name."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, "") else super()._get_help_string(action)


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {line}" for name, (_, line) in COMMANDS.items()]
    ending = "cast-fast COMMAND --help lists its flags."
    return "\n".join(["usage: cast-fast COMMAND [flags]", "", "commands:", *lines, "", ending])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        Its exit code: 0 for success, 2 for a user's error, 75 for a run that was stopped and can be resumed, 130 for
        an interrupt that no command handled.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Other packages' loggers at their warnings: what they do for a command is no news to its user.
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    level = os.environ.get("CAST_FAST_LOG", "INFO").upper()
    if not isinstance(logging.getLevelName(level), int):
        print(f"cast-fast: error: CAST_FAST_LOG: got {level}, expected DEBUG, INFO, WARNING or ERROR", file=sys.stderr)
        return EXIT_USER_ERROR
    logging.getLogger("cast_fast").setLevel(level)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"cast_fast {__version__}")
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        print(f"cast-fast: error: unknown command {name!r}{hint} (commands: {', '.join(COMMANDS)})", file=sys.stderr)
        return EXIT_USER_ERROR
    module_name, line = COMMANDS[name]
    parser = OneLineParser(
        prog=f"cast-fast {name}",
        description=line,
        formatter_class=HelpWithDefaults,
        allow_abbrev=False,
    )
    try:
        command = importlib.import_module(module_name)
        command.add_arguments(parser)
        return command.main(parser.parse_args(arguments[1:]))
    except UserError as error:
        message = " ".join(str(error).split())
        print(f"cast-fast: error: {message}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return 130
