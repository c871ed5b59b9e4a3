"""The loss of a language model, without its logits: neither they nor their gradient ever exist.

Rebinds    entries of transformers' `LOSS_MAPPING`, which models look up at call time; `forward` of the models, with one
           that runs the original and has its head return logits that wait (npu_patch/waiting/logits.py); in trl,
           `selective_log_softmax` and `entropy_from_logits` wherever a module holds them.
To         one autograd function over chunks of tokens (npu_patch/ops/chunked_loss.py), with `npu_cross_entropy_loss`
           for each chunk.
Not when   the model's loss is not one that is known, or is computed in its forward; the head is not made of linear
           layers, is sharded, hooked, parametrized or compiled; under compilation and transforms of torch.func. Without
           labels, logits wait only where trl's functions may take them. Whoever else looks at the logits gets them as
           the original makes them, with a count of who it was.
Delete     when transformers' models give their loss hidden states and head instead of logits.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from types import ModuleType

from npu_patch.ops.readings import NotRead
from npu_patch.ops.token_losses import IMPLEMENTATIONS
from npu_patch.patches.loss import forward, losses, of_tokens
from npu_patch.patches.patch import Context, Patch, Replacement
from npu_patch.sites.sites import Site, is_within

TRL = "trl"
REGISTRY = "LOSS_MAPPING"


def find(module: ModuleType) -> Iterable[Site]:
    yield from of_tokens.find(module) if is_within(module.__name__, (TRL,)) else forward.find(module)


def registered() -> Iterable[Site]:
    from transformers.loss import loss_utils

    for name, function in getattr(loss_utils, REGISTRY, {}).items():
        yield Site(loss_utils.LOSS_MAPPING, name, function, f"{REGISTRY}[{name!r}]")


def replace(site: Site, context: Context) -> Replacement | NotRead:
    if isinstance(site.owner, MutableMapping):
        return losses.replace(site, context)
    if isinstance(site.owner, ModuleType):
        return of_tokens.replace(site, context)
    return forward.replace(site, context)


PATCH = Patch(
    "cross_entropy", "loss", IMPLEMENTATIONS, find, replace, registered, tunable=False, libraries=(TRL,), around=True
)
