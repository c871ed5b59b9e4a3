"""Sequences over several devices (Ulysses): each rank has a part of every sequence, and attention gets whole ones.

    parallel = SequenceParallel(model, group)        # before DDP wraps the model
    with parallel.part(**batch) as part:             # the same batch on each rank of the group
        model(**part).loss.backward()                # the gradients' mean over the ranks is that of the whole batch
    parallel.close()

Around the attention that the model is configured with, patched or not, heads are exchanged for tokens and back:
`[B, S/P, N, D]` <-> `[B, S, N/P, D]`, an `all_to_all_single` each. Masks are made of the whole batch, once a step, by
transformers' own functions, so windows, packed sequences and padding mean what they mean on one device.
"""

from npu_patch.sequence_parallel.parallel import SequenceParallel

__all__ = ["SequenceParallel"]
