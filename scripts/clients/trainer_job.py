"""A script as people write it: transformers' Trainer and its arguments, and nothing of npu_patch."""

import sys

import torch
from transformers import AutoModelForCausalLM, HfArgumentParser, Trainer, TrainingArguments, set_seed


def main() -> None:
    place = sys.argv.index("--model")
    folder = sys.argv[place + 1]
    del sys.argv[place : place + 2]
    (arguments,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    set_seed(arguments.seed)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.randint(3, model.config.vocab_size, (32, 24))
    Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in tokens]).train()


if __name__ == "__main__":
    main()
