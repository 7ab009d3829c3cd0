"""The bytes of a log, and what is refused. Records here are made up: no step is compiled."""

import json
import struct
import zlib

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_lowbit import zo
from optax_lowbit.zo.replay.files import header_bytes
from optax_lowbit.zo.replay.records import decoded, encoded, no_settings
from optax_lowbit.zo.replay.runs import described
from tests.zo.replay.runs import momentum, sgd

BASE = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3, jnp.bfloat16)}
OPT = zo.zo_sgd(1e-2)


def made_up(step, setting=0.0):
    return np.float32([1.5 * step - 1, setting])


def write(path, steps, opt=OPT, base=BASE, key=7, first=0, settings=(0.0,) * 8, **options):
    state = opt.init(base, key)
    with zo.replay.Writer(path, opt, base, state, **options) as log:
        for step in range(first, steps):
            record = jnp.asarray(made_up(step, settings[step]))
            info = zo.StepInfo(jnp.float32(0), jnp.ones(1), record, jnp.bool_(True))
            log.append(base, state._replace(count=jnp.int32(step + 1)), info)
    return path.read_bytes()


def in_blocks(*blocks):
    return zo.blockwise(OPT, blocks)


# Of five steps: constant, and then by a schedule. And the bytes of each.
SETTINGS = 0.25, 0.25, 0.25, 0.5, 0.75
LENGTHS = 20, 16, 8, 20, 12


def test_layout_is_what_is_documented(tmp_path):
    """Taken apart here by hand."""
    data = write(tmp_path / "log", 5, settings=SETTINGS, digest_every=2)
    magic, length = struct.unpack_from("<8sI", data)
    assert magic == b"ZOLOG\r\n\x1a"
    run = json.loads(zlib.decompress(data[12 : 12 + length]))
    assert run["version"] == 3 and run["key"] == [0, 7] and run["prng"] == "threefry2x32"
    assert run["record_size"] == 2 and run["settings"] == 1 and run["digest_every"] == 2
    (crc,) = struct.unpack_from("<I", data, 12 + length)
    assert crc == zlib.crc32(data[: 12 + length])
    position, none, mark = 16 + length, b"", b"\xff\xff\xff\xff"
    begins = (
        mark + struct.pack("<If", 1, 0.25), mark + struct.pack("<I", 0), none,
        mark + struct.pack("<If", 1, 0.5), struct.pack("<f", 0.75),
    )  # fmt: skip
    for step, begin in enumerate(begins):
        payload = data[position:][: len(begin) + 4 + 4 * (step % 2)]
        assert payload.startswith(begin + struct.pack("<f", 1.5 * step - 1))
        crc = zlib.crc32(payload, crc)
        position += len(payload) + 4
        assert struct.unpack_from("<I", data, position - 4) == (crc,)
    assert position == len(data)


def test_what_is_read_is_what_was_written(tmp_path):
    settings = (*SETTINGS, 0.75, -0.0, 0.0)
    write(tmp_path / "log", 4, settings=settings)
    write(tmp_path / "log", 8, first=4, settings=settings)  # gone on with
    log = zo.replay.read(tmp_path / "log")
    assert log.steps == 8 and log.dropped == 0
    expected = np.stack([made_up(*pair) for pair in enumerate(settings)])
    assert log.records.tobytes() == expected.tobytes()


@pytest.mark.parametrize("number", [3, 31, 32, 65])
def test_any_number_of_settings(number, rng):
    """As of many blocks, each of which may skip a step."""
    settings, data = no_settings(number), b""
    records = rng.normal(size=(9, 2 + number)).astype(np.float32)
    for step, record in enumerate(records[1:], 1):
        is_old = rng.random(number) < (0, 0.5, 1)[step % 3]
        record[2:] = np.where(is_old, records[step - 1, 2:], record[2:])
    for record in records:
        added, settings = encoded(record, settings)
        data += added
    settings, position, found = no_settings(number), 0, []
    while position < len(data):
        record, settings, position = decoded(data, position, 2, settings)
        found.append(record)
    assert position == len(data)
    np.testing.assert_array_equal(found, records)


def test_size(tmp_path):
    """8 bytes a step for one probe; the header is paid once."""
    sizes = [len(write(tmp_path / str(steps), steps, settings=(0.0,) * 101)) for steps in (1, 101)]
    assert (sizes[1] - sizes[0]) / 100 == 8
    assert sizes[0] < 600
    whole = write(tmp_path / "settings", 5, settings=SETTINGS)
    assert len(whole) - len(write(tmp_path / "one", 1)) == sum(LENGTHS) - 8
    many = {f"layers/{i}/kernel": jnp.zeros(3) for i in range(100)}
    assert len(write(tmp_path / "many", 1, base=many)) < 600 + 25 * 100


@pytest.mark.parametrize("steps", [1, 3, 4, 5])
def test_torn_record_is_dropped_and_written_again(tmp_path, steps):
    path, last = tmp_path / "log", LENGTHS[steps - 1]
    whole = write(path, steps, settings=SETTINGS)
    for lost in range(1, last):
        path.write_bytes(whole[:-lost])
        with pytest.warns(UserWarning, match=f"step {steps - 1} is cut off or damaged at the end"):
            log = zo.replay.read(path)
        assert log.steps == steps - 1 and log.dropped == last - lost
    with pytest.warns(UserWarning, match=f"step {steps - 1}"):
        assert write(path, steps, first=steps - 1, settings=SETTINGS) == whole


@pytest.mark.parametrize("steps", [3, 4, 5])
def test_every_flipped_bit_is_noticed_where_it_is(tmp_path, steps):
    path = tmp_path / "log"
    whole = write(path, steps, settings=SETTINGS)
    borders = len(whole) - np.cumsum([0, *LENGTHS[:steps][::-1]])[::-1]
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << (place - borders[0] + 1) % 8
        path.write_bytes(changed)
        step = int(np.searchsorted(borders, place, side="right")) - 1
        if place < borders[0]:
            message = "no log of|header is cut off or"
        else:
            message = f"step {step} is damaged, at byte {borders[step]};"
        is_last = place >= borders[-2]
        # Without its mark the last is shorter than what is left of the file.
        if not is_last or (steps == 4 and place < borders[-2] + 4):
            with pytest.raises(ValueError, match=message):
                zo.replay.read(path)
        else:
            with pytest.warns(UserWarning, match=f"step {step} is cut off or damaged"):
                assert zo.replay.read(path).steps == steps - 1


def test_records_that_are_left_out_moved_or_foreign_are_noticed(tmp_path):
    path = tmp_path / "log"
    whole = write(path, 4)
    foreign = write(tmp_path / "other", 4, key=8)
    head, records = whole[:-32], [whole[-32 + 8 * i :][:8] for i in range(4)]
    for wrong in (
        [records[0], *records[2:]],
        [records[1], records[0], *records[2:]],
        [records[0], *records],
        [*records[:2], foreign[-16:-8], records[3]],
    ):
        path.write_bytes(head + b"".join(wrong))
        with pytest.raises(ValueError, match=r"step \d is damaged"):
            zo.replay.read(path)


def test_steps_that_are_alike_are_not_left_out_unnoticed(tmp_path):
    path, state = tmp_path / "log", OPT.init(BASE, 7)
    info = zo.StepInfo(jnp.float32(0), jnp.ones(1), jnp.zeros(2), jnp.bool_(True))
    with zo.replay.Writer(path, OPT, BASE, state) as log:
        for step in range(4):  # that were not taken
            log.append(BASE, state._replace(count=jnp.int32(step + 1)), info)
    whole = path.read_bytes()
    path.write_bytes(whole[:-24] + whole[-16:])
    with pytest.raises(ValueError, match="step 1 is damaged"):
        zo.replay.read(path)


def test_another_version_is_refused_by_name(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(header_bytes({"version": 1, "library": "0.1.0"}))
    with pytest.raises(ValueError, match=r"version 1 .* optax_lowbit \(0.1.0 wrote .* version 3"):
        zo.replay.read(path)


@pytest.mark.parametrize(
    "text",
    [b"[]", b"{}", b"{", b"[" * 100_000, b"0", None],
    ids=["list", "empty", "cut off", "deep", "number", "not compressed"],
)
def test_header_of_something_else_is_refused(tmp_path, text):
    """Under a checksum that is right."""
    path = tmp_path / "log"
    packed = b"no zlib" if text is None else zlib.compress(text)
    data = b"ZOLOG\r\n\x1a" + struct.pack("<I", len(packed)) + packed
    path.write_bytes(data + struct.pack("<I", zlib.crc32(data)))
    with pytest.raises(ValueError, match=str(path)):
        zo.replay.read(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": {**BASE, "w": BASE["w"].at[1, 2].add(1e-6)}}, r"leaves.w.checksum is \d+ in"),
        ({"base": {**BASE, "w": BASE["w"].T}}, r"leaves.w.shape is \[2, 3\] in the log and \[3"),
        ({"base": {**BASE, "b": jnp.ones(3)}}, "leaves.b.dtype is 'bfloat16' in the log and 'flo"),
        ({"base": {"w": BASE["w"], "c": BASE["b"]}}, "leaves.b is only in the log; leaves.c is on"),
        ({"key": 8}, r"key\.?.* is \[0, 7\] in the log and \[0, 8\] here"),
        ({"opt": zo.zo_sgd(1e-2, num_probes=2)}, "optimizer.num_probes is 1 in the log and 2"),
        ({"opt": zo.zo_sgd(1e-2, noise=zo.Gaussian())}, "optimizer.noise.type is '.*Rademacher'"),
        ({"opt": zo.zo_sgd(1e-2, trainable="w")}, "leaves.b.trains is True in the log and False"),
        ({"opt": zo.zo_sgd(1e-2, weight_decay=0.1)}, "leaves.w.decays is False in the log and T"),
        ({"opt": momentum()}, "optimizer.rule"),
        ({"opt": zo.blockwise(OPT, [".w?"])}, "optimizer.opt is only here"),
        ({"opt": zo.inject_hyperparams(zo.zo_sgd)(1e-2)}, "optimizer.hyperparams is only here"),
        ({"digest_every": 3}, "digest_every must be 0"),
    ],
)
def test_another_run_is_refused_by_name(tmp_path, changes, message):
    path = tmp_path / "log"
    whole = write(path, 2)
    with pytest.raises(ValueError, match=message):
        write(path, 3, **changes)
    assert path.read_bytes() == whole
    if "base" in changes or "opt" in changes:
        with pytest.raises(ValueError, match=message):
            zo.replay.apply(changes.get("base", BASE), path, changes.get("opt", OPT))


@pytest.mark.parametrize("opt", [zo.zo_sgd(1e-2, trainable="w"), in_blocks("w", "b")])
def test_another_base_is_refused_by_name_with_or_without_the_optimizer(tmp_path, opt):
    path = tmp_path / "log"
    write(path, 2, opt=opt)
    for given in (opt, None):
        with pytest.raises(ValueError, match=r"leaves\.w is only in the log"):
            zo.replay.apply({"b": BASE["b"]}, path, given)
        with pytest.raises(ValueError, match=r"leaves\.w\.dtype is .* and 'int32'"):
            zo.replay.apply({**BASE, "w": BASE["w"].astype(jnp.int32)}, path, given)


def test_what_records_have_in_them_may_change(tmp_path):
    path = tmp_path / "log"
    write(path, 2)
    write(path, 3, first=2, opt=zo.zo_sgd(5.0, eps=1.0, clip=1.0, probe_batch=2))
    write(path, 4, first=3, opt=zo.probe_parallel(OPT, "probe"))
    assert zo.replay.read(path).steps == 4


def test_other_blocks_and_hyperparameters_are_refused(tmp_path):
    path = tmp_path / "log"
    write(path, 1, opt=in_blocks("w", "b"))
    with pytest.raises(ValueError, match=r"leaves\.w\.block is 0 in the log and 1 here"):
        zo.replay.apply(BASE, path, in_blocks("b", "w"))
    path.unlink()
    opt = zo.inject_hyperparams(zo.zo_adam)(1e-2)
    names = list(opt.hyperparams)
    state = opt.init(BASE, 7)
    settings = jnp.arange(2.0 + len(names))
    info = zo.StepInfo(jnp.float32(0), jnp.ones(1), jnp.append(0.0, settings), jnp.bool_(True))
    with zo.replay.Writer(path, opt, BASE, state) as log:
        inner = state.inner_state._replace(count=jnp.int32(1))
        log.append(BASE, state._replace(inner_state=inner), info)
    with pytest.raises(ValueError, match=r"optimizer\.first\.rule\.b1\.values is 0\.8"):
        zo.replay.apply(BASE, path, zo.inject_hyperparams(zo.zo_adam)(1e-2, b1=0.8))
    with pytest.raises(ValueError, match=r"optimizer\.hyperparams is .*'clip'"):
        zo.replay.apply(BASE, path, zo.inject_hyperparams(zo.zo_adam)(1e-2, clip=1.0))


def test_functions_are_told_apart_by_what_they_close_over():
    def rule_with(decay):
        return lambda count: decay * count

    assert described(rule_with(0.9)) == described(rule_with(0.9)) != described(rule_with(0.99))
    assert described(momentum()) == described(momentum())
    json.dumps([described(momentum()), described(sgd())])


def test_steps_out_of_turn_and_wrong_arguments(tmp_path):
    path, state = tmp_path / "log", OPT.init(BASE, 7)
    info = zo.StepInfo(jnp.float32(0), jnp.ones(1), jnp.ones(2), jnp.bool_(True))
    ahead = state._replace(count=jnp.int32(2))
    with zo.replay.Writer(path, OPT, BASE, state) as log:
        with pytest.raises(ValueError, match=r"state.count must be 1 .* got 2"):
            log.append(BASE, ahead, info)
        assert not path.exists()
        log.append(BASE, state._replace(count=jnp.int32(1)), info)
        with pytest.raises(ValueError, match=r"info.record must have 2 numbers"):
            log.append(BASE, ahead, info._replace(record=jnp.ones(3)))
    with pytest.raises(ValueError, match="is closed"):
        log.append(BASE, ahead, info)
    with pytest.raises(ValueError, match=r"info\.record must have no NaN"):
        with zo.replay.Writer(path, OPT, BASE, state) as log:
            log.append(BASE, ahead, info._replace(record=jnp.array([jnp.nan, 0.0])))
    assert zo.replay.read(path).steps == 1
    with pytest.raises(ValueError, match=r"steps must be between 0, .* and 1, .* got 2"):
        zo.replay.apply(BASE, path, OPT, steps=2)
    with pytest.raises(ValueError, match=r"state.count must be at most 1"):
        zo.replay.Writer(path, OPT, BASE, ahead)
    with pytest.raises(ValueError, match=r"state.count must be 0"):
        zo.replay.Writer(tmp_path / "new", OPT, BASE, ahead)
    with pytest.raises(ValueError, match="path must be in a folder"):
        zo.replay.Writer(tmp_path / "no" / "log", OPT, BASE, state)
    for name in ("digest_every", "sync_every"):
        with pytest.raises(ValueError, match=f"{name} must be an int of at least 0, got -1"):
            zo.replay.Writer(path, OPT, BASE, state, **{name: -1})
    with pytest.raises(TypeError, match="opt must be a ZeroOrderOptimizer"):
        zo.replay.apply(BASE, path, OPT.apply)
    hybrid = zo.hybrid(OPT, optax.sgd(0.1), "w")
    with pytest.raises(TypeError, match="do not follow from records; got HybridOptimizer"):
        zo.replay.Writer(path, hybrid, BASE, state)
    with pytest.raises(FileNotFoundError):
        zo.replay.read(tmp_path / "none")


def test_parameters_that_miss_a_digest_are_refused(tmp_path):
    path = tmp_path / "log"
    write(path, 2, digest_every=2)  # of steps that moved nothing
    state = OPT.init(BASE, 7)._replace(count=jnp.int32(2))
    assert zo.replay.resume(BASE, state, path, OPT)[0] is BASE
    with pytest.raises(ValueError, match="parameters after step 2 are not those of the run"):
        zo.replay.resume({**BASE, "b": -BASE["b"]}, state, path, OPT)


@pytest.mark.parametrize(
    "name", ["os.PathLike", "optax_lowbit.none.Rademacher", "optax_lowbit.quantize"]
)
def test_log_makes_nothing_but_dataclasses_of_the_library(tmp_path, name):
    path = tmp_path / "log"
    write(path, 1)
    log = zo.replay.read(path)
    log.run["optimizer"]["noise"] = {"type": name}
    with pytest.raises(ValueError, match="opt must be given"):
        zo.replay.apply(BASE, log)
