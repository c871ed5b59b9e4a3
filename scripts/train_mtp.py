"""Train the head of several tokens (mtp.*) of a frozen model, so that its drafts are the model's again, and write it
beside the model in the published naming.

    python scripts/train_mtp.py --model DIR --text FILE                   the whole head, of a Qwen3-Next or Qwen3.5
    python scripts/train_mtp.py --model DIR --adapter LORA --lora 16      of a fine-tuned trunk, by an adapter, merged
    python scripts/train_mtp.py                                           a tiny model of its own: trained, fine-tuned

Without --text the text is what comes with Python. A head that is there is trained on, else a new one. The last tenth of
the text is held out: printed is, before and after, the share of its tokens for which head and model agree, and how
many tokens each forward of the model gives when it goes on from there with use_mtp=True. On a simulated NPU unless
there is one; --device says another.
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from npu_patch import simulator

if simulator.real_device() is None and "cuda" not in sys.argv:
    simulator.start()

import torch
import transformers
from torch import Tensor

import npu_patch
from npu_patch.checkpoints.beside import write_beside
from npu_patch.patches.inference.mtp import head as heads
from npu_patch.patches.inference.mtp import training

SHARD = "mtp.safetensors"
PROMPTS, PROMPT, NEW = 3, 32, 48  # what is generated to count tokens a forward
TINY: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


@dataclass(frozen=True)
class Text:
    """Tokens to train on, and those held out."""

    trained: Tensor
    held_out: Tensor

    @classmethod
    def of(cls, tokens: list[int], length: int) -> Text:
        """
        Raises:
            SystemExit: for fewer than twenty sequences.
        """
        if len(tokens) < 20 * length:
            sys.exit(f"--text: {len(tokens)} tokens are too few: 20 sequences of --length {length} are needed")
        cut = len(tokens) // 10 * 9
        return cls(torch.tensor(tokens[:cut]), torch.tensor(tokens[cut:]))

    def batch(self, samples: int, length: int, generator: torch.Generator, device: torch.device) -> Tensor:
        starts = torch.randint(0, len(self.trained) - length, (samples,), generator=generator)
        return torch.stack([self.trained[start : start + length] for start in starts.tolist()]).to(device)

    def held(self, samples: int, length: int, device: torch.device) -> Tensor:
        whole = self.held_out[: len(self.held_out) // length * length].view(-1, length)
        return whole[:: max(len(whole) // samples, 1)][:samples].to(device)


def main() -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options = _options()
    torch.manual_seed(options.seed)
    if options.model is not None:
        _train_users(options)
    else:
        _train_tiny(options)


def _train_users(options: argparse.Namespace) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    text = options.text.read_text("utf-8") if options.text else _help()
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    if options.adapter is not None:
        import peft

        model = peft.PeftModel.from_pretrained(model, options.adapter).base_model.model
    train_head(model.to(options.device), Text.of(tokenizer(text)["input_ids"], options.length), options)


def _train_tiny(options: argparse.Namespace) -> None:
    """A model that has learned Python's help and has a head of it, then learns Python's source by LoRA: its head's
    drafts are worse there until it is trained anew."""
    import peft

    own, other = (Text.of([*text.encode()], options.length) for text in (_help(), _source()))
    model = transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**TINY)).to(options.device)
    with tempfile.TemporaryDirectory() as folder, npu_patch.applied(model, device=options.device, mtp=True):
        _fit(
            list(model.parameters()), lambda ids: model(input_ids=ids, labels=ids).loss, own, 2 * options.steps, options
        )
        model.save_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder).to(options.device)
        print("a tiny Qwen3.5 that has read Python's help, and a new head")
        train_head(model, own, options)
        config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
        tuned = peft.get_peft_model(model, config)
        adapters = [each for each in tuned.parameters() if each.requires_grad]
        _fit(adapters, lambda ids: tuned(input_ids=ids, labels=ids).loss, other, options.steps, options)
        print("the same after a LoRA on Python's source, and its head as it was")
        train_head(tuned.base_model.model, other, options)


def train_head(model: Any, text: Text, options: argparse.Namespace) -> None:
    """Trains the head of a model, whose weights stay as they are, and writes it beside the model."""
    model.eval().requires_grad_(False)
    with npu_patch.applied(model, device=options.device, mtp=True):
        head, new = heads.head_to_train(model)
        what = "a new head" if new else "the head beside the model"
        print(f"before ({what}): {_measured(head, model, text, options, not new)}")
        wrapped = _adapted(head.train(), options.lora) if options.lora else head
        parameters = [each for each in wrapped.parameters() if each.requires_grad]

        def loss_of(ids: Tensor) -> Tensor:
            return training.loss(head, model, training.states_of(model, ids), ids)

        _fit(parameters, loss_of, text, options.steps, options)
        if options.lora:
            head = wrapped.merge_and_unload()
        named = heads.published_names(head.eval())
        files = write_beside(Path(model.config.name_or_path), named, SHARD)
        print(f"after {options.steps} steps: {_measured(head, model, text, options, True)}")
        print(f"written to {', '.join(files)}: {sum(each.numel() for each in named.values())} numbers as mtp.*")


def _adapted(head: Any, rank: int) -> Any:
    import peft

    named = [name for name, module in head.named_modules() if isinstance(module, torch.nn.Linear)]
    return peft.get_peft_model(head, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=named))


def _fit(parameters: list[Any], loss_of: Any, text: Text, steps: int, options: argparse.Namespace) -> None:
    for each in parameters:
        each.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=options.lr)
    generator = torch.Generator().manual_seed(options.seed)
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(text.batch(options.batch, options.length, generator, torch.device(options.device)))
        loss.backward()
        optimizer.step()
        if step in (0, steps - 1):
            print(f"    step {step + 1}: loss {loss.item():.3f}", flush=True)


def _measured(head: Any, model: Any, text: Text, options: argparse.Namespace, beside: bool) -> str:
    """`beside`: the head lies there, so the model can be asked with it."""
    head.eval()
    device = torch.device(options.device)
    ids = text.held(options.batch, options.length, device)
    share = training.accepted(head, model, training.states_of(model, ids), ids).item()
    found = f"accepted {share:.3f} of the held-out text"
    if not beside:
        return found
    forwards: list[int] = []
    handle = model.get_decoder().register_forward_hook(lambda *args: forwards.append(1))
    given = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, "use_mtp": True}
    for prompt in text.held(PROMPTS, PROMPT, device):
        model.generate(input_ids=prompt[None], num_assistant_tokens=options.drafts, **given)
    handle.remove()
    return f"{found}; {PROMPTS * NEW / len(forwards):.2f} tokens a forward of the model, with {options.drafts} drafts"


def _help() -> str:
    from pydoc_data import topics

    return "\n\n".join(text for _, text in sorted(topics.topics.items()))


def _source() -> str:
    return "\n\n".join(inspect.getsource(module) for module in (argparse, inspect, tempfile, warnings))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", help="a folder of a model that has, or is to have, mtp.* beside it; it is written to"
    )
    parser.add_argument("--adapter", help="a LoRA of peft's on the model, with which it will be used")
    parser.add_argument("--text", type=Path, help="a file in UTF-8")
    parser.add_argument("--device", default="npu", choices=npu_patch.devices.TYPES)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument(
        "--lora", type=int, default=0, metavar="RANK", help="train an adapter of this rank, then merge it"
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8, help="sequences a step")
    parser.add_argument("--length", type=int, default=64, help="tokens a sequence")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--drafts", type=int, default=1, help="num_assistant_tokens of what is generated")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
