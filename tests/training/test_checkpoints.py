import hashlib
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcells import Error
from jaxcells.data.normalization import Normalization
from jaxcells.training import checkpoints
from jaxcells.training.checkpoints import CheckpointMeta
from jaxcells.training.progress import Progress
from tests.training.test_steps import assert_trees_equal, make_batch, tiny_state, train_step


def make_meta(step=0, **changed):
    """What is saved beside a state, as a run would."""
    values = {
        "step": step,
        "num_steps": 9,
        "progress": Progress(totals={"loss": 0.1 + 0.2, "correct": 1, "count": 3}, epochs_s=[0.1]),
        "normalization": Normalization("imagenet", (0.0,), (255.0,), (0.4,) * 3, (0.2,) * 3),
        "seed": 0,
        "batch_size": 8,
        "class_names": ("a", "b"),
        "manifest_sha256": "ab" * 32,
        "model": {"name": "resnet18", "num_classes": 2, "width": 2},
        "init": {"kind": "random", "source": None},
        "images_by_split": {"train": ("01", "02"), "val": ()},
    }
    return CheckpointMeta(**(values | changed))


def save(directory, step, accuracy=None, loss=1.0, **changed):
    metrics = None if accuracy is None else {"balanced_accuracy": accuracy, "loss": loss}
    state = tiny_state().replace(step=jnp.int32(step))
    checkpoints.save(directory, state, make_meta(step, **changed), metrics)


def trained(num_steps, state=None):
    state = state or tiny_state()
    for _ in range(num_steps):
        state, _ = train_step(state, make_batch(seed=int(state.step)), jax.random.key(0))
    return state


def largest_file(folder):
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# What is restored


def test_a_state_comes_back_bit_for_bit_and_goes_on_so(tmp_path):
    state = trained(3)
    checkpoints.save(tmp_path, state, make_meta(3))
    restored, meta = checkpoints.restore(tmp_path, jax.eval_shape(tiny_state))
    assert meta == make_meta(3)
    assert_trees_equal(restored, state)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(restored))
    assert_trees_equal(trained(3, restored), trained(6))


def test_variables_are_restored_without_reading_the_optimiser(tmp_path):
    save(tmp_path, 1, accuracy=0.5)
    flip_a_bit(largest_file(tmp_path / "1" / "optimizer"))
    variables, meta = checkpoints.restore_variables(tmp_path)
    assert_trees_equal(variables, tiny_state().variables)
    assert meta == make_meta(1)
    with pytest.raises(Error, match="is damaged"):
        checkpoints.restore(tmp_path, tiny_state())


# Which are kept


def test_the_newest_two_and_the_best_are_kept(tmp_path):
    kept = []
    accuracies = {1: 0.5, 2: 0.8, 3: 0.7, 4: 0.6, 5: None, 6: None, 7: None, 8: 0.9, 9: 0.1}
    for step, accuracy in accuracies.items():
        save(tmp_path, step, accuracy)
        kept.append((checkpoints.list_steps(tmp_path), checkpoints.best_step(tmp_path)))
    assert kept == [
        ([1], 1),
        ([1, 2], 2),
        ([2, 3], 2),
        ([2, 3, 4], 2),
        ([2, 4, 5], 2),
        ([2, 5, 6], 2),  # saved on a signal, 5 and 6 are the newest and never the best
        ([2, 6, 7], 2),
        ([7, 8], 8),
        ([8, 9], 8),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["8", "9"]
    assert checkpoints.restore(tmp_path, tiny_state(), "best")[1] == make_meta(8)
    assert checkpoints.restore(tmp_path, tiny_state(), "latest")[1] == make_meta(9)
    assert checkpoints.restore(tmp_path, tiny_state(), 9)[1] == make_meta(9)


def test_of_equal_accuracies_the_lower_loss_is_best_and_then_the_later(tmp_path):
    bests = []
    for step, loss in enumerate([0.5, 0.4, 0.45, 0.4, 0.41], start=1):
        save(tmp_path, step, accuracy=0.75, loss=loss)
        bests.append(checkpoints.best_step(tmp_path))
    assert bests == [1, 2, 2, 4, 4]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    save(tmp_path, 3)
    save(tmp_path, 3, accuracy=np.float32(0.5), seed=2)
    assert checkpoints.best_step(tmp_path) == 3
    assert checkpoints.restore(tmp_path, tiny_state())[1] == make_meta(3, seed=2)
    assert [path.name for path in tmp_path.iterdir()] == ["3"]


# What is refused


def test_what_is_not_there_is_named_with_what_is(tmp_path):
    assert checkpoints.best_step(tmp_path / "none") is None
    with pytest.raises(Error, match=f"no checkpoint in {tmp_path}/none: train first"):
        checkpoints.restore(tmp_path / "none", tiny_state())
    save(tmp_path, 2)
    assert checkpoints.best_step(tmp_path) is None
    with pytest.raises(Error, match=r"no validated checkpoint in .*choose a step of 2"):
        checkpoints.restore_variables(tmp_path)
    with pytest.raises(Error, match=f"no checkpoint of step 7 in {tmp_path}: choose a step of 2"):
        checkpoints.restore(tmp_path, tiny_state(), 7)


@pytest.mark.parametrize(
    ("item", "damage"),
    [
        ("variables", flip_a_bit),
        ("optimizer", flip_a_bit),
        ("record", flip_a_bit),
        ("variables", lambda path: path.write_bytes(b"")),
    ],
)
def test_a_damaged_file_is_named(tmp_path, item, damage):
    save(tmp_path, 1)
    save(tmp_path, 2)
    damage(largest_file(tmp_path / "2" / item))
    with pytest.raises(
        Error, match=rf"checkpoint {tmp_path}/2 is damaged \({item}/.*: delete that folder"
    ):
        checkpoints.restore(tmp_path, tiny_state())
    shutil.rmtree(tmp_path / "2")
    assert checkpoints.restore(tmp_path, tiny_state())[1] == make_meta(1)


def test_what_is_not_whole_does_not_count_and_is_named_once(tmp_path, caplog):
    save(tmp_path, 1, accuracy=0.5)
    shutil.copytree(tmp_path / "1", tmp_path / "7")
    largest_file(tmp_path / "7").unlink()
    (tmp_path / "8").mkdir()
    (tmp_path / "9").mkdir()
    (tmp_path / "9" / "SHA256SUMS").touch()
    (tmp_path / "notes").mkdir()
    for _ in range(2):
        assert checkpoints.list_steps(tmp_path) == [1]
    assert checkpoints.best_step(tmp_path) == 1
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / name} is not a whole checkpoint and is passed over" for name in "789"
    ]
    for step in (7, 8):  # the resumed run gets there
        save(tmp_path, step)
    assert checkpoints.restore(tmp_path, tiny_state())[1] == make_meta(8)


def test_an_interrupted_save_leaves_nothing_that_counts(tmp_path, monkeypatch):
    def interrupt(path):
        raise KeyboardInterrupt

    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "file_sha256", interrupt)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2)
    assert len(list(tmp_path.iterdir())) == 2
    assert checkpoints.list_steps(tmp_path) == [1]
    save(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_a_full_disk_is_seen_before_writing(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(
        Error, match=rf"write checkpoint {tmp_path}/2 \(it takes 0 MB, and 0 MB are free\): mend"
    ):
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


# Orbax gives up at the first failure; writes still under way complain that its loop is closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_failed_write_is_reported_at_once_and_harms_nothing(tmp_path):
    resource = pytest.importorskip("resource")
    save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))  # no file may grow beyond
    try:
        with pytest.raises(
            Error, match=rf"cannot write checkpoint {tmp_path}/2 \(.*: mend that and run"
        ):
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoints.list_steps(tmp_path) == [1]
    assert checkpoints.restore(tmp_path, tiny_state())[1] == make_meta(1)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_never_saved(tmp_path, value):
    state = jax.tree.map(jnp.array, tiny_state())
    state.params["fc"]["bias"] = jnp.array([0, value, 0], jnp.float32)
    with pytest.raises(Error, match=r"params/fc/bias is not finite at step 0, .*; try a lower"):
        checkpoints.save(tmp_path, state, make_meta())
    with pytest.raises(Error, match="validation/loss is not finite at step 4"):
        save(tmp_path, 4, accuracy=0.5, loss=value)
    assert checkpoints.list_steps(tmp_path) == []


def test_the_checksums_are_those_of_sha256sum_for_every_file(tmp_path):
    save(tmp_path, 1)
    sums = tmp_path / "1" / "SHA256SUMS"
    files = sorted(path for path in (tmp_path / "1").rglob("*") if path.is_file() and path != sums)
    assert sums.read_text().splitlines() == [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(tmp_path / '1')}"
        for path in files
    ]
