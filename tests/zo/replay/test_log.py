"""The bytes of a log, and what is refused. Records here are made up: no step is compiled."""

import json
import struct
import zlib

import jax.numpy as jnp
import numpy as np
import pytest

from optax_lowbit import zo
from optax_lowbit.zo.replay.runs import described
from tests.zo.replay.runs import momentum, sgd

BASE = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3, jnp.bfloat16)}
OPT = zo.zo_sgd(1e-2)


def made_up(step, size=2):
    return np.float32(np.arange(size) + 1.5 * step)


def write(path, steps, opt=OPT, base=BASE, key=7, first=0, **options):
    state = opt.init(base, key)
    with zo.replay.Writer(path, opt, base, state, **options) as log:
        for step in range(first, steps):
            info = zo.StepInfo(jnp.float32(0), jnp.ones(1), jnp.asarray(made_up(step)))
            log.append(base, state._replace(count=jnp.int32(step + 1)), info)
    return path.read_bytes()


def test_layout_is_what_is_documented(tmp_path):
    """Taken apart here by hand."""
    data = write(tmp_path / "log", 5, digest_every=2)
    magic, length = struct.unpack_from("<8sI", data)
    assert magic == b"ZOLOG\r\n\x1a"
    run = json.loads(zlib.decompress(data[12 : 12 + length]))
    assert run["key"] == [0, 7] and run["prng"] == "threefry2x32"
    assert run["record_size"] == 2 and run["digest_every"] == 2
    (crc,) = struct.unpack_from("<I", data, 12 + length)
    assert crc == zlib.crc32(data[: 12 + length])
    position = 16 + length
    for step in range(5):
        size = 20 if step % 2 else 16
        payload = data[position : position + size - 4]
        assert struct.unpack_from("<Iff", payload) == (step, *made_up(step))
        crc = zlib.crc32(payload, crc)
        assert struct.unpack_from("<I", data, position + size - 4) == (crc,)
        position += size
    assert position == len(data)


def test_what_is_read_is_what_was_written(tmp_path):
    write(tmp_path / "log", 3)
    write(tmp_path / "log", 8, first=3)  # gone on with
    log = zo.replay.read(tmp_path / "log")
    assert log.steps == 8 and log.dropped == 0
    np.testing.assert_array_equal(log.records, [made_up(step) for step in range(8)])


def test_size(tmp_path):
    """16 bytes a step for one probe; the header is paid once."""
    sizes = [len(write(tmp_path / str(steps), steps)) for steps in (1, 101)]
    assert (sizes[1] - sizes[0]) / 100 == 16
    assert sizes[0] < 600
    many = {f"layers/{i}/kernel": jnp.zeros(3) for i in range(100)}
    assert len(write(tmp_path / "many", 1, base=many)) < 600 + 25 * 100


@pytest.mark.parametrize("lost", [1, 4, 15])
def test_torn_record_is_dropped_and_written_again(tmp_path, lost):
    path = tmp_path / "log"
    whole = write(path, 4)
    path.write_bytes(whole[:-lost])
    with pytest.warns(UserWarning, match="step 3 is cut off or damaged at the end"):
        log = zo.replay.read(path)
    assert log.steps == 3 and log.dropped == 16 - lost
    with pytest.warns(UserWarning, match="step 3"):
        assert write(path, 4, first=3) == whole


def test_every_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "log"
    whole = write(path, 3)
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        if place < len(whole) - 16:
            with pytest.raises(ValueError, match=r"no log of|header is cut off or|step \d is dam"):
                zo.replay.read(path)
        else:
            with pytest.warns(UserWarning, match="step 2 is cut off or damaged"):
                assert zo.replay.read(path).steps == 2


def test_records_that_are_left_out_moved_or_foreign_are_noticed(tmp_path):
    path = tmp_path / "log"
    whole = write(path, 4)
    foreign = write(tmp_path / "other", 4, key=8)
    head, records = whole[:-64], [whole[-64 + 16 * i :][:16] for i in range(4)]
    for wrong in (
        [records[0], *records[2:]],
        [records[1], records[0], *records[2:]],
        [records[0], *records],
        [*records[:2], foreign[-32:-16], records[3]],
    ):
        path.write_bytes(head + b"".join(wrong))
        with pytest.raises(ValueError, match=r"step \d is damaged"):
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


def test_what_records_have_in_them_may_change(tmp_path):
    path = tmp_path / "log"
    write(path, 2)
    write(path, 3, first=2, opt=zo.zo_sgd(5.0, eps=1.0, clip=1.0, probe_batch=2))
    assert zo.replay.read(path).steps == 3


def test_functions_are_told_apart_by_what_they_close_over():
    def rule_with(decay):
        return lambda count: decay * count

    assert described(rule_with(0.9)) == described(rule_with(0.9)) != described(rule_with(0.99))
    assert described(momentum()) == described(momentum())
    json.dumps([described(momentum()), described(sgd())])


def test_steps_out_of_turn_and_wrong_arguments(tmp_path):
    path, state = tmp_path / "log", OPT.init(BASE, 7)
    info = zo.StepInfo(jnp.float32(0), jnp.ones(1), jnp.ones(2))
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
    with pytest.raises(FileNotFoundError):
        zo.replay.read(tmp_path / "none")


def test_parameters_that_miss_a_digest_are_refused(tmp_path):
    path = tmp_path / "log"
    write(path, 2, digest_every=2)  # of steps that moved nothing
    state = OPT.init(BASE, 7)._replace(count=jnp.int32(2))
    assert zo.replay.resume(BASE, state, path, OPT)[0] is BASE
    with pytest.raises(ValueError, match="parameters after step 2 are not those of the run"):
        zo.replay.resume({**BASE, "b": -BASE["b"]}, state, path, OPT)
