"""The loop that runs a kernel's body on every chunk of a leaf, and what it knows of operands."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from optax_lowbit.kernels.pallas_tpu.geometry import CHUNK_COLUMNS, CHUNK_ROWS, Chunk, Grid


@dataclasses.dataclass(frozen=True, eq=False)
class Buffer:
    """An array of a kernel's: ``source`` is read, ``target`` written; both: in place."""

    tile: pl.BlockSpec
    source: jax.Array | None = None
    target: jax.ShapeDtypeStruct | None = None


class Refs(NamedTuple):
    """A tile of a :class:`Buffer`, inside of a kernel."""

    source: Any
    target: Any


@dataclasses.dataclass(frozen=True)
class Operand:
    """Buffers that belong together, scratch, and what is made of their references in a kernel."""

    buffers: tuple[Buffer, ...]
    bind: Callable[..., Any]
    scratch: tuple[Any, ...] = ()


class View:
    """An operand inside of a kernel."""

    def start(self) -> None:
        """Before the chunks of a tile."""

    def finish(self) -> None:
        """After them."""


def over_chunks(
    name: str,
    grid: Grid,
    operands: Sequence[Operand],
    body: Callable[..., None],
    *,
    independent: bool = True,
    interpret: bool = False,
) -> list[jax.Array]:
    """Runs ``body(chunk, *views)`` on every chunk of a leaf.

    Args:
      name: The kernel's, in profiles.
      grid: From :func:`geometry.plan`.
      operands: What the body works on.
      body: Reads and writes views of the operands, in their order.
      independent: Whether tiles may be processed in any order, and by two cores; otherwise those
        of one batch element are processed row by row.
      interpret: Run it on any platform, slowly.

    Returns:
      The arrays that were written, in the order of the operands' buffers.
    """
    buffers = [buffer for operand in operands for buffer in operand.buffers]
    read = [buffer for buffer in buffers if buffer.source is not None]
    written = [buffer for buffer in buffers if buffer.target is not None]

    def kernel(*refs):
        sources, rest = iter(refs[: len(read)]), refs[len(read) :]
        targets, scratch = iter(rest[: len(written)]), iter(rest[len(written) :])
        views = [
            operand.bind(
                *(
                    Refs(next(sources) if b.source is not None else None,
                         next(targets) if b.target is not None else None)
                    for b in operand.buffers
                ),
                *(next(scratch) for _ in operand.scratch),
            )
            for operand in operands
        ]  # fmt: skip
        _run_tile(grid, views, body)

    within = pltpu.PARALLEL if independent else pltpu.ARBITRARY
    return pl.pallas_call(
        kernel,
        grid=grid.turns,
        in_specs=[buffer.tile for buffer in read],
        out_specs=[buffer.tile for buffer in written],
        out_shape=[buffer.target for buffer in written],
        scratch_shapes=[shape for operand in operands for shape in operand.scratch],
        input_output_aliases={
            i: written.index(buffer) for i, buffer in enumerate(read) if buffer in written
        },
        compiler_params=pltpu.CompilerParams(dimension_semantics=(pltpu.PARALLEL, within, within)),
        interpret=interpret,
        name=name,
    )(*(buffer.source for buffer in read))


def _run_tile(grid: Grid, views: list[Any], body: Callable[..., None]) -> None:
    """The body on whole chunks, in loops, and on those that reach beyond the leaf's columns."""
    # Asked for here as the interpreter knows no answer within a branch.
    is_last = pl.program_id(2) == grid.turns[2] - 1
    in_last, rest = divmod(grid.last_width, CHUNK_COLUMNS)
    whole = in_last
    if grid.turns[2] > 1:
        whole = jnp.where(is_last, in_last, grid.width // CHUNK_COLUMNS)

    def row_of_chunks(i, carry):
        first_row = pl.multiple_of(i * CHUNK_ROWS, CHUNK_ROWS)

        def whole_chunk(number, carry):
            body(Chunk(first_row, number, CHUNK_COLUMNS), *views)
            return carry

        if grid.columns >= CHUNK_COLUMNS:
            jax.lax.fori_loop(0, whole, whole_chunk, None)
        if rest:
            pl.when(is_last)(lambda: body(Chunk(first_row, in_last, rest), *views))
        return carry

    for view in views:
        view.start()
    jax.lax.fori_loop(0, grid.row_chunks, row_of_chunks, None)
    for view in views:
        view.finish()
