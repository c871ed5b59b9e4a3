"""A small random Qwen2.5-VL with its own processor, and conversations about drawn images."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from npu_patch.commands.subject.vision.drawing import COLOURS, SHAPES, drawn

from .models import Candidate
from .settings import Settings, Unacceptable

SPECIAL = {
    name: f"<|{name}|>"
    for name in ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
}
TEMPLATE = """{% for message in messages %}<|im_start|>{{ message.role }}
{% for part in message.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}\
{{ part.text }}{% endif %}{% endfor %}<|im_end|>
{% endfor %}"""
QUESTION, ANSWERER = "What is drawn here?", "<|im_start|>assistant\n"
PATCH, SIZES = 8, ((48, 64), (64, 64), (80, 48), (32, 96))  # height and width of images
EXAMPLES = 96

# Small, in proportions that the real ones have.
TOWER = {
    "depth": 4,
    "hidden_size": 160,
    "intermediate_size": 428,
    "num_heads": 4,
    "out_hidden_size": 256,
    "patch_size": PATCH,
    "window_size": 4 * PATCH,
    "fullatt_block_indexes": [1, 3],
}
TEXT = {
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rope_scaling": {"rope_type": "default", "mrope_section": [8, 12, 12]},
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def candidate(settings: Settings) -> Candidate:
    """Raises `Unacceptable` where the processor lacks a package."""
    processor = processor_of()
    tokenizer = processor.tokenizer
    tokens = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in SPECIAL.items()}
    config = transformers.Qwen2_5_VLConfig(
        vision_config=TOWER,
        text_config={**TEXT, "vocab_size": len(tokenizer)},
        image_token_id=tokens["image_pad_token_id"],
        video_token_id=tokens["video_pad_token_id"],
        vision_start_token_id=tokens["vision_start_token_id"],
        vision_end_token_id=tokens["vision_end_token_id"],
    )
    build = partial(transformers.AutoModelForImageTextToText.from_config, config, dtype=getattr(torch, settings.dtype))
    return Candidate(
        "qwen2_5_vl",
        "Qwen2.5-VL, small, random weights",
        build,
        lambda text: tokenizer(text)["input_ids"],
        len(tokenizer),
        partial(collated, processor),
    )


def processor_of() -> Any:
    """As transformers has it for the family, with a tokenizer whose tokens are bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL["endoftext"],
        eos_token=SPECIAL["im_end"],
        additional_special_tokens=[token for name, token in SPECIAL.items() if name not in ("endoftext", "im_end")],
        padding_side="left",
    )
    pixels = {"patch_size": PATCH, "size": {"shortest_edge": (4 * PATCH) ** 2, "longest_edge": (16 * PATCH) ** 2}}
    try:
        images = transformers.Qwen2VLImageProcessor(**pixels)
        videos = transformers.Qwen2VLVideoProcessor(**pixels, cap_pixels_per_frame=False)
    except ImportError as error:
        reason = f"the processor lacks a package, such as torchvision ({str(error).strip().splitlines()[0]})"
        raise Unacceptable("MODEL", "qwen2_5_vl", reason) from None
    return transformers.Qwen2_5_VLProcessor(images, fast, videos, chat_template=TEMPLATE)


def conversations(settings: Settings) -> list[list[dict[str, Any]]]:
    """A question and its answer about each of the drawn images."""
    names = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    found = []
    for at in range(EXAMPLES):
        colour, shape = names[at % len(names)]
        image = drawn(shape, colour, *SIZES[at // len(names) % len(SIZES)], seed=settings.seed * EXAMPLES + at)
        question = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
        answer = [{"type": "text", "text": f"A {colour} {shape}."}]
        found.append([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
    return found


def collated(processor: Any, examples: list[list[dict[str, Any]]]) -> dict[str, torch.Tensor]:
    """What the processor makes of them, with labels of the answers alone."""
    batch = processor.apply_chat_template(
        examples, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True}
    )
    ids = batch["input_ids"]
    answer = torch.tensor(processor.tokenizer(ANSWERER)["input_ids"])
    starts = (ids.unfold(1, len(answer), 1) == answer).all(-1).int().argmax(-1) + len(answer)
    batch["labels"] = ids.masked_fill(torch.arange(ids.shape[1]) < starts[:, None], -100)
    return dict(batch)
