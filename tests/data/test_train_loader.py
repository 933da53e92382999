import itertools

import pytest
import torch
from cbbl_d2.data.train_loader import ResumableSampler, ResumableTrainLoader
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.data.samplers import TrainingSampler


def batches_of(indices, batch_size, is_wide):
    """Batches as Detectron2 makes them, by its own class."""
    sizes = [(2, 1) if wide else (1, 2) for wide in is_wide]
    dicts = ({"index": i, "width": sizes[i][0], "height": sizes[i][1]} for i in indices)
    for batch in AspectRatioGroupedDataset(dicts, batch_size):
        yield [d["index"] for d in batch]


@pytest.mark.parametrize("skip", (0, 1, 2, 7, 23))
@pytest.mark.parametrize("batch_size", (1, 3, 4))
def test_sampler_continues_with_and_without_aspect_ratio_grouping(skip, batch_size):
    is_wide = (torch.rand(17, generator=torch.Generator().manual_seed(1)) < 0.3).tolist()
    sampler = TrainingSampler(17, seed=5)
    whole = list(itertools.islice(batches_of(iter(sampler), batch_size, is_wide), skip + 20))
    resumed = ResumableSampler(sampler, batch_size, skip, is_wide)
    rest = list(itertools.islice(batches_of(iter(resumed), batch_size, is_wide), 20))
    assert rest == whole[skip:]

    plain = list(itertools.islice(sampler, batch_size * (skip + 5)))
    resumed = ResumableSampler(sampler, batch_size, skip)
    assert list(itertools.islice(resumed, batch_size * 5)) == plain[batch_size * skip :]


@pytest.mark.parametrize("num_workers", (0, 2))
@pytest.mark.parametrize("grouping", (True, False))
def test_loader_continues(tiny_cfg, num_workers, grouping):
    tiny_cfg.DATALOADER.NUM_WORKERS = num_workers
    tiny_cfg.DATALOADER.ASPECT_RATIO_GROUPING = grouping

    def names(loader, num):
        return [[d["file_name"] for d in batch] for batch in itertools.islice(loader, num)]

    loader = ResumableTrainLoader(tiny_cfg)
    first = iter(loader)
    names(first, 4)
    state = loader.state_dict()
    assert state["num_batches"] == 4
    rest = names(first, 6)

    resumed = ResumableTrainLoader(tiny_cfg)
    resumed.load_state_dict(state)
    again = names(iter(resumed), 6)
    if num_workers == 0:
        assert again == rest
    else:  # in another order, and up to what was read ahead, but not from the beginning
        assert len(set(sum(again, [])) & set(sum(rest, []))) >= 6
        assert again != names(iter(ResumableTrainLoader(tiny_cfg)), 6)
    assert resumed.state_dict() == {**state, "num_batches": 10}


def test_torch_s_generator_is_left_alone(tiny_cfg):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    next(iter(ResumableTrainLoader(tiny_cfg)))
    assert torch.equal(torch.rand(1), expected)


def test_place_is_kept_with_broken_images_of_both_orientations(tiny_cfg, tmp_path):
    """A broken image is replaced before images are put into batches by their orientation."""
    from detectron2.data import DatasetCatalog
    from PIL import Image

    def load():
        dicts = []
        for i in range(12):
            size = (40, 30) if i % 2 else (30, 40)
            path = tmp_path / f"{i}.png"
            Image.new("RGB", size).save(path)
            box = {"bbox": [2, 2, 9, 9], "bbox_mode": 0, "category_id": 0}
            dicts.append(
                {
                    "file_name": str(path),
                    "image_id": i,
                    "width": size[0],
                    "height": size[1],
                    "annotations": [box],
                }
            )
        (tmp_path / "5.png").write_bytes(b"broken")
        return dicts

    DatasetCatalog.register("broken_and_mixed", load)
    try:
        tiny_cfg.DATASETS.TRAIN = ("broken_and_mixed",)
        tiny_cfg.SOLVER.IMS_PER_BATCH = 3

        def ids(loader, num):
            return [[d["image_id"] for d in batch] for batch in itertools.islice(loader, num)]

        loader = ResumableTrainLoader(tiny_cfg)
        whole = iter(loader)
        first = ids(whole, 10)
        state = loader.state_dict()
        rest = ids(whole, 10)
        assert 5 not in sum(first + rest, [])
        assert all(len({i % 2 for i in batch}) == 1 for batch in first + rest)
        resumed = ResumableTrainLoader(tiny_cfg)
        resumed.load_state_dict(state)
        assert ids(iter(resumed), 10) == rest
    finally:
        DatasetCatalog.remove("broken_and_mixed")
