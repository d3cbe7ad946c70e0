"""Batches are a pure function of (seed, epoch, batch): resumed, split over processes, mixed, or a user's own."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from pcdistill.data.augment import Augment
from pcdistill.data.decoding import Plan, windows_of
from pcdistill.data.files import Items
from pcdistill.data.loader import Batch, Feed, SplitBatches, Stream, seed_of
from pcdistill.data.passed import LoaderBatches
from pcdistill.data.readers import ItemReader, MemoryReader
from pcdistill.data.workers import Workers
from pcdistill.errors import InputError

SIZE, CLASSES = 8, 4
POLICY = Augment(padding=1, flip=True, rand_augment=True, cutout=2)
FILL = torch.full((3,), 128, dtype=torch.uint8)


class FakeItems(Items):
    """Images of 10 x 12, as if they were files."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def read(self, i: int, plan: Plan) -> list[torch.Tensor]:
        return windows_of(Image.fromarray(self.images[i].permute(1, 2, 0).numpy()), plan)


def make(kind="memory", n=50, feed=None, views=(POLICY,), workers=0, **changes) -> SplitBatches:
    """Batches of noise; for arrays the pixels of sample i are those of row n - 1 - i."""
    g = torch.Generator().manual_seed(3)
    shape = (SIZE, SIZE) if kind == "memory" else (10, 12)
    images = torch.randint(0, 256, (n, 3, *shape), generator=g, dtype=torch.uint8)
    rows = torch.arange(n - 1, -1, -1)
    stream = Stream(
        **{"seed": 7, **{key: changes.pop(key) for key in ("seed", "rank", "world_size") if key in changes}}
    )
    base = feed or Feed(CLASSES, (0.5,) * 3, (0.25,) * 3, SIZE, 12, stream, train=True)
    feed = replace(base, **changes)
    if kind == "memory":
        reader = MemoryReader(images, rows, views, FILL, stream.seed)
    else:
        reader = ItemReader(
            FakeItems(images), rows, views, size=SIZE, fill=FILL, seed=stream.seed, workers=Workers(workers)
        )
    return SplitBatches(reader, torch.arange(n) % CLASSES, feed, "data")


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.target, other.target)
        assert (one.index is None) == (other.index is None)
        assert one.index is None or torch.equal(one.index, other.index)


KINDS = pytest.mark.parametrize("kind", ["memory", "items"])
MIXES = pytest.mark.parametrize("mix", [{}, {"mixup": 0.5}, {"cutmix": 1.0}, {"mixup": 1.0, "cutmix": 1.0}])


@KINDS
@MIXES
def test_an_epoch_can_be_repeated_and_entered_anywhere(kind, mix):
    whole = list(make(kind, **mix).epoch(2))
    assert len(whole) == 4
    assert_same(whole, list(make(kind, **mix).epoch(2)))
    batches = make(kind, **mix)
    next(batches.epoch(1))  # an epoch that was left in the middle leaves no trace
    torch.rand(5)
    for start in range(5):
        assert_same(whole[start:], list(batches.epoch(2, start)))


@KINDS
def test_epochs_and_seeds_differ(kind):
    first, second, other = (list(make(kind, seed=seed).epoch(epoch)) for seed, epoch in ((7, 0), (7, 1), (8, 0)))
    assert not torch.equal(first[0].index, second[0].index)
    assert not torch.equal(first[0].index, other[0].index)
    seen = {int(i): image for batch in first for i, image in zip(batch.index, batch.images, strict=True)}
    again = {int(i): image for batch in second for i, image in zip(batch.index, batch.images, strict=True)}
    shared = seen.keys() & again.keys()
    assert sum(torch.equal(seen[i], again[i]) for i in shared) < len(shared) / 2


def test_every_batch_of_every_epoch_and_view_is_augmented_anew():
    image = torch.randint(0, 256, (1, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = image.repeat(48, 1, 1, 1)  # so that only the augmentation tells batches apart
    feed = Feed(CLASSES, (0.5,) * 3, (0.25,) * 3, SIZE, 12, Stream(), train=True)
    crop = Augment(padding=2, flip=True)
    found = set()
    for seed in (0, 1):
        reader = MemoryReader(images, torch.arange(48), (crop, crop), FILL, seed)
        for epoch in (0, 1):
            for batch in SplitBatches(reader, torch.arange(48) % CLASSES, feed).epoch(epoch):
                found.update(view.numpy().tobytes() for view in batch.images.chunk(2))
    assert len(found) == 2 * 2 * 4 * 2


@MIXES
@pytest.mark.parametrize(
    ("kind", "size", "ranks"),
    [
        *(("memory", *pair) for pair in [(12, 2), (9, 3), (12, 12)]),
        *(pytest.param("memory", *pair, marks=pytest.mark.slow) for pair in [(12, 3), (12, 4), (6, 2)]),
        ("items", 12, 4),
    ],
)
def test_processes_together_see_what_one_process_sees(kind, mix, size, ranks):
    alone = list(make(kind, batch_size=size, views=(POLICY, POLICY), **mix).epoch(1))
    shares = [
        list(make(kind, batch_size=size, views=(POLICY, POLICY), rank=r, world_size=ranks, **mix).epoch(1))
        for r in range(ranks)
    ]
    for whole, *parts in zip(alone, *shares, strict=True):
        assert torch.equal(whole.index, torch.cat([part.index for part in parts]))
        for field in ("images", "target"):
            halves = [getattr(part, field).chunk(2) for part in parts]
            together = torch.cat([half[0] for half in halves] + [half[1] for half in halves])
            assert torch.equal(getattr(whole, field), together)


def test_training_leaves_out_the_last_incomplete_batch_and_never_repeats_a_sample():
    batches = make(n=50, batch_size=12)
    index = torch.cat([batch.index for batch in batches.epoch(0)])
    assert len(batches) == 4
    assert len(index) == 48 == len(index.unique())
    missed = {i for epoch in range(30) for i in range(50)} - set(index.tolist())
    assert len(missed) == 2  # and they differ between epochs:
    assert set(range(50)) == {int(i) for epoch in range(6) for batch in batches.epoch(epoch) for i in batch.index}


def test_data_smaller_than_the_batch_gives_one_batch():
    assert [len(batch.target) for batch in make(n=5, batch_size=12).epoch(0)] == [5]
    shares = [list(make(n=5, batch_size=12, rank=r, world_size=2).epoch(0)) for r in range(2)]
    assert [[len(batch.target) for batch in share] for share in shares] == [[2], [2]]


def test_a_batch_that_processes_cannot_share_is_refused():
    with pytest.raises(InputError, match="the batch size 12 must be a multiple of the 5 processes"):
        make(rank=0, world_size=5)
    with pytest.raises(InputError, match="3 training images are too few for 4 processes"):
        make(n=3, world_size=4)


@KINDS
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("n", [1, 5, 24, 50])
def test_evaluation_takes_every_sample_once(kind, ranks, n):
    index, count = [], 0
    for rank in range(ranks):
        batches = make(kind, n=n, views=(None,), train=False, rank=rank, world_size=ranks)
        found = list(batches.epoch(0))
        assert len(found) == len(batches)
        assert all(len(batch.images) == len(batch.target) == len(batch.index) > 0 for batch in found)
        count += len(found)
        index += [int(i) for batch in found for i in batch.index]
    assert index == list(range(n))
    assert count >= -(-n // 12)


def test_images_are_normalised_pixels_of_the_right_rows():
    batch = next(make(views=(None,), train=False).epoch(0))
    g = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (50, 3, SIZE, SIZE), generator=g, dtype=torch.uint8)
    expected = (images.flip(0)[:12].double() / 255 - 0.5) / 0.25
    assert batch.images.dtype == torch.float32
    torch.testing.assert_close(batch.images.double(), expected, rtol=1e-6, atol=1e-6)
    assert batch.target.tolist() == [i % CLASSES for i in range(12)]


def test_arrays_are_resized_after_augmentation():
    small, large = (next(make(image_size=size).epoch(0)) for size in (8, 16))
    assert torch.equal(small.index, large.index)
    # Rounding apart, as the small ones are exact.
    expected = torch.nn.functional.interpolate(
        small.images, size=(16, 16), mode="bilinear", antialias=True, align_corners=False
    )
    torch.testing.assert_close(large.images, expected, rtol=0, atol=1e-5)


@KINDS
def test_two_views_are_view_major_and_the_first_is_the_only_view_of_one(kind):
    one = next(make(kind).epoch(0))
    two = next(make(kind, views=(POLICY, POLICY)).epoch(0))
    assert two.images.shape[0] == two.target.shape[0] == 24
    assert torch.equal(two.images[:12], one.images)
    assert not torch.equal(two.images[12:], one.images)
    assert torch.equal(two.target, torch.cat([one.target, one.target]))
    assert torch.equal(two.index, one.index)


def test_workers_give_the_same_batches_and_leave_the_random_state_alone():
    state = torch.get_rng_state()
    here, there = (list(make("items", n=30, workers=workers).epoch(0)) for workers in (0, 2))
    assert_same(here, there)
    assert torch.equal(state, torch.get_rng_state())


class TestMixing:
    @pytest.mark.parametrize("ranks", [1, 3])
    @pytest.mark.parametrize("size", [12, 9])
    def test_mixup_is_the_stated_sum_of_two_samples(self, ranks, size):
        plain = {
            int(i): image
            for batch in make(views=(None,), batch_size=size).epoch(0)
            for i, image in zip(batch.index, batch.images, strict=True)
        }
        for rank in range(ranks):
            for batch in make(views=(None,), batch_size=size, mixup=1.0, rank=rank, world_size=ranks).epoch(0):
                assert batch.target.shape == (size // ranks, CLASSES)
                torch.testing.assert_close(batch.target.sum(1), torch.ones(size // ranks))
                for i, image, target in zip(batch.index.tolist(), batch.images, batch.target, strict=True):
                    share = _share(plain, i, image)
                    assert share is not None
                    j, lam = share
                    expected = torch.zeros(CLASSES)
                    expected[i % CLASSES] += lam
                    expected[j % CLASSES] += 1 - lam
                    torch.testing.assert_close(target, expected, rtol=0, atol=1e-4)

    def test_cutmix_target_is_the_share_of_pixels(self):
        views = (None,)
        n = 48
        images = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 3, 16, 16).contiguous()
        feed = Feed(n, (0.0,) * 3, (1.0,) * 3, 16, 12, Stream(1), train=True, cutmix=1.0)
        reader = MemoryReader(images, torch.arange(n), views, FILL)
        areas = []
        for epoch in range(5):
            for batch in SplitBatches(reader, torch.arange(n), feed).epoch(epoch):
                values = (batch.images[:, 0] * 255).round().long()
                for row, target in zip(values, batch.target, strict=True):
                    share = torch.bincount(row.flatten(), minlength=n) / row.numel()
                    torch.testing.assert_close(share, target, rtol=0, atol=1e-6)
                    areas.append(float(target.max()))
        assert min(areas) < 0.7
        assert max(areas) > 0.9

    def test_with_both_each_batch_has_one_and_both_occur(self):
        half = torch.zeros(60, 3, 16, 16, dtype=torch.uint8)
        half[30:] = 200
        feed = Feed(2, (0.0,) * 3, (1.0,) * 3, 16, 6, Stream(), train=True, mixup=1.0, cutmix=1.0)
        reader = MemoryReader(half, torch.arange(60), (None,), FILL)
        blended = [
            bool(((batch.images > 1e-3) & (batch.images < 200 / 255 - 1e-3)).any())
            for epoch in range(4)
            for batch in SplitBatches(reader, torch.arange(60) // 30, feed).epoch(epoch)
        ]
        assert 5 < sum(blended) < len(blended) - 5

    def test_both_views_are_mixed_alike(self):
        batch = next(make(views=(None, None), mixup=1.0).epoch(0))
        assert torch.equal(*batch.images.chunk(2))
        assert torch.equal(*batch.target.chunk(2))


def _share(plain, i, image):
    """The partner and share with which `image` is a mixture of sample i and one other."""
    for j, other in plain.items():
        difference = (plain[i] - other).flatten()
        if j != i and difference.abs().sum() > 0:
            lam = float((image - other).flatten() @ difference / difference.square().sum())
            if torch.allclose(lam * plain[i] + (1 - lam) * other, image, atol=1e-4):
                return j, lam
    return None


def test_signature_changes_with_the_stream_and_not_with_the_process():
    base = make().signature
    assert base == make().signature == make(rank=1, world_size=2).signature
    changed = [
        make(seed=8),
        make(batch_size=10),
        make(mixup=0.2),
        make(mean=(0.4,) * 3),
        make(image_size=9),
        make(views=(None,)),
        make(views=(POLICY, POLICY)),
        make("items"),
        make(n=49),
    ]
    signatures = {base, *(batches.signature for batches in changed)}
    assert len(signatures) == len(changed) + 1
    assert make(views=(None,), train=False).signature == make(views=(None,), train=False, seed=8).signature


def test_seeds_of_neighbours_are_far_apart():
    seeds = [seed_of("view", seed, epoch, batch) for seed in range(5) for epoch in range(20) for batch in range(20)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of("a", 1, 23) != seed_of("a", 12, 3)


class Noisy(torch.utils.data.Dataset):
    """A user's data set with random augmentation of every kind."""

    def __len__(self):
        return 20

    def __getitem__(self, i):
        return torch.tensor([i, torch.rand(()), np.random.rand(), random.random()]).view(1, 2, 2).float(), i % 3


class TestLoaderBatches:
    def test_yields_what_the_loader_yields(self):
        data = TensorDataset(torch.randn(10, 3, 4, 4), torch.arange(10))
        batches = LoaderBatches(DataLoader(data, batch_size=4))
        found = list(batches.epoch(0))
        assert [len(batch.target) for batch in found] == [4, 4, 2]
        assert (len(batches), batches.num_samples) == (3, 10)
        assert torch.equal(torch.cat([batch.images for batch in found]), data.tensors[0])
        assert found[0].index is None

    @pytest.mark.parametrize("options", [{}, {"generator": torch.Generator()}, {"num_workers": 2}])
    def test_randomness_is_a_function_of_the_epoch_and_batch(self, options):
        def batches():
            return LoaderBatches(DataLoader(Noisy(), batch_size=6, shuffle=True, **options), seed=5)

        first = list(batches().epoch(1))
        again = batches()
        for _ in again.epoch(0):
            torch.rand(3)
        np.random.rand()
        assert_same(first, list(again.epoch(1)))
        assert_same(first[2:], list(again.epoch(1, start=2)))
        assert not torch.equal(first[0].images, next(again.epoch(2)).images)

    def test_the_callers_random_state_is_left_alone(self):
        torch.manual_seed(0), np.random.seed(0), random.seed(0)
        expected = torch.rand(()), np.random.rand(), random.random()
        torch.manual_seed(0), np.random.seed(0), random.seed(0)
        list(LoaderBatches(DataLoader(Noisy(), shuffle=True)).epoch(0))
        assert expected == (torch.rand(()), np.random.rand(), random.random())

    def test_set_epoch_of_a_sampler_is_called(self):
        data = TensorDataset(torch.arange(8.0).view(8, 1, 1, 1), torch.arange(8))
        sampler = torch.utils.data.DistributedSampler(data, num_replicas=2, rank=0, seed=1)
        batches = LoaderBatches(DataLoader(data, batch_size=4, sampler=sampler))
        orders = [next(batches.epoch(epoch)).target.tolist() for epoch in (0, 1, 0)]
        assert orders[0] == orders[2] != orders[1]

    @pytest.mark.parametrize(
        "item",
        [
            ((torch.zeros(4, 3, 2, 2), torch.ones(4, 3, 2, 2)), torch.arange(4)),
            [[torch.zeros(4, 3, 2, 2), torch.ones(4, 3, 2, 2)], torch.arange(4)],
            {"images": (torch.zeros(4, 3, 2, 2), torch.ones(4, 3, 2, 2)), "target": torch.arange(4)},
        ],
    )
    def test_two_views_are_stacked(self, item):
        batch = next(LoaderBatches([item], views=2).epoch(0))
        assert batch.images.shape == (8, 3, 2, 2)
        assert batch.images[4:].eq(1).all()
        assert batch.target.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]

    def test_dicts_and_soft_targets_pass(self):
        soft = torch.full((2, 5), 0.2)
        batch = next(LoaderBatches([{"pixel_values": torch.zeros(2, 3, 4, 4), "labels": soft}]).epoch(0))
        assert torch.equal(batch.target, soft)

    @pytest.mark.parametrize(
        ("loader", "message"),
        [
            (
                [{"images": torch.zeros(2, 1), "extra": 1}],
                'must have "images" and "target", got the keys images, extra',
            ),
            ([torch.zeros(2)], r"must yield \(images, target\) or a mapping, got Tensor"),
            ([((torch.zeros(2, 1),) * 2, torch.zeros(2))], r"must give 1 view\(s\) of each image, got 2"),
            ([(np.zeros((2, 1)), torch.zeros(2))], "must be tensors, got ndarray, Tensor"),
            ([(torch.zeros(2, 1), torch.zeros(3))], "a batch has 2 images and 3 labels"),
        ],
    )
    def test_a_bad_batch_is_named(self, loader, message):
        with pytest.raises(InputError, match=message):
            list(LoaderBatches(loader).epoch(0))

    @pytest.mark.parametrize(
        ("loader", "message"),
        [
            ((item for item in ()), "must have a length .*, generator has none"),
            ([], "the loader has no batches"),
        ],
    )
    def test_a_bad_loader_is_named(self, loader, message):
        with pytest.raises(InputError, match=message):
            LoaderBatches(loader)

    def test_a_loader_that_ends_early_is_named(self):
        class Short(list):
            def __len__(self):
                return 3

        with pytest.raises(InputError, match="says it has 3 batches and gave 1"):
            list(LoaderBatches(Short([(torch.zeros(1, 1), torch.zeros(1))])).epoch(0))

    def test_views_must_be_one_or_two(self):
        with pytest.raises(InputError, match="views must be 1 or 2, got 3"):
            LoaderBatches([1], views=3)
