import itertools

import numpy as np
import pytest

from jaxcells.data.loader import epoch_indices, eval_batches, num_batches, train_batches

IMAGES = np.arange(10, dtype=np.uint16).reshape(10, 1, 1, 1)
LABELS = np.arange(10) % 3


def test_the_order_of_an_epoch_is_a_function_of_seed_and_epoch():
    order = epoch_indices(10, seed=3, epoch=7)
    assert sorted(order) == list(range(10))
    philox = np.random.Philox(key=np.array([3, 7], np.uint64))
    np.testing.assert_array_equal(order, np.random.Generator(philox).permutation(10))
    assert order.tolist() != epoch_indices(10, seed=3, epoch=8).tolist()
    assert order.tolist() != epoch_indices(10, seed=4, epoch=7).tolist()


def test_each_epoch_shows_every_example_once():
    assert num_batches(10, 4) == 3
    batches = list(itertools.islice(train_batches(IMAGES, LABELS, 4, seed=0), 6))
    for epoch in range(2):
        of_epoch = batches[3 * epoch : 3 * epoch + 3]
        shown = np.concatenate([b["image"].ravel()[b["mask"] > 0] for b in of_epoch])
        np.testing.assert_array_equal(shown, epoch_indices(10, seed=0, epoch=epoch))
    assert batches[0]["image"].dtype == np.uint16
    assert batches[0]["label"].dtype == np.int32
    np.testing.assert_array_equal(batches[0]["label"], LABELS[batches[0]["image"].ravel()])


@pytest.mark.parametrize("first", range(8))
def test_training_goes_on_from_any_step(first):
    whole = itertools.islice(train_batches(IMAGES, LABELS, 4, seed=0), first, 8)
    rest = train_batches(IMAGES, LABELS, 4, seed=0, first_step=first)
    for expected, batch in zip(whole, rest, strict=False):
        for name in expected:
            np.testing.assert_array_equal(batch[name], expected[name])


def test_the_last_batch_is_filled_up_with_other_images_at_mask_0():
    # 9 examples in batches of 4: one is left for the third.
    *_, last = itertools.islice(train_batches(IMAGES[:9], LABELS[:9], 4, seed=0), 3)
    order = epoch_indices(9, seed=0, epoch=0)
    assert last["image"].ravel().tolist() == [order[8], *order[:3]]
    assert last["mask"].tolist() == [1, 0, 0, 0]
    # Fewer examples than rows: all that there are, again and again.
    batch = next(train_batches(IMAGES[:2], LABELS[:2], 5, seed=0))
    assert sorted(batch["image"].ravel()[:2]) == [0, 1]
    assert batch["mask"].tolist() == [1, 1, 0, 0, 0]


def test_processes_hold_the_rows_of_one_batch():
    whole = list(eval_batches(IMAGES, LABELS, 4))
    parts = [list(eval_batches(IMAGES, LABELS, 4, slice(i, i + 2))) for i in (0, 2)]
    for batch, *halves in zip(whole, *parts, strict=True):
        for name in batch:
            np.testing.assert_array_equal(np.concatenate([h[name] for h in halves]), batch[name])


def test_evaluation_drops_nothing():
    batches = list(eval_batches(IMAGES, LABELS, 4))
    assert [b["mask"].sum() for b in batches] == [4, 4, 2]
    shown = np.concatenate([b["image"].ravel()[b["mask"] > 0] for b in batches])
    np.testing.assert_array_equal(shown, IMAGES.ravel())
