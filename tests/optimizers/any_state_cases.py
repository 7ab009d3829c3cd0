"""Every optimizer and transform that optax exports, and what `quantize_state` makes of it.

python -m tests.optimizers.any_state_cases   # prints the table of docs/any_optimizer.md
"""

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

import jax
import optax
import optax.contrib


@dataclasses.dataclass(frozen=True)
class OptaxCase:
    """One exported name.

    Attributes:
      name: In `optax` or `optax.contrib`.
      make: Makes the transform.
      signed, nonnegative: The moments that are in 4 bits by default.
      remark: What a user should know.
      refused: The beginning of the error at init, if it can't work.
      by_leaf: Whether leaves are stepped one by one.
      needs: Extra arguments of its update.
    """

    name: str
    make: Callable[[], Any]
    signed: tuple[str, ...] = ()
    nonnegative: tuple[str, ...] = ()
    remark: str = ""
    refused: str = ""
    by_leaf: bool = True
    needs: tuple[str, ...] = ()

    @property
    def moments(self) -> tuple[str, ...]:
        return (*self.signed, *self.nonnegative)

    @property
    def verdict(self) -> str:
        if self.refused:
            return "refused"
        return "works" if self.moments else "nothing to quantize"


def case(
    name: str, *arguments: Any, signed: str = "", nonnegative: str = "", **options
) -> OptaxCase:
    """A factory by name, called with ``arguments`` and ``keywords``, its result with ``then``."""
    keywords = options.pop("keywords", {})
    options["needs"] = tuple(options.pop("needs", "").split())
    then = options.pop("then", None)
    factory = vars(optax).get(name) or vars(optax.contrib)[name]

    def make():
        made = factory(*arguments, **keywords)
        return made if then is None else made(*then)

    return OptaxCase(
        name,
        make,
        tuple(signed.split()),
        tuple(nonnegative.split()),
        **options,
    )


def _half(count, *args, **kwargs):
    del args, kwargs
    return count % 2 == 0


def _labels(params):
    return jax.tree.map(lambda p: "a" if p.ndim > 1 else "b", params)


def _matrices(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


def _as_matrices(params):
    return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(), params)


MU_NU = {"signed": "mu", "nonnegative": "nu"}
OPTIMIZERS = [
    case("adabelief", 1e-2, **MU_NU),
    case("adadelta", 1e-2, nonnegative="e_g e_x"),
    case("adafactor", 1e-2, nonnegative="v", remark="rows and columns of factored matrices are "
         "small, and mostly stay in float32"),
    case("adagrad", 1e-2, nonnegative="sum_of_squares"),
    case("adam", 1e-2, **MU_NU, remark="`adam4bit` is faster"),
    case("adamax", 1e-2, **MU_NU),
    case("adamaxw", 1e-2, **MU_NU),
    case("adamw", 1e-2, **MU_NU, remark="`adamw4bit` is faster"),
    case("adan", 1e-2, signed="m v", nonnegative="n", remark="`g`, the last gradient, in float32"),
    case("amsgrad", 1e-2, signed="mu", nonnegative="nu nu_max"),
    case("fromage", 1e-2),
    case("lamb", 1e-2, **MU_NU),
    case("lars", 1e-2, signed="trace"),
    case("lbfgs", needs="value grad value_fn",
         remark="its memory is taken as exact; `value_fn` as in optax"),
    case("lion", 1e-3, signed="mu", remark="better rounded stochastically, see above"),
    case("nadam", 1e-2, **MU_NU),
    case("nadamw", 1e-2, **MU_NU),
    case("noisy_sgd", 1e-2, keywords={"key": 0}),
    case("novograd", 1e-2, by_leaf=False, signed="mu", remark="`nu` is one number a leaf"),
    case("optimistic_adam", 1e-2, **MU_NU),
    case("optimistic_adam_v2", 1e-2, **MU_NU),
    case("optimistic_gradient_descent", 1e-2),
    case("polyak_sgd", needs="value"),
    case("radam", 1e-2, **MU_NU),
    case("rmsprop", 1e-2, nonnegative="nu"),
    case("rprop", 1e-2, remark="step sizes change by less than the distance of two codes"),
    case("sgd", 1e-2, 0.9, signed="trace", remark="`sgd4bit` is faster"),
    case("sign_sgd", 1e-2),
    case("signum", 1e-2, signed="ema"),
    case("sm3", 1e-2, signed="nu", remark="`mu` is a few vectors"),
    case("yogi", 1e-2, **MU_NU),
    case("acprop", 1e-2, **MU_NU),
    case("ademamix", 1e-2, signed="m1 m2", nonnegative="nu"),
    case("adopt", 1e-2, **MU_NU),
    case("cocob", remark="its sums are the parameters in disguise"),
    case("dadapt_adamw", by_leaf=False, signed="exp_avg", nonnegative="exp_avg_sq"),
    case("dog", remark="the initial parameters, in float32"),
    case("dowg", remark="the initial parameters, in float32"),
    case("dpsgd", 1e-2, 1.0, 0.1, 0, 0.9, signed="trace"),
    case("galore", 1e-2, keywords={"rank": 48}, **MU_NU),
    case("madgrad", 1e-2, remark="its sums are the parameters in disguise"),
    case("momo", by_leaf=False, needs="value", signed="exp_avg"),
    case("momo_adam", by_leaf=False, needs="value", signed="exp_avg", nonnegative="exp_avg_sq"),
    case(
        "muon", 1e-2, signed="mu",
        remark="`muon4bit` has its own specs; no sharded axes on Explicit meshes, as in Optax",
    ),
    case(
        "prodigy", signed="exp_avg", nonnegative="exp_avg_sq",
        remark="no sharded axes on Explicit meshes, as in Optax",
    ),
    case("schedule_free_adamw", 1e-2, nonnegative="nu", remark="`z` is an iterate"),
    case("schedule_free_sgd", 1e-2, remark="`z` is an iterate"),
    case("simplified_ademamix", 1e-2, signed="m", nonnegative="n"),
    case("sophia", 1e-2, by_leaf=False, needs="obj_fn", signed="mu nu",
         remark="`nu` has both signs; `obj_fn` as in optax"),
]  # fmt: skip
TRANSFORMS = [
    case("adaptive_grad_clip", 0.1),
    case("add_decayed_weights", 0.1),
    case("add_noise", 0.1, 0.5, 0),
    case("apply_every", 2, remark="accumulated gradients are taken as exact"),
    case("centralize"),
    case("clip", 1.0),
    case("clip_by_block_rms", 1.0),
    case("clip_by_global_norm", 1.0),
    case("ema", 0.9, signed="ema"),
    case("freeze", {"matrix": True, "bias": False}),
    case("identity"),
    case("keep_params_nonnegative"),
    case("measure_with_ema", optax.tree.norm, 0.9, remark="what it measures belongs to no leaf"),
    case("monitor", {"norm": optax.tree.norm}),
    case("normalize_by_update_norm"),
    case("scale", 0.5),
    case("scale_by_adadelta", nonnegative="e_g e_x"),
    case("scale_by_adam", **MU_NU),
    case("scale_by_adamax", **MU_NU),
    case("scale_by_adan", signed="m v", nonnegative="n"),
    case("scale_by_amsgrad", signed="mu", nonnegative="nu nu_max"),
    case("scale_by_backtracking_linesearch", 3, needs="value grad value_fn"),
    case("scale_by_belief", **MU_NU),
    case("scale_by_distance_over_gradients", remark="the initial parameters, in float32"),
    case("scale_by_factored_rms", nonnegative="v"),
    case("scale_by_lbfgs", remark="its memory is taken as exact"),
    case("scale_by_learning_rate", 0.1),
    case("scale_by_lion", signed="mu"),
    case("scale_by_novograd", signed="mu", by_leaf=False),
    case("scale_by_optimistic_gradient"),
    case("scale_by_param_block_norm"),
    case("scale_by_param_block_rms"),
    case("scale_by_polyak", needs="value"),
    case("scale_by_radam", **MU_NU),
    case("scale_by_rms", nonnegative="nu"),
    case("scale_by_rprop", 1e-2),
    case("scale_by_rss", nonnegative="sum_of_squares"),
    case("scale_by_schedule", lambda count: 1.0 / (1 + count)),
    case("scale_by_sign"),
    case("scale_by_sm3", signed="nu"),
    case("scale_by_stddev", **MU_NU),
    case("scale_by_trust_ratio"),
    case("scale_by_yogi", **MU_NU),
    case("scale_by_zoom_linesearch", 3, needs="value grad value_fn"),
    case("set_to_zero"),
    case("snapshot", "norm", optax.tree.norm),
    case("stateless", lambda updates, params: updates),
    case("stateless_with_tree_map", lambda update, param: update),
    case("trace", 0.9, signed="trace"),
    case("zero_nans"),
    case("differentially_private_aggregate", 1.0, 0.1, 0, needs="batch"),
    case("hutchinson_estimator_diag_hessian", keywords={"random_seed": jax.random.key(0)},
         needs="obj_fn"),
    case("normalize"),
    case("reduce_on_plateau", needs="value"),
    case("scale_by_acprop", **MU_NU),
    case("scale_by_ademamix", signed="m1 m2", nonnegative="nu"),
    case("scale_by_adopt", **MU_NU),
    case("scale_by_cocob"),
    case("scale_by_galore", keywords={"rank": 48}, **MU_NU),
    case("scale_by_madgrad", 1e-2),
    case("scale_by_muon", keywords={"weight_dimension_numbers": _as_matrices},
         signed="mu", remark="matrices only, as in optax"),
    case("scale_by_simplified_ademamix", signed="m", nonnegative="n"),
]  # fmt: skip
FLATTENED = "give it the inside: `flatten(quantize_state(tx))`"
FAST = "give it the inside: `lookahead(quantize_state(tx), ...)`"
OUTSIDE = "better outside: the condition then selects codes"
WRAPPERS = [
    case("apply_if_finite", optax.adam(1e-2), 3, **MU_NU, by_leaf=False, remark=OUTSIDE),
    case("chain", optax.clip(1.0), optax.adam(1e-2), **MU_NU),
    case("conditionally_mask", optax.adam(1e-2), _half, **MU_NU, by_leaf=False, remark=OUTSIDE),
    case("conditionally_transform", optax.adam(1e-2), _half, **MU_NU, by_leaf=False,
         remark=OUTSIDE),
    case("flatten", optax.adam(1e-2), refused="the moment", remark=FLATTENED),
    case("inject_hyperparams", optax.adam, then=(1e-2,), **MU_NU),
    case("inject_stateful_hyperparams", optax.adam, then=(1e-2,), **MU_NU),
    case("lookahead", optax.adam(1e-2), 2, 0.5, refused="the moment", remark=FAST),
    case("masked", optax.adam(1e-2), _matrices, **MU_NU),
    case("multi_transform", {"a": optax.adam(1e-2), "b": optax.sgd(1e-2)}, _labels, **MU_NU),
    case("named_chain", ("clip", optax.clip(1.0)), ("adam", optax.adam(1e-2)), **MU_NU),
    case("partition", {"a": optax.adam(1e-2), "b": optax.sgd(1e-2)}, _labels, **MU_NU),
    case("selective_transform", optax.adam(1e-2), keywords={"freeze_mask": {"matrix": False,
         "bias": True}}, **MU_NU),
    case("with_extra_args_support", optax.adam(1e-2), **MU_NU),
    case("mechanize", optax.adam(1e-2), **MU_NU, remark="`x0` in float32"),
    case("sam", optax.adam(1e-2), optax.sgd(1e-2), **MU_NU, remark="`cache` in float32"),
    case("schedule_free", optax.adam(1e-2), 1e-2, **MU_NU, remark="`z` is an iterate"),
    case("split_real_and_imaginary", optax.adam(1e-2), **MU_NU),
    case("MultiSteps", optax.adam(1e-2), 2, **MU_NU, by_leaf=False, remark=OUTSIDE),
]  # fmt: skip
CASES = [*OPTIMIZERS, *TRANSFORMS, *WRAPPERS]

# Exported functions without annotation of what they return, and whether it is a transform.
UNANNOTATED = {
    "bias_correction": False,
    "dog": True,
    "dowg": True,
    "hutchinson_estimator_diag_hessian": True,
    "matrix_inverse_pth_root": False,
    "monitor": True,
    "scale_by_factored_rms": True,
    "schedule_free_eval_params": False,
    "sigmoid_binary_cross_entropy": False,
    "update_infinity_moment": False,
    "update_moment": False,
    "update_moment_per_elem_norm": False,
}


def exported() -> tuple[set[str], set[str]]:
    """What optax exports that returns a transform, and functions that do not say."""
    transforms, unannotated = {"MultiSteps"}, set()
    for module in (optax, optax.contrib):
        for name, value in vars(module).items():
            if name.startswith("_") or isinstance(value, type | types.ModuleType):
                continue
            if not callable(value) or typing.get_origin(value):
                continue
            returned = inspect.signature(value).return_annotation
            if returned is inspect.Signature.empty:
                unannotated.add(name)
            elif "GradientTransformation" in str(returned):
                transforms.add(name)
    return transforms, unannotated


def without_keys(tree):
    """Random keys as their data, which NumPy can compare."""

    def data(x):
        is_key = jax.dtypes.issubdtype(getattr(x, "dtype", None), jax.dtypes.prng_key)
        return jax.random.key_data(x) if is_key else x

    return jax.tree.map(data, tree)


def table() -> str:
    """The table of the documentation."""
    rows = ["| name | | in 4 bits | stepped | remark |", "| --- | --- | --- | --- | --- |"]
    for each in CASES:
        stepped = ("leaf by leaf" if each.by_leaf else "as a whole") if each.moments else ""
        moments = ", ".join(f"`{name}`" for name in each.moments)
        rows.append(f"| `{each.name}` | {each.verdict} | {moments} | {stepped} | {each.remark} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(table(), end="")
