import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import LightningModule

import flow_lightning as fl
from flow_lightning.data.instructions import InstructionDataModule
from flow_lightning.data.instructions import module as module_file
from flow_lightning.data.samplers import LengthGroupedSampler
from tests.examples import make_trainer
from tests.language import END, instructions, tiny_tokenizer, write_jsonl


def data_module(tmp_path: Path, n: int = 20, **settings: Any) -> InstructionDataModule:
    source = write_jsonl(tmp_path / "train.jsonl", instructions(n))
    return InstructionDataModule(source, **({"tokenizer": tiny_tokenizer(), "validation_fraction": 0} | settings))


def texts(dataset: Any) -> list[str]:
    """Return the text of each sample, prompt and response."""
    return [tiny_tokenizer().decode(dataset[position]["input_ids"]) for position in range(len(dataset))]


@pytest.mark.parametrize("workers", [0, 1])
def test_training_scoring_and_test_loaders(tmp_path, workers):
    test = write_jsonl(tmp_path / "test.jsonl", instructions(9))
    data = data_module(tmp_path, 20, test=test, batch_size=3, limit_test=7, tokens_per_batch=900, num_workers=workers)
    data.setup()
    assert isinstance(data.train_dataloader().sampler, LengthGroupedSampler)
    for loader, n in ((data.train_dataloader(), 20), (data.scoring_dataloader(), 20), (data.test_dataloader(), 7)):
        batches = list(loader)
        assert sorted(i for batch in batches for i in batch["index"].tolist()) == list(range(n))
        for batch in batches:
            for row, i in zip(batch["input_ids"], batch["index"].tolist()):
                ids = loader.dataset[i]["input_ids"]
                assert torch.equal(row[: len(ids)], ids)
    scoring = [batch["input_ids"].shape for batch in data.scoring_dataloader()]
    assert len(scoring) > 1 and max(b * t for b, t in scoring) <= 900 and scoring[0][1] == max(t for _, t in scoring)
    assert data.test_set.dataset.records == instructions(7) and data.train_set.dataset.records is None
    pickle.dumps(data.train_dataloader().collate_fn)


def test_a_stage_sets_up_what_it_needs_and_once(tmp_path):
    test = write_jsonl(tmp_path / "test.jsonl", instructions(3))
    data = data_module(tmp_path, test=test, validation_fraction=0.2)

    def ready() -> list[str]:
        sets = {"train": data.train_set, "val": data.val_set, "test": data.test_set}
        return [name for name, dataset in sets.items() if dataset is not None]

    with pytest.raises(RuntimeError, match=r"This set is not there yet\. Call setup\(\)"):
        data.scoring_dataloader()
    for stage, expected in (("predict", []), ("validate", ["val"]), ("fit", ["train", "val"])):
        data.setup(stage)
        assert ready() == expected
    train_set = data.train_set
    data.setup("fit")
    assert len(data.test_dataloader().dataset) == 3, "a fit can ask for the test set"
    assert ready() == ["train", "val", "test"] and data.train_set is train_set


def test_validation_is_a_part_of_the_training_records_chosen_by_a_seed(tmp_path):
    parts = []
    for seed in (1, 1, 2):
        data = data_module(tmp_path, 20, validation_fraction=0.2, split_seed=seed)
        data.setup("fit")
        parts.append((texts(data.train_set), texts(data.val_set)))
        validated = sorted(i for batch in data.val_dataloader() for i in batch["index"].tolist())
        assert validated == list(range(4)) and len(data.train_set) == 16
    all_data = data_module(tmp_path, 20)
    all_data.setup("fit")
    assert sorted(parts[0][0] + parts[0][1]) == sorted(texts(all_data.train_set))
    assert parts[0] == parts[1] != parts[2]


def test_nothing_but_training_records_is_validated_by_default(tmp_path):
    source = write_jsonl(tmp_path / "train.jsonl", instructions(40))
    test = write_jsonl(tmp_path / "test.jsonl", instructions(60)[40:])
    data = InstructionDataModule(source, test, tokenizer=tiny_tokenizer())
    data.setup()
    assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (38, 2, 20)
    assert not {*texts(data.val_set)} & {*texts(data.train_set), *texts(data.test_set)}


def test_setup_reports_counts(tmp_path, caplog):
    with caplog.at_level("INFO"):
        data = data_module(tmp_path, 20, limit_train=10, max_length=60, template="{instruction}")
        data.setup()
    dataset = data.train_set.dataset
    assert f"Training set: 10 samples, {len(dataset.targets)} tokens, {dataset.supervised.sum()} of" in caplog.text
    assert f"max_length=60: {dataset.truncated} samples" in caplog.text and dataset.truncated > 0


class Recorder(LightningModule):
    """Takes the place of a language model: has its tokenizer, and notes what it is given."""

    def __init__(self, max_positions: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.tokenizer, self.max_positions = tiny_tokenizer(), max_positions
        self.epochs: list[list[int]] = []
        self.validated: list[int] = []

    def on_train_epoch_start(self) -> None:
        self.epochs.append([])

    def training_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        self.epochs[-1] += batch["index"].tolist()
        return self.weight

    def validation_step(self, batch: dict[str, torch.Tensor]) -> None:
        self.validated += batch["index"].tolist()

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_trainer_gives_the_tokenizer_and_a_new_order_each_epoch(tmp_path):
    test = write_jsonl(tmp_path / "test.jsonl", instructions(5))
    data = data_module(tmp_path, 30, tokenizer=None, test=test, validation_fraction=0.1)
    model = Recorder()
    make_trainer(max_epochs=2, num_sanity_val_steps=0).fit(model, data)
    assert [sorted(epoch) for epoch in model.epochs] == [list(range(27))] * 2 and model.epochs[0] != model.epochs[1]
    assert sorted(model.validated) == sorted([*range(3), *range(3)])
    make_trainer().test(model, data, verbose=False)
    assert sorted(model.validated[6:]) == list(range(5))


def test_a_fraction_of_0_means_no_validation(tmp_path):
    model, data = Recorder(), data_module(tmp_path, tokenizer=None)
    make_trainer().fit(model, data)
    assert len(model.epochs[0]) == 20 and not model.validated
    assert data.val_dataloader() == [] and data.val_set is None


def test_a_run_reads_and_tokenises_in_prepare_data_and_only_once(tmp_path, monkeypatch):
    data = data_module(tmp_path, test=write_jsonl(tmp_path / "test.jsonl", instructions(3)), validation_fraction=0.2)
    when: list[str] = []
    read, setup = module_file.read_records, InstructionDataModule.setup
    monkeypatch.setattr(module_file, "read_records", lambda *a: (when.append(Path(a[0]).stem), read(*a))[1])
    monkeypatch.setattr(InstructionDataModule, "setup", lambda *a, **k: (when.append("setup"), setup(*a, **k)))
    make_trainer().fit(Recorder(), data)
    data.test_dataloader()
    assert sorted(when[:3]) == ["test", "train", "train"], "one reading for training, one for validation"
    assert set(when[3:]) == {"setup"}


class Reading(Recorder):
    """Notes which process reads, and what each process is given."""

    def on_train_end(self) -> None:
        data: Any = self.trainer.datamodule
        found = [texts(dataset) for dataset in (data.train_set, data.val_set, data.test_dataloader().dataset)]
        torch.save(found, f"rank{self.global_rank}.pt")


def test_two_processes_have_the_data_that_rank_0_alone_reads(tmp_path, monkeypatch):
    data = data_module(tmp_path, test=write_jsonl(tmp_path / "test.jsonl", instructions(3)), validation_fraction=0.2)
    alone = data_module(tmp_path, test=str(tmp_path / "test.jsonl"), validation_fraction=0.2)
    alone.setup()
    read = module_file.read_records

    def noted(*arguments: Any) -> Any:
        with (tmp_path / "readers").open("a") as file:
            file.write(f"{data.trainer.global_rank}")
        return read(*arguments)

    monkeypatch.setattr(module_file, "read_records", noted)
    make_trainer(devices=2, strategy="ddp_fork").fit(Reading(), data)
    expected = [texts(dataset) for dataset in (alone.train_set, alone.val_set, alone.test_set)]
    assert [torch.load(f"rank{rank}.pt", weights_only=True) for rank in range(2)] == [expected] * 2
    assert (tmp_path / "readers").read_text() == "000"


def test_a_checkpoint_keeps_the_settings_and_no_objects(tmp_path):
    data = data_module(tmp_path, batch_size=3, max_length=99, seed=5)
    run = make_trainer()
    run.fit(Recorder(), data)
    run.save_checkpoint(tmp_path / "x.ckpt")
    again = fl.InstructionDataModule.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert (again.train, again.batch_size, again.max_length, again.seed) == (data.train, 3, 99, 5)
    assert again.hparams == data.hparams and "tokenizer" not in data.hparams


def test_several_processes_share_the_training_samples(tmp_path):
    test = write_jsonl(tmp_path / "test.jsonl", instructions(3))
    shares = []
    for rank in range(2):
        data = data_module(tmp_path, 20, batch_size=3, test=test)
        data.setup()
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank, strategy=None)
        shares.append([i for batch in data.train_dataloader() for i in batch["index"].tolist()])
        assert data.test_dataloader().batch_size == 3
    assert sorted(shares[0] + shares[1]) == list(range(20)) and len(shares[0]) == len(shares[1])


def test_samples_longer_than_the_model_are_refused(tmp_path):
    message = r"longest sample of the training set has \d+ tokens.*Set max_length=32 or less"
    with pytest.raises(ValueError, match=message):
        make_trainer().fit(Recorder(max_positions=32), data_module(tmp_path, tokenizer=None))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokenizer": None}, r"The tokenizer is not known.*Give InstructionDataModule\(tokenizer="),
        ({"validation_fraction": -0.1}, r"validation_fraction is -0\.1\. Give a share from 0 to below 1"),
        ({"validation_fraction": 0.01}, r"0\.01 of 20 training samples leaves 20 to train and 0 to validate"),
        ({"batch_size": 0}, "batch_size is 0. Give at least 1"),
        ({"tokens_per_batch": 0}, "tokens_per_batch is 0. Give at least 1"),
        ({}, r"There is no test set\. Give InstructionDataModule\(test="),
    ],
)
def test_bad_settings_are_explained(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        data = data_module(tmp_path, **settings)
        data.setup()
        data.test_dataloader()


@pytest.mark.parametrize("pad_token", [None, END])
def test_the_padding_is_the_tokenizers_or_else_the_end(pad_token, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token, tokenizer.pad_token = "!", pad_token
    expected = tokenizer.convert_tokens_to_ids(pad_token or "!")
    data = data_module(tmp_path, tokenizer=tokenizer)
    data.setup()
    assert data.train_dataloader().collate_fn.keywords == {"pad_id": expected}


def test_predict_names_what_lets_a_language_model_write(tmp_path):
    with pytest.raises(NotImplementedError, match="text-generation"):
        data_module(tmp_path, 4).predict_dataloader()
