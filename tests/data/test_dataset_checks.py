import json

import pytest

pytest.importorskip("detectron2")

from cbbl_d2 import add_cbbl_config  # noqa: E402
from cbbl_d2.data.coco_format import register_coco_format  # noqa: E402
from cbbl_d2.data.dataset_checks import (  # noqa: E402
    check_datasets,
    describe_classes,
    set_num_classes,
)
from cbbl_d2.data.train_loader import ResumableTrainLoader  # noqa: E402
from cbbl_d2.errors import ConfigError, UserError  # noqa: E402
from cbbl_d2.evaluation import build_coco_evaluator  # noqa: E402
from detectron2.config import get_cfg  # noqa: E402
from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402
from detectron2.modeling import META_ARCH_REGISTRY  # noqa: E402


def make_cfg(train=(), test=(), num_classes=2):
    cfg = get_cfg()
    add_cbbl_config(cfg)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = num_classes
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = tuple(train), tuple(test)
    return cfg


def test_sound_data_sets_pass(register, content):
    name = register(content)
    check_datasets(make_cfg([name], [name]))
    check_datasets(make_cfg(["coco_2017_train"], [name]), eval_only=True)


def test_annotation_files_are_parsed_as_often_as_by_detectron2(register, content, monkeypatch):
    """Of a training: both files once to load them, the second once more for the metric."""
    train, val = register(content), register(content)
    cfg = make_cfg([train], [val], num_classes=0)
    cfg.DATALOADER.NUM_WORKERS = 0
    parsed = []
    monkeypatch.setattr(json, "load", lambda f: parsed.append(f.name) or json.loads(f.read()))
    set_num_classes(cfg)
    check_datasets(cfg)
    assert len(parsed) == 2
    ResumableTrainLoader(cfg)
    build_coco_evaluator(cfg, val)
    first = [d["annotations"] for d in DatasetCatalog.get(val)]
    assert len(parsed) == 3
    # Each caller has its own, and a changed file is read again.
    second = [d["annotations"] for d in DatasetCatalog.get(val)]
    assert first == second and first[0] is not second[0] and len(parsed) == 4
    check_datasets(cfg, eval_only=True)
    del content["annotations"][0]
    with open(MetadataCatalog.get(val).json_file, "w") as f:
        json.dump(content, f)
    assert sum(len(d["annotations"]) for d in DatasetCatalog.get(val)) == 3


def test_number_of_classes(register, content):
    name = register(content)
    with pytest.raises(ConfigError) as info:
        check_datasets(make_cfg([name], num_classes=80))
    assert str(info.value) == (
        f"MODEL.ROI_HEADS.NUM_CLASSES = 80, but data set {name} has 2 classes (car, ship): "
        "set MODEL.ROI_HEADS.NUM_CLASSES 2, or 0 to take it from the data"
    )


@pytest.mark.parametrize(
    "architecture, node",
    [("GeneralizedRCNN", "ROI_HEADS"), ("CBBLRetinaNet", "RETINANET"), ("CBBLFCOS", "FCOS")],
)
def test_zero_classes_become_those_of_the_data(register, content, architecture, node):
    content["categories"].append({"id": 3, "name": "never seen"})
    name = register(content)
    cfg = make_cfg([name], [name], num_classes=80)
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.MODEL[node].NUM_CLASSES = 0
    set_num_classes(cfg)
    check_datasets(cfg)
    assert cfg.MODEL[node].NUM_CLASSES == 3
    others = {"ROI_HEADS", "RETINANET", "FCOS"} - {node}
    assert all(cfg.MODEL[other].NUM_CLASSES == 80 for other in others)
    assert describe_classes(cfg) == (
        f"MODEL.{node}.NUM_CLASSES 3: the classes of data set {name} (car, never seen, ship)"
    )


def test_zero_classes_alone_and_without_the_training_data(register, content, new_name):
    name, gone = register(content), new_name()
    register_coco_format(gone, "gone.json", "gone")
    cfg = make_cfg([gone], [name], num_classes=0)
    set_num_classes(cfg, eval_only=True)  # nothing was loaded before
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2
    cfg = make_cfg([name], num_classes=0)
    set_num_classes(cfg, eval_only=True)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2
    cfg = make_cfg([gone], num_classes=7)
    set_num_classes(cfg)  # another number is not looked at
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 7


def test_zero_classes_and_no_data_that_names_them(new_name):
    name = new_name()
    DatasetCatalog.register(name, lambda: [{"file_name": "a.png"}])
    for train, words in (([name], f"{name} does not name its classes"), ([], "are empty: name")):
        with pytest.raises(ConfigError, match=f"ROI_HEADS.NUM_CLASSES = 0 .*{words}.*to a number"):
            set_num_classes(make_cfg(train, num_classes=0))


def test_classes_of_different_data_sets_are_still_compared(register, content):
    name = register(content)
    cfg = make_cfg([name], ["small_shapes_mini_val"], num_classes=0)
    set_num_classes(cfg)
    with pytest.raises(
        ConfigError, match=r"different classes.*\(car, ship\) and \(disk, ring,.*same categories"
    ):
        check_datasets(cfg)


def test_no_line_on_the_classes_of_a_model_without(register, content):
    cfg = make_cfg([register(content)])
    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    check_datasets(cfg)
    assert describe_classes(cfg) == ""


@pytest.mark.parametrize(
    "architecture, node",
    [
        ("GeneralizedRCNN", "ROI_HEADS"),
        ("PanopticFPN", "ROI_HEADS"),
        ("RetinaNet", "RETINANET"),
        ("CBBLRetinaNet", "RETINANET"),
        ("ConfigurableFCOS", "FCOS"),
        ("CBBLFCOS", "FCOS"),
    ],
)
def test_each_architecture_has_its_own_number_of_classes(register, content, architecture, node):
    assert architecture in META_ARCH_REGISTRY
    cfg = make_cfg([register(content)], num_classes=80)
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.MODEL[node].NUM_CLASSES = 3
    with pytest.raises(ConfigError, match=f"MODEL.{node}.NUM_CLASSES = 3, but .* 2 classes"):
        check_datasets(cfg)
    cfg.MODEL[node].NUM_CLASSES = 2  # the others stay at 80: this architecture does not read them
    check_datasets(cfg)


@pytest.mark.parametrize("architecture", ["ProposalNetwork", "SemanticSegmentor", "SomebodysOwn"])
def test_architectures_without_a_known_number_of_classes_pass(register, content, architecture):
    cfg = make_cfg([register(content)], num_classes=80)
    cfg.MODEL.META_ARCHITECTURE = architecture
    check_datasets(cfg)


def test_fcos_without_this_project_s_keys_passes(register, content):
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = (register(content),)
    cfg.MODEL.META_ARCHITECTURE = "FCOS"
    check_datasets(cfg)


def test_same_number_but_other_classes(register, folder, new_name, content):
    name, other = register(content), new_name()
    content["categories"] = [{"id": 0, "name": "ship"}, {"id": 7, "name": "car"}]
    (folder / "other.json").write_text(json.dumps(content))
    register_coco_format(other, str(folder / "other.json"), str(folder / "images"))
    with pytest.raises(ConfigError, match=r"\(car, ship\) and \(ship, car\)"):
        check_datasets(make_cfg([name], [other]))


def test_unknown_and_missing_data_sets(tmp_path, monkeypatch, error_of):
    with pytest.raises(ConfigError, match="TEST: unknown data set coco_2017_vall .did you mean"):
        check_datasets(make_cfg(test=["coco_2017_vall"]), eval_only=True)
    with pytest.raises(ConfigError, match="DATASETS.TRAIN is empty"):
        check_datasets(make_cfg(test=["coco_2017_val"]))
    # The folder of Detectron2's own data sets is chosen at import; here it is missing.
    metadata = MetadataCatalog.get("coco_2014_train")
    monkeypatch.setitem(metadata.__dict__, "json_file", str(tmp_path / "none.json"))
    for cfg in (make_cfg(["coco_2014_train"]), make_cfg(["coco_2014_train"], ["coco_2014_train"])):
        message = error_of(check_datasets, cfg)
        assert "data set coco_2014_train: " in message and "DETECTRON2_DATASETS" in message
        assert ".json does not exist" in message


def test_missing_image_stops_an_evaluation_only(register, folder, content, error_of):
    name = register(content)
    (folder / "images" / "b.png").unlink()
    check_datasets(make_cfg([name]))
    message = error_of(check_datasets, make_cfg([name], [name]))
    assert "1 of its 2 images are missing" in message
    assert str(folder / "images" / "b.png") in message and "annotations.json" in message


def test_losses_on_validation_data_need_objects(register, content, new_name, error_of):
    train, test = register(content), new_name()
    bare = [{k: v for k, v in d.items() if k != "annotations"} for d in DatasetCatalog.get(train)]
    DatasetCatalog.register(test, lambda: bare)
    cfg = make_cfg([train], [test])
    check_datasets(cfg)
    cfg.TEST.LOSS = True
    assert "has no annotated object: set TEST.LOSS False" in error_of(check_datasets, cfg)
    cfg.DATASETS.TEST = (train,)
    check_datasets(cfg)


def test_masks_and_keypoints_have_to_be_in_the_data(register, content):
    for annotation in content["annotations"]:
        annotation.pop("segmentation", None), annotation.pop("keypoints", None)
    name = register(content)
    cfg = make_cfg([name], [name])
    cfg.MODEL.MASK_ON = True
    with pytest.raises(UserError, match=f"{name}: its annotations have no segmentation.*MASK_ON"):
        check_datasets(cfg)
    cfg.MODEL.MASK_ON, cfg.MODEL.KEYPOINT_ON = False, True
    with pytest.raises(UserError, match=f"{name}: its annotations have no keypoints.*KEYPOINT_ON"):
        check_datasets(cfg)
    for annotation in content["annotations"]:
        annotation.update(keypoints=[1, 1, 2], num_keypoints=1)
    name = register(content)
    with pytest.raises(UserError, match="lacks the names of its keypoints.*keypoint_flip_map"):
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (name,)
        check_datasets(cfg)
    MetadataCatalog.get(name).set(keypoint_names=["tip"], keypoint_flip_map=[])
    check_datasets(cfg)
