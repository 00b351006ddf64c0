"""Attention with memory linear in the sequence, by any mask that can be described, on any device.

mask.py        which query sees which key, as a description         pattern.py   block patterns
kernel.py      one tile: (out, lse), and gradients from global ones  tiled.py     the same in plain PyTorch
pair.py        a chunk of queries against a chunk of keys            local.py     whole sequences, for autograd
hf.py          the hook into Hugging Face transformers

Over the ranks of the `context` axis (docs/context.md):

shard.py     which tokens a rank holds                  context.py   attention of a layer over them
segments.py  pieces merged, gradients added             ring.py, halo.py, allgather.py, ulysses.py
schemes.py   what each way costs, and which is taken
"""
