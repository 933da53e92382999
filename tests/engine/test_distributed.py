"""Several processes: the same training as in one, and one line where something goes wrong."""

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from cbbl_d2.config import check_cbbl_config
from cbbl_d2.engine import launch, load_config
from cbbl_d2.engine.lost_process import has_lost_process, has_timed_out
from cbbl_d2.errors import UserError
from detectron2.engine import SimpleTrainer, default_argument_parser
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException
from torch.nn.parallel import DistributedDataParallel

import train_net

launch_module = sys.modules[launch.__module__]
CONFIGS = os.path.join(os.path.dirname(__file__), "..", "..", "configs", "SmallShapes")
ITERATIONS = 5
# Rounding grows to 5e-5 in a few steps of a dense detector, depending on the processor: those are
# trained in double precision. For R-CNN, whose NMS takes float32 boxes, single precision is enough.
DTYPES = {
    "cbbl.yaml": torch.float32,
    "cbbl_retinanet.yaml": torch.float64,
    "cbbl_fcos.yaml": torch.float64,
}
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-7}
LEARNT = 5e-4  # how far the parameters go at least

# What the law below needs of every detector:
COMMON = {
    # no statistics over the batch, as BN has them;
    "MODEL.RESNETS.NORM": "GN",
    # and small.
    "MODEL.FPN.OUT_CHANNELS": 32,
}
DETECTORS = {
    "cbbl.yaml": {
        # No random sampling, and the number of regions, by which the losses are divided, is the
        # same for each image: all anchors become proposals, and all proposals are used.
        "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 1024,
        "MODEL.RPN.POSITIVE_FRACTION": 1.0,
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 2000,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": 2000,
        "MODEL.RPN.NMS_THRESH": 1.0,
        "MODEL.RPN.CONV_DIMS": [32],
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 2000,
        "MODEL.ROI_HEADS.POSITIVE_FRACTION": 1.0,
        "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 4,
        "MODEL.CBBL.REFINEMENT.GAMMA": 0.5,
    },
    "cbbl_retinanet.yaml": {},
    "cbbl_fcos.yaml": {"MODEL.CBBL.REFINEMENT.GAMMA": 0.5},
}


def _batch():
    """Four images that differ, with the same boxes: each has as many positive anchors."""
    generator = torch.Generator().manual_seed(1)
    boxes = torch.tensor([[4.0, 6, 16, 18], [20, 24, 50, 56], [40, 2, 48, 12]])
    batch = []
    for i in range(4):
        instances = Instances(
            (64, 64), gt_boxes=Boxes(boxes.clone()), gt_classes=torch.tensor([i, 1, 2])
        )
        image = torch.randint(0, 256, (3, 64, 64), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "height": 64, "width": 64, "instances": instances})
    return batch


def _build(config, seed=0):
    options = [word for pair in {**COMMON, **DETECTORS[config]}.items() for word in pair]
    cfg = load_config(os.path.join(CONFIGS, config))
    cfg.merge_from_list(options)
    cfg.MODEL.DEVICE = "cpu"
    torch.manual_seed(seed)
    return build_model(cfg).to(DTYPES[config])


def _train(model, batch):
    """The model's parameters after a few steps, by name."""
    bare = getattr(model, "module", model)
    # RetinaNet and FCOS divide by a moving average of the positive anchors in the batch of their
    # process. Detectron2 lets it start at a number that fits no batch in particular: the law holds
    # once that is forgotten, and here from the start.
    bare.loss_normalizer = 20.0 * len(batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    SimpleTrainer(model, [batch] * ITERATIONS, optimizer).train(0, ITERATIONS)
    return _parameters(bare)


def _parameters(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def _train_on_half(rank, folder):
    """One of two processes. Its models start elsewhere, and DDP must make up for it."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", world_size=2, rank=rank
    )
    for config in DETECTORS:
        # As DefaultTrainer does.
        model = DistributedDataParallel(_build(config, seed=rank), broadcast_buffers=False)
        trained = _train(model, _batch()[2 * rank : 2 * rank + 2])
        torch.save(trained, f"{folder}/{config}.{rank}.pth")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained_in_two_processes(tmp_path_factory):
    """Folder with the parameters of each detector after training in two processes."""
    folder = tmp_path_factory.mktemp("halves")
    torch.multiprocessing.spawn(_train_on_half, (str(folder),), nprocs=2)
    return folder


def _distance(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.parametrize("config", DETECTORS)
def test_two_processes_with_half_the_batch_train_as_one_with_all_of_it(
    trained_in_two_processes, config
):
    start = _parameters(_build(config))
    whole = _train(_build(config), _batch())
    for rank in range(2):
        path = trained_in_two_processes / f"{config}.{rank}.pth"
        assert _distance(torch.load(path, weights_only=True), whole) < TOLERANCES[DTYPES[config]]
    # It can fail: the parameters have moved far, and elsewhere than on one of the halves alone.
    assert _distance(whole, start) > LEARNT
    assert _distance(whole, _train(_build(config), _batch()[:2])) > LEARNT


def _arguments(**kwargs):
    defaults = {"num_gpus": 2, "num_machines": 1, "machine_rank": 0, "dist_url": "auto"}
    return argparse.Namespace(**{**defaults, **kwargs})


def _fail_in_process_1(args):
    if comm.get_rank() == 1:
        raise UserError("image.jpg: broken")
    comm.synchronize()  # as in training: the other one waits, and fails when it is alone


@pytest.fixture(scope="module")
def message():
    """What ``launch`` says when one of two processes on the CPU raises an error."""
    if torch.cuda.is_available():
        pytest.skip("for machines without a GPU")
    with pytest.raises(UserError) as error:
        launch(_fail_in_process_1, _arguments())
    return str(error.value)


@pytest.fixture
def needs_processes_on_the_cpu(message):
    if _refused(message):
        pytest.skip("this Detectron2 starts several processes on GPUs only")


def _refused(message):
    return "cannot start several processes" in message


def test_the_error_of_one_process_is_the_error_of_all(message):
    if _refused(message):  # Detectron2 v0.6
        assert message.startswith("--num-gpus 2 --num-machines 1: there is no GPU")
        assert "main branch" in message and message.endswith("in one process on the CPU")
    else:
        assert message == "image.jpg: broken"


def _interrupt_parent(args):
    if comm.get_rank() == 0:
        os.kill(os.getppid(), signal.SIGINT)
    time.sleep(600)


def test_an_interrupt_of_the_first_process_ends_all(needs_processes_on_the_cpu):
    with pytest.raises(KeyboardInterrupt):
        launch(_interrupt_parent, _arguments())
    for process in multiprocessing.active_children():
        process.join(60)
    assert not multiprocessing.active_children()


def _stop_answering(args):
    if comm.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    comm.synchronize()


@pytest.mark.slow  # torch gives a process that hangs half a minute before it kills it
def test_a_process_that_hangs_ends_all(needs_processes_on_the_cpu):
    message = "did not answer the others for 0 minutes: .*raise SOLVER.PROCESS_TIMEOUT"
    with pytest.raises(UserError, match=message):
        launch(_stop_answering, _arguments(), timeout=timedelta(seconds=5))
    assert not multiprocessing.active_children()


# As torch 2.14 words it.
GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/"
TIMED_OUT = GLOO + "unbound_buffer.cc:78] Timed out waiting 60000ms for recv operation to complete"
LOST = GLOO + "pair.cc:545] Read error [127.0.0.1]:5: Connection reset by peer. This is typically"


@pytest.mark.parametrize(
    "error, timed_out, lost",
    [
        (RuntimeError(TIMED_OUT), True, False),
        (RuntimeError("Application timeout caused pair closure"), True, False),
        (RuntimeError("Watchdog caught collective operation timeout: WorkNCCL(...)"), True, False),
        (RuntimeError(LOST), False, True),
        (
            RuntimeError("NCCL error: remote process exited or there was a network error"),
            False,
            True,
        ),
        # bugs and other troubles, which keep their traceback
        (ConnectionResetError(104, "Connection reset by peer"), False, False),
        (TimeoutError("timed out"), False, False),
        (RuntimeError("DataLoader timed out after 60 seconds"), False, False),
        (None, False, False),
    ],
)
def test_what_is_the_end_of_another_process(error, timed_out, lost):
    assert (has_timed_out(error), has_lost_process(error)) == (timed_out, lost)


@pytest.mark.parametrize(
    "error, message",
    [
        (ProcessRaisedException(LOST, 0, 1), "a process on another machine has ended"),
        (
            ProcessRaisedException("Timed out after 61 seconds waiting for clients.", 0, 1),
            "the processes did not find each other: .*--machine-rank 0",
        ),
        (ProcessExitedException("process 1", 1, 1, -9, "SIGKILL"), "maybe for lack of memory"),
    ],
)
def test_the_end_of_a_process_in_one_line(error, message, monkeypatch):
    def end(*args, **kwargs):
        raise error

    monkeypatch.setattr(launch_module, "detectron2_launch", end)
    with pytest.raises(UserError, match=message):
        launch(None, _arguments())


def test_a_bug_of_a_process_keeps_its_traceback(monkeypatch):
    def end(*args, **kwargs):
        raise ProcessRaisedException("IndexError: list index out of range", 0, 1)

    monkeypatch.setattr(launch_module, "detectron2_launch", end)
    with pytest.raises(ProcessRaisedException):
        launch(None, _arguments())


def test_the_timeout_is_that_of_the_config(monkeypatch, tmp_path):
    monkeypatch.setattr(train_net, "launch", lambda _, args, timeout: timeouts.append(timeout))
    timeouts = []
    config = os.path.join(CONFIGS, "instant_test.yaml")
    for words in ([], ["SOLVER.PROCESS_TIMEOUT", "7"]):
        words = ["--config-file", config, "--num-gpus", "2", "OUTPUT_DIR", str(tmp_path), *words]
        train_net.run(default_argument_parser().parse_args(words))
    assert timeouts == [timedelta(minutes=60), timedelta(minutes=7)]


@pytest.mark.parametrize("minutes", (0, -1, 0.5))
def test_a_timeout_that_makes_no_sense_is_refused(minutes):
    cfg = load_config(os.path.join(CONFIGS, "instant_test.yaml"))
    cfg.SOLVER.PROCESS_TIMEOUT = minutes
    with pytest.raises(UserError, match="SOLVER.PROCESS_TIMEOUT = .*: must be an integer from 1"):
        check_cbbl_config(cfg)


def _count_processes(args):
    raise UserError(f"rank {comm.get_rank()} of {comm.get_world_size()}")


def test_one_process_is_this_one():
    with pytest.raises(UserError, match="rank 0 of 1"):
        launch(_count_processes, _arguments(num_gpus=1))


def _train_net(repository, folder, *words):
    options = ("SOLVER.MAX_ITER", "6", "SOLVER.CHECKPOINT_PERIOD", "3", "MODEL.RESNETS.NORM", "GN")
    return subprocess.run(
        [
            sys.executable,
            os.path.join(repository, "train_net.py"),
            *("--config-file", os.path.join(CONFIGS, "instant_test.yaml")),
            *("--num-gpus", "2", "--dist-url", "auto"),
            *words,
            *options,
        ],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


def _metrics(folder):
    """All that metrics.json says, but for the timings, which differ from run to run."""
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [{k: repr(v) for k, v in row.items() if "time" not in k} for row in rows]


def test_train_net_trains_evaluates_and_resumes_in_two_processes(message, repository, tmp_path):
    result = _train_net(repository, tmp_path, "OUTPUT_DIR", "whole")
    if _refused(message):
        assert result.returncode == 1
        (line,) = [line for line in result.stderr.splitlines() if "error" in line.lower()]
        assert line == f"error: {message}" and "Traceback" not in result.stderr
        assert not (tmp_path / "whole").exists()
        return
    assert result.returncode == 0, result.stderr
    assert "running on the CPU in 2 processes" in result.stdout
    whole = tmp_path / "whole"
    training, evaluation = _metrics(whole)  # each row once
    assert training["iteration"] == "5" and evaluation["iteration"] == "6"
    assert float(evaluation["bbox/AP"]) >= 0  # not NaN
    predictions = json.loads((whole / "inference" / "coco_instances_results.json").read_text())
    assert len({p["image_id"] for p in predictions}) == 12  # of both processes

    # As if it had been interrupted after its first checkpoint. Group norm, because with batch norm
    # each process has statistics of its own, of which the checkpoint holds those of the first.
    parts = tmp_path / "parts"
    shutil.copytree(whole, parts)
    (parts / "metrics.json").unlink()
    (parts / "model_final.pth").unlink()
    (parts / "last_checkpoint").write_text("model_0000002.pth")
    result = _train_net(repository, tmp_path, "--resume", "OUTPUT_DIR", "parts")
    assert result.returncode == 0, result.stderr
    assert "Starting training from iteration 3" in result.stdout
    assert _metrics(parts) == [training, evaluation]
    states = [torch.load(d / "model_final.pth", weights_only=True) for d in (whole, parts)]
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name]), name
