#!/usr/bin/env bash
# transformers 5.23.0: AutoTokenizer tokenises otherwise than the tokenizer that was saved, where config.json says qwen2.
#
# A good engineer would guess that AutoTokenizer.from_pretrained(folder) gives the tokenizer whose save_pretrained wrote
# the folder: tokenizer.json holds its whole pipeline, and tokenizer_config.json its class. That is so for bert, gpt2,
# llama, qwen3 and others. With "model_type": "qwen2" in config.json the class is replaced by Qwen2Tokenizer, which keeps
# the vocabulary and takes a pre-tokenizer of its own: words are lost, without a warning or an error.
# Seen, for a tokenizer of words (a: 2, cat: 3, sat: 4) and the text "a cat sat": [2, 2, 2] instead of [2, 3, 4].
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 tokenizers==0.23.3

"$work/venv/bin/python" - "$work" <<'PYTHON'
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

words = ["[PAD]", "[UNK]", "a", "cat", "sat"]
tokenizer = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
saved = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")

seen = {}
for kind in ("bert", "gpt2", "llama", "qwen3", "qwen2"):
    folder = Path(sys.argv[1]) / kind
    saved.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    seen[kind] = loaded("a cat sat")["input_ids"]
    print(f"{kind:<8}{type(loaded).__name__:<20}{seen[kind]}")

expected = saved("a cat sat")["input_ids"]
assert expected == [2, 3, 4]
for kind in ("bert", "gpt2", "llama", "qwen3"):
    assert seen[kind] == expected, f"the behaviour changed: {kind} gives {seen[kind]}"
assert seen["qwen2"] != expected, "the behaviour changed: qwen2 keeps the tokenizer that was saved"
print(f"as described: {expected} was saved, qwen2 gives {seen['qwen2']}")
PYTHON
