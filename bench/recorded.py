"""What recorded comparisons of training runs have in common: a file of results, its picture, and a command for both."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tritonshare.cli import Parser
from tritonshare.files import FileError, read_json, replace, sentence
from tritonshare.training.run import TrainingError

RECORDED = Path(__file__).parent / "training"
MAX_BYTES = 16 * 2**20  # of a file of results
Document = dict[str, Any]


def to_json(document: Document, listed: str) -> bytes:
    """A line for each entry, and for each element of the entry `listed`, which comes last."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in document.items() if key != listed]
    elements = ",\n".join(map(json.dumps, document[listed]))
    lines.append(f'"{listed}": [\n{elements}\n]')
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def parser(name: str, summary: str, *, epochs: int, what: str, seeds: int) -> Parser:
    """Of `python -m bench.<name>`, with the options that all have."""
    made = Parser(prog=f"python -m bench.{name}", description=summary)
    add = made.add_argument
    add("--out", type=Path, default=RECORDED, metavar="FOLDER", help="for results, picture (default: bench/training)")
    add("--epochs", type=int, default=epochs, metavar="N", help=f"{what} (default: %(default)s)")
    add("--seeds", type=int, default=seeds, metavar="N", help="0 to N - 1 (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace the results in FOLDER")
    add("--draw", action="store_true", help="train nothing: draw the results in FOLDER again")
    return made


def command(
    made: Parser,
    args: Namespace,
    name: str,
    run: Callable[[Path], Document],
    picture: Callable[[Document], bytes],
    table: Callable[[Document], str],
) -> int:
    """Do what was asked for, and return the exit status. run: train, and write results to a file on the way."""
    results, drawn = args.out / f"{name}.json", args.out / f"{name}.png"
    if min(args.epochs, args.seeds) < 1:
        made.error("--epochs and --seeds must be at least 1")
    if results.exists() and not (args.overwrite or args.draw):
        made.error(f"there is {results} already: choose another --out, or --overwrite it")
    try:
        if args.draw:
            document = read_json(results, MAX_BYTES)
        else:
            args.out.mkdir(parents=True, exist_ok=True)
            document = run(results)
        replace({drawn: picture(document)})
    except (FileError, TrainingError, OSError) as error:
        what = f"{results} {error}" if isinstance(error, FileError) else str(error)
        print(f"{made.prog}: {sentence(what)}", file=sys.stderr)
        return 1
    print(f"\n{table(document)}\n\nwritten: {results}, {drawn}")
    return 0
