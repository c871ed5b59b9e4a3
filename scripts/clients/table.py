"""The clients, a row each: its own command line, with the model and the data of material.py."""

from __future__ import annotations

from dataclasses import dataclass

STEPS = "3"
# What every client that ends in a Trainer takes.
TRAINER = (
    "--output_dir", "{out}", "--max_steps", STEPS, "--per_device_train_batch_size", "2", "--logging_steps", "1",
    "--save_strategy", "steps", "--save_steps", STEPS, "--report_to", "none", "--seed", "1",
)  # fmt: skip
IN_FLOAT32 = ("--bf16", "false", "--fp16", "false")
TRL = (
    "--model_name_or_path", "{material}/model", *TRAINER, *IN_FLOAT32, "--gradient_checkpointing", "false", "--dtype",
    "float32",
)  # fmt: skip
LORA = ("--use_peft", "true", "--lora_r", "4", "--lora_target_modules", "all-linear")
ALONE = ("--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
TWO = ("--multi_gpu", "--num_processes", "2", *ALONE[2:], "--main_process_port", "0")
SWIFT = (
    "swift", "sft", "--model", "{material}/model", "--model_type", "qwen3", "--template", "dummy", "--dataset",
    "{material}/messages/train.jsonl", "--split_dataset_ratio", "0", "--torch_dtype", "float32", *IN_FLOAT32,
    "--gradient_checkpointing", "false", "--gradient_accumulation_steps", "1", "--dataloader_num_workers", "0",
    "--add_version", "false", *TRAINER,
)  # fmt: skip
FACTORY = (
    "llamafactory-cli", "train", "--stage", "sft", "--do_train", "true", "--model_name_or_path", "{material}/model",
    "--dataset", "alpaca", "--dataset_dir", "{material}/alpaca", "--template", "default",
    "--disable_gradient_checkpointing", "true", *TRAINER,
)  # fmt: skip
TWINKLE = (
    "{scripts}/twinkle_job.py", "--model", "{material}/model", "--dataset", "{material}/messages/train.jsonl",
    "--out", "{out}", "--steps", STEPS,
)  # fmt: skip

LAYERS = ("rms_norm", "rope", "swiglu")
EVERYWHERE = ("attention", *LAYERS)


@dataclass(frozen=True)
class Way:
    """To have npu_patch in a client. `lines`: what its user adds, in words; `variable`: TWINKLE_NPU_AUTO; `run`: the
    command of that name in front; `options`: at the end of the command line."""

    name: str
    lines: str
    variable: bool = False
    run: bool = False
    options: tuple[str, ...] = ()


VARIABLE = Way("variable", "none: `TWINKLE_NPU_AUTO=1`", variable=True)
RUN = Way("run", "none: `python -m npu_patch run ...`", run=True)
BOTH = (VARIABLE, RUN)
PLUGIN = Way(
    "external_plugins",
    "2, in a file for `--external_plugins`",
    options=("--external_plugins", "{scripts}/swift_plugin.py"),
)
BEFORE = Way("apply(model) before", "2, before `kernelize(model)`", options=("--apply", "before"))
AFTER = Way("apply(model) after", "2, after `kernelize(model)`", options=("--apply", "after"))


@dataclass(frozen=True)
class Client:
    """`command`: as its user types it; `{material}` and `{out}` are folders, `{peft}` is a checkout. `environment`: of
    environment.sh; `packages`: whose versions are told. `variables`: that its user sets; `ranks`: how many devices it
    runs on. `ran`: patches of which something has to run. `theirs`: the tool whose own patches are on, and which of
    ours the report has to leave to it by name."""

    name: str
    environment: str
    packages: tuple[str, ...]
    command: tuple[str, ...]
    ways: tuple[Way, ...] = BOTH
    ran: tuple[str, ...] = EVERYWHERE
    theirs: tuple[str, tuple[str, ...]] = ("", ())
    variables: tuple[tuple[str, str], ...] = ()
    ranks: int = 1


CLIENTS: tuple[Client, ...] = (
    Client("trl sft", "base", ("trl",), ("trl", "sft", "--dataset_name", "{material}/sft", *TRL)),
    Client(
        "trl sft, packed, LoRA",
        "base",
        ("trl", "peft"),
        ("trl", "sft", "--dataset_name", "{material}/sft", "--packing", "true", "--max_length", "128",
         "--attn_implementation", "flash_attention_2", *LORA, *TRL),
        ran=(*EVERYWHERE, "lora"),
    ),
    Client("trl dpo", "base", ("trl",), ("trl", "dpo", "--dataset_name", "{material}/dpo", *TRL)),
    Client(
        "trl grpo, sampling",
        "base",
        ("trl",),
        ("trl", "grpo", "--dataset_name", "{material}/grpo", "--reward_funcs",
         "scripts.clients.reward.length", "--num_generations", "2", "--max_completion_length", "8",
         "--temperature", "1.0", "--top_k", "0", *TRL),
    ),
    Client(
        "accelerate launch, Trainer",
        "base",
        ("accelerate",),
        ("accelerate", "launch", *ALONE, "{scripts}/trainer_job.py", "--model", "{material}/model", *TRAINER),
        ran=(*EVERYWHERE, "cross_entropy"),
    ),
    Client(
        "accelerate launch, Trainer, two ranks",
        "base",
        ("accelerate",),
        ("accelerate", "launch", *TWO, "{scripts}/trainer_job.py", "--model", "{material}/model", *TRAINER),
        ran=(*EVERYWHERE, "cross_entropy"),
        ranks=2,
    ),
    Client(
        "torchrun, Trainer, two ranks",
        "base",
        (),
        ("torchrun", "--standalone", "--nproc-per-node", "2", "{scripts}/trainer_job.py", "--model",
         "{material}/model", *TRAINER),
        ran=(*EVERYWHERE, "cross_entropy"),
        ranks=2,
    ),
    Client(
        "peft examples/sft, LoRA with dropout",
        "base",
        ("peft", "trl"),
        ("{peft}/examples/sft/train.py", "--model_name_or_path", "{material}/model", "--dataset_name",
         "{material}/sft", "--use_peft_lora", "true", "--lora_r", "4", "--lora_target_modules", "all-linear",
         *IN_FLOAT32, *TRAINER),
        ran=(*EVERYWHERE, "lora"),
    ),
    Client(
        "peft examples/pissa_finetuning",
        "base",
        ("peft", "trl"),
        ("{peft}/examples/pissa_finetuning/pissa_finetuning.py", "--base_model_name_or_path", "{material}/model",
         "--data_path", "{material}/alpaca", "--dataset_split", "train", "--dataset_field", "instruction", "output",
         "--lora_r", "4", *IN_FLOAT32, *TRAINER),
        ran=(*EVERYWHERE, "lora"),
    ),
    Client(
        "swift sft",
        "ms-swift",
        ("ms-swift",),
        (*SWIFT, "--tuner_type", "full"),
        ways=(*BOTH, PLUGIN),
        ran=("attention", "cross_entropy"),
        theirs=("ms-swift", LAYERS),
    ),
    Client(
        "swift sft, its own NPU patch off",
        "ms-swift",
        ("ms-swift",),
        (*SWIFT, "--tuner_type", "full", "--enable_npu_model_patch", "false"),
        ways=(*BOTH, PLUGIN),
        ran=(*EVERYWHERE, "cross_entropy"),
    ),
    Client(
        "swift sft, its own NPU patch off, LoRA, two ranks",
        "ms-swift",
        ("ms-swift", "peft"),
        (*SWIFT, "--tuner_type", "lora", "--enable_npu_model_patch", "false"),
        ways=(VARIABLE, PLUGIN),
        ran=(*EVERYWHERE, "cross_entropy", "lora"),
        variables=(("NPROC_PER_NODE", "2"),),
        ranks=2,
    ),
    Client(
        "llamafactory-cli train",
        "llamafactory",
        ("llamafactory",),
        (*FACTORY, "--finetuning_type", "full"),
        ran=(*EVERYWHERE, "cross_entropy"),
    ),
    Client(
        "llamafactory-cli train, use_v1_kernels",
        "llamafactory",
        ("llamafactory",),
        (*FACTORY, "--finetuning_type", "full", "--use_v1_kernels", "true"),
        ran=("attention", "cross_entropy"),
        theirs=("LLaMA-Factory", LAYERS),
    ),
    Client(
        "llamafactory-cli train, LoRA, two ranks",
        "llamafactory",
        ("llamafactory", "peft"),
        (*FACTORY, "--finetuning_type", "lora", "--lora_rank", "4"),
        ways=(VARIABLE,),
        # Else it asks for expandable segments, which the simulated device does not have.
        variables=(("OPTIM_TORCH", "0"),),
        ran=(*EVERYWHERE, "cross_entropy", "lora"),
        ranks=2,
    ),
    Client("twinkle", "twinkle", ("twinkle-kit",), TWINKLE),
    Client(
        "twinkle, kernelize(model)",
        "twinkle",
        ("twinkle-kit",),
        (*TWINKLE, "--kernelize"),
        ways=(*BOTH, BEFORE, AFTER),
        ran=(),
        theirs=("twinkle", EVERYWHERE),
    ),
    Client("axolotl train", "axolotl", ("axolotl",), ("axolotl", "train", "{scripts}/axolotl.yml"),
           ran=(*EVERYWHERE, "cross_entropy")),
)  # fmt: skip
