"""The clients, a row each: its own command line, with the model and the data of material.py."""

from __future__ import annotations

from dataclasses import dataclass

STEPS = "3"
# What every client that ends in a Trainer takes.
TRAINER = (
    "--output_dir", "{out}", "--max_steps", STEPS, "--per_device_train_batch_size", "2", "--logging_steps", "1",
    "--save_strategy", "steps", "--save_steps", STEPS, "--report_to", "none", "--seed", "1",
)  # fmt: skip
TRL = (
    "--model_name_or_path", "{material}/model", *TRAINER, "--bf16", "false", "--fp16", "false",
    "--gradient_checkpointing", "false", "--dtype", "float32",
)  # fmt: skip
LORA = ("--use_peft", "true", "--lora_r", "4", "--lora_target_modules", "all-linear")
ALONE = ("--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
TWO = ("--multi_gpu", "--num_processes", "2", *ALONE[2:], "--main_process_port", "0")


@dataclass(frozen=True)
class Client:
    """`command`: as its user types it; `{material}` and `{out}` are folders. `packages`: what it needs, whose versions
    are told. `ranks`: how many devices it runs on."""

    name: str
    packages: tuple[str, ...]
    command: tuple[str, ...]
    ranks: int = 1


CLIENTS: tuple[Client, ...] = (
    Client("trl sft", ("trl",), ("trl", "sft", "--dataset_name", "{material}/sft", *TRL)),
    Client(
        "trl sft, packed, LoRA",
        ("trl", "peft"),
        ("trl", "sft", "--dataset_name", "{material}/sft", "--packing", "true", "--max_length", "128",
         "--attn_implementation", "flash_attention_2", *LORA, *TRL),
    ),
    Client("trl dpo", ("trl",), ("trl", "dpo", "--dataset_name", "{material}/dpo", *TRL)),
    Client(
        "trl grpo",
        ("trl",),
        ("trl", "grpo", "--dataset_name", "{material}/grpo", "--reward_funcs",
         "scripts.clients.reward.length", "--num_generations", "2", "--max_completion_length", "8",
         "--temperature", "1.0", "--top_k", "0", *TRL),
    ),
    Client(
        "accelerate launch, Trainer",
        ("accelerate",),
        ("accelerate", "launch", *ALONE, "{scripts}/trainer_job.py", "--model", "{material}/model", *TRAINER),
    ),
    Client(
        "accelerate launch, Trainer, two ranks",
        ("accelerate",),
        ("accelerate", "launch", *TWO, "{scripts}/trainer_job.py", "--model", "{material}/model", *TRAINER),
        ranks=2,
    ),
    Client(
        "torchrun, Trainer, two ranks",
        ("transformers",),
        ("torchrun", "--standalone", "--nproc-per-node", "2", "{scripts}/trainer_job.py", "--model",
         "{material}/model", *TRAINER),
        ranks=2,
    ),
    Client(
        "swift sft",
        ("ms-swift",),
        ("swift", "sft", "--model", "{material}/model", "--model_type", "qwen3", "--template", "dummy", "--dataset",
         "{material}/messages/train.jsonl", "--train_type", "full", "--torch_dtype", "float32",
         "--gradient_checkpointing", "false", "--add_version", "false", *TRAINER),
    ),
    Client(
        "llamafactory-cli train",
        ("llamafactory",),
        ("llamafactory-cli", "train", "--stage", "sft", "--do_train", "true", "--model_name_or_path",
         "{material}/model", "--dataset", "alpaca", "--dataset_dir", "{material}/alpaca", "--template", "default",
         "--finetuning_type", "full", "--disable_gradient_checkpointing", "true", *TRAINER),
    ),
)  # fmt: skip
