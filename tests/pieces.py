"""Small SentencePiece files for tests of tokens and folders."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from pali.tokens import Tokenizer

TEXTS = [
    "caption en",
    "detect cat ; dog",
    "answer en how many cats are there?",
    "a cat and two dogs",
    "12 stars",
] * 10
PLACES = [f"<loc{i:04d}>" for i in range(1024)]
OUTLINES = [f"<seg{i:03d}>" for i in range(128)]


def toy_pieces(
    path: Path, extra: Sequence[str] = (), breaks: Sequence[str] = ("\n", "\n\n")
) -> Tokenizer:
    """A toy list with the ids and the settings of Gemma's.

    breaks   the pieces of line breaks; Gemma's list has them
    """
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(TEXTS),
        model_writer=out,
        model_type="bpe",
        vocab_size=330 + len(extra),
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        character_coverage=1.0,
        user_defined_symbols=["<mask>", *breaks, *extra],
        minloglevel=2,
    )
    path.write_bytes(out.getvalue())
    return Tokenizer(path)
