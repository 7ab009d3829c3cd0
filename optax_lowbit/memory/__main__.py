"""Whether fine-tuning a language model fits on a device.

python -m optax_lowbit.memory --model llama-7b --optimizer adamw4bit --device 24GB
python -m optax_lowbit.memory --config config.json --optimizer adamw --dtype bfloat16 --devices 8
python -m optax_lowbit.memory --model opt-1.3b --optimizer adamw4bit --device 24GB --batch 1 \
    --length 512 --target h100
"""

import argparse
import sys
from collections.abc import Sequence
from typing import get_args

import jax

from optax_lowbit.kernels.backends import Backend
from optax_lowbit.memory.architectures import ARCHITECTURES, architecture
from optax_lowbit.memory.sizes import DEVICES, parse_size
from optax_lowbit.memory.targets import TARGETS
from optax_lowbit.memory.training import OPTIMIZERS, plan_training

DTYPES = ("float32", "bfloat16", "float16")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m optax_lowbit.memory",
        description=(__doc__ or "").splitlines()[0],
        epilog="GB and GiB both are 2^30 bytes: a card that is sold with 24 GB has 24 GiB.",
    )
    model = result.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", help=f"one of {', '.join(ARCHITECTURES)}")
    model.add_argument("--config", metavar="PATH", help="a Hugging Face config.json")
    result.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        required=True,
        help="optax's has its moments in --dtype; adamw-float32 in float32",
    )
    result.add_argument(
        "--device", metavar="SIZE", help=f"does it fit? such as 24GB, or {', '.join(DEVICES)}"
    )
    result.add_argument("--dtype", choices=DTYPES, default="float32", help="of the parameters")
    result.add_argument(
        "--devices", type=_positive, default=1, help="all that is kept is split over so many"
    )
    result.add_argument(
        "--batch", type=_positive, help="examples in a step; compiles it, activations and all"
    )
    result.add_argument("--length", type=_positive, default=512, help="tokens of an example")
    result.add_argument(
        "--no-remat", action="store_true", help="keep all activations for the gradients"
    )
    result.add_argument(
        "--target",
        default="cpu",
        help=f"compile for one of {', '.join(TARGETS)}; several devices as 'tpu v5e:4x4', 'h100:2'",
    )
    result.add_argument(
        "--backend",
        choices=get_args(Backend),
        default="auto",
        help="kernels of low-bit optimizers; auto: the target's, if they take all parameters",
    )
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a plan; returns 0, or 1 if it does not fit. Exits with 2 if arguments are wrong."""
    command = parser()
    given = command.parse_args(arguments)
    try:
        model = architecture(given.model if given.config is None else given.config)
        available = None if given.device is None else parse_size(given.device)
        if given.target == "cpu" and given.devices > jax.config.jax_num_cpu_devices:  # pyright: ignore
            jax.config.update("jax_num_cpu_devices", given.devices)
        plan = plan_training(
            model,
            given.optimizer,
            dtype=given.dtype,
            devices=given.devices,
            batch=given.batch,
            length=given.length,
            remat=not given.no_remat,
            target=given.target,
            backend=given.backend,
        )
    except (ValueError, ModuleNotFoundError) as error:
        command.error(str(error))
    print(plan)
    if given.batch and given.target == "cpu" and given.dtype != "float32":
        print(f"a CPU computes {given.dtype} in float32; other targets have smaller temporaries")
    if available is None:
        return 0
    fit = plan.fits(available)
    print(fit)
    return 0 if fit else 1


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
