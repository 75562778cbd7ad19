"""The native ops by the names of ``kernels/reference.py``."""

from glmlocal.kernels.cpu.attention import paged_attention
from glmlocal.kernels.cpu.linear import experts_ffn, linear, swiglu_ffn
from glmlocal.kernels.cpu.steps import rms_norm, rope_store_, router_topk

__all__ = ["experts_ffn", "linear", "paged_attention", "rms_norm", "rope_store_", "router_topk", "swiglu_ffn"]
