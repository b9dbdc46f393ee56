"""How far a code takes apart what varies in the data: figures of codes S (n, r) and of labels or attributes.

Wherever something is chosen (a factor, a threshold, a probe's weights), it is chosen on the training part and reported
on another. Pass tensors or arrays; a tensor is detached. A coarse label that a network was trained on predicts finer
attributes by itself, so plain AUC must be read against that floor: `groups` asks within each coarse class, where the
floor is 1/2."""

from .bootstrap import Interval, interval
from .codes import Stability, relative_error, stability, zeros
from .gaps import DCI, dci, dci_of_importance, mig, sap
from .people import nearest, one_shot, pair_auc, top_purity
from .probes import FactorsNeeded, Probe, factors_needed, linear_probe
from .roc import SingleFactor, auc, one_hot, single_factor_auc

__all__ = [
    "DCI",
    "FactorsNeeded",
    "Interval",
    "Probe",
    "SingleFactor",
    "Stability",
    "auc",
    "dci",
    "dci_of_importance",
    "factors_needed",
    "interval",
    "linear_probe",
    "mig",
    "nearest",
    "one_hot",
    "one_shot",
    "pair_auc",
    "relative_error",
    "sap",
    "single_factor_auc",
    "stability",
    "top_purity",
    "zeros",
]
