"""The loss of a language model, without its logits: neither they nor their gradient ever exist.

Rebinds    `fixed_cross_entropy` of transformers' losses, which they look up at call time; `forward` of the models, with
           one that runs the original and has its head return logits that wait (npu_patch/waiting/logits.py); in trl,
           `selective_log_softmax` and `entropy_from_logits` wherever a module holds them; `__call__` of the
           `LabelSmoother` of transformers' Trainer.
To         one autograd function over chunks of tokens (npu_patch/ops/chunked_loss.py), with `npu_cross_entropy_loss`
           for each chunk.
Not when   the model's loss is not one that is known, or is computed in its forward; the head is not made of linear
           layers, is sharded, hooked, parametrized or compiled; under compilation and transforms of torch.func. Without
           labels, logits wait only where trl's functions or a LabelSmoother may take them. Whoever else looks at the
           logits gets them as the original makes them, with a count of who it was.
Delete     when transformers' models give their loss hidden states and head instead of logits.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType

from npu_patch.ops.readings import AsNamed, NotRead
from npu_patch.ops.token_losses import TOKEN_LOSSES
from npu_patch.patches.loss import forward, losses, of_tokens, smoothing
from npu_patch.patches.patch import Context, Patch, Replacement
from npu_patch.sites.late_imports import is_within
from npu_patch.sites.sites import Site

TRL = "trl"


def find(module: ModuleType) -> Iterable[Site]:
    if module.__name__ == smoothing.MODULE:
        return smoothing.find(module)
    return of_tokens.find(module) if is_within(module.__name__, (TRL,)) else forward.find(module)


def _part(site: Site) -> ModuleType:
    if not isinstance(site.owner, ModuleType):
        return smoothing if site.name == smoothing.CALL else forward
    return losses if site.name == losses.CROSS_ENTROPY else of_tokens


def read_site(site: Site) -> AsNamed | NotRead:
    return _part(site).read_site(site)


def bind_site(site: Site, reading: AsNamed, context: Context) -> Replacement:
    return _part(site).bind_site(site, reading, context)


PATCH = Patch(
    "cross_entropy",
    "loss",
    TOKEN_LOSSES,
    find,
    read_site,
    bind_site,
    losses.registered,
    tunable=False,
    libraries=(TRL, smoothing.MODULE),
    around=True,
)
