"""The few numbers of the cost model that are neither counted nor stated by hardware, in one place.

None is fitted to a run. `benchmarks/forecast.py --fit` chooses those of `Constants` that say so, by
least absolute deviations over published runs of whole sources, and prints how well each source is
foretold by the others alone (leave-one-source-out).
"""

from dataclasses import dataclass

ACHIEVABLE = 0.75
"""Best matrix product as a share of the peak where nobody published one: the middle of those who did
(0.51 MI300X to 0.97 Gaudi2; hardware.toml)."""


@dataclass(frozen=True)
class Constants:
    """Of the cost model; dimensionless unless the name says a unit."""

    # --- compute
    matmul: float = 0.9
    """16-bit matrix products of a model, as a share of the best published product. Fitted."""
    matmul_tf32: float = 0.9
    """Likewise in tf32. Fitted."""
    matmul_fp32: float = 0.93
    """fp32 products on the vector units, as a share of the peak, which they nearly reach. Fitted."""
    matmul_fp8: float = 0.8
    """Likewise in fp8 and fp4, where scales cost as well. Fitted."""
    flash: float = 0.6
    """Fused attention, as a share of the best published product. Fitted."""
    flash_new: float = 0.75
    """Likewise by kernels written for devices with fp8 (FlashAttention-3, arXiv 2407.08608: on an H100
    620 forward and 560 backward of 794 TFLOP/s; cuDNN 9), which fused stacks call. Fitted."""
    flash_width: float = 32.0
    """Softmax and bookkeeping of fused attention, in columns of a head: the share of a head of size d
    that is products is d / (d + this). Fitted."""
    traffic: float = 1.0
    """Times that a product's operands and result cross the memory bus. Fitted."""
    passes: float = 2.0
    """Times that kept activations cross the memory bus forward, twice as often backward: written and
    read once; read, and their gradients read and written. Fitted."""
    early_passes: float = 4.0
    """Likewise in frameworks until 2021, whose mixed precision casts to and fro. Fitted."""
    unfused_passes: float = 9.0
    """Likewise where a graph runs one kernel an operation (TensorFlow 1 without XLA): counted from
    google-research/bert: GELU 18 values read or written for each of its own, LayerNorm 20, dropout 10,
    scores 16, in all 196 widths of h, where 22 are kept."""
    launches: int = 20
    """Kernels of a layer's forward pass, of which a backward pass has twice as many."""
    launch_s: float = 6e-6
    """A kernel launch from Python; the host limits small layers."""
    optimizer_bytes: float = 38.0
    """AdamW for one value: reads weight, gradient, two moments; writes weight, moments and a 16-bit
    copy; reads the gradient once more for its norm and clears it: 16 + 12 + 2 + 4 + 4."""
    early_optimizer_bytes: float = 144.0
    """Likewise without fusion: twelve kernels that read two float32 values and write one."""
    usable_memory: float = 0.92
    """Of a device's memory: the CUDA context, the collectives' own buffers (about 1 GiB) and gaps of
    the allocator take the rest."""
    # --- links
    link_share: float = 0.79
    """Bus bandwidth of an all-reduce inside a node over the link's: nccl-tests, 122 of 150 (V100),
    235 of 300 (A100), 366 of 450 (H200 ring), 682 of 900 GB/s (B200 ring)."""
    node_share: float = 0.95
    """Likewise between nodes: 192 of 200 (DGX A100), 380 of 400 GB/s (DGX H100); NVIDIA GTC24 s62129."""
    link_hop_s: float = 2.5e-6
    """One hop of a ring inside a node: 44 us for 32 KiB on 8 A100 (14 hops of an all-reduce)."""
    node_hop_s: float = 10e-6
    """One hop of a ring between nodes. Fitted."""
    tree_hop_s: float = 25e-6
    """One level of a tree between nodes, up or down: 1 MiB all-reduces take 50 us longer with every
    doubling of the nodes, 129 us on 4 and 552 us on 1,024 (H100, GTC24 s62129)."""
    contention: float = 0.19
    """Share of a hidden transfer inside a node that still slows compute down (kernels of the collective
    occupy multiprocessors and memory): 18.9% in the mean over A100, H100, MI210, MI250 (arXiv
    2507.03114). A slower one takes as much for its bytes, not for its time. Fitted."""
    jitter: float = 0.01
    """Standard deviation of a rank's step time, relative; the slowest of N ranks is waited for. Fitted."""
    jitter_s: float = 0.002
    """The part of it that does not grow with the step: the host, its operating system. Fitted."""
    step_s: float = 0.003
    """Of the host in every step: learning rate, logging, clearing gradients."""


PRIOR = Constants()
"""Counted or read before anything was fitted; what fitting is pulled towards."""

DEFAULT = Constants(
    matmul=0.867, matmul_tf32=1.0, matmul_fp32=1.0, matmul_fp8=0.9, flash=0.516, flash_new=0.85,
    flash_width=28.6, traffic=1.21, passes=2.32, early_passes=4.0, node_hop_s=10e-6,
    contention=0.197, jitter=0.0163, jitter_s=0.00241,
)  # fmt: skip
"""`python benchmarks/forecast.py --fit`, 2026-11-23: 506 rows of 8 sources."""

UNCERTAINTY = 0.133
"""Two of three published rows lie within this of their forecast when their source was held out
(`--folds`: p68_absolute_percentage_error 13.3)."""
