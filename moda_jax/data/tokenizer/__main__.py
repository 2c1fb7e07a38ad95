"""Trains a tokenizer, see `moda_jax.data.train_tokenizer`.

python -m moda_jax.data.tokenizer train --vocab-size=8192 --output=tokenizer.json [--source=python_stdlib]
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from moda_jax.config import DataConfig, check_local
from moda_jax.data.train_tokenizer import train_bpe


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    defaults = DataConfig()
    parser = argparse.ArgumentParser(prog="python -m moda_jax.data.tokenizer", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train a byte-level BPE and write its tokenizer.json")
    train.add_argument("--vocab-size", type=int, required=True, help="tokens, end-of-text included")
    train.add_argument("--output", required=True, help="the tokenizer.json to write")
    train.add_argument("--source", default=defaults.source, help="as data.source (default: %(default)s)")
    train.add_argument("--feature", default=defaults.feature, help="as data.feature (default: %(default)s)")
    train.add_argument("--cache-dir", default=defaults.cache_dir, help="as data.cache_dir (default: the user's)")
    flags = parser.parse_args(arguments)
    try:
        check_local("--output", flags.output)
        config = DataConfig(source=flags.source, feature=flags.feature, cache_dir=flags.cache_dir)
        tokenizer = train_bpe(config, flags.vocab_size, flags.output)
    except ValueError as error:
        parser.error(str(error))  # exits with status 2
    print(f"{flags.output}: {tokenizer.vocab_size} tokens; use it with --config.data.tokenizer={flags.output}")
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")  # to stderr
    logging.getLogger("moda_jax").setLevel(logging.INFO)  # what was passed over, and progress where no bar is drawn
    raise SystemExit(main())
