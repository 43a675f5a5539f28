"""Parses the command line of `merge-jax` and calls one of its commands."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

__all__ = ["main"]

_DESCRIPTION = """\
Moves what one network has learned into another, through their parameters.

  merge-jax run cross_structure smoke     an experiment, with all its options
  merge-jax compare runs/a runs/b         tables and curves of run folders
  merge-jax summary runs/a                contents of checkpoints or weights
  merge-jax convert IN OUT                weights to a safetensors file
  merge-jax export CHECKPOINT FILE        a trained model to a weight file
  merge-jax doctor                        checks this machine
"""
_EXIT_CODES = """\
exit codes: 0 success; 1 the doctor found a problem, or training failed;
2 invalid input
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line, by default this process's arguments; exits with an exit code.

    Invalid arguments print one line on standard error and exit with code 2.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["run"]:  # The experiment defines its options, including --help.
        from merge_jax.commands.run import run

        return _reporting(lambda: run(words[1:]))
    options = _parser().parse_args(words)
    return _reporting(lambda: _command(options))


def _parser() -> argparse.ArgumentParser:
    def command(name: str, text: str, epilog: str = "") -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, epilog=epilog)

    parser = argparse.ArgumentParser(
        prog="merge-jax",
        description=_DESCRIPTION,
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    command("run", "run an experiment: merge-jax run EXPERIMENT [PRESET] [OPTIONS]; without arguments, list them")

    compare = command("compare", "compare run folders: tables and overlaid curves; of a single one, show its table")
    compare.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder, or the folder of a study")
    compare.add_argument(
        "--baseline",
        metavar="METHOD",
        help="method of the first RUN as the baseline (default: vanilla, or its first method)",
    )
    compare.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="a new folder for the table and the plot (default: runs/compare-NNN; none for a single RUN)",
    )

    summary = command(
        "summary",
        "show the contents of checkpoints or a weight file: steps, scores, leaves, bytes, environment",
        "CHECKPOINT is a run folder, a folder of checkpoints (RUN/checkpoints/METHOD-seedN), one step in it, or weights"
        " of any format that merge_jax.load_weights reads. Patterns are globs over paths: '**/kernel', "
        "'target/params/**'.",
    )
    summary.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    summary.add_argument("--leaves", metavar="PATTERN", help="list the leaves that match a pattern, with their shapes")
    summary.add_argument("--verify", action="store_true", help="read all arrays and check them against their digests")

    export = command(
        "export",
        "write a trained model, by default the target, to a new .safetensors file, and print how to read it",
        "target and source are written as params, with their model state, such as batch_stats; other parts are written "
        "unchanged. Leaves are named by their paths, with dots; merge_jax.load_params reads them into a model.",
    )
    export.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="a folder of checkpoints, or one step in it"
    )
    export.add_argument("file", type=Path, metavar="FILE", help="the .safetensors file to write; it must not exist")
    export.add_argument(
        "--part",
        default="target",
        help="target, source, or a part such as target/params or adapter (default: %(default)s)",
    )
    export.add_argument("--best", action="store_true", help="use the step with the best score, not the newest")
    export.add_argument(
        "--names",
        choices=["huggingface", "timm", "torchvision", "efficientnet_lite_pytorch"],
        metavar="LIBRARY",
        help="write the names and layouts of a library, for its own model: %(choices)s (default: those of merge_jax)",
    )

    convert = command(
        "convert",
        "convert weights in any format that merge_jax.load_weights reads to a new .safetensors file",
        "Names are joined by dots; arrays keep the layout of their library. From a saved training state, only the "
        "model is written, but --select applies to all names in the file.",
    )
    convert.add_argument("path", type=Path, metavar="IN", help="a file or folder, or package:NAME")
    convert.add_argument("file", type=Path, metavar="OUT", help="the .safetensors file to write; it must not exist")
    convert.add_argument("--select", nargs="+", metavar="PATTERN", help="write only these leaves: 'encoder/**/kernel'")

    command("doctor", "check versions, devices, known bad combinations, compilation cache and free disk space")
    return parser


def _command(options: argparse.Namespace) -> None:
    # Commands are imported on use: --help needs none of them.
    if options.version:
        from importlib.metadata import version

        print(version("merge_jax"))
    elif options.command == "compare":
        from merge_jax.commands.compare import compare_runs

        compare_runs(options.runs, options.baseline, options.out)
    elif options.command == "summary":
        from merge_jax.commands.summary import summarize_checkpoint

        summarize_checkpoint(options.checkpoint, options.leaves, verify=options.verify)
    elif options.command == "export":
        from merge_jax.commands.export import export_part

        export_part(options.checkpoint, options.file, options.part, best=options.best, names=options.names)
    elif options.command == "convert":
        from merge_jax.commands.convert import convert

        convert(options.path, options.file, options.select)
    elif options.command == "doctor":
        from merge_jax.commands.doctor import examine

        raise SystemExit(examine())
    else:
        _parser().print_help()
        raise SystemExit(2)


def _reporting(work: Callable[[], None]) -> None:
    try:
        work()
        sys.stdout.flush()
    except BrokenPipeError:  # The reader of the output, such as `head`, has closed it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
