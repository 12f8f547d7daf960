"""Strategies that wrap the module (FSDP of the first version, DeepSpeed): scoring goes through the wrapper."""

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, SingleDeviceStrategy
from torch.distributed.fsdp import _init_utils, fully_sharded_data_parallel
from torch.distributed.fsdp._common_utils import _FSDPDeviceHandle

import flow_lightning as fl
from flow_lightning.distributed import whole_parameters
from flow_lightning.method.losses import cross_entropy
from tests.examples import LinearRegression, fit
from tests.images import PictureData, tiny_module
from tests.processes import launch
from tests.shards import PicturesInOrder, Record, assert_same_parameters, record_of


class CpuFSDP(FSDPStrategy):
    """FSDP of the first version, which says that it needs a GPU, and works on a CPU where nobody asks for one."""

    root_device = torch.device("cpu")
    mesh_device = torch.device("cpu")

    def setup_environment(self):
        def on_cpu(state, module, ignored_params, device_id):
            state._device_handle = _FSDPDeviceHandle.from_device(torch.device("cpu"))
            return state

        fully_sharded_data_parallel._init_device_handle = _init_utils._init_device_handle = on_cpu
        super().setup_environment()


class Pictured(fl.WeightedLossModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = torch.nn.Linear(3 * 32 * 32, 9), torch.nn.Linear(9, 3)

    def features(self, batch):
        return self.body(batch["image"].flatten(1)).relu()

    def sample_losses(self, batch):
        return cross_entropy(self.head(self.features(batch)), batch["target"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class RecordWhole(Record):
    def on_train_end(self, trainer, pl_module):
        torch.save(sum(p.numel() for p in pl_module.parameters()), f"held{trainer.global_rank}.pt")
        with whole_parameters(trainer, pl_module):
            super().on_train_end(trainer, pl_module)


def fit_pictured(probe, **settings):
    callbacks = [fl.LinearProbeCallback(refit=False)] * probe + [RecordWhole()]
    data, settings = PicturesInOrder(n=21), {"max_steps": 2, "use_distributed_sampler": False} | settings
    fit(*callbacks, module=Pictured(), data=data, **settings)


def in_fsdp(probe):
    fit_pictured(probe, devices=2, strategy=CpuFSDP())


@pytest.mark.parametrize("probe", [False, True])
def test_fsdp_of_the_first_version_has_the_weights_and_the_steps_of_one_process(probe):
    fit_pictured(probe)
    expected, held = record_of(0), torch.load("held0.pt")
    launch(in_fsdp, probe)
    for rank in (0, 1):
        found = record_of(rank)
        assert torch.load(f"held{rank}.pt") <= held / 2 + 8  # padding
        torch.testing.assert_close(found["weights"], expected["weights"], rtol=1e-5, atol=1e-7)
        assert_same_parameters(found, expected, rtol=1e-4, atol=1e-6)


class Wrapper(torch.nn.Module):
    """Has parameters during its forward only, as DeepSpeed does, which needs a GPU; here they are 0 outside."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.kept = [p.detach().clone() for p in module.parameters()]
        self.empty()

    @torch.no_grad()
    def empty(self):
        for parameter in self.module.parameters():
            parameter.zero_()

    def forward(self, *args, **kwargs):
        with torch.no_grad():
            for parameter, kept in zip(self.module.parameters(), self.kept):
                parameter.copy_(kept)
        found = self.module(*args, **kwargs)
        if not torch.is_grad_enabled():
            self.empty()
        return found


class WrappingStrategy(SingleDeviceStrategy):
    """Wraps the module, and restores checkpoints after on_fit_start."""

    restore_checkpoint_after_setup = True

    def setup(self, trainer):
        super().setup(trainer)
        self.model = Wrapper(self.lightning_module)


def test_scoring_goes_through_a_wrapper_that_holds_the_parameters():
    """The file of one model is not taken for that of the other."""
    for seed in (0, 1):
        expected, found = fl.FlowWeightingCallback(), fl.FlowWeightingCallback(weights_file="weights/w.safetensors")
        fit(expected, module=LinearRegression(seed=seed))
        fit(found, module=LinearRegression(seed=seed), strategy=WrappingStrategy("cpu"), max_steps=1)
        assert torch.equal(found.weights.weights, expected.weights.weights)


def test_a_head_that_cannot_be_put_into_the_model_names_what_can():
    with pytest.raises(TypeError, match=r"Under WrappingStrategy a fitted head cannot be put .* Use ddp"):
        fit(fl.LinearProbeCallback(), module=tiny_module(), data=PictureData(), strategy=WrappingStrategy("cpu"))
