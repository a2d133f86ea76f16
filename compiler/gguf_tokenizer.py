"""The tokenizer inside a GGUF file, as the files a Hugging Face folder holds.

Owns the mapping from GGUF's tokenizer fields to `tokenizer.json` and `tokenizer_config.json`: byte-level BPE (the
vocabulary kind that GGUF calls "gpt2") with the pre-tokenisers named in `PRE_TOKENIZERS`. Another kind is refused,
because a wrong split gives wrong tokens without any other sign.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from wire.errors import ForeshoreError, UnsupportedModelError

_CONTROL = 3
_USER_DEFINED = 4
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class _Split:
    """How a family's text becomes tokens: cut by an optional normaliser and the pre-tokeniser, then merged by BPE.

    `has_whole_words`: a piece that is a token needs no merges (`ignore_merges`). `has_bos`: texts begin with the start
    token unless the file says otherwise.
    """

    pre_tokenizer: Callable[[], Any]
    normalizer: Callable[[], Any] | None = None
    has_whole_words: bool = False
    has_bos: bool = False


def _digits() -> Any:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def _by_regex(numbers: str) -> Any:
    pattern = Regex(_CONTRACTIONS + numbers + _REST)
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


PRE_TOKENIZERS: Mapping[str, _Split] = {
    "smollm": _Split(_digits),
    "qwen2": _Split(lambda: _by_regex(r"\p{N}"), normalizers.NFC),
    "llama-bpe": _Split(lambda: _by_regex(r"\p{N}{1,3}"), has_whole_words=True, has_bos=True),
}


def write_tokenizer(fields: Mapping[str, Any], folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` for the GGUF key-value `fields` into `folder`."""
    absent = [key for key in ("model", "tokens") if not fields.get(f"tokenizer.ggml.{key}")]
    if absent:
        raise UnsupportedModelError(
            f"the GGUF file has no tokenizer (tokenizer.ggml.{absent[0]})",
            remedy="convert it again, with its tokenizer",
        )
    kind = fields["tokenizer.ggml.model"]
    if kind != "gpt2":
        raise UnsupportedModelError(
            f"the GGUF file has a {kind!r} vocabulary", remedy="byte-level BPE ('gpt2') can be imported"
        )
    try:
        tokenizer, config = build_tokenizer(fields), _config(fields)
    except ForeshoreError:
        raise
    except Exception as error:  # the library raises bare ones for tables that do not fit together
        raise UnsupportedModelError(
            f"the GGUF file's tokenizer does not add up: {type(error).__name__}: {error}", remedy="convert it again"
        ) from error
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=2))


def build_tokenizer(fields: Mapping[str, Any]) -> Tokenizer:
    """The byte-level BPE tokenizer that `fields` describe."""
    pre = fields.get("tokenizer.ggml.pre", "")
    if pre not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise UnsupportedModelError(f"the GGUF file's pre-tokeniser {pre!r} is not known", remedy=f"known are: {known}")
    split = PRE_TOKENIZERS[pre]
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=split.has_whole_words))
    if split.normalizer is not None:
        tokenizer.normalizer = split.normalizer()
    tokenizer.pre_tokenizer = split.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    types = fields.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    added = [(token, kind) for token, kind in zip(tokens, types, strict=True) if kind in (_CONTROL, _USER_DEFINED)]
    tokenizer.add_special_tokens([_added(token) for token, kind in added if kind == _CONTROL])
    tokenizer.add_tokens([_added(token) for token, kind in added if kind == _USER_DEFINED])
    if _has_bos(fields):
        bos = int(fields["tokenizer.ggml.bos_token_id"])
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
        )
    return tokenizer


def _has_bos(fields: Mapping[str, Any]) -> bool:
    """Whether every text begins with the start token: as the file says, else as its family does."""
    split = PRE_TOKENIZERS[fields.get("tokenizer.ggml.pre", "")]
    wanted = bool(fields.get("tokenizer.ggml.add_bos_token", split.has_bos))
    return wanted and "tokenizer.ggml.bos_token_id" in fields


def _added(token: str) -> AddedToken:
    return AddedToken(token, normalized=False)


def _config(fields: Mapping[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": _has_bos(fields),
    }
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = fields.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None:
            config[f"{role}_token"] = tokens[index]
    if "tokenizer.chat_template" in fields:
        config["chat_template"] = fields["tokenizer.chat_template"]
    return config
