"""What the clients train on: a tiny random Qwen3 in float32, a tokenizer of bytes with a chat template, and texts.

python scripts/clients/material.py FOLDER
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WORDS = ("the", "small", "model", "reads", "a", "few", "words", "and", "writes", "them", "again")
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}


def write(folder: Path) -> None:
    """The model's folder `model`, and a data set in each of the forms that clients read."""
    _write_model(folder / "model")
    chance = random.Random(0)
    texts = [" ".join(chance.choices(WORDS, k=chance.randint(6, 14))) for _ in range(96)]
    asked, answered, refused = texts[:32], texts[32:64], texts[64:]
    pairs = list(zip(asked, answered, refused, strict=True))
    rows = {
        "sft": [{"text": text} for text in texts],
        "dpo": [{"prompt": a, "chosen": b, "rejected": c} for a, b, c in pairs],
        "grpo": [{"prompt": [{"role": "user", "content": a}]} for a, _, _ in pairs],
        "messages": [
            {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b, _ in pairs
        ],
        "alpaca": [{"instruction": a, "input": "", "output": b} for a, b, _ in pairs],
    }
    for name, of_form in rows.items():
        (folder / name).mkdir()
        (folder / name / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_form))
    (folder / "sft" / "test.jsonl").write_text((folder / "sft" / "train.jsonl").read_text())
    information = {"alpaca": {"file_name": "train.jsonl"}}
    (folder / "alpaca" / "dataset_info.json").write_text(json.dumps(information))


def _write_model(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    special = ["<pad>", "</s>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", chat_template=TEMPLATE
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        **SIZES, **HEADS, vocab_size=len(vocabulary), pad_token_id=0, eos_token_id=1, bos_token_id=None
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
