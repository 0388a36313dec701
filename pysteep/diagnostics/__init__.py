"""Looking inside a network: its Hessian's spectrum, the balance of its factors, its sparsity, and what fine-tuning changed."""

from ._balance import BalanceMonitor, BalanceReport, balance_report
from ._checkpoints import CheckpointComparison, compare_checkpoints
from ._lanczos import NoConvergence
from ._pruning import prune_, remove_masks
from ._sparsity import SparsityReport, sparsity_report
from ._spectrum import Spectrum, hessian_spectrum

__all__ = [
    "BalanceMonitor",
    "BalanceReport",
    "CheckpointComparison",
    "NoConvergence",
    "SparsityReport",
    "Spectrum",
    "balance_report",
    "compare_checkpoints",
    "hessian_spectrum",
    "prune_",
    "remove_masks",
    "sparsity_report",
]
