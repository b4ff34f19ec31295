"""A word-level tokenizer over the tasks' fixed words, saved so that AutoTokenizer loads it.

Words and marks are split as ``tasks.split_words`` splits them, so a document's tokens don't
depend on what stands before it. Line breaks and question marks carry no token, so a question's
last token is the owner asked about. Unknown words become ``<unk>``.
"""

from __future__ import annotations

import json
from pathlib import Path

from sgl_blend.eval import words
from sgl_blend.eval.tasks import END

BOS, PAD, UNK = "<s>", "<pad>", "<unk>"
SPECIALS = (PAD, BOS, END, UNK)
PAD_ID, BOS_ID, END_ID, UNK_ID = range(4)

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ message['content'] }}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
)
"""``Conversation.prompt`` in Jinja; the assistant needs no mark to begin with."""


def word_ids() -> dict[str, int]:
    """Word -> token id; the special tokens come first."""
    return {word: i for i, word in enumerate((*SPECIALS, *words.vocabulary()))}


def save_tokenizer(folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` (with the chat template inside)."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(word_ids(), unk_token=UNK))
    tokenizer.normalizer = normalizers.Replace("?", " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIALS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        unk_token=UNK,
        pad_token=PAD,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    told = json.loads(settings.read_text())
    # Newer transformers writes a class name that older ones don't know; both know this one.
    told["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.write_text(json.dumps(told, indent=2) + "\n")
