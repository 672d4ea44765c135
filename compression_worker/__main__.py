"""The command line: ``python -m compression_worker COMMAND``. Described with its JSON shapes in docs/cli.md.

Exit status: 0 done, 1 the job says no (one line on standard error says why), 2 the command was not understood. torch
is imported only by a command that computes, so that help and ``methods`` answer at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from compression_worker import catalog, settings
from compression_worker.contracts import CompressionError, Json
from compression_worker.serving.command import add_serve_arguments, serve_command

DONE, SAID_NO, NOT_UNDERSTOOD, INTERRUPTED = 0, 1, 2, 130
DEVICES = ("auto", "cpu", "cuda")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit status."""
    # Threads that wait by spinning take the time of those that work, as soon as a machine does two things at once.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    args = make_parser().parse_args(arguments)
    try:
        status: int = args.run(args)
    except CompressionError as error:
        return refuse(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output is gone (as in `… | head`); nothing more can be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return SAID_NO
    return status


def refuse(error: CompressionError) -> int:
    """Say why not, in one line."""
    sys.stderr.write(f"error: {' '.join(error.message.split())}\n")
    return NOT_UNDERSTOOD if error.code == "usage" else SAID_NO


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m compression_worker", description="Compress fine-tuned language models, and run them."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_methods(commands)
    _add_compress(commands)
    _add_escrow(commands)
    _add_inspect(commands)
    _add_verify(commands)
    _add_restore(commands)
    _add_evaluate(commands)
    serve = commands.add_parser("serve", help="answer requests (OpenAI API) from compressed models")
    add_serve_arguments(serve)
    serve.set_defaults(run=serve_command)
    _add_step(commands)
    return parser


def _add_methods(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("methods", help="list the compression methods and their settings")
    _add_json(parser)
    parser.set_defaults(run=_methods)


def _add_compress(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "compress",
        help="make an artifact from a model, or from a base and its fine-tune",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_settings_help(),
    )
    parser.add_argument("method", choices=sorted(catalog.METHODS), metavar="METHOD", help="a name that 'methods' lists")
    parser.add_argument("--base", type=Path, metavar="DIR", help="the base, for a method that compresses a difference")
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="DIR",
        help="what is compressed: a Hugging Face folder, or a PEFT adapter of the base",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder for the artifact")
    parser.add_argument("--data", type=Path, metavar="FILE", help="calibration text: TXT, or JSONL with 'text'")
    _add_settings(parser)
    parser.add_argument("--seed", type=_seed, default=0, metavar="N", help="decides the order of data (%(default)s)")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="where distillation runs (%(default)s)")
    _add_json(parser)
    parser.set_defaults(run=_compress)


def _add_escrow(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("escrow", help="keep a fine-tune bit for bit, as its difference from the base")
    parser.add_argument("--base", type=Path, required=True, metavar="DIR", help="the base, a Hugging Face folder")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="its fine-tune, a Hugging Face folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder for the escrow")
    _add_json(parser)
    parser.set_defaults(run=_escrow)


def _add_inspect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("inspect", help="size, ratios and origin of an artifact or an escrow")
    _add_artifact(parser)
    _add_json(parser)
    parser.set_defaults(run=_inspect)


def _add_verify(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("verify", help="check every byte of an artifact or an escrow, and its base")
    _add_artifact(parser)
    parser.add_argument("--base", type=Path, metavar="DIR", help="also check that this is its base")
    _add_json(parser)
    parser.set_defaults(run=_verify)


def _add_restore(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("restore", help="write an artifact or an escrow as a Hugging Face folder")
    _add_artifact(parser)
    parser.add_argument("--base", type=Path, metavar="DIR", help="the base it was made against, if there is one")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder for the model")
    _add_json(parser)
    parser.set_defaults(run=_restore)


def _add_evaluate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("evaluate", help="measure a model or an artifact on text or questions")
    parser.add_argument("target", type=Path, metavar="TARGET", help="a Hugging Face folder, an artifact or an adapter")
    parser.add_argument("--base", type=Path, metavar="DIR", help="the base of an artifact or of a PEFT adapter")
    parser.add_argument("--reference", type=Path, metavar="DIR", help="the model to compare with, uncompressed")
    parser.add_argument("--data", type=Path, metavar="FILE", help="text: TXT, or JSONL with 'text'")
    parser.add_argument("--choice", type=Path, metavar="FILE", help="questions: JSONL with question, choices, answer")
    _add_settings(parser)
    parser.add_argument("--device", choices=DEVICES, default="auto", help="where the model runs (%(default)s)")
    _add_json(parser)
    parser.set_defaults(run=_evaluate)


def _add_step(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("step", help="compute steps that arrive as JSON lines (for the Celery worker)")
    parser.add_argument("--store", required=True, metavar="ROOT", help="the store: a folder or s3://bucket/prefix")
    parser.add_argument("--cache", default="", metavar="FOLDER", help="local copies of a bucket's blobs")
    parser.add_argument(
        "--import-root", action="append", default=[], metavar="NAME=PATH", help="where imports may read"
    )
    parser.add_argument("--device", choices=DEVICES, default="auto", help="where models run (%(default)s)")
    parser.set_defaults(run=_step)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON on standard output")


def _add_artifact(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="the folder of an artifact or an escrow")


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set", action="append", default=[], dest="settings", metavar="NAME=VALUE", help="a setting (repeat for more)"
    )


def _settings_help() -> str:
    lines = []
    for name, entry in catalog.METHODS.items():
        lines.append(f"settings of {name} (--set NAME=VALUE):")
        for setting in settings.listed(entry.config_class()):
            default = "" if setting["default"] is None else setting["default"]
            lines.append(f"  {setting['name']}={default}")
            lines.append(f"      {setting['help']}")
    return "\n".join(lines)


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 1 << 31:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to {(1 << 31) - 1}")
    return value


def _methods(args: argparse.Namespace) -> int:
    found = [
        {
            "name": name,
            "label": entry.label,
            "summary": entry.summary,
            "paper": entry.paper,
            "settings": settings.listed(entry.config_class()),
        }
        for name, entry in catalog.METHODS.items()
    ]
    lines = [f"{one['name']:<12} {one['label']}: {one['summary']} ({one['paper']})" for one in found]
    return _answer(args, found, lines)


def _compress(args: argparse.Namespace) -> int:
    config = settings.parsed(catalog.method(args.method).config_class(), args.settings)
    from compression_worker import commands
    from compression_worker.terminal import Bars, summary_lines

    with Bars(quiet=args.json) as watch:
        summary = commands.compress(
            args.method,
            base=args.base,
            model=args.model,
            out=args.out,
            config=config,
            data=args.data,
            seed=args.seed,
            device=args.device,
            watch=watch,
        )
    return _answer(args, summary, summary_lines(summary))


def _escrow(args: argparse.Namespace) -> int:
    from compression_worker import commands
    from compression_worker.terminal import Bars, summary_lines

    with Bars(quiet=args.json) as watch:
        summary = commands.escrow(base=args.base, model=args.model, out=args.out, watch=watch)
    return _answer(args, summary, summary_lines(summary))


def _inspect(args: argparse.Namespace) -> int:
    from compression_worker import commands
    from compression_worker.terminal import summary_lines

    summary = commands.inspect(args.artifact)
    return _answer(args, summary, summary_lines(summary))


def _verify(args: argparse.Namespace) -> int:
    from compression_worker import commands

    found = commands.verify(args.artifact, args.base)
    if found["ok"]:
        return _answer(args, found, ["every byte is as it was written"])
    _answer(args, found, [])
    return refuse(CompressionError("damaged_artifact", f"'{args.artifact}': {'; '.join(found['problems'])}"))


def _restore(args: argparse.Namespace) -> int:
    from compression_worker import commands
    from compression_worker.terminal import Bars

    with Bars(quiet=args.json) as watch:
        found = commands.restore(args.artifact, base=args.base, out=args.out, watch=watch)
    return _answer(args, found, [f"{found['tensors']:,} tensors, {found['bytes']:,} bytes in {found['out']}"])


def _evaluate(args: argparse.Namespace) -> int:
    from compression_worker.evaluation.config import EvaluationConfig

    config = settings.parsed(EvaluationConfig, args.settings)
    from compression_worker.evaluation.command import evaluate, table
    from compression_worker.terminal import Bars

    if not (args.data or args.choice):
        raise CompressionError("usage", "give text with --data, questions with --choice, or both")
    with Bars(quiet=args.json) as watch:
        metrics = evaluate(
            args.target,
            data=args.data,
            choice=args.choice,
            base=args.base,
            reference=args.reference,
            config=EvaluationConfig(**config),
            device=args.device,
            on_event=watch,
        )
    return _answer(args, [metric.to_json() for metric in metrics], [table(metrics)])


def _step(args: argparse.Namespace) -> int:
    from compression_worker.runner import run_child

    roots = {}
    for flag in args.import_root:
        name, equals, path = flag.partition("=")
        if not (name and equals and path):
            raise CompressionError("usage", f"'{flag}' is not NAME=PATH")
        roots[name] = Path(path)
    return run_child(args.store, roots, args.device, args.cache)


def _answer(args: argparse.Namespace, value: Json | list[Json], lines: list[str]) -> int:
    """Print the result, for programs or for people."""
    text = json.dumps(value, indent=2, ensure_ascii=False) if args.json else "\n".join(lines)
    sys.stdout.write(f"{text}\n" if text else "")
    sys.stdout.flush()
    return DONE


def run() -> NoReturn:
    """The entry of ``python -m compression_worker``."""
    sys.exit(main())


if __name__ == "__main__":
    run()
