"""verify --against: what a quantised model lost, on text: its logits, its perplexity, and each of its layers.

Both models are in memory: one and a half times what ORIGINAL needs, twice where MODEL is no int8.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from npu_patch import devices
from npu_patch.checkpoints.safetensors_file import BadCheckpoint
from npu_patch.commands.console.result import CommandError, Result, named
from npu_patch.commands.console.terminal import Steps, steps, table
from npu_patch.commands.subject import models
from npu_patch.commands.subject.stored_folder import folder_of
from npu_patch.commands.verify.quality.layers import Differing, LayerError, by_kind, costliest, differing, watched
from npu_patch.commands.verify.quality.logits import LogitsError
from npu_patch.commands.verify.quality.stored import Stored, in_int8, loaded, stored
from npu_patch.commands.verify.quality.text import Tokens, tokens_in

TOKENS, LENGTH = 2048, 512
LOGITS_ERROR, PERPLEXITY_RATIO = 0.1, 1.03
COSTLIEST = 10


def run(options: argparse.Namespace) -> Result:
    _check(options)
    tokens = options.tokens or TOKENS
    device = models.device_of(options)
    try:
        original = stored(folder_of(options.against, "--against"), "--against")
        other = stored(folder_of(options.model), "MODEL")
    except BadCheckpoint as error:
        raise CommandError(str(error)) from error
    _require_comparable(original, other)
    vocabulary = other.text_config.vocab_size
    text = tokens_in(other.folder, options.text, vocabulary, tokens)
    length = _length_for(options.length, original)
    exact = loaded(original, "auto", device)
    found = loaded(other, exact.dtype, device)
    computing = in_int8(device, found) if other.w8a8 else contextlib.nullcontext()
    with computing, steps("comparing", options.json) as progress, torch.inference_mode():
        differ = differing(exact, found)
        logits, errors = _compared(exact, found, differ, list(text.pieces(length)), progress)
    if not logits.original_finite:
        raise CommandError(f"{original}: its own logits are infinite or not a number")
    content = _content(options, logits, errors, differ)
    content |= {"device": devices.described(device.type), "dtype": str(exact.dtype).removeprefix("torch.")}
    content |= {"text": text.described, "length": length, "notes": _notes(text, tokens, differ, errors)}
    return Result(content, lambda: _shown(content), content["fine"])


def _check(options: argparse.Namespace) -> None:
    for option, given in (("--dtype", options.dtype), ("--seeds", options.seeds)):
        if given is not None:
            raise CommandError(f"{option} {given}: with --against, both models are as they are stored; leave it out")
    limits = {
        ("--tokens", 2): options.tokens,
        ("--length", 2): options.length,
        ("--max-logits-error", 0): options.max_logits_error,
        ("--max-perplexity-ratio", 0): options.max_perplexity_ratio,
    }
    for (option, least), given in limits.items():
        if given is not None and not given >= least:
            raise CommandError(f"{option} {given}: accepted are numbers from {least}")


def _require_comparable(original: Stored, other: Stored) -> None:
    if original.w8a8 is not None:
        raise CommandError(f"{original} is quantised itself: a model in floating point is accepted")
    ours, theirs = original.text_config, other.text_config
    for name in ("model_type", "vocab_size", "num_hidden_layers", "hidden_size"):
        wanted, given = getattr(ours, name, None), getattr(theirs, name, None)
        if wanted != given:
            raise CommandError(f"{other} is no copy of {original}: {name} is {given}, not {wanted}")


def _length_for(given: int | None, original: Stored) -> int:
    limit = getattr(original.text_config, "max_position_embeddings", None) or sys.maxsize
    if given is not None and given > limit:
        raise CommandError(f"--length {given}: the model's configuration allows for {limit} tokens")
    return given or min(LENGTH, limit)


def _compared(
    original: Any, other: Any, differ: Differing, pieces: list[Tensor], progress: Steps
) -> tuple[LogitsError, list[LayerError]]:
    logits = LogitsError()
    device = original.device
    progress.of(len(pieces))
    with watched(original, other, differ.layers) as errors:
        for piece in pieces:
            ids = piece.to(device)
            try:
                expected = original(input_ids=ids, use_cache=False).logits[0]
                found = other(input_ids=ids, use_cache=False).logits[0]
            except Exception as error:
                raise CommandError(f"the models do not run on {ids.shape[1]} tokens: {named(error)}") from error
            logits.add(expected, found, ids[0])
            progress.done()
    return logits, errors


def _content(
    options: argparse.Namespace, logits: LogitsError, errors: list[LayerError], differ: Differing
) -> dict[str, Any]:
    most = LOGITS_ERROR if options.max_logits_error is None else options.max_logits_error
    ratio = PERPLEXITY_RATIO if options.max_perplexity_ratio is None else options.max_perplexity_ratio
    failures = [] if logits.finite else ["the model's logits are infinite or not a number"]
    if not logits.relative <= most:
        failures.append(f"the logits' relative error is {logits.relative:.4f}; accepted is {most} (--max-logits-error)")
    if not logits.perplexity_ratio <= ratio:
        failures.append(
            f"the perplexity is {logits.perplexity_ratio:.4f} times the original's; accepted is {ratio} "
            "(--max-perplexity-ratio)"
        )
    return {
        "model": options.model,
        "original": options.against,
        "fine": not failures,
        "failures": failures,
        "tokens": logits.tokens,
        "logits": {
            "relative_error": logits.relative,
            "largest_error": logits.largest_relative,
            "same_argmax": logits.agreeing / logits.tokens,
            "kl": logits.kl / logits.tokens,
            "largest_kl": logits.largest_kl,
        },
        "perplexity": {
            "original": logits.original_perplexity,
            "model": logits.perplexity,
            "ratio": logits.perplexity_ratio,
        },
        "kinds": [each.as_content() for each in by_kind(errors)],
        "layers": [each.as_content() for each in costliest(errors)],
        "equal": differ.equal,
    }


def _notes(text: Tokens, wanted: int, differ: Differing, errors: list[LayerError]) -> list[str]:
    notes = []
    if len(text.ids) < wanted:
        notes.append(f"the text has {len(text.ids)} tokens, not {wanted}")
    if differ.others:
        notes.append(
            f"{len(differ.others)} norms or embeddings differ too ({differ.others[0]}): the layers behind them are "
            "measured on inputs of the original, which are not theirs"
        )
    unused = [each.name for each in errors if not each.calls]
    if unused:
        notes.append(f"{len(unused)} layers that differ were not called as such ({unused[0]}): measured in the logits")
    return notes


def _shown(content: dict[str, Any]) -> Iterator[Any]:
    yield f"{content['model']} against {content['original']}, {content['dtype']} on {content['device']}"
    yield f"{content['tokens']} tokens, {content['length']} at a time, of {content['text']}"
    yield from (f"note: {note}" for note in content["notes"])
    yield ""
    logits, perplexity = content["logits"], content["perplexity"]
    rows = [
        ("logits: error, relative", f"{logits['relative_error']:.5f}"),
        ("logits: largest error of one, relative to their root mean square", f"{logits['largest_error']:.5f}"),
        ("tokens with the same likeliest successor", f"{logits['same_argmax']:.2%}"),
        ("KL divergence, mean (nats)", f"{logits['kl']:.3g}"),
        ("KL divergence, largest", f"{logits['largest_kl']:.3g}"),
        ("perplexity of the original", f"{perplexity['original']:.4f}"),
        ("perplexity of the model", f"{perplexity['model']:.4f}"),
        ("ratio of the two", f"{perplexity['ratio']:.5f}"),
    ]
    yield table("", ("what", "value"), rows, numbers=("value",))
    if content["layers"]:
        yield from (_layers(title, content[key]) for title, key in _TABLES)
    yield f"{content['equal']} modules are equal to the original's"
    yield from (f"FAIL: {failure}" for failure in content["failures"])
    if content["fine"]:
        yield "within the limits"


_TABLES = (("Kinds of layers, the costliest first", "kinds"), ("Layers that cost most", "layers"))


def _layers(title: str, rows: list[dict[str, Any]]) -> Any:
    shown = rows[:COSTLIEST] if title == _TABLES[1][0] else rows
    columns = ("layer", "int8", "error", "of its weights")
    cells = [
        (each["name"], "yes" if each["int8"] else "no", f"{each['error']:.5f}", f"{each['weights_error']:.5f}")
        for each in shown
    ]
    return table(title, columns, cells, numbers=("error", "of its weights"))
