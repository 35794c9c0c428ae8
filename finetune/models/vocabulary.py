"""A vocabulary cut to what a domain uses: the tokenizer, and the rows of the model's table that go with it.

A text whose tokens are all kept is cut into the same pieces as before. Any other text is still read: in smaller pieces,
since every special token and every single character or byte stays.
"""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from finetune.errors import ModelError

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""What stands for a space in front of a word in SentencePiece's vocabularies."""


UNUSED = "[unused"
"""How BERT's vocabulary begins: places for pieces that nobody has put there."""


class Trimmed(NamedTuple):
    """A smaller tokenizer.

    Args:
        tokenizer: of the class of the one that it was made of.
        kept: number of each of its tokens in the old vocabulary, rising, (V',).
    """

    tokenizer: Any
    kept: npt.NDArray[np.int64]


def trim_tokenizer(tokenizer: Any, used: Iterable[int], least: int = 0) -> Trimmed:
    """Leave out the tokens that nobody uses.

    WordPiece takes the longest piece at each place, and Unigram the likeliest cut: what won among more wins among
    fewer. BPE (arXiv:1508.07909) merges in a fixed order: with a token stay those that it is merged from.

    Args:
        tokenizer: a fast one, of WordPiece, BPE or Unigram; it stays as it is.
        used: numbers of the tokens to keep, beside special tokens, single characters and bytes.
        least: where these are fewer, the first of the vocabulary stay too, up to so many: vocabularies are learned and
            written down from the commonest piece to the rarest.

    Raises:
        ModelError: another kind of vocabulary.
    """
    from transformers import AutoTokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    slow = {"model": {"type": type(tokenizer).__name__}}
    content: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else slow
    kind = content["model"]["type"]
    if kind not in _MODELS:
        raise ModelError(
            f"vocabulary: must be of {', '.join(_MODELS)} in a fast tokenizer to be trimmed, got {kind}. "
            "Take a base with one of these, such as BERT, GPT-2 or XLM-RoBERTa."
        )
    numbers = tokenizer.get_vocab()  # piece -> its number, added tokens among them
    pieces = {number: piece for piece, number in numbers.items()}
    special = {*tokenizer.all_special_tokens, *(token["content"] for token in content["added_tokens"])}
    wanted = special | {pieces[int(number)] for number in used}
    wanted |= {piece for piece in pieces.values() if _is_single(piece, content["model"])}
    more = (pieces[number] for number in sorted(pieces) if not pieces[number].startswith(UNUSED))
    wanted |= set(islice((piece for piece in more if piece not in wanted), max(0, least - len(wanted))))
    if kind == "BPE":
        wanted = _add_parts(wanted, content["model"])
    kept = np.array(sorted(numbers[piece] for piece in wanted if piece in numbers), dtype=np.int64)
    new = {pieces[int(old)]: number for number, old in enumerate(kept)}
    _MODELS[kind](content["model"], new)
    content["added_tokens"] = [token | {"id": new[token["content"]]} for token in content["added_tokens"]]
    content["post_processor"] = _renumber(content["post_processor"], new)
    if content.get("padding"):
        content["padding"]["pad_id"] = new[content["padding"]["pad_token"]]
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        _write(Path(folder), content)
        return Trimmed(AutoTokenizer.from_pretrained(folder, trust_remote_code=False), kept)


def _write(folder: Path, content: Mapping[str, Any]) -> None:
    """Put the new vocabulary in the place of the old one, which some classes keep in files of their own too."""
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    for name in ("vocab.txt", "vocab.json", "merges.txt", "added_tokens.json", "sentencepiece.bpe.model"):
        (folder / name).unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings.pop("added_tokens_decoder", None)  # by number; tokenizer.json says the same
    path.write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")


def _is_single(piece: str, model: Mapping[str, Any]) -> bool:
    """Whether a piece is one character, in front of a word or within it, or one byte."""
    inner = piece.removeprefix(model.get("continuing_subword_prefix") or "").removeprefix(SPACE)
    is_byte = model.get("byte_fallback", False) and piece.startswith("<0x")
    return len(inner) <= 1 or is_byte


def _list_merges(model: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Both parts of each merge, and what they become; older files write the parts as one text."""
    prefix = model.get("continuing_subword_prefix") or ""
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    return [(first, second, first + second.removeprefix(prefix)) for first, second in pairs]


def _add_parts(pieces: set[str], model: Mapping[str, Any]) -> set[str]:
    """Pieces, and all that they may be merged from."""
    parts: dict[str, list[str]] = defaultdict(list)
    for first, second, merged in _list_merges(model):
        parts[merged] += [first, second]
    found, open_ = set(pieces), list(pieces)
    while open_:
        new = {part for part in parts.get(open_.pop(), ()) if part not in found}
        found |= new
        open_ += new
    return found


def _trim_pieces(model: dict[str, Any], new: Mapping[str, int]) -> None:
    model["vocab"] = {piece: new[piece] for piece in model["vocab"] if piece in new}


def _trim_merges(model: dict[str, Any], new: Mapping[str, int]) -> None:
    _trim_pieces(model, new)
    model["merges"] = [
        merge
        for merge, pieces in zip(model["merges"], _list_merges(model), strict=True)
        if all(piece in new for piece in pieces)
    ]


def _trim_scores(model: dict[str, Any], new: Mapping[str, int]) -> None:
    unknown = model["vocab"][model["unk_id"]][0] if model.get("unk_id") is not None else None
    model["vocab"] = [[piece, score] for piece, score in model["vocab"] if piece in new]
    if unknown is not None:
        model["unk_id"] = new[unknown]


_MODELS: dict[str, Callable[[dict[str, Any], Mapping[str, int]], None]] = {
    "WordPiece": _trim_pieces,
    "BPE": _trim_merges,
    "Unigram": _trim_scores,
}


def _renumber(processor: Any, new: Mapping[str, int]) -> Any:
    """What puts special tokens around a text, with their new numbers."""
    if processor is None:
        return None
    changed = copy.deepcopy(processor)
    for one in changed.get("processors", ()):
        one.update(_renumber(one, new))
    for token in changed.get("special_tokens", {}).values():  # a template
        token["ids"] = [new[piece] for piece in token["tokens"]]
    for role in ("sep", "cls"):  # of BERT and RoBERTa
        if role in changed:
            changed[role][1] = new[changed[role][0]]
    return changed
