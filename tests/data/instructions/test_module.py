import pickle
from pathlib import Path

import pytest
import torch
from lightning import LightningModule, seed_everything
from transformers import GPT2Config, GPT2LMHeadModel

import flow_lightning as fl
from flow_lightning.data.instructions import module as module_file
from flow_lightning.data.label_noise import LabelNoise
from flow_lightning.data.samplers import LengthGroupedSampler
from tests.examples import make_trainer
from tests.language import END, encode_one, instructions, tiny_tokenizer, write_jsonl


def data_module(n=20, tests=0, **settings):
    """Return a data module of `n` training records, none held out by default, and some test records."""
    settings = {"tokenizer": tiny_tokenizer(), "validation_fraction": 0} | settings
    if tests:
        settings["test"] = write_jsonl(Path("test.jsonl"), instructions(n + tests)[n:])
    return fl.InstructionDataModule(write_jsonl(Path("train.jsonl"), instructions(n)), **settings)


def texts(dataset):
    """Return the text of each sample, prompt and response."""
    return [tiny_tokenizer().decode(dataset[position]["input_ids"]) for position in range(len(dataset))]


def indices(loader):
    return [i for batch in loader for i in batch["index"].tolist()]


def test_training_scoring_and_test_loaders():
    data = data_module(20, 9, batch_size=3, limit_test=7, tokens_per_batch=900)
    data.setup()
    assert isinstance(data.train_dataloader().sampler, LengthGroupedSampler)
    for loader, n in ((data.train_dataloader(), 20), (data.scoring_dataloader(), 20), (data.test_dataloader(), 7)):
        batches = list(loader)
        assert sorted(indices(batches)) == list(range(n))
        for batch in batches:
            for row, i in zip(batch["input_ids"], batch["index"].tolist()):
                ids = loader.dataset[i]["input_ids"]
                assert torch.equal(row[: len(ids)], ids)
    scoring = [batch["input_ids"].shape for batch in data.scoring_dataloader()]
    assert len(scoring) > 1 and max(b * t for b, t in scoring) <= 900 and scoring[0][1] == max(t for _, t in scoring)
    assert data.test_set.dataset.records == instructions(27)[20:] and data.train_set.dataset.records is None
    pickle.dumps(data.train_dataloader().collate_fn)


def test_wrong_responses_are_in_the_training_records_and_not_in_the_test_records():
    data, plain = (data_module(20, 9, label_noise=noise) for noise in (LabelNoise(0.5), None))
    for each in (data, plain):
        each.setup()
    differ = [mine != right for mine, right in zip(texts(data.train_set.dataset), texts(plain.train_set.dataset))]
    assert sum(differ) == 10
    assert data.test_set.dataset.records == plain.test_set.dataset.records


def test_a_stage_sets_up_what_it_needs_once_and_a_loader_what_is_missing():
    data = data_module(20, 3, validation_fraction=0.2)

    def ready():
        sets = {"train": data.train_set, "val": data.val_set, "test": data.test_set}
        return [name for name, dataset in sets.items() if dataset is not None]

    for stage, expected in (("predict", []), ("validate", ["val"]), ("fit", ["train", "val"])):
        data.setup(stage)
        assert ready() == expected
    train_set = data.train_set
    data.setup("fit")
    assert len(data.test_dataloader().dataset) == 3, "a fit can ask for the test set"
    assert ready() == ["train", "val", "test"] and data.train_set is train_set
    assert len(data_module(20).scoring_dataloader().dataset) == 20


def test_the_order_of_training_follows_seed_everything_or_a_seed_of_its_own():
    def order(seed_of_run, **settings):
        seed_everything(seed_of_run, verbose=False)
        data = data_module(20, batch_size=4, **settings)
        data.setup("fit")
        torch.manual_seed(99)  # what comes later does not matter
        return [batch["index"].tolist() for batch in data.train_dataloader()]

    assert order(1) == order(1) != order(2)
    assert order(1, seed=5) == order(2, seed=5) != order(1)
    assert order(1, packed_tokens=200) == order(1, packed_tokens=200) != order(2, packed_tokens=200)


def test_validation_is_a_part_of_the_training_records_chosen_by_a_seed():
    parts = []
    for seed in (1, 1, 2):
        data = data_module(20, 9, validation_fraction=0.2, split_seed=seed)
        data.setup()
        parts.append((texts(data.train_set), texts(data.val_set)))
        assert sorted(indices(data.val_dataloader())) == list(range(4)) and len(data.train_set) == 16
    assert not {*parts[0][1]} & {*parts[0][0], *texts(data.test_set)}
    assert parts[0] == parts[1] != parts[2]
    everything = data_module(20)
    everything.setup("fit")
    assert everything.val_dataloader() == [] and everything.val_set is None
    assert sorted(parts[0][0] + parts[0][1]) == sorted(texts(everything.train_set))
    by_default = fl.InstructionDataModule(data.train, tokenizer=tiny_tokenizer())
    by_default.setup()
    assert (len(by_default.train_set), len(by_default.val_set)) == (19, 1)


def test_setup_reports_counts(caplog):
    data = data_module(20, limit_train=10, max_length=60, template="{instruction}")
    with caplog.at_level("INFO"):
        data.setup()
    dataset = data.train_set.dataset
    assert f"Training set: 10 samples, {len(dataset.targets)} tokens, {dataset.supervised.sum()} of" in caplog.text
    assert f"max_length=60: {dataset.truncated} samples" in caplog.text and dataset.truncated > 0


class Recorder(LightningModule):
    """Takes the place of a language model: has its tokenizer, and notes what it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.tokenizer = tiny_tokenizer()
        self.epochs, self.validated = [], []

    def on_train_epoch_start(self):
        self.epochs.append([])

    def training_step(self, batch):
        self.epochs[-1] += batch["index"].tolist()
        return self.weight

    def validation_step(self, batch):
        self.validated += batch["index"].tolist()

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_trainer_gives_the_tokenizer_and_a_new_order_each_epoch():
    data, model = data_module(30, 5, tokenizer=None, validation_fraction=0.1), Recorder()
    make_trainer(max_epochs=2, num_sanity_val_steps=0).fit(model, data)
    assert [sorted(epoch) for epoch in model.epochs] == [list(range(27))] * 2 and model.epochs[0] != model.epochs[1]
    assert sorted(model.validated) == sorted([*range(3), *range(3)])
    make_trainer().test(model, data, verbose=False)
    assert sorted(model.validated[6:]) == list(range(5))


def test_a_run_reads_in_prepare_data_only_once_and_its_checkpoint_keeps_the_settings(monkeypatch):
    data, when = data_module(20, 3, validation_fraction=0.2, batch_size=3, max_length=99, seed=5), []
    read, setup = module_file.read_records, fl.InstructionDataModule.setup
    monkeypatch.setattr(module_file, "read_records", lambda *a: (when.append(Path(a[0]).stem), read(*a))[1])
    monkeypatch.setattr(fl.InstructionDataModule, "setup", lambda *a, **k: (when.append("setup"), setup(*a, **k)))
    trainer = make_trainer()
    trainer.fit(Recorder(), data)
    data.test_dataloader()
    assert sorted(when[:3]) == ["test", "train", "train"], "one reading for training, one for validation"
    assert set(when[3:]) == {"setup"}
    trainer.save_checkpoint("x.ckpt")
    again = fl.InstructionDataModule.load_from_checkpoint("x.ckpt", weights_only=True)
    assert (again.train, again.batch_size, again.max_length, again.seed) == (data.train, 3, 99, 5)
    assert again.hparams == data.hparams and "tokenizer" not in data.hparams


class Reading(Recorder):
    """Notes what each process is given."""

    def on_train_end(self):
        data = self.trainer.datamodule
        loader = data.test_dataloader()
        sets = [texts(dataset) for dataset in (data.train_set, data.val_set, loader.dataset)]
        torch.save((sets, self.epochs[0], loader.batch_size), f"rank{self.global_rank}.pt")


def test_two_processes_share_the_data_that_rank_0_alone_reads(tmp_path, monkeypatch):
    data, alone = (data_module(20, 3, validation_fraction=0.2, batch_size=3) for _ in range(2))
    alone.setup()
    read = module_file.read_records

    def noted(*arguments):
        with (tmp_path / "readers").open("a") as file:
            file.write(f"{data.trainer.global_rank}")
        return read(*arguments)

    monkeypatch.setattr(module_file, "read_records", noted)
    make_trainer(devices=2, strategy="ddp_fork").fit(Reading(), data)
    expected = [texts(dataset) for dataset in (alone.train_set, alone.val_set, alone.test_set)]
    (sets, share, size), other = (torch.load(f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert sets == other[0] == expected and size == other[2] == 3
    assert sorted(share + other[1]) == list(range(16)) and len(share) == len(other[1])
    assert (tmp_path / "readers").read_text() == "000"


@pytest.mark.parametrize("padding_free", [False, True])
def test_samples_longer_than_the_model_are_cut_and_counted(padding_free, caplog):
    """Their losses are the model's own on the tokens that are left: the first ones."""
    tokenizer, template = tiny_tokenizer(), "{instruction} "
    encoded = [encode_one(f"{r['query']} ", r["response"], tokenizer) for r in instructions(20)]
    most = sorted(length for _, length in encoded)[15]  # five or so prompts alone are longer
    cut = [(ids[:most], length) for ids, length in encoded if length < most]
    size = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": most, "vocab_size": len(tokenizer)}
    model = GPT2LMHeadModel(GPT2Config(**size, initializer_range=0.2)).eval()
    with torch.no_grad():
        labels = [[-100] * length + ids[length:] for ids, length in cut]
        own = [model(torch.tensor([ids]), labels=torch.tensor([row])).loss for (ids, _), row in zip(cut, labels)]
    data = data_module(20, tokenizer=None, template=template, batch_size=3, padding_free=padding_free)
    flow, module = fl.FlowWeightingCallback(), fl.CausalLanguageModule(model, tokenizer)
    with caplog.at_level("INFO"):
        make_trainer(flow).fit(module, data)
    torch.testing.assert_close(flow.weights.losses, torch.stack(own), rtol=1e-5, atol=1e-5)
    longer = sum(len(ids) > most for ids, length in encoded if length < most)
    assert longer > 0 and len(cut) < 20
    told = f"Cut to the model's {most} positions: {longer} samples. Excluded, because the prompt alone fills it: "
    assert f"Training set: {len(cut)} samples" in caplog.text and f"{told}{20 - len(cut)}" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokenizer": None}, r"The tokenizer is not known.*Give InstructionDataModule\(tokenizer="),
        ({"validation_fraction": -0.1}, r"-0\.1 of 20 training samples leaves 20 to train.*between 0 and 1"),
        ({"validation_fraction": 0.01}, r"0\.01 of 20 training samples leaves 20 to train and 0 to validate"),
        ({}, r"There is no test set\. Give InstructionDataModule\(test="),
        ({"test": "generated:arithmetic:3"}, "`predict` is for classifiers.*text-generation"),
    ],
)
def test_bad_settings_and_prediction_are_explained(settings, message):
    with pytest.raises((ValueError, NotImplementedError), match=message):
        data = data_module(**settings)
        data.setup()
        data.test_dataloader()
        data.predict_dataloader()


@pytest.mark.parametrize("pad_token", [None, END])
def test_the_padding_is_the_tokenizers_or_else_the_end(pad_token):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token, tokenizer.pad_token = "!", pad_token
    expected = tokenizer.convert_tokens_to_ids(pad_token or "!")
    assert data_module(tokenizer=tokenizer).train_dataloader().collate_fn.keywords == {"pad_id": expected}


def test_sources_are_those_of_the_training_samples_after_the_split():
    records = [record | {"dataset": f"from {record['response']}"} for record in instructions(20)]
    source = write_jsonl(Path("sources.jsonl"), records)
    settings = {"tokenizer": tiny_tokenizer(), "validation_fraction": 0.2, "source_field": "dataset"}
    data = fl.InstructionDataModule(source, write_jsonl(Path("test.jsonl"), instructions(3)), **settings)
    assert len(data.sample_sources) == 16
    for text, place in zip(texts(data.train_set), data.sample_sources):
        assert text.endswith(place.removeprefix("from ") + END)
    data.setup("test")  # test records need no source
    assert len(data.test_set) == 3 and data_module(20).sample_sources is None


def test_a_source_field_that_no_record_has_stops_the_run_before_training():
    model = Recorder()
    with pytest.raises(ValueError, match=r"no record has a value in 'origin'\. The records have 'query', 'response'"):
        make_trainer().fit(model, data_module(20, source_field="origin"))
    assert model.epochs == []
