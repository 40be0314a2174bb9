"""Every check, in the order of the table: what is quick first, what starts machinery last."""

from functools import partial
from pathlib import Path

from mmkd.commands.doctor import machine, packages, peers, places
from mmkd.commands.doctor.isolated import Check
from mmkd.evaluation.install import INSTALL

CUDA = "pip install 'mmkd[cuda]'"
CHARTS = "pip install 'mmkd[trackers]'"
NEW_TORCH = "pip install -U torch"
PLACES, PEERS = "output and hub", "optional"


def all_checks(output_dir: Path) -> list[Check]:
    """The checks; making them imports none of what they look at."""
    return [*_core(), *_devices(), *_kernels(), *_places(output_dir), *_peers()]


def _core() -> list[Check]:
    remove = "pip uninstall -y torchvision"
    return [
        Check("core", "python", packages.python, "python3.11 -m venv .venv", needed=True),
        Check("core", "mmkd", packages.mmkd, needed=True),
        *(_package("core", wanted, needed=True) for wanted in packages.requirements()),
        Check("core", "torchvision", packages.torchvision, remove, needed=True),
    ]


def _devices() -> list[Check]:
    return [
        Check("devices", "CPU", machine.cpu),
        Check("devices", "memory", machine.memory),
        Check("devices", "GPU", machine.gpus),
        Check("devices", "torch.distributed", machine.backends, NEW_TORCH),
    ]


def _kernels() -> list[Check]:
    flash = "pip install flash-attn --no-build-isolation"
    return [
        Check("kernels", "mamba-ssm", partial(machine.kernel, "mamba-ssm"), CUDA),
        Check("kernels", "causal-conv1d", partial(machine.kernel, "causal-conv1d"), CUDA),
        Check("kernels", "triton", machine.triton, CUDA),
        Check("kernels", "flash-attn", machine.flash_attention, flash),
        Check("kernels", "torch grouped_mm", machine.grouped_product, NEW_TORCH),
    ]


def _places(output_dir: Path) -> list[Check]:
    elsewhere = "set output_dir to a folder that can be written"
    write = partial(places.folder, output_dir)
    return [
        Check(PLACES, "output_dir", write, elsewhere, needed=True),
        Check(PLACES, "hub", places.hub, "export HF_HUB_OFFLINE=1, and name folders in recipes"),
        Check(PLACES, "hub login", places.login, "hf auth login"),
        Check(PLACES, "hub cache", places.hub_cache, "export HF_HOME to a folder with room"),
    ]


def _peers() -> list[Check]:
    again = "pip install --force-reinstall --no-deps mmkd"
    return [
        Check(PEERS, "num2words", peers.num2words, "pip install num2words"),
        *(_package(PEERS, wanted) for wanted in packages.requirements("scenes")),
        *(Check(PEERS, name, partial(peers.tracker, name), CHARTS) for name in peers.TRACKERS),
        Check(PEERS, "lmms-eval", peers.lmms_eval, INSTALL),
        Check(PEERS, "lmms-eval --model mmkd", peers.registered, again),
        Check(PEERS, "deepspeed", peers.deepspeed, "pip install 'mmkd[deepspeed]'"),
    ]


def _package(section: str, wanted: packages.Wanted, *, needed: bool = False) -> Check:
    run = partial(packages.package, wanted)
    return Check(section, wanted.name, run, f"pip install '{wanted}'", needed=needed)
