"""What a plan assumes of the machines: figures of vendors' data sheets, none of them measured here.

Checked in November 2026 against pages that quote the sheets "NVIDIA H100 Tensor Core GPU" (SXM: bf16 1,979 TFLOPS with
sparsity, so 989 dense; 3.35 TB/s), "NVIDIA H200 Tensor Core GPU" (the same with 141 GB at 4.8 TB/s), and "NVIDIA A100
Tensor Core GPU" (bf16 312 TFLOPS dense, 624 with sparsity; 80 GB at 2,039 GB/s). Links reach less than their sheets
say: 370 to 380 of 450 GB/s from one H100 to another (NVIDIA/nccl, issue 1264).
"""

from typing import NamedTuple

from routing.errors import UserError


class Gpu(NamedTuple):
    """One accelerator and its links. Rates are per GPU and of one direction."""

    name: str
    flops: dict[str, float]  # peak of dense matrix products by precision, FLOP/s
    memory: float  # bytes
    bandwidth: float  # of its memory, bytes/s
    node_link: float  # to the other GPUs of its node, bytes/s
    network: float  # its share of the node's network, bytes/s
    node: int  # GPUs that a node holds
    source: str
    cuda: bool = True  # else a CPU's core


# Of the memory; the rest is left to the CUDA context, NCCL's buffers and fragmentation. A guess.
USABLE = 0.92

# fp32 is the plain float32 unit: torch uses TF32 for matrix products only if told to. Vendors give bf16 with
# sparsity, which is twice the dense rate that stands here.
GPUS = {
    "h100": Gpu(
        "H100 SXM, 80 GB",
        {"bf16": 989e12, "fp32": 67e12},
        memory=80e9,
        bandwidth=3.35e12,
        node_link=450e9,
        network=50e9,
        node=8,
        source="NVIDIA H100 and DGX H100 data sheets: NVLink 900 GB/s both ways, a 400 Gb/s adapter per GPU",
    ),
    "h200": Gpu(
        "H200 SXM, 141 GB",
        {"bf16": 989e12, "fp32": 67e12},
        memory=141e9,
        bandwidth=4.8e12,
        node_link=450e9,
        network=50e9,
        node=8,
        source="NVIDIA H200 and DGX H200 data sheets: NVLink 900 GB/s both ways, a 400 Gb/s adapter per GPU",
    ),
    "a100": Gpu(
        "A100 SXM, 80 GB",
        {"bf16": 312e12, "fp32": 19.5e12},
        memory=80e9,
        bandwidth=2.039e12,
        node_link=300e9,
        network=25e9,
        node=8,
        source="NVIDIA A100 and DGX A100 data sheets: NVLink 600 GB/s both ways, a 200 Gb/s adapter per GPU",
    ),
    "cpu": Gpu(
        "one CPU core",
        {"bf16": 300e9, "fp32": 150e9},
        memory=8e9,
        bandwidth=10e9,
        node_link=5e9,
        network=1e9,
        node=8,
        source="orders of magnitude for a core with AVX-512 near 2.4 GHz, no data sheet: two multiply-adds of 16 "
        "floats a cycle",
        cuda=False,
    ),
}


def find_gpu(kind: str) -> Gpu:
    """The figures of a kind.

    Raises:
        UserError: for a kind that isn't known.
    """
    if kind not in GPUS:
        raise UserError(f"--gpu {kind} isn't known; choose one of {', '.join(GPUS)}")
    return GPUS[kind]
