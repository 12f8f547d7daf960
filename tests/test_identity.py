"""An identity stays as long as nothing changed, in another process too, and changes with each thing that matters."""

import functools
import os
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning import LightningDataModule
from PIL import Image
from torch import nn
from torch.utils.data import ConcatDataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms import v2

import flow_lightning as fl
from flow_lightning import used_code
from flow_lightning.checksums import checksums
from flow_lightning.identity import UnidentifiableError, identity, model_identity
from tests.modules.test_causal_language import language_data, language_module

ROOT = Path(__file__).parents[1]
FACTOR = 2


def scaled(x):
    return FACTOR * x


def shifted(x, by=1):
    return helper(x) + by


def helper(x):
    return x


DIFFERENT = {
    "number": (1, 2),
    "type": (1, 1.0),
    "text": ("a", "b"),
    "order": ([1, 2], [2, 1]),
    "nesting": ([[1], 2], [1, [2]]),
    "borders": (["ab", "c"], ["a", "bc"]),
    "set": ({"a", "b"}, {"a", "c"}),
    "mapping": ({"a": 1}, {"a": 2}),
    "array": (np.arange(6), np.arange(6)[::-1]),
    "array shape": (np.zeros((2, 3)), np.zeros((3, 2))),
    "array type": (np.zeros(2, dtype=np.float32), np.zeros(2, dtype=np.int32)),
    "tensor": (torch.arange(3.0), torch.tensor([0.0, 1.0, 2.001])),
    "one of many": (torch.zeros(1000), torch.zeros(1000).index_fill(0, torch.tensor(501), 1e-30)),
    "bfloat16": (torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.float16)),
    "scalar": (torch.tensor(1.0), torch.tensor(2.0)),
    "lambda": (lambda x: x + 1, lambda x: x + 2),
    "default": (lambda x=1: x, lambda x=2: x),
    "closure": ((lambda y: lambda x: x + y)(1), (lambda y: lambda x: x + y)(2)),
    "partial": (functools.partial(scaled, 1), functools.partial(scaled, 2)),
    "builtin": (len, max),
    "builtin of an object": ({"cat": 0}.get, {"cat": 1}.get),
    "method of a type": (str.lower, str.upper),
    "dates": (np.array(["2026-01-01"], "datetime64[D]"), np.array(["2026-01-02"], "datetime64[D]")),
    "class": (nn.ReLU, nn.GELU),
    "transform": (v2.Compose([v2.Resize(8)]), v2.Compose([v2.Resize(9)])),
    "interpolation": (v2.Resize(8, v2.InterpolationMode.BICUBIC), v2.Resize(8, v2.InterpolationMode.NEAREST)),
    "object": (SimpleNamespace(a=[1]), SimpleNamespace(a=[2])),
    "picture": (Image.new("L", (2, 2), 0), Image.new("L", (2, 2), 1)),
    "generator": (torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)),
    "samples": (TensorDataset(torch.zeros(99, 2)), TensorDataset(torch.zeros(99, 2).index_fill(0, torch.tensor(7), 1))),
    "subset": (Subset(range(9), [0, 1]), Subset(range(9), [0, 2])),
    "concatenation": (ConcatDataset([[1], [2]]), ConcatDataset([[1], [3]])),
    "range": (range(3), range(4)),
}


SETTINGS = {"factor": 1}
RESIZE = v2.Resize(8)
elsewhere = types.ModuleType("elsewhere")  # a module of the user's own
elsewhere.__file__ = "/home/user/elsewhere.py"


def resized(x):
    return RESIZE(x)


def with_settings(x):
    return [SETTINGS["factor"] * helper(y) for y in x]  # in a comprehension, which is a function of its own


def through_a_module(x):
    return elsewhere.crop(x)


@functools.cache
def remembered(x):
    return helper(x) * FACTOR


class Classwide:
    sizes = {"a": [1]}

    @functools.cache  # noqa: B019
    def get(self, x):
        return with_settings(x)


USERS = {
    "a global dictionary": (with_settings, lambda patch: patch.setitem(SETTINGS, "factor", 2)),
    "a global transform": (resized, lambda patch: patch.setattr(sys.modules[__name__], "RESIZE", v2.Resize(9))),
    "a global number, in a cached function": (remembered, lambda p: p.setattr(sys.modules[__name__], "FACTOR", 3)),
    "a function used in a comprehension": (with_settings, lambda p: p.setattr(sys.modules[__name__], "helper", scaled)),
    "a function of another module": (through_a_module, lambda patch: patch.setattr(elsewhere, "crop", len)),
    "a container of a class": (Classwide, lambda patch: patch.setitem(Classwide.sizes, "a", [2])),
    "what a cached method uses": (Classwide, lambda patch: patch.setitem(SETTINGS, "factor", 2)),
}


@pytest.mark.parametrize("change", USERS)
def test_all_that_code_uses_counts(change, monkeypatch):
    elsewhere.crop = helper
    user, make_change = USERS[change]
    before = identity(user)
    assert identity(user) == before
    make_change(monkeypatch)
    assert identity(user) != before
    monkeypatch.undo()
    assert identity(user) == before


PACKAGE = {
    "mylib/__init__.py": "",
    "mylib/parts.py": "def focal(x): return x * 1\n",
    "mylib/dotted.py": "import mylib.parts\ndef use(x): return mylib.parts.focal(x)\n",
    "mylib/within.py": "def use(x):\n    from mylib.parts import focal\n    return focal(x)\n",
    "mylib/relative.py": "def use(x):\n    from .parts import focal\n    return focal(x)\n",
}


@pytest.mark.parametrize("how", ["dotted", "within", "relative"])
def test_code_of_ones_own_package_counts_however_it_is_imported(how, tmp_path):
    for name, text in PACKAGE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    code = f"from flow_lightning.identity import identity; from mylib.{how} import use; print(identity(use))"

    def identity_now():
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}", "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)

    before = identity_now().stdout
    (tmp_path / "mylib/parts.py").write_text("def focal(x): return x * 20\n")
    assert len(before) == 33 and identity_now().stdout != before


def test_the_names_of_attributes_are_no_names_of_globals(monkeypatch):
    before = identity(uses_an_attribute)
    monkeypatch.setitem(SETTINGS, "factor", 2)
    assert identity(uses_an_attribute) == before


def uses_an_attribute(x):
    return x.SETTINGS


def test_a_package_without_a_version_counts_by_its_file(monkeypatch, tmp_path):
    package = types.ModuleType("unversioned")
    file = tmp_path / "unversioned.py"
    file.write_text("def crop(x): return x")
    package.__file__ = str(file)
    exec(file.read_text(), package.__dict__)
    monkeypatch.setitem(sys.modules, "unversioned", package)
    monkeypatch.setattr(used_code, "_INSTALLED", (str(tmp_path),))
    used_code.version.cache_clear()
    before = identity(package.crop)
    file.write_text("def crop(x): return 2 * x")
    used_code.version.cache_clear()
    assert identity(package.crop) != before
    used_code.version.cache_clear()


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_has_another_identity(name):
    one, other = DIFFERENT[name]
    assert identity(one) != identity(other)
    assert identity(one) == identity(one)
    assert identity([one]) != identity([other])


def identities_of_language_models() -> None:
    """Print identities of models, and of data with a collate function, as a process of its own sees them."""
    data = language_data(Path.cwd())
    data.setup("fit")
    loader = data.scoring_dataloader()
    print(identity(loader.dataset, loader.collate_fn))
    for tune in ("full", "lora"):
        module = language_module(tune=tune)
        print(model_identity(module, tuple(module.new_parts)))


@pytest.mark.parametrize(
    ("printed", "count"),
    [
        ("t.identity([v for k, (v, _) in t.DIFFERENT.items()]), t.model_identity(t.Net())", 2),
        ("t.identities_of_language_models() or ''", 3),
    ],
)
def test_it_is_the_same_in_another_process(printed, count):
    """Order of sets, addresses and the seed of hashes are not."""
    ran = [
        subprocess.run(
            [sys.executable, "-c", f"from tests import test_identity as t; print({printed})"],
            capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert ran[0] == ran[1] and len(ran[0].split()) == count


def test_code_that_a_function_uses_counts(monkeypatch):
    before = identity(scaled), identity(shifted)
    monkeypatch.setitem(globals(), "FACTOR", 3)
    monkeypatch.setitem(globals(), "helper", lambda x: -x)
    assert identity(scaled) != before[0] and identity(shifted) != before[1]


def test_a_changed_picture_file_counts(tmp_path):
    for name in ("a/0", "a/1", "b/0"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (2, 2), 0).save(tmp_path / f"{name}.png")
    before = identity(ImageFolder(tmp_path))
    assert identity(ImageFolder(tmp_path)) == before
    os.utime(tmp_path / "a/1.png", (1, 1))
    assert identity(ImageFolder(tmp_path)) != before


def test_a_memory_mapped_file_counts_by_its_state(tmp_path):
    array = np.memmap(tmp_path / "x.bin", dtype=np.float32, mode="w+", shape=(4,))
    before = identity(array)
    assert identity(array) == before
    os.utime(tmp_path / "x.bin", (1, 1))
    assert identity(array) != before


class Net(fl.WeightedLossModule):
    def __init__(self, p=0.5, learning_rate=0.1, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(3, 2), nn.Dropout(p), nn.BatchNorm1d(2))
        self.learning_rate, self.scale = learning_rate, 1.0
        self.to(dtype)

    def sample_losses(self, batch):
        return self.body(batch).sum(1)


class OtherCode(Net):
    def sample_losses(self, batch):
        return self.body(batch).mean(1)


class WithHparams(Net):
    def __init__(self, margin, learning_rate=0.1):
        super().__init__()
        self.save_hyperparameters()


def changed(change):
    net = Net()
    with torch.no_grad():
        change(net)
    return model_identity(net)


def test_a_model_counts_with_all_that_its_losses_depend_on():
    identities = [
        model_identity(Net()),
        model_identity(Net(p=0.6)),
        model_identity(Net(dtype=torch.bfloat16)),
        model_identity(OtherCode()),
        changed(lambda net: net.body[0].weight[1, 2].add_(1e-6)),
        changed(lambda net: net.body[2].running_mean[0].add_(1e-6)),
        changed(lambda net: setattr(net, "scale", 2.0)),
        changed(lambda net: setattr(net.body[2], "eps", 1e-3)),
        changed(lambda net: setattr(net, "loss", nn.HuberLoss(delta=2.0))),
        changed(lambda net: setattr(net, "_margin", 2.0)),
        changed(lambda net: setattr(net, "class_weights", torch.ones(3))),
        changed(lambda net: setattr(net, "class_weights", torch.tensor([1.0, 1.0, 2.0]))),
        changed(lambda net: net.register_buffer("mean", torch.zeros(1), persistent=False)),
        changed(lambda net: net.register_buffer("mean", torch.ones(1), persistent=False)),
        model_identity(WithHparams(margin=1.0)),
        model_identity(WithHparams(margin=2.0)),
    ]
    assert len(set(identities)) == len(identities)
    assert model_identity(Net()) == identities[0]


def test_a_model_counts_without_what_its_losses_do_not_depend_on():
    before = model_identity(Net())
    assert model_identity(Net(learning_rate=1.0)) == before
    assert changed(lambda net: setattr(net, "reduction", "weights")) == before
    assert model_identity(WithHparams(1.0)) == model_identity(WithHparams(1.0, learning_rate=1.0))
    assert changed(lambda net: net.eval()) == before
    assert changed(lambda net: net.requires_grad_(False)) == before


def test_excluded_parameters_do_not_count():
    other = Net()
    with torch.no_grad():
        other.body[0].weight.add_(1)
    assert model_identity(other, ("body.0.",)) == model_identity(Net(), ("body.0.",))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]
)
def test_checksums_see_every_element(dtype):
    values = torch.ones(5, 3).to(dtype)
    for position in range(15):
        other = values.clone()
        other.view(-1)[position] = 0
        assert not torch.equal(checksums(values), checksums(other))
    assert torch.equal(checksums(values), checksums(values.clone()))


def swapped(values, one, other):
    values = values.clone()
    values[[one, other]] = values[[other, one]]
    return values


def test_checksums_see_rows_that_change_places():
    """All rows, and all columns, of this one have the same sum."""
    values = torch.eye(2048)
    assert not torch.equal(checksums(values), checksums(values.roll(1, 0)))


@pytest.mark.parametrize("places", [(0, 1), (5, 4_100_000), (2**22 + 3, 9_000_000), (0, 2**22)])
def test_checksums_see_elements_that_change_places(places):
    """In one row of a block, across rows, across blocks, in the rest that fills no row."""
    values = torch.arange(9_000_001, dtype=torch.float32)
    assert not torch.equal(checksums(values), checksums(swapped(values, *places)))
    assert not torch.equal(checksums(values[:9]), checksums(swapped(values[:9], 2, 7)))


def test_a_data_module_counts_by_code_and_plain_settings():
    class Data(LightningDataModule):
        def __init__(self, size):
            super().__init__()
            self.size, self.lock = size, open(os.devnull)  # noqa: SIM115

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch

    assert identity(Data(1)) == identity(Data(1)) != identity(Data(2))
    assert identity(Data(1).on_after_batch_transfer) != identity(Data(2).on_after_batch_transfer)


def test_a_method_of_a_data_module_counts_with_what_it_uses():
    class Data(LightningDataModule):
        def __init__(self, mean):
            super().__init__()
            self.normalize, self.lock = v2.Normalize([mean], [1.0]), open(os.devnull)  # noqa: SIM115

        @torch.no_grad()
        def normalized(self, batch):
            return self.normalize(batch)

        @torch.no_grad()
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return self.normalized(batch)

    hooks = [identity(Data(mean).on_after_batch_transfer) for mean in (0.0, 0.0, 0.5)]
    assert hooks[0] == hooks[1] != hooks[2]


def test_a_method_of_a_data_module_counts_with_its_hyperparameters():
    class Data(LightningDataModule):
        def __init__(self, clip):
            super().__init__()
            self.save_hyperparameters()

        def collate(self, samples):
            return torch.tensor(samples).clamp_max(self.hparams.clip)

    assert identity(Data(1).collate) == identity(Data(1).collate) != identity(Data(2).collate)


class Files:
    def __init__(self, root, names):
        self.root, self.names = root, names


@pytest.mark.parametrize(("root", "name"), [("pictures", "3.npy"), (None, "3.npy"), (None, "pictures/3.npy")])
def test_a_file_counts_however_it_is_named(root, name, tmp_path):
    """In a folder that the object names, or from the working directory."""
    path = tmp_path / (root or ".") / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"old")
    before = identity(Files(root, ["absent.npy", name]))
    assert identity(Files(root, ["absent.npy", name])) == before
    path.write_bytes(b"newer")
    assert identity(Files(root, ["absent.npy", name])) != before


def test_parts_of_one_memory_mapped_file_differ(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(40.0))
    array = np.load(tmp_path / "a.npy", mmap_mode="r")
    parts = [array[:20], array[20:], array[:40:2], array[1:21]]
    assert len(set(map(identity, parts))) == 4
    assert identity(np.load(tmp_path / "a.npy", mmap_mode="r")[20:]) == identity(array[20:])


def test_a_data_set_can_name_itself():
    class Remote:
        def __init__(self, version):
            self.version, self.connection = version, open(os.devnull)  # noqa: SIM115

        def identity(self):
            return self.version

    assert identity(Remote("1")) == identity(Remote("1")) != identity(Remote("2"))


def test_cycles_end():
    one, other = [1], [1]
    one.append(one)
    other.append([other])
    assert identity(one) == identity(one)
    module = Net()
    module.body.parents = [module.body]
    assert model_identity(module) == model_identity(module)


def test_networks_of_objects_take_one_look_at_each():
    """50 levels of two that share the next: 2 ** 50 ways through it."""

    def network(bottom):
        node = bottom
        for _ in range(50):
            node = SimpleNamespace(left=[node], right=(node, 1))
        return node

    assert identity(network([1])) == identity(network([1])) != identity(network([2]))


def test_torchvisions_feature_extractors_have_an_identity():
    def extractor(layer):
        torch.manual_seed(0)
        return create_feature_extractor(resnet18().eval(), [layer])

    assert model_identity(extractor("layer1")) == model_identity(extractor("layer1"))
    assert model_identity(extractor("layer1")) != model_identity(extractor("layer2"))


def test_recurrent_models_have_an_identity():
    assert model_identity(recurrent(3)) == model_identity(recurrent(3)) != model_identity(recurrent(4))


def recurrent(size):
    torch.manual_seed(0)
    return nn.LSTM(2, size)


def test_packages_of_another_interpreter_are_packages():
    assert used_code._is_installed_file("/opt/python/lib/python3.9/site-packages/torch/__init__.py")
    assert used_code._is_installed_file("/usr/lib/python3/dist-packages/numpy.py")
    assert not used_code._is_installed_file("/home/user/project/site_packages.py")


def test_the_folder_of_an_object_is_that_of_its_own_files(tmp_path):
    """Two objects that share the names of their files, not the folder."""
    names, paths = ["1.npy"], [tmp_path / folder / "1.npy" for folder in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        path.write_bytes(b"old")
    both = [Files("a", names), Files("b", names)]
    before = identity(both)
    paths[1].write_bytes(b"newer")
    assert identity(both) != before


def test_what_cannot_be_looked_into_is_refused():
    class Broken:
        def __reduce_ex__(self, protocol):
            return object, (), {"tensor": torch.eye(2).to_sparse()}

    with pytest.raises(UnidentifiableError, match="cannot be read"):
        identity(Broken())
    with open(os.devnull) as file, pytest.raises(UnidentifiableError, match="TextIOWrapper"):
        identity({"file": file})
