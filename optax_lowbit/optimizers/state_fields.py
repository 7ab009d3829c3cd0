"""Which fields of optax's states are moments, by name, and whether they are ever negative.

A moment is an average or a sum of gradients, or of their squares, that is refreshed in every step,
so that an error of rounding is forgotten or drowned. What is no moment stays in float32:

* iterates, and sums from which iterates are computed anew (`z` of schedule-free, `s` and
  `grad_sum_sq` of MADGRAD, COCOB): an error there is an error of the parameters;
* snapshots (`x0`, `params0`, `init_params`), the last gradient (`previous_gradient`, `g` of Adan),
  gradients that are being accumulated, the memory of a quasi-Newton method: they are taken as
  exact;
* `grad_sum` of Prodigy and D-Adaptation, which the learning rate is estimated from, and the step
  sizes of Rprop, which change by factors smaller than the distance of two codes.
"""

from collections.abc import Mapping
from typing import Literal

from optax_lowbit.moments.storage import Moment
from optax_lowbit.quant import QuantSpec

Kind = Literal["signed", "nonnegative"]
Fields = Mapping[str, Kind | None]

KINDS: dict[str, Kind] = {
    "mu": "signed",  # Adam and its relatives, Lion, Muon, Sophia
    "m": "signed",  # Adan, simplified AdEMAMix
    "m1": "signed",  # AdEMAMix
    "m2": "signed",
    "trace": "signed",  # SGD
    "momentum": "signed",
    "ema": "signed",  # Signum
    "exp_avg": "signed",  # Prodigy, D-Adaptation, MoMo
    "nu": "nonnegative",  # Adam and its relatives, RMSProp
    "nu_max": "nonnegative",  # AMSGrad
    "n": "nonnegative",  # Adan, simplified AdEMAMix
    "v": "nonnegative",  # Adafactor
    "v_row": "nonnegative",
    "v_col": "nonnegative",
    "e_g": "nonnegative",  # Adadelta
    "e_x": "nonnegative",
    "exp_avg_sq": "nonnegative",
    "sum_of_squares": "nonnegative",  # Adagrad
}
# Where a state means something else by a name.
EXCEPTIONS: dict[tuple[str, str], Kind | None] = {
    ("ScaleByAdanState", "v"): "signed",  # of differences of gradients
    ("SophiaState", "nu"): "signed",  # of the diagonal of a Hessian
    ("ScaleBySM3State", "mu"): "nonnegative",  # lists of vectors
    ("ScaleBySM3State", "nu"): "signed",
    ("MechanicState", "m"): None,  # of a few learning rates
    ("MechanicState", "v"): None,
}


def kind_of(state: str, field: str, fields: Fields) -> Kind | None:
    """What a field of a state is, ``fields`` first; None: no moment."""
    if field in fields:
        return fields[field]
    return EXCEPTIONS.get((state, field), KINDS.get(field))


def moments_by_name(fields: Fields, specs: Mapping[Kind, QuantSpec | None]) -> dict[str, Moment]:
    """All fields that may be quantized."""
    kinds = {name: kind for name, kind in {**KINDS, **fields}.items() if kind is not None}
    return {name: Moment(specs[kind], kind == "nonnegative") for name, kind in kinds.items()}


def checked_fields(fields: Fields | None) -> Fields:
    """``fields`` as a dict; raises where it is none.

    Raises:
      TypeError, ValueError: If ``fields`` is no mapping of names to kinds.
    """
    if fields is None:
        return {}
    if not isinstance(fields, Mapping) or not all(isinstance(name, str) for name in fields):
        raise TypeError(f"fields must be a mapping by field name, got {fields!r}")
    for name, kind in fields.items():
        if kind not in ("signed", "nonnegative", None):
            raise ValueError(
                f"fields[{name!r}] must be 'signed', 'nonnegative' or None, got {kind!r}"
            )
    return dict(fields)
